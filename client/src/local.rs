//! The local tier: results and outputs in a directory, shared by all agents that use it.
//!
//! ```text
//! DIRECTORY/v1/results/<2 hex>/<action key>/<result key>   a PublishRequest; its mtime is its last use
//! DIRECTORY/v1/objects/<2 hex>/<digest>                    an output's stored bytes, uncompressed
//! DIRECTORY/v1/staging/                                    files being written
//! DIRECTORY/v1/memo                                        the digest memo (see `memo`)
//! ```
//!
//! Invariants:
//! - A file gets its name by a rename when it is whole; a result is named after all its objects are there.
//!   Nothing is synced to disk: what a power cut leaves is found out by the digest and removed.
//! - An object is used only after its content was hashed in this agent, or recognised by the digest memo.
//! - Any file may vanish at any time (another agent evicts): that is a miss.
//! - Whatever fails here is a miss or a forgotten entry, never an error of the build.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use cachec_protocol::message::{MAX_MANIFEST_RESULTS, PublishRequest};
use cachec_protocol::{ActionKey, Digest, ResultKey, StoredResult, decode, encode};

use rustix::fs::{AtFlags, FlockOperation, Timespec, Timestamps, UTIME_NOW};

use crate::memo::{Identity, Memo};

/// Eviction frees a tenth more than needed, so that it does not run after every store.
const EVICTION_TARGET_PERCENT: u64 = 90;

/// Staging files older than this were left by an agent that died.
const STALE_STAGING: Duration = Duration::from_secs(3600);

/// See the module.
#[derive(Debug)]
pub(crate) struct LocalTier {
    root: PathBuf,
    limit_bytes: u64,
    /// Bytes stored, as far as known; counted by [`Self::take_stock`] and again by every eviction.
    stored_bytes: AtomicU64,
    /// Whether objects cannot share their blocks with another file, as was found out.
    has_no_clones: AtomicBool,
}

impl LocalTier {
    /// Opens the tier, creating its directories.
    ///
    /// # Errors
    /// Those of creating them: the tier is not used, and the user is told.
    pub(crate) fn open(directory: &Path, limit_bytes: u64) -> io::Result<Self> {
        let root = directory.join("v1");
        for part in ["results", "objects", "staging"] {
            fs::create_dir_all(root.join(part))?;
        }
        // Fails now rather than at the first store where the directory is not writable.
        tempfile::tempfile_in(root.join("staging"))?;
        Ok(Self {
            root,
            limit_bytes,
            stored_bytes: AtomicU64::default(),
            has_no_clones: AtomicBool::default(),
        })
    }

    /// Counts what is stored and removes what was left half-written. Takes a while; to be called once, beside
    /// the first lookups.
    pub(crate) fn take_stock(&self) {
        self.stored_bytes
            .fetch_add(self.walk("objects").map(|entry| entry.size_bytes).sum(), Ordering::Relaxed);
        for entry in self.walk("staging").filter(|entry| entry.age() > STALE_STAGING) {
            let _ = fs::remove_file(entry.path);
        }
    }

    /// The file that the digest memo is kept in.
    pub(crate) fn memo_file(&self) -> PathBuf {
        self.root.join("memo")
    }

