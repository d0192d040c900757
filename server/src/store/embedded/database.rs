//! RocksDB: how it is opened, and rows in and out of it.
//!
//! Sync policy: a write is in the operating system's hands when it returns, so a killed process loses nothing.
//! [`Database::sync`] makes what was written survive a power cut; the store calls it before a file is renamed
//! into place or removed, once a second, and when it closes. After a power cut the database is as it was at
//! some moment between its last sync and the cut: newest entries may be forgotten, none is half there.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use cachec_protocol::codec::{self, Message};
use minicbor::{Decode, Encode};
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, Direction, IteratorMode, Options,
    ReadOptions, ReadTier, WriteBatch, properties,
};

use super::migration;
use super::rows::{self, FORMAT_VERSION, ScrubRow, Totals};
use crate::store::{CHUNK_BYTES, StoreError};

/// Memory that all column families share for blocks that were read.
const BLOCK_CACHE_BYTES: usize = 64 << 20;

/// Descriptors that RocksDB may hold.
const MAX_OPEN_FILES: i32 = 512;

/// RocksDB's own log: this many files of this size.
const INFO_LOG_FILES: usize = 2;
const INFO_LOG_BYTES: usize = 1 << 20;

/// RocksDB's list of its files is written anew when it is this long.
const MANIFEST_BYTES: usize = 1 << 20;

/// Memory tables grow by this much. A family's first block counts, so larger ones would have small stores flush all the
/// time, and each flush begins a log.
const ARENA_BLOCK_BYTES: usize = 16 << 10;

/// Files of a family that wait for a compaction: it begins at the first number, writes wait from the last one on. So
/// what is deleted and not gone yet has a bound, however fast entries come and go.
const WAITING_FILES: [i32; 3] = [4, 8, 12];

/// The column families; what is in them is described in [`rows`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Blobs,
    BlobData,
    Manifests,
    Results,
    ResultRows,
    ActionFields,
    Recency,
    Namespaces,
    Ages,
    Doomed,
}

impl Family {
    const ALL: [Self; 10] = [
        Self::Blobs,
        Self::BlobData,
        Self::Manifests,
        Self::Results,
        Self::ResultRows,
        Self::ActionFields,
        Self::Recency,
        Self::Namespaces,
        Self::Ages,
        Self::Doomed,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Blobs => "blobs",
            Self::BlobData => "blob_data",
            Self::Manifests => "manifests",
            Self::Results => "results",
            Self::ResultRows => "result_rows",
            Self::ActionFields => "action_fields",
            Self::Recency => "recency",
            Self::Namespaces => "namespaces",
            Self::Ages => "ages",
            Self::Doomed => "doomed",
        }
    }
}

