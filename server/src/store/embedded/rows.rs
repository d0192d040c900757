//! The rows of the database: their keys, values and what they are counted as.
//!
//! | column family | key | value |
//! |---|---|---|
//! | `default` | `format` | version, one byte |
//! | `default` | `totals` | [`Totals`] |
//! | `default` | `scrub` | [`ScrubRow`] |
//! | `blobs` | namespace, NUL, digest | [`BlobRow`] |
//! | `blob_data` | namespace, NUL, digest | a small blob's zstd frames |
//! | `manifests` | namespace, NUL, action key | result keys, 32 bytes each, newest first |
//! | `results` | namespace, NUL, result key | the encoded `StoredResult`, as it was published |
//! | `result_rows` | namespace, NUL, result key | [`ResultRow`] |
//! | `action_fields` | namespace, NUL, result key | compressed fields of the action key, for `explain` |
//! | `recency` | namespace, NUL, sequence u64 big-endian, kind, digest or result key | nothing |
//! | `namespaces` | namespace | [`NamespaceRow`] |
//! | `ages` | hour u32 big-endian, in time that the server has run | [`HourRow`] |
//! | `doomed` | name of a blob file | [`DoomedRow`] |
//!
//! Values are CBOR maps with integer keys, so that later versions may add fields.
//!
//! Every key that belongs to a tenant starts with its namespace.
//!
//! Format 1 had no `namespaces` and no `ages`, and one order over all namespaces; see `migration.rs`.

use cachec_protocol::codec::{self, Message};
use cachec_protocol::digest::DIGEST_BYTES;
use cachec_protocol::{ActionKey, Digest};
use minicbor::{Decode, Encode};

use crate::namespace::Namespace;
use crate::store::StoreError;

/// Version of everything described here.
pub(super) const FORMAT_VERSION: u8 = 2;

/// Blobs of up to this many compressed bytes are kept in the database.
pub(super) const INLINE_BYTES: u64 = 16 << 10;

/// Files are counted in whole blocks of this size.
const BLOCK_BYTES: u64 = 4 << 10;

/// What an entry's rows, index rows and directory entry are counted as, besides its data. Keys are at most
/// 106 bytes and values at most 60; an entry has up to three of each, and a file name of 150.
pub(super) const ENTRY_BYTES: u64 = 512;

/// A row's key: namespace, NUL, 32 bytes.
pub(super) fn row_key(namespace: &Namespace, digest: &[u8; DIGEST_BYTES]) -> Vec<u8> {
    let mut key = Vec::with_capacity(namespace.as_str().len() + 1 + DIGEST_BYTES);
    key.extend_from_slice(namespace.as_str().as_bytes());
    key.push(0);
    key.extend_from_slice(digest);
    key
}

/// The key of another row of the same namespace.
pub(super) fn sibling_key(key: &[u8], digest: &[u8; DIGEST_BYTES]) -> Vec<u8> {
    let mut sibling = key.to_vec();
    let tail = sibling.len().saturating_sub(DIGEST_BYTES);
    sibling.truncate(tail);
    sibling.extend_from_slice(digest);
    sibling
}

/// The namespace that a row's key starts with.
pub(super) fn key_namespace(key: &[u8]) -> Result<Namespace, StoreError> {
    let name = key.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
    name.ok_or(StoreError::DamagedRow("key"))
}

/// The 32 bytes at the end of a row's key.
pub(super) fn key_digest(key: &[u8]) -> Result<[u8; DIGEST_BYTES], StoreError> {
    key.last_chunk::<DIGEST_BYTES>().copied().ok_or(StoreError::DamagedRow("key"))
}

/// Where a blob's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(super) enum BlobHome {
    /// In `blob_data`.
    #[n(0)]
    Inline,
    /// In the file with this number in its name.
    #[n(1)]
    File(#[n(0)] u64),
    /// Its file was found missing or cut. The blob counts as absent; the row keeps the references of
    /// results for when it is uploaded again.
    #[n(2)]
    Lost,
}

