//! Scrubbing: everything is read and checked once in a while, so that what has rotted is found before a build asks for
//! it, and is compiled again in time.
//!
//! One thread at the lowest priority walks over all blobs, slowly, and rests while a build uploads. How far it is, is
//! kept, so that a restart does not begin anew. A blob that is not what it is named by counts as absent from then on;
//! its file goes to `quarantine`, where somebody may look at it.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use cachec_protocol::pack::Decompressor;

use super::background::{Background, End};
use super::database::Family;
use super::rows::{self, BlobHome, BlobRow, ResultRow, ScrubRow};
use super::{DataDirectory, Engine};
use crate::namespace::Namespace;
use crate::store::{BlobSource, StoreError};

/// Bytes between two looks at whether to stop, or to rest.
const STEP_BYTES: usize = 256 << 10;

/// The slowest that it reads; faster where that would not do within the interval.
const LEAST_BYTES_PER_SECOND: u64 = 2 << 20;

/// How often the thread looks whether a pass is due.
const REST: Duration = Duration::from_secs(1);

/// After a failure, of which there may be many.
const REST_AFTER_FAILURE: Duration = Duration::from_secs(60);

/// Files that are kept in quarantine, and the part of RocksDB's share of the size that they may take.
const MAX_QUARANTINED: usize = 8;
const QUARANTINE_PART: u64 = 8;

/// What a whole pass found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Blobs that were checked.
    pub blobs: u64,
    /// Their compressed bytes.
    pub bytes: u64,
    /// Those that were not what they should be.
    pub damaged: u64,
    /// Files that no row names; they are removed.
    pub orphans: u64,
    /// Bytes by which the accounts differ from what is there.
    pub miscounted_bytes: u64,
}

impl ScrubReport {
    /// Whether everything was as it should be.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.damaged == 0 && self.orphans == 0 && self.miscounted_bytes == 0
    }
}

impl std::fmt::Display for ScrubReport {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { blobs, bytes, damaged, orphans, miscounted_bytes } = self;
        write!(
            formatter,
            "{blobs} blobs of {bytes} bytes checked, {damaged} damaged, {orphans} files without an entry, \
             {miscounted_bytes} bytes miscounted"
        )
    }
}

/// Starts to scrub everything once in an interval.
pub(super) fn start(engine: Arc<Engine>, interval: Duration) -> io::Result<Background> {
    Background::start("scrub", move |end| Worker { engine, interval, end }.run())
}

struct Worker {
    engine: Arc<Engine>,
    interval: Duration,
    end: End,
}

impl Worker {
    fn run(self) {
        while !self.end.has_come() {
            let worked = self.step();
            if let Err(error) = &worked {
                tracing::warn!(%error, "scrubbing rests");
                self.end.rest(REST_AFTER_FAILURE);
            }
        }
    }

    /// Checks one blob, or rests where none is due.
    fn step(&self) -> Result<(), StoreError> {
        let engine = &self.engine;
        let minutes = engine.ledger().totals.age_minutes;
        let mut pass = engine.database.scrub_row()?.unwrap_or_default();
        let is_due = !pass.is_over || minutes >= pass.began_minutes + self.interval.as_secs() / 60;
        if !is_due || engine.is_busy() {
            self.end.rest(REST);
            return Ok(());
        }
        if pass.is_over {
            pass = ScrubRow { began_minutes: minutes, ..ScrubRow::default() };
        }
        match engine.database.first_key(Family::Blobs, &pass.next)? {
            None => {
                tracing::info!("all blobs were scrubbed");
                pass.is_over = true;
            }
            Some(key) => {
                let read = engine.scrub(&key, || self.end.has_come());
                // One that cannot be read must not keep the others from being checked.
                let failed = |error: &StoreError| tracing::warn!(%error, "a blob cannot be scrubbed");
                let read_bytes = read.inspect_err(failed).ok().flatten().unwrap_or_default();
                self.end.rest(self.pause(read_bytes));
                // The key that follows it.
                pass.next = [key.as_slice(), &[0]].concat();
            }
        }
        if self.end.has_come() { Ok(()) } else { engine.database.put_scrub_row(&pass) }
    }

