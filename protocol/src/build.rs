//! Build records: what one build asked for, in order, so that the next one can be answered before it asks.
//!
//! A record is kept as a result: that of an action which is the build itself, with the record as its standard output.
//! So servers keep, answer and forget it as they do any other result. Its outputs, if it has any, are packs of the
//! build's units, each named by its digest: a bundle, which takes less than they do one by one.

use minicbor::{Decode, Encode};

use crate::codec::{DecodeError, Message, decode, encode};
use crate::digest::{ActionKey, Digest};
use crate::fields::Fields;
use crate::input::{Input, InputKind, InputSet};
use crate::message::MAX_LIST_ENTRIES;
use crate::result::StoredResult;

/// Context of the key's derivation.
const BUILD_KEY_VERSION: &str = "cachec 2026-11 build key v1";

/// What tells builds apart that ask for mostly the same.
#[derive(Debug, Clone, Copy)]
pub struct BuildAction<'a> {
    /// Names of the workspace's own packages, sorted.
    pub packages: &'a [String],
    /// Cargo's arguments.
    pub arguments: &'a [Vec<u8>],
    /// Architecture and system of the machine.
    pub machine: &'a str,
}

impl BuildAction<'_> {
    /// The key that the build's records are kept under.
    #[must_use]
    pub fn key(&self) -> ActionKey {
        let mut fields = Fields::default();
        self.packages.iter().for_each(|name| fields.push("package", name.as_bytes()));
        self.arguments.iter().for_each(|word| fields.push("argument", word.as_slice()));
        fields.push("machine", self.machine.as_bytes());
        fields.digest(BUILD_KEY_VERSION).into()
    }
}

/// One unit of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct BuildEntry {
    /// What was asked for.
    #[n(0)]
    pub action_key: ActionKey,
    /// The pack of the result that fitted; `None` where it has no outputs.
    #[n(1)]
    pub pack: Option<Digest>,
    /// Whether only compilers read the outputs: a build of nothing but hits can do without their bytes.
    #[n(2)]
    #[cbor(default)]
    pub for_compilers: bool,
}

/// What a build asked for, in the order it asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct BuildRecord {
    /// At most [`MAX_LIST_ENTRIES`].
    #[n(0)]
    pub entries: Vec<BuildEntry>,
}

impl Message for BuildRecord {
    const LIMIT_BYTES: usize = 1 << 20;

    fn check(&self) -> Result<(), DecodeError> {
        if self.entries.len() > MAX_LIST_ENTRIES {
            return Err(DecodeError::Invalid("too many entries in a build record"));
        }
        Ok(())
    }
}

impl BuildRecord {
    /// The result that keeps this record under a build's key.
    #[must_use]
    pub fn into_result(self, build: ActionKey) -> StoredResult {
        let encoded = encode(&self);
        // Another record is another result, which takes the first place.
        let input =
            Input { kind: InputKind::Argument, name: b"record".to_vec(), digest: Some(Digest::of(&encoded)) };
        StoredResult {
            action_key: build,
            input_set: InputSet::new(vec![input]),
            outputs: Vec::new(),
            stdout: encoded,
            stderr: Vec::new(),
            compile_ms: 0,
            pack: None,
            signature: None,
        }
    }

    /// The record that a result keeps.
    ///
    /// # Errors
    /// Where it keeps none; it is then as if there were no record.
    pub fn from_result(result: &StoredResult) -> Result<Self, DecodeError> {
        decode(&result.stdout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(count: u8) -> BuildRecord {
        let entry = |number| BuildEntry {
            action_key: ActionKey::from_bytes([number; 32]),
            pack: (number % 2 == 0).then(|| Digest::of(&[number])),
            for_compilers: number == 1,
        };
        BuildRecord { entries: (0..count).map(entry).collect() }
    }

    #[test]
    fn a_record_comes_back_from_its_result() {
        let build = ActionKey::from_bytes([7; 32]);
        let result = record(3).into_result(build);
        assert_eq!(BuildRecord::from_result(&result).unwrap(), record(3));
        assert_eq!(decode::<StoredResult>(&encode(&result)).unwrap(), result);
        assert_ne!(result.result_key(), record(2).into_result(build).result_key());
    }

    #[test]
    fn what_is_no_record_is_an_error() {
        let mut result = record(1).into_result(ActionKey::from_bytes([7; 32]));
        result.stdout = b"garbage".to_vec();
        assert!(BuildRecord::from_result(&result).is_err());
        let entry = record(1).entries[0];
        result.stdout = encode(&BuildRecord { entries: vec![entry; MAX_LIST_ENTRIES + 1] });
        assert!(BuildRecord::from_result(&result).is_err());
    }

    #[test]
    fn builds_are_told_apart() {
        let action = BuildAction {
            packages: &["a".to_owned(), "b".to_owned()],
            arguments: &[b"build".to_vec()],
            machine: "x86_64",
        };
        let release = [b"build".to_vec(), b"--release".to_vec()];
        assert_ne!(action.key(), BuildAction { arguments: &release, ..action }.key());
        assert_ne!(action.key(), BuildAction { packages: &["ab".to_owned()], ..action }.key());
        assert_ne!(action.key(), BuildAction { machine: "aarch64", ..action }.key());
    }
}
