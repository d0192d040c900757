//! What an entry costs, from a thousand of them to as many as `CACHEC_ENTRIES` says: looking it up, putting it, evicting
//! it, starting over it, and the memory for all. `bench/campaigns.sh entries` has ten million.
//!
//! Only counts are asserted; times are printed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::io::Cursor;
use std::path::Path;
use std::time::{Duration, Instant};

use cachec_protocol::{ActionKey, Digest, encode};
use cachec_server::namespace::Namespace;
use cachec_server::store::embedded::{Embedded, EmbeddedOptions};
use cachec_server::store::{BlobUpload, Publication, PutOutcome, Store};
use futures_util::StreamExt;
use harness::{Blob, result};

/// Namespaces that the entries are spread over.
const NAMESPACES: u64 = 20;

/// Samples of what is timed by itself.
const SAMPLES: u64 = 2000;

fn namespace(number: u64) -> Namespace {
    format!("pr-{}", number % NAMESPACES).parse().unwrap()
}

fn blob(number: u64) -> Blob {
    Blob::noise(number, 100)
}

fn action(number: u64) -> ActionKey {
    ActionKey::from_bytes(*Digest::of(&number.to_le_bytes()).as_bytes())
}

/// Every tenth entry is a result.
async fn put(store: &Embedded, number: u64) {
    let outcome = if number.is_multiple_of(10) {
        let mut stored = result(0, number, None);
        stored.action_key = action(number);
        let publication = Publication {
            namespace: namespace(number),
            result_key: stored.result_key(),
            action_key: stored.action_key,
            pack: None,
            encoded: encode(&stored).into(),
            action_fields: Vec::new(),
        };
        store.publish(publication).await.unwrap()
    } else {
        let blob = blob(number);
        let (namespace, body) = (namespace(number), Box::new(Cursor::new(blob.frames)));
        let upload = BlobUpload { namespace, digest: blob.digest, stored_bytes: None, body };
        store.put_blob(upload).await.unwrap()
    };
    assert_eq!(outcome, PutOutcome::Created);
}

fn open(data: &Path, max_size_bytes: u64) -> (Embedded, Duration) {
    let started = Instant::now();
    let directory = data.to_owned();
    let policy = std::sync::Arc::default();
    let store =
        Embedded::open(&EmbeddedOptions { directory, max_size_bytes, max_blob_bytes: 1 << 30, policy })
            .unwrap();
    (store, started.elapsed())
}

/// Median and 99th percentile of something done at random places below `count`.
async fn timed(count: u64, mut each: impl AsyncFnMut(u64)) -> String {
    let mut times = Vec::new();
    for sample in 0..SAMPLES {
        let place = Digest::of(&sample.to_le_bytes());
        let number = u64::from_le_bytes(place.as_bytes()[..8].try_into().unwrap()) % count;
        let started = Instant::now();
        each(number).await;
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    format!("{:5.0} / {:5.0}", times[times.len() / 2], times[times.len() * 99 / 100])
}

fn memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_costs_the_same_however_many_there_are() {
    let most = harness::rounds("CACHEC_ENTRIES", 10_000);
    let size_bytes = (most * 4096).max(256 << 20);
    let data = tempfile::tempdir().unwrap();
    let (mut store, _) = open(data.path(), size_bytes);
    println!("entries      puts/s  lookup us p50/p99  open us p50/p99  start ms  memory MiB");
    let mut count = 0;
    for target in
        std::iter::successors(Some(1000), |last| Some(last * 10)).take_while(|target| *target <= most)
    {
        let started = Instant::now();
        let puts = futures_util::stream::iter(count..target)
            .for_each_concurrent(16, async |number| put(&store, number).await);
        puts.await;
        let per_second = (target - count) as f64 / started.elapsed().as_secs_f64();
        count = target;
        let memory_mib = memory_mib();
        store.close().unwrap();
        drop(store);
        let start;
        (store, start) = open(data.path(), size_bytes);
        let lookups = timed(count, async |number| {
            let key = number - number % 10;
            let found = store.lookup(namespace(key), vec![action(key)], 1 << 20).await.unwrap();
            assert_eq!(found.len(), 1);
        });
        let lookups = lookups.await;
        let opens = timed(count, async |number| {
            let number = if number.is_multiple_of(10) { number + 1 } else { number };
            let found =
                store.open_blob(namespace(number), Digest::of(&harness::noise(number, 100))).await.unwrap();
            assert!(found.is_some());
        });
        println!(
            "{count:9} {per_second:9.0}  {lookups}      {}    {:8.0}  {memory_mib:10}",
            opens.await,
            start.as_secs_f64() * 1e3
        );
        let stats = store.stats().await.unwrap();
        assert_eq!(stats.blobs + stats.results, count);
        assert_eq!(stats.namespace_bytes.values().sum::<u64>(), stats.stored_bytes);
    }
    evict_half(store, data.path()).await;
}

/// Lowers the limit so that half of everything goes when the store is opened.
async fn evict_half(store: Embedded, data: &Path) {
    let before = store.stats().await.unwrap();
    store.close().unwrap();
    drop(store);
    let half_bytes = before.stored_bytes / 2;
    let max_size_bytes = (half_bytes / 7 * 8).min(half_bytes + (256 << 20));
    let (store, took) = open(data, max_size_bytes);
    let after = store.stats().await.unwrap();
    assert!(after.stored_bytes <= after.limit_bytes);
    let left = after.blobs + after.results;
    let evicted = before.blobs + before.results - left;
    assert!(evicted.abs_diff(left) < left / 5, "{evicted} evicted, {left} left");
    assert_eq!(after.namespace_bytes.values().sum::<u64>(), after.stored_bytes);
    println!("{evicted} evicted, {:.0} per second", evicted as f64 / took.as_secs_f64());
    store.close().unwrap();
}
