//! Bringing a database of an older format to the present one, when it is opened.
//!
//! Format 1 had one order of recency over all namespaces, in a family `lru`, and did not count namespaces apart. Both
//! follow from the entries. Everything is written before the version is, so that an interrupted migration begins anew.

use std::collections::HashMap;

use cachec_protocol::codec;
use rocksdb::{DB, WriteBatch};

use super::database::{self, Family};
use super::rows::{self, BlobRow, Entry, FORMAT_VERSION, NamespaceRow, ResultRow};
use crate::namespace::Namespace;
use crate::store::StoreError;

/// Families that no longer have a use.
const OLD_FAMILIES: [&str; 1] = ["lru"];

/// Most rows that one batch writes.
const BATCH_ROWS: usize = 4096;

/// Counts the namespaces, and orders the entries of each.
pub(super) fn from_version_1(db: &DB) -> Result<(), StoreError> {
    tracing::info!("bringing the database from format 1 to {FORMAT_VERSION}");
    let mut migration = Migration { db, writes: WriteBatch::default(), namespaces: HashMap::new() };
    migration.walk(Family::Blobs, |key, value| {
        let row: BlobRow = rows::decode(value, "blobs")?;
        let listed = (row.references == 0).then(|| (Entry::blob(key), row.sequence));
        Ok((row.charge_bytes(), listed))
    })?;
    migration.walk(Family::ResultRows, |key, value| {
        let row: ResultRow = rows::decode(value, "result_rows")?;
        Ok((row.charge_bytes, Some((Entry::result(key), row.sequence))))
    })?;
    migration.finish()
}

struct Migration<'d> {
    db: &'d DB,
    writes: WriteBatch,
    namespaces: HashMap<Namespace, u64>,
}

/// What an entry is counted as, and where it stands in its namespace's order, if it does.
type Placed = (u64, Option<(Entry, u64)>);

impl Migration<'_> {
    fn walk(
        &mut self,
        family: Family,
        place: impl Fn(&[u8], &[u8]) -> Result<Placed, StoreError>,
    ) -> Result<(), StoreError> {
        database::walk(self.db, family, |key, value| {
            let (charge_bytes, listed) = place(key, value)?;
            *self.namespaces.entry(rows::key_namespace(key)?).or_default() += charge_bytes;
            if let Some((entry, sequence)) = listed {
                let recency = database::handle(self.db, Family::Recency)?;
                self.writes.put_cf(recency, entry.recency_key(sequence)?, []);
            }
            if self.writes.len() >= BATCH_ROWS { self.write() } else { Ok(()) }
        })
    }

    fn write(&mut self) -> Result<(), StoreError> {
        self.db.write(std::mem::take(&mut self.writes)).map_err(StoreError::database_write)
    }

    fn finish(mut self) -> Result<(), StoreError> {
        for (namespace, stored_bytes) in std::mem::take(&mut self.namespaces) {
            let row = codec::encode(&NamespaceRow { stored_bytes, floor: 0 });
            self.writes.put_cf(database::handle(self.db, Family::Namespaces)?, namespace.as_str(), row);
        }
        self.writes.put("format", [FORMAT_VERSION]);
        self.write()?;
        self.db.flush_wal(true).map_err(StoreError::database_write)
    }
}

/// Deletes what only older formats had.
pub(super) fn drop_old_families(db: &mut DB) -> Result<(), StoreError> {
    for name in OLD_FAMILIES {
        if db.cf_handle(name).is_some() {
            db.drop_cf(name).map_err(StoreError::database_write)?;
        }
    }
    Ok(())
}