/// What is known of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct BlobRow {
    #[n(0)]
    pub(super) content_bytes: u64,
    #[n(1)]
    pub(super) stored_bytes: u64,
    #[n(2)]
    pub(super) home: BlobHome,
    /// How many results need it. It has a `recency` row exactly while there are none.
    #[n(3)]
    pub(super) references: u64,
    /// When it was last used.
    #[n(4)]
    pub(super) sequence: u64,
    /// The level that it was compressed again at, whether or not that made it smaller; see `recompress.rs`.
    #[n(5)]
    pub(super) level: Option<i32>,
}

impl BlobRow {
    /// What it is counted as.
    pub(super) fn charge_bytes(&self) -> u64 {
        ENTRY_BYTES.saturating_add(self.data_bytes())
    }

    /// The part of [`Self::charge_bytes`] that its data is.
    pub(super) fn data_bytes(&self) -> u64 {
        match self.home {
            BlobHome::Inline => row_bytes(self.stored_bytes),
            BlobHome::File(_) => file_bytes(self.stored_bytes),
            BlobHome::Lost => 0,
        }
    }
}

/// What is known of a result, besides itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct ResultRow {
    #[n(0)]
    pub(super) action_key: ActionKey,
    #[n(1)]
    pub(super) pack: Option<Digest>,
    /// When it was last used; it has a `recency` row there.
    #[n(2)]
    pub(super) sequence: u64,
    /// What it is counted as.
    #[n(3)]
    pub(super) charge_bytes: u64,
}

/// A blob file that may exist without a blob row that names it. Every file below `blobs` is named by a blob
/// row or by one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct DoomedRow {
    /// What the totals still count for it.
    #[n(0)]
    pub(super) counted_bytes: u64,
}

/// Sums over all rows, changed in the same batch as the rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Totals {
    /// What all entries are counted as, and files that are doomed and not yet gone.
    #[n(0)]
    pub(super) stored_bytes: u64,
    #[n(1)]
    pub(super) blobs: u64,
    #[n(2)]
    pub(super) results: u64,
    /// The last sequence number given to an access or a file.
    #[n(3)]
    pub(super) sequence: u64,
    /// For how long the server has run, all its processes together, in minutes.
    #[cbor(n(5), default)]
    pub(super) age_minutes: u64,
}

/// What a namespace has of the store; there is none where it has nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct NamespaceRow {
    /// What its entries are counted as.
    #[n(0)]
    pub(super) stored_bytes: u64,
    /// None of its `recency` rows is below. Searching from here passes over no deleted row twice.
    #[n(1)]
    pub(super) floor: u64,
}

/// How far scrubbing is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct ScrubRow {
    /// Blobs before this key were checked.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub(super) next: Vec<u8>,
    /// When it began, in the age of the store.
    #[n(1)]
    pub(super) began_minutes: u64,
    /// Whether all were checked.
    #[n(2)]
    pub(super) is_over: bool,
}

/// What was when an hour began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct HourRow {
    /// The last sequence number that was given before.
    #[n(0)]
    pub(super) sequence: u64,
}

macro_rules! small_row {
    ($($name:ident),*) => {
        $(impl Message for $name {
            const LIMIT_BYTES: usize = 256;
        })*
    };
}
small_row!(BlobRow, ResultRow, DoomedRow, Totals, NamespaceRow, HourRow, ScrubRow);

/// Decodes a row.
pub(super) fn decode<'b, T: Message + Decode<'b, ()>>(
    bytes: &'b [u8],
    name: &'static str,
) -> Result<T, StoreError> {
    codec::decode(bytes).map_err(|_| StoreError::DamagedRow(name))
}

/// What a file of this length is counted as.
pub(super) const fn file_bytes(length: u64) -> u64 {
    length.div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES)
}

/// What data of this length in the database is counted as: two and a half times itself. Where entries come and go
/// all the time, deleted data stays until it is compacted away, and a compaction holds input and output at the
/// same time; a database of nothing but such data was seen to take 2.1 times its live size at its worst.
pub(super) const fn row_bytes(length: u64) -> u64 {
    length.saturating_mul(5).div_ceil(2)
}

/// What a blob of this compressed length is counted as, itself or while it is uploaded.
pub(super) const fn upload_bytes(length: u64) -> u64 {
    let data = if length <= INLINE_BYTES { row_bytes(length) } else { file_bytes(length) };
    data.saturating_add(ENTRY_BYTES)
}

/// Which kind of entry a `recency` row is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum EntryKind {
    Blob,
    Result,
}

