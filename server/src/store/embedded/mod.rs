//! The store on one machine: RocksDB for metadata and small blobs, files for the others.
//!
//! ```text
//! DATA/
//!   db/            RocksDB: all rows (see rows.rs), blobs of up to 16 KiB compressed; its LOCK keeps a second
//!                  server out
//!   blobs/00 … ff/ larger blobs, by the first two digits of their digest:
//!                  <digest>-<number, 16 hex digits>-<namespace>
//!                  zstd frames, as they were uploaded or recompressed
//!   staging/       uploads that are not verified yet; emptied at start
//!   tokens/        one file per token (see tokens.rs), and the key of sessions
//!   quarantine/    the last few files that were found damaged
//!   control        socket for commands to the running server (see control.rs)
//! ```
//!
//! Contract: a backup is a data directory (see backup.rs), as is a copy of a stopped server's. Everything else about the
//! layout may change with the format version: older ones are brought to the present one, later ones are refused.
//!
//! A file's number is new for every upload, so that removing an evicted blob's file can never hit the file of
//! the same blob uploaded again.
//!
//! Invariants:
//! - Every file below `blobs` is named by a row of `blobs` or of `doomed`; starting therefore needs no scan.
//! - A row that names a file is written after the file is durable, and deleted before the file goes.
//! - The space account holds at every moment (see ledger.rs). Beyond it the directory holds what RocksDB
//!   works with; [`working_bytes`] of the configured size are kept aside for that.
//!
//! Locks, in order: ledger, then touches or fresh. Whoever writes entries holds the ledger; reads take neither. A
//! reservation is never dropped with the ledger held.
//!
//! Every call that touches RocksDB or a file runs on tokio's blocking threads, but for what is small and in memory
//! (cached.rs): most take microseconds, but a read may wait for the disk and a write for a compaction. A call that was
//! begun runs to its end, even where the request that made it is gone.

mod access;
mod ages;
mod background;
mod backup;
mod cached;
mod database;
mod eviction;
mod ledger;
mod migration;
mod recompress;
mod results;
mod rows;
mod scrub;
mod shares;
mod upload;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cachec_protocol::message::Manifest;
use cachec_protocol::{ActionKey, Digest};

pub use self::background::Background;
pub use self::backup::BackupReport;
use self::database::{Database, Family, is_absent};
use self::ledger::Ledger;
use self::recompress::Fresh;
use self::rows::{BlobHome, BlobRow, Entry};
pub use self::scrub::ScrubReport;
use self::shares::Shares;
use super::{
    BlobLengths, BlobSource, BlobUpload, CHUNK_BYTES, OpenBlob, Publication, PutOutcome, Store, StoreError,
    StoreFuture, StoreStats,
};
use crate::namespace::Namespace;
use crate::policy::Policy;

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// The data directory; created where it does not exist.
    pub directory: PathBuf,
    /// Most bytes that the data directory takes.
    pub max_size_bytes: u64,
    /// Most content bytes of one blob.
    pub max_blob_bytes: u64,
    /// How much each namespace keeps, and for how long.
    pub policy: Arc<Policy>,
}

/// The part of the size that is kept aside for RocksDB's log, memory tables and compactions.
#[must_use]
pub fn working_bytes(max_size_bytes: u64) -> u64 {
    (max_size_bytes / 8).min(256 << 20)
}

/// The store. Cheap to clone; the database closes with the last clone.
#[derive(Clone)]
pub struct Embedded {
    engine: Arc<Engine>,
}

struct Engine {
    database: Database,
    directory: DataDirectory,
    limit_bytes: u64,
    working_bytes: u64,
    max_blob_bytes: u64,
    policy: Arc<Policy>,
    ledger: Mutex<Ledger>,
    /// Last accesses that wait for being applied, with their sequence numbers.
    touches: Mutex<HashMap<Entry, u64>>,
    /// The last sequence number that was given.
    sequence: AtomicU64,
    fresh: Mutex<Fresh>,
    /// Backups that are being made.
    backups: AtomicUsize,
    /// Until when time has passed for the ages of entries.
    last_minute: Mutex<Instant>,
}

/// The paths of a data directory.
#[derive(Debug)]
struct DataDirectory {
    root: PathBuf,
    staging: PathBuf,
    blobs: PathBuf,
    quarantine: PathBuf,
}