    /// How long reading so much should have taken.
    fn pause(&self, read_bytes: u64) -> Duration {
        let stored_bytes = self.engine.ledger().totals.stored_bytes;
        // Twice as fast as would do.
        let needed = 2 * stored_bytes / self.interval.as_secs().max(1);
        let bytes_per_second = needed.max(LEAST_BYTES_PER_SECOND);
        Duration::from_micros(read_bytes.saturating_mul(1_000_000) / bytes_per_second)
    }
}

impl Engine {
    /// Whether a build is uploading, or a backup is being made.
    pub(super) fn is_busy(&self) -> bool {
        self.ledger().reserved_bytes > 0 || self.fresh().is_growing() || self.is_backing_up()
    }

    /// Reads and checks a blob; `None` where there is none, or `is_over` said so in between.
    pub(super) fn scrub(&self, key: &[u8], is_over: impl Fn() -> bool) -> Result<Option<u64>, StoreError> {
        let Some(row) = self.blob_row(key)? else { return Ok(None) };
        let source = self.source(key, &row)?;
        let is_whole = match source {
            None => Some(false),
            Some(BlobSource::Memory(bytes)) => is_whole(bytes.as_ref(), key, &row, is_over)?,
            Some(BlobSource::File(file)) => is_whole(file, key, &row, is_over)?,
        };
        match is_whole {
            None => return Ok(None),
            Some(true) => {}
            // Evicted, or compressed again, since its row was read.
            Some(false) if self.blob_row(key)?.is_none_or(|now| now.home != row.home) => return Ok(None),
            Some(false) => self.quarantine(key, &row)?,
        }
        self.ledger().scrubbed_blobs += 1;
        Ok(Some(row.stored_bytes))
    }

    /// Has a blob that is not what it should be count as absent from now on, unless it changed meanwhile.
    pub(super) fn quarantine(&self, key: &[u8], seen: &BlobRow) -> Result<(), StoreError> {
        let name = match seen.home {
            BlobHome::File(number) => Some(DataDirectory::blob_name(key, number)?),
            _ => None,
        };
        tracing::error!(name, ?seen, "a blob is damaged; it counts as absent from now on");
        self.ledger().damaged_blobs += 1;
        if let Some(name) = name {
            // Another name beside the old one, which goes with the row; in the order of finding.
            let kept = self.directory.quarantine.join(format!("{:016x}-{name}", self.next_sequence()));
            if let Err(error) = fs::hard_link(self.directory.blob_path(&name), kept) {
                tracing::warn!(name, %error, "the damaged file is not kept");
            }
            self.directory.shorten_quarantine(self.working_bytes / QUARANTINE_PART);
        }
        self.mark_lost(key, seen)
    }

    /// Checks everything, at full speed and while nothing else happens.
    pub(super) fn scrub_all(&self) -> Result<ScrubReport, StoreError> {
        let mut report = ScrubReport::default();
        let damaged_before = self.ledger().damaged_blobs;
        let mut from = Vec::new();
        while let Some(key) = self.database.first_key(Family::Blobs, &from)? {
            if let Some(bytes) = self.scrub(&key, || false)? {
                report.blobs += 1;
                report.bytes += bytes;
            }
            from = [key.as_slice(), &[0]].concat();
        }
        report.damaged = self.ledger().damaged_blobs - damaged_before;
        report.orphans = self.remove_orphans()?;
        report.miscounted_bytes = self.miscounted_bytes()?;
        Ok(report)
    }

