//! The supervisor: a thread of the wrapper that answers every stopped call.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Places;
use super::Trace;
use super::filter::{self, Notification};
use super::observation::Observation;
use super::syscalls::{self, Name, Operation, lower_half};

/// After the command's end its children are gone, or about to go; a daemon is not.
const LEFTOVER_PATIENCE: Duration = Duration::from_millis(100);
const MAX_PATH_BYTES: usize = 4096;
const PAGE_BYTES: u64 = 4096;

/// A tracer for one command.
#[derive(Debug)]
pub(crate) struct Tracer {
    supervisor: JoinHandle<Option<Supervised>>,
    /// Closed when the command has ended.
    running: UnixStream,
    /// The child's end of the channel; closed here once the child has it.
    child_channel: Option<OwnedFd>,
}

#[derive(Debug)]
struct Supervised {
    observation: Observation,
    /// The listener, where processes still depend on it.
    leftover: Option<OwnedFd>,
}

impl Tracer {
    /// Prepares a command to be traced.
    ///
    /// # Errors
    /// Where there are no descriptors or threads left; the command is then to be run as it is.
    pub(crate) fn prepare(command: &mut Command, places: Places) -> io::Result<Self> {
        let (own_channel, child_channel) = UnixStream::pair()?;
        let (running, ended) = UnixStream::pair()?;
        let child_channel = OwnedFd::from(child_channel);
        filter::install_in_child(command, child_channel.as_raw_fd());
        let own_channel = OwnedFd::from(own_channel);
        let supervisor = std::thread::Builder::new()
            .name("tracer".to_owned())
            .spawn(move || supervise(&own_channel, &ended, &places))?;
        Ok(Self { supervisor, running, child_channel: Some(child_channel) })
    }

    /// To be called when the command was started, or could not be.
    pub(crate) fn started(&mut self) {
        self.child_channel = None;
    }

    /// To be called when the command has ended: what it did, or `None` where it could not be traced.
    pub(crate) fn finish(self) -> Option<Trace> {
        drop(self.child_channel);
        drop(self.running);
        let mut supervised = self.supervisor.join().ok()??;
        if let Some(listener) = supervised.leftover.take() {
            supervised.observation.obstruct("leaves-processes");
            hand_over(listener);
        }
        Some(supervised.observation.finish())
    }
}

fn supervise(channel: &OwnedFd, ended: &UnixStream, places: &Places) -> Option<Supervised> {
    let listener = filter::receive_listener(channel)?;
    let mut observation = Observation::new(places);
    let mut command_ended = false;
    loop {
        match wait(&listener, ended, command_ended) {
            Event::Call => match filter::next_notification(&listener) {
                Ok(Some(notification)) => {
                    observation.notifications += 1;
                    observe(&listener, &notification, &mut observation);
                    filter::let_go(&listener, &notification);
                }
                Ok(None) => {}
                Err(_) => {
                    observation.obstruct("tracer-failed");
                    return Some(Supervised { observation, leftover: Some(listener) });
                }
            },
            Event::CommandEnded => command_ended = true,
            Event::AllEnded => return Some(Supervised { observation, leftover: None }),
            Event::Patience => return Some(Supervised { observation, leftover: Some(listener) }),
        }
    }
}

enum Event {
    Call,
    CommandEnded,
    AllEnded,
    Patience,
}

fn wait(listener: &OwnedFd, ended: &UnixStream, command_ended: bool) -> Event {
    let mut descriptors = vec![PollFd::new(listener, PollFlags::IN)];
    if !command_ended {
        descriptors.push(PollFd::new(ended, PollFlags::IN));
    }
    let patience = Timespec { tv_sec: 0, tv_nsec: i64::from(LEFTOVER_PATIENCE.subsec_nanos()) };
    loop {
        match poll(&mut descriptors, command_ended.then_some(&patience)) {
            Ok(0) => return Event::Patience,
            Ok(_) => {}
            Err(_) => continue,
        }
        let of_listener = descriptors[0].revents();
        return if of_listener.contains(PollFlags::IN) {
            Event::Call
        } else if of_listener.intersects(PollFlags::HUP | PollFlags::ERR) {
            Event::AllEnded
        } else {
            Event::CommandEnded
        };
    }
}

/// Processes that outlive the command still stop at each call. Another process answers them to their end.
fn hand_over(listener: OwnedFd) {
    let Ok(program) = std::env::current_exe() else {
        // Closing the listener would make their calls fail.
        let _ = listener.into_raw_fd();
        return;
    };
    let mut command = Command::new(program);
    command.arg("serve-leftover").stdin(Stdio::from(listener)).stdout(Stdio::null()).stderr(Stdio::null());
    crate::process::close_inherited_files(&mut command);
    let _ = command.spawn();
}

