//! A blob's way in: reserve, stage, verify, commit.
//!
//! Invariants:
//! - Nothing is written that was not reserved; a staging file is gone before its reservation is.
//! - Only a body whose content has the digest it is named by is committed.
//! - Commit order of a file: contents synced; a `doomed` row for its final name synced; renamed; directory
//!   synced; then one batch that makes the blob visible and takes the `doomed` row away. A crash before that
//!   batch leaves a doomed file, which the next start removes.
//!
//! Memory for one upload: zstd's window (at most 32 MiB), its buffers, and 128 KiB before the file.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cachec_protocol::Digest;
use cachec_protocol::pack::Decompressor;

use super::database::{Batch, Family};
use super::ledger::{Ledger, Reservation};
use super::rows::{self, BlobHome, BlobRow, DoomedRow, Entry, INLINE_BYTES};
use super::{DataDirectory, Engine};
use crate::namespace::Namespace;
use crate::store::{BlobUpload, PutOutcome, StoreError};

/// A body of unannounced length reserves this much at a time.
const GROWTH_BYTES: u64 = 256 << 10;

const WRITE_BUFFER_BYTES: usize = 128 << 10;

impl Engine {
    /// Takes a blob in. Blocks on the body.
    pub(super) fn put_blob(self: &Arc<Self>, upload: BlobUpload) -> Result<PutOutcome, StoreError> {
        let key = rows::row_key(&upload.namespace, upload.digest.as_bytes());
        if self.blob_row(&key)?.is_some() {
            self.touch([Entry::blob(key)]);
            return Ok(PutOutcome::Existed);
        }
        let mut staged = Staged::new(self, upload.namespace, upload.stored_bytes)?;
        let (digest, content_bytes) = verify(upload.body, &mut staged, self.max_blob_bytes)?;
        if upload.stored_bytes.is_some_and(|announced| announced != staged.length) {
            return Err(StoreError::LengthMismatch);
        }
        if digest != upload.digest {
            return Err(StoreError::DigestMismatch);
        }
        let row = BlobRow {
            content_bytes,
            stored_bytes: staged.length,
            home: BlobHome::Inline,
            references: 0,
            sequence: 0,
            level: None,
        };
        let is_file = staged.file.is_some();
        let outcome = self.commit_staged(&key, row, &mut staged, |ledger, row, staged| {
            self.commit_blob(ledger, &key, row, staged)
        })?;
        if is_file && outcome == PutOutcome::Created {
            self.note_fresh(key);
        }
        Ok(outcome)
    }

    /// Brings a staged blob to where it stays, and has `commit` make it visible there.
    pub(super) fn commit_staged(
        &self,
        key: &[u8],
        mut row: BlobRow,
        staged: &mut Staged,
        commit: impl FnOnce(&mut Ledger, BlobRow, &mut Staged) -> Result<PutOutcome, StoreError>,
    ) -> Result<PutOutcome, StoreError> {
        if staged.file.is_none() {
            row.home = BlobHome::Inline;
            return commit(&mut self.ledger(), row, staged);
        }
        let number = self.next_sequence();
        let name = DataDirectory::blob_name(key, number)?;
        row.home = BlobHome::File(number);
        let mut batch = self.database.batch();
        batch.put_row(Family::Doomed, name.as_bytes(), &DoomedRow { counted_bytes: 0 })?;
        batch.write()?;
        self.database.sync()?;
        let moved = staged.move_to(&self.directory.blob_path(&name)).map_err(StoreError::Write);
        let outcome = moved.and_then(|()| commit(&mut self.ledger(), row, staged));
        if !matches!(outcome, Ok(PutOutcome::Created)) {
            self.abandon_file(&name);
        }
        outcome
    }

    /// Removes a file that was put in place and is not to be. Where that fails, its `doomed` row stays and the
    /// next start tries again.
    fn abandon_file(&self, name: &str) {
        let removed = fs::remove_file(self.directory.blob_path(name))
            .or_else(|error| if super::database::is_absent(&error) { Ok(()) } else { Err(error) });
        let mut batch = self.database.batch();
        let forgotten = removed.map_err(StoreError::Write).and_then(|()| {
            batch.delete(Family::Doomed, name.as_bytes())?;
            batch.write()
        });
        if let Err(error) = forgotten {
            tracing::error!(file = name, %error, "cannot remove an abandoned blob file");
        }
    }

    /// The moment at which a blob becomes visible.
    fn commit_blob(
        &self,
        ledger: &mut Ledger,
        key: &[u8],
        mut row: BlobRow,
        staged: &mut Staged,
    ) -> Result<PutOutcome, StoreError> {
        let present = self.database.get_row::<BlobRow>(Family::Blobs, key)?;
        let mut sums = ledger.sums_of(key)?;
        row.sequence = self.next_sequence();
        let mut batch = self.database.batch();
        match present {
            Some(present) if present.home != BlobHome::Lost => return Ok(PutOutcome::Existed),
            Some(lost) => {
                row.references = lost.references;
                sums.release(lost.charge_bytes());
                batch.delete(Family::Recency, &Entry::blob(key).recency_key(lost.sequence)?)?;
            }
            None => sums.totals.blobs += 1,
        }
        if row.references == 0 {
            batch.put(Family::Recency, &Entry::blob(key).recency_key(row.sequence)?, &[])?;
            ledger.shares.note_listed(&sums.namespace, row.sequence);
        }
        put_data(&mut batch, key, &row, staged)?;
        batch.put_row(Family::Blobs, key, &row)?;
        sums.charge(row.charge_bytes());
        self.commit(ledger, batch, sums)?;
        staged.reservation.spend(ledger);
        Ok(PutOutcome::Created)
    }
}

