//! The account of space: what is stored, what is reserved, and that both together stay below the limit.
//!
//! Invariants:
//! - `stored + reserved ≤ limit` at every moment.
//! - What an upload writes to the staging directory was reserved before.
//! - The sums in memory are those of the last batch that was written; a failed write changes nothing.
//! - The totals are the sum of what the namespaces have and of files that are doomed and not yet gone.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::Engine;
use super::database::{Batch, Family};
use super::eviction::DoomedFile;
use super::rows::{self, Totals};
use super::shares::Shares;
use crate::namespace::Namespace;
use crate::store::StoreError;

/// The disk keeps at least this much free for RocksDB's log and compactions, whatever the limit says.
const DISK_HEAD_ROOM_BYTES: u64 = 16 << 20;

/// What the ledger's lock protects. Whoever holds it is the only writer of entries.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pub(super) totals: Totals,
    pub(super) shares: Shares,
    pub(super) reserved_bytes: u64,
    pub(super) evicted_entries: u64,
    pub(super) evicted_bytes: u64,
    pub(super) recompressed_blobs: u64,
    /// Bytes that recompression has freed.
    pub(super) saved_bytes: u64,
    pub(super) scrubbed_blobs: u64,
    pub(super) damaged_blobs: u64,
    /// Files whose rows are gone and that wait for being unlinked; still counted in the totals.
    pub(super) doomed: Vec<DoomedFile>,
    /// Those that could not be unlinked.
    pub(super) stuck: Vec<DoomedFile>,
}

impl Ledger {
    /// What the doomed files are counted as.
    pub(super) fn doomed_bytes(&self) -> u64 {
        self.doomed.iter().fold(0, |sum, file| sum.saturating_add(file.counted_bytes))
    }

    /// The sums as they are now, for a batch to change: of the store, and of the namespace that the batch is about.
    pub(super) fn sums(&self, namespace: &Namespace) -> Sums {
        let stored_bytes = self.shares.get(namespace).stored_bytes;
        Sums { totals: self.totals, namespace: namespace.clone(), stored_bytes }
    }

    /// As [`Self::sums`], for the namespace of an entry's key.
    pub(super) fn sums_of(&self, key: &[u8]) -> Result<Sums, StoreError> {
        Ok(self.sums(&rows::key_namespace(key)?))
    }

    /// What is stored, without files that are on their way out.
    pub(super) fn kept_bytes(&self) -> u64 {
        self.totals.stored_bytes.saturating_sub(self.doomed_bytes())
    }
}

/// What the sums are once a batch is written.
#[derive(Debug)]
pub(super) struct Sums {
    pub(super) totals: Totals,
    pub(super) namespace: Namespace,
    stored_bytes: u64,
}

impl Sums {
    /// Counts so much more.
    pub(super) fn charge(&mut self, bytes: u64) {
        self.totals.stored_bytes = self.totals.stored_bytes.saturating_add(bytes);
        self.stored_bytes = self.stored_bytes.saturating_add(bytes);
    }

    /// Counts so much less.
    pub(super) fn release(&mut self, bytes: u64) {
        self.totals.stored_bytes = self.totals.stored_bytes.saturating_sub(bytes);
        self.doom(bytes);
    }

    /// Counts so much less in the namespace: the store has it until a file is gone.
    pub(super) fn doom(&mut self, bytes: u64) {
        self.stored_bytes = self.stored_bytes.saturating_sub(bytes);
    }
}

impl Engine {
    /// Takes the ledger's lock. A panic of another holder leaves the ledger as of the last batch.
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a batch together with the sums that are right after it.
    pub(super) fn commit(
        &self,
        ledger: &mut Ledger,
        mut batch: Batch<'_>,
        sums: Sums,
    ) -> Result<(), StoreError> {
        let Sums { totals, namespace, stored_bytes } = sums;
        match ledger.shares.row(&namespace, stored_bytes) {
            Some(row) => batch.put_row(Family::Namespaces, namespace.as_str().as_bytes(), &row)?,
            None => batch.delete(Family::Namespaces, namespace.as_str().as_bytes())?,
        }
        self.commit_totals(ledger, batch, totals)?;
        ledger.shares.set_stored(&namespace, stored_bytes);
        Ok(())
    }

    /// Writes a batch that leaves the namespaces' sums as they are.
    pub(super) fn commit_totals(
        &self,
        ledger: &mut Ledger,
        mut batch: Batch<'_>,
        mut totals: Totals,
    ) -> Result<(), StoreError> {
        totals.sequence = self.sequence.load(Ordering::Relaxed);
        batch.put_totals(&totals);
        batch.write()?;
        ledger.totals = totals;
        Ok(())
    }

    /// A number that was never given before, higher than all before it: for accesses and for files. Only those
    /// that are stored are sure not to come again after a restart.
    pub(super) fn next_sequence(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// An empty reservation in a namespace.
    pub(super) fn reservation(self: &Arc<Self>, namespace: Namespace) -> Reservation {
        Reservation { engine: Arc::clone(self), namespace, bytes: 0 }
    }

    /// What the file system has left for this process's user.
    pub(super) fn disk_free_bytes(&self) -> Result<u64, StoreError> {
        let disk =
            rustix::fs::statvfs(&self.directory.root).map_err(|error| StoreError::Write(error.into()))?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    pub(super) fn check_disk(&self, growth_bytes: u64) -> Result<(), StoreError> {
        if self.disk_free_bytes()? < growth_bytes.saturating_add(DISK_HEAD_ROOM_BYTES) {
            return Err(StoreError::Full { needed_bytes: growth_bytes });
        }
        Ok(())
    }
}

/// Bytes that nobody else may take. Given back when it is dropped, which takes the ledger's lock: it must not
/// be dropped by a holder of that lock unless it was spent.
pub(super) struct Reservation {
    engine: Arc<Engine>,
    namespace: Namespace,
    bytes: u64,
}

impl Reservation {
    /// Bytes reserved so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Grows to at least `bytes`, evicting what is needed.
    ///
    /// # Errors
    /// [`StoreError::Full`] where that cannot be; what was reserved stays reserved.
    pub(super) fn ensure(&mut self, bytes: u64) -> Result<(), StoreError> {
        let Some(growth_bytes) = bytes.checked_sub(self.bytes).filter(|growth| *growth > 0) else {
            return Ok(());
        };
        self.engine.check_disk(growth_bytes)?;
        let mut ledger = self.engine.ledger();
        self.engine.make_room(&mut ledger, &self.namespace, growth_bytes)?;
        ledger.reserved_bytes += growth_bytes;
        ledger.shares.reserve(&self.namespace, growth_bytes);
        drop(ledger);
        self.bytes = bytes;
        Ok(())
    }

    /// Ends the reservation because its bytes are counted in the totals from now on.
    pub(super) fn spend(&mut self, ledger: &mut Ledger) {
        ledger.reserved_bytes = ledger.reserved_bytes.saturating_sub(self.bytes);
        ledger.shares.release(&self.namespace, self.bytes);
        self.bytes = 0;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            let engine = Arc::clone(&self.engine);
            self.spend(&mut engine.ledger());
        }
    }
}
