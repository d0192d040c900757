//! Which system calls are stopped, and what each means: a table of numbers for each architecture.
//!
//! Sources: `man 2 syscalls`; numbers from the `libc` crate. aarch64 has only the `…at` forms.

use libc::{AT_FDCWD, c_long};

/// An argument that names a file: the position of the directory's descriptor, if any, and of the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) directory: Option<usize>,
    pub(super) path: usize,
}

/// What a call does with the files it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// Opens; the position of the flags.
    Open(Name, usize),
    /// Opens for writing, from nothing.
    Create(Name),
    /// As `openat2`: flags in a structure.
    OpenHow(Name, usize),
    /// Asks what is there, following a link unless the flag at that position says otherwise.
    Look(Name, Option<usize>),
    /// Asks for permissions; the position of what is asked for.
    Access(Name, usize),
    /// Asks what is there, or what a link says, without following it.
    LookAtLink(Name),
    /// Starts a program; the position of its arguments.
    Execute(Name, usize),
    /// Renames the first to the second.
    Rename(Name, Name),
    /// Makes the second another name of the first.
    Link(Name, Name),
    /// Makes a directory or a special file.
    Make(Name),
    /// Makes a symbolic link.
    MakeLink(Name),
    /// Asks for extended attributes.
    Attributes(Name),
    /// Removes a name.
    Remove(Name),
    /// Changes a file in place.
    Modify(Name),
    /// Lists the directory of the descriptor in the first argument.
    List,
    /// Opens a socket to other machines; the family is the first argument.
    Network,
    /// Connects to another process; the address is at that position.
    Connect(usize),
    /// Does what cannot be followed; a reason code.
    Escape(&'static str),
}

const fn at(directory: usize, path: usize) -> Name {
    Name { directory: Some(directory), path }
}

/// Calls that every architecture has.
const COMMON: &[(c_long, Operation)] = &[
    (libc::SYS_openat, Operation::Open(at(0, 1), 2)),
    (libc::SYS_openat2, Operation::OpenHow(at(0, 1), 2)),
    (libc::SYS_newfstatat, Operation::Look(at(0, 1), Some(3))),
    (libc::SYS_statx, Operation::Look(at(0, 1), Some(2))),
    (libc::SYS_faccessat, Operation::Access(at(0, 1), 2)),
    (libc::SYS_faccessat2, Operation::Access(at(0, 1), 2)),
    (libc::SYS_readlinkat, Operation::LookAtLink(at(0, 1))),
    (libc::SYS_execve, Operation::Execute(Name { directory: None, path: 0 }, 1)),
    (libc::SYS_execveat, Operation::Execute(at(0, 1), 2)),
    (libc::SYS_renameat2, Operation::Rename(at(0, 1), at(2, 3))),
    (libc::SYS_linkat, Operation::Link(at(0, 1), at(2, 3))),
    (libc::SYS_symlinkat, Operation::MakeLink(at(1, 2))),
    (libc::SYS_mkdirat, Operation::Make(at(0, 1))),
    (libc::SYS_mknodat, Operation::Make(at(0, 1))),
    (libc::SYS_unlinkat, Operation::Remove(at(0, 1))),
    (libc::SYS_chdir, Operation::Look(Name { directory: None, path: 0 }, None)),
    (libc::SYS_fchmodat, Operation::Modify(at(0, 1))),
    (libc::SYS_fchownat, Operation::Modify(at(0, 1))),
    (libc::SYS_utimensat, Operation::Modify(at(0, 1))),
    (libc::SYS_setxattr, Operation::Modify(Name { directory: None, path: 0 })),
    (libc::SYS_lsetxattr, Operation::Modify(Name { directory: None, path: 0 })),
    (libc::SYS_getxattr, Operation::Attributes(Name { directory: None, path: 0 })),
    (libc::SYS_lgetxattr, Operation::Attributes(Name { directory: None, path: 0 })),
    (libc::SYS_listxattr, Operation::Attributes(Name { directory: None, path: 0 })),
    (libc::SYS_llistxattr, Operation::Attributes(Name { directory: None, path: 0 })),
    (libc::SYS_bind, Operation::Escape("local-socket")),
    (libc::SYS_move_mount, Operation::Escape("mount")),
    (libc::SYS_name_to_handle_at, Operation::Escape("file-handle")),
    (libc::SYS_truncate, Operation::Modify(Name { directory: None, path: 0 })),
    (libc::SYS_getdents64, Operation::List),
    (libc::SYS_socket, Operation::Network),
    (libc::SYS_connect, Operation::Connect(1)),
    (libc::SYS_io_uring_setup, Operation::Escape("io-uring")),
    (libc::SYS_open_by_handle_at, Operation::Escape("file-handle")),
    (libc::SYS_open_tree, Operation::Escape("mount")),
    (libc::SYS_fsopen, Operation::Escape("mount")),
    (libc::SYS_mount, Operation::Escape("mount")),
    (libc::SYS_chroot, Operation::Escape("chroot")),
    (libc::SYS_pivot_root, Operation::Escape("chroot")),
    (libc::SYS_setns, Operation::Escape("namespace")),
    (libc::SYS_unshare, Operation::Escape("namespace")),
];

