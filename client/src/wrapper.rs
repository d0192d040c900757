//! The wrapper: what cargo runs in the compiler's place. Synchronous, and gone in a few milliseconds on a hit.
//!
//! Invariant: whatever goes wrong with cachec, the compiler runs with the arguments cargo gave, and its
//! output, exit code and signal are passed on.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Instant;

use crate::config::{Config, Mode, Surroundings};
use crate::connect::Address;
use crate::invocation::is_probe;
use crate::ipc::{self, Finished, Hit, Request, Response, Run, UnitRequest, Variable};
use crate::streams::{self, Recorded};
use crate::{memo, notice, process};

/// Runs one unit: `compiler` and the arguments cargo gave.
pub(crate) fn run(started: Instant, compiler: &OsStr, arguments: &[OsString]) -> ExitCode {
    let words: Vec<Vec<u8>> = arguments.iter().map(|word| word.as_bytes().to_vec()).collect();
    if is_probe(&words) {
        return process::become_compiler(compiler, arguments);
    }
    let parent = rustix::process::getppid().map(|id| id.as_raw_nonzero().get().unsigned_abs());
    let surroundings = Surroundings::of_this_process(parent);
    let config = match Config::load(&surroundings) {
        Ok(config) if config.mode == Mode::Off => return process::become_compiler(compiler, arguments),
        Ok(config) => config,
        Err(error) => {
            let text = format!("not used, because of its configuration: {error}");
            notice::once(&surroundings.default_runtime_directory(), &text);
            return process::become_compiler(compiler, arguments);
        }
    };
    let address = Address::of(&config);
    let stream = match address.connect_or_start(&config) {
        Ok(stream) => stream,
        Err(error) => {
            notice::once(&surroundings.default_runtime_directory(), &format!("not used: {error}"));
            return process::become_compiler(compiler, arguments);
        }
    };
    let unit = Unit { started, compiler, arguments, words, config: &config };
    let mut session = Session { stream, address };
    match unit.run(&mut session) {
        Ok(status) => status.map_or(ExitCode::SUCCESS, process::end_like),
        Err(error) => {
            eprintln!("cachec: cannot run {}: {error}", compiler.to_string_lossy());
            ExitCode::from(127)
        }
    }
}

struct Unit<'a> {
    started: Instant,
    compiler: &'a OsStr,
    arguments: &'a [OsString],
    words: Vec<Vec<u8>>,
    config: &'a Config,
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
            let renamed = rename_all(hit).is_ok();
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

    fn request(&self) -> UnitRequest {
        UnitRequest {
            compiler: self.compiler.as_bytes().to_vec(),
            arguments: self.words.iter().map(|word| word.clone().into()).collect(),
            environment: std::env::vars_os()
                .map(|(name, value)| Variable { name: name.into_vec(), value: value.into_vec() })
                .collect(),
            working_directory: std::env::current_dir()
                .map(|path| path.into_os_string().into_vec())
                .unwrap_or_default(),
            umask: process::umask(),
        }
    }

    /// Runs the compiler as the agent says, and tells the agent how it ended.
    fn compile_recorded(&self, session: &mut Session, run: &Run) -> io::Result<ExitStatus> {
        let started_ns = memo::now_ns();
        let started = Instant::now();
        let arguments: Vec<Vec<u8>> = run.arguments.iter().map(|word| word.to_vec()).collect();
        let mut command = self.command(arguments.iter().map(|word| OsStr::from_bytes(word)));
        let recorded = if run.record.is_some() || arguments != self.words {
            streams::run_recorded(&mut command, &arguments, run.record.clone())?
        } else {
            Recorded::unrecorded(command.status()?)
        };
        let status = if recorded.failed_unheard {
            // Perhaps the remapped paths are to blame; what cargo asked for decides, and is what it hears.
            self.command(self.arguments.iter().map(OsString::as_os_str)).status()?
        } else {
            recorded.status
        };
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
        notice::once(&self.config.runtime_directory, &format!("not used: {reason}"));
        self.command(self.arguments.iter().map(OsString::as_os_str)).status()
    }

    fn command<'w>(&self, arguments: impl Iterator<Item = &'w OsStr>) -> Command {
        let mut command = Command::new(self.compiler);
        command.args(arguments);
        process::end_with_parent(&mut command);
        command
    }

    /// Prints what the agent has to say, once it lets the wrapper go.
    fn end(&self, session: &mut Session, response: io::Result<Response>) {
        match response {
            Ok(Response::Done(notices)) => {
                notices.iter().for_each(|text| notice::once(&self.config.runtime_directory, text));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => session.address.abandon(),
            Err(_) => {}
        }
    }
}

/// Moves all staged files to their places; the first failure ends it.
fn rename_all(hit: &Hit) -> io::Result<()> {
    hit.renames.iter().try_for_each(|rename| {
        fs::rename(OsStr::from_bytes(&rename.staged), OsStr::from_bytes(&rename.destination))
    })
}
