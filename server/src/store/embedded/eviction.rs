//! Removing entries: the least recently used ones when room is needed, and single ones.
//!
//! Order: first the rows are deleted, together with a `doomed` row for the entry's file; then the database is
//! synced; then the file is unlinked; then the `doomed` row goes, and the file's bytes leave the totals.
//! A crash anywhere in between leaves a `doomed` row, which the next start completes. An open file that is
//! unlinked can be read to its end; the disk gets its blocks back when the last download ends.
//!
//! A batch is written for each entry, so that every step reads what the step before it wrote.

use super::database::{Batch, Family, is_absent};
use super::ledger::{Ledger, Sums};
use super::rows::{self, BlobHome, BlobRow, DoomedRow, Entry, EntryKind, ResultRow};
use super::{DataDirectory, Engine};
use crate::namespace::Namespace;
use crate::policy::Policy;
use crate::store::StoreError;

/// Room is made for this part of the limit more than is needed, but at most so many bytes, so that not every
/// upload into a full store pays for the sync that unlinking needs.
const SLACK_PART: u64 = 128;
const MAX_SLACK_BYTES: u64 = 256 << 20;

/// Most files that wait for one sync.
const MAX_DOOMED: usize = 256;

/// A file whose rows are gone already.
#[derive(Debug)]
pub(super) struct DoomedFile {
    pub(super) name: String,
    pub(super) counted_bytes: u64,
}

/// What entries are kept below: a namespace's quota, that of all namespaces of its pattern, or the limit of the store.
struct Bound<'n> {
    whose: Whose<'n>,
    limit_bytes: u64,
}

enum Whose<'n> {
    Namespace(&'n Namespace),
    /// Those that the policy treats as this one.
    Alike(&'n Policy, &'n Namespace),
    All,
}

impl Whose<'_> {
    /// The namespaces, where these are not all.
    fn namespaces(&self, ledger: &Ledger) -> Option<Vec<Namespace>> {
        match self {
            Self::Namespace(namespace) => Some(vec![(*namespace).clone()]),
            Self::Alike(policy, like) => {
                let known = ledger.shares.iter().map(|(namespace, _)| namespace);
                Some(known.filter(|namespace| policy.are_alike(namespace, like)).cloned().collect())
            }
            Self::All => None,
        }
    }
}

impl Bound<'_> {
    fn reserved_bytes(&self, ledger: &Ledger) -> u64 {
        match self.whose.namespaces(ledger) {
            Some(namespaces) => namespaces.iter().map(|one| ledger.shares.get(one).reserved_bytes).sum(),
            None => ledger.reserved_bytes,
        }
    }

    /// Whether so much more fits, once the doomed files are gone.
    fn fits(&self, ledger: &Ledger, more_bytes: u64) -> bool {
        let stored_bytes = match self.whose.namespaces(ledger) {
            Some(namespaces) => namespaces.iter().map(|one| ledger.shares.get(one).stored_bytes).sum(),
            None => ledger.kept_bytes(),
        };
        stored_bytes.saturating_add(self.reserved_bytes(ledger)).saturating_add(more_bytes)
            <= self.limit_bytes
    }
}

impl Engine {
    /// Evicts until `needed_bytes` more fit into a namespace's quota, and into the store.
    ///
    /// # Errors
    /// [`StoreError::Full`] where they cannot; nothing is evicted where that was clear from the start.
    pub(super) fn make_room(
        &self,
        ledger: &mut Ledger,
        namespace: &Namespace,
        needed_bytes: u64,
    ) -> Result<(), StoreError> {
        if let Some(limit_bytes) = self.policy.quota_bytes(namespace) {
            let whose = Whose::Namespace(namespace);
            self.keep_bound(ledger, &Bound { whose, limit_bytes }, needed_bytes)?;
        }
        if let Some(limit_bytes) = self.policy.total_quota_bytes(namespace) {
            let whose = Whose::Alike(&self.policy, namespace);
            self.keep_bound(ledger, &Bound { whose, limit_bytes }, needed_bytes)?;
        }
        self.keep_bound(ledger, &Bound { whose: Whose::All, limit_bytes: self.limit_bytes }, needed_bytes)
    }

