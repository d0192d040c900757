//! Access times: what was used last, applied in batches.
//!
//! An access is a sequence number, not a time. Accesses wait in a list, so that reading writes nothing; they
//! are applied once a second, when the list is long, and before anything is evicted. A crash forgets at most
//! those that waited.

use std::collections::HashSet;
use std::sync::PoisonError;

use super::Engine;
use super::database::Family;
use super::ledger::Ledger;
use super::rows::{BlobRow, Entry, EntryKind, ResultRow};
use crate::store::StoreError;

/// Most accesses that wait, and that one batch applies.
const MAX_WAITING: usize = 4096;

impl Engine {
    /// Counts entries as used now. Entries that do not exist are passed over later.
    pub(super) fn touch(&self, entries: impl IntoIterator<Item = Entry>) -> Result<(), StoreError> {
        let waiting = {
            let mut touches = self.touches.lock().unwrap_or_else(PoisonError::into_inner);
            touches.extend(entries);
            touches.len()
        };
        if waiting < MAX_WAITING {
            return Ok(());
        }
        self.apply_touches(&mut self.ledger())
    }

    /// Applies all accesses that wait, in their order. Lock order: ledger, then touches.
    pub(super) fn apply_touches(&self, ledger: &mut Ledger) -> Result<(), StoreError> {
        let waiting = std::mem::take(&mut *self.touches.lock().unwrap_or_else(PoisonError::into_inner));
        // Only an entry's last access counts.
        let mut seen = HashSet::with_capacity(waiting.len());
        let mut last: Vec<&Entry> = waiting.iter().rev().filter(|entry| seen.insert(*entry)).collect();
        last.reverse();
        for entries in last.chunks(MAX_WAITING) {
            self.apply(ledger, entries)?;
        }
        Ok(())
    }

    fn apply(&self, ledger: &mut Ledger, entries: &[&Entry]) -> Result<(), StoreError> {
        let mut totals = ledger.totals;
        let mut batch = self.database.batch();
        for entry in entries {
            let (before, now, listed) = match entry.kind {
                EntryKind::Result => {
                    let row = self.database.get_row::<ResultRow>(Family::ResultRows, &entry.key)?;
                    let Some(mut row) = row else { continue };
                    let before = std::mem::replace(&mut row.sequence, totals.next_sequence());
                    batch.put_row(Family::ResultRows, &entry.key, &row)?;
                    (before, row.sequence, true)
                }
                EntryKind::Blob => {
                    let row = self.database.get_row::<BlobRow>(Family::Blobs, &entry.key)?;
                    let Some(mut row) = row else { continue };
                    let before = std::mem::replace(&mut row.sequence, totals.next_sequence());
                    batch.put_row(Family::Blobs, &entry.key, &row)?;
                    (before, row.sequence, row.references == 0)
                }
            };
            if listed {
                batch.delete(Family::Lru, &entry.lru_key(before))?;
                batch.put(Family::Lru, &entry.lru_key(now), &[])?;
            }
        }
        ledger.commit(batch, totals)
    }
}
