//! The programs under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Paths of the programs, built in the profile that this program was built in.
#[derive(Debug)]
pub struct Programs {
    /// The client, `cachec`.
    pub client: PathBuf,
    /// The server, `cachec-server`.
    pub server: PathBuf,
}

/// Builds both programs once a process, so that a test never runs a stale one. `CACHEC_CLIENT` and `CACHEC_SERVER` name
/// others, as they are given to users.
///
/// # Panics
/// Where they do not build: nothing can be tested then.
pub fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let named = |name| std::env::var_os(name).map(PathBuf::from);
        if let (Some(client), Some(server)) = (named("CACHEC_CLIENT"), named("CACHEC_SERVER")) {
            return Programs { client, server };
        }
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
        let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
        let mut command = Command::new(cargo());
        command.args(["build", "--quiet", "--package=cachec", "--package=cachec-server"]);
        command.args(["--profile", profile]).current_dir(workspace);
        let built = command.status().is_ok_and(|status| status.success());
        assert!(built, "the programs under test do not build");
        let directory = target_directory().join(if profile == "dev" { "debug" } else { "release" });
        Programs { client: directory.join("cachec"), server: directory.join("cachec-server") }
    })
}

/// The cargo to run: the one that runs this program, or the first in `PATH`.
#[must_use]
pub fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// Cargo's target directory, which this program lies in.
fn target_directory() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let profile = own
        .ancestors()
        .find(|path| path.file_name().is_some_and(|name| name == "debug" || name == "release"));
    profile.and_then(Path::parent).unwrap_or(Path::new("target")).to_owned()
}
