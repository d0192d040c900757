//! BLAKE3 digests and the key types made of them.
//!
//! Invariant: one newtype per meaning, so that a blob's digest never stands where a key is expected.

use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Encode};

/// Length of every digest and key in bytes.
pub const DIGEST_BYTES: usize = 32;

/// A text that is not 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a digest is 64 lower-case hexadecimal digits")]
pub struct InvalidDigest;

macro_rules! digest_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        #[cbor(transparent)]
        pub struct $name(#[n(0)] #[cbor(with = "minicbor::bytes")] [u8; DIGEST_BYTES]);

        impl $name {
            /// Takes 32 bytes as they are.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; DIGEST_BYTES]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; DIGEST_BYTES] {
                &self.0
            }
        }

        impl From<blake3::Hash> for $name {
            fn from(hash: blake3::Hash) -> Self {
                Self(*hash.as_bytes())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = InvalidDigest;

            fn from_str(text: &str) -> Result<Self, InvalidDigest> {
                if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
                    return Err(InvalidDigest);
                }
                let hash = blake3::Hash::from_hex(text).map_err(|_| InvalidDigest)?;
                Ok(Self(*hash.as_bytes()))
            }
        }
    };
}

digest_type! {
    /// BLAKE3 of a blob's uncompressed bytes; also the name of the blob.
    Digest
}
digest_type! {
    /// What is known about a unit before any file is read (see [`crate::action`]).
    ActionKey
}
digest_type! {
    /// Action key and input set together (see [`crate::input`]).
    ResultKey
}

impl Digest {
    /// Hashes bytes that are at hand.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        blake3::hash(bytes).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips_and_refuses_everything_else() {
        let digest = Digest::of(b"cachec");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!(digest.to_string().to_uppercase().parse::<Digest>(), Err(InvalidDigest));
        assert_eq!("ab".parse::<Digest>(), Err(InvalidDigest));
        assert_eq!("../".repeat(22)[..64].parse::<Digest>(), Err(InvalidDigest));
    }

    #[test]
    fn golden_digest_of_nothing() {
        let expected = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(Digest::of(b"").to_string(), expected);
    }
}
