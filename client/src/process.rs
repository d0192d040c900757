//! The few things about processes that need `unsafe`, and ending as another process ended.

#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, ExitStatus};

use rustix::process::{Signal, set_parent_process_death_signal};

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