impl Embedded {
    /// Opens or creates a store, empties its staging directory and completes interrupted removals.
    ///
    /// # Errors
    /// Those of the file system; a database that another process has open, or of another format version.
    pub fn open(options: &EmbeddedOptions) -> Result<Self, StoreError> {
        let working_bytes = working_bytes(options.max_size_bytes);
        let directory = DataDirectory::create(&options.directory).map_err(StoreError::Write)?;
        let database = Database::open(directory.root.join("db"), working_bytes)?;
        // Only now it is certain that no other server uses the directory.
        directory.empty_staging().map_err(StoreError::Write)?;
        let (totals, shares) = (database.totals()?, read_shares(&database)?);
        let ledger = Ledger { totals, shares, ..Ledger::default() };
        let engine = Engine {
            database,
            directory,
            limit_bytes: options.max_size_bytes.saturating_sub(working_bytes),
            working_bytes,
            max_blob_bytes: options.max_blob_bytes,
            policy: Arc::clone(&options.policy),
            sequence: AtomicU64::new(ledger.totals.sequence),
            ledger: Mutex::new(ledger),
            touches: Mutex::default(),
            fresh: Mutex::default(),
            backups: AtomicUsize::new(0),
            last_minute: Mutex::new(Instant::now()),
        };
        engine.finish_removals()?;
        // The limits may have been lowered.
        engine.keep_limits(&mut engine.ledger())?;
        Ok(Self { engine: Arc::new(engine) })
    }

    /// What is to be done about once a second: recovery from failed writes, access times, entries that are too old,
    /// removals that failed, the sync.
    pub fn maintain(&self) -> StoreFuture<'_, ()> {
        self.run(|engine| {
            engine.recover()?;
            engine.apply_touches(&mut engine.ledger())?;
            engine.advance()?;
            engine.retry_removals()?;
            engine.database.sync()
        })
    }

    /// Brings everything to disk. The last thing that is done with a store.
    ///
    /// # Errors
    /// Those of writing; what was acknowledged may then be forgotten after a power cut.
    pub fn close(&self) -> Result<(), StoreError> {
        let applied = self.engine.apply_touches(&mut self.engine.ledger());
        self.engine.database.close().and(applied)
    }

    /// Starts to compress blobs again at a higher level, in the background, until what is returned is dropped.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn recompress(&self, level: i32) -> io::Result<Background> {
        recompress::start(Arc::clone(&self.engine), level)
    }

    /// Starts to read and check all blobs once in an interval, until what is returned is dropped.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn scrub_every(&self, interval: Duration) -> io::Result<Background> {
        scrub::start(Arc::clone(&self.engine), interval)
    }

    /// Checks everything at once: blobs, files, the account. For a store that nobody else uses.
    pub fn scrub(&self) -> StoreFuture<'_, ScrubReport> {
        self.run(|engine| engine.scrub_all())
    }

    /// Makes a backup under a name that does not exist yet.
    pub fn back_up(&self, to: PathBuf) -> StoreFuture<'_, BackupReport> {
        self.run(move |engine| engine.back_up(&to))
    }

    fn run<T, F>(&self, work: F) -> StoreFuture<'_, T>
    where
        T: Send + 'static,
        F: FnOnce(&Arc<Engine>) -> Result<T, StoreError> + Send + 'static,
    {
        let engine = Arc::clone(&self.engine);
        Box::pin(async move {
            tokio::task::spawn_blocking(move || work(&engine))
                .await
                .unwrap_or_else(|panic| Err(StoreError::Read(io::Error::other(panic))))
        })
    }
}

