//! The digest memo: file identity → digest, so that an unchanged file is read once.
//!
//! Identity is device, inode, size, mtime and ctime. A file that changed within the last clock tick is
//! hashed but not remembered: another change in the same tick would not show. Where there is a local tier
//! the memo outlives the agent in a file there.
//!
//! Locks: one mutex, never held while a file is read.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use cachec_protocol::Digest;
use minicbor::{Decode, Encode};

/// Longer than the coarsest tick of the clock that file systems take their times from.
const CLOCK_TICK_NS: i64 = 20_000_000;

/// Some file systems keep whole or even seconds; their times look round.
const COARSE_TICK_NS: i64 = 2_100_000_000;

/// More files than any build has; a full memo starts again.
const MAX_ENTRIES: usize = 500_000;

/// What tells that a file's content is the same as before, short of reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Identity {
    #[n(0)]
    device: u64,
    #[n(1)]
    inode: u64,
    #[n(2)]
    pub(crate) size_bytes: u64,
    #[n(3)]
    mtime_ns: i64,
    #[n(4)]
    pub(crate) ctime_ns: i64,
}

impl Identity {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size_bytes: metadata.len(),
            mtime_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
            ctime_ns: metadata.ctime().saturating_mul(1_000_000_000).saturating_add(metadata.ctime_nsec()),
        }
    }

    /// Whether it is the same file of the same size, whatever its times.
    pub(crate) fn same_file(&self, other: &Self) -> bool {
        (self.device, self.inode, self.size_bytes) == (other.device, other.inode, other.size_bytes)
    }

    /// Whether only the ctime may differ, as after a rename or a new hard link.
    pub(crate) fn same_content_times(&self, other: &Self) -> bool {
        Self { ctime_ns: other.ctime_ns, ..*self } == *other
    }

    fn is_older_than_tick(&self, now_ns: i64) -> bool {
        let is_coarse = self.mtime_ns % 1_000_000 == 0 && self.ctime_ns % 1_000_000 == 0;
        let tick_ns = if is_coarse { COARSE_TICK_NS } else { CLOCK_TICK_NS };
        self.mtime_ns.max(self.ctime_ns) < now_ns.saturating_sub(tick_ns)
    }
}

/// A new link to a file looks like a change of it, and the local tier links what was just made.
const HASH_RETRIES: usize = 3;
/// More are not kept in a file; which ones is left to chance.
const MAX_KEPT_ENTRIES: usize = 200_000;
const MAX_FILE_BYTES: u64 = 64 << 20;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Memo {
    entries: Mutex<HashMap<(u64, u64), (Identity, Digest)>>,
    changed: AtomicBool,
}

/// The memo as kept in a file.
#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct Kept {
    #[n(0)]
    entries: Vec<KeptEntry>,
}

#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct KeptEntry {
    #[n(0)]
    identity: Identity,
    #[n(1)]
    digest: Digest,
}

