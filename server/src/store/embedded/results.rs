//! Publishing results, and finding them.
//!
//! Invariants: the first result of a key stays; a result holds one reference to its pack, taken and released
//! in the batch that makes the result appear and disappear; a manifest lists at most
//! [`MAX_MANIFEST_RESULTS`] results, newest first, and every result stands in its manifest.

use std::collections::HashSet;
use std::sync::Arc;

use cachec_protocol::ActionKey;
use cachec_protocol::digest::DIGEST_BYTES;
use cachec_protocol::message::{MAX_MANIFEST_RESULTS, Manifest};

use super::Engine;
use super::database::{Family, Whereabouts};
use super::ledger::Ledger;
use super::rows::{self, BlobHome, BlobRow, Entry, ResultRow};
use crate::namespace::Namespace;
use crate::store::{Publication, PutOutcome, StoreError};

impl Engine {
    /// Keeps a result, unless there is one of that key.
    pub(super) fn publish(self: &Arc<Self>, publication: &Publication) -> Result<PutOutcome, StoreError> {
        let key = rows::row_key(&publication.namespace, publication.result_key.as_bytes());
        if self.database.get(Family::ResultRows, &key)?.is_some() {
            self.touch([Entry::result(key)]);
            return Ok(PutOutcome::Existed);
        }
        // The room that the result needs must not be made by evicting its pack.
        self.touch(publication.pack.map(|pack| Entry::blob(rows::sibling_key(&key, pack.as_bytes()))));
        let data_bytes = (publication.encoded.len() + publication.action_fields.len()) as u64;
        let mut reservation = self.reservation(publication.namespace.clone());
        reservation.ensure(rows::row_bytes(data_bytes) + rows::ENTRY_BYTES)?;
        let mut ledger = self.ledger();
        let row = ResultRow {
            action_key: publication.action_key,
            pack: publication.pack,
            sequence: 0,
            charge_bytes: reservation.bytes(),
        };
        let outcome = self.commit_result(&mut ledger, &key, row, publication);
        if matches!(outcome, Ok(PutOutcome::Created)) {
            reservation.spend(&mut ledger);
        }
        // The reservation, if it is left, is given back after the lock.
        drop(ledger);
        outcome
    }

    fn commit_result(
        &self,
        ledger: &mut Ledger,
        key: &[u8],
        mut row: ResultRow,
        publication: &Publication,
    ) -> Result<PutOutcome, StoreError> {
        if self.database.get(Family::ResultRows, key)?.is_some() {
            return Ok(PutOutcome::Existed);
        }
        let pack_key = row.pack.map(|pack| rows::sibling_key(key, pack.as_bytes()));
        if let Some(pack_key) = &pack_key
            && self.blob_row(pack_key)?.is_none()
        {
            return Err(StoreError::PackMissing);
        }
        let manifest_key = rows::sibling_key(key, row.action_key.as_bytes());
        self.shorten_manifest(ledger, &manifest_key)?;
        let mut sums = ledger.sums(&publication.namespace);
        row.sequence = self.next_sequence();
        let mut batch = self.database.batch();
        if let Some(pack_key) = pack_key {
            let mut blob = self.blob_row(&pack_key)?.ok_or(StoreError::PackMissing)?;
            if blob.references == 0 {
                batch
                    .delete(Family::Recency, &Entry::blob(pack_key.as_slice()).recency_key(blob.sequence)?)?;
            }
            blob.references += 1;
            batch.put_row(Family::Blobs, &pack_key, &blob)?;
        }
        let mut manifest = self.manifest(&manifest_key)?;
        manifest.insert(0, rows::key_digest(key)?);
        batch.put(Family::Manifests, &manifest_key, manifest.as_flattened())?;
        batch.put(Family::Results, key, &publication.encoded)?;
        if !publication.action_fields.is_empty() {
            batch.put(Family::ActionFields, key, &publication.action_fields)?;
        }
        batch.put_row(Family::ResultRows, key, &row)?;
        batch.put(Family::Recency, &Entry::result(key).recency_key(row.sequence)?, &[])?;
        sums.totals.results += 1;
        sums.charge(row.charge_bytes);
        ledger.shares.note_listed(&sums.namespace, row.sequence);
        self.commit(ledger, batch, sums)?;
        Ok(PutOutcome::Created)
    }

