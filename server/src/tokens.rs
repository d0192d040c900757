//! Tokens: who may do what in which namespace.
//!
//! A token is `cachec_` and 64 hexadecimal digits, made of 32 bytes of the operating system's randomness. It
//! is printed once. Stored is its BLAKE3 digest only, in one file per token, so that the command line creates
//! and revokes while a server runs; every request reads the file, so that a revocation counts at once.
//!
//! ```text
//! DATA/tokens/<id>        id: first 16 digits of the token's digest
//! digest=<64 digits>
//! namespace=<name, or its beginning and '*'>
//! allow=read,write
//! expires=<seconds since 1970, or never>
//! state=active | revoked
//! ```
//!
//! Invariants: a token or its digest never stands in a log or an error; digests are compared in constant
//! time; a file that is not understood grants nothing. A revoked token's file stays, so that revoking the
//! last one does not open the server.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cachec_protocol::Digest;
use rustix::fs::{AtFlags, Mode, OFlags, open, openat, renameat, unlinkat};
use serde::Deserialize;

use crate::namespace::{Namespace, Pattern};

/// What every token begins with.
const PREFIX: &str = "cachec_";
const RANDOM_BYTES: usize = 32;
const ID_DIGITS: usize = 16;

/// What a token may allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Lookups and downloads.
    Read,
    /// Uploads and publishing.
    Write,
}

/// A set of verbs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Verbs {
    read: bool,
    write: bool,
}

impl Verbs {
    /// Whether the verb is in the set.
    #[must_use]
    pub const fn contains(self, verb: Verb) -> bool {
        match verb {
            Verb::Read => self.read,
            Verb::Write => self.write,
        }
    }
}

impl FromStr for Verbs {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut verbs = Self { read: false, write: false };
        for word in text.split(',') {
            match word.trim() {
                "read" => verbs.read = true,
                "write" => verbs.write = true,
                _ => return Err("verbs are read and write, separated by a comma"),
            }
        }
        Ok(verbs)
    }
}

impl TryFrom<String> for Verbs {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl std::fmt::Display for Verbs {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match (self.read, self.write) {
            (true, true) => "read,write",
            (true, false) => "read",
            _ => "write",
        })
    }
}

/// What is stored of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRecord {
    /// What it is listed and revoked by.
    pub id: String,
    /// The only namespaces that it is good for.
    pub namespaces: Pattern,
    /// What it allows there.
    pub verbs: Verbs,
    /// When it ends, if it does.
    pub expires: Option<SystemTime>,
    /// Whether it was revoked.
    pub revoked: bool,
}

impl TokenRecord {
    /// Whether it is good at that moment.
    #[must_use]
    pub fn is_active(&self, now: SystemTime) -> bool {
        !self.revoked && self.expires.is_none_or(|expires| now < expires)
    }
}

/// What a request may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant {
    /// It may.
    Allowed,
    /// There is no token for this namespace.
    Unknown,
    /// There is, but it does not allow this.
    Forbidden,
}

/// The tokens of one data directory.
#[derive(Debug)]
pub struct Tokens {
    directory: PathBuf,
    /// Once there was a token, the server never goes back to asking for none.
    seen: AtomicBool,
}

impl Tokens {
    /// The tokens below this data directory.
    ///
    /// # Errors
    /// The directory cannot be created.
    pub fn open(data: &Path) -> io::Result<Self> {
        let directory = data.join("tokens");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        give_to_owner_of(&File::open(data)?, &open_directory(&directory)?)?;
        Ok(Self { directory, seen: AtomicBool::new(false) })
    }

