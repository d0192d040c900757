//! The wrapper: what cargo runs in the compiler's place. Synchronous, and gone in a few milliseconds on a hit.
//!
//! Invariant: whatever goes wrong with cachec, the compiler runs with the arguments cargo gave, and its
//! output, exit code and signal are passed on.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode, ExitStatus};
use std::time::Instant;

use crate::config::{Config, Mode, Surroundings};
use crate::connect::{Address, Program};
use crate::deferred::{Note, Notes, leave_mark};
use crate::invocation::{is_probe, is_storable_probe, target_directory};
use crate::ipc::{self, Finished, Hit, Placement, Rename, Request, Response, Run, UnitRequest, Variable};
use crate::process::{end_like, end_with_parent, umask};
use crate::streams::{self, Recorded};
use crate::{debug_paths, launcher, memo, notice};

/// Set for what a traced command starts: wrappers and launchers in there step aside.
pub(crate) const TRACED_VARIABLE: &str = "CACHEC_TRACED";

/// What a wrapper runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Command<'a> {
    /// A compiler, or a build script's program.
    pub(crate) program: &'a OsStr,
    /// As cargo gave them.
    pub(crate) arguments: &'a [OsString],
    pub(crate) is_script: bool,
    /// Whether cargo shows what is written to standard error.
    pub(crate) is_heard: bool,
}

impl Command<'_> {
    /// Becomes the command: nothing of cachec is left.
    pub(crate) fn become_it(&self) -> ExitCode {
        let error = self.with_arguments(self.arguments.iter().map(OsString::as_os_str)).exec();
        eprintln!("cachec: cannot run {}: {error}", self.program.to_string_lossy());
        ExitCode::from(127)
    }

    /// Tells the user, once in a build.
    fn say(&self, directory: &Path, text: &str) {
        if self.is_heard {
            notice::once(directory, text);
        }
    }

    fn with_arguments<'w>(&self, arguments: impl Iterator<Item = &'w OsStr>) -> process::Command {
        let mut command = process::Command::new(self.program);
        command.args(arguments);
        if self.is_script {
            command.arg0(launcher::own_name());
        }
        command
    }
}

/// Runs one unit of a compiler, with the arguments that cargo gave.
pub(crate) fn run_compiler(started: Instant, compiler: &OsStr, arguments: &[OsString]) -> ExitCode {
    let words: Vec<Vec<u8>> = arguments.iter().map(|word| word.as_bytes().to_vec()).collect();
    let is_probe = is_probe(&words);
    let command = Command { program: compiler, arguments, is_script: false, is_heard: !is_probe };
    if is_probe && !is_storable_probe(&words, has_empty_input()) {
        return command.become_it();
    }
    match Program::own() {
        Ok(own) => run(started, &command, &own),
        Err(_) => command.become_it(),
    }
}

/// Whether standard input is the null device.
fn has_empty_input() -> bool {
    let device = |path: &str| fs::metadata(path).map(|metadata| metadata.rdev()).ok();
    device("/proc/self/fd/0").is_some_and(|input| Some(input) == device("/dev/null"))
}

/// Runs one unit with the agent of `wrapper`, this program under the name that cargo knows.
pub(crate) fn run(started: Instant, command: &Command<'_>, wrapper: &Program) -> ExitCode {
    if std::env::var_os(TRACED_VARIABLE).is_some() {
        return command.become_it();
    }
    let parent = rustix::process::getppid().map(|id| id.as_raw_nonzero().get().unsigned_abs());
    let surroundings = Surroundings::of_this_process(parent);
    let config = match Config::load(&surroundings) {
        Ok(config) if config.mode == Mode::Off => return command.become_it(),
        Ok(config) => config,
        Err(error) => {
            let text = format!("not used, because of its configuration: {error}");
            command.say(&surroundings.default_runtime_directory(), &text);
            return command.become_it();
        }
    };
    let address = Address::of(&config, wrapper);
    let words = command.arguments.iter().map(|word| word.as_bytes().to_vec()).collect();
    let unit = Unit { started, command: *command, words, config: &config, cargo: parent };
    let stream = match address.connect_or_start(&config) {
        Ok(stream) => stream,
        Err(error) => {
            command.say(&surroundings.default_runtime_directory(), &format!("not used: {error}"));
            unit.fulfil();
            return command.become_it();
        }
    };
    let mut session = Session { stream, address };
    match unit.run(&mut session) {
        Ok(status) => status.map_or(ExitCode::SUCCESS, end_like),
        Err(error) => {
            eprintln!("cachec: cannot run {}: {error}", command.program.to_string_lossy());
            ExitCode::from(127)
        }
    }
}