    /// By how much the accounts of the store and of all namespaces differ from the entries.
    fn miscounted_bytes(&self) -> Result<u64, StoreError> {
        let mut counted: HashMap<Namespace, u64> = HashMap::new();
        let mut count = |key: &[u8], charge_bytes: u64| {
            *counted.entry(rows::key_namespace(key)?).or_default() += charge_bytes;
            Ok::<_, StoreError>(())
        };
        self.database.walk(Family::Blobs, |key, row| {
            count(key, rows::decode::<BlobRow>(row, "blobs")?.charge_bytes())
        })?;
        self.database.walk(Family::ResultRows, |key, row| {
            count(key, rows::decode::<ResultRow>(row, "result_rows")?.charge_bytes)
        })?;
        let ledger = self.ledger();
        let total: u64 = counted.values().sum();
        let mut difference = total.abs_diff(ledger.totals.stored_bytes);
        for (namespace, share) in ledger.shares.iter() {
            difference += share.stored_bytes.abs_diff(counted.remove(namespace).unwrap_or_default());
        }
        Ok(difference + counted.values().sum::<u64>())
    }

    /// Removes the files that no row names.
    fn remove_orphans(&self) -> Result<u64, StoreError> {
        let mut orphans = 0;
        for directory in fs::read_dir(&self.directory.blobs).map_err(StoreError::Read)? {
            let directory = directory.map_err(StoreError::Read)?.path();
            for entry in fs::read_dir(directory).map_err(StoreError::Read)? {
                let path = entry.map_err(StoreError::Read)?.path();
                if !self.is_named(&path.file_name().unwrap_or_default().to_string_lossy())? {
                    tracing::error!(file = %path.display(), "no entry names this file; it is removed");
                    fs::remove_file(&path).map_err(StoreError::Write)?;
                    orphans += 1;
                }
            }
        }
        Ok(orphans)
    }

    /// Whether a row names a blob file.
    fn is_named(&self, name: &str) -> Result<bool, StoreError> {
        let mut parts = name.splitn(3, '-');
        let (Some(digest), Some(number), Some(namespace)) = (parts.next(), parts.next(), parts.next()) else {
            return Ok(false);
        };
        let (Ok(digest), Ok(number), Ok(namespace)) =
            (digest.parse::<cachec_protocol::Digest>(), u64::from_str_radix(number, 16), namespace.parse())
        else {
            return Ok(false);
        };
        let row = self.blob_row(&rows::row_key(&namespace, digest.as_bytes()))?;
        Ok(row.is_some_and(|row| row.home == BlobHome::File(number))
            || self.database.get(Family::Doomed, name.as_bytes())?.is_some())
    }
}

impl DataDirectory {
    /// Removes the files from quarantine that were found first.
    fn shorten_quarantine(&self, most_bytes: u64) {
        let entries = fs::read_dir(&self.quarantine).into_iter().flatten().flatten();
        let with_size = |entry: fs::DirEntry| Some((entry.path(), entry.metadata().ok()?.len()));
        let mut files: Vec<_> = entries.filter_map(with_size).collect();
        files.sort_unstable();
        let mut kept_bytes = 0;
        for (number, (path, bytes)) in files.iter().rev().enumerate() {
            kept_bytes += rows::file_bytes(*bytes);
            if number >= MAX_QUARANTINED || kept_bytes > most_bytes {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Whether frames decompress to the content that a key names; `None` where `is_over` said so in between.
fn is_whole(
    frames: impl Read,
    key: &[u8],
    row: &BlobRow,
    is_over: impl Fn() -> bool,
) -> Result<Option<bool>, StoreError> {
    let mut content = Decompressor::new(frames, row.content_bytes).map_err(StoreError::Read)?;
    let mut buffer = vec![0; STEP_BYTES];
    loop {
        if is_over() {
            return Ok(None);
        }
        match content.read(&mut buffer) {
            Ok(0) => break,
            Ok(_) => {}
            Err(_) => return Ok(Some(false)),
        }
    }
    let Ok((digest, content_bytes)) = content.finish() else { return Ok(Some(false)) };
    Ok(Some(content_bytes == row.content_bytes && *digest.as_bytes() == rows::key_digest(key)?))
}
