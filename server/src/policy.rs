//! What the configuration says of each namespace: from which other one it reads, how much it keeps, for how long, and
//! whether everybody may read it.
//!
//! A namespace is ruled by the pattern that fits it best: its own name, else the longest beginning. A layer is a
//! namespace that another one reads from. Reads fall through from layer to layer, writes never do; so what a pull
//! request writes is seen by nobody who reads the layer below.

use std::collections::BTreeMap;
use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;

use crate::age::Age;
use crate::namespace::{Namespace, Pattern};

/// Most namespaces that one read passes through.
const MAX_LAYERS: usize = 4;

/// What holds for the namespaces of one pattern.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rules {
    /// The namespace that is read where this one has nothing.
    pub parent: Option<Namespace>,
    /// Most bytes that each of these namespaces takes.
    pub quota: Option<ByteSize>,
    /// Most bytes that all of these namespaces take together: a quota for each leaves their number open.
    pub total_quota: Option<ByteSize>,
    /// How long entries stay that nobody uses, in time that the server runs.
    pub max_age: Option<Age>,
    /// Whether reading needs no token.
    pub anonymous_read: bool,
}

/// The rules of all namespaces.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// The best fitting pattern first.
    rules: Vec<(Pattern, Rules)>,
    default: Rules,
}

/// Rules that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A parent without a section of its own: most likely a mistyped name.
    #[error("the parent {parent} of {pattern} is not configured; add a section [namespaces.{parent}]")]
    UnknownParent {
        /// Whose parent.
        pattern: Pattern,
        /// Its name.
        parent: Namespace,
    },
    /// Everybody would read the parent through it.
    #[error(
        "everybody may read {pattern}, and through it its parent {parent}, which needs a token; give both the same"
    )]
    PublicChild {
        /// Whose parent.
        pattern: Pattern,
        /// Its name.
        parent: Namespace,
    },
    /// A namespace that reads from itself, or through too many layers.
    #[error("{0} reads from itself, or through more than {MAX_LAYERS} layers")]
    TooDeep(Pattern),
}

impl std::fmt::Display for Rules {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.quota {
            Some(quota) => write!(formatter, "at most {quota}")?,
            None => write!(formatter, "no quota")?,
        }
        if let Some(total) = self.total_quota {
            write!(formatter, ", {total} together")?;
        }
        if let Some(max_age) = self.max_age {
            write!(formatter, ", {max_age} unused")?;
        }
        if let Some(parent) = &self.parent {
            write!(formatter, ", reads {parent}")?;
        }
        formatter.write_str(if self.anonymous_read { ", everybody may read" } else { "" })
    }
}

impl Policy {
    /// Checks rules. `max_age` is for namespaces that have none of their own.
    ///
    /// # Errors
    /// Parents that cannot be.
    pub fn new(rules: BTreeMap<Pattern, Rules>, max_age: Option<Age>) -> Result<Self, PolicyError> {
        let default = Rules { max_age, ..Rules::default() };
        let mut rules: Vec<_> = rules.into_iter().collect();
        rules.sort_by_key(|(pattern, _)| std::cmp::Reverse(pattern.precision()));
        for (_, rule) in &mut rules {
            rule.max_age = rule.max_age.or(max_age);
        }
        let policy = Self { rules, default };
        for (pattern, rule) in &policy.rules {
            let Some(parent) = &rule.parent else { continue };
            if policy.section(parent).is_none() {
                return Err(PolicyError::UnknownParent { pattern: pattern.clone(), parent: parent.clone() });
            }
            if rule.anonymous_read && !policy.rules(parent).anonymous_read {
                return Err(PolicyError::PublicChild { pattern: pattern.clone(), parent: parent.clone() });
            }
            let layers = policy.layers(parent);
            let is_own = |below| policy.section(below).is_some_and(|(of, _)| of == pattern);
            if 1 + layers.len() > MAX_LAYERS || layers.iter().any(is_own) {
                return Err(PolicyError::TooDeep(pattern.clone()));
            }
        }
        Ok(policy)
    }

    /// All rules, the best fitting pattern first.
    pub fn iter(&self) -> impl Iterator<Item = (&Pattern, &Rules)> {
        self.rules.iter().map(|(pattern, rules)| (pattern, rules))
    }

    fn section(&self, namespace: &Namespace) -> Option<&(Pattern, Rules)> {
        self.rules.iter().find(|(pattern, _)| pattern.matches(namespace))
    }

    /// What holds for a namespace.
    #[must_use]
    pub fn rules(&self, namespace: &Namespace) -> &Rules {
        self.section(namespace).map_or(&self.default, |(_, rules)| rules)
    }

