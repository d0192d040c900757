//! The stream that answers `fetch` and `builds`: several blobs in one response.
//!
//! ```text
//! stream  "CCF1" | frame … | end frame
//! frame   kind u8 | digest 32 bytes | length u64 little-endian | body of that length
//! ```
//!
//! | kind | body |
//! |---|---|
//! | 1 blob | its zstd frames, as `GET` would answer |
//! | 2 absent | none |
//! | 3 manifests | a zstd frame of an encoded [`crate::message::LookupResponse`]; the digest is zero. Of `builds` alone |
//! | 255 end | none; the digest is zero. A stream without it was cut off |
//!
//! Only headers are encoded here. Bodies pass through both sides without being held in memory.

use crate::digest::{DIGEST_BYTES, Digest};

/// First bytes of a stream.
pub const MAGIC: [u8; 4] = *b"CCF1";

/// Length of a frame's header in bytes.
pub const HEADER_BYTES: usize = 1 + DIGEST_BYTES + 8;

/// Longest body of one frame in bytes (64 GiB); more means a broken stream.
pub const MAX_BODY_BYTES: u64 = 64 << 30;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// A blob follows.
    Blob {
        /// Its name.
        digest: Digest,
        /// Length of the compressed body that follows, in bytes.
        body_bytes: u64,
    },
    /// The server does not have that blob.
    Absent(Digest),
    /// Manifests follow.
    Manifests {
        /// Length of the compressed body that follows, in bytes.
        body_bytes: u64,
    },
    /// Everything that was asked for has been answered.
    End,
}

/// A header that no frame has. The caller gives the stream up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed frame")]
pub struct MalformedFrame;

impl Frame {
    /// The header's bytes.
    #[must_use]
    pub fn to_header(self) -> [u8; HEADER_BYTES] {
        let (kind, digest, body_bytes) = match self {
            Self::Blob { digest, body_bytes } => (1, *digest.as_bytes(), body_bytes),
            Self::Absent(digest) => (2, *digest.as_bytes(), 0),
            Self::Manifests { body_bytes } => (3, [0; DIGEST_BYTES], body_bytes),
            Self::End => (255, [0; DIGEST_BYTES], 0),
        };
        let mut header = [0; HEADER_BYTES];
        header[0] = kind;
        header[1..=DIGEST_BYTES].copy_from_slice(&digest);
        header[DIGEST_BYTES + 1..].copy_from_slice(&body_bytes.to_le_bytes());
        header
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`MalformedFrame`] for an unknown kind, a body where none belongs, or one over [`MAX_BODY_BYTES`].
    pub fn from_header(header: &[u8; HEADER_BYTES]) -> Result<Self, MalformedFrame> {
        let mut digest = [0; DIGEST_BYTES];
        digest.copy_from_slice(&header[1..=DIGEST_BYTES]);
        let mut length = [0; 8];
        length.copy_from_slice(&header[DIGEST_BYTES + 1..]);
        match (header[0], u64::from_le_bytes(length)) {
            (1, body_bytes) if body_bytes <= MAX_BODY_BYTES => {
                Ok(Self::Blob { digest: Digest::from_bytes(digest), body_bytes })
            }
            (2, 0) => Ok(Self::Absent(Digest::from_bytes(digest))),
            (3, body_bytes) if digest == [0; DIGEST_BYTES] && body_bytes <= MAX_BODY_BYTES => {
                Ok(Self::Manifests { body_bytes })
            }
            (255, 0) if digest == [0; DIGEST_BYTES] => Ok(Self::End),
            _ => Err(MalformedFrame),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn golden_header() {
        let frame = Frame::Blob { digest: Digest::from_bytes([0xcc; 32]), body_bytes: 258 };
        let mut expected = vec![1];
        expected.extend_from_slice(&[0xcc; 32]);
        expected.extend_from_slice(&[2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(frame.to_header().as_slice(), expected);
    }

    proptest! {
        #[test]
        fn headers_round_trip(digest in any::<[u8; 32]>(), length in 0..=MAX_BODY_BYTES) {
            let digest = Digest::from_bytes(digest);
            let manifests = Frame::Manifests { body_bytes: length };
            for frame in [Frame::Blob { digest, body_bytes: length }, Frame::Absent(digest), manifests, Frame::End] {
                prop_assert_eq!(Frame::from_header(&frame.to_header()), Ok(frame));
            }
        }

        #[test]
        fn what_is_accepted_is_what_would_be_written(header in any::<[u8; 32]>(), kind in any::<u8>(), tail in any::<[u8; 8]>()) {
            let mut bytes = [0; HEADER_BYTES];
            bytes[0] = kind;
            bytes[1..=DIGEST_BYTES].copy_from_slice(&header);
            bytes[DIGEST_BYTES + 1..].copy_from_slice(&tail);
            if let Ok(frame) = Frame::from_header(&bytes) {
                prop_assert_eq!(frame.to_header(), bytes);
            }
        }
    }
}
