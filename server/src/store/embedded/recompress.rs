//! Recompression: what was uploaded at a cheap level is compressed again at a high one, in the background.
//!
//! One thread at the lowest priority takes one blob after the other: those that an earlier process left as they came,
//! then those that come. It rests while a build uploads. Blobs in the database are too small to gain anything.
//!
//! Invariants:
//! - A blob is visible at every moment, with its old bytes or its new ones; a download of the old ones runs to its end.
//! - New bytes are reserved before they are written, as an upload's are: a full store evicts its oldest for them.
//! - What is read is verified: a blob that has rotted counts as absent from then on.
//!
//! Memory: zstd's tables and window, which grow with level and pack; 100 MiB at level 19 for ripgrep's packs.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cachec_protocol::pack::{self, Decompressor, Length};

use super::Engine;
use super::background::{Background, End};
use super::database::Family;
use super::eviction::doom_data;
use super::ledger::Ledger;
use super::rows::{self, BlobHome, BlobRow};
use super::upload::{Staged, put_data};
use crate::store::{PutOutcome, StoreError};

/// How often the thread looks for something to do.
const REST: Duration = Duration::from_secs(1);

/// A build that has uploaded nothing for so long is taken to be over.
const QUIET: Duration = Duration::from_secs(10);

/// After a failure, of which there may be many.
const REST_AFTER_FAILURE: Duration = Duration::from_secs(60);

/// Bytes between two looks at whether to stop: a fifth of a second at level 19.
const STEP_BYTES: usize = 256 << 10;

/// More blobs than this wait for the next start.
const MAX_FRESH: usize = 1 << 16;

/// Blobs that came as files and wait for being recompressed.
#[derive(Debug, Default)]
pub(super) struct Fresh {
    pub(super) keys: VecDeque<Vec<u8>>,
    last_upload: Option<Instant>,
}

impl Fresh {
    pub(super) fn is_growing(&self) -> bool {
        self.last_upload.is_some_and(|last| last.elapsed() < QUIET)
    }
}

/// Starts to compress again.
pub(super) fn start(engine: Arc<Engine>, level: i32) -> io::Result<Background> {
    Background::start("recompression", move |end| {
        Worker { engine, level, end, walked: Some(Vec::new()) }.run();
    })
}

struct Worker {
    engine: Arc<Engine>,
    level: i32,
    end: End,
    /// How far the walk over all blobs is; `None` at its end.
    walked: Option<Vec<u8>>,
}

/// What came of one blob.
enum Outcome {
    Smaller,
    NotSmaller,
    Damaged,
    Interrupted,
}

impl Worker {
    fn run(mut self) {
        while !self.end.has_come() {
            if self.engine.is_busy() {
                self.end.rest(REST);
                continue;
            }
            let outcome = match self.next() {
                Ok(Some(key)) => self.recompress(&key).map(|()| self.done()),
                Ok(None) => {
                    self.end.rest(REST);
                    Ok(())
                }
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                tracing::warn!(%error, "a blob stays as it was uploaded");
                self.done();
                self.end.rest(REST_AFTER_FAILURE);
            }
        }
    }

    /// Takes the blob that waited longest off the list, unless it was one of the walk's.
    fn done(&self) {
        if self.walked.is_none() && !self.end.has_come() {
            self.engine.fresh().keys.pop_front();
        }
    }

    /// The next blob to look at; one that waits does so until it is done.
    fn next(&mut self) -> Result<Option<Vec<u8>>, StoreError> {
        if let Some(from) = &self.walked {
            let next = self.engine.database.first_key(Family::Blobs, from)?;
            // The key that follows it.
            self.walked = next.as_ref().map(|key| [key.as_slice(), &[0]].concat());
            if next.is_some() {
                return Ok(next);
            }
        }
        Ok(self.engine.fresh().keys.front().cloned())
    }

    fn recompress(&self, key: &[u8]) -> Result<(), StoreError> {
        let engine = &self.engine;
        let Some(row) = engine.blob_row(key)?.filter(|row| row.level < Some(self.level)) else {
            return Ok(());
        };
        let BlobHome::File(number) = row.home else { return Ok(()) };
        let Some(file) = engine.directory.open_blob(key, number, row.stored_bytes)? else { return Ok(()) };
        let mut staged = Staged::new(engine, rows::key_namespace(key)?, None)?;
        match self.compress(key, &row, file, &mut staged)? {
            Outcome::Interrupted => Ok(()),
            Outcome::Damaged => {
                drop(staged);
                engine.quarantine(key, &row)
            }
            Outcome::NotSmaller => {
                drop(staged);
                engine.mark_dense(key, &row, self.level)
            }
            Outcome::Smaller => {
                staged.sync().map_err(StoreError::Write)?;
                while engine.is_backing_up() && !self.end.has_come() {
                    self.end.rest(REST);
                }
                let new = BlobRow { stored_bytes: staged.length, level: Some(self.level), ..row };
                let outcome =
                    engine.commit_staged(key, new, &mut staged, |ledger, new, staged| {
                        match engine.unchanged(key, &row)? {
                            Some(_) => engine.exchange(ledger, key, new, staged),
                            None => Ok(PutOutcome::Existed),
                        }
                    })?;
                let mut ledger = engine.ledger();
                if outcome == PutOutcome::Created {
                    ledger.recompressed_blobs += 1;
                    ledger.saved_bytes += row.stored_bytes.saturating_sub(new.stored_bytes);
                }
                engine.remove_files(&mut ledger)
            }
        }
    }

