//! Path roots: directories that differ between machines, written as variables in everything stored.
//!
//! A root's path is replaced by a marker, `NUL name NUL`, wherever it stands as a whole path prefix:
//! `/home/ann/shop/src/lib.rs` becomes `␀workspace␀/src/lib.rs`. NUL occurs in no path, argument or
//! environment variable, and a text that contains one is not normalised at all, so markers are unambiguous.
//!
//! Invariants:
//! - `expand(normalise(text)) == text` under the same roots.
//! - Only paths that look the same in every quoting (JSON, Makefile, shell) are roots; any other path stays
//!   literal, which costs portability and never correctness.
//! - In binary content nothing is replaced. [`Roots::found_in`] reports which roots' literal paths occur
//!   there, at any position; the caller binds the result to those roots' present paths.

use memchr::memmem;

/// A directory that differs between machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Root {
    /// The directory cargo runs the compiler in, when that is not inside `CARGO_HOME`: a workspace's root.
    Workspace,
    /// Cargo's target (or build) directory.
    Target,
    /// `CARGO_HOME`: registry sources and git checkouts.
    CargoHome,
    /// The toolchain.
    Sysroot,
    /// The user's home directory.
    Home,
}

impl Root {
    /// Every root, in the order of precedence for equal paths.
    pub const ALL: [Self; 5] = [Self::Workspace, Self::Target, Self::CargoHome, Self::Sysroot, Self::Home];

    /// The name in markers, in remapped paths and in `Root` inputs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Workspace => "workspace",
            Self::Target => "target",
            Self::CargoHome => "cargo",
            Self::Sysroot => "sysroot",
            Self::Home => "home",
        }
    }

    /// The root of that name.
    #[must_use]
    pub fn from_name(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|root| root.name().as_bytes() == name)
    }
}

/// A text that cannot be normalised, or a stored one that cannot be expanded here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// The text contains a NUL byte, which markers are made of.
    #[error("the text contains a NUL byte")]
    ContainsNul,
    /// A marker names a root that this invocation does not have.
    #[error("the text names a root that this build does not have")]
    UnknownRoot,
}

/// The roots of one invocation, as absolute paths without a trailing slash.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roots {
    /// Longest path first, so that a nested root wins over the one around it.
    entries: Vec<(Root, Vec<u8>)>,
}

impl Roots {
    /// Keeps the usable ones of `paths`: absolute, not `/`, without `.` and `..` components, and of
    /// characters that no quoting changes. Of equal paths the root that comes first in [`Root::ALL`] stays.
    #[must_use]
    pub fn new(paths: impl IntoIterator<Item = (Root, Vec<u8>)>) -> Self {
        let mut entries: Vec<(Root, Vec<u8>)> = paths
            .into_iter()
            .map(|(root, path)| (root, trim_slashes(path)))
            .filter(|(_, path)| is_usable(path))
            .collect();
        entries.sort_by(|a, b| b.1.len().cmp(&a.1.len()).then_with(|| a.cmp(b)));
        entries.dedup_by(|later, earlier| later.1 == earlier.1);
        Self { entries }
    }

    /// The roots and their paths, longest path first.
    pub fn iter(&self) -> impl Iterator<Item = (Root, &[u8])> {
        self.entries.iter().map(|(root, path)| (*root, path.as_slice()))
    }

    /// A root's path here.
    #[must_use]
    pub fn path(&self, root: Root) -> Option<&[u8]> {
        self.iter().find(|(known, _)| *known == root).map(|(_, path)| path)
    }

    /// Replaces every root's path that stands as a whole path prefix by its marker.
    ///
    /// # Errors
    /// [`RootError::ContainsNul`]: the caller does not cache the unit.
    pub fn normalise(&self, text: &[u8]) -> Result<Vec<u8>, RootError> {
        if memchr::memchr(0, text).is_some() {
            return Err(RootError::ContainsNul);
        }
        let mut normalised = Vec::with_capacity(text.len());
        let mut position = 0;
        while let Some(offset) = memchr::memchr(b'/', &text[position..]) {
            let slash = position + offset;
            normalised.extend_from_slice(&text[position..slash]);
            let starts_path = slash == 0 || !is_name_byte(text[slash - 1]);
            match self.iter().find(|(_, path)| starts_path && is_prefix_of(path, &text[slash..])) {
                Some((root, path)) => {
                    push_marker(&mut normalised, root);
                    position = slash + path.len();
                }
                None => {
                    normalised.push(b'/');
                    position = slash + 1;
                }
            }
        }
        normalised.extend_from_slice(&text[position..]);
        Ok(normalised)
    }

