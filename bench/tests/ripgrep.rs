//! A real program in the release profile: everything is restored, bit for bit, and no compiler runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;
use cachec_bench::{Machine, Server, crates};

const LIBRARIES: usize = 33;

/// The libraries' files below a target directory, with their contents.
fn library_files(target: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(target.join("release/deps"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".rlib") || name.ends_with(".rmeta") {
            files.insert(name, fs::read(entry.path())?);
        }
    }
    Ok(files)
}

#[test]
fn ripgrep_is_restored_bit_for_bit() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let sources = directory.path().join("ripgrep");
    crates::unpack("ripgrep", "15.2.0", &sources)?;
    let server = Server::start(&directory.path().join("data"), &[])?;
    let machine = || Machine::with_server(&server.url)?.with_crates();

    let first = machine()?;
    let cold = first.cargo(&sources, &["build", "--release"])?;
    assert!(cold.success && cold.notices().is_empty(), "{}", cold.stderr);
    let compiled = library_files(&sources.join("target"))?;
    assert_eq!(compiled.len(), 2 * LIBRARIES);
    fs::remove_dir_all(sources.join("target"))?;

    // A new machine: its agent knows nothing. Nobody has waited for the first one's uploads.
    first.signal_agents("KILL");
    // Scripts may print where the compiler is, so that is the same for both, as in two containers.
    let compiler = first.path("bin/rustc");
    let second = machine()?.with("RUSTC", compiler.to_string_lossy());
    let warm = second.cargo(&sources, &["build", "--release"])?;
    assert!(warm.success && warm.notices().is_empty(), "{}", warm.stderr);
    assert!(warm.compiled.is_empty(), "compiled again: {:?}", warm.compiled);
    let statistics = second.statistics(&sources)?;
    assert_eq!(
        (statistics["remote_hits"].as_u64(), statistics["misses"].as_u64()),
        (statistics["units"].as_u64(), Some(0)),
        "{statistics}"
    );
    assert!(library_files(&sources.join("target"))? == compiled, "a restored file differs");

    let again = second.cargo(&sources, &["build", "--release"])?;
    assert!(again.success && again.compiled.is_empty(), "compiled again: {:?}", again.compiled);
    Ok(())
}
