//! Small blobs that are in memory: read where they are asked for, since changing threads takes longer than reading.
//!
//! Nothing here waits: not for the disk (RocksDB and the kernel are told to answer from their caches alone), nor for a
//! lock that is held for long. What cannot be had so is read on another thread.

use std::fs::File;
use std::io::IoSliceMut;
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::ReadWriteFlags;

use super::Engine;
use super::database::Family;
use super::rows::{BlobHome, BlobRow};
use crate::store::{BlobSource, CHUNK_BYTES, OpenBlob};

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
        let is_noted = self.touch_now(key);
        is_noted.then_some(OpenBlob { stored_bytes: row.stored_bytes, source: BlobSource::Memory(data) })
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
    use cachec_protocol::Digest;
    use cachec_protocol::pack::{self, UPLOAD_LEVEL};

    use super::*;
    use crate::store::embedded::rows::row_key;
    use crate::store::embedded::{Embedded, EmbeddedOptions};
    use crate::store::{BlobUpload, Store};

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

    #[tokio::test]
    async fn small_blobs_are_read_at_once_and_others_are_left() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(&EmbeddedOptions {
            directory: directory.path().to_owned(),
            max_size_bytes: 64 << 20,
            max_blob_bytes: 8 << 20,
            policy: std::sync::Arc::default(),
        })
        .unwrap();
        let namespace: crate::namespace::Namespace = "main".parse().unwrap();
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
