//! Staging the launcher that takes the place of a build script's program; see [`crate::launcher`].
//!
//! A launcher is a copy of this very program. A link would be smaller, but some linkers (mold) write a new program
//! over the file that they find, under all of its names; and cargo compares its time with those of libraries.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use crate::ipc::{Placement, Rename};
use crate::process::wait_for_starting;
use crate::unit::Unit;

/// A launcher that is to be renamed to its place; removed when dropped, if it was not.
#[derive(Debug)]
pub(super) struct StagedLauncher {
    path: TempPath,
    destination: PathBuf,
}

impl StagedLauncher {
    pub(super) fn rename(&self) -> Rename {
        let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
        Rename { staged: bytes(&self.path), destination: bytes(&self.destination) }
    }
}

/// Names of a build script's program, and of where it is kept beside its launcher.
pub(super) fn kept_program(unit: &Unit) -> Option<(&str, String)> {
    let invocation = unit.invocation()?;
    Some((invocation.script_program()?, crate::launcher::kept_name(&invocation.crate_name)))
}

/// Where a build script's program is kept.
pub(super) fn kept_path(unit: &Unit) -> Option<PathBuf> {
    kept_program(unit).map(|(_, kept)| unit.output_directory().join(kept))
}

/// Stages a launcher where the unit makes a build script's program. Without one the script is simply run.
pub(super) fn stage(unit: &Unit) -> Option<StagedLauncher> {
    let (program, _) = kept_program(unit)?;
    let destination = unit.output_directory().join(program);
    let path = copy(unit).inspect_err(|error| tracing::info!("no launcher: {error}")).ok()?;
    Some(StagedLauncher { path, destination })
}

/// What the wrapper is to do after it has run the compiler.
pub(super) fn placement(unit: &Unit, staged: &StagedLauncher) -> Option<Placement> {
    let kept = kept_path(unit)?.into_os_string().into_vec();
    Some(Placement { launcher: staged.rename(), kept })
}

/// Copies this program beside the unit's outputs; a clone where the file system has them.
fn copy(unit: &Unit) -> io::Result<TempPath> {
    let mut program = File::open("/proc/self/exe")?;
    let mut staged = tempfile::Builder::new().prefix(".cachec-").tempfile_in(unit.output_directory())?;
    // The agent's own mask may be narrower than the build's.
    staged.as_file().set_permissions(fs::Permissions::from_mode(0o777 & !unit.umask))?;
    if rustix::fs::ioctl_ficlone(staged.as_file(), &program).is_err() {
        io::copy(&mut program, staged.as_file_mut())?;
    }
    let path = staged.into_temp_path();
    wait_for_starting();
    Ok(path)
}
