//! Deferred outputs (`CACHEC_LAZY=1`): what only compilers read of a restored unit is not there until one runs.
//!
//! A build of nothing but hits then downloads what the user asked for, and nothing else. A deferred output is simply
//! absent: there is no placeholder that a tool could take for the file. A later cargo command, with cachec or without,
//! finds that the outputs are missing and asks for their units again.
//!
//! Within one cargo process a compiler may have to run after all. Before it does, the agent restores what was deferred,
//! and the wrapper runs the commands of what could not be restored, in the order in which cargo asked for them. They
//! are noted in the target directory:
//!
//! ```text
//! TARGET/.cachec-deferred-<cargo's process id>-<its start time>    notes, as messages of `ipc`; locked while in use
//! ```
//!
//! Of the environment a note has what cargo has added to its own; secrets of the build are not among it.
//!
//! Invariant: a unit is noted before cargo hears that it is done.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use cachec_protocol::Digest;
use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

use crate::ipc::{self, Promise, Promised, Variable};
use crate::process::start_time;

const FILE_PREFIX: &str = ".cachec-deferred-";

/// What is not there yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deferred {
    File { digest: Digest, executable: bool },
    Directory,
}

/// The files of one build that are not there yet, by path. Lock: one mutex, held for nothing else.
#[derive(Debug, Default)]
pub(crate) struct DeferredFiles(Mutex<HashMap<PathBuf, Deferred>>);

impl DeferredFiles {
    pub(crate) fn get(&self, path: &Path) -> Option<Deferred> {
        self.files().get(path).copied()
    }

    /// What is to come in a directory, by its name there.
    pub(crate) fn inside(&self, directory: &Path) -> Vec<(OsString, Deferred)> {
        let files = self.files();
        let inside = files.iter().filter(|(path, _)| path.parent() == Some(directory));
        inside.filter_map(|(path, file)| Some((path.file_name()?.to_owned(), *file))).collect()
    }

    pub(crate) fn extend(&self, files: impl IntoIterator<Item = (PathBuf, Deferred)>) {
        self.files().extend(files);
    }

    pub(crate) fn remove(&self, paths: impl IntoIterator<Item = PathBuf>) {
        let mut files = self.files();
        for path in paths {
            files.remove(&path);
        }
    }

    fn files(&self) -> MutexGuard<'_, HashMap<PathBuf, Deferred>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How to make a unit's outputs, should they be needed and nobody have them.
#[derive(Debug, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Note {
    #[n(0)]
    program: ByteVec,
    /// The program's name for itself.
    #[n(1)]
    name: Option<ByteVec>,
    /// What cargo has added to its own.
    #[n(2)]
    environment: Vec<Variable>,
    #[n(3)]
    working_directory: ByteVec,
    #[n(4)]
    promise: Promise,
    /// When the unit was restored, in nanoseconds since the epoch.
    #[n(5)]
    restored_ns: u64,
}

/// The notes of one cargo process.
#[derive(Debug)]
pub(crate) struct Notes {
    path: PathBuf,
    cargo: u32,
}

impl Notes {
    /// `None` where that process is none.
    pub(crate) fn of(target_directory: &Path, cargo: u32) -> Option<Self> {
        let name = format!("{FILE_PREFIX}{cargo}-{}", start_time(cargo)?);
        Some(Self { path: target_directory.join(name), cargo })
    }

