//! The launcher: what cargo finds, and starts, in the place of a build script's program.
//!
//! It is this very file under another name, with the program kept beside it. Where cachec is not in use, or is not
//! the one that has put the launcher there, the program runs as if it were here.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use crate::connect::Program;
use crate::wrapper::{self, Command};

/// Hidden commands of this file that may be started under a launcher's name.
const COMMANDS: [&str; 1] = ["serve-leftover"];

/// Name of the file that a build script's program is kept in.
pub(crate) fn kept_name(crate_name: &str) -> String {
    format!("{crate_name}.cachec")
}

/// The program that this process was started in the place of, if it was; its usual path where it is missing.
pub(crate) fn launched(arguments: &[OsString]) -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    let name = own.file_name()?.to_str()?;
    if !name.starts_with("build-script-") && !name.starts_with("build_script_")
        || arguments.first().is_some_and(|word| COMMANDS.iter().any(|command| word == command))
    {
        return None;
    }
    // Under the name that cargo gives it, or under the compiler's: crate name and hash.
    let names = [Some(name), name.rsplit_once('-').map(|(crate_name, _)| crate_name)];
    let kept = |name: &str| own.with_file_name(kept_name(&name.replace('-', "_")));
    let found = names.into_iter().flatten().map(kept).find(|path| path.is_file());
    Some(found.unwrap_or_else(|| kept(name)))
}

/// Runs the program, or restores what it would leave.
pub(crate) fn run(started: Instant, program: &Path, arguments: &[OsString]) -> ExitCode {
    let command = Command { program: program.as_os_str(), arguments, is_script: true, is_heard: false };
    let own_bytes = Program::own().map(|own| own.size_bytes).ok();
    match wrapper_in_use().filter(|wrapper| Some(wrapper.size_bytes) == own_bytes) {
        Some(wrapper) => wrapper::run(started, &command, &wrapper),
        None => command.become_it(),
    }
}

/// The compiler wrapper that cargo is using.
fn wrapper_in_use() -> Option<Program> {
    let name = PathBuf::from(std::env::var_os("RUSTC_WRAPPER").filter(|name| !name.is_empty())?);
    if name.components().count() > 1 {
        return Program::at(name).ok();
    }
    let search = std::env::var_os("PATH")?;
    std::env::split_paths(&search).find_map(|directory| Program::at(directory.join(&name)).ok())
}

/// What this process was started as.
pub(crate) fn own_name() -> OsString {
    std::env::args_os().next().unwrap_or_else(|| OsStr::new("build-script-build").to_owned())
}