    /// Writes the roots' paths here in place of the markers.
    ///
    /// # Errors
    /// [`RootError::UnknownRoot`]: the stored text does not fit this invocation; the caller has a miss.
    pub fn expand(&self, text: &[u8]) -> Result<Vec<u8>, RootError> {
        let mut expanded = Vec::with_capacity(text.len());
        let mut parts = text.split(|byte| *byte == 0);
        expanded.extend_from_slice(parts.next().unwrap_or_default());
        while let Some(name) = parts.next() {
            let root = Root::from_name(name).ok_or(RootError::UnknownRoot)?;
            expanded.extend_from_slice(self.path(root).ok_or(RootError::UnknownRoot)?);
            expanded.extend_from_slice(parts.next().ok_or(RootError::UnknownRoot)?);
        }
        Ok(expanded)
    }

    /// The roots whose literal path occurs anywhere in `content`.
    ///
    /// Neighbouring bytes are not looked at: string constants lie side by side in a compiled file. `Home`
    /// counts only with a slash behind it, since a home such as `/root` is a frequent word.
    #[must_use]
    pub fn found_in(&self, content: &[u8]) -> Vec<Root> {
        self.iter()
            .filter(|(root, path)| match root {
                Root::Home => memmem::find(content, &[path, b"/".as_slice()].concat()).is_some(),
                _ => memmem::find(content, path).is_some(),
            })
            .map(|(root, _)| root)
            .collect()
    }
}

impl Roots {
    /// The roots of workspace and target whose parent's path stands in a text, and does not go on into a root's: who
    /// goes up from a root, and leaves where that led, means the place.
    #[must_use]
    pub fn parents_found_in(&self, text: &[u8]) -> Vec<Root> {
        let stands_alone = |parent: &[u8]| {
            memmem::find_iter(text, parent).any(|at| {
                let rest = &text[at..];
                let ends = rest.get(parent.len()).is_none_or(|byte| *byte == b'/' || !is_name_byte(*byte));
                ends && !self.iter().any(|(_, path)| path.len() > parent.len() && is_prefix_of(path, rest))
            })
        };
        self.iter()
            .filter(|(root, path)| {
                let parent =
                    path.iter().rposition(|byte| *byte == b'/').map_or(&[] as &[u8], |at| &path[..at]);
                // A directory at the top, such as `/home`, is named for other reasons.
                let is_deep = parent.iter().filter(|byte| **byte == b'/').count() > 1;
                let is_in_a_root = self.iter().any(|(_, path)| is_prefix_of(path, parent));
                matches!(root, Root::Workspace | Root::Target)
                    && is_deep
                    && !is_in_a_root
                    && stands_alone(parent)
            })
            .map(|(root, _)| root)
            .collect()
    }
}

fn push_marker(text: &mut Vec<u8>, root: Root) {
    text.push(0);
    text.extend_from_slice(root.name().as_bytes());
    text.push(0);
}

fn trim_slashes(mut path: Vec<u8>) -> Vec<u8> {
    while path.len() > 1 && path.ends_with(b"/") {
        path.pop();
    }
    path
}

fn is_usable(path: &[u8]) -> bool {
    path.len() > 1
        && path.starts_with(b"/")
        && path.iter().all(|byte| is_name_byte(*byte) || matches!(byte, b'@' | b','))
        && !path[1..].split(|byte| *byte == b'/').any(|component| matches!(component, b"" | b"." | b".."))
}

fn is_prefix_of(path: &[u8], text: &[u8]) -> bool {
    text.starts_with(path) && text.get(path.len()).is_none_or(|byte| *byte == b'/' || !is_name_byte(*byte))
}

