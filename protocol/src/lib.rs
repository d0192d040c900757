//! What the cachec client and server share: the words of the product as types.
//!
//! Responsibility: digests and keys, the derivation of action keys and result keys, path roots, wire
//! messages (CBOR with integer map keys), stream frames and packs.
//!
//! Invariants:
//! - No file, network or clock access and no async: everything works on bytes the caller holds, or on the
//!   caller's own `Read` and `Write`.
//! - Every decoder has a size limit, and answers malformed input with an error, never with a panic.
//! - A change of what a key covers changes [`action::KEY_VERSION`]; golden vectors in the tests say so.
//!
//! Deliberately not here: how a key's ingredients are gathered (client) and how results are kept (server).

pub mod action;
pub mod arguments;
pub mod build;
pub mod codec;
pub mod digest;
pub mod fields;
pub mod frame;
pub mod input;
pub mod message;
pub mod pack;
pub mod result;
pub mod roots;
pub mod script;

pub use action::RustcAction;
pub use arguments::{Argument, ArgumentError};
pub use build::{BuildAction, BuildEntry, BuildRecord};
pub use codec::{DecodeError, decode, encode};
pub use digest::{ActionKey, Digest, ResultKey};
pub use fields::Fields;
pub use input::{Input, InputKind, InputSet};
pub use result::{Output, OutputKind, Pack, StoredResult};
pub use roots::{Root, Roots};
pub use script::ScriptAction;