impl Store for Embedded {
    fn lookup(
        &self,
        namespace: Namespace,
        keys: Vec<ActionKey>,
        limit_bytes: usize,
    ) -> StoreFuture<'_, Vec<Manifest>> {
        match self.engine.lookup_cached(&namespace, &keys, limit_bytes) {
            Some(manifests) => Box::pin(std::future::ready(Ok(manifests))),
            None => self.run(move |engine| engine.lookup(&namespace, &keys, limit_bytes)),
        }
    }

    fn blob_lengths(&self, namespace: Namespace, digest: Digest) -> StoreFuture<'_, Option<BlobLengths>> {
        self.run(move |engine| engine.blob_lengths(&rows::row_key(&namespace, digest.as_bytes())))
    }

    fn open_blob(&self, namespace: Namespace, digest: Digest) -> StoreFuture<'_, Option<OpenBlob>> {
        let key = rows::row_key(&namespace, digest.as_bytes());
        match self.engine.open_cached(&key) {
            Some(blob) => Box::pin(std::future::ready(Ok(Some(blob)))),
            None => self.run(move |engine| engine.open_blob(&key)),
        }
    }

    fn missing_blobs(&self, namespace: Namespace, digests: Vec<Digest>) -> StoreFuture<'_, Vec<Digest>> {
        self.run(move |engine| engine.missing_blobs(&namespace, digests))
    }

    fn put_blob(&self, upload: BlobUpload) -> StoreFuture<'_, PutOutcome> {
        self.run(move |engine| engine.put_blob(upload))
    }

    fn publish(&self, publication: Publication) -> StoreFuture<'_, PutOutcome> {
        self.run(move |engine| engine.publish(&publication))
    }

    fn stats(&self) -> StoreFuture<'_, StoreStats> {
        self.run(|engine| Ok(engine.stats()))
    }
}

impl Engine {
    fn blob_lengths(&self, key: &[u8]) -> Result<Option<BlobLengths>, StoreError> {
        let Some(row) = self.blob_row(key)? else { return Ok(None) };
        self.touch([Entry::blob(key)]);
        Ok(Some(BlobLengths { stored_bytes: row.stored_bytes, content_bytes: row.content_bytes }))
    }

    fn missing_blobs(&self, namespace: &Namespace, digests: Vec<Digest>) -> Result<Vec<Digest>, StoreError> {
        let mut missing = Vec::new();
        let mut present = Vec::new();
        for digest in digests {
            let key = rows::row_key(namespace, digest.as_bytes());
            match self.blob_row(&key)? {
                Some(_) => present.push(Entry::blob(key)),
                None => missing.push(digest),
            }
        }
        self.touch(present);
        Ok(missing)
    }

    /// Opens a blob. Where its file is gone, it was evicted and perhaps uploaded again since the row was read,
    /// so the row is read again; where the row still names the file, the blob is lost.
    fn open_blob(&self, key: &[u8]) -> Result<Option<OpenBlob>, StoreError> {
        loop {
            let Some(row) = self.blob_row(key)? else { return Ok(None) };
            if let Some(source) = self.source(key, &row)? {
                self.touch([Entry::blob(key)]);
                return Ok(Some(OpenBlob { stored_bytes: row.stored_bytes, source }));
            }
            let same = |now: BlobRow| (now.home, now.stored_bytes) == (row.home, row.stored_bytes);
            if self.blob_row(key)?.is_some_and(same) {
                tracing::error!(?row, "a blob's data is missing or cut; it counts as absent from now on");
                self.mark_lost(key, &row)?;
            }
        }
    }

    /// Where a blob's frames are; `None` where they are missing, or of another length than its row says.
    fn source(&self, key: &[u8], row: &BlobRow) -> Result<Option<BlobSource>, StoreError> {
        let source = match row.home {
            BlobHome::Inline => {
                let data = self.database.get(Family::BlobData, key)?;
                data.map(|data| BlobSource::Memory(Bytes::from(data)))
            }
            BlobHome::File(number) => {
                let file = self.directory.open_blob(key, number, row.stored_bytes)?;
                file.map(|file| whole_or_file(file, row.stored_bytes)).transpose()?
            }
            BlobHome::Lost => None,
        };
        let is_whole = |bytes: &Bytes| bytes.len() as u64 == row.stored_bytes;
        Ok(source.filter(|source| !matches!(source, BlobSource::Memory(bytes) if !is_whole(bytes))))
    }

    /// Opens the database again where it failed to write, as soon as the disk has room.
    fn recover(&self) -> Result<(), StoreError> {
        if !self.database.has_failed() {
            return Ok(());
        }
        self.check_disk(0)?;
        let mut ledger = self.ledger();
        tracing::warn!("opening the database again, because it failed to write");
        self.database.reopen()?;
        // What failed may have been written after all.
        ledger.totals = self.database.totals()?;
        let mut shares = read_shares(&self.database)?;
        shares.take_reserved(&ledger.shares);
        ledger.shares = shares;
        ledger.doomed.clear();
        // What is counted as nothing is an upload on its way to its place.
        ledger.stuck = self.doomed_files()?;
        ledger.stuck.retain(|file| file.counted_bytes > 0);
        Ok(())
    }

