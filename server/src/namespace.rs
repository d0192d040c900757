//! Namespace names, and patterns of them.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::Deserialize;

/// Longest name in bytes.
const MAX_BYTES: usize = 64;

/// The name of a set of entries: `[a-z0-9][a-z0-9._-]{0,63}`.
///
/// Such a name is one plain component of a path or URL, and contains no NUL (database keys end it with one).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
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

impl TryFrom<String> for Namespace {
    type Error = InvalidNamespace;

    fn try_from(text: String) -> Result<Self, InvalidNamespace> {
        text.parse()
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

/// A namespace, or with a `*` at the end all whose names begin so, as `pr-*`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern {
    /// The name, or what names begin with.
    name: Namespace,
    is_prefix: bool,
}

/// A text that is not a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{InvalidNamespace}; with a '*' at the end, all whose names begin so")]
pub struct InvalidPattern;

impl Pattern {
    /// Whether it is a single namespace, and which.
    #[must_use]
    pub fn exact(&self) -> Option<&Namespace> {
        (!self.is_prefix).then_some(&self.name)
    }

    /// Whether the namespace is one of it.
    #[must_use]
    pub fn matches(&self, namespace: &Namespace) -> bool {
        if self.is_prefix {
            namespace.as_str().starts_with(self.name.as_str())
        } else {
            self.name == *namespace
        }
    }

    /// The namespace that has `text` in place of the `*`, if there is one.
    #[must_use]
    pub fn fill(&self, text: &str) -> Option<Namespace> {
        if self.is_prefix { format!("{}{text}", self.name).parse().ok() } else { Some(self.name.clone()) }
    }

    /// Orders patterns that match the same namespace: the one that says more has more.
    pub(crate) fn precision(&self) -> (bool, usize) {
        (!self.is_prefix, self.name.as_str().len())
    }
}

impl FromStr for Pattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        let (name, is_prefix) = text.strip_suffix('*').map_or((text, false), |prefix| (prefix, true));
        Ok(Self { name: name.parse().map_err(|InvalidNamespace| InvalidPattern)?, is_prefix })
    }
}

impl TryFrom<String> for Pattern {
    type Error = InvalidPattern;

    fn try_from(text: String) -> Result<Self, InvalidPattern> {
        text.parse()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}{}", self.name, if self.is_prefix { "*" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_a_name_or_the_beginning_of_names() {
        let matches = |pattern: &str, name: &str| {
            pattern.parse::<Pattern>().unwrap().matches(&name.parse::<Namespace>().unwrap())
        };
        assert!(matches("pr-*", "pr-1") && matches("pr-*", "pr-") && matches("main", "main"));
        assert!(!matches("pr-*", "pr") && !matches("main", "main2") && !matches("main2", "main"));
        for wrong in ["*", "", "a*b", "**", "A*", "../*"] {
            assert_eq!(wrong.parse::<Pattern>(), Err(InvalidPattern), "{wrong}");
        }
        let pattern: Pattern = "pr-*".parse().unwrap();
        assert_eq!(pattern.fill("12").unwrap().as_str(), "pr-12");
        assert_eq!(pattern.fill("../main"), None);
        assert_eq!(pattern.to_string(), "pr-*");
    }

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