    /// Evicts the oldest entries until so much more fits.
    fn keep_bound(
        &self,
        ledger: &mut Ledger,
        bound: &Bound<'_>,
        needed_bytes: u64,
    ) -> Result<(), StoreError> {
        if bound.fits(ledger, needed_bytes) && ledger.doomed.is_empty() {
            return Ok(());
        }
        if bound.reserved_bytes(ledger).saturating_add(needed_bytes) > bound.limit_bytes {
            return Err(StoreError::Full { needed_bytes });
        }
        self.apply_touches(ledger)?;
        let slack_bytes = (bound.limit_bytes / SLACK_PART).min(MAX_SLACK_BYTES);
        let wanted_bytes = needed_bytes.saturating_add(slack_bytes);
        while !bound.fits(ledger, wanted_bytes) && self.evict_oldest(ledger, &bound.whose)? {}
        self.remove_files(ledger)?;
        if bound.fits(ledger, needed_bytes) { Ok(()) } else { Err(StoreError::Full { needed_bytes }) }
    }

    /// Brings the store and every namespace below their limits.
    pub(super) fn keep_limits(&self, ledger: &mut Ledger) -> Result<(), StoreError> {
        let namespaces: Vec<_> = ledger.shares.iter().map(|(namespace, _)| namespace.clone()).collect();
        namespaces.iter().try_for_each(|namespace| self.make_room(ledger, namespace, 0))
    }

    /// Evicts the least recently used entry of these namespaces; false where there is none.
    fn evict_oldest(&self, ledger: &mut Ledger, whose: &Whose<'_>) -> Result<bool, StoreError> {
        let oldest = match whose.namespaces(ledger) {
            Some(namespaces) => {
                let oldest = namespaces.iter().filter_map(|one| self.oldest_of(ledger, one).transpose());
                let oldest = oldest.collect::<Result<Vec<_>, _>>()?;
                oldest.into_iter().min_by_key(|(sequence, _)| *sequence)
            }
            None => self.oldest(ledger)?,
        };
        let Some((sequence, entry)) = oldest else { return Ok(false) };
        self.evict(ledger, sequence, &entry)?;
        Ok(true)
    }