#[cfg(target_arch = "x86_64")]
const OLDER: &[(c_long, Operation)] = {
    const fn name(path: usize) -> Name {
        Name { directory: None, path }
    }
    &[
        (libc::SYS_open, Operation::Open(name(0), 1)),
        (libc::SYS_creat, Operation::Create(name(0))),
        (libc::SYS_stat, Operation::Look(name(0), None)),
        (libc::SYS_lstat, Operation::LookAtLink(name(0))),
        (libc::SYS_access, Operation::Access(name(0), 1)),
        (libc::SYS_readlink, Operation::LookAtLink(name(0))),
        (libc::SYS_rename, Operation::Rename(name(0), name(1))),
        (libc::SYS_renameat, Operation::Rename(at(0, 1), at(2, 3))),
        (libc::SYS_link, Operation::Link(name(0), name(1))),
        (libc::SYS_symlink, Operation::MakeLink(name(1))),
        (libc::SYS_chmod, Operation::Modify(name(0))),
        (libc::SYS_chown, Operation::Modify(name(0))),
        (libc::SYS_lchown, Operation::Modify(name(0))),
        (libc::SYS_utime, Operation::Modify(name(0))),
        (libc::SYS_utimes, Operation::Modify(name(0))),
        (libc::SYS_futimesat, Operation::Modify(at(0, 1))),
        (libc::SYS_mkdir, Operation::Make(name(0))),
        (libc::SYS_mknod, Operation::Make(name(0))),
        (libc::SYS_rmdir, Operation::Remove(name(0))),
        (libc::SYS_unlink, Operation::Remove(name(0))),
        (libc::SYS_getdents, Operation::List),
    ]
};

#[cfg(target_arch = "aarch64")]
const OLDER: &[(c_long, Operation)] = &[(libc::SYS_renameat, Operation::Rename(at(0, 1), at(2, 3)))];

/// The architecture as seccomp reports it (`linux/audit.h`: ELF machine, 64 bit, little-endian).
#[cfg(target_arch = "x86_64")]
pub(super) const ARCHITECTURE: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
pub(super) const ARCHITECTURE: u32 = 0xC000_00B7;

/// On x86-64, numbers from here on are x32's: another architecture under the same name.
pub(super) const FOREIGN_NUMBERS: u32 = 0x4000_0000;

/// All calls that are stopped.
pub(super) fn stopped() -> impl Iterator<Item = &'static (c_long, Operation)> {
    COMMON.iter().chain(OLDER)
}

/// What a stopped call does.
pub(super) fn operation(number: i32, architecture: u32) -> Operation {
    let known = stopped().find(|(known, _)| *known == c_long::from(number));
    match known {
        Some((_, operation)) if architecture == ARCHITECTURE => *operation,
        _ => Operation::Escape("foreign-architecture"),
    }
}

/// The value of a descriptor argument that means the working directory.
pub(super) fn is_working_directory(argument: u64) -> bool {
    // The kernel looks at the lower half alone.
    lower_half(argument).cast_signed() == AT_FDCWD
}

/// The part of an argument that counts where the kernel takes an `int`.
pub(super) const fn lower_half(argument: u64) -> u32 {
    (argument & 0xffff_ffff) as u32
}