    /// The namespace itself and those that it reads from, nearest first. Not more than one over the limit.
    #[must_use]
    pub fn layers(&self, namespace: &Namespace) -> Vec<Namespace> {
        let mut layers = vec![namespace.clone()];
        while let Some(parent) = layers.last().and_then(|last| self.rules(last).parent.clone())
            && layers.len() <= MAX_LAYERS
        {
            layers.push(parent);
        }
        layers
    }

    /// Most bytes that a namespace takes.
    #[must_use]
    pub fn quota_bytes(&self, namespace: &Namespace) -> Option<u64> {
        self.rules(namespace).quota.map(|quota| quota.as_u64())
    }

    /// How long a namespace's entries stay that nobody uses.
    #[must_use]
    pub fn max_age(&self, namespace: &Namespace) -> Option<Duration> {
        self.rules(namespace).max_age.map(Age::duration)
    }

    /// Most bytes of all namespaces together that have this one's rules.
    #[must_use]
    pub fn total_quota_bytes(&self, namespace: &Namespace) -> Option<u64> {
        self.rules(namespace).total_quota.map(|quota| quota.as_u64())
    }

    /// Whether the same section is for both.
    #[must_use]
    pub fn are_alike(&self, one: &Namespace, other: &Namespace) -> bool {
        let pattern = |namespace| self.section(namespace).map(|(pattern, _)| pattern);
        pattern(one) == pattern(other)
    }

    /// What a namespace is counted under in metrics: its pattern, so that there are few.
    #[must_use]
    pub fn label(&self, namespace: &Namespace) -> String {
        self.section(namespace).map_or_else(|| "other".to_owned(), |(pattern, _)| pattern.to_string())
    }

    /// Whether some namespace can be read by everybody.
    #[must_use]
    pub fn has_anonymous_read(&self) -> bool {
        self.rules.iter().any(|(_, rules)| rules.anonymous_read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Result<Policy, PolicyError> {
        Policy::new(toml::from_str(text).unwrap(), Some("90d".parse().unwrap()))
    }

    fn namespace(name: &str) -> Namespace {
        name.parse().unwrap()
    }

    #[test]
    fn the_pattern_that_fits_best_rules() {
        let policy = policy(
            "[main]\nquota = '2GiB'\n['pr-*']\nparent = 'main'\nmax_age = '7d'\n['pr-9*']\nanonymous_read = true",
        )
        .unwrap();
        assert_eq!(policy.layers(&namespace("pr-12")), [namespace("pr-12"), namespace("main")]);
        assert_eq!(policy.layers(&namespace("pr-9")), [namespace("pr-9")]);
        assert_eq!(policy.layers(&namespace("main")), [namespace("main")]);
        assert_eq!(policy.quota_bytes(&namespace("main")), Some(2 << 30));
        assert_eq!(policy.quota_bytes(&namespace("mainz")), None);
        let days = |name| policy.max_age(&namespace(name)).unwrap().as_secs() / 86_400;
        assert_eq!((days("pr-12"), days("main"), days("other")), (7, 90, 90));
        assert!(policy.rules(&namespace("pr-99")).anonymous_read && policy.has_anonymous_read());
        assert_eq!(policy.label(&namespace("pr-12")), "pr-*");
        assert_eq!(policy.label(&namespace("x")), "other");
    }

    #[test]
    fn parents_that_cannot_be_are_refused() {
        let unknown = policy("[pr]\nparent = 'mian'\n[main]").unwrap_err().to_string();
        assert!(unknown.contains("mian") && unknown.contains("[namespaces.mian]"), "{unknown}");
        let public = "[a]\nparent = 'b'\nanonymous_read = true\n[b]";
        assert!(matches!(policy(public), Err(PolicyError::PublicChild { .. })));
        for circle in ["[a]\nparent = 'a'", "[a]\nparent = 'b'\n[b]\nparent = 'a'", "['a*']\nparent = 'ab'"] {
            assert!(matches!(policy(circle), Err(PolicyError::TooDeep(_))), "{circle}");
        }
        let deep = "[a]\nparent = 'b'\n[b]\nparent = 'c'\n[c]\nparent = 'd'\n[d]\nparent = 'e'\n[e]";
        assert!(matches!(policy(deep), Err(PolicyError::TooDeep(_))));
        // A parent of the same beginning that has a section of its own is no circle.
        assert!(policy("['pr-*']\nparent = 'pr-main'\n[pr-main]").is_ok());
        let unknown_key = toml::from_str::<BTreeMap<Pattern, Rules>>("[a]\nquotta = '1GiB'").unwrap_err();
        assert!(unknown_key.to_string().contains("expected one of"), "{unknown_key}");
    }
}
