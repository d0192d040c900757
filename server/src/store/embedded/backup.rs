//! Backups: a copy of a store while it is used, in which every entry is whole.
//!
//! RocksDB's files and blobs are linked, not copied, where the backup is on the same file system: none of them is ever
//! written again. Rows are taken first, then the files that they name; a blob that is evicted in between is absent
//! from the backup. A backup is a data directory: a server can be started on it, or on a copy of it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use super::database::{self, Family, is_absent};
use super::rows::{self, BlobHome, BlobRow};
use super::{DataDirectory, Engine};
use crate::store::StoreError;

/// What a backup has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BackupReport {
    /// Blob files.
    pub files: u64,
    /// Those that were evicted while it was made.
    pub evicted: u64,
}

impl std::fmt::Display for BackupReport {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} blob files; {} more were evicted meanwhile", self.files, self.evicted)
    }
}

impl Engine {
    /// Makes a backup. It has its name only when it is complete.
    pub(super) fn back_up(&self, to: &Path) -> Result<BackupReport, StoreError> {
        if to.exists() {
            return Err(StoreError::Write(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "there is something of that name",
            )));
        }
        let parent = to.parent().unwrap_or(to).canonicalize().map_err(StoreError::Write)?;
        if parent.starts_with(self.directory.root.canonicalize().map_err(StoreError::Write)?) {
            return Err(StoreError::Write(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a backup does not belong into the data directory itself",
            )));
        }
        let mut name = to.file_name().unwrap_or_default().to_owned();
        name.push(format!(".partial-{:016x}", self.next_sequence()));
        let partial = to.with_file_name(name);
        DirBuilder::new().mode(0o700).create(&partial).map_err(StoreError::Write)?;
        self.backups.fetch_add(1, Ordering::Relaxed);
        let made = self.fill_backup(&partial);
        self.backups.fetch_sub(1, Ordering::Relaxed);
        let named = made.and_then(|report| {
            let renamed = fs::rename(&partial, to).and_then(|()| sync_directory(to.parent()));
            renamed.map(|()| report).map_err(StoreError::Write)
        });
        named.inspect_err(|_| drop(fs::remove_dir_all(&partial)))
    }

    /// Whether a backup is being made: no blob may get another file meanwhile.
    pub(super) fn is_backing_up(&self) -> bool {
        self.backups.load(Ordering::Relaxed) > 0
    }

    fn fill_backup(&self, partial: &Path) -> Result<BackupReport, StoreError> {
        self.database.checkpoint(&partial.join("db"))?;
        self.copy_tokens(partial).map_err(StoreError::Write)?;
        let target = DataDirectory::create(partial).map_err(StoreError::Write)?;
        let mut report = BackupReport::default();
        database::walk_closed(&partial.join("db"), Family::Blobs, |key, row| {
            let row: BlobRow = rows::decode(row, "blobs")?;
            let BlobHome::File(number) = row.home else { return Ok(()) };
            let name = DataDirectory::blob_name(key, number)?;
            let source = self.directory.blob_path(&name);
            match link_or_copy(&source, &target.blob_path(&name)) {
                Err(error) if is_absent(&error) && !source.exists() => report.evicted += 1,
                linked => {
                    linked.map_err(StoreError::Write)?;
                    report.files += 1;
                }
            }
            Ok(())
        })?;
        for first in 0..=u8::MAX {
            sync_directory(Some(&target.blobs.join(format!("{first:02x}")))).map_err(StoreError::Write)?;
        }
        sync_directory(Some(partial)).map_err(StoreError::Write)?;
        Ok(report)
    }

    fn copy_tokens(&self, partial: &Path) -> io::Result<()> {
        let source: PathBuf = self.directory.root.join("tokens");
        let target = partial.join("tokens");
        DirBuilder::new().mode(0o700).create(&target)?;
        if !source.exists() {
            return Ok(());
        }
        for entry in fs::read_dir(source)? {
            let entry = entry?;
            // With its mode. One that is being written has another name in a moment.
            let copied = target.join(entry.file_name());
            match fs::copy(entry.path(), &copied) {
                Err(error) if is_absent(&error) => {}
                done => {
                    done?;
                    File::open(&copied)?.sync_all()?;
                }
            }
        }
        sync_directory(Some(&target))
    }
}

fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Err(error) if !is_absent(&error) => {
            fs::copy(from, to)?;
            File::open(to)?.sync_all()
        }
        linked => linked,
    }
}

fn sync_directory(directory: Option<&Path>) -> io::Result<()> {
    directory.map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}
