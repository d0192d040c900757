//! The seccomp filter, installed in the child between `fork` and `exec`.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter, sock_fprog};

use super::syscalls::{self, ARCHITECTURE, FOREIGN_NUMBERS, Operation, lower_half};

/// Offsets in `struct seccomp_data`.
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const FIRST_ARGUMENT_OFFSET: u32 = 16;

const fn instruction(code: u16, operand: u32, if_true: u8, if_false: u8) -> sock_filter {
    sock_filter { code, jt: if_true, jf: if_false, k: operand }
}

/// An operation as an instruction holds it; all are small.
const fn code(parts: u32) -> u16 {
    (parts & 0xffff) as u16
}

const LOAD: u16 = code(BPF_LD | BPF_W | BPF_ABS);
const EQUAL: u16 = code(BPF_JMP | BPF_JEQ | BPF_K);
const AT_LEAST: u16 = code(BPF_JMP | BPF_JGE | BPF_K);
const RETURN: u16 = code(BPF_RET | BPF_K);

/// The program: stop the calls of the table, and all calls of foreign architectures; allow the rest.
/// Each test is followed by its own verdict, so no jump is longer than two instructions.
fn program() -> Vec<sock_filter> {
    let stop = instruction(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0, 0);
    let allow = instruction(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0);
    let mut program = vec![
        instruction(LOAD, ARCHITECTURE_OFFSET, 0, 0),
        instruction(EQUAL, ARCHITECTURE, 1, 0),
        stop,
        instruction(LOAD, NUMBER_OFFSET, 0, 0),
        instruction(AT_LEAST, FOREIGN_NUMBERS, 0, 1),
        stop,
    ];
    for (number, operation) in syscalls::stopped() {
        // Numbers of system calls are small and positive.
        let number = u32::try_from(*number).unwrap_or_default();
        if *operation == Operation::Network {
            program.extend([
                instruction(EQUAL, number, 0, 5),
                instruction(LOAD, FIRST_ARGUMENT_OFFSET, 0, 0),
                instruction(EQUAL, libc::AF_INET as u32, 1, 0),
                instruction(EQUAL, libc::AF_INET6 as u32, 0, 1),
                stop,
                allow,
            ]);
        } else {
            program.extend([instruction(EQUAL, number, 0, 1), stop]);
        }
    }
    program.push(allow);
    program
}

/// Makes the child stop at the table's calls, and send its listener through `channel` (or a byte alone
/// where there can be none: an outer tracer, a sandbox, an old kernel). The caller keeps `channel` open until
/// the child was started.
pub(super) fn install_in_child(command: &mut Command, channel: RawFd) {
    let program = program();
    let install = move || {
        let listener = install(&program);
        send_listener(channel, listener.as_ref().map(AsRawFd::as_raw_fd));
        Ok(())
    };
    // SAFETY: the closure allocates nothing and makes async-signal-safe system calls only.
    unsafe { command.pre_exec(install) };
}

/// Installs the filter for this thread and what it starts; `None` where the kernel refuses.
fn install(program: &[sock_filter]) -> Option<OwnedFd> {
    let program = sock_fprog { len: u16::try_from(program.len()).ok()?, filter: program.as_ptr().cast_mut() };
    // A signal must not interrupt a call that was seen already; kernels before 5.19 do not know the flag.
    let flags = [
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
    ];
    // SAFETY: the program and its instructions live through the calls, which read them alone.
    unsafe {
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        let install =
            |flags: libc::c_ulong| libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program);
        let privileged = flags.into_iter().map(install).find(|listener| *listener >= 0);
        let listener = privileged.or_else(|| {
            // Who is not privileged gives set-user-ID programs up; the observation notices them.
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            flags.into_iter().map(install).find(|listener| *listener >= 0)
        })?;
        Some(OwnedFd::from_raw_fd(RawFd::try_from(listener).ok()?))
    }
}

/// A message of one byte with room for one descriptor. The kernel's structure points into this one, so it
/// is made where it is used and never moved.
#[repr(C, align(8))]
struct Envelope {
    /// Header and one descriptor: CMSG_SPACE(4) on 64-bit Linux; first, and so aligned.
    control: [u8; 24],
    byte: [u8; 1],
}

impl Envelope {
    /// Calls `transfer` with a message over a fresh envelope; with room for a descriptor, or without.
    fn with_message<T>(has_room: bool, transfer: impl FnOnce(&mut libc::msghdr) -> T) -> T {
        let mut envelope = Self { control: [0; 24], byte: [0] };
        let mut part = libc::iovec { iov_base: (&raw mut envelope.byte).cast(), iov_len: 1 };
        // SAFETY: an empty message is all zeros.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        if has_room {
            message.msg_control = (&raw mut envelope.control).cast();
            message.msg_controllen = envelope.control.len() as _;
        }
        transfer(&mut message)
    }
}

