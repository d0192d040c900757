//! Scrubbing and backups.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use cachec_protocol::Digest;
use harness::{Blob, MIB, Program, TestServer, files, result, run, wait_for};

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

/// Flips a bit in the middle of a blob's file.
fn damage(data: &Path, digest: &Digest) {
    let all = files(&data.join("blobs"));
    let is_its = |path: &&std::path::PathBuf| {
        path.file_name().unwrap().to_string_lossy().starts_with(&digest.to_string())
    };
    let file = all.iter().find(is_its).unwrap();
    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_rotted_is_found_kept_aside_and_can_be_put_again() {
    let server = TestServer::start_with(256 * MIB, |_| {}).await;
    let blobs: Vec<_> = (0..12).map(|seed| Blob::noise(seed, [1000, 40_000][seed as usize % 2])).collect();
    for blob in &blobs {
        assert_eq!(server.put(blob).await, 201);
    }
    let pack = result(1, 1, Some(blobs[1].digest));
    assert_eq!(server.publish(&pack).await, 201);
    damage(server.data.path(), &blobs[1].digest);
    damage(server.data.path(), &blobs[3].digest);
    let _scrub = server.running.store().scrub_every(Duration::from_secs(3600)).unwrap();
    wait_for("all is scrubbed", async || server.stats().await.scrubbed_blobs >= 12).await;
    assert_eq!(server.stats().await.damaged_blobs, 2);
    for (number, blob) in blobs.iter().enumerate() {
        assert_eq!(server.get(&blob.digest).await.is_some(), ![1, 3].contains(&number), "{number}");
    }
    assert_eq!(files(&server.data.path().join("quarantine")).len(), 2);
    for number in [1, 3] {
        assert_eq!(server.put(&blobs[number]).await, 201);
        assert_eq!(server.get(&blobs[number].digest).await.as_ref(), Some(&blobs[number].frames));
    }
    // The pass is over; the next one comes in an hour.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(server.stats().await.scrubbed_blobs, 12);
    let metrics = server.client.get(server.url("/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("\ncachec_damaged_blobs_total 2\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn quarantine_stays_small() {
    let server = TestServer::start_with(256 * MIB, |_| {}).await;
    for seed in 0..20 {
        let blob = Blob::noise(seed, 20_000);
        assert_eq!(server.put(&blob).await, 201);
        damage(server.data.path(), &blob.digest);
    }
    let report = server.running.store().scrub().await.unwrap();
    assert_eq!((report.blobs, report.damaged, report.miscounted_bytes), (20, 20, 0));
    assert_eq!(files(&server.data.path().join("quarantine")).len(), 8);
    assert!(files(&server.data.path().join("blobs")).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_is_scrubbed_by_command() {
    let server = TestServer::start_with(256 * MIB, |_| {}).await;
    let blob = Blob::noise(1, 40_000);
    assert_eq!(server.put(&blob).await, 201);
    let data = server.data.path().to_owned();
    let running = run(&["scrub"], &data);
    assert!(!running.status.success() && text(&running).contains("does a server run on it"), "{running:?}");
    let TestServer { running, data: kept, .. } = server;
    running.stop().await.unwrap();
    let clean = run(&["scrub"], &data);
    assert!(clean.status.success(), "{clean:?}");
    assert!(text(&clean).contains("1 blobs of"), "{clean:?}");
    std::fs::write(data.join("blobs/00").join("stray"), "x").unwrap();
    damage(&data, &blob.digest);
    let found = run(&["scrub"], &data);
    assert!(!found.status.success());
    assert!(text(&found).contains("1 damaged, 1 files without an entry, 0 bytes miscounted"), "{found:?}");
    assert!(run(&["scrub"], &data).status.success());
    assert!(text(&run(&["scrub"], Path::new("/nowhere"))).contains("no data directory"));
    drop(kept);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_busy_server_has_whole_entries_only() {
    let data = tempfile::tempdir().unwrap();
    let arguments = ["--max-size", "32MiB"];
    let program = Program::start(data.path(), &arguments);
    let client = harness::http_client();
    let url = |program: &Program, digest: &Digest| format!("{}/v1/default/blobs/{digest}", program.url);
    let put = async |blob: &Blob| {
        let put = client.put(url(&program, &blob.digest)).body(blob.frames.clone());
        assert_eq!(put.send().await.unwrap().status(), 201);
    };
    let before: Vec<_> = (0..10).map(|seed| Blob::noise(seed, [1000, 400_000][seed as usize % 2])).collect();
    for blob in &before {
        put(blob).await;
    }
    let token = run(&["token", "create", "--namespace", "default", "--allow", "read,write"], data.path());
    let token = String::from_utf8(token.stdout).unwrap();
    // Uploads go on, and evict, while it is made.
    let writes = tokio::spawn({
        let (client, program_url, token) = (client.clone(), program.url.clone(), token.trim().to_owned());
        async move {
            for seed in 100..200 {
                let blob = Blob::noise(seed, 400_000);
                let url = format!("{program_url}/v1/default/blobs/{}", blob.digest);
                let put = client.put(url).bearer_auth(&token).body(blob.frames);
                assert_eq!(put.send().await.unwrap().status(), 201);
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    let copies = tempfile::tempdir_in(data.path().parent().unwrap()).unwrap();
    let copy = copies.path().join("copy");
    let made = run(&["backup", copy.to_str().unwrap()], data.path());
    assert!(made.status.success(), "{made:?}");
    let again = run(&["backup", copy.to_str().unwrap()], data.path());
    assert!(!again.status.success() && text(&again).contains("something of that name"), "{again:?}");
    for inside in ["staging/x", "db/x", "blobs/00/x", "x"] {
        let refused = run(&["backup", data.path().join(inside).to_str().unwrap()], data.path());
        assert!(!refused.status.success() && text(&refused).contains("does not belong"), "{refused:?}");
    }
    writes.await.unwrap();
    drop(program);

    // What was there is there, byte for byte; so are the tokens.
    let restored = Program::start(&copy, &arguments);
    let ask = |digest: &Digest| client.get(url(&restored, digest));
    assert_eq!(ask(&before[0].digest).send().await.unwrap().status(), 401);
    for blob in &before {
        let got = ask(&blob.digest).bearer_auth(token.trim()).send().await.unwrap();
        assert_eq!(got.status(), 200);
        assert_eq!(got.bytes().await.unwrap(), blob.frames);
    }
    restored.terminate();
    wait_for("it has stopped", async || {
        !copy.join("control").exists() || run(&["scrub"], &copy).status.success()
    })
    .await;
    // A stopped server's, made by the command itself, elsewhere.
    let second = copies.path().join("second");
    let made = run(&["backup", second.to_str().unwrap()], &copy);
    assert!(made.status.success(), "{made:?}");
    assert!(run(&["scrub"], &second).status.success());
}