    fn compress(
        &self,
        key: &[u8],
        row: &BlobRow,
        file: File,
        staged: &mut Staged,
    ) -> Result<Outcome, StoreError> {
        let mut content = Decompressor::new(file, row.content_bytes).map_err(StoreError::Write)?;
        let mut output = Output { staged, most_bytes: row.stored_bytes, is_full: false, failure: None };
        let length = Length::Exactly(row.content_bytes);
        let mut encoder = pack::compressor(&mut output, length, self.level).map_err(StoreError::Write)?;
        let mut buffer = vec![0; STEP_BYTES];
        let written = loop {
            if self.end.has_come() {
                return Ok(Outcome::Interrupted);
            }
            match content.read(&mut buffer) {
                Ok(0) => break encoder.finish().map(drop),
                Ok(count) => {
                    if let Err(error) = encoder.write_all(&buffer[..count]) {
                        break Err(error);
                    }
                }
                Err(_) => return Ok(Outcome::Damaged),
            }
        };
        if let Some(failure) = output.failure {
            return Err(failure);
        }
        if output.is_full {
            return Ok(Outcome::NotSmaller);
        }
        if written.is_err() {
            // Less content than its row says.
            return Ok(Outcome::Damaged);
        }
        let (digest, content_bytes) = content.finish().map_err(StoreError::Read)?;
        let is_whole = content_bytes == row.content_bytes && *digest.as_bytes() == rows::key_digest(key)?;
        Ok(if is_whole { Outcome::Smaller } else { Outcome::Damaged })
    }
}

/// Takes what is compressed, as long as it is less than before.
struct Output<'s> {
    staged: &'s mut Staged,
    most_bytes: u64,
    is_full: bool,
    failure: Option<StoreError>,
}

impl Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.is_full |= self.staged.length + bytes.len() as u64 >= self.most_bytes;
        if self.is_full {
            return Err(io::Error::other("not smaller"));
        }
        self.staged.write(bytes).map(|()| bytes.len()).map_err(|failure| {
            let error = io::Error::other(failure.to_string());
            self.failure = Some(failure);
            error
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Engine {
    /// The blobs that wait.
    pub(super) fn fresh(&self) -> MutexGuard<'_, Fresh> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a blob that came as a file wait for being recompressed.
    pub(super) fn note_fresh(&self, key: Vec<u8>) {
        let mut fresh = self.fresh();
        fresh.last_upload = Some(Instant::now());
        if fresh.keys.len() < MAX_FRESH {
            fresh.keys.push_back(key);
        }
    }

    /// A blob's row, unless it was evicted or uploaded anew since it was seen.
    fn unchanged(&self, key: &[u8], seen: &BlobRow) -> Result<Option<BlobRow>, StoreError> {
        let present = self.database.get_row::<BlobRow>(Family::Blobs, key)?;
        Ok(present.filter(|present| present.home == seen.home))
    }

    /// Gives a blob other bytes. Its old file is doomed.
    fn exchange(
        &self,
        ledger: &mut Ledger,
        key: &[u8],
        new: BlobRow,
        staged: &mut Staged,
    ) -> Result<PutOutcome, StoreError> {
        let Some(present) = self.database.get_row::<BlobRow>(Family::Blobs, key)? else {
            return Ok(PutOutcome::Existed);
        };
        let mut sums = ledger.sums_of(key)?;
        let mut batch = self.database.batch();
        let old_file = doom_data(&mut batch, &mut sums, key, &present)?;
        put_data(&mut batch, key, &new, staged)?;
        let row = BlobRow { references: present.references, sequence: present.sequence, ..new };
        batch.put_row(Family::Blobs, key, &row)?;
        sums.charge(row.data_bytes());
        self.commit(ledger, batch, sums)?;
        staged.reservation.spend(ledger);
        ledger.doomed.extend(old_file);
        Ok(PutOutcome::Created)
    }

    /// Remembers that a blob's bytes do not become fewer at a level.
    fn mark_dense(&self, key: &[u8], seen: &BlobRow, level: i32) -> Result<(), StoreError> {
        let mut ledger = self.ledger();
        let Some(present) = self.unchanged(key, seen)? else { return Ok(()) };
        let mut batch = self.database.batch();
        batch.put_row(Family::Blobs, key, &BlobRow { level: Some(level), ..present })?;
        let totals = ledger.totals;
        self.commit_totals(&mut ledger, batch, totals)
    }
}
