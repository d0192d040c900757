//! Reaching the agent of this configuration, starting it where there is none.
//!
//! The wrapper itself binds and listens, and hands the socket to the agent as its standard input: from the
//! first moment every wrapper can connect, and none waits for the agent to be ready. A lock file makes
//! sure that one starts it. The socket's name is the digest of configuration and program, so another
//! version or another configuration has another agent.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cachec_protocol::Digest;

use crate::config::Config;
use crate::process;

/// A live agent is heard from far more often.
const SILENCE_LIMIT: Duration = Duration::from_secs(3);
/// Who holds the lock needs some milliseconds.
const LOCK_LIMIT: Duration = Duration::from_secs(1);
/// Longest path of a Unix socket on Linux, without the final NUL.
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// A larger log starts again with the next agent.
const MAX_LOG_BYTES: u64 = 1 << 20;

/// The variables that the agent is started with: its configuration and its socket's path.
pub(crate) const CONFIG_VARIABLE: &str = "CACHEC_AGENT_CONFIG";
pub(crate) const SOCKET_VARIABLE: &str = "CACHEC_AGENT_SOCKET";

/// Why there is no agent to talk to. The wrapper runs the compiler.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("{path} cannot be used for the agent's socket: {reason}")]
    RuntimeDirectory { path: String, reason: String },
    #[error("the agent cannot be started: {0}")]
    Start(io::Error),
}

/// The file that an agent runs; another one has another agent.
#[derive(Debug)]
pub(crate) struct Program {
    path: PathBuf,
    inode: u64,
    mtime_ns: i64,
    pub(crate) size_bytes: u64,
}

impl Program {
    /// # Errors
    /// Where there is no such file.
    pub(crate) fn at(path: PathBuf) -> io::Result<Self> {
        let metadata = fs::metadata(&path)?;
        let (inode, mtime_ns, size_bytes) = (metadata.ino(), metadata.mtime_nsec(), metadata.len());
        Ok(Self { path, inode, mtime_ns, size_bytes })
    }

    /// The file that this process runs.
    ///
    /// # Errors
    /// Where there is no `/proc`, or the file was removed.
    pub(crate) fn own() -> io::Result<Self> {
        Self::at(std::env::current_exe()?)
    }
}

/// Where the agent of a configuration listens.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    pub(crate) socket: PathBuf,
    /// What is started where nobody listens.
    program: PathBuf,
}

impl Address {
    /// The address of a program's agent for a configuration.
    pub(crate) fn of(config: &Config, program: &Program) -> Self {
        let identity = (program.inode, program.mtime_ns, program.size_bytes);
        // Cargo sets certificate variables for what it starts, so a shell's command has others.
        let named = Config { network_variables: Vec::new(), ..config.clone() };
        // An agent sees files as its own container does.
        let place = |path: &str| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
        let view = (place("/proc/self/ns/mnt"), place("/"));
        let text = format!("{}\n{identity:?}\n{view:?}\n{}", env!("CARGO_PKG_VERSION"), to_json(&named));
        let name = Digest::of(text.as_bytes()).to_string();
        let socket = config.runtime_directory.join(format!("{}.sock", &name[..16]));
        Self { socket, program: program.path.clone() }
    }

    /// Where an agent that ended has left its statistics.
    pub(crate) fn last_report(&self) -> PathBuf {
        self.socket.with_extension("json")
    }

    /// Connects to an agent that is there.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` where there is none.
    pub(crate) fn connect(&self) -> io::Result<UnixStream> {
        let stream = with_short_path(&self.socket, |path| UnixStream::connect(path))?;
        let peer = rustix::net::sockopt::socket_peercred(&stream)?;
        if peer.uid != rustix::process::getuid() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "another user's agent"));
        }
        stream.set_read_timeout(Some(SILENCE_LIMIT))?;
        stream.set_write_timeout(Some(SILENCE_LIMIT))?;
        Ok(stream)
    }

    /// Connects, starting an agent where there is none.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub(crate) fn connect_or_start(&self, config: &Config) -> Result<UnixStream, ConnectError> {
        if let Ok(stream) = self.connect() {
            return Ok(stream);
        }
        prepare_directory(&config.runtime_directory)?;
        let _lock = self.lock().map_err(ConnectError::Start)?;
        if let Ok(stream) = self.connect() {
            return Ok(stream);
        }
        self.start(config).map_err(ConnectError::Start)?;
        self.connect().map_err(ConnectError::Start)
    }

    /// Takes the socket away from an agent that does not answer, so that the next wrapper starts another.
    pub(crate) fn abandon(&self) {
        let _ = fs::remove_file(&self.socket);
    }

    fn lock(&self) -> io::Result<File> {
        let file = File::create(self.socket.with_extension("lock"))?;
        let started = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(fs::TryLockError::Error(error)) => return Err(error),
                Err(fs::TryLockError::WouldBlock) if started.elapsed() > LOCK_LIMIT => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "its lock file is held"));
                }
                Err(fs::TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn start(&self, config: &Config) -> io::Result<()> {
        let unfinished = self.socket.with_extension("new");
        let _ = fs::remove_file(&unfinished);
        let listener = with_short_path(&unfinished, |path| UnixListener::bind(path))?;
        fs::rename(&unfinished, &self.socket)?;
        let log_path = config.runtime_directory.join("agent.log");
        let too_long = fs::metadata(&log_path).is_ok_and(|metadata| metadata.len() > MAX_LOG_BYTES);
        let log =
            File::options().create(true).append(!too_long).write(true).truncate(too_long).open(log_path)?;
        let mut command = Command::new(&self.program);
        command
            .arg("agent")
            .current_dir("/")
            .env_clear()
            .envs(std::env::vars_os().filter(|(name, _)| name == "PATH" || name == "TMPDIR"))
            .envs(config.network_variables.iter().map(|(name, value)| (name, value)))
            .env(CONFIG_VARIABLE, to_json(config))
            .env(SOCKET_VARIABLE, &self.socket)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
            .stdout(log.try_clone()?)
            .stderr(log);
        process::close_inherited_files(&mut command);
        let started = command.spawn();
        if started.is_err() {
            self.abandon();
        }
        started.map(drop)
    }
}

fn to_json(config: &Config) -> String {
    match serde_json::to_string(config) {
        Ok(text) => text,
        Err(error) => unreachable!("a configuration is plain data: {error}"),
    }
}

/// Creates the directory for this user alone, or checks that nobody else can put files there.
fn prepare_directory(path: &Path) -> Result<(), ConnectError> {
    let error = |reason: String| ConnectError::RuntimeDirectory { path: path.display().to_string(), reason };
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => return Err(error(cause.to_string())),
        _ => {}
    }
    let metadata: Metadata = fs::symlink_metadata(path).map_err(|cause| error(cause.to_string()))?;
    if !metadata.is_dir() {
        return Err(error("it is not a directory".to_owned()));
    }
    if metadata.uid() != rustix::process::getuid().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(error("others may write there".to_owned()));
    }
    Ok(())
}

/// Calls `action` with a path to the socket that the kernel's limit allows.
fn with_short_path<T>(socket: &Path, action: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    if socket.as_os_str().len() <= MAX_SOCKET_PATH_BYTES {
        return action(socket);
    }
    let (Some(directory), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let directory = File::open(directory)?;
    action(&Path::new(&format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name))
}