    /// The least recently used entry of all namespaces.
    fn oldest(&self, ledger: &mut Ledger) -> Result<Option<(u64, Entry)>, StoreError> {
        while let Some(namespace) = ledger.shares.lowest().cloned() {
            let found = self.oldest_of(ledger, &namespace)?;
            // Its head may have been too low.
            if found.is_some() && ledger.shares.lowest() == Some(&namespace) {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// The least recently used entry of a namespace, where its head is from now on.
    pub(super) fn oldest_of(
        &self,
        ledger: &mut Ledger,
        namespace: &Namespace,
    ) -> Result<Option<(u64, Entry)>, StoreError> {
        let Some(head) = ledger.shares.head(namespace) else { return Ok(None) };
        let from = rows::recency_from(namespace, head);
        let all = namespace.as_str().len() + 1;
        let found =
            self.database.first_key(Family::Recency, &from)?.filter(|key| key.get(..all) == from.get(..all));
        let found = found.map(|key| Entry::from_recency_key(&key)).transpose()?;
        ledger.shares.set_head(namespace, found.as_ref().map(|(sequence, _)| *sequence));
        Ok(found)
    }

    /// Evicts one entry. Its file is unlinked with others.
    pub(super) fn evict(&self, ledger: &mut Ledger, sequence: u64, entry: &Entry) -> Result<(), StoreError> {
        let before_bytes = ledger.kept_bytes();
        let removed = match entry.kind {
            EntryKind::Result => self.remove_result(ledger, &entry.key)?,
            EntryKind::Blob => self.remove_blob(ledger, &entry.key)?,
        };
        if removed {
            ledger.evicted_entries += 1;
            ledger.evicted_bytes += before_bytes.saturating_sub(ledger.kept_bytes());
        } else {
            // A row of the index without its entry cannot be; should one be, it must not stop evictions.
            let mut batch = self.database.batch();
            batch.delete(Family::Recency, &entry.recency_key(sequence)?)?;
            let totals = ledger.totals;
            self.commit_totals(ledger, batch, totals)?;
        }
        if ledger.doomed.len() >= MAX_DOOMED { self.remove_files(ledger) } else { Ok(()) }
    }

    /// Deletes a result's rows, takes it out of its manifest and releases its pack; false where there is none.
    pub(super) fn remove_result(&self, ledger: &mut Ledger, key: &[u8]) -> Result<bool, StoreError> {
        let Some(row) = self.database.get_row::<ResultRow>(Family::ResultRows, key)? else {
            return Ok(false);
        };
        let mut sums = ledger.sums_of(key)?;
        let mut batch = self.database.batch();
        batch.delete(Family::Results, key)?;
        batch.delete(Family::ResultRows, key)?;
        batch.delete(Family::ActionFields, key)?;
        batch.delete(Family::Recency, &Entry::result(key).recency_key(row.sequence)?)?;
        let manifest_key = rows::sibling_key(key, row.action_key.as_bytes());
        let result_key = rows::key_digest(key)?;
        let mut manifest = self.manifest(&manifest_key)?;
        manifest.retain(|listed| *listed != result_key);
        if manifest.is_empty() {
            batch.delete(Family::Manifests, &manifest_key)?;
        } else {
            batch.put(Family::Manifests, &manifest_key, manifest.as_flattened())?;
        }
        if let Some(pack) = row.pack {
            self.release_pack(&mut batch, &rows::sibling_key(key, pack.as_bytes()), row.sequence)?;
        }
        sums.release(row.charge_bytes);
        sums.totals.results = sums.totals.results.saturating_sub(1);
        self.commit(ledger, batch, sums)?;
        Ok(true)
    }

    /// Takes one reference from a blob. One that nobody needs any more is as old as its last use, by itself or
    /// by the result that went.
    fn release_pack(&self, batch: &mut Batch<'_>, key: &[u8], sequence: u64) -> Result<(), StoreError> {
        let Some(mut blob) = self.database.get_row::<BlobRow>(Family::Blobs, key)? else { return Ok(()) };
        blob.references = blob.references.saturating_sub(1);
        if blob.references == 0 {
            blob.sequence = blob.sequence.max(sequence);
            batch.put(Family::Recency, &Entry::blob(key).recency_key(blob.sequence)?, &[])?;
        }
        batch.put_row(Family::Blobs, key, &blob)
    }

    /// Deletes the rows of a blob that nobody needs, and dooms its file; false where there is none such.
    fn remove_blob(&self, ledger: &mut Ledger, key: &[u8]) -> Result<bool, StoreError> {
        let row = self.database.get_row::<BlobRow>(Family::Blobs, key)?;
        let Some(row) = row.filter(|row| row.references == 0) else { return Ok(false) };
        let mut sums = ledger.sums_of(key)?;
        let mut batch = self.database.batch();
        batch.delete(Family::Blobs, key)?;
        batch.delete(Family::Recency, &Entry::blob(key).recency_key(row.sequence)?)?;
        let file = doom_data(&mut batch, &mut sums, key, &row)?;
        sums.release(rows::ENTRY_BYTES);
        sums.totals.blobs = sums.totals.blobs.saturating_sub(1);
        self.commit(ledger, batch, sums)?;
        ledger.doomed.extend(file);
        Ok(true)
    }

    /// Makes a blob absent whose file turned out to be missing or cut, unless it changed meanwhile.
    pub(super) fn mark_lost(&self, key: &[u8], seen: &BlobRow) -> Result<(), StoreError> {
        let mut ledger = self.ledger();
        let Some(mut row) = self.database.get_row::<BlobRow>(Family::Blobs, key)? else { return Ok(()) };
        if row.home != seen.home {
            return Ok(());
        }
        if row.references == 0 {
            self.remove_blob(&mut ledger, key)?;
        } else {
            let mut sums = ledger.sums_of(key)?;
            let mut batch = self.database.batch();
            let file = doom_data(&mut batch, &mut sums, key, &row)?;
            row.home = BlobHome::Lost;
            batch.put_row(Family::Blobs, key, &row)?;
            self.commit(&mut ledger, batch, sums)?;
            ledger.doomed.extend(file);
        }
        self.remove_files(&mut ledger)
    }

    /// Unlinks the files whose rows are gone, and stops counting them. What cannot be unlinked now stays
    /// counted, and is tried again by [`Self::retry_removals`].
    pub(super) fn remove_files(&self, ledger: &mut Ledger) -> Result<(), StoreError> {
        let doomed = std::mem::take(&mut ledger.doomed);
        if doomed.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.database.sync() {
            ledger.stuck.extend(doomed);
            return Err(error);
        }
        let mut totals = ledger.totals;
        let mut batch = self.database.batch();
        let mut gone = Vec::with_capacity(doomed.len());
        for file in doomed {
            match std::fs::remove_file(self.directory.blob_path(&file.name)) {
                Err(error) if !is_absent(&error) => {
                    tracing::error!(file = file.name, %error, "cannot remove a blob file");
                    ledger.stuck.push(file);
                }
                _ => {
                    batch.delete(Family::Doomed, file.name.as_bytes())?;
                    totals.stored_bytes = totals.stored_bytes.saturating_sub(file.counted_bytes);
                    gone.push(file);
                }
            }
        }
        self.commit_totals(ledger, batch, totals).inspect_err(|_| ledger.stuck.extend(gone))
    }

    /// Tries again what [`Self::remove_files`] could not remove.
    pub(super) fn retry_removals(&self) -> Result<(), StoreError> {
        let mut ledger = self.ledger();
        let stuck = std::mem::take(&mut ledger.stuck);
        ledger.doomed.extend(stuck);
        self.remove_files(&mut ledger)
    }

    /// Completes what a crash interrupted: every doomed file goes.
    pub(super) fn finish_removals(&self) -> Result<(), StoreError> {
        let mut ledger = self.ledger();
        ledger.doomed = self.doomed_files()?;
        self.remove_files(&mut ledger)
    }

    /// The files that are doomed, as the database says.
    pub(super) fn doomed_files(&self) -> Result<Vec<DoomedFile>, StoreError> {
        let file = |(name, row): (Box<[u8]>, Box<[u8]>)| {
            let row: DoomedRow = rows::decode(&row, "doomed")?;
            let name = String::from_utf8(name.into_vec()).map_err(|_| StoreError::DamagedRow("doomed"))?;
            Ok(DoomedFile { name, counted_bytes: row.counted_bytes })
        };
        self.database.all(Family::Doomed)?.into_iter().map(file).collect()
    }
}

/// Deletes a blob's data with the batch: inline data at once, a file by dooming it.
pub(super) fn doom_data(
    batch: &mut Batch<'_>,
    sums: &mut Sums,
    key: &[u8],
    row: &BlobRow,
) -> Result<Option<DoomedFile>, StoreError> {
    match row.home {
        BlobHome::Inline => {
            batch.delete(Family::BlobData, key)?;
            sums.release(rows::row_bytes(row.stored_bytes));
            Ok(None)
        }
        BlobHome::File(number) => {
            let name = DataDirectory::blob_name(key, number)?;
            let counted_bytes = rows::file_bytes(row.stored_bytes);
            batch.put_row(Family::Doomed, name.as_bytes(), &DoomedRow { counted_bytes })?;
            sums.doom(counted_bytes);
            Ok(Some(DoomedFile { name, counted_bytes }))
        }
        BlobHome::Lost => Ok(None),
    }
}
