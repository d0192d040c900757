//! Results: everything that one run of a tool left behind, as it is stored.

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

use crate::codec::{self, DecodeError, Message};
use crate::digest::{ActionKey, Digest, ResultKey};
use crate::input::InputSet;

/// Most bytes of standard output or standard error that a result may have; a run that wrote more is not
/// stored.
pub const MAX_STREAM_BYTES: usize = 2 << 20;

/// Most outputs of one result.
pub const MAX_OUTPUTS: usize = 10_000;

/// Most stored bytes that the outputs of one result may have in it, rather than in its pack.
pub const MAX_INLINE_BYTES: u64 = 256 << 10;

/// Longest output name in bytes.
const MAX_NAME_BYTES: usize = 1024;

/// How an output's stored bytes relate to the file's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum OutputKind {
    /// The file's bytes.
    #[n(0)]
    Binary,
    /// Roots' paths are stored as markers, and written back where the file is restored.
    #[n(1)]
    Text,
    /// A directory; without bytes.
    #[n(2)]
    Directory,
    /// A symbolic link; the bytes are its text, which leads to a place in the output directory.
    #[n(3)]
    Link,
}

/// One file, directory or link that a run left.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Output {
    /// Path relative to the unit's output directory: one or more plain components joined by `/`.
    #[n(0)]
    pub name: String,
    /// How to restore the bytes.
    #[n(1)]
    pub kind: OutputKind,
    /// Whether the file's owner may execute it.
    #[n(2)]
    pub executable: bool,
    /// Digest of the stored bytes.
    #[n(3)]
    pub digest: Digest,
    /// Number of stored bytes.
    #[n(4)]
    pub size_bytes: u64,
    /// The lowest nine permission bits, where they are not those that the build's mask leaves.
    #[n(5)]
    pub permissions: Option<u32>,
    /// The stored bytes, where they are here and not in the pack: few, and needed for every restore.
    #[n(6)]
    pub inline: Option<ByteVec>,
}

/// The blob that holds all outputs that are not inline, one after the other in the order of
/// [`StoredResult::outputs`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Pack {
    /// Digest of the concatenated outputs.
    #[n(0)]
    pub digest: Digest,
}

/// What one run left, and what it was observed to read.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct StoredResult {
    /// Key of the action that ran.
    #[n(0)]
    pub action_key: ActionKey,
    /// What it read.
    #[n(1)]
    pub input_set: InputSet,
    /// What it left, in pack order: `.rmeta` before `.rlib`.
    #[n(2)]
    #[cbor(decode_with = "crate::codec::decode_list::<_, _, MAX_OUTPUTS>")]
    pub outputs: Vec<Output>,
    /// Standard output, normalised.
    #[n(3)]
    #[cbor(with = "minicbor::bytes")]
    pub stdout: Vec<u8>,
    /// Standard error, normalised.
    #[n(4)]
    #[cbor(with = "minicbor::bytes")]
    pub stderr: Vec<u8>,
    /// How long the run took, in milliseconds.
    #[n(5)]
    pub compile_ms: u64,
    /// Where the outputs' bytes are; `None` exactly where there are none but inline.
    #[n(6)]
    pub pack: Option<Pack>,
    /// Who vouches for it, if anybody does.
    #[n(7)]
    pub signature: Option<Signature>,
}

/// A writer's Ed25519 signature of all else in a result, and so, through digests, of every byte that it restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Signature {
    /// The writer's public key.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub key: [u8; 32],
    /// Of [`StoredResult::signed_bytes`].
    #[cbor(n(1), with = "minicbor::bytes")]
    pub bytes: [u8; 64],
}

/// What signed bytes begin with, so that a signature is good for nothing else.
const SIGNED_CONTEXT: &[u8] = b"cachec result 1\0";

/// For the key of a signed result.
const SIGNED_KEY_CONTEXT: &str = "cachec 2026-11 result key of a signed result";

impl StoredResult {
    /// The key this result is stored under. The same result of another writer who signs is another one: the first of a
    /// key stays, and must not keep out one that more readers accept.
    #[must_use]
    pub fn result_key(&self) -> ResultKey {
        let key = self.input_set.result_key(&self.action_key);
        let Some(signature) = &self.signature else { return key };
        let mut hasher = blake3::Hasher::new_derive_key(SIGNED_KEY_CONTEXT);
        hasher.update(key.as_bytes()).update(&signature.key);
        ResultKey::from_bytes(*hasher.finalize().as_bytes())
    }

    /// What a signature is of: everything but itself.
    #[must_use]
    pub fn signed_bytes(&self) -> Vec<u8> {
        [SIGNED_CONTEXT, &codec::encode(&Self { signature: None, ..self.clone() })].concat()
    }

    /// The outputs whose bytes are in the pack, in its order.
    pub fn packed(&self) -> impl Iterator<Item = &Output> {
        self.outputs.iter().filter(|output| output.inline.is_none())
    }

    /// The pack's uncompressed size.
    #[must_use]
    pub fn packed_bytes(&self) -> u64 {
        self.packed().fold(0, |sum, output| sum.saturating_add(output.size_bytes))
    }
}

impl Message for StoredResult {
    const LIMIT_BYTES: usize = 40 << 20;

