//! Session tokens: what a CI job gets for proving what it is; see [`crate::identity`].
//!
//! Nothing is stored of a session. Its token says itself what it is good for, and that this server has said so:
//!
//! ```text
//! cachecs_<namespace>_<verbs>_<expires, seconds since 1970>_<MAC, 64 hexadecimal digits>
//! DATA/tokens/sessions     the key of the MACs (BLAKE3, keyed): 32 random bytes
//! ```
//!
//! Every request reads the key, so that removing its file ends all sessions at once. The rules that they were given by
//! are in the MAC, too: under other rules, none is good.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::namespace::Namespace;
use crate::tokens::{Grant, Verb, Verbs};

/// What every session token begins with.
const PREFIX: &str = "cachecs_";

/// The name of the key's file. No token's id, which is of hexadecimal digits.
pub(crate) const KEY_FILE: &str = "sessions";

/// The sessions of one data directory.
#[derive(Debug)]
pub struct Sessions {
    key: PathBuf,
    /// What the configuration says of who jobs may be.
    rules: blake3::Hash,
}

impl Sessions {
    /// The sessions below this directory of tokens, given under these rules.
    #[must_use]
    pub fn new(tokens: &Path, rules: &str) -> Self {
        Self { key: tokens.join(KEY_FILE), rules: blake3::hash(rules.as_bytes()) }
    }

    fn mac(&self, key: &[u8; blake3::KEY_LEN], text: &str) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(key);
        hasher.update(self.rules.as_bytes()).update(text.as_bytes()).finalize()
    }

    /// Whether a text looks like a session token.
    #[must_use]
    pub fn is_session(token: &str) -> bool {
        token.starts_with(PREFIX)
    }

    /// Begins a session of this length. Its token cannot be had again.
    ///
    /// # Errors
    /// The key cannot be read or made.
    pub fn create(&self, namespace: &Namespace, verbs: Verbs, length: Duration) -> io::Result<String> {
        let expires = SystemTime::now() + length;
        let seconds = expires.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        // Neither a verb nor a number has a '_', so that a name may.
        let text = format!("{PREFIX}{namespace}_{verbs}_{seconds}");
        let mac = self.mac(&self.key_or_new()?, &text);
        Ok(format!("{text}_{mac}"))
    }

    /// Decides about a request with this session token. Blocks on a small file.
    ///
    /// # Errors
    /// The key cannot be read; the caller refuses.
    pub fn check(&self, token: &str, namespace: &Namespace, verb: Verb) -> io::Result<Grant> {
        let key = match self.key() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Grant::Unknown),
            key => key?,
        };
        let claim = token
            .rsplit_once('_')
            .and_then(|(text, mac)| Some((text, blake3::Hash::from_hex(mac).ok()?)))
            // Compared in constant time.
            .filter(|(text, mac)| self.mac(&key, text) == *mac)
            .and_then(|(text, _)| parse(text));
        Ok(match claim {
            Some((for_namespace, verbs, expires))
                if for_namespace == *namespace && SystemTime::now() < expires =>
            {
                if verbs.contains(verb) {
                    Grant::Allowed
                } else {
                    Grant::Forbidden
                }
            }
            _ => Grant::Unknown,
        })
    }

    fn key(&self) -> io::Result<[u8; blake3::KEY_LEN]> {
        let bytes = fs::read(&self.key)?;
        bytes
            .try_into()
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the key of sessions has another length"))
    }

    fn key_or_new(&self) -> io::Result<[u8; blake3::KEY_LEN]> {
        match self.key() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            key => return key,
        }
        let mut key = [0; blake3::KEY_LEN];
        getrandom::fill(&mut key).map_err(io::Error::other)?;
        // Whole before it has its name; and where another request was faster, its key counts.
        let temporary = self.key.with_extension(format!("{}.new", blake3::hash(&key)));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(&key).and_then(|()| file.sync_all())?;
        let linked = fs::hard_link(&temporary, &self.key);
        fs::remove_file(&temporary)?;
        match linked {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => self.key(),
        }
    }
}

fn parse(text: &str) -> Option<(Namespace, Verbs, SystemTime)> {
    let mut parts = text.strip_prefix(PREFIX)?.rsplitn(3, '_');
    let (seconds, verbs, namespace) = (parts.next()?, parts.next()?, parts.next()?);
    let expires = UNIX_EPOCH.checked_add(Duration::from_secs(seconds.parse().ok()?))?;
    Some((namespace.parse().ok()?, verbs.parse().ok()?, expires))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_session_is_good_for_its_namespace_its_verbs_and_its_time() {
        let directory = tempfile::tempdir().unwrap();
        let sessions = Sessions::new(directory.path(), "rules");
        let namespace = |name: &str| name.parse::<Namespace>().unwrap();
        let check = |token: &str, name: &str, verb| sessions.check(token, &namespace(name), verb).unwrap();
        assert_eq!(check("cachecs_pr_1_read_99999999999_00", "pr_1", Verb::Read), Grant::Unknown);
        let token = sessions.create(&namespace("pr_1"), "read".parse().unwrap(), HOUR).unwrap();
        assert!(Sessions::is_session(&token));
        assert_eq!(check(&token, "pr_1", Verb::Read), Grant::Allowed);
        assert_eq!(check(&token, "pr_1", Verb::Write), Grant::Forbidden);
        assert_eq!(check(&token, "pr", Verb::Read), Grant::Unknown);
        for forged in [
            token.replace("pr_1", "main"),
            token.replace("_read_", "_read,write_"),
            token[..token.len() - 1].to_owned(),
            token.to_uppercase(),
            PREFIX.to_owned(),
        ] {
            for name in ["pr_1", "main"] {
                assert_eq!(check(&forged, name, Verb::Read), Grant::Unknown, "{forged}");
            }
        }
        let over = sessions.create(&namespace("pr_1"), "read".parse().unwrap(), Duration::ZERO).unwrap();
        assert_eq!(check(&over, "pr_1", Verb::Read), Grant::Unknown);
        // Whoever may not be there any more has no session either.
        let later = Sessions::new(directory.path(), "other rules");
        assert_eq!(later.check(&token, &namespace("pr_1"), Verb::Read).unwrap(), Grant::Unknown);
        fs::remove_file(directory.path().join(KEY_FILE)).unwrap();
        assert_eq!(check(&token, "pr_1", Verb::Read), Grant::Unknown);
        sessions.create(&namespace("a"), "read".parse().unwrap(), HOUR).unwrap();
        assert_eq!(check(&token, "pr_1", Verb::Read), Grant::Unknown);
    }
}