/// An entry of either kind: kind and row key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    pub(super) kind: EntryKind,
    pub(super) key: Vec<u8>,
}

impl Entry {
    pub(super) fn blob(key: impl Into<Vec<u8>>) -> Self {
        Self { kind: EntryKind::Blob, key: key.into() }
    }

    pub(super) fn result(key: impl Into<Vec<u8>>) -> Self {
        Self { kind: EntryKind::Result, key: key.into() }
    }

    /// The key of its `recency` row at that sequence number.
    pub(super) fn recency_key(&self, sequence: u64) -> Result<Vec<u8>, StoreError> {
        let (namespace, digest) =
            self.key.split_last_chunk::<DIGEST_BYTES>().ok_or(StoreError::DamagedRow("key"))?;
        let kind = match self.kind {
            EntryKind::Blob => 1,
            EntryKind::Result => 2,
        };
        Ok([namespace, &sequence.to_be_bytes(), &[kind], digest].concat())
    }

    /// Reads the key of a `recency` row.
    pub(super) fn from_recency_key(bytes: &[u8]) -> Result<(u64, Self), StoreError> {
        const DAMAGED: StoreError = StoreError::DamagedRow("recency");
        let (rest, digest) = bytes.split_last_chunk::<DIGEST_BYTES>().ok_or(DAMAGED)?;
        let (kind, rest) = rest.split_last().ok_or(DAMAGED)?;
        let (namespace, sequence) = rest.split_last_chunk::<8>().ok_or(DAMAGED)?;
        let kind = match kind {
            1 => EntryKind::Blob,
            2 => EntryKind::Result,
            _ => return Err(DAMAGED),
        };
        Ok((u64::from_be_bytes(*sequence), Self { kind, key: [namespace, digest].concat() }))
    }
}

/// What the keys of all `recency` rows of a namespace begin with, from a sequence number on.
pub(super) fn recency_from(namespace: &Namespace, sequence: u64) -> Vec<u8> {
    [namespace.as_str().as_bytes(), &[0], &sequence.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_keep_their_bytes_and_those_of_version_one_are_read() {
        let row = BlobRow {
            content_bytes: 5,
            stored_bytes: 4,
            home: BlobHome::File(3),
            references: 2,
            sequence: 1,
            level: None,
        };
        assert_eq!(codec::encode(&row), [0xa5, 0, 5, 1, 4, 2, 0x82, 1, 0x81, 3, 3, 2, 4, 1]);
        assert_eq!(decode::<BlobRow>(&codec::encode(&row), "blob").unwrap(), row);
        let totals = Totals { stored_bytes: 1, blobs: 2, results: 3, sequence: 4, age_minutes: 0 };
        assert_eq!(decode::<Totals>(&[0xa5, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5], "totals").unwrap(), totals);
        assert_eq!(codec::encode(&totals), [0xa5, 0, 1, 1, 2, 2, 3, 3, 4, 5, 0]);
    }

    #[test]
    fn recency_keys_sort_by_sequence_within_a_namespace_and_round_trip() {
        let entry = |name: &str| Entry::result(row_key(&name.parse().unwrap(), &[7; 32]));
        let (team, other) = (entry("team"), entry("team-2"));
        let key = team.recency_key(300).unwrap();
        assert_eq!(Entry::from_recency_key(&key).unwrap(), (300, team.clone()));
        assert!(team.recency_key(255).unwrap() < team.recency_key(256).unwrap());
        let (before, namespace) = (recency_from(&"team".parse().unwrap(), 300), key_namespace(&key).unwrap());
        assert!(key.starts_with(&before) && !other.recency_key(300).unwrap().starts_with(&before));
        assert_eq!(namespace.as_str(), "team");
        assert!(Entry::from_recency_key(b"short").is_err());
        assert!(Entry::from_recency_key(&[9; 60]).is_err());
    }

    #[test]
    fn sibling_keys_stay_in_the_namespace() {
        let namespace: Namespace = "a.b".parse().unwrap();
        let key = row_key(&namespace, &[1; 32]);
        assert_eq!(sibling_key(&key, &[2; 32]), row_key(&namespace, &[2; 32]));
        assert_eq!(key_digest(&key).unwrap(), [1; 32]);
    }
}