    fn check(&self) -> Result<(), DecodeError> {
        self.input_set.check()?;
        if self.stdout.len() > MAX_STREAM_BYTES || self.stderr.len() > MAX_STREAM_BYTES {
            return Err(DecodeError::Invalid("standard output or error is too long"));
        }
        if self.outputs.len() > MAX_OUTPUTS {
            return Err(DecodeError::Invalid("too many outputs"));
        }
        if self.packed().next().is_none() != self.pack.is_none() {
            return Err(DecodeError::Invalid("outputs without a pack, or a pack without outputs"));
        }
        let inline = self.outputs.iter().filter_map(|output| output.inline.as_ref());
        if inline.map(|bytes| bytes.len() as u64).sum::<u64>() > MAX_INLINE_BYTES {
            return Err(DecodeError::Invalid("too many bytes of outputs in the result"));
        }
        let mut names: Vec<&str> = self.outputs.iter().map(|output| output.name.as_str()).collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(DecodeError::Invalid("two outputs of one name"));
        }
        if names.into_iter().all(is_safe_name) {
            Ok(())
        } else {
            Err(DecodeError::Invalid("unsafe output name"))
        }
    }
}

/// Whether a name stays below the directory it is joined to, on every system.
fn is_safe_name(name: &str) -> bool {
    name.len() <= MAX_NAME_BYTES
        && name.split('/').all(|component| {
            !matches!(component, "" | "." | "..") && !component.bytes().any(|byte| matches!(byte, 0 | b'\\'))
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::{decode, encode};

    fn result(names: &[&str]) -> StoredResult {
        let output = |name: &&str| Output {
            name: (*name).to_owned(),
            kind: OutputKind::Binary,
            executable: false,
            digest: Digest::of(b"x"),
            size_bytes: 1,
            permissions: None,
            inline: None,
        };
        StoredResult {
            action_key: ActionKey::from_bytes([1; 32]),
            input_set: InputSet::default(),
            outputs: names.iter().map(output).collect(),
            stdout: Vec::new(),
            stderr: b"warning".to_vec(),
            compile_ms: 12,
            pack: (!names.is_empty()).then_some(Pack { digest: Digest::of(b"pack") }),
            signature: None,
        }
    }

    #[test]
    fn a_result_round_trips() {
        let result = result(&["libdemo.rmeta", "libdemo.rlib", "sub/demo.dwo"]);
        assert_eq!(decode::<StoredResult>(&encode(&result)).unwrap(), result);
    }

    #[test]
    fn a_signed_result_has_a_key_of_its_own() {
        let unsigned = result(&["libdemo.rlib"]);
        let signed = |signer: u8, bytes: u8| StoredResult {
            signature: Some(Signature { key: [signer; 32], bytes: [bytes; 64] }),
            ..unsigned.clone()
        };
        assert_eq!(decode::<StoredResult>(&encode(&signed(1, 2))).unwrap(), signed(1, 2));
        assert_eq!(signed(1, 2).signed_bytes(), unsigned.signed_bytes());
        assert_eq!(signed(1, 2).result_key(), signed(1, 3).result_key());
        assert_ne!(signed(1, 2).result_key(), unsigned.result_key());
        assert_ne!(signed(1, 2).result_key(), signed(2, 2).result_key());
    }

    #[test]
    fn bytes_are_in_the_pack_or_in_the_result() {
        let mut stored = result(&["a", "b"]);
        stored.outputs[0].inline = Some(b"x".to_vec().into());
        assert_eq!(decode::<StoredResult>(&encode(&stored)).unwrap(), stored);
        assert_eq!(stored.packed_bytes(), 1);
        stored.pack = None;
        assert!(decode::<StoredResult>(&encode(&stored)).is_err());
        stored.outputs[1].inline = Some(b"x".to_vec().into());
        assert!(decode::<StoredResult>(&encode(&stored)).is_ok());
        stored.outputs[1].inline = Some(vec![0; usize::try_from(MAX_INLINE_BYTES).unwrap()].into());
        assert!(decode::<StoredResult>(&encode(&stored)).is_err());
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["", "/etc/passwd", "../x", "a/../b", "a//b", ".", "a\\b", "a\0b", "a/"] {
            let decoded = decode::<StoredResult>(&encode(&result(&[name])));
            assert!(matches!(decoded, Err(DecodeError::Invalid(_))), "{name:?}");
        }
        assert!(decode::<StoredResult>(&encode(&result(&["a", "a"]))).is_err());
    }

    #[test]
    fn a_field_from_the_future_is_skipped() {
        let mut bytes = encode(&result(&["a"]));
        // A map of seven entries becomes one of eight: key 99, value [1, 2].
        assert_eq!(bytes[0], 0xa7);
        bytes[0] = 0xa8;
        bytes.extend_from_slice(&[0x18, 99, 0x82, 1, 2]);
        assert_eq!(decode::<StoredResult>(&bytes).unwrap(), result(&["a"]));
    }

    proptest! {
        #[test]
        fn decoding_garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<StoredResult>(&bytes);
        }

        #[test]
        fn a_changed_byte_never_panics(index in 0usize..200, value in any::<u8>()) {
            let mut bytes = encode(&result(&["a", "b"]));
            let index = index % bytes.len();
            bytes[index] = value;
            let _ = decode::<StoredResult>(&bytes);
        }
    }
}
