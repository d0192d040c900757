//! What wrapper and agent say to each other over the agent's Unix socket.
//!
//! ```text
//! message   length u32 little-endian | CBOR
//!
//! wrapper                              agent
//! Unit                            →
//!                                 ←    Working (every half second, any number) … then one of:
//!                                 ←    Hit: files are staged; the wrapper renames them and replays the streams
//! Restored                        →
//!                                 ←    Fulfil: deferred files are staged; the wrapper renames them
//! Restored                        →
//!                                 ←    Run: the wrapper runs the compiler with these arguments
//! Finished                        →
//!                                 ←    Working … Done: the wrapper may end
//! Control                         →
//!                                 ←    Working … Report
//! ```
//!
//! Invariant: the agent never touches a final output path. Whoever waits for the unit (the wrapper) moves
//! the staged files there, so an agent that is given up for dead cannot interfere with a compiler run.

use std::io::{self, Read, Write};

use cachec_protocol::Digest;
use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

use crate::tracer::{Places, Trace};

/// Longest message in bytes: a unit's environment may have megabytes, its streams a little more.
const MAX_MESSAGE_BYTES: u32 = 64 << 20;

/// An environment variable of the unit.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Variable {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) name: Vec<u8>,
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) value: Vec<u8>,
}

/// One unit, as cargo asked for it.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct UnitRequest {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) compiler: Vec<u8>,
    #[n(1)]
    pub(crate) arguments: Vec<ByteVec>,
    #[n(2)]
    pub(crate) environment: Vec<Variable>,
    #[n(3)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) working_directory: Vec<u8>,
    /// The wrapper's file mode creation mask.
    #[n(4)]
    pub(crate) umask: u32,
    /// Whether the first word is a build script's program rather than a compiler.
    #[n(5)]
    pub(crate) is_script: bool,
    /// Whether the wrapper can tell the user something.
    #[n(6)]
    pub(crate) is_heard: bool,
}

/// The end of a compiler run.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Finished {
    /// Whether the compiler exited with 0.
    #[n(0)]
    pub(crate) succeeded: bool,
    /// Complete standard output; `None` where it was not recorded.
    #[n(1)]
    pub(crate) stdout: Option<ByteVec>,
    /// Complete standard error; `None` where it was not recorded.
    #[n(2)]
    pub(crate) stderr: Option<ByteVec>,
    /// Whether it failed with remapped paths, and succeeded without.
    #[n(6)]
    pub(crate) needs_real_paths: bool,
    /// What the run was seen to do; `None` where it could not be traced.
    #[n(5)]
    pub(crate) trace: Option<Trace>,
    /// Start of the run on the file system's clock, in nanoseconds since the epoch.
    #[n(3)]
    pub(crate) started_ns: i64,
    /// Length of the run in milliseconds.
    #[n(4)]
    pub(crate) compile_ms: u64,
}

/// What a command asks of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub(crate) enum Control {
    /// Answer the statistics.
    #[n(0)]
    Statistics,
    /// Answer when everything is uploaded.
    #[n(1)]
    Flush,
    /// The same, then end.
    #[n(2)]
    Stop,
}

/// From the wrapper to the agent.
#[derive(Debug, Clone, Encode, Decode)]
pub(crate) enum Request {
    #[n(0)]
    Unit(#[n(0)] UnitRequest),
    /// The wrapper has renamed the staged files (or could not), so many microseconds after its start.
    #[n(1)]
    Restored(#[n(0)] bool, #[n(1)] u64),
    #[n(2)]
    Finished(#[n(0)] Finished),
    #[n(3)]
    Control(#[n(0)] Control),
}

/// A file, or a build script's whole output directory, that is to be moved to its place.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Rename {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) staged: Vec<u8>,
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) destination: Vec<u8>,
}

/// A restored unit.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Hit {
    #[n(0)]
    pub(crate) renames: Vec<Rename>,
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) stdout: Vec<u8>,
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) stderr: Vec<u8>,
    /// In a build that defers outputs, what is to be noted.
    #[n(3)]
    pub(crate) promise: Option<Promise>,
}

