//! Namespace names.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Longest name in bytes.
const MAX_BYTES: usize = 64;

/// The name of a set of entries: `[a-z0-9][a-z0-9._-]{0,63}`.
///
/// Such a name is one plain component of a path or URL, and contains no NUL (database keys end it with one).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Namespace(Arc<str>);

/// A text that is not a namespace's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a namespace is 1 to 64 of a-z, 0-9, '.', '_' and '-', and starts with a letter or digit")]
pub struct InvalidNamespace;

impl Namespace {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Namespace {
    type Err = InvalidNamespace;

    fn from_str(text: &str) -> Result<Self, InvalidNamespace> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let starts_well = text.bytes().next().is_some_and(plain);
        let goes_on_well = text.bytes().all(|byte| plain(byte) || matches!(byte, b'.' | b'_' | b'-'));
        if starts_well && goes_on_well && text.len() <= MAX_BYTES {
            Ok(Self(text.into()))
        } else {
            Err(InvalidNamespace)
        }
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Namespace({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_components_are_names() {
        for name in ["default", "a", "0", "team-1.x_y", &"a".repeat(64)] {
            assert_eq!(name.parse::<Namespace>().unwrap().as_str(), name);
        }
        for name in ["", ".", "..", "../x", "a/b", "A", "-a", ".a", "a b", "a\0b", "ä", &"a".repeat(65)] {
            assert_eq!(name.parse::<Namespace>(), Err(InvalidNamespace), "{name:?}");
        }
    }
}
