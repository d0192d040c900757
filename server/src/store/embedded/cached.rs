//! Small blobs and lookups of few keys: answered where they are asked for if all is in memory, since changing threads
//! takes longer than reading.
//!
//! Nothing here waits: not for the disk (RocksDB and the kernel are told to answer from their caches alone), nor for a
//! lock that is held for long. What cannot be had so is read on another thread.

use std::fs::File;
use std::io::IoSliceMut;
use std::path::Path;

use bytes::Bytes;
use cachec_protocol::ActionKey;
use cachec_protocol::message::Manifest;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::ReadWriteFlags;

use super::Engine;
use super::database::{Family, Whereabouts};
use super::rows::{BlobHome, BlobRow, Entry};
use crate::namespace::Namespace;
use crate::store::{BlobSource, CHUNK_BYTES, OpenBlob};

/// A lookup of more keys goes to another thread.
const FEW_KEYS: usize = 32;

impl Engine {
    /// A blob that is in memory as a whole, if this one is.
    pub(super) fn open_cached(&self, key: &[u8]) -> Option<OpenBlob> {
        let row: BlobRow = self.database.cached_row(Family::Blobs, key)?;
        let data = match row.home {
            BlobHome::Inline => Bytes::from(self.database.cached(Family::BlobData, key)?),
            BlobHome::File(number) if row.stored_bytes <= CHUNK_BYTES as u64 => {
                read_cached(&self.directory.path_of(key, number).ok()?, row.stored_bytes)?
            }
            BlobHome::File(_) | BlobHome::Lost => return None,
        };
        // It may be another upload's by now.
        let is_its = data.len() as u64 == row.stored_bytes;
        (is_its && self.touch_now(vec![Entry::blob(key)]))
            .then_some(OpenBlob { stored_bytes: row.stored_bytes, source: BlobSource::Memory(data) })
    }

    /// The answer to a lookup, if there is little to it and all of it is in memory.
    pub(super) fn lookup_cached(
        &self,
        namespace: &Namespace,
        keys: &[ActionKey],
        limit_bytes: usize,
    ) -> Option<Vec<Manifest>> {
        if keys.len() > FEW_KEYS {
            return None;
        }
        let limit_bytes = limit_bytes.min(CHUNK_BYTES);
        let answer = self.answer(Whereabouts::Memory, namespace, keys, limit_bytes).ok()?;
        (answer.is_whole && self.touch_now(answer.used)).then_some(answer.manifests)
    }
}

/// A file of this length, where the kernel has all of it in memory.
fn read_cached(path: &Path, length: u64) -> Option<Bytes> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::CACHED).ok()?;
    let file = File::from(opened);
    if file.metadata().ok()?.len() != length {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(length).ok()?];
    let read = rustix::io::preadv2(&file, &mut [IoSliceMut::new(&mut bytes)], 0, ReadWriteFlags::NOWAIT);
    (read.ok()? == bytes.len()).then(|| bytes.into())
}

#[cfg(test)]
mod tests {
    use cachec_protocol::pack::{self, UPLOAD_LEVEL};
    use cachec_protocol::{Digest, ResultKey};

    use super::*;
    use crate::store::embedded::rows::row_key;
    use crate::store::embedded::{Embedded, EmbeddedOptions};
    use crate::store::{BlobUpload, Publication, Store};

    #[test]
    fn only_a_whole_file_in_memory_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blob");
        std::fs::write(&path, [7; 100_000]).unwrap();
        assert_eq!(read_cached(&path, 100_000).unwrap(), vec![7; 100_000]);
        assert!(read_cached(&path, 99_999).is_none() && read_cached(&path, 100_001).is_none());
        assert!(read_cached(&directory.path().join("absent"), 0).is_none());
    }

    /// Where the kernel forgets what it is told to forget, and is not so fast that it has read it again at once.
    #[test]
    fn nothing_waits_for_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blob");
        std::fs::write(&path, [7; 100_000]).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        let forget = || rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let would_wait = || {
            let mut byte = [0];
            rustix::io::preadv2(&file, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT).is_err()
        };
        let rounds = || std::iter::repeat_n((), 20).inspect(|()| forget());
        if rounds().filter(|()| would_wait()).count() < 10 {
            eprintln!("SKIPPED: this file system's blobs are in memory at once");
            return;
        }
        assert!(rounds().any(|()| read_cached(&path, 100_000).is_none()));
    }

    fn new_store(directory: &Path) -> (Embedded, Namespace) {
        let options = EmbeddedOptions {
            directory: directory.to_owned(),
            max_size_bytes: 64 << 20,
            max_blob_bytes: 8 << 20,
            policy: std::sync::Arc::default(),
        };
        (Embedded::open(&options).unwrap(), "main".parse().unwrap())
    }

    #[tokio::test]
    async fn lookups_of_what_was_just_published_do_not_change_threads() {
        let directory = tempfile::tempdir().unwrap();
        let (store, namespace) = new_store(directory.path());
        let keys: Vec<ActionKey> = (0..60).map(|number| ActionKey::from_bytes([number; 32])).collect();
        let (present, absent) = keys.split_at(20);
        for action_key in present {
            let publication = Publication {
                namespace: namespace.clone(),
                result_key: ResultKey::from_bytes(*action_key.as_bytes()),
                action_key: *action_key,
                pack: None,
                encoded: Bytes::from(vec![7; 20_000]),
                action_fields: Vec::new(),
            };
            store.publish(publication).await.unwrap();
        }
        let found = |keys: &[ActionKey], limit_bytes| {
            Some(store.engine.lookup_cached(&namespace, keys, limit_bytes)?.len())
        };
        let some_of = |count: usize| [&present[..5], &absent[..count - 5]].concat();
        assert_eq!((found(&some_of(32), 1 << 20), found(&some_of(33), 1 << 20)), (Some(5), None));
        // Many bytes, and fewer that may be sent.
        assert_eq!((found(present, 1 << 20), found(&present[..10], 100_000)), (None, None));
        assert_eq!(store.lookup(namespace.clone(), keys.clone(), 1 << 20).await.unwrap().len(), 20);
        assert_eq!(store.lookup(namespace, keys, 100_000).await.unwrap().len(), 4);
    }

    #[tokio::test]
    async fn small_blobs_are_read_at_once_and_others_are_left() {
        let directory = tempfile::tempdir().unwrap();
        let (store, namespace) = new_store(directory.path());
        for (length, is_cached) in [(100, true), (100_000, true), (3 << 20, false)] {
            let mut content = vec![0; length];
            blake3::Hasher::new().finalize_xof().fill(&mut content);
            let (digest, frames) = (Digest::of(&content), pack::compress(&content, UPLOAD_LEVEL).unwrap());
            let key = row_key(&namespace, digest.as_bytes());
            assert!(store.engine.open_cached(&key).is_none());
            let body = Box::new(std::io::Cursor::new(frames.clone()));
            let upload = BlobUpload { namespace: namespace.clone(), digest, stored_bytes: None, body };
            store.put_blob(upload).await.unwrap();
            match store.engine.open_cached(&key).map(|blob| blob.source) {
                Some(BlobSource::Memory(bytes)) if is_cached => assert_eq!(bytes, frames),
                None if !is_cached => {}
                other => panic!("{length}: {other:?}"),
            }
        }
    }
}