struct Unit<'a> {
    started: Instant,
    command: Command<'a>,
    words: Vec<Vec<u8>>,
    config: &'a Config,
    /// The process that has started this one.
    cargo: Option<u32>,
}

struct Session {
    stream: UnixStream,
    address: Address,
}

impl Session {
    fn ask(&mut self, request: &Request) -> io::Result<Response> {
        ipc::send(&mut self.stream, request)?;
        ipc::receive(&mut self.stream)
    }
}

impl Unit<'_> {
    /// The compiler's exit status, or `None` after a hit.
    ///
    /// # Errors
    /// Only where the compiler itself cannot be run.
    fn run(&self, session: &mut Session) -> io::Result<Option<ExitStatus>> {
        let mut response = session.ask(&Request::Unit(self.request()));
        if let Ok(Response::Hit(hit)) = &response {
            let renamed = self.note(hit).and_then(|()| rename_all(&hit.renames)).is_ok();
            if renamed && streams::replay(hit).is_err() {
                // Cargo is gone; so is whoever would look at the exit code.
                return Ok(None);
            }
            let latency_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
            response = session.ask(&Request::Restored(renamed, latency_us));
            if renamed {
                self.end(session, response);
                return Ok(None);
            }
        }
        if let Ok(Response::Fulfil(renames, marks)) = &response {
            let renamed = rename_all(renames).is_ok();
            // Without its mark a script runs again in the next build.
            marks.iter().for_each(|mark| drop(leave_mark(mark)));
            response = session.ask(&Request::Restored(renamed, 0));
        }
        self.fulfil();
        match response {
            Ok(Response::Run(run)) => self.compile_recorded(session, &run).map(Some),
            Ok(_) => self.compile_plainly("the agent answered something unexpected").map(Some),
            Err(error) => {
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
                    session.address.abandon();
                }
                self.compile_plainly(&format!("the agent did not answer: {error}")).map(Some)
            }
        }
    }

    /// Notes how a unit's outputs would be made, where the build defers some.
    fn note(&self, hit: &Hit) -> io::Result<()> {
        let Some(promise) = &hit.promise else { return Ok(()) };
        let notes = self.notes().ok_or_else(|| io::Error::other("no place for notes"))?;
        let name = self.command.is_script.then(launcher::own_name);
        notes.add(&Note::of_this_process(self.command.program, name, promise.clone(), &notes)?)
    }

    /// Makes what was deferred and is not there, before a compiler that may read it.
    fn fulfil(&self) {
        let Some(notes) = self.notes().filter(|_| self.config.lazy) else { return };
        let text = match notes.fulfil() {
            Ok(0) => return,
            Ok(count) => format!("made {count} deferred units again, because the server no longer has them"),
            Err(error) => format!("cannot make what was deferred (CACHEC_LAZY): {error}"),
        };
        self.command.say(&self.config.runtime_directory, &text);
    }

    fn notes(&self) -> Option<Notes> {
        let value = |flag: &[u8]| {
            let at = self.words.iter().position(|word| word == flag)?;
            self.words.get(at + 1).map(|word| OsStr::from_bytes(word).to_owned())
        };
        let (outputs, target) = if self.command.is_script {
            (std::env::var_os("OUT_DIR")?, std::env::var_os("TARGET")?)
        } else {
            (value(b"--out-dir")?, value(b"--target").unwrap_or_default())
        };
        let outputs = std::env::current_dir().ok()?.join(outputs);
        let target = Path::new(&target).file_stem().unwrap_or_default();
        Notes::of(target_directory(&outputs, target)?, self.cargo?)
    }

    fn request(&self) -> UnitRequest {
        UnitRequest {
            compiler: self.command.program.as_bytes().to_vec(),
            arguments: self.words.iter().map(|word| word.clone().into()).collect(),
            environment: std::env::vars_os()
                .map(|(name, value)| Variable { name: name.into_vec(), value: value.into_vec() })
                .collect(),
            working_directory: std::env::current_dir()
                .map(|path| path.into_os_string().into_vec())
                .unwrap_or_default(),
            umask: umask(),
            is_script: self.command.is_script,
            is_heard: self.command.is_heard,
        }
    }

    /// Runs the compiler as the agent says, and tells the agent how it ended.
    fn compile_recorded(&self, session: &mut Session, run: &Run) -> io::Result<ExitStatus> {
        let started_ns = memo::now_ns();
        let started = Instant::now();
        let arguments: Vec<Vec<u8>> = run.arguments.iter().map(|word| word.to_vec()).collect();
        let mut command = self.command(arguments.iter().map(|word| OsStr::from_bytes(word)));
        if run.record.is_some() {
            command.env(TRACED_VARIABLE, "1");
        }
        let recorded = if run.record.is_some() || arguments != self.words {
            streams::run_recorded(&mut command, &arguments, run.record.clone())?
        } else {
            Recorded::unrecorded(command.status()?)
        };
        let status = if recorded.failed_unheard {
            // Perhaps the remapped paths are to blame; what cargo asked for decides, and is what it hears.
            self.command(self.command.arguments.iter().map(OsString::as_os_str)).status()?
        } else {
            recorded.status
        };
        if let Some(directory) =
            std::env::var_os("OUT_DIR").filter(|_| status.success() && !run.remappings.is_empty())
        {
            debug_paths::remap_all(Path::new(&directory), &run.remappings);
        }
        let finished = Finished {
            succeeded: status.success(),
            needs_real_paths: recorded.failed_unheard && status.success(),
            stdout: recorded.stdout.filter(|_| run.record.is_some()).map(Into::into),
            stderr: recorded.stderr.filter(|_| run.record.is_some()).map(Into::into),
            trace: recorded.trace,
            started_ns,
            compile_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        let response = session.ask(&Request::Finished(finished));
        self.end(session, response);
        Ok(status)
    }

    fn compile_plainly(&self, reason: &str) -> io::Result<ExitStatus> {
        self.command.say(&self.config.runtime_directory, &format!("not used: {reason}"));
        self.command(self.command.arguments.iter().map(OsString::as_os_str)).status()
    }

    fn command<'w>(&self, arguments: impl Iterator<Item = &'w OsStr>) -> process::Command {
        let mut command = self.command.with_arguments(arguments);
        end_with_parent(&mut command);
        command
    }

    /// Prints what the agent has to say, once it lets the wrapper go.
    fn end(&self, session: &mut Session, response: io::Result<Response>) {
        match response {
            Ok(Response::Done(notices, placement)) => {
                if let Some(placement) = placement {
                    place(&placement);
                }
                notices.iter().for_each(|text| self.command.say(&self.config.runtime_directory, text));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => session.address.abandon(),
            Err(_) => {}
        }
    }
}

