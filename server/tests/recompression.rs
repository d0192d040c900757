//! Blobs become smaller in the background, and nobody notices but by their length.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics fails, as it should")]

mod harness;

use std::time::Duration;

use cachec_protocol::Digest;
use cachec_protocol::pack::Decompressor;
use futures_util::StreamExt;
use harness::{Blob, MIB, TestServer, files, noise, wait_for};

/// Content that a high level makes smaller than a low one does: a shuffled text of many words.
fn text(length: usize) -> Vec<u8> {
    let words = noise(1, 4096 * 8);
    let words: Vec<&[u8]> = words.chunks(8).collect();
    let order = noise(2, length);
    let mut text: Vec<u8> = order
        .chunks(2)
        .flat_map(|pair| words[usize::from(pair[0]) * 16 + usize::from(pair[1] % 16)])
        .copied()
        .collect();
    text.truncate(length);
    text
}

fn content(frames: &[u8], limit_bytes: u64) -> Vec<u8> {
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut Decompressor::new(frames, limit_bytes).unwrap(), &mut content).unwrap();
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_becomes_smaller_and_stays_what_it_is() {
    let server = TestServer::start_with(256 * MIB, |options| options.recompress_level = Some(19)).await;
    let blob = Blob::new(text(2 << 20));
    let before = server.stats().await.stored_bytes;
    assert_eq!(server.put(&blob).await, 201);
    let uploaded = server.stats().await.stored_bytes - before;
    // The build may go on.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(server.stats().await.recompressed_blobs, 0);
    wait_for("it is smaller", async || server.stats().await.recompressed_blobs == 1).await;
    let stats = server.stats().await;
    let frames = server.get(&blob.digest).await.unwrap();
    assert!(frames.len() < blob.frames.len(), "{} of {}", frames.len(), blob.frames.len());
    assert_eq!(content(&frames, blob.content.len() as u64), blob.content);
    assert_eq!(stats.saved_bytes, (blob.frames.len() - frames.len()) as u64);
    assert!(stats.stored_bytes - before < uploaded, "the account still has the old bytes");
    wait_for("one file is left", async || files(&server.data.path().join("blobs")).len() == 1).await;
    server.assert_nothing_left_behind().await;
    // It is not done again, and its level is forgotten by nobody.
    let server = server.restart().await;
    assert_eq!(server.get(&blob.digest).await.unwrap(), frames);
    assert_eq!(server.put(&blob).await, 200);
    assert_eq!(server.stats().await.recompressed_blobs, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_process_left_is_found_and_what_gains_nothing_is_left_alone() {
    let server = TestServer::start_with(256 * MIB, |_| {}).await;
    let (gains, dense) = (Blob::new(text(1 << 20)), Blob::noise(3, 1 << 20));
    assert_eq!((server.put(&gains).await, server.put(&dense).await), (201, 201));
    let mut server = server;
    server.options.recompress_level = Some(19);
    let server = server.restart().await;
    wait_for("one is smaller", async || server.stats().await.recompressed_blobs == 1).await;
    assert!(server.get(&gains.digest).await.unwrap().len() < gains.frames.len());
    assert_eq!(server.get(&dense.digest).await.unwrap(), dense.frames);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_goes_on_with_the_bytes_it_began_with() {
    let server = TestServer::start_with(256 * MIB, |_| {}).await;
    // More than the connection holds.
    let blob = Blob::new([noise(4, 12 << 20), text(1 << 20)].concat());
    assert_eq!(server.put(&blob).await, 201);
    let response = server.client.get(server.blob_url(&blob.digest)).send().await.unwrap();
    let recompression = server.running.store().recompress(19).unwrap();
    wait_for("it is smaller", async || server.stats().await.recompressed_blobs == 1).await;
    wait_for("the old file is gone", async || files(&server.data.path().join("blobs")).len() == 1).await;
    let mut received = Vec::new();
    let mut chunks = response.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        received.extend_from_slice(&chunk.unwrap());
    }
    assert_eq!(Digest::of(&received), Digest::of(&blob.frames));
    drop(recompression);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_blob_counts_as_absent() {
    let server = TestServer::start_with(256 * MIB, |_| {}).await;
    let blob = Blob::new(text(1 << 20));
    assert_eq!(server.put(&blob).await, 201);
    let file = files(&server.data.path().join("blobs")).remove(0);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let _recompression = server.running.store().recompress(19).unwrap();
    wait_for("it is absent", async || server.get(&blob.digest).await.is_none()).await;
    assert_eq!(server.put(&blob).await, 201);
    assert_eq!(content(&server.get(&blob.digest).await.unwrap(), blob.content.len() as u64), blob.content);
}