/// How the outputs of a restored unit would be made; see [`crate::deferred`].
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Promise {
    /// All arguments for the compiler.
    #[n(0)]
    pub(crate) arguments: Vec<ByteVec>,
    /// The outputs that are no texts of a compiler's.
    #[n(1)]
    pub(crate) outputs: Vec<Promised>,
    /// Whether the outputs are not there yet.
    #[n(3)]
    pub(crate) is_deferred: bool,
    /// A file that is to be there when the outputs are; see [`crate::deferred::leave_mark`].
    #[n(2)]
    pub(crate) mark: Option<ByteVec>,
}

/// An output that is there already, or is to be.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Promised {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) path: Vec<u8>,
    #[n(1)]
    pub(crate) digest: Digest,
}

/// The compiler is to be run.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Run {
    /// All arguments for the compiler.
    #[n(0)]
    pub(crate) arguments: Vec<ByteVec>,
    /// The places to trace the run with, where the agent wants to store its result.
    #[n(1)]
    pub(crate) record: Option<Places>,
    /// The roots to replace in the debug information that a build script leaves, longest path first.
    #[n(2)]
    pub(crate) remappings: Vec<Remapping>,
}

/// A root, by its path here and its name.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Remapping {
    #[n(0)]
    pub(crate) path: ByteVec,
    #[n(1)]
    pub(crate) name: String,
}

/// A launcher that takes the place of a build script's program.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Placement {
    /// The staged launcher, and the program's path.
    #[n(0)]
    pub(crate) launcher: Rename,
    /// Where the program is kept.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub(crate) kept: Vec<u8>,
}

/// From the agent to the wrapper.
#[derive(Debug, Clone, Encode, Decode)]
pub(crate) enum Response {
    /// Still at it.
    #[n(0)]
    Working,
    #[n(1)]
    Hit(#[n(0)] Hit),
    #[n(2)]
    Run(#[n(0)] Run),
    /// Nothing more to wait for; lines to tell the user, once each.
    #[n(3)]
    Done(#[n(0)] Vec<String>, #[n(1)] Option<Placement>),
    /// JSON text.
    #[n(4)]
    Report(#[n(0)] String),
    /// What was deferred is to be moved to its place, and marked as being there.
    #[n(5)]
    Fulfil(#[n(0)] Vec<Rename>, #[n(1)] Vec<ByteVec>),
}

/// A message with its length in front.
pub(crate) fn to_bytes<T: Encode<()>>(message: &T) -> Vec<u8> {
    let body = cachec_protocol::encode(message);
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    [&length.to_le_bytes(), body.as_slice()].concat()
}

/// The length in a message's first four bytes.
///
/// # Errors
/// `InvalidData` where it is over the limit.
pub(crate) fn body_length(header: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(header);
    if length > MAX_MESSAGE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message over the limit"));
    }
    Ok(length as usize)
}

/// Decodes a message's body.
///
/// # Errors
/// `InvalidData` where it is malformed.
pub(crate) fn from_body<'b, T: Decode<'b, ()>>(body: &'b [u8]) -> io::Result<T> {
    minicbor::decode(body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
}

/// Sends a message on a blocking stream.
pub(crate) fn send<T: Encode<()>>(stream: &mut impl Write, message: &T) -> io::Result<()> {
    stream.write_all(&to_bytes(message))
}

/// Receives the next message that is not [`Response::Working`] from a blocking stream.
pub(crate) fn receive(stream: &mut impl Read) -> io::Result<Response> {
    loop {
        let mut header = [0; 4];
        stream.read_exact(&mut header)?;
        let mut body = vec![0; body_length(header)?];
        stream.read_exact(&mut body)?;
        match from_body(&body)? {
            Response::Working => {}
            response => return Ok(response),
        }
    }
}
