//! Ages: entries that nobody has used for longer than their namespace says are evicted.
//!
//! Time is that in which the server ran, all its processes together, by the monotonic clock: a wrong or changed system
//! clock evicts nothing, nor does a week in which the machine was off. Once an hour the sequence number is written
//! down; whatever was last used before it is older than that hour.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Engine;
use super::database::Family;
use super::ledger::Ledger;
use super::rows::HourRow;
use crate::store::StoreError;

/// Most entries that are evicted at a time, so that nobody waits long for the ledger.
const MAX_EVICTED: usize = 1000;

const MINUTE: Duration = Duration::from_secs(60);

impl Engine {
    /// Lets the time pass that has passed since the last call, in whole minutes.
    pub(super) fn advance(&self) -> Result<(), StoreError> {
        let minutes = {
            let mut last = self.last_minute.lock().unwrap_or_else(PoisonError::into_inner);
            let minutes = last.elapsed().as_secs() / MINUTE.as_secs();
            *last += MINUTE * u32::try_from(minutes).unwrap_or(u32::MAX);
            minutes
        };
        if minutes > 0 { self.pass(minutes) } else { Ok(()) }
    }

    /// Lets so many minutes pass.
    pub(super) fn pass(&self, minutes: u64) -> Result<(), StoreError> {
        let mut ledger = self.ledger();
        let hour = hour_of(ledger.totals.age_minutes);
        let mut totals = ledger.totals;
        totals.age_minutes += minutes;
        let mut batch = self.database.batch();
        if hour_of(totals.age_minutes) > hour || ledger.totals.age_minutes == 0 {
            let row = HourRow { sequence: self.sequence.load(Ordering::Relaxed) };
            batch.put_row(Family::Ages, &hour_of(totals.age_minutes).to_be_bytes(), &row)?;
        }
        self.commit_totals(&mut ledger, batch, totals)?;
        drop(ledger);
        // The lock is free in between.
        while self.evict_aged(&mut self.ledger())? {}
        Ok(())
    }

    /// Evicts some of what is too old; says whether there may be more.
    fn evict_aged(&self, ledger: &mut Ledger) -> Result<bool, StoreError> {
        let aged = |(namespace, _): (&_, _)| {
            let max_age = self.policy.max_age(namespace)?;
            Some((namespace.clone(), max_age.as_secs().div_ceil(MINUTE.as_secs())))
        };
        let namespaces: Vec<_> = ledger.shares.iter().filter_map(aged).collect();
        self.apply_touches(ledger)?;
        let mut evicted = 0;
        for (namespace, max_age_minutes) in namespaces {
            let Some(minutes) = ledger.totals.age_minutes.checked_sub(max_age_minutes) else { continue };
            let hour = self.database.last_row::<HourRow>(Family::Ages, &hour_of(minutes).to_be_bytes())?;
            let Some(HourRow { sequence: limit }) = hour else { continue };
            while evicted < MAX_EVICTED
                && let Some((sequence, entry)) = self.oldest_of(ledger, &namespace)?
                && sequence <= limit
            {
                self.evict(ledger, sequence, &entry)?;
                evicted += 1;
            }
        }
        self.remove_files(ledger)?;
        Ok(evicted == MAX_EVICTED)
    }
}

/// The hour that a minute is in. There is no end to it in four hundred thousand years.
fn hour_of(minutes: u64) -> u32 {
    u32::try_from(minutes / 60).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use cachec_protocol::Digest;
    use cachec_protocol::pack::{self, UPLOAD_LEVEL};

    use super::MINUTE;
    use crate::store::embedded::{Embedded, EmbeddedOptions};
    use crate::store::{BlobUpload, Store};

    const DAY: u64 = 24 * 60;

    fn open(directory: &std::path::Path) -> Embedded {
        let rules = toml::from_str("[kept]\nmax_age = '40d'\n['pr-*']\nmax_age = '7d'\n[main]").unwrap();
        let policy = crate::policy::Policy::new(rules, None).unwrap();
        let directory = directory.to_owned();
        let (max_size_bytes, max_blob_bytes, policy) = (64 << 20, 1 << 20, std::sync::Arc::new(policy));
        Embedded::open(&EmbeddedOptions { directory, max_size_bytes, max_blob_bytes, policy }).unwrap()
    }

    async fn put(store: &Embedded, namespace: &str, seed: u8) -> Digest {
        let content = vec![seed; 100];
        let (namespace, digest) = (namespace.parse().unwrap(), Digest::of(&content));
        let body = Box::new(std::io::Cursor::new(pack::compress(&content, UPLOAD_LEVEL).unwrap()));
        store.put_blob(BlobUpload { namespace, digest, stored_bytes: None, body }).await.unwrap();
        digest
    }

    async fn has(store: &Embedded, namespace: &str, digest: Digest) -> bool {
        let missing = store.engine.missing_blobs(&namespace.parse().unwrap(), vec![digest]);
        missing.unwrap().is_empty()
    }

    #[tokio::test]
    async fn what_nobody_uses_for_too_long_goes_and_what_is_used_stays() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        let old = put(&store, "pr-1", 1).await;
        let used = put(&store, "pr-1", 2).await;
        let kept = put(&store, "kept", 3).await;
        let unlimited = put(&store, "main", 4).await;
        for _ in 0..8 {
            assert!(has(&store, "pr-1", used).await);
            store.engine.pass(DAY).unwrap();
        }
        assert!(!has(&store, "pr-1", old).await && has(&store, "pr-1", used).await);
        let new = put(&store, "pr-1", 5).await;
        store.engine.pass(6 * DAY).unwrap();
        assert!(has(&store, "pr-1", new).await && has(&store, "kept", kept).await);
        // Another process goes on counting.
        store.close().unwrap();
        drop(store);
        let store = open(directory.path());
        store.engine.pass(DAY).unwrap();
        store.engine.pass(40 * DAY).unwrap();
        assert!(!has(&store, "kept", kept).await && has(&store, "main", unlimited).await);
        assert!(!has(&store, "pr-1", new).await);
    }

    #[tokio::test]
    async fn minutes_add_up_and_nothing_goes_early() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        store.engine.pass(30).unwrap();
        let blob = put(&store, "pr-1", 1).await;
        // Looked at without being used.
        let exists = |store: &Embedded| {
            let key = super::super::rows::row_key(&"pr-1".parse().unwrap(), blob.as_bytes());
            store.engine.blob_row(&key).unwrap().is_some()
        };
        for _ in 0..7 * DAY {
            store.engine.pass(1).unwrap();
            assert!(exists(&store));
        }
        for _ in 0..120 {
            store.engine.pass(1).unwrap();
        }
        assert!(!exists(&store));
    }

    #[tokio::test]
    async fn housekeeping_lets_the_time_pass_that_the_server_runs() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        let (aged, kept) = (put(&store, "pr-1", 1).await, put(&store, "kept", 2).await);
        for _ in 0..3 {
            let began = std::time::Instant::now().checked_sub(MINUTE * u32::try_from(5 * DAY).unwrap());
            *store.engine.last_minute.lock().unwrap() = began.unwrap();
            store.maintain().await.unwrap();
        }
        assert!(!has(&store, "pr-1", aged).await && has(&store, "kept", kept).await);
    }
}
