//! RocksDB: how it is opened, and rows in and out of it.
//!
//! Sync policy: a write is in the operating system's hands when it returns, so a killed process loses nothing.
//! [`Database::sync`] makes what was written survive a power cut; the store calls it before a file is renamed
//! into place or removed, once a second, and when it closes. After a power cut the database is as it was at
//! some moment between its last sync and the cut: newest entries may be forgotten, none is half there.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use cachec_protocol::codec::{self, Message};
use minicbor::{Decode, Encode};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, Direction, IteratorMode, Options,
    WriteBatch, properties,
};

use super::rows::{self, FORMAT_VERSION, Totals};
use crate::store::StoreError;

/// Memory that all column families share for blocks that were read.
const BLOCK_CACHE_BYTES: usize = 64 << 20;

/// Descriptors that RocksDB may hold.
const MAX_OPEN_FILES: i32 = 512;

/// RocksDB's own log: this many files of this size.
const INFO_LOG_FILES: usize = 2;
const INFO_LOG_BYTES: usize = 1 << 20;

/// The column families; what is in them is described in [`rows`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Blobs,
    BlobData,
    Manifests,
    Results,
    ResultRows,
    ActionFields,
    Lru,
    Doomed,
}

impl Family {
    const ALL: [Self; 8] = [
        Self::Blobs,
        Self::BlobData,
        Self::Manifests,
        Self::Results,
        Self::ResultRows,
        Self::ActionFields,
        Self::Lru,
        Self::Doomed,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Blobs => "blobs",
            Self::BlobData => "blob_data",
            Self::Manifests => "manifests",
            Self::Results => "results",
            Self::ResultRows => "result_rows",
            Self::ActionFields => "action_fields",
            Self::Lru => "lru",
            Self::Doomed => "doomed",
        }
    }
}

/// A key and its value.
pub(super) type Row = (Box<[u8]>, Box<[u8]>);

/// The open database. One process at a time: RocksDB holds a lock file.
///
/// RocksDB stays in an error state when its log cannot be written, as on a full disk: it reads on and refuses
/// to write. Only opening it again ends that, which [`Database::reopen`] does.
pub(super) struct Database {
    directory: PathBuf,
    working_bytes: u64,
    cache: Cache,
    /// `None` where opening it again failed. The lock is only held for single calls, exclusively only to open.
    db: RwLock<Option<DB>>,
    has_failed: AtomicBool,
}

/// The database for the time of one call.
struct Open<'d>(RwLockReadGuard<'d, Option<DB>>);

impl Open<'_> {
    fn db(&self) -> Result<&DB, StoreError> {
        self.0.as_ref().ok_or_else(|| StoreError::Read(io::Error::other("the database is not open")))
    }

    fn family(&self, family: Family) -> Result<&ColumnFamily, StoreError> {
        // Every family was opened or created with the database.
        self.db()?.cf_handle(family.name()).ok_or(StoreError::DamagedRow("column family"))
    }
}