    /// Bytes of all objects, as far as known.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.stored_bytes.load(Ordering::Relaxed)
    }

    /// The newest results of an action key, newest first.
    pub(crate) fn manifest(&self, key: &ActionKey) -> Vec<StoredResult> {
        let mut files: Vec<(SystemTime, PathBuf)> = fs::read_dir(self.manifest_directory(key))
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let entry = entry.ok()?;
                Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
            })
            .collect();
        files.sort_unstable_by(|a, b| b.cmp(a));
        for (_, surplus) in files.iter().skip(MAX_MANIFEST_RESULTS) {
            let _ = fs::remove_file(surplus);
        }
        files.truncate(MAX_MANIFEST_RESULTS);
        files
            .iter()
            .filter_map(|(_, path)| read_result(path))
            .filter(|result| result.action_key == *key)
            .collect()
    }

    /// Marks a result as used now.
    pub(crate) fn touch(&self, result: &StoredResult) {
        if let Ok(file) = File::options().append(true).open(self.result_path(result)) {
            let _ = file.set_modified(SystemTime::now());
        }
    }

    /// Path of an object whose content is verified, and the identity it was verified under; a corrupt one
    /// is removed.
    ///
    /// # Errors
    /// `NotFound` where it is absent, `InvalidData` where it was corrupt.
    pub(crate) fn object(&self, digest: &Digest, memo: &Memo) -> io::Result<(PathBuf, Identity)> {
        let path = self.object_path(digest);
        let (present, identity) = memo.digest(&path)?;
        if present == *digest {
            return Ok((path, identity));
        }
        let _ = fs::remove_file(&path);
        Err(io::Error::new(io::ErrorKind::InvalidData, "corrupt object"))
    }

    /// Whether it is worth trying to clone an object.
    pub(crate) fn may_clone(&self) -> bool {
        !self.has_no_clones.load(Ordering::Relaxed)
    }

    /// Remembers that it is not: making a file for each attempt costs more than linking one.
    pub(crate) fn never_clone(&self) {
        self.has_no_clones.store(true, Ordering::Relaxed);
    }

    /// Gives an object that has no other name a second one, with this mode and the present time; says whether it could.
    /// Where others have it, its time is theirs.
    pub(crate) fn lend(&self, (object, verified): &(PathBuf, Identity), name: &Path, mode: u32) -> bool {
        let lend = || -> io::Result<bool> {
            let file = File::open(object)?;
            // Agents that share the tier take turns; the second finds two names.
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            let metadata = file.metadata()?;
            let is_own = metadata.uid() == rustix::process::geteuid().as_raw();
            if metadata.nlink() != 1
                || !is_own
                || is_privileged(&file)
                || Identity::of(&metadata) != *verified
            {
                return Ok(false);
            }
            fs::hard_link(object, name)?;
            let has_mode = metadata.mode() & 0o7777 == mode
                || file.set_permissions(PermissionsExt::from_mode(mode)).is_ok();
            let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
            let times = Timestamps { last_access: now, last_modification: now };
            let is_fresh = has_mode && rustix::fs::futimens(&file, &times).is_ok();
            if !is_fresh || !Identity::of(&fs::metadata(name)?).same_file(verified) {
                fs::remove_file(name)?;
                return Ok(false);
            }
            Ok(true)
        };
        lend().unwrap_or(false)
    }

    /// A new file for an object's content; see [`Self::keep_object`].
    ///
    /// # Errors
    /// Those of creating a file.
    pub(crate) fn stage(&self) -> io::Result<tempfile::NamedTempFile> {
        let directory = self.root.join("staging");
        let stage =
            || tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o666)).tempfile_in(&directory);
        match stage() {
            // Somebody has removed the whole tier under a living agent.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&directory)?;
                stage()
            }
            staged => staged,
        }
    }

    /// Gives an open file another name, to be kept as an object: nothing is copied. For files that nobody edits in
    /// place; where somebody does all the same, its times tell.
    ///
    /// # Errors
    /// Where the file is on another file system, or has no name any more.
    pub(crate) fn stage_link(&self, file: &File) -> io::Result<tempfile::TempPath> {
        let staged = self.stage()?.into_temp_path();
        fs::remove_file(&staged)?;
        let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(rustix::fs::CWD, opened, rustix::fs::CWD, &*staged, AtFlags::SYMLINK_FOLLOW)?;
        Ok(staged)
    }

    /// Names a staged file, whose content the caller has hashed while writing it.
    ///
    /// # Errors
    /// Those of renaming.
    pub(crate) fn keep_object(
        &self,
        staged: tempfile::TempPath,
        digest: &Digest,
        memo: &Memo,
    ) -> io::Result<()> {
        let size_bytes = fs::metadata(&staged)?.len();
        let path = self.object_path(digest);
        create_parent(&path)?;
        staged.persist(&path)?;
        memo.remember(Identity::of(&fs::metadata(&path)?), *digest);
        self.stored_bytes.fetch_add(size_bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Stores a result whose objects are there, and evicts where the limit is passed.
    ///
    /// # Errors
    /// Those of writing the file.
    pub(crate) fn keep_result(&self, publish: &PublishRequest) -> io::Result<()> {
        let path = self.result_path(&publish.result);
        create_parent(&path)?;
        let staged = self.stage()?;
        fs::write(staged.path(), encode(publish))?;
        staged.persist(&path)?;
        if self.stored_bytes() > self.limit_bytes {
            self.evict();
        }
        Ok(())
    }

    /// Removes the results that were not used for longest, then all objects that no result names.
    fn evict(&self) {
        let mut results: Vec<Entry> = self.walk("results").collect();
        results.sort_unstable_by_key(|entry| std::cmp::Reverse(entry.modified));
        let target_bytes = self.limit_bytes / 100 * EVICTION_TARGET_PERCENT;
        let (mut kept, mut kept_bytes) = (HashSet::new(), 0);
        for entry in results {
            let outputs = read_result(&entry.path).map(|result| result.outputs).unwrap_or_default();
            let new_bytes: u64 = outputs
                .iter()
                .filter(|output| !kept.contains(&output.digest))
                .map(|output| output.size_bytes)
                .sum();
            if outputs.is_empty() || kept_bytes + new_bytes > target_bytes {
                let _ = fs::remove_file(&entry.path);
            } else {
                kept_bytes += new_bytes;
                kept.extend(outputs.iter().map(|output| output.digest));
            }
        }
        for entry in self.walk("objects") {
            let digest = entry.path.file_name().and_then(OsStr::to_str).and_then(|name| name.parse().ok());
            if !digest.is_some_and(|digest| kept.contains(&digest)) {
                let _ = fs::remove_file(&entry.path);
            }
        }
        self.stored_bytes.store(kept_bytes, Ordering::Relaxed);
    }

    /// All files below a part of the directory.
    fn walk(&self, part: &str) -> impl Iterator<Item = Entry> {
        let mut directories = vec![self.root.join(part)];
        let mut files = Vec::new();
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                match entry.metadata() {
                    Ok(metadata) if metadata.is_dir() => directories.push(entry.path()),
                    Ok(metadata) => files.push(Entry {
                        path: entry.path(),
                        size_bytes: metadata.len(),
                        modified: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                    }),
                    Err(_) => {}
                }
            }
        }
        files.into_iter()
    }

    fn manifest_directory(&self, key: &ActionKey) -> PathBuf {
        let name = key.to_string();
        self.root.join("results").join(&name[..2]).join(name)
    }

    fn result_path(&self, result: &StoredResult) -> PathBuf {
        let key: ResultKey = result.result_key();
        self.manifest_directory(&result.action_key).join(key.to_string())
    }

    fn object_path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join("objects").join(&name[..2]).join(name)
    }
}