impl Memo {
    /// Digest of the regular file at `path`, following links, with the identity it was hashed under.
    ///
    /// # Errors
    /// Those of opening and reading; `InvalidInput` for what is no regular file; `Interrupted` where the
    /// file changed each time that it was read.
    pub(crate) fn digest(&self, path: &Path) -> io::Result<(Digest, Identity)> {
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let identity = Identity::of(&metadata);
        if let Some(digest) = self.recall(&identity) {
            return Ok((digest, identity));
        }
        for _ in 0..HASH_RETRIES {
            match self.hash(&File::open(path)?) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
        self.hash(&File::open(path)?)
    }

    fn hash(&self, file: &File) -> io::Result<(Digest, Identity)> {
        let identity = Identity::of(&file.metadata()?);
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file)?;
        if Identity::of(&file.metadata()?) != identity {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "the file changed while it was read"));
        }
        let digest = Digest::from(hasher.finalize());
        if identity.is_older_than_tick(now_ns()) {
            self.remember(identity, digest);
        }
        Ok((digest, identity))
    }

    /// Adds what an earlier agent has kept in a file. A file that is not right is as none.
    pub(crate) fn load(&self, path: &Path) {
        if !fs::metadata(path).is_ok_and(|metadata| metadata.len() <= MAX_FILE_BYTES) {
            return;
        }
        let kept = fs::read(path).ok().and_then(|bytes| minicbor::decode::<Kept>(&bytes).ok());
        for KeptEntry { identity, digest } in kept.into_iter().flat_map(|kept| kept.entries) {
            self.remember(identity, digest);
        }
        self.changed.store(false, Ordering::Relaxed);
    }

    /// Keeps the memo in a file, if it has changed since it was last kept or loaded.
    ///
    /// # Errors
    /// Those of writing; the next agent hashes again.
    pub(crate) fn save(&self, path: &Path) -> io::Result<()> {
        if !self.changed.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let entries: Vec<KeptEntry> = {
            let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            entries
                .values()
                .take(MAX_KEPT_ENTRIES)
                .map(|(identity, digest)| KeptEntry { identity: *identity, digest: *digest })
                .collect()
        };
        let mut staged = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
        staged.write_all(&cachec_protocol::encode(&Kept { entries }))?;
        staged.persist(path)?;
        Ok(())
    }

    /// The digest of a file of exactly this identity, if known.
    fn recall(&self, identity: &Identity) -> Option<Digest> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (known, digest) = entries.get(&(identity.device, identity.inode))?;
        (known == identity).then_some(*digest)
    }

    /// Remembers the digest of content that the caller itself wrote or read under that identity.
    pub(crate) fn remember(&self, identity: Identity, digest: Digest) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= MAX_ENTRIES {
            entries.clear();
        }
        entries.insert((identity.device, identity.inode), (identity, digest));
        self.changed.store(true, Ordering::Relaxed);
    }
}

/// The wall clock in nanoseconds since the epoch, which is what file times are compared with.
pub(crate) fn now_ns() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_file_is_hashed_that_gets_a_link_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, vec![1; 64 << 20]).unwrap();
        let links = std::thread::spawn({
            let path = path.clone();
            move || {
                std::thread::sleep(Duration::from_millis(5));
                std::fs::hard_link(&path, path.with_extension("link")).unwrap();
            }
        });
        assert!(Memo::default().digest(&path).is_ok());
        links.join().unwrap();
    }

    #[test]
    fn a_changed_file_is_hashed_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let memo = Memo::default();
        std::fs::write(&path, "one").unwrap();
        assert_eq!(memo.digest(&path).unwrap().0, Digest::of(b"one"));
        std::fs::write(&path, "two").unwrap();
        assert_eq!(memo.digest(&path).unwrap().0, Digest::of(b"two"));
    }

    #[test]
    fn a_file_of_the_present_tick_is_not_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let memo = Memo::default();
        std::fs::write(&path, "one").unwrap();
        let (_, identity) = memo.digest(&path).unwrap();
        assert_eq!(memo.recall(&identity), None);
        std::thread::sleep(Duration::from_millis(40));
        memo.digest(&path).unwrap();
        assert_eq!(memo.recall(&identity), Some(Digest::of(b"one")));
    }

    #[test]
    fn times_that_look_round_are_trusted_later() {
        let identity = |nanoseconds: i64| Identity {
            device: 1,
            inode: 1,
            size_bytes: 1,
            mtime_ns: 5_000_000_000 + nanoseconds,
            ctime_ns: 5_000_000_000 + nanoseconds,
        };
        let after = |seconds: i64| 5_000_000_000 + seconds * 1_000_000_000;
        assert!(identity(123_456).is_older_than_tick(after(1)));
        assert!(!identity(0).is_older_than_tick(after(1)));
        assert!(identity(0).is_older_than_tick(after(3)));
    }

    #[test]
    fn what_is_kept_is_known_to_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let (path, kept) = (directory.path().join("a"), directory.path().join("memo"));
        fs::write(&path, "one").unwrap();
        std::thread::sleep(Duration::from_millis(40));
        let memo = Memo::default();
        let (digest, identity) = memo.digest(&path).unwrap();
        memo.save(&kept).unwrap();
        let next = Memo::default();
        next.load(&kept);
        assert_eq!(next.recall(&identity), Some(digest));
        fs::write(&kept, "garbage").unwrap();
        Memo::default().load(&kept);
    }

    #[test]
    fn what_is_no_file_is_an_error() {
        assert!(Memo::default().digest(Path::new("/")).is_err());
        assert!(Memo::default().digest(Path::new("/nowhere/at/all")).is_err());
    }
}