/// Puts small data into the batch, or takes a file that is in its place off the list of the doomed.
pub(super) fn put_data(
    batch: &mut Batch<'_>,
    key: &[u8],
    row: &BlobRow,
    staged: &Staged,
) -> Result<(), StoreError> {
    match row.home {
        BlobHome::File(number) => {
            batch.delete(Family::Doomed, DataDirectory::blob_name(key, number)?.as_bytes())
        }
        _ => batch.put(Family::BlobData, key, &staged.memory),
    }
}

/// Decompresses a body while it is staged. Returns its content's digest and length.
fn verify(
    body: Box<dyn Read + Send>,
    staged: &mut Staged,
    limit_bytes: u64,
) -> Result<(Digest, u64), StoreError> {
    let mut tee = Tee { body, staged, failure: None };
    let decompressed = Decompressor::new(&mut tee, limit_bytes).map(|mut decompressor| {
        let copied = io::copy(&mut decompressor, &mut io::sink());
        let too_large = decompressor.content_bytes() > limit_bytes;
        (copied.and_then(|_| decompressor.finish()), too_large)
    });
    let (finished, too_large) = decompressed.map_err(StoreError::Write)?;
    if let Some(failure) = tee.failure {
        return Err(failure);
    }
    if too_large {
        return Err(StoreError::TooLarge { limit_bytes });
    }
    let (digest, content_bytes) = finished.map_err(|_| StoreError::MalformedBlob)?;
    // An empty body has no frame. A body far longer than its content is padded with skippable frames.
    let length = staged.length;
    if length == 0 || length > most_stored_bytes(content_bytes) {
        return Err(StoreError::MalformedBlob);
    }
    staged.sync().map_err(StoreError::Write)?;
    Ok((digest, content_bytes))
}

/// More than what zstd makes of incompressible content of this length.
fn most_stored_bytes(content_bytes: u64) -> u64 {
    content_bytes.saturating_add(content_bytes / 64).saturating_add(64 << 10)
}

/// Writes down what is read through it.
struct Tee<'s> {
    body: Box<dyn Read + Send>,
    staged: &'s mut Staged,
    failure: Option<StoreError>,
}

impl Read for Tee<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.body.read(buffer).map_err(|_| StoreError::Aborted);
        let kept = read.and_then(|count| self.staged.write(&buffer[..count]).map(|()| count));
        kept.map_err(|failure| {
            let error = io::Error::other(failure.to_string());
            self.failure = Some(failure);
            error
        })
    }
}

/// A body that is being received: in memory while it is small, then in a file. Dropping it leaves nothing.
pub(super) struct Staged {
    pub(super) memory: Vec<u8>,
    file: Option<StagedFile>,
    pub(super) length: u64,
    announced: bool,
    limit_bytes: u64,
    path: PathBuf,
    // Last, so that it is given back when the file is gone.
    pub(super) reservation: Reservation,
}

/// A file in the staging directory, removed when it is dropped.
struct StagedFile {
    path: PathBuf,
    writer: BufWriter<File>,
}

impl Staged {
    pub(super) fn new(
        engine: &Arc<Engine>,
        namespace: Namespace,
        announced_bytes: Option<u64>,
    ) -> Result<Self, StoreError> {
        let limit_bytes = most_stored_bytes(engine.max_blob_bytes);
        if announced_bytes.is_some_and(|length| length > limit_bytes) {
            return Err(StoreError::TooLarge { limit_bytes: engine.max_blob_bytes });
        }
        let mut reservation = engine.reservation(namespace);
        reservation.ensure(rows::upload_bytes(announced_bytes.unwrap_or_default()))?;
        let number = engine.next_sequence();
        let path = engine.directory.staging.join(format!("{number:016x}"));
        let announced = announced_bytes.is_some();
        Ok(Self { memory: Vec::new(), file: None, length: 0, announced, limit_bytes, path, reservation })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let length = self.length + bytes.len() as u64;
        if length > self.limit_bytes {
            return Err(StoreError::TooLarge { limit_bytes: self.limit_bytes });
        }
        let needed_bytes = rows::upload_bytes(length);
        if needed_bytes > self.reservation.bytes() {
            let step = if self.announced { 0 } else { GROWTH_BYTES };
            self.reservation.ensure(needed_bytes + step)?;
        }
        if self.file.is_none() && length > INLINE_BYTES {
            let mut file = StagedFile::create(&self.path).map_err(StoreError::Write)?;
            file.writer.write_all(&std::mem::take(&mut self.memory)).map_err(StoreError::Write)?;
            self.file = Some(file);
        }
        match &mut self.file {
            Some(file) => file.writer.write_all(bytes).map_err(StoreError::Write)?,
            None => self.memory.extend_from_slice(bytes),
        }
        self.length = length;
        Ok(())
    }

    pub(super) fn sync(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        file.writer.flush()?;
        file.writer.get_ref().sync_all()
    }

    /// Gives the file its final name, durably.
    fn move_to(&mut self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)?;
        if let Some(directory) = path.parent() {
            File::open(directory)?.sync_all()?;
        }
        Ok(())
    }
}

impl StagedFile {
    fn create(path: &Path) -> io::Result<Self> {
        let file = File::options().write(true).create_new(true).open(path)?;
        Ok(Self { path: path.to_owned(), writer: BufWriter::with_capacity(WRITE_BUFFER_BYTES, file) })
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        // Absent where it was moved to its final name.
        let _ = fs::remove_file(&self.path);
    }
}