    /// Removes the oldest results of a manifest until one more fits.
    fn shorten_manifest(&self, ledger: &mut Ledger, manifest_key: &[u8]) -> Result<(), StoreError> {
        let manifest = self.manifest(manifest_key)?;
        for oldest in manifest.iter().skip(MAX_MANIFEST_RESULTS - 1).rev() {
            self.remove_result(ledger, &rows::sibling_key(manifest_key, oldest))?;
        }
        Ok(())
    }

    /// A manifest's result keys, newest first; empty where there is none.
    pub(super) fn manifest(&self, key: &[u8]) -> Result<Vec<[u8; DIGEST_BYTES]>, StoreError> {
        self.manifest_from(Whereabouts::Anywhere, key)
    }

    fn manifest_from(
        &self,
        whereabouts: Whereabouts,
        key: &[u8],
    ) -> Result<Vec<[u8; DIGEST_BYTES]>, StoreError> {
        let Some(bytes) = self.database.get_from(whereabouts, Family::Manifests, key)? else {
            return Ok(Vec::new());
        };
        let (keys, rest) = bytes.as_chunks::<DIGEST_BYTES>();
        if rest.is_empty() { Ok(keys.to_vec()) } else { Err(StoreError::DamagedRow("manifest")) }
    }

    /// Answers a lookup, and counts the results in the answer as used.
    pub(super) fn lookup(
        &self,
        namespace: &Namespace,
        keys: &[ActionKey],
        limit_bytes: usize,
    ) -> Result<Vec<Manifest>, StoreError> {
        let answer = self.answer(Whereabouts::Anywhere, namespace, keys, limit_bytes)?;
        self.touch(answer.used);
        Ok(answer.manifests)
    }

    /// What a lookup of these keys finds.
    pub(super) fn answer(
        &self,
        whereabouts: Whereabouts,
        namespace: &Namespace,
        keys: &[ActionKey],
        limit_bytes: usize,
    ) -> Result<Answer, StoreError> {
        let mut left_bytes = limit_bytes;
        let mut answer = Answer { manifests: Vec::new(), used: Vec::new(), is_whole: true };
        let mut seen = HashSet::new();
        for action_key in keys.iter().filter(|key| seen.insert(**key)) {
            let manifest_key = rows::row_key(namespace, action_key.as_bytes());
            let mut results = Vec::new();
            for result_key in self.manifest_from(whereabouts, &manifest_key)? {
                let key = rows::sibling_key(&manifest_key, &result_key);
                // It may have been evicted since the manifest was read.
                let Some(encoded) = self.database.get_from(whereabouts, Family::Results, &key)? else {
                    continue;
                };
                let Some(left) = left_bytes.checked_sub(encoded.len() + 2 * DIGEST_BYTES) else {
                    answer.is_whole = false;
                    break;
                };
                left_bytes = left;
                results.push(encoded.into());
                answer.used.push(Entry::result(key));
            }
            if !results.is_empty() {
                answer.manifests.push(Manifest { action_key: *action_key, results });
            }
            if !answer.is_whole {
                // More would be read for nothing.
                break;
            }
        }
        Ok(answer)
    }

    /// The row of a blob that is there.
    pub(super) fn blob_row(&self, key: &[u8]) -> Result<Option<BlobRow>, StoreError> {
        let row = self.database.get_row::<BlobRow>(Family::Blobs, key)?;
        Ok(row.filter(|row| row.home != BlobHome::Lost))
    }
}

/// What a lookup finds.
pub(super) struct Answer {
    pub(super) manifests: Vec<Manifest>,
    pub(super) used: Vec<Entry>,
    /// Whether the limit has left nothing out.
    pub(super) is_whole: bool,
}