/// Answers stopped calls until the last process is gone, noting nothing.
pub(crate) fn serve_leftover(listener: &OwnedFd) {
    loop {
        let mut descriptors = [PollFd::new(listener, PollFlags::IN)];
        if poll(&mut descriptors, None).is_err() {
            continue;
        }
        let events = descriptors[0].revents();
        if events.contains(PollFlags::IN) {
            if let Ok(Some(notification)) = filter::next_notification(listener) {
                filter::let_go(listener, &notification);
            }
        } else if events.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            return;
        }
    }
}

fn observe(listener: &OwnedFd, notification: &Notification, observation: &mut Observation) {
    let task = notification.pid;
    let arguments = notification.data.args;
    let operation = syscalls::operation(notification.data.nr, notification.data.arch);
    let read = |name: Name| {
        let directory = name.directory.map(|position| arguments[position]);
        read_path(task, directory, arguments[name.path])
            .filter(|_| filter::is_waiting(listener, notification))
    };
    let flags = |position: usize| lower_half(arguments[position]).cast_signed();
    match operation {
        Operation::Open(name, position) => with(read(name), |path| observation.open(path, flags(position))),
        Operation::OpenHow(name, position) => {
            let mut how = [0; 8];
            filter::read_memory(task, arguments[position], &mut how);
            let flags = lower_half(u64::from_ne_bytes(how));
            with(read(name), |path| observation.open(path, flags.cast_signed()));
        }
        Operation::Create(name) => {
            with(read(name), |path| observation.open(path, libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC));
        }
        Operation::Look(name, position) => {
            let follow = position.is_none_or(|position| flags(position) & libc::AT_SYMLINK_NOFOLLOW == 0);
            with(read(name), |path| observation.look(path, follow));
        }
        Operation::LookAtLink(name) => with(read(name), |path| observation.look(path, false)),
        Operation::Execute(name) => match read(name) {
            Some(path) => observation.execute(&path),
            None => observation.obstruct("unnamed-program"),
        },
        Operation::Rename(from, to) => {
            with(read(from), |from| with(read(to), |to| observation.rename(from, to)));
        }
        Operation::Link(from, to) => with(read(from), |from| with(read(to), |to| observation.link(from, to))),
        Operation::Make(name) => with(read(name), |path| observation.make(path)),
        Operation::Remove(name) => with(read(name), |path| observation.remove(path)),
        Operation::Modify(name) => with(read(name), |path| observation.modify(path)),
        Operation::List => with(descriptor_path(task, arguments[0]), |path| observation.list(path)),
        Operation::Connect(position) => {
            if !is_name_service(task, arguments[position]) {
                observation.obstruct("local-socket");
            }
        }
        Operation::Network => observation.obstruct("network"),
        Operation::Escape(reason) => observation.obstruct(reason),
    }
}

/// Whether a socket's address is that of a local service that the C library asks for users and hosts.
/// Those answer from files that it would read itself.
fn is_name_service(task: u32, address: u64) -> bool {
    let mut family = [0; 2];
    filter::read_memory(task, address, &mut family);
    let path = read_text(task, address.saturating_add(2)).unwrap_or_default();
    let services: [&[u8]; 3] = [b"/run/nscd/", b"/var/run/nscd/", b"/run/systemd/userdb/"];
    i32::from(u16::from_ne_bytes(family)) == libc::AF_UNIX
        && services.iter().any(|start| path.starts_with(start))
}

fn with(path: Option<PathBuf>, action: impl FnOnce(&Path)) {
    if let Some(path) = path {
        action(&path);
    }
}

/// The absolute path that a call names; `None` where it names none (the call fails, or is about an open
/// file).
fn read_path(task: u32, directory: Option<u64>, address: u64) -> Option<PathBuf> {
    let path = read_text(task, address)?;
    if path.is_empty() {
        return None;
    }
    let path = Path::new(std::ffi::OsStr::from_bytes(&path)).to_owned();
    if path.is_absolute() {
        return Some(path);
    }
    let base = match directory {
        Some(descriptor) if !syscalls::is_working_directory(descriptor) => descriptor_path(task, descriptor)?,
        _ => fs::read_link(format!("/proc/{task}/cwd")).ok()?,
    };
    Some(base.join(path))
}

/// The path of an open file, as the kernel knows it.
fn descriptor_path(task: u32, descriptor: u64) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{task}/fd/{}", lower_half(descriptor)))
        .ok()
        .filter(|path| path.is_absolute())
}

/// Reads a NUL-terminated text, a page at a time: the next one may not be mapped.
fn read_text(task: u32, address: u64) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    let mut position = address;
    while text.len() < MAX_PATH_BYTES {
        let in_page = usize::try_from(PAGE_BYTES - position % PAGE_BYTES).unwrap_or(1);
        let mut part = vec![0; in_page.min(256)];
        let count = filter::read_memory(task, position, &mut part);
        if count == 0 {
            return None;
        }
        if let Some(end) = memchr::memchr(0, &part[..count]) {
            text.extend_from_slice(&part[..end]);
            return Some(text);
        }
        text.extend_from_slice(&part[..count]);
        position = position.checked_add(count as u64)?;
    }
    None
}
