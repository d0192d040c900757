//! A sandbox that forbids seccomp filters, as some container profiles do.

#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter, sock_fprog};

const fn instruction(parts: u32, operand: u32, if_true: u8, if_false: u8) -> sock_filter {
    sock_filter { code: (parts & 0xffff) as u16, jt: if_true, jf: if_false, k: operand }
}

/// Makes the command, and all that it starts, get EPERM for every `seccomp` call.
pub fn forbid_seccomp(command: &mut Command) {
    let number = u32::try_from(libc::SYS_seccomp).unwrap_or_default();
    let program = [
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
        instruction(BPF_RET | BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs(), 0, 0),
        instruction(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let install = move || {
        let filter = sock_fprog { len: 4, filter: program.as_ptr().cast_mut() };
        // SAFETY: the program lives through the calls, which read it alone.
        let result = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure makes async-signal-safe system calls only.
    unsafe { command.pre_exec(install) };
}