fn send_listener(channel: RawFd, listener: Option<RawFd>) {
    Envelope::with_message(listener.is_some(), |message| {
        // SAFETY: the message's parts live through the call, and its control part has room for a header and
        // one descriptor.
        unsafe {
            if let Some(listener) = listener {
                let header = libc::CMSG_FIRSTHDR(message);
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(4) as _;
                libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(listener);
            }
            libc::sendmsg(channel, message, 0);
        }
    });
}

/// Receives the listener; `None` where the child has none, or has ended.
pub(super) fn receive_listener(channel: &OwnedFd) -> Option<OwnedFd> {
    Envelope::with_message(true, |message| {
        // SAFETY: as in `send_listener`; the descriptor received is this process's own.
        unsafe {
            if libc::recvmsg(channel.as_raw_fd(), message, libc::MSG_CMSG_CLOEXEC) <= 0 {
                return None;
            }
            let header = libc::CMSG_FIRSTHDR(message);
            if header.is_null() || (*header).cmsg_type != libc::SCM_RIGHTS {
                return None;
            }
            Some(OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()))
        }
    })
}

/// Has a stopped task and the supervisor take turns on one processor: only one of the two ever has something to do. Where
/// the kernel is too old for that (before 6.6), each wakes the other as it comes.
pub(super) fn take_turns(listener: &OwnedFd) {
    set_flags(listener, SYNC_WAKE_UP);
}

fn set_flags(listener: &OwnedFd, flags: libc::c_ulong) {
    // SAFETY: the flags are the argument itself.
    unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, flags) };
}

/// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP` of `linux/seccomp.h`.
const SYNC_WAKE_UP: libc::c_ulong = 1;

/// A stopped call.
pub(super) type Notification = libc::seccomp_notif;

/// Waits for the next stopped call; `None` where the waiting task was killed meanwhile.
///
/// # Errors
/// Where the listener is of no more use.
pub(super) fn next_notification(listener: &OwnedFd) -> io::Result<Option<Notification>> {
    // SAFETY: the structure is plain data, which the kernel requires to be zero, and fills.
    unsafe {
        let mut notification: Notification = std::mem::zeroed();
        if libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut notification) == 0 {
            return Ok(Some(notification));
        }
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::EINTR) => Ok(None),
        _ => Err(error),
    }
}

/// Lets a stopped call go on. A task that was killed meanwhile needs no answer.
pub(super) fn let_go(listener: &OwnedFd, notification: &Notification) {
    let mut answer = libc::seccomp_notif_resp {
        id: notification.id,
        val: 0,
        error: 0,
        flags: lower_half(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE),
    };
    // SAFETY: the structure lives through the call.
    unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
}

/// As [`let_go`], but the task goes on where it was, not on this thread's processor: tasks that run side by side would
/// gather there, and leave the others idle.
pub(super) fn let_go_elsewhere(listener: &OwnedFd, notification: &Notification) {
    set_flags(listener, 0);
    let_go(listener, notification);
    set_flags(listener, SYNC_WAKE_UP);
}

/// Whether the task of a stopped call is still waiting, so that what was read of its memory is its own.
pub(super) fn is_waiting(listener: &OwnedFd, notification: &Notification) -> bool {
    // SAFETY: the identifier lives through the call.
    unsafe {
        libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const notification.id) == 0
    }
}

/// Reads a task's memory; fewer bytes than asked where the rest is not mapped, none where nothing is.
///
/// # Errors
/// Where the task's memory may not be read.
pub(super) fn read_memory(task: u32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: the local part is this buffer; the remote address is checked by the kernel.
    let count =
        unsafe { libc::process_vm_readv(task.cast_signed(), &raw const local, 1, &raw const remote, 1, 0) };
    match usize::try_from(count) {
        Ok(count) => Ok(count),
        Err(_) => match io::Error::last_os_error() {
            // The call fails alike, or its task is gone.
            error if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::ESRCH)) => Ok(0),
            // Docker's profile forbids that call, and not this file.
            _ => read_memory_file(task, address, buffer),
        },
    }
}

fn read_memory_file(task: u32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    match std::fs::File::open(format!("/proc/{task}/mem"))?.read_at(buffer, address) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EFAULT)) => Ok(0),
        outcome => outcome,
    }
}
