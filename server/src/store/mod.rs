//! Where blobs and results are kept: the [`Store`] trait and what its callers need to know.
//!
//! Invariants that every implementation keeps:
//! - A blob is visible only after its whole body arrived and its content had the digest it is named by.
//! - A result is visible only while its pack is there; the first result of a key stays.
//! - Bytes are reserved before they are accepted: the store never holds more than its limit.
//! - Nothing that is being read is cut off by an eviction.
//!
//! Deliberately not here: HTTP, tokens. Decorators add layers of namespaces ([`layered`]) and metrics ([`metered`]).

pub mod embedded;
mod error;
pub mod layered;
pub mod metered;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};

use bytes::{Bytes, BytesMut};
use cachec_protocol::message::Manifest;
use cachec_protocol::{ActionKey, Digest, ResultKey};
use futures_util::future::BoxFuture;
use tokio::io::AsyncReadExt;

pub use error::StoreError;

use crate::namespace::Namespace;

/// Bytes that one step of a download reads and holds.
const CHUNK_BYTES: usize = 256 << 10;

/// What a store's calls return. Dropping it does not leave anything half done.
pub type StoreFuture<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

/// Keeps blobs and results, by namespace.
pub trait Store: Send + Sync + 'static {
    /// The manifests of these action keys that are known, in the order asked for.
    ///
    /// Of results that would make the answer longer than `limit_bytes`, the oldest are left out.
    fn lookup(
        &self,
        namespace: Namespace,
        keys: Vec<ActionKey>,
        limit_bytes: usize,
    ) -> StoreFuture<'_, Vec<Manifest>>;

    /// A blob's lengths, or `None` where there is no such blob.
    fn blob_lengths(&self, namespace: Namespace, digest: Digest) -> StoreFuture<'_, Option<BlobLengths>>;

    /// Opens a blob for reading, or `None` where there is no such blob.
    fn open_blob(&self, namespace: Namespace, digest: Digest) -> StoreFuture<'_, Option<OpenBlob>>;

    /// Those of the digests that have no blob, in the order asked for. The others count as used now.
    fn missing_blobs(&self, namespace: Namespace, digests: Vec<Digest>) -> StoreFuture<'_, Vec<Digest>>;

    /// Reads, verifies and keeps a blob.
    fn put_blob(&self, upload: BlobUpload) -> StoreFuture<'_, PutOutcome>;

    /// Keeps a result, unless there is one of that key already.
    fn publish(&self, publication: Publication) -> StoreFuture<'_, PutOutcome>;

    /// Figures about the store; cheap enough for every scrape.
    fn stats(&self) -> StoreFuture<'_, StoreStats>;
}

/// A blob's two lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobLengths {
    /// Length of the zstd frames.
    pub stored_bytes: u64,
    /// Length of what they decompress to.
    pub content_bytes: u64,
}

/// A blob that can be read to its end, whatever happens to its entry meanwhile.
#[derive(Debug)]
pub struct OpenBlob {
    /// Length of the zstd frames.
    pub stored_bytes: u64,
    /// Where they are.
    pub source: BlobSource,
}

/// Where an open blob's bytes come from.
#[derive(Debug)]
pub enum BlobSource {
    /// They are here.
    Memory(Bytes),
    /// An open file, at its start.
    File(File),
}

impl OpenBlob {
    /// A reader of the blob in steps.
    #[must_use]
    pub fn into_reader(self) -> BlobReader {
        match self.source {
            BlobSource::Memory(bytes) => BlobReader::Memory(bytes),
            BlobSource::File(file) => {
                BlobReader::File { file: tokio::fs::File::from_std(file), left_bytes: self.stored_bytes }
            }
        }
    }
}

/// Reads a blob in steps of bounded size.
#[derive(Debug)]
pub enum BlobReader {
    /// What is left, in one step.
    Memory(Bytes),
    /// A file of which this much is left.
    File {
        /// The open file.
        file: tokio::fs::File,
        /// Bytes still to come.
        left_bytes: u64,
    },
}

impl BlobReader {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// Those of the file; `UnexpectedEof` where it is shorter than its entry says, so that the caller breaks
    /// the response off instead of ending it early.
    pub async fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Memory(bytes) if bytes.is_empty() => Ok(None),
            Self::Memory(bytes) => Ok(Some(std::mem::take(bytes))),
            Self::File { left_bytes: 0, .. } => Ok(None),
            Self::File { file, left_bytes } => {
                let capacity = usize::try_from(*left_bytes).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
                let mut chunk = BytesMut::with_capacity(capacity);
                let count = (&mut *file).take(*left_bytes).read_buf(&mut chunk).await?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                *left_bytes -= count as u64;
                Ok(Some(chunk.freeze()))
            }
        }
    }
}

/// A blob on its way in.
pub struct BlobUpload {
    /// Where it goes.
    pub namespace: Namespace,
    /// What its content must hash to.
    pub digest: Digest,
    /// Length of the body where the sender announced it.
    pub stored_bytes: Option<u64>,
    /// The body: zstd frames. It fails, rather than ends, where the sender broke off.
    pub body: Box<dyn Read + Send>,
}

/// A result to keep.
pub struct Publication {
    /// Where it goes.
    pub namespace: Namespace,
    /// The key that the server computed from the result.
    pub result_key: ResultKey,
    /// Key of the action it belongs to.
    pub action_key: ActionKey,
    /// The blob it needs.
    pub pack: Option<Digest>,
    /// The result as its publisher encoded it, fields of later versions included.
    pub encoded: Bytes,
    /// For `explain`; kept where lookups do not read it.
    pub action_fields: Vec<u8>,
}

/// What putting something did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// It is new.
    Created,
    /// It was there; nothing was changed.
    Existed,
}

/// Figures about a store. Evictions count from the start of the process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes that entries take.
    pub stored_bytes: u64,
    /// Bytes that uploads have reserved.
    pub reserved_bytes: u64,
    /// Most bytes that both together may be.
    pub limit_bytes: u64,
    /// Bytes that the file system has left.
    pub disk_free_bytes: u64,
    /// Number of blobs.
    pub blobs: u64,
    /// Number of results.
    pub results: u64,
    /// Entries evicted.
    pub evicted_entries: u64,
    /// Bytes evicted.
    pub evicted_bytes: u64,
    /// Blobs that wait for being compressed again.
    pub waiting_blobs: u64,
    /// Blobs whose bytes have become fewer.
    pub recompressed_blobs: u64,
    /// How many fewer.
    pub saved_bytes: u64,
    /// Blobs that were read and checked.
    pub scrubbed_blobs: u64,
    /// Blobs that were found to be damaged.
    pub damaged_blobs: u64,
    /// What is stored, by the patterns of namespaces that the configuration has.
    pub namespace_bytes: BTreeMap<String, u64>,
    /// RocksDB's figures: name of the metric without prefix, and value.
    pub database: Vec<(&'static str, u64)>,
}