impl Database {
    /// Opens or creates it. RocksDB's log and memory tables together stay below `working_bytes`.
    pub(super) fn open(directory: PathBuf, working_bytes: u64) -> Result<Self, StoreError> {
        let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES);
        let db = open(&directory, working_bytes, &cache)?;
        let (db, has_failed) = (RwLock::new(Some(db)), AtomicBool::new(false));
        Ok(Self { directory, working_bytes, cache, db, has_failed })
    }

    /// Whether a write failed since it was opened.
    pub(super) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }

    /// Closes it and opens it again, with everything that was written. Reads wait meanwhile.
    pub(super) fn reopen(&self) -> Result<(), StoreError> {
        let mut slot = self.db.write().unwrap_or_else(PoisonError::into_inner);
        // The lock file allows only one at a time.
        drop(slot.take());
        *slot = Some(open(&self.directory, self.working_bytes, &self.cache)?);
        self.has_failed.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn read(&self) -> Open<'_> {
        Open(self.db.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Remembers that a write failed.
    fn watch<T>(&self, written: Result<T, rocksdb::Error>) -> Result<T, StoreError> {
        written.map_err(|error| {
            self.has_failed.store(true, Ordering::Relaxed);
            StoreError::database_write(error)
        })
    }

    /// The totals as of the last batch.
    pub(super) fn totals(&self) -> Result<Totals, StoreError> {
        match self.read().db()?.get_pinned("totals").map_err(StoreError::database_read)? {
            Some(bytes) => rows::decode(&bytes, "totals"),
            None => Ok(Totals::default()),
        }
    }

    /// A value as it is stored.
    pub(super) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let open = self.read();
        open.db()?.get_cf(open.family(family)?, key).map_err(StoreError::database_read)
    }

    /// A small row, decoded.
    pub(super) fn get_row<T: Message + for<'b> Decode<'b, ()>>(
        &self,
        family: Family,
        key: &[u8],
    ) -> Result<Option<T>, StoreError> {
        self.get(family, key)?.map(|bytes| rows::decode(&bytes, family.name())).transpose()
    }

    /// The first key at or after `from`.
    pub(super) fn first_key(&self, family: Family, from: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let open = self.read();
        let from = IteratorMode::From(from, Direction::Forward);
        let first = open.db()?.iterator_cf(open.family(family)?, from).next().transpose();
        Ok(first.map_err(StoreError::database_read)?.map(|(key, _)| key.into_vec()))
    }

    /// All rows of a family that is known to be small.
    pub(super) fn all(&self, family: Family) -> Result<Vec<Row>, StoreError> {
        let open = self.read();
        let rows = open.db()?.iterator_cf(open.family(family)?, IteratorMode::Start);
        rows.collect::<Result<_, _>>().map_err(StoreError::database_read)
    }

    /// Begins a batch.
    pub(super) fn batch(&self) -> Batch<'_> {
        Batch { database: self, writes: WriteBatch::default() }
    }

    /// Makes everything written so far survive a power cut.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        self.watch(self.read().db()?.flush_wal(true))
    }

    /// Stops compactions, then syncs.
    pub(super) fn close(&self) -> Result<(), StoreError> {
        self.read().db()?.cancel_all_background_work(true);
        self.sync()
    }

    /// RocksDB's figures, summed over the families.
    pub(super) fn figures(&self) -> Vec<(&'static str, u64)> {
        let open = self.read();
        let sum = |property: &properties::PropName| {
            Family::ALL
                .into_iter()
                .filter_map(|family| {
                    open.db().ok()?.property_int_value_cf(open.family(family).ok()?, property).ok()?
                })
                .fold(0, u64::saturating_add)
        };
        let whole = |property: &properties::PropName| {
            open.db().ok().and_then(|db| db.property_int_value(property).ok()?).unwrap_or_default()
        };
        vec![
            ("rocksdb_memtable_bytes", sum(properties::CUR_SIZE_ALL_MEM_TABLES)),
            ("rocksdb_estimated_keys", sum(properties::ESTIMATE_NUM_KEYS)),
            ("rocksdb_live_sst_bytes", sum(properties::LIVE_SST_FILES_SIZE)),
            ("rocksdb_table_readers_bytes", sum(properties::ESTIMATE_TABLE_READERS_MEM)),
            ("rocksdb_pending_compaction_bytes", sum(properties::ESTIMATE_PENDING_COMPACTION_BYTES)),
            ("rocksdb_block_cache_bytes", self.cache.get_usage() as u64),
            ("rocksdb_background_errors", whole(properties::BACKGROUND_ERRORS)),
            ("rocksdb_write_stopped", whole(properties::IS_WRITE_STOPPED)),
        ]
    }
}

/// Changes that are applied together or not at all.
pub(super) struct Batch<'d> {
    database: &'d Database,
    writes: WriteBatch,
}

impl Batch<'_> {
    pub(super) fn put(&mut self, family: Family, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.writes.put_cf(self.database.read().family(family)?, key, value);
        Ok(())
    }

    pub(super) fn put_row<T: Encode<()>>(
        &mut self,
        family: Family,
        key: &[u8],
        row: &T,
    ) -> Result<(), StoreError> {
        self.put(family, key, &codec::encode(row))
    }

    pub(super) fn delete(&mut self, family: Family, key: &[u8]) -> Result<(), StoreError> {
        self.writes.delete_cf(self.database.read().family(family)?, key);
        Ok(())
    }

    pub(super) fn put_totals(&mut self, totals: &Totals) {
        self.writes.put("totals", codec::encode(totals));
    }

    pub(super) fn write(self) -> Result<(), StoreError> {
        self.database.watch(self.database.read().db()?.write(self.writes))
    }
}

fn open(directory: &Path, working_bytes: u64, cache: &Cache) -> Result<DB, StoreError> {
    let families = Family::ALL
        .into_iter()
        .map(Family::name)
        .chain([rocksdb::DEFAULT_COLUMN_FAMILY_NAME])
        .map(|name| ColumnFamilyDescriptor::new(name, family_options(cache)));
    let db = DB::open_cf_descriptors(&database_options(working_bytes), directory, families)
        .map_err(StoreError::database_read)?;
    match db.get("format").map_err(StoreError::database_read)? {
        None => db.put("format", [FORMAT_VERSION]).map_err(StoreError::database_write)?,
        Some(version) if version == [FORMAT_VERSION] => {}
        Some(_) => return Err(StoreError::DamagedRow("format: written by another version of cachec-server")),
    }
    Ok(db)
}

fn database_options(working_bytes: u64) -> Options {
    let part = (working_bytes / 4).clamp(1 << 20, 64 << 20);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_total_wal_size(part);
    options.set_db_write_buffer_size(usize::try_from(part).unwrap_or(64 << 20));
    options.set_max_open_files(MAX_OPEN_FILES);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(INFO_LOG_FILES);
    options.set_max_log_file_size(INFO_LOG_BYTES);
    options.set_max_manifest_file_size(4 << 20);
    options.set_wal_bytes_per_sync(1 << 20);
    options
}

fn family_options(cache: &Cache) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_bloom_filter(10.0, false);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(16 << 20);
    options.set_level_compaction_dynamic_level_bytes(true);
    // Entries go as often as they come, and the row that deletes one is far shorter than what it deletes: files
    // with many such rows are compacted early, so that neither space nor the search for the oldest entry suffers.
    options.add_compact_on_deletion_collector_factory(10_000, 5_000, 0.5);
    options
}

/// Whether an I/O error says that there is nothing of that name.
pub(super) fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}