    /// Notes a unit, and removes what may be left of its deferred outputs by an earlier build.
    ///
    /// # Errors
    /// Those of writing: the unit must not be deferred.
    pub(crate) fn add(&self, note: &Note) -> io::Result<()> {
        let mut file = self.open(File::options().append(true).create(true))?;
        if file.metadata()?.len() == 0 {
            self.remove_others();
        }
        file.write_all(&ipc::to_bytes(note))?;
        let deferred = note.promise.outputs.iter().filter(|_| note.promise.is_deferred);
        deferred.map(|output| fs::remove_file(output.path())).try_for_each(|removed| match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
    }

    /// Makes what is still missing by running its commands. Where one makes something else than was promised, what came
    /// after it is made again as well. Returns how many were run.
    ///
    /// # Errors
    /// Those of reading the notes and of running the commands.
    pub(crate) fn fulfil(&self) -> io::Result<usize> {
        let mut file = match self.open(File::options().read(true).write(true)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            opened => opened?,
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let environment = cargo_environment(self.cargo)?;
        let (mut runs, mut differs) = (0, false);
        let mut rest = bytes.as_slice();
        while let Some((header, behind)) = rest.split_first_chunk::<4>() {
            // A note that was cut off was not acted on.
            let Some((body, behind)) = behind.split_at_checked(ipc::body_length(*header)?) else { break };
            rest = behind;
            let note: Note = ipc::from_body(body)?;
            let outputs = &note.promise.outputs;
            if differs || outputs.iter().any(|output| fs::symlink_metadata(output.path()).is_err()) {
                note.run(&environment)?;
                runs += 1;
                differs |= outputs.iter().any(|output| !output.is_there());
            }
        }
        // From here on everything is there.
        file.set_len(0)?;
        Ok(runs)
    }

    fn open(&self, options: &mut std::fs::OpenOptions) -> io::Result<File> {
        let file = options.open(&self.path)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
        Ok(file)
    }

    /// Removes the notes of processes that are no more.
    fn remove_others(&self) {
        for entry in
            self.path.parent().and_then(|parent| fs::read_dir(parent).ok()).into_iter().flatten().flatten()
        {
            let name = entry.file_name();
            let process = name.to_str().and_then(|name| name.strip_prefix(FILE_PREFIX)?.split_once('-'));
            let is_over = |(id, started): (&str, &str)| {
                id.parse().ok().and_then(start_time).as_deref() != Some(started)
            };
            if process.is_some_and(is_over) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

impl Note {
    /// What is to be noted of this process's unit.
    ///
    /// # Errors
    /// Where cargo's own environment cannot be told from what it has added, or no file can be made.
    pub(crate) fn of_this_process(
        program: &OsStr,
        name: Option<OsString>,
        promise: Promise,
        notes: &Notes,
    ) -> io::Result<Self> {
        let inherited = cargo_environment(notes.cargo)?;
        let restored = file_time(notes.path.parent().unwrap_or(&notes.path))?;
        let restored = restored.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let added = std::env::vars_os().filter(|pair| !inherited.contains(pair));
        Ok(Self {
            program: program.as_bytes().to_vec().into(),
            name: name.map(|name| name.into_vec().into()),
            environment: added
                .map(|(name, value)| Variable { name: name.into_vec(), value: value.into_vec() })
                .collect(),
            working_directory: std::env::current_dir()?.into_os_string().into_vec().into(),
            promise,
            restored_ns: u64::try_from(restored.as_nanos()).unwrap_or(u64::MAX),
        })
    }

    /// Runs the command; a compiler writes into a directory of its own first, so that its outputs appear whole.
    fn run(&self, environment: &[(OsString, OsString)]) -> io::Result<()> {
        let mut arguments: Vec<&[u8]> = self.promise.arguments.iter().map(|word| word.as_slice()).collect();
        let directory = arguments.iter().position(|word| *word == b"--out-dir").map(|at| at + 1);
        let scratch = match directory.and_then(|at| arguments.get(at)) {
            Some(directory) => {
                let place =
                    Path::new(OsStr::from_bytes(&self.working_directory)).join(OsStr::from_bytes(directory));
                Some(tempfile::Builder::new().prefix(".cachec-").tempdir_in(place)?)
            }
            None => None,
        };
        if let (Some(at), Some(scratch)) = (directory, &scratch) {
            arguments[at] = scratch.path().as_os_str().as_bytes();
        }
        let mut command = Command::new(OsStr::from_bytes(&self.program));
        command
            .args(arguments.into_iter().map(OsStr::from_bytes))
            .env_clear()
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .envs(
                self.environment
                    .iter()
                    .map(|pair| (OsStr::from_bytes(&pair.name), OsStr::from_bytes(&pair.value))),
            )
            .env(crate::wrapper::TRACED_VARIABLE, "1")
            .current_dir(OsStr::from_bytes(&self.working_directory))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(name) = &self.name {
            command.arg0(OsStr::from_bytes(name));
        }
        crate::process::end_with_parent(&mut command);
        let status = command.status()?;
        if !status.success() {
            let program = String::from_utf8_lossy(&self.program);
            return Err(io::Error::other(format!("{program} ended with {status}")));
        }
        if let Some(mark) = &self.promise.mark {
            leave_mark(mark)?;
        }
        let restored = Duration::from_nanos(self.restored_ns);
        for output in &self.promise.outputs {
            if let (Some(scratch), Some(name)) = (&scratch, output.path().file_name()) {
                fs::rename(scratch.path().join(name), output.path())?;
            }
            // A script may have left less than the last time.
            let _ = set_modified(output.path(), SystemTime::UNIX_EPOCH + restored);
        }
        Ok(())
    }
}

impl Promised {
    fn path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.path))
    }

    /// Whether the file is there, with the content it should have.
    fn is_there(&self) -> bool {
        let digest = |file: File| blake3::Hasher::new().update_reader(file).map(|hasher| hasher.finalize());
        File::open(self.path()).and_then(digest).is_ok_and(|digest| Digest::from(digest) == self.digest)
    }
}

/// The time that a file made now in a directory has: a file system's clock may be behind the system's.
///
/// # Errors
/// Those of making one.
pub(crate) fn file_time(directory: &Path) -> io::Result<SystemTime> {
    tempfile::tempfile_in(directory)?.metadata()?.modified()
}

/// Has a file that comes late look as if it had come with the rest of its unit: cargo compares times.
///
/// # Errors
/// Those of opening the file.
pub(crate) fn set_modified(path: &Path, time: SystemTime) -> io::Result<()> {
    File::open(path)?.set_modified(time)
}

/// Makes the file that cargo misses as long as a script's outputs are not there: it has been there for ever.
///
/// # Errors
/// Those of making it: cargo runs the script again in its next build.
pub(crate) fn leave_mark(path: &[u8]) -> io::Result<()> {
    File::create(OsStr::from_bytes(path))?.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1))
}

/// The environment that cargo was started with.
fn cargo_environment(cargo: u32) -> io::Result<Vec<(OsString, OsString)>> {
    let bytes = fs::read(format!("/proc/{cargo}/environ"))?;
    let pairs = bytes.split(|byte| *byte == 0).filter_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        let text = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        Some((text(&pair[..at]), text(&pair[at + 1..])))
    });
    Ok(pairs.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_made_later_is_not_older() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for _ in 0..100 {
            let before = file_time(directory.path()).unwrap();
            fs::write(&path, "later").unwrap();
            assert!(fs::metadata(&path).unwrap().modified().unwrap() >= before);
            fs::remove_file(&path).unwrap();
        }
    }
}
