//! Why a store refuses or fails.

use std::io;

/// A failure of a store. Its text is for the log; clients get the code of [`crate::error::ApiError`].
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The entry does not fit, even with everything evicted that may be.
    #[error("no room for {needed_bytes} bytes")]
    Full {
        /// What was to be reserved.
        needed_bytes: u64,
    },
    /// A blob, or the content it decompresses to, is over its limit.
    #[error("the blob is longer than {limit_bytes} bytes")]
    TooLarge {
        /// Most content bytes of one blob.
        limit_bytes: u64,
    },
    /// The body is not made of zstd frames, or its window is over the limit.
    #[error("the body is not a sequence of zstd frames")]
    MalformedBlob,
    /// The content has another digest.
    #[error("the content has another digest")]
    DigestMismatch,
    /// The body has another length than was announced.
    #[error("the body has another length than announced")]
    LengthMismatch,
    /// The sender broke off.
    #[error("the sender broke off")]
    Aborted,
    /// A result's pack is not there.
    #[error("the result's pack is not there")]
    PackMissing,
    /// Writing failed; nothing was kept.
    #[error("writing failed: {0}")]
    Write(#[source] io::Error),
    /// Reading failed.
    #[error("reading failed: {0}")]
    Read(#[source] io::Error),
    /// A stored row is not what this version writes.
    #[error("a row of the database is damaged: {0}")]
    DamagedRow(&'static str),
}

impl StoreError {
    /// A failed write to the database.
    #[must_use]
    pub fn database_write(error: rocksdb::Error) -> Self {
        Self::Write(io::Error::other(error))
    }

    /// A failed read from the database.
    #[must_use]
    pub fn database_read(error: rocksdb::Error) -> Self {
        Self::Read(io::Error::other(error))
    }
}
