//! The input tracer: runs a command and observes what its whole process tree reads, misses, lists, writes
//! and removes.
//!
//! A seccomp filter with a user-notification listener ([`filter`]) stops each system call that takes a file
//! name ([`syscalls`]); the supervisor ([`supervisor`]) looks at the name, notes what is there
//! ([`observation`]), and lets the kernel go on. No privilege is needed.
//!
//! Invariants:
//! - The tracer never changes what a call does: every answer is "continue".
//! - What cannot be observed (another architecture's calls, io_uring, another root directory, the network)
//!   makes the run unusable for the cache, never wrong.
//! - Where no tracer can run, the command runs all the same, and the trace is absent.
//!
//! Deliberately not here: hashing, and deciding which observations count. The agent does both.

mod filter;
mod observation;
mod supervisor;
mod syscalls;

pub(crate) use supervisor::{Tracer, serve_leftover};

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

use cachec_protocol::Digest;

use crate::memo::Identity;

/// Directories that mean something special to the command.
#[derive(Debug, Clone, Default, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Places {
    /// Where its outputs go: files there may be replaced and removed.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) output_directory: Vec<u8>,
    /// Where it searches by name: listing them is no input, what it opens is.
    #[n(1)]
    pub(crate) searched: Vec<ByteVec>,
    /// Empty ones, which are its own with all that comes below them.
    #[n(2)]
    pub(crate) own: Vec<ByteVec>,
    /// Tools' caches: what is read and written there is no business of anybody else's.
    #[n(3)]
    pub(crate) caches: Vec<ByteVec>,
}

/// What was seen at a path the first time it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub(crate) enum Seen {
    /// A regular file, followed through links.
    #[n(0)]
    File,
    /// Nothing.
    #[n(1)]
    Absent,
    /// A directory, followed through links.
    #[n(2)]
    Directory,
    /// A symbolic link that was looked at itself; see [`Access::digest`].
    #[n(3)]
    Link,
    /// A directory that was listed; see [`Access::digest`].
    #[n(4)]
    Listing,
    /// A file that may be executed, where that mattered.
    #[n(5)]
    Executable,
    /// A file that may not be executed, where that mattered.
    #[n(6)]
    NotExecutable,
}

/// One observed input.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Access {
    #[n(0)]
    pub(crate) seen: Seen,
    /// Absolute path, without `.` and `..`.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) path: Vec<u8>,
    /// Of a link's text, or of a directory's names.
    #[n(2)]
    pub(crate) digest: Option<Digest>,
    /// Of a file.
    #[n(3)]
    pub(crate) identity: Option<Identity>,
}

/// What a run was seen to do.
#[derive(Debug, Clone, Default, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Trace {
    /// What it read, sorted by path.
    #[n(0)]
    pub(crate) inputs: Vec<Access>,
    /// Files it wrote and left behind.
    #[n(1)]
    pub(crate) outputs: Vec<ByteVec>,
    /// Why the run cannot be stored, as a reason code.
    #[n(2)]
    pub(crate) obstacle: Option<String>,
    /// System calls that were stopped.
    #[n(3)]
    pub(crate) notifications: u64,
    /// Whether a program looked at the CPU, or was told to compile for it.
    #[n(4)]
    pub(crate) looks_at_cpu: bool,
}
