//! The HTTP bodies of protocol version 1.
//!
//! | call | request | response |
//! |---|---|---|
//! | `POST /v1/{namespace}/lookup` | [`LookupRequest`] | [`LookupResponse`] |
//! | `POST /v1/{namespace}/blobs/missing` | [`BlobList`] | [`BlobList`] |
//! | `GET`/`HEAD`/`PUT /v1/{namespace}/blobs/{digest}` | zstd frames | zstd frames |
//! | `POST /v1/{namespace}/fetch` | [`BlobList`] | [`crate::frame`] stream |
//! | `GET /v1/{namespace}/builds/{build key}` | none | [`crate::frame`] stream: manifests, then packs |
//! | `PUT /v1/{namespace}/results/{result key}` | [`PublishRequest`] | none |
//!
//! Every error response has an [`ErrorBody`].

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

use crate::codec::{DecodeError, Message};
use crate::digest::{ActionKey, Digest};
use crate::result::StoredResult;

/// Media type of every CBOR body.
pub const CBOR: &str = "application/cbor";
/// Media type of a blob: one or more zstd frames, with the blob's bytes as their content.
pub const ZSTD: &str = "application/zstd";
/// Media type of a [`crate::frame`] stream.
pub const FRAMES: &str = "application/vnd.cachec.frames";

/// Response header on every answer: the server's protocol versions, newest first, separated by commas.
pub const PROTOCOL_HEADER: &str = "cachec-protocol";
/// The protocol version spoken here.
pub const PROTOCOL_VERSION: &str = "1";

/// Most keys or digests in one request.
pub const MAX_LIST_ENTRIES: usize = 10_000;

/// Most results a server keeps, and answers, for one action key.
pub const MAX_MANIFEST_RESULTS: usize = 8;

/// Asks for the manifests of several action keys.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LookupRequest {
    /// The keys, in the order in which the answer is wanted.
    #[n(0)]
    pub action_keys: Vec<ActionKey>,
}

/// Manifests, in the order of the request; keys without one are left out.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LookupResponse {
    /// One for each key that is known.
    #[n(0)]
    pub manifests: Vec<Manifest>,
}

/// The newest results of one action key.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Manifest {
    /// The key they belong to.
    #[n(0)]
    pub action_key: ActionKey,
    /// Each an encoded [`StoredResult`], newest first. They are encoded one by one so that one of an
    /// unknown shape does not hide the others.
    #[n(1)]
    pub results: Vec<ByteVec>,
}

impl Manifest {
    /// The results that this version can read, newest first.
    pub fn readable_results(&self) -> impl Iterator<Item = StoredResult> {
        self.results
            .iter()
            .filter_map(|bytes| crate::codec::decode::<StoredResult>(bytes).ok())
            .filter(|result| result.action_key == self.action_key)
    }
}

/// A list of blobs.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct BlobList {
    /// Their digests.
    #[n(0)]
    pub digests: Vec<Digest>,
}

/// Publishes a result. The server computes the result key from it and compares it with the path's.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PublishRequest {
    /// The result; its pack is on the server already.
    #[n(0)]
    pub result: StoredResult,
    /// The action key's fields, encoded and compressed with zstd, for `explain`; empty where unknown.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub action_fields: Vec<u8>,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ErrorBody {
    /// A stable word for programs, for example `digest_mismatch`.
    #[n(0)]
    pub code: String,
    /// A sentence for people, without internals.
    #[n(1)]
    pub message: String,
}

fn check_list_length(length: usize) -> Result<(), DecodeError> {
    if length > MAX_LIST_ENTRIES {
        Err(DecodeError::Invalid("too many entries in one request"))
    } else {
        Ok(())
    }
}

impl Message for LookupRequest {
    const LIMIT_BYTES: usize = 1 << 20;

    fn check(&self) -> Result<(), DecodeError> {
        check_list_length(self.action_keys.len())
    }
}

impl Message for LookupResponse {
    const LIMIT_BYTES: usize = 256 << 20;
}

impl Message for Manifest {
    const LIMIT_BYTES: usize = 64 << 20;
}

impl Message for BlobList {
    const LIMIT_BYTES: usize = 1 << 20;

    fn check(&self) -> Result<(), DecodeError> {
        check_list_length(self.digests.len())
    }
}

impl Message for PublishRequest {
    const LIMIT_BYTES: usize = StoredResult::LIMIT_BYTES + (4 << 20);

    fn check(&self) -> Result<(), DecodeError> {
        self.result.check()
    }
}

impl Message for ErrorBody {
    const LIMIT_BYTES: usize = 64 << 10;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::{decode, encode};

    #[test]
    fn golden_lookup_request() {
        let request = LookupRequest { action_keys: vec![ActionKey::from_bytes([0xab; 32])] };
        let mut expected = vec![0xa1, 0x00, 0x81, 0x58, 0x20];
        expected.extend_from_slice(&[0xab; 32]);
        assert_eq!(encode(&request), expected);
        assert_eq!(decode::<LookupRequest>(&expected).unwrap(), request);
    }

    #[test]
    fn messages_over_their_limit_are_refused_unread() {
        let bytes = vec![0; LookupRequest::LIMIT_BYTES + 1];
        assert!(matches!(decode::<LookupRequest>(&bytes), Err(DecodeError::TooLarge { .. })));
        let list = BlobList { digests: vec![Digest::of(b""); MAX_LIST_ENTRIES + 1] };
        assert!(matches!(decode::<BlobList>(&encode(&list)), Err(DecodeError::Invalid(_))));
        let mut trailing = encode(&BlobList { digests: vec![] });
        trailing.push(0);
        assert!(matches!(decode::<BlobList>(&trailing), Err(DecodeError::Trailing(1))));
    }

    #[test]
    fn an_unreadable_result_does_not_hide_the_others() {
        let action_key = ActionKey::from_bytes([1; 32]);
        let result = StoredResult {
            action_key,
            input_set: crate::InputSet::default(),
            outputs: vec![],
            stdout: vec![],
            stderr: vec![],
            compile_ms: 1,
            pack: None,
            signature: None,
        };
        let foreign = StoredResult { action_key: ActionKey::from_bytes([2; 32]), ..result.clone() };
        let results = vec![b"garbage".to_vec().into(), encode(&foreign).into(), encode(&result).into()];
        let manifest = Manifest { action_key, results };
        assert_eq!(manifest.readable_results().collect::<Vec<_>>(), [result]);
    }

    proptest! {
        #[test]
        fn decoding_garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<LookupRequest>(&bytes);
            let _ = decode::<LookupResponse>(&bytes);
            let _ = decode::<BlobList>(&bytes);
            let _ = decode::<PublishRequest>(&bytes);
            let _ = decode::<ErrorBody>(&bytes);
        }
    }
}