/// Moves all staged files to their places; the first failure ends it.
fn rename_all(renames: &[Rename]) -> io::Result<()> {
    renames.iter().try_for_each(|rename| {
        let (staged, destination) =
            (Path::new(OsStr::from_bytes(&rename.staged)), Path::new(OsStr::from_bytes(&rename.destination)));
        match fs::rename(staged, destination) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => replace(staged, destination),
            Ok(()) => {
                // Renaming a file to another of its own names does nothing, and leaves both.
                let _ = fs::remove_file(staged);
                Ok(())
            }
            failed => failed,
        }
    })
}

/// Puts a directory in the place of another, which is removed.
fn replace(staged: &Path, destination: &Path) -> io::Result<()> {
    let mut old = staged.as_os_str().to_owned();
    old.push("-old");
    fs::rename(destination, &old)?;
    if let Err(error) = fs::rename(staged, destination) {
        fs::rename(&old, destination)?;
        return Err(error);
    }
    // What cannot be removed is in nobody's way.
    let _ = fs::remove_dir_all(&old);
    Ok(())
}

/// Puts a launcher in the place of a build script's program. Where that fails the program stays, and is run.
fn place(placement: &Placement) {
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let (staged, program) = (path(&placement.launcher.staged), path(&placement.launcher.destination));
    let kept = path(&placement.kept);
    let _ = fs::remove_file(&kept);
    if fs::hard_link(&program, &kept).is_ok() {
        let _ = fs::rename(staged, program);
    }
}