    /// Where they are kept.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether requests need a token: there is or was one.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn are_needed(&self) -> io::Result<bool> {
        if self.seen.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let found = fs::read_dir(&self.directory)?.next().transpose()?.is_some();
        if found {
            self.seen.store(true, Ordering::Relaxed);
        }
        Ok(found)
    }

    /// Decides about a request with this bearer token. Blocks on a small file.
    ///
    /// # Errors
    /// Files cannot be read; the caller refuses.
    pub fn check(&self, token: &str, namespace: &Namespace, verb: Verb) -> io::Result<Grant> {
        let Some(record) = self.find(token)? else { return Ok(Grant::Unknown) };
        if !record.namespaces.matches(namespace) || !record.is_active(SystemTime::now()) {
            return Ok(Grant::Unknown);
        }
        Ok(if record.verbs.contains(verb) { Grant::Allowed } else { Grant::Forbidden })
    }

    fn find(&self, token: &str) -> io::Result<Option<TokenRecord>> {
        let digest = blake3::hash(token.as_bytes());
        match fs::read_to_string(self.directory.join(token_id(digest))) {
            Ok(text) => Ok(parse(&text).filter(|(stored, _)| *stored == digest).map(|(_, record)| record)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates a token, and returns it with its id. It cannot be had again.
    ///
    /// # Errors
    /// No randomness, or the file cannot be written.
    pub fn create(
        &self,
        namespaces: &Pattern,
        verbs: Verbs,
        expires: Option<SystemTime>,
    ) -> io::Result<(String, String)> {
        let mut random = [0; RANDOM_BYTES];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let token = format!("{PREFIX}{}", Digest::from_bytes(random));
        let digest = blake3::hash(token.as_bytes());
        let record = TokenRecord {
            id: token_id(digest),
            namespaces: namespaces.clone(),
            verbs,
            expires,
            revoked: false,
        };
        self.write(&record, digest)?;
        Ok((token, record.id))
    }

    /// All tokens, by id.
    ///
    /// # Errors
    /// The directory or one of its files cannot be read.
    pub fn list(&self) -> io::Result<Vec<TokenRecord>> {
        let mut records = BTreeMap::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.file_name().is_none_or(|name| name.len() != ID_DIGITS) {
                continue;
            }
            if let Some((_, record)) = parse(&fs::read_to_string(path)?) {
                records.insert(record.id.clone(), record);
            }
        }
        Ok(records.into_values().collect())
    }

    /// Revokes a token; false where there is none of that id.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn revoke(&self, id: &str) -> io::Result<bool> {
        // An id is the name of a file: anything else could be a path.
        if id.len() != ID_DIGITS || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(false);
        }
        let text = match fs::read_to_string(self.directory.join(id)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            text => text?,
        };
        let Some((digest, record)) = parse(&text) else { return Ok(false) };
        self.write(&TokenRecord { revoked: true, ..record }, digest)?;
        Ok(true)
    }

    fn write(&self, record: &TokenRecord, digest: blake3::Hash) -> io::Result<()> {
        let expires = record.expires.map_or_else(
            || "never".to_owned(),
            |expires| expires.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().to_string(),
        );
        let text = format!(
            "digest={digest}\nnamespace={}\nallow={}\nexpires={expires}\nstate={}\n",
            record.namespaces,
            record.verbs,
            if record.revoked { "revoked" } else { "active" },
        );
        // A file that a crash leaves half written has no good digest line or is replaced by rename: it grants
        // nothing. Its name keeps it apart from ids.
        let directory = open_directory(&self.directory)?;
        let temporary = format!("{}.new", record.id);
        let _ = unlinkat(&directory, &temporary, AtFlags::empty());
        // Root may write into a directory of the server's user, who must not lead it elsewhere by a link.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(&directory, &temporary, flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        give_to_owner_of(&directory, &file)?;
        renameat(&directory, &temporary, &directory, &record.id)?;
        directory.sync_all()
    }
}

/// Opens a directory that is no link.
fn open_directory(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(open(path, flags, Mode::empty())?))
}