/// Whether a byte is part of a path as it stands in running text.
fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'_' | b'-' | b'.' | b'+' | b'~') || byte >= 0x80
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn roots(workspace: &str, target: &str, home: &str) -> Roots {
        Roots::new([
            (Root::Workspace, workspace.into()),
            (Root::Target, target.into()),
            (Root::Home, home.into()),
        ])
    }

    #[test]
    fn a_moved_build_normalises_to_the_same_text() {
        let here = roots("/home/ann/shop", "/home/ann/shop/target", "/home/ann");
        let there = roots("/src", "/build/out", "/root");
        let text = |workspace: &str, target: &str| format!("{target}/debug/a.d: {workspace}/src/a.rs");
        let normalised = here.normalise(text("/home/ann/shop", "/home/ann/shop/target").as_bytes()).unwrap();
        assert_eq!(normalised, b"\0target\0/debug/a.d: \0workspace\0/src/a.rs");
        assert_eq!(there.normalise(text("/src", "/build/out").as_bytes()).unwrap(), normalised);
        assert_eq!(there.expand(&normalised).unwrap(), text("/src", "/build/out").into_bytes());
    }

    #[test]
    fn only_whole_prefixes_are_replaced() {
        let roots = roots("/src", "/out", "/root");
        for text in ["/srcs/a", "/src-old/a", "registry/src/a", "/usr/src/a", "/src.rs"] {
            assert_eq!(roots.normalise(text.as_bytes()).unwrap(), text.as_bytes(), "{text}");
        }
        assert_eq!(roots.normalise(b"dependency=/src").unwrap(), b"dependency=\0workspace\0");
        assert_eq!(roots.normalise(b"\"/src\",").unwrap(), b"\"\0workspace\0\",");
    }

    #[test]
    fn paths_that_some_quoting_changes_are_no_roots() {
        for path in ["/", "relative", "/with space", "/quo\"te", "/dollar$", "/a/../b", "/a//b"] {
            assert_eq!(Roots::new([(Root::Workspace, path.into())]).iter().count(), 0, "{path}");
        }
    }

    #[test]
    fn a_marker_of_a_root_that_is_not_here_is_an_error() {
        let roots = roots("/src", "/out", "/");
        assert_eq!(roots.expand(b"\0home\0/x"), Err(RootError::UnknownRoot));
        assert_eq!(roots.expand(b"\0target"), Err(RootError::UnknownRoot));
        assert_eq!(roots.normalise(b"\0home\0/x"), Err(RootError::ContainsNul));
    }

    #[test]
    fn literal_paths_in_binary_content_are_found_wherever_they_stand() {
        let roots = roots("/w", "/w/target", "/home/ann");
        assert_eq!(roots.found_in(b"text/w/target/x"), [Root::Target, Root::Workspace]);
        assert_eq!(roots.found_in(b"text/wtext"), [Root::Workspace]);
        assert_eq!(roots.found_in(b"/home/annex"), []);
        assert_eq!(roots.found_in(b"/home/ann/x"), [Root::Home]);
    }

    #[test]
    fn parents_are_found_where_no_root_follows() {
        let roots = roots("/data/a/shop", "/data/a/shop/target", "/home/ann");
        assert_eq!(roots.parents_found_in(b"in /data/a: /data/a/shop/src"), [Root::Workspace]);
        assert_eq!(roots.parents_found_in(b"/data/a/other"), [Root::Workspace]);
        assert_eq!(roots.parents_found_in(b"/data/a/shop/src /data/abc /data/a/shop/target/x"), []);
    }

    proptest! {
        #[test]
        fn normalising_loses_nothing(text in "[/a-c= \"]{0,40}", first in "(/[a-c]{1,2}){1,3}", second in "(/[a-c]{1,2}){1,3}") {
            let roots = roots(&first, &second, "/home/ann");
            let normalised = roots.normalise(text.as_bytes()).unwrap();
            prop_assert_eq!(roots.expand(&normalised).unwrap(), text.into_bytes());
        }

        #[test]
        fn expanding_never_panics(text in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = roots("/src", "/out", "/root").expand(&text);
        }
    }
}
