//! Signatures: writers sign what they publish, and readers may accept nothing else, so that whoever has the server
//! cannot have anybody restore what no such writer has made.
//!
//! A server can still withhold, and answer with what was once signed; both are as with any cache. What this machine's
//! local tier has needs no signature: it was made here, or accepted from the server before. Builds that trust different
//! keys should not share one.
//!
//! ```text
//! cachec_sign_<seed, 64 hexadecimal digits>       a signing key, in a file of its own
//! cachec_trust_<public key, 64 hexadecimal digits>
//! ```

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::str::FromStr;

use cachec_protocol::result::Signature;
use cachec_protocol::{Digest, StoredResult};
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

const SIGN_PREFIX: &str = "cachec_sign_";
const TRUST_PREFIX: &str = "cachec_trust_";

/// A text that is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is not a key: it begins with {0}, and 64 hexadecimal digits follow")]
pub(crate) struct InvalidKey(&'static str);

/// The public key of a writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct TrustedKey([u8; 32]);

impl TrustedKey {
    fn has_signed(&self, result: &StoredResult) -> bool {
        let Some(signature) = result.signature.filter(|signature| signature.key == self.0) else {
            return false;
        };
        UnparsedPublicKey::new(&ED25519, self.0).verify(&result.signed_bytes(), &signature.bytes).is_ok()
    }
}

impl FromStr for TrustedKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        digits(text, TRUST_PREFIX).map(Self)
    }
}

impl TryFrom<String> for TrustedKey {
    type Error = InvalidKey;

    fn try_from(text: String) -> Result<Self, InvalidKey> {
        text.parse()
    }
}

impl From<TrustedKey> for String {
    fn from(key: TrustedKey) -> Self {
        key.to_string()
    }
}

impl fmt::Display for TrustedKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{TRUST_PREFIX}{}", Digest::from_bytes(self.0))
    }
}

/// Whether a result may be restored: where no keys are trusted, any; else what one of them has signed.
pub(crate) fn is_accepted(result: &StoredResult, trusted: &[TrustedKey]) -> bool {
    trusted.is_empty() || trusted.iter().any(|key| key.has_signed(result))
}

/// What signs results. Its key is never printed.
pub(crate) struct Signer(Ed25519KeyPair);

impl Signer {
    /// Reads a key's file.
    ///
    /// # Errors
    /// Those of reading; `InvalidData` for what is no key.
    pub(crate) fn read(file: &Path) -> io::Result<Self> {
        let text = std::fs::read_to_string(file)?;
        let seed = digits(text.trim(), SIGN_PREFIX).map_err(invalid)?;
        Ed25519KeyPair::from_seed_unchecked(&seed).map(Self).map_err(|_| invalid(InvalidKey(SIGN_PREFIX)))
    }

    /// Makes a new key, and writes it to a file that must not exist.
    ///
    /// # Errors
    /// Those of writing, and of the system's randomness.
    pub(crate) fn create(file: &Path) -> io::Result<Self> {
        let random = || io::Error::other("the system has no randomness");
        let seed: [u8; 32] = ring::rand::generate(&SystemRandom::new()).map_err(|_| random())?.expose();
        let mut created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
        writeln!(created, "{SIGN_PREFIX}{}", Digest::from_bytes(seed))?;
        created.sync_all()?;
        Self::read(file)
    }

    /// The key for those who trust this one.
    pub(crate) fn public(&self) -> TrustedKey {
        let mut key = [0; 32];
        key.copy_from_slice(self.0.public_key().as_ref());
        TrustedKey(key)
    }

    pub(crate) fn sign(&self, result: &mut StoredResult) {
        let mut bytes = [0; 64];
        bytes.copy_from_slice(self.0.sign(&result.signed_bytes()).as_ref());
        result.signature = Some(Signature { key: self.public().0, bytes });
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Signer({})", self.public())
    }
}

fn digits(text: &str, prefix: &'static str) -> Result<[u8; 32], InvalidKey> {
    let digest: Option<Digest> = text.strip_prefix(prefix).and_then(|digits| digits.parse().ok());
    digest.map(|digest| *digest.as_bytes()).ok_or(InvalidKey(prefix))
}

fn invalid(error: InvalidKey) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use cachec_protocol::{ActionKey, BuildRecord, decode, encode};

    use super::*;

    fn signer(directory: &Path, name: &str) -> Signer {
        Signer::create(&directory.join(name)).unwrap()
    }

    fn result() -> StoredResult {
        StoredResult { compile_ms: 7, ..BuildRecord::default().into_result(ActionKey::from_bytes([1; 32])) }
    }

    #[test]
    fn only_what_a_trusted_writer_has_signed_is_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let (own, other) = (signer(directory.path(), "own"), signer(directory.path(), "other"));
        let mut signed = result();
        own.sign(&mut signed);
        let received: StoredResult = decode(&encode(&signed)).unwrap();
        assert_eq!(received, signed);
        assert!(
            is_accepted(&received, &[own.public()])
                && is_accepted(&received, &[other.public(), own.public()])
        );
        assert!(is_accepted(&result(), &[]));
        assert!(!is_accepted(&result(), &[own.public()]) && !is_accepted(&received, &[other.public()]));
        // Everything in it counts.
        let mut forged = vec![
            StoredResult { compile_ms: 8, ..received.clone() },
            StoredResult { stderr: b"x".to_vec(), ..received.clone() },
            StoredResult { action_key: ActionKey::from_bytes([2; 32]), ..received.clone() },
        ];
        let mut changed = received.clone();
        changed.signature.as_mut().unwrap().bytes[5] ^= 1;
        forged.push(changed);
        let mut renamed = received;
        renamed.signature.as_mut().unwrap().key = other.public().0;
        forged.push(renamed);
        for result in forged {
            assert!(!is_accepted(&result, &[own.public(), other.public()]), "{result:?}");
        }
    }

    #[test]
    fn keys_are_read_as_they_are_written_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let created = signer(directory.path(), "key");
        let file = directory.path().join("key");
        assert_eq!(Signer::read(&file).unwrap().public(), created.public());
        assert_eq!(created.public().to_string().parse::<TrustedKey>(), Ok(created.public()));
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Signer::create(&file).is_err());
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(!format!("{created:?}").contains(text.trim().trim_start_matches(SIGN_PREFIX)));
        assert!(text.trim().parse::<TrustedKey>().is_err());
        for wrong in ["", "cachec_sign_", "cachec_sign_00", &text[1..]] {
            std::fs::write(&file, wrong).unwrap();
            assert_eq!(Signer::read(&file).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }
}
