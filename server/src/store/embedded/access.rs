//! Access times: what was used last, applied in batches.
//!
//! An access is a sequence number, given at once, not a time. An entry's last access waits in memory, so that reading
//! writes nothing; they are applied once a second, when many wait, and before anything is evicted. A crash forgets at most
//! those that waited.

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};

use super::Engine;
use super::database::Family;
use super::ledger::Ledger;
use super::rows::{BlobRow, Entry, EntryKind, ResultRow};
use crate::store::StoreError;

/// Most accesses that wait, and that one batch applies.
const MAX_WAITING: usize = 4096;

impl Engine {
    /// Counts entries as used now. Entries that do not exist are passed over later. That accesses cannot be
    /// written, as on a full disk, does not keep anybody from reading: they are forgotten.
    pub(super) fn touch(&self, entries: impl IntoIterator<Item = Entry>) {
        let waiting = {
            let mut touches = self.touches();
            touches.extend(entries.into_iter().map(|entry| (entry, self.next_sequence())));
            touches.len()
        };
        if waiting < MAX_WAITING {
            return;
        }
        if let Err(error) = self.apply_touches(&mut self.ledger()) {
            tracing::warn!(%error, "access times are lost");
        }
    }

    /// Counts entries as used now, where no batch is due and nobody has to be waited for; says whether it could.
    pub(super) fn touch_now(&self, entries: Vec<Entry>) -> bool {
        let Ok(mut touches) = self.touches.try_lock() else { return false };
        let has_room = touches.len() + entries.len() < MAX_WAITING;
        if has_room {
            touches.extend(entries.into_iter().map(|entry| (entry, self.next_sequence())));
        }
        has_room
    }

    fn touches(&self) -> MutexGuard<'_, HashMap<Entry, u64>> {
        self.touches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies all accesses that wait. Lock order: ledger, then touches.
    pub(super) fn apply_touches(&self, ledger: &mut Ledger) -> Result<(), StoreError> {
        let waiting = std::mem::take(&mut *self.touches());
        let waiting: Vec<(Entry, u64)> = waiting.into_iter().collect();
        for touches in waiting.chunks(MAX_WAITING) {
            self.apply(ledger, touches)?;
        }
        Ok(())
    }

    fn apply(&self, ledger: &mut Ledger, touches: &[(Entry, u64)]) -> Result<(), StoreError> {
        let mut batch = self.database.batch();
        for (entry, sequence) in touches {
            let (before, listed) = match entry.kind {
                EntryKind::Result => {
                    let row = self.database.get_row::<ResultRow>(Family::ResultRows, &entry.key)?;
                    let Some(mut row) = row.filter(|row| row.sequence < *sequence) else { continue };
                    let before = std::mem::replace(&mut row.sequence, *sequence);
                    batch.put_row(Family::ResultRows, &entry.key, &row)?;
                    (before, true)
                }
                EntryKind::Blob => {
                    let row = self.database.get_row::<BlobRow>(Family::Blobs, &entry.key)?;
                    let Some(mut row) = row.filter(|row| row.sequence < *sequence) else { continue };
                    let before = std::mem::replace(&mut row.sequence, *sequence);
                    batch.put_row(Family::Blobs, &entry.key, &row)?;
                    (before, row.references == 0)
                }
            };
            if listed {
                batch.delete(Family::Recency, &entry.recency_key(before)?)?;
                batch.put(Family::Recency, &entry.recency_key(*sequence)?, &[])?;
            }
        }
        let totals = ledger.totals;
        self.commit_totals(ledger, batch, totals)
    }
}