/// What root creates, as an administrator may, the server's own user must be able to read.
fn give_to_owner_of(directory: &File, created: &File) -> io::Result<()> {
    let (owner, present) = (directory.metadata()?, created.metadata()?);
    if rustix::process::geteuid().is_root() && present.uid() != owner.uid() {
        std::os::unix::fs::fchown(created, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(())
}

fn token_id(digest: blake3::Hash) -> String {
    digest.to_hex()[..ID_DIGITS].to_owned()
}

/// Reads a token's file; `None` where any line is missing or not understood.
fn parse(text: &str) -> Option<(blake3::Hash, TokenRecord)> {
    let lines: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let digest = blake3::Hash::from_hex(lines.get("digest")?).ok()?;
    let expires = match *lines.get("expires")? {
        "never" => None,
        seconds => Some(UNIX_EPOCH.checked_add(Duration::from_secs(seconds.parse().ok()?))?),
    };
    let revoked = match *lines.get("state")? {
        "active" => false,
        "revoked" => true,
        _ => return None,
    };
    let record = TokenRecord {
        id: token_id(digest),
        namespaces: lines.get("namespace")?.parse().ok()?,
        verbs: lines.get("allow")?.parse().ok()?,
        expires,
        revoked,
    };
    Some((digest, record))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> (tempfile::TempDir, Tokens) {
        let data = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(data.path()).unwrap();
        (data, tokens)
    }

    fn create(
        tokens: &Tokens,
        namespaces: &str,
        allow: &str,
        expires: Option<SystemTime>,
    ) -> (String, String) {
        tokens.create(&namespaces.parse().unwrap(), allow.parse().unwrap(), expires).unwrap()
    }

    fn check(tokens: &Tokens, token: &str, namespace: &str, verb: Verb) -> Grant {
        tokens.check(token, &namespace.parse().unwrap(), verb).unwrap()
    }

    #[test]
    fn a_token_is_good_for_its_namespaces_and_verbs_only() {
        let (_data, tokens) = tokens();
        assert!(!tokens.are_needed().unwrap());
        let (token, _) = create(&tokens, "team", "read", None);
        assert!(tokens.are_needed().unwrap());
        assert_eq!(check(&tokens, &token, "team", Verb::Read), Grant::Allowed);
        assert_eq!(check(&tokens, &token, "team", Verb::Write), Grant::Forbidden);
        for other in ["other", "team2", "tea"] {
            assert_eq!(check(&tokens, &token, other, Verb::Read), Grant::Unknown);
        }
        assert_eq!(check(&tokens, "cachec_0", "team", Verb::Read), Grant::Unknown);
        let (many, _) = create(&tokens, "pr-*", "read,write", None);
        assert_eq!(check(&tokens, &many, "pr-7", Verb::Write), Grant::Allowed);
        assert_eq!(check(&tokens, &many, "team", Verb::Read), Grant::Unknown);
    }

    #[test]
    fn expired_and_revoked_tokens_grant_nothing_and_do_not_open_the_server() {
        let (_data, tokens) = tokens();
        let (expired, _) = create(&tokens, "team", "read,write", Some(SystemTime::now()));
        let (revoked, id) = create(&tokens, "team", "read,write", None);
        assert_eq!(check(&tokens, &revoked, "team", Verb::Read), Grant::Allowed);
        assert!(tokens.revoke(&id).unwrap());
        for token in [&expired, &revoked] {
            assert_eq!(check(&tokens, token, "team", Verb::Read), Grant::Unknown);
        }
        assert!(tokens.are_needed().unwrap());
        assert!(!tokens.revoke("../tokens").unwrap());
        assert!(!tokens.revoke("0123456789abcdef").unwrap());
    }

    #[test]
    fn neither_token_nor_digest_can_be_read_off_what_is_printed() {
        let (data, tokens) = tokens();
        let (token, id) = create(&tokens, "a", "write", None);
        let stored = fs::read_to_string(data.path().join("tokens").join(&id)).unwrap();
        assert!(!stored.contains(&token[PREFIX.len()..]));
        let listed = format!("{:?}", tokens.list().unwrap());
        assert!(listed.contains(&id) && !listed.contains(&blake3::hash(token.as_bytes()).to_string()));
    }

    #[test]
    fn what_root_creates_belongs_to_the_servers_user() {
        let data = tempfile::tempdir().unwrap();
        let owner = if rustix::process::geteuid().is_root() {
            12_345
        } else {
            fs::metadata(data.path()).unwrap().uid()
        };
        let _ = std::os::unix::fs::chown(data.path(), Some(owner), None);
        let tokens = Tokens::open(data.path()).unwrap();
        let (_, id) = create(&tokens, "team", "read", None);
        for path in [tokens.directory().to_owned(), tokens.directory().join(id)] {
            assert_eq!(fs::metadata(path).unwrap().uid(), owner);
        }
    }

    #[test]
    fn links_lead_nowhere() {
        let (data, tokens) = tokens();
        let victim = data.path().join("victim");
        fs::write(&victim, "kept").unwrap();
        let (_, id) = create(&tokens, "team", "read", None);
        std::os::unix::fs::symlink(&victim, tokens.directory().join(format!("{id}.new"))).unwrap();
        assert!(tokens.revoke(&id).unwrap());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "kept");
        assert!(tokens.list().unwrap()[0].revoked);
        let elsewhere = data.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        fs::remove_dir_all(tokens.directory()).unwrap();
        std::os::unix::fs::symlink(&elsewhere, tokens.directory()).unwrap();
        assert!(Tokens::open(data.path()).is_err());
    }

    #[test]
    fn a_damaged_file_grants_nothing() {
        let (data, tokens) = tokens();
        let (token, id) = create(&tokens, "team", "read", None);
        let path = data.path().join("tokens").join(id);
        let whole = fs::read_to_string(&path).unwrap();
        for cut in 0..whole.len() - 1 {
            fs::write(&path, &whole[..cut]).unwrap();
            let grant = check(&tokens, &token, "team", Verb::Read);
            assert_eq!(grant, Grant::Unknown, "{}", &whole[..cut]);
        }
    }
}
