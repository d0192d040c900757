//! Tokens: who may do what in which namespace.
//!
//! A token is `cachec_` and 64 hexadecimal digits, made of 32 bytes of the operating system's randomness. It
//! is printed once. Stored is its BLAKE3 digest only, in one file per token, so that the command line creates
//! and revokes while a server runs; every request reads the file, so that a revocation counts at once.
//!
//! ```text
//! DATA/tokens/<id>        id: first 16 digits of the token's digest
//! digest=<64 digits>
//! namespace=<name>
//! allow=read,write
//! expires=<seconds since 1970, or never>
//! state=active | revoked
//! ```
//!
//! Invariants: a token or its digest never stands in a log or an error; digests are compared in constant
//! time; a file that is not understood grants nothing. A revoked token's file stays, so that revoking the
//! last one does not open the server.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cachec_protocol::Digest;

use crate::namespace::Namespace;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// The only namespace that it is good for.
    pub namespace: Namespace,
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
        Ok(Self { directory, seen: AtomicBool::new(false) })
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

    /// Decides about a request with this bearer token, if any. Blocks on small files.
    ///
    /// # Errors
    /// Files cannot be read; the caller refuses.
    pub fn check(&self, token: Option<&str>, namespace: &Namespace, verb: Verb) -> io::Result<Grant> {
        if !self.are_needed()? {
            return Ok(Grant::Allowed);
        }
        let Some(record) = token.map(|token| self.find(token)).transpose()?.flatten() else {
            return Ok(Grant::Unknown);
        };
        if record.namespace != *namespace || !record.is_active(SystemTime::now()) {
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
        namespace: &Namespace,
        verbs: Verbs,
        expires: Option<SystemTime>,
    ) -> io::Result<(String, String)> {
        let mut random = [0; RANDOM_BYTES];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let token = format!("{PREFIX}{}", Digest::from_bytes(random));
        let digest = blake3::hash(token.as_bytes());
        let record = TokenRecord {
            id: token_id(digest),
            namespace: namespace.clone(),
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
            if let Some((_, record)) = parse(&fs::read_to_string(entry?.path())?) {
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
            record.namespace,
            record.verbs,
            if record.revoked { "revoked" } else { "active" },
        );
        // A file that a crash leaves half written has no good digest line or is replaced by rename: it grants
        // nothing. Its name keeps it apart from ids.
        let temporary = self.directory.join(format!("{}.new", record.id));
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, self.directory.join(&record.id))?;
        File::open(&self.directory)?.sync_all()
    }
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
        namespace: lines.get("namespace")?.parse().ok()?,
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

    fn namespace(name: &str) -> Namespace {
        name.parse().unwrap()
    }

    #[test]
    fn a_token_is_good_for_its_namespace_and_verbs_only() {
        let (_data, tokens) = tokens();
        let team = namespace("team");
        assert_eq!(tokens.check(None, &team, Verb::Write).unwrap(), Grant::Allowed);
        let (token, _) = tokens.create(&team, "read".parse().unwrap(), None).unwrap();
        let check = |token, name, verb| tokens.check(token, &namespace(name), verb).unwrap();
        assert_eq!(check(Some(token.as_str()), "team", Verb::Read), Grant::Allowed);
        assert_eq!(check(Some(token.as_str()), "team", Verb::Write), Grant::Forbidden);
        assert_eq!(check(Some(token.as_str()), "other", Verb::Read), Grant::Unknown);
        assert_eq!(check(Some("cachec_0"), "team", Verb::Read), Grant::Unknown);
        assert_eq!(check(None, "team", Verb::Read), Grant::Unknown);
    }

    #[test]
    fn expired_and_revoked_tokens_grant_nothing_and_do_not_open_the_server() {
        let (_data, tokens) = tokens();
        let team = namespace("team");
        let verbs = "read,write".parse().unwrap();
        let (expired, _) = tokens.create(&team, verbs, Some(SystemTime::now())).unwrap();
        let (revoked, id) = tokens.create(&team, verbs, None).unwrap();
        assert_eq!(tokens.check(Some(&revoked), &team, Verb::Read).unwrap(), Grant::Allowed);
        assert!(tokens.revoke(&id).unwrap());
        for token in [&expired, &revoked] {
            assert_eq!(tokens.check(Some(token), &team, Verb::Read).unwrap(), Grant::Unknown);
        }
        assert_eq!(tokens.check(None, &team, Verb::Read).unwrap(), Grant::Unknown);
        assert!(!tokens.revoke("../tokens").unwrap());
        assert!(!tokens.revoke("0123456789abcdef").unwrap());
    }

    #[test]
    fn neither_token_nor_digest_can_be_read_off_what_is_printed() {
        let (data, tokens) = tokens();
        let (token, id) = tokens.create(&namespace("a"), "write".parse().unwrap(), None).unwrap();
        let stored = fs::read_to_string(data.path().join("tokens").join(&id)).unwrap();
        assert!(!stored.contains(&token[PREFIX.len()..]));
        let listed = format!("{:?}", tokens.list().unwrap());
        assert!(listed.contains(&id) && !listed.contains(&blake3::hash(token.as_bytes()).to_string()));
    }

    #[test]
    fn a_damaged_file_grants_nothing() {
        let (data, tokens) = tokens();
        let team = namespace("team");
        let (token, id) = tokens.create(&team, "read".parse().unwrap(), None).unwrap();
        let path = data.path().join("tokens").join(id);
        let whole = fs::read_to_string(&path).unwrap();
        for cut in 0..whole.len() - 1 {
            fs::write(&path, &whole[..cut]).unwrap();
            let grant = tokens.check(Some(&token), &team, Verb::Read).unwrap();
            assert_eq!(grant, Grant::Unknown, "{}", &whole[..cut]);
        }
    }
}
