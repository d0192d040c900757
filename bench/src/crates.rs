//! Real programs from the package registry, as benchmark inputs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::programs::cargo;

/// The parts of `name@version`.
///
/// # Errors
/// Where it has no such parts.
pub fn name_and_version(program: &str) -> anyhow::Result<(&str, &str)> {
    program.split_once('@').context("a program is named as name@version")
}

/// Unpacks a package's archive into a directory, and fetches what it depends on.
///
/// # Errors
/// Where the registry cannot be reached and the package was not fetched before.
pub fn unpack(name: &str, version: &str, directory: &Path) -> anyhow::Result<()> {
    let archive = fetch_archive(name, version)?;
    fs::create_dir_all(directory)?;
    let status = Command::new("tar")
        .args(["--extract", "--strip-components=1", "--file"])
        .arg(&archive)
        .arg("--directory")
        .arg(directory)
        .status()
        .context("tar")?;
    anyhow::ensure!(status.success(), "{} could not be unpacked", archive.display());
    // The archive's own Cargo.lock names the versions.
    let status =
        Command::new(cargo()).args(["fetch", "--quiet", "--locked"]).current_dir(directory).status()?;
    anyhow::ensure!(status.success(), "the dependencies of {name} could not be fetched");
    Ok(())
}

/// `CARGO_HOME` of the user who runs this, which the archives lie in.
///
/// # Errors
/// Where there is no home directory.
pub fn cargo_home() -> anyhow::Result<PathBuf> {
    match std::env::var_os("CARGO_HOME") {
        Some(home) => Ok(home.into()),
        None => Ok(Path::new(&std::env::var_os("HOME").context("HOME is not set")?).join(".cargo")),
    }
}

fn fetch_archive(name: &str, version: &str) -> anyhow::Result<PathBuf> {
    let cache = cargo_home()?.join("registry/cache");
    let find = || {
        let registries = fs::read_dir(&cache).into_iter().flatten().flatten();
        registries
            .map(|entry| entry.path().join(format!("{name}-{version}.crate")))
            .find(|path| path.is_file())
    };
    if let Some(archive) = find() {
        return Ok(archive);
    }
    // Cargo fetches the archive to show what it says of itself. Outside of any workspace, which might
    // name another version.
    let status = Command::new(cargo())
        .args(["info", "--quiet", &format!("{name}@{version}")])
        .current_dir("/")
        .stdout(Stdio::null())
        .status()?;
    match find() {
        Some(archive) if status.success() => Ok(archive),
        _ => bail!("{name} {version} could not be fetched from the package registry"),
    }
}