/// Where a value may be read from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Whereabouts {
    /// From disk, if need be.
    Anywhere,
    /// From memory, what is short, without waiting for anything.
    Memory,
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
        handle(self.db()?, family)
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

    /// Passes all rows of a family. Writes go on meanwhile, and are not seen.
    pub(super) fn walk(
        &self,
        family: Family,
        pass: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        walk(self.read().db()?, family, pass)
    }

    /// How far scrubbing is.
    pub(super) fn scrub_row(&self) -> Result<Option<ScrubRow>, StoreError> {
        let bytes = self.read().db()?.get("scrub").map_err(StoreError::database_read)?;
        bytes.map(|bytes| rows::decode(&bytes, "scrub")).transpose()
    }

    pub(super) fn put_scrub_row(&self, row: &ScrubRow) -> Result<(), StoreError> {
        self.watch(self.read().db()?.put("scrub", codec::encode(row)))
    }

    /// Writes a copy that shares its files with this database. The directory must not exist.
    pub(super) fn checkpoint(&self, directory: &Path) -> Result<(), StoreError> {
        let open = self.read();
        let checkpoint = Checkpoint::new(open.db()?).map_err(StoreError::database_read)?;
        checkpoint.create_checkpoint(directory).map_err(StoreError::database_write)
    }

    /// A value as it is stored.
    pub(super) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.get_from(Whereabouts::Anywhere, family, key)
    }

    /// A value as it is stored. That it cannot be told from memory alone, or is long, is an error there.
    pub(super) fn get_from(
        &self,
        whereabouts: Whereabouts,
        family: Family,
        key: &[u8],
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let mut options = ReadOptions::default();
        let open = match whereabouts {
            Whereabouts::Anywhere => self.read(),
            Whereabouts::Memory => {
                options.set_read_tier(ReadTier::BlockCache);
                Open(self.db.try_read().map_err(|_| StoreError::Read(io::ErrorKind::WouldBlock.into()))?)
            }
        };
        let value = open.db()?.get_pinned_cf_opt(open.family(family)?, key, &options);
        let value = value.map_err(StoreError::database_read)?;
        let is_long = value.as_ref().is_some_and(|value| value.len() > CHUNK_BYTES);
        if matches!(whereabouts, Whereabouts::Memory) && is_long {
            return Err(StoreError::Read(io::ErrorKind::WouldBlock.into()));
        }
        Ok(value.map(|value| value.to_vec()))
    }

    /// A value that is in memory, if it is.
    pub(super) fn cached(&self, family: Family, key: &[u8]) -> Option<Vec<u8>> {
        self.get_from(Whereabouts::Memory, family, key).ok()?
    }

    /// As [`Self::cached`], decoded.
    pub(super) fn cached_row<T: Message + for<'b> Decode<'b, ()>>(
        &self,
        family: Family,
        key: &[u8],
    ) -> Option<T> {
        rows::decode(&self.cached(family, key)?, family.name()).ok()
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

    /// The last row at or before `key`, decoded.
    pub(super) fn last_row<T: Message + for<'b> Decode<'b, ()>>(
        &self,
        family: Family,
        key: &[u8],
    ) -> Result<Option<T>, StoreError> {
        let open = self.read();
        let from = IteratorMode::From(key, Direction::Reverse);
        let last = open.db()?.iterator_cf(open.family(family)?, from).next().transpose();
        let last = last.map_err(StoreError::database_read)?;
        last.map(|(_, bytes)| rows::decode(&bytes, family.name())).transpose()
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
    let options = database_options(working_bytes);
    let mut names: BTreeSet<String> =
        Family::ALL.into_iter().map(|family| family.name().to_owned()).collect();
    names.insert(rocksdb::DEFAULT_COLUMN_FAMILY_NAME.to_owned());
    // RocksDB opens a database with all of its families only.
    if directory.join("CURRENT").exists() {
        names.extend(DB::list_cf(&options, directory).map_err(StoreError::database_read)?);
    }
    let families =
        names.into_iter().map(|name| ColumnFamilyDescriptor::new(name, family_options(working_bytes, cache)));
    let mut db = DB::open_cf_descriptors(&options, directory, families).map_err(StoreError::database_read)?;
    match db.get("format").map_err(StoreError::database_read)?.as_deref() {
        None => db.put("format", [FORMAT_VERSION]).map_err(StoreError::database_write)?,
        Some([FORMAT_VERSION]) => {}
        Some([1]) => migration::from_version_1(&db)?,
        Some(_) => return Err(StoreError::DamagedRow("format: written by another version of cachec-server")),
    }
    migration::drop_old_families(&mut db)?;
    Ok(db)
}

/// Passes all rows of a family in a database that nobody has open.
pub(super) fn walk_closed(
    directory: &Path,
    family: Family,
    pass: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let db = DB::open_cf_for_read_only(&Options::default(), directory, [family.name()], false)
        .map_err(StoreError::database_read)?;
    walk(&db, family, pass)
}

/// Passes all rows of a family.
pub(super) fn walk(
    db: &DB,
    family: Family,
    mut pass: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    for row in db.iterator_cf(handle(db, family)?, IteratorMode::Start) {
        let (key, value) = row.map_err(StoreError::database_read)?;
        pass(&key, &value)?;
    }
    Ok(())
}

/// A family of an open database: every one was opened or created with it.
pub(super) fn handle(db: &DB, family: Family) -> Result<&ColumnFamily, StoreError> {
    db.cf_handle(family.name()).ok_or(StoreError::DamagedRow("column family"))
}

/// What logs may take together, memory tables together, and a table.
fn part_bytes(working_bytes: u64) -> u64 {
    (working_bytes / 4).clamp(1 << 20, 64 << 20)
}

fn database_options(working_bytes: u64) -> Options {
    let part = part_bytes(working_bytes);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_total_wal_size(part);
    // Or else each log stays until the last family that is in it was flushed, all of them with what they will ever take.
    options.set_atomic_flush(true);
    options.set_db_write_buffer_size(usize::try_from(part).unwrap_or(64 << 20));
    options.set_max_open_files(MAX_OPEN_FILES);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(INFO_LOG_FILES);
    options.set_max_log_file_size(INFO_LOG_BYTES);
    options.set_max_manifest_file_size(MANIFEST_BYTES);
    options.set_manifest_preallocation_size(64 << 10);
    options.set_wal_bytes_per_sync(1 << 20);
    options
}

fn family_options(working_bytes: u64, cache: &Cache) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_bloom_filter(10.0, false);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(16 << 20);
    // A compaction takes that much for each of its files in advance.
    options.set_target_file_size_base(part_bytes(working_bytes));
    options.set_arena_block_size(ARENA_BLOCK_BYTES);
    options.set_level_compaction_dynamic_level_bytes(true);
    let [begin, slow, stop] = WAITING_FILES;
    options.set_level_zero_file_num_compaction_trigger(begin);
    options.set_level_zero_slowdown_writes_trigger(slow);
    options.set_level_zero_stop_writes_trigger(stop);
    // Entries go as often as they come, and the row that deletes one is far shorter than what it deletes: files
    // with many such rows are compacted early, so that neither space nor the search for the oldest entry suffers.
    options.add_compact_on_deletion_collector_factory(10_000, 5_000, 0.5);
    options
}

/// Whether an I/O error says that there is nothing of that name.
pub(super) fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}