    fn stats(&self) -> StoreStats {
        let database = self.database.figures();
        let disk_free_bytes = self.disk_free_bytes().unwrap_or_default();
        let ledger = self.ledger();
        StoreStats {
            stored_bytes: ledger.totals.stored_bytes,
            reserved_bytes: ledger.reserved_bytes,
            limit_bytes: self.limit_bytes,
            disk_free_bytes,
            blobs: ledger.totals.blobs,
            results: ledger.totals.results,
            evicted_entries: ledger.evicted_entries,
            evicted_bytes: ledger.evicted_bytes,
            waiting_blobs: self.fresh().keys.len() as u64,
            recompressed_blobs: ledger.recompressed_blobs,
            saved_bytes: ledger.saved_bytes,
            scrubbed_blobs: ledger.scrubbed_blobs,
            damaged_blobs: ledger.damaged_blobs,
            namespace_bytes: self.bytes_by_label(&ledger),
            database,
        }
    }

    /// What is stored, by the patterns of the policy.
    fn bytes_by_label(&self, ledger: &Ledger) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        for (namespace, share) in ledger.shares.iter() {
            *sums.entry(self.policy.label(namespace)).or_default() += share.stored_bytes;
        }
        sums
    }
}

/// What one step of a download would read is read here at once: each step waits for a blocking thread.
fn whole_or_file(mut file: File, length: u64) -> Result<BlobSource, StoreError> {
    if length > CHUNK_BYTES as u64 {
        return Ok(BlobSource::File(file));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
    file.read_to_end(&mut bytes).map_err(StoreError::Read)?;
    Ok(BlobSource::Memory(bytes.into()))
}

fn read_shares(database: &Database) -> Result<Shares, StoreError> {
    let rows = database.all(Family::Namespaces)?;
    let share = |(name, row): (Box<[u8]>, Box<[u8]>)| {
        Ok((rows::key_namespace(&name)?, rows::decode(&row, "namespaces")?))
    };
    Ok(Shares::new(rows.into_iter().map(share).collect::<Result<Vec<_>, StoreError>>()?))
}

impl DataDirectory {
    fn create(root: &Path) -> io::Result<Self> {
        let directory = Self {
            root: root.to_owned(),
            staging: root.join("staging"),
            blobs: root.join("blobs"),
            quarantine: root.join("quarantine"),
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(root)?;
        fs::create_dir_all(&directory.staging)?;
        fs::create_dir_all(&directory.quarantine)?;
        for first in 0..=u8::MAX {
            fs::create_dir_all(directory.blobs.join(format!("{first:02x}")))?;
        }
        File::open(&directory.blobs)?.sync_all()?;
        File::open(root)?.sync_all()?;
        Ok(directory)
    }

    fn empty_staging(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.staging)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    }

    /// The name of the file of a blob row.
    fn blob_name(key: &[u8], number: u64) -> Result<String, StoreError> {
        let digest = Digest::from_bytes(rows::key_digest(key)?);
        let namespace = rows::key_namespace(key)?;
        Ok(format!("{digest}-{number:016x}-{namespace}"))
    }

    fn blob_path(&self, name: &str) -> PathBuf {
        self.blobs.join(name.get(..2).unwrap_or_default()).join(name)
    }

    /// Where the file of a blob row is.
    fn path_of(&self, key: &[u8], number: u64) -> Result<PathBuf, StoreError> {
        Ok(self.blob_path(&Self::blob_name(key, number)?))
    }

    /// Opens a blob's file; `None` where it is missing or of another length than its row says.
    fn open_blob(&self, key: &[u8], number: u64, length: u64) -> Result<Option<File>, StoreError> {
        let opened = File::open(self.path_of(key, number)?)
            .and_then(|file| Ok((file.metadata()?.len() == length).then_some(file)));
        match opened {
            Err(error) if is_absent(&error) => Ok(None),
            opened => opened.map_err(StoreError::Read),
        }
    }
}
