//! Input sets: what one run was observed to read.
//!
//! An input's name is normalised (see [`crate::roots`]): paths below a root start with its marker.
//! The set is sorted and free of duplicates, so that it is the same however the run was observed.

use minicbor::{Decode, Encode};

use crate::codec::{DecodeError, Message};
use crate::digest::{ActionKey, Digest, ResultKey};
use crate::fields::Fields;

/// Context of the result key's derivation.
const RESULT_KEY_CONTEXT: &str = "cachec 2026-11 result key v1";

/// Most inputs that one set may have.
pub const MAX_INPUTS: usize = 200_000;

/// What was observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum InputKind {
    /// A file was read; the digest is its content's.
    #[n(0)]
    File,
    /// A path was looked up and nothing was there; no digest.
    #[n(1)]
    Absent,
    /// A directory was listed; the digest is that of its sorted entry names, each followed by a NUL and a
    /// letter for what it is (`f`ile, `d`irectory, `l`ink, `o`ther).
    #[n(2)]
    Listing,
    /// An environment variable was read; the digest is its normalised value's, none where it was not set.
    #[n(3)]
    Environment,
    /// The run turned out to depend on an argument that is not in the action key (the width that
    /// diagnostics are wrapped at); the digest is its value's, none where it was not given.
    #[n(4)]
    Argument,
    /// An output contains this root's literal path; the digest is the path's.
    #[n(5)]
    Root,
    /// A directory was there; no digest.
    #[n(6)]
    Directory,
    /// A symbolic link was looked at itself; the digest is its text's.
    #[n(7)]
    Link,
    /// It mattered whether a file may be executed; the digest is that of `x` or of `-`.
    #[n(8)]
    Mode,
    /// A program was searched in `PATH`; the name is a plain file name, the digest the content's of what is
    /// found first, none where nothing is.
    #[n(9)]
    Program,
    /// A program looked at the CPU, or was told to build for the one it runs on; the name is empty, the
    /// digest that of the CPU's model and features.
    #[n(10)]
    Cpu,
    /// A file was looked at that lies beside this root, in the same home directory; the digest is that of the
    /// root's path from there. Who goes up from the root comes by another way to the same place only then.
    #[n(11)]
    Place,
}

/// One observed input.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(map)]
pub struct Input {
    /// What the name means.
    #[n(0)]
    pub kind: InputKind,
    /// Normalised path, name of a variable, flag or root.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub name: Vec<u8>,
    /// Digest of the content or value; its absence is described at [`InputKind`].
    #[n(2)]
    pub digest: Option<Digest>,
}

/// All inputs of one run, sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct InputSet {
    #[n(0)]
    #[cbor(decode_with = "crate::codec::decode_list::<_, _, MAX_INPUTS>")]
    inputs: Vec<Input>,
}

impl InputSet {
    /// Sorts the inputs and removes duplicates.
    #[must_use]
    pub fn new(mut inputs: Vec<Input>) -> Self {
        inputs.sort_unstable();
        inputs.dedup();
        Self { inputs }
    }

    /// The inputs in their order.
    #[must_use]
    pub fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    /// The result key: digest of the action key and every input.
    #[must_use]
    pub fn result_key(&self, action_key: &ActionKey) -> ResultKey {
        let mut fields = Fields::default();
        fields.push("action key", action_key.as_bytes().as_slice());
        for Input { kind, name, digest } in &self.inputs {
            fields.push(format!("{kind:?}"), name.as_slice());
            fields.push("digest", digest.as_ref().map_or(&[] as &[u8], |digest| digest.as_bytes()));
        }
        fields.digest(RESULT_KEY_CONTEXT).into()
    }

    /// What [`Message::check`] checks of a message that carries a set.
    pub(crate) fn check(&self) -> Result<(), DecodeError> {
        if self.inputs.len() > MAX_INPUTS {
            return Err(DecodeError::Invalid("too many inputs"));
        }
        if !self.inputs.is_sorted_by(|a, b| a < b) {
            return Err(DecodeError::Invalid("inputs are not sorted, or one stands twice"));
        }
        Ok(())
    }
}

impl Message for InputSet {
    const LIMIT_BYTES: usize = 32 << 20;

    fn check(&self) -> Result<(), DecodeError> {
        Self::check(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode;

    fn file(name: &str, content: &str) -> Input {
        Input { kind: InputKind::File, name: name.into(), digest: Some(Digest::of(content.as_bytes())) }
    }

    #[test]
    fn the_order_of_observation_does_not_count() {
        let key = ActionKey::from_bytes([7; 32]);
        let (a, b) = (file("a", "1"), file("b", "2"));
        let set = InputSet::new(vec![a.clone(), b.clone()]);
        assert_eq!(set, InputSet::new(vec![b.clone(), a, b]));
        assert_ne!(set.result_key(&key), InputSet::new(vec![file("a", "1")]).result_key(&key));
        assert_ne!(set.result_key(&key), set.result_key(&ActionKey::from_bytes([8; 32])));
    }

    #[test]
    fn golden_result_key() {
        let set = InputSet::new(vec![
            file("\0workspace\0/src/lib.rs", "fn main() {}"),
            Input { kind: InputKind::Environment, name: b"HELLO".to_vec(), digest: None },
        ]);
        let expected = "f6ddf4f1d73f6ecd7dab3d64240109bdcd831370d030b2cbdbe2a2dcc8482bd3";
        assert_eq!(set.result_key(&ActionKey::from_bytes([1; 32])).to_string(), expected);
    }

    #[test]
    fn a_list_that_is_too_long_is_not_read_to_its_end() {
        // {0: [{0: 1, 1: h'00'}, …]}, whose length is a lie: what comes after the limit is no CBOR.
        let mut bytes = vec![0xa1, 0, 0x9a];
        bytes.extend(6_000_000_u32.to_be_bytes());
        bytes.extend([0xa2, 0, 1, 1, 0x41, 0].repeat(MAX_INPUTS + 1));
        bytes.extend([0xff; 100]);
        let error = decode::<InputSet>(&bytes).unwrap_err().to_string();
        assert!(error.contains("too long"), "{error}");
    }
}
