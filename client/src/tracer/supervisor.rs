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
/// With so many calls in a row a task is taken to be alone.
const LONG_ROW: u32 = 64;
/// Options come before thousands of file names.
const MAX_ARGUMENTS: u64 = 4096;

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
    filter::take_turns(&listener);
    let mut observation = Observation::new(places);
    let mut command_ended = false;
    let mut tasks = Tasks::default();
    loop {
        match wait(&listener, ended, command_ended) {
            Event::Call => match filter::next_notification(&listener) {
                Ok(Some(notification)) => {
                    observation.notifications += 1;
                    observe(&listener, &notification, &mut observation);
                    if tasks.are_many(notification.pid) {
                        filter::let_go_elsewhere(&listener, &notification);
                    } else {
                        filter::let_go(&listener, &notification);
                    }
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

/// Whose calls were stopped of late.
#[derive(Debug, Default)]
struct Tasks {
    last: u32,
    /// Calls of the last one in a row.
    in_a_row: u32,
}

impl Tasks {
    /// Whether several tasks make calls side by side, with the next one by `task`.
    fn are_many(&mut self, task: u32) -> bool {
        self.in_a_row = if task == self.last { self.in_a_row.saturating_add(1) } else { 0 };
        self.last = task;
        self.in_a_row < LONG_ROW
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
    let call = Call { task: notification.pid, arguments: notification.data.args };
    let operation = syscalls::operation(notification.data.nr, notification.data.arch);
    // Whoever is gone did nothing.
    if call.note(operation, observation).is_err() && filter::is_waiting(listener, notification) {
        observation.obstruct("unreadable-process");
    }
}

/// A stopped call's task and arguments.
struct Call {
    task: u32,
    arguments: [u64; 6],
}

impl Call {
    /// Notes what a call is about to do.
    ///
    /// # Errors
    /// Where the task's memory or descriptors cannot be looked at.
    fn note(&self, operation: Operation, observation: &mut Observation) -> io::Result<()> {
        let with = |name: Name, action: &mut dyn FnMut(&Path)| -> io::Result<()> {
            self.path(name).map(|path| path.iter().for_each(|path| action(path)))
        };
        match operation {
            Operation::Open(name, flags) => {
                with(name, &mut |path| observation.open(path, self.number(flags)))
            }
            Operation::OpenHow(name, how) => self.open_how(name, self.arguments[how], observation),
            Operation::Create(name) => {
                let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC;
                with(name, &mut |path| observation.open(path, flags))
            }
            Operation::Look(name, flags) => {
                let follow = flags.is_none_or(|flags| self.number(flags) & libc::AT_SYMLINK_NOFOLLOW == 0);
                with(name, &mut |path| observation.look(path, follow))
            }
            Operation::Access(name, mode) => {
                let for_execution = self.number(mode) & libc::X_OK != 0;
                with(name, &mut |path| observation.access(path, for_execution))
            }
            Operation::LookAtLink(name) => with(name, &mut |path| observation.look(path, false)),
            Operation::Execute(name, arguments) => {
                match self.path(name)? {
                    Some(path) => observation.execute(&path),
                    None => observation.obstruct("unnamed-program"),
                }
                observation.looks_at_cpu |= self.compiles_for_this_cpu(self.arguments[arguments])?;
                Ok(())
            }
            Operation::Rename(from, to) => with(from, &mut |from| {
                self.path(to).iter().flatten().for_each(|to| observation.rename(from, to));
            }),
            Operation::Link(from, to) => with(from, &mut |from| {
                self.path(to).iter().flatten().for_each(|to| observation.link(from, to));
            }),
            Operation::Make(name) => with(name, &mut |path| observation.make(path)),
            Operation::MakeLink(name) => with(name, &mut |path| observation.make_link(path)),
            Operation::Attributes(name) => with(name, &mut |path| observation.attributes(path)),
            Operation::Remove(name) => with(name, &mut |path| observation.remove(path)),
            Operation::Modify(name) => with(name, &mut |path| observation.modify(path)),
            Operation::List => {
                descriptor_path(self.task, self.arguments[0])?.iter().for_each(|path| observation.list(path));
                Ok(())
            }
            Operation::Connect(address) => {
                if !is_name_service(self.task, self.arguments[address])? {
                    observation.obstruct("local-socket");
                }
                Ok(())
            }
            Operation::Network => {
                observation.obstruct("network");
                Ok(())
            }
            Operation::Escape(reason) => {
                observation.obstruct(reason);
                Ok(())
            }
        }
    }

    /// `openat2`, whose flags are in a structure: flags, mode and ways to resolve, 8 bytes each.
    fn open_how(&self, name: Name, how: u64, observation: &mut Observation) -> io::Result<()> {
        let mut structure = [0; 24];
        filter::read_memory(self.task, how, &mut structure)?;
        let field = |at: usize| u64::from_ne_bytes(std::array::from_fn(|index| structure[at + index]));
        if field(16) & libc::RESOLVE_IN_ROOT != 0 {
            observation.obstruct("resolve-in-root");
        }
        if let Some(path) = self.path(name)? {
            observation.open(&path, lower_half(field(0)).cast_signed());
        }
        Ok(())
    }

    /// Whether one of a program's arguments is `-march=native` or the like.
    fn compiles_for_this_cpu(&self, arguments: u64) -> io::Result<bool> {
        for index in 0..MAX_ARGUMENTS {
            let mut pointer = [0; 8];
            let at = arguments.wrapping_add(index * 8);
            if filter::read_memory(self.task, at, &mut pointer)? < pointer.len() || pointer == [0; 8] {
                return Ok(false);
            }
            let mut start = [0; 32];
            let count = filter::read_memory(self.task, u64::from_ne_bytes(pointer), &mut start)?;
            let end = memchr::memchr(0, &start[..count]).unwrap_or(count);
            if start[..end].ends_with(b"=native") {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// An argument that the kernel takes as an `int`.
    fn number(&self, position: usize) -> i32 {
        lower_half(self.arguments[position]).cast_signed()
    }

    /// The absolute path that the call names; `None` where it names none: the call fails, or is about an
    /// open file.
    fn path(&self, name: Name) -> io::Result<Option<PathBuf>> {
        let Some(text) = read_text(self.task, self.arguments[name.path])?.filter(|text| !text.is_empty())
        else {
            return Ok(None);
        };
        let path = Path::new(std::ffi::OsStr::from_bytes(&text)).to_owned();
        if path.is_absolute() {
            return Ok(Some(path));
        }
        let directory = name.directory.map(|position| self.arguments[position]);
        let base = match directory.filter(|descriptor| !syscalls::is_working_directory(*descriptor)) {
            Some(descriptor) => descriptor_path(self.task, descriptor)?,
            None => Some(fs::read_link(format!("/proc/{}/cwd", self.task))?),
        };
        Ok(base.map(|base| base.join(path)))
    }
}

/// Whether a socket's address is that of a local service that the C library asks for users and hosts.
/// Those answer from files that it would read itself.
fn is_name_service(task: u32, address: u64) -> io::Result<bool> {
    let mut family = [0; 2];
    filter::read_memory(task, address, &mut family)?;
    let path = read_text(task, address.saturating_add(2))?.unwrap_or_default();
    let services: [&[u8]; 3] = [b"/run/nscd/", b"/var/run/nscd/", b"/run/systemd/userdb/"];
    let is_local = i32::from(u16::from_ne_bytes(family)) == libc::AF_UNIX;
    Ok(is_local && services.iter().any(|start| path.starts_with(start)))
}

/// The path of an open file, as the kernel knows it; `None` for what has none, or is not open.
fn descriptor_path(task: u32, descriptor: u64) -> io::Result<Option<PathBuf>> {
    match fs::read_link(format!("/proc/{task}/fd/{}", lower_half(descriptor))) {
        Ok(path) => Ok(Some(path).filter(|path| path.is_absolute())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a NUL-terminated text, a page at a time: the next one may not be mapped. `None` where it does not
/// end, or is not there.
fn read_text(task: u32, address: u64) -> io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    let mut position = address;
    while text.len() < MAX_PATH_BYTES {
        let in_page = usize::try_from(PAGE_BYTES - position % PAGE_BYTES).unwrap_or(1);
        let mut part = vec![0; in_page.min(256)];
        let count = filter::read_memory(task, position, &mut part)?;
        if count == 0 {
            return Ok(None);
        }
        if let Some(end) = memchr::memchr(0, &part[..count]) {
            text.extend_from_slice(&part[..end]);
            return Ok(Some(text));
        }
        text.extend_from_slice(&part[..count]);
        position = position.saturating_add(count as u64);
    }
    Ok(None)
}
