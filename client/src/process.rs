//! Processes: what of them needs `unsafe`, ending as another one ended, and telling one from another.

#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use rustix::process::{Signal, set_parent_process_death_signal};

/// Lock: held for reading while a file is written that is going to be executed, for writing while a process is started.
/// One that is started has this process's files open until its own program runs, and until then what is open for writing
/// cannot be executed ("text file busy").
static PROGRAMS: RwLock<()> = RwLock::new(());

/// To be held while a program's file is open for writing.
pub(crate) fn writing_program() -> RwLockReadGuard<'static, ()> {
    PROGRAMS.read().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a process in the agent, where programs are written at the same time. Returns when its program runs.
///
/// # Errors
/// Those of starting it.
pub(crate) fn spawn_beside_writing(command: &mut Command) -> io::Result<Child> {
    let _alone = PROGRAMS.write().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Makes the child close every file but its standard ones when it starts its program: an agent must not
/// hold cargo's job server or a shell's pipe open.
pub(crate) fn close_inherited_files(command: &mut Command) {
    let close = || {
        // SAFETY: one system call on no memory. It marks the descriptors, which close when the program is
        // started; on a kernel before 5.11 it fails, and the files stay open.
        unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        Ok(())
    };
    // SAFETY: the closure makes one async-signal-safe system call.
    unsafe { command.pre_exec(close) };
}

/// Makes the child end with its parent, as the compiler ends when cargo kills what it has started.
pub(crate) fn end_with_parent(command: &mut Command) {
    let end = || set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from);
    // SAFETY: the closure makes one async-signal-safe system call.
    unsafe { command.pre_exec(end) };
}

/// This process's file mode creation mask.
pub(crate) fn umask() -> u32 {
    let present = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(present);
    present.as_raw_mode()
}

/// The compiler's exit code; where a signal ended it, ends by the same signal.
pub(crate) fn end_like(status: ExitStatus) -> ExitCode {
    if let Some(signal) = status.signal() {
        // SAFETY: system calls on no memory but a local limit. Rust's runtime handles or ignores some
        // signals; the default action ends this process. A core dump would be the compiler's a second time.
        unsafe {
            let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// The process that has started another.
pub(crate) fn parent(process: u32) -> Option<u32> {
    stat_field(process, 4)?.parse().ok()
}

/// When a process was started; with its id, its name for as long as the machine is up.
pub(crate) fn start_time(process: u32) -> Option<String> {
    stat_field(process, 22)
}

/// A field of `/proc/ID/stat`, counted from 1 as in `man 5 proc`; those behind the name.
fn stat_field(process: u32, number: usize) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let behind_name = &text[text.rfind(')')? + 1..];
    behind_name.split_ascii_whitespace().nth(number.checked_sub(3)?).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_a_parent_and_a_start_time() {
        let own = std::process::id();
        assert_eq!(parent(own), Some(std::os::unix::process::parent_id()));
        assert!(start_time(own).is_some_and(|time| time.parse::<u64>().is_ok()));
        assert_eq!(start_time(u32::MAX), None);
    }
}
