//! Processes: what of them needs `unsafe`, ending as another one ended, and telling one from another.

#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::{PoisonError, RwLock};

use rustix::process::{Signal, set_parent_process_death_signal};

/// Lock: held for reading from when a process is started until its program runs. So long it has the files open that this
/// process had, and one that is open for writing cannot be executed ("text file busy").
static STARTING: RwLock<()> = RwLock::new(());

/// Starts a process where others are told of programs that were written here. Returns when its program runs.
///
/// # Errors
/// Those of starting it.
pub(crate) fn spawn(command: &mut Command) -> io::Result<Child> {
    let _starting = STARTING.read().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// To be called between closing a program's file and telling others of it: waits until nobody has it open any more, for
/// about as long as starting a process takes.
pub(crate) fn wait_for_starting() {
    drop(STARTING.write().unwrap_or_else(PoisonError::into_inner));
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
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_process_has_a_parent_and_a_start_time() {
        let own = std::process::id();
        assert_eq!(parent(own), Some(std::os::unix::process::parent_id()));
        assert!(start_time(own).is_some_and(|time| time.parse::<u64>().is_ok()));
        assert_eq!(start_time(u32::MAX), None);
    }

    #[test]
    fn a_program_can_be_run_when_no_process_is_being_started() {
        let mut program = tempfile::NamedTempFile::new().unwrap();
        io::copy(&mut fs::File::open("/bin/true").unwrap(), program.as_file_mut()).unwrap();
        fs::set_permissions(program.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let (mut forked, mut has_forked) = io::pipe().unwrap();
        let starting = std::thread::spawn(move || {
            let mut slow = Command::new("/bin/true");
            let wait = move || {
                has_forked.write_all(b"1")?;
                std::thread::sleep(std::time::Duration::from_millis(300));
                Ok(())
            };
            // SAFETY: the closure writes to a pipe and sleeps.
            unsafe { slow.pre_exec(wait) };
            spawn(&mut slow).unwrap().wait().unwrap()
        });
        forked.read_exact(&mut [0]).unwrap();
        let path = program.into_temp_path();
        wait_for_starting();
        assert!(Command::new(&path).status().unwrap().success());
        assert!(starting.join().unwrap().success());
    }
}
