//! The size limit, eviction, and references.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use cachec_protocol::Digest;
use cachec_server::store::StoreStats;
use harness::{Blob, MIB, TestServer, disk_bytes, entry_limit, result};

fn assert_within_limit(stats: &StoreStats) {
    assert!(stats.stored_bytes + stats.reserved_bytes <= stats.limit_bytes, "{stats:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_holds_at_every_moment_of_concurrent_uploads() {
    const SIZE: u64 = 24 * MIB;
    let server = Arc::new(TestServer::start_with(SIZE, |_| {}).await);
    let (watcher, done) = watch(server.data.path(), disk_bytes);
    let created = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..6)
        .map(|writer| {
            let (server, created) = (Arc::clone(&server), Arc::clone(&created));
            tokio::spawn(async move {
                for round in 0..30_u64 {
                    let seed = writer * 1000 + round;
                    let length = [500, 10_000, 17_000, 400_000, 1_500_000, 4_000_000][(seed % 6) as usize];
                    let blob = Blob::noise(seed, length);
                    match server.put(&blob).await {
                        201 => created.fetch_add(1, Ordering::Relaxed),
                        507 => 0,
                        other => panic!("PUT answered {other}"),
                    };
                    // Every third has a result, so that not only single blobs are evicted.
                    if seed.is_multiple_of(3) {
                        let pack = result((seed % 251) as u8, seed, Some(blob.digest));
                        assert!([201, 409, 507].contains(&server.publish(&pack).await));
                    }
                    assert_within_limit(&server.stats().await);
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    let most_bytes = watcher.join().unwrap();
    assert!(most_bytes <= entry_limit(SIZE), "{most_bytes} bytes on disk");
    assert!(most_bytes > entry_limit(SIZE) / 2, "the store was never full: {most_bytes} bytes");
    assert!(created.load(Ordering::Relaxed) > 100, "most uploads must find room");
    assert!(server.stats().await.evicted_entries > 50);
    server.assert_nothing_left_behind().await;
    assert_account_is_exact(&server).await;
}

/// Fails unless the account and the files agree: what is stored is the files' blocks and some rows.
async fn assert_account_is_exact(server: &TestServer) {
    let stats = server.stats().await;
    let disk = disk_bytes(server.data.path());
    // A row is counted as 512 bytes, inline data as up to 40 KiB for each blob.
    let rows = stats.blobs * (512 + 40_960) + stats.results * 2048;
    assert!(disk <= stats.stored_bytes, "{disk} bytes on disk, {stats:?}");
    assert!(stats.stored_bytes <= disk + rows, "{disk} bytes on disk, {stats:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_least_recently_used_entries_go_first() {
    let server = TestServer::start_with(16 * MIB, |_| {}).await;
    let blobs: Vec<Blob> = (0..12).map(|seed| Blob::noise(seed, 1_000_000)).collect();
    for blob in &blobs {
        assert_eq!(server.put(blob).await, 201);
    }
    // By every way of using it.
    server.get(&blobs[0].digest).await.unwrap();
    server.client.head(server.blob_url(&blobs[2].digest)).send().await.unwrap();
    assert_eq!(server.put(&blobs[4]).await, 200);
    let list = cachec_protocol::message::BlobList { digests: vec![blobs[6].digest] };
    server.post("/v1/default/blobs/missing", cachec_protocol::encode(&list)).await;
    server.post("/v1/default/fetch", cachec_protocol::encode(&list)).await.bytes().await.unwrap();
    for seed in 100..106 {
        assert_eq!(server.put(&Blob::noise(seed, 1_000_000)).await, 201);
    }
    let mut kept = Vec::new();
    for (index, blob) in blobs.iter().enumerate() {
        if server.get(&blob.digest).await.is_some() {
            kept.push(index);
        }
    }
    for used in [0, 2, 4, 6] {
        assert!(kept.contains(&used), "{used} was used and evicted; kept are {kept:?}");
    }
    for unused in [1, 3, 5] {
        assert!(!kept.contains(&unused), "{unused} was not used and kept; kept are {kept:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_is_looked_up_keeps_its_pack() {
    let server = TestServer::start_with(16 * MIB, |_| {}).await;
    let packs: Vec<Blob> = (0..4).map(|seed| Blob::noise(seed, 1_000_000)).collect();
    for (action, pack) in (0u8..).zip(&packs) {
        server.put(pack).await;
        assert_eq!(server.publish(&result(action, 0, Some(pack.digest))).await, 201);
    }
    for seed in 100..130 {
        assert_eq!(server.lookup(2).await.len(), 1);
        assert_eq!(server.put(&Blob::noise(seed, 1_000_000)).await, 201);
    }
    assert!(server.get(&packs[2].digest).await.is_some());
    for gone in [0u8, 1, 3] {
        assert_eq!(server.lookup(gone).await, []);
        assert_eq!(server.get(&packs[usize::from(gone)].digest).await, None);
    }
    // A result never outlives its pack.
    let stats = server.stats().await;
    assert_eq!(stats.results, 1);
    assert_account_is_exact(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_pack_survives_the_eviction_of_one_of_its_results() {
    let server = TestServer::start_with(16 * MIB, |_| {}).await;
    let shared = Blob::noise(1, 1_000_000);
    server.put(&shared).await;
    let (old, new) = (result(1, 0, Some(shared.digest)), result(2, 0, Some(shared.digest)));
    assert_eq!(server.publish(&old).await, 201);
    assert_eq!(server.publish(&new).await, 201);
    // Publishing again takes no second reference.
    assert_eq!(server.publish(&new).await, 200);
    let mut seed = 100;
    while server.stats().await.results == 2 {
        assert_eq!(server.lookup(2).await.len(), 1);
        assert_eq!(server.put(&Blob::noise(seed, 1_000_000)).await, 201);
        seed += 1;
        assert!(seed < 200, "nothing is evicted");
    }
    assert_eq!(server.lookup(1).await, []);
    assert_eq!(server.lookup(2).await, [new]);
    assert_eq!(server.get(&shared.digest).await, Some(shared.frames.clone()));
    // When its last result goes, it goes.
    while server.stats().await.results > 0 || server.get_quietly(&shared.digest) {
        assert_eq!(server.put(&Blob::noise(seed, 1_000_000)).await, 201);
        seed += 1;
        assert!(seed < 300, "the pack is never evicted");
    }
    assert_account_is_exact(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_dropped_from_a_manifest_release_their_packs() {
    let server = TestServer::start_with(64 * MIB, |_| {}).await;
    let packs: Vec<Blob> = (0..12).map(|seed| Blob::noise(seed, 100_000)).collect();
    for (variant, pack) in (0..).zip(&packs) {
        server.put(pack).await;
        assert_eq!(server.publish(&result(1, variant, Some(pack.digest))).await, 201);
    }
    assert_eq!(server.stats().await.results, 8);
    // The results that stayed are in use; the packs of the four that went are not.
    let mut seed = 1000;
    while server.get_quietly(&packs[3].digest) {
        assert_eq!(server.lookup(1).await.len(), 8);
        assert_eq!(server.put(&Blob::noise(seed, 1_000_000)).await, 201);
        seed += 1;
        assert!(seed < 1100, "the released pack is never evicted");
    }
    for pack in &packs[4..] {
        assert!(server.get_quietly(&pack.digest));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_uploads_of_one_blob_store_it_once() {
    let server = Arc::new(TestServer::start().await);
    for length in [5_000, 2_000_000] {
        let before = server.stats().await;
        let blob = Arc::new(Blob::noise(length as u64, length));
        let uploads: Vec<_> = (0..8)
            .map(|_| {
                let (server, blob) = (Arc::clone(&server), Arc::clone(&blob));
                tokio::spawn(async move { server.put(&blob).await })
            })
            .collect();
        let mut created = 0;
        for upload in uploads {
            match upload.await.unwrap() {
                201 => created += 1,
                200 => {}
                other => panic!("PUT answered {other}"),
            }
        }
        assert_eq!(created, 1);
        let after = server.stats().await;
        assert_eq!(after.blobs, before.blobs + 1);
        assert_eq!(server.get(&blob.digest).await.as_ref(), Some(&blob.frames));
    }
    server.assert_nothing_left_behind().await;
    assert_account_is_exact(&server).await;
    assert_eq!(harness::files(&server.data.path().join("blobs")).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_publications_of_one_result_take_one_reference() {
    let server = Arc::new(TestServer::start_with(16 * MIB, |_| {}).await);
    for round in 0..20u8 {
        let pack = Blob::noise(u64::from(round), 20_000);
        server.put(&pack).await;
        let published = result(round, 0, Some(pack.digest));
        let publications: Vec<_> = (0..8)
            .map(|_| {
                let (server, published) = (Arc::clone(&server), published.clone());
                tokio::spawn(async move { server.publish(&published).await })
            })
            .collect();
        let mut created = 0;
        for publication in publications {
            created += u16::from(publication.await.unwrap() == 201);
        }
        assert_eq!(created, 1);
        assert_eq!(server.lookup(round).await, [published]);
    }
    assert_eq!(server.stats().await.results, 20);
    // A reference too many would keep the packs for ever.
    for seed in 100..140 {
        assert_eq!(server.put(&Blob::noise(seed, 1_000_000)).await, 201);
    }
    assert_eq!(server.stats().await.results, 0);
    for round in 0..20 {
        assert!(!server.get_quietly(&Blob::noise(round, 20_000).digest));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_in_flight_survives_the_eviction_of_its_blob() {
    let server = TestServer::start_with(64 * MIB, |_| {}).await;
    let blob = Blob::noise(1, 24 << 20);
    assert_eq!(server.put(&blob).await, 201);
    let mut response = server.client.get(server.blob_url(&blob.digest)).send().await.unwrap();
    let mut received = response.chunk().await.unwrap().unwrap().to_vec();
    let mut seed = 100;
    while server.get_quietly(&blob.digest) {
        assert_eq!(server.put(&Blob::noise(seed, 4_000_000)).await, 201);
        seed += 1;
        assert!(seed < 200, "the blob is never evicted");
    }
    assert_eq!(server.get(&blob.digest).await, None);
    while let Some(chunk) = response.chunk().await.unwrap() {
        received.extend_from_slice(&chunk);
    }
    assert!(received == blob.frames);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_whose_file_is_missing_or_cut_is_absent_and_can_be_put_again() {
    let server = TestServer::start().await;
    let blobs = [Blob::noise(1, 500_000), Blob::noise(2, 500_000), Blob::noise(3, 500_000)];
    for blob in &blobs {
        assert_eq!(server.put(blob).await, 201);
    }
    // The third is needed by a result.
    let needs = result(1, 1, Some(blobs[2].digest));
    server.publish(&needs).await;
    for path in harness::files(&server.data.path().join("blobs")) {
        if path.file_name().unwrap().to_string_lossy().starts_with(&blobs[0].digest.to_string()) {
            std::fs::write(path, b"cut").unwrap();
        } else {
            std::fs::remove_file(path).unwrap();
        }
    }
    for blob in &blobs {
        assert_eq!(server.get(&blob.digest).await, None);
        assert_eq!(server.put(blob).await, 201);
        assert_eq!(server.get(&blob.digest).await.as_ref(), Some(&blob.frames));
    }
    assert_eq!(server.lookup(1).await, [needs]);
    assert_eq!(server.stats().await.blobs, 3);
    assert_account_is_exact(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lowered_limit_is_kept_from_the_start() {
    let mut server = TestServer::start_with(64 * MIB, |_| {}).await;
    for seed in 0..40 {
        assert_eq!(server.put(&Blob::noise(seed, 1_000_000)).await, 201);
    }
    server.options.store.max_size_bytes = 16 * MIB;
    let server = server.restart().await;
    assert_within_limit(&server.stats().await);
    assert!(disk_bytes(server.data.path()) <= entry_limit(16 * MIB));
    assert!(server.get(&Blob::noise(39, 1_000_000).digest).await.is_some());
    assert_eq!(server.get(&Blob::noise(0, 1_000_000).digest).await, None);
}

/// Everything inline, so that most of the directory is RocksDB's.
#[tokio::test(flavor = "multi_thread")]
async fn the_whole_data_directory_stays_within_the_size() {
    flooded(1200, async |server, seed| {
        let blob = Blob::noise(seed, 15_000);
        assert_eq!(server.put(&blob).await, 201);
        let published = server.publish(&result((seed % 250) as u8, seed, Some(blob.digest))).await;
        assert!([201, 409].contains(&published));
    })
    .await;
}

/// Results go out of the database as fast as they come in.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_long_results_stays_within_the_size() {
    flooded(300, async |server, seed| {
        for part in 0..8 {
            let mut long = result((seed % 250) as u8, seed * 8 + part, None);
            long.stderr = harness::noise(seed * 8 + part, 30_000);
            assert_eq!(server.publish(&long).await, 201);
        }
    })
    .await;
}

/// Has four clients do something so many times each, and compares all that is on the disk meanwhile with the size.
async fn flooded(times: u64, each: impl AsyncFn(&TestServer, u64)) {
    const SIZE: u64 = 64 * MIB;
    let server = TestServer::start_with(SIZE, |_| {}).await;
    let (watcher, done) = watch(server.data.path(), |data| {
        let files = harness::files(data);
        files.iter().filter_map(|path| path.metadata().ok()).map(|file| file.blocks() * 512).sum()
    });
    let (server, each) = (&server, &each);
    let clients = (0..4_u64).map(|client| async move {
        for seed in client * 10_000..client * 10_000 + times {
            each(server, seed).await;
        }
    });
    futures_util::future::join_all(clients).await;
    done.store(true, Ordering::Relaxed);
    let most_bytes = watcher.join().unwrap();
    let stats = server.stats().await;
    println!("at most {most_bytes} bytes of {SIZE}");
    assert_within_limit(&stats);
    assert!(most_bytes <= SIZE, "{most_bytes} bytes");
    assert!(stats.evicted_entries > 1000);
}

/// Keeps the largest of what `measure` finds until it is told that all is done.
fn watch(data: &Path, measure: fn(&Path) -> u64) -> (JoinHandle<u64>, Arc<AtomicBool>) {
    let done = Arc::new(AtomicBool::new(false));
    let (until, data) = (Arc::clone(&done), data.to_owned());
    let watcher = std::thread::spawn(move || {
        let mut most_bytes = 0;
        while !until.load(Ordering::Relaxed) {
            most_bytes = measure(&data).max(most_bytes);
            std::thread::sleep(Duration::from_millis(1));
        }
        most_bytes
    });
    (watcher, done)
}

trait Quiet {
    /// Whether a blob is there, without using it.
    fn get_quietly(&self, digest: &Digest) -> bool;
}

impl Quiet for TestServer {
    fn get_quietly(&self, digest: &Digest) -> bool {
        let prefix = digest.to_string();
        harness::files(&self.data.path().join("blobs"))
            .iter()
            .any(|path| path.file_name().unwrap().to_string_lossy().starts_with(&prefix))
    }
}