struct Entry {
    path: PathBuf,
    size_bytes: u64,
    modified: SystemTime,
}

impl Entry {
    fn age(&self) -> Duration {
        self.modified.elapsed().unwrap_or_default()
    }
}

/// Whether somebody has given the file capabilities, which a newly made one has not.
fn is_privileged(file: &File) -> bool {
    rustix::fs::fgetxattr(file, "security.capability", &mut [0_u8; 0]).is_ok()
}

fn read_result(path: &Path) -> Option<StoredResult> {
    Some(decode::<PublishRequest>(&fs::read(path).ok()?).ok()?.result)
}

fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use cachec_protocol::{InputSet, Output, OutputKind, Pack};

    use super::*;

    fn new_tier(limit_bytes: u64) -> (tempfile::TempDir, LocalTier, Memo) {
        let directory = tempfile::tempdir().unwrap();
        let tier = LocalTier::open(directory.path(), limit_bytes).unwrap();
        (directory, tier, Memo::default())
    }

    fn store(tier: &LocalTier, memo: &Memo, action: u8, content: &[u8]) -> StoredResult {
        let digest = Digest::of(content);
        let mut staged = tier.stage().unwrap();
        staged.write_all(content).unwrap();
        tier.keep_object(staged.into_temp_path(), &digest, memo).unwrap();
        let result = StoredResult {
            action_key: ActionKey::from_bytes([action; 32]),
            input_set: InputSet::default(),
            outputs: vec![Output {
                name: "liba.rlib".into(),
                kind: OutputKind::Binary,
                executable: false,
                digest,
                size_bytes: content.len() as u64,
                permissions: None,
                inline: None,
            }],
            stdout: vec![],
            stderr: vec![],
            compile_ms: 1,
            pack: Some(Pack { digest }),
            signature: None,
        };
        tier.keep_result(&PublishRequest { result: result.clone(), action_fields: vec![] }).unwrap();
        result
    }

    #[test]
    fn what_is_stored_is_found_again() {
        let (directory, tier, memo) = new_tier(1 << 20);
        let result = store(&tier, &memo, 1, b"content");
        let reopened = LocalTier::open(directory.path(), 1 << 20).unwrap();
        assert_eq!(reopened.manifest(&result.action_key), std::slice::from_ref(&result));
        reopened.take_stock();
        assert_eq!(reopened.stored_bytes(), 7);
        let (object, _) = reopened.object(&result.outputs[0].digest, &Memo::default()).unwrap();
        assert_eq!(fs::read(object).unwrap(), b"content");
    }

    #[test]
    fn a_corrupt_object_is_removed_and_not_used() {
        let (_directory, tier, memo) = new_tier(1 << 20);
        let digest = store(&tier, &memo, 1, b"content").outputs[0].digest;
        fs::write(tier.object_path(&digest), b"CONTENT").unwrap();
        assert_eq!(tier.object(&digest, &memo).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(tier.object(&digest, &memo).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn an_object_is_lent_once_and_with_the_present_time() {
        let (directory, tier, memo) = new_tier(1 << 20);
        let digest = store(&tier, &memo, 1, b"content").outputs[0].digest;
        let path = tier.object_path(&digest);
        File::options().append(true).open(&path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let object = tier.object(&digest, &memo).unwrap();
        let name = |name: &str| directory.path().join(name);
        assert!(tier.lend(&object, &name("first"), 0o755));
        let lent = fs::metadata(name("first")).unwrap();
        assert_eq!(lent.mode() & 0o7777, 0o755);
        assert!(lent.modified().unwrap().elapsed().unwrap() < Duration::from_secs(60));
        let object = tier.object(&digest, &memo).unwrap();
        assert!(!tier.lend(&object, &name("second"), 0o755) && !name("second").exists());
        // Again its only one, but not what was verified.
        fs::remove_file(name("first")).unwrap();
        fs::write(&path, b"CONTENT").unwrap();
        assert!(!tier.lend(&object, &name("third"), 0o755) && !name("third").exists());
    }

    #[test]
    fn privileges_that_a_borrower_was_given_are_not_lent_on() {
        let (directory, tier, memo) = new_tier(1 << 20);
        let digest = store(&tier, &memo, 1, b"content").outputs[0].digest;
        let name = directory.path().join("name");
        let lend = || tier.lend(&tier.object(&digest, &memo).unwrap(), &name, 0o755);
        assert!(lend());
        fs::set_permissions(&name, PermissionsExt::from_mode(0o4755)).unwrap();
        fs::remove_file(&name).unwrap();
        assert!(lend());
        assert_eq!(fs::metadata(&name).unwrap().mode() & 0o7777, 0o755);
        // CAP_NET_RAW, permitted and effective; only root may give it.
        let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let given =
            rustix::fs::setxattr(&name, "security.capability", &capability, rustix::fs::XattrFlags::empty());
        fs::remove_file(&name).unwrap();
        assert_eq!(lend(), given.is_err());
    }

    #[test]
    fn what_belongs_to_somebody_else_is_not_lent() {
        let (directory, tier, memo) = new_tier(1 << 20);
        let digest = store(&tier, &memo, 1, b"content").outputs[0].digest;
        // Only root may give it away.
        let given = std::os::unix::fs::chown(tier.object_path(&digest), Some(65534), None);
        let name = directory.path().join("name");
        assert_eq!(tier.lend(&tier.object(&digest, &memo).unwrap(), &name, 0o644), given.is_err());
    }

    #[test]
    fn eviction_keeps_what_was_used_last_and_holds_the_limit() {
        let (_directory, tier, memo) = new_tier(3500);
        let first = store(&tier, &memo, 1, &[1; 1000]);
        let second = store(&tier, &memo, 2, &[2; 1000]);
        let _third = store(&tier, &memo, 3, &[3; 1000]);
        tier.touch(&first);
        let fourth = store(&tier, &memo, 4, &[4; 1000]);
        assert!(tier.stored_bytes() <= 3500);
        assert_eq!(tier.manifest(&second.action_key), []);
        assert_eq!(tier.manifest(&first.action_key), std::slice::from_ref(&first));
        let has = |result: &StoredResult| tier.object(&result.outputs[0].digest, &memo).is_ok();
        assert!(has(&first) && has(&fourth) && !has(&second));
    }

    #[test]
    fn a_tier_that_was_removed_is_filled_again() {
        let directory = tempfile::tempdir().unwrap();
        let tier = LocalTier::open(directory.path(), 1 << 20).unwrap();
        fs::remove_dir_all(directory.path().join("v1")).unwrap();
        let result = store(&tier, &Memo::default(), 1, b"content");
        assert_eq!(tier.manifest(&result.action_key), std::slice::from_ref(&result));
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_an_error() {
        assert!(LocalTier::open(Path::new("/proc/cachec"), 1).is_err());
    }
}
