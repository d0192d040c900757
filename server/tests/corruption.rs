//! Flipped bits and cut files, in the database and in blobs: nothing wrong is ever served.
//!
//! A server sends a blob's frames as they are, and its client checks their content's digest; a test of what is served
//! does the same.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cachec_protocol::pack::Decompressor;
use cachec_protocol::{ActionKey, Digest, StoredResult, encode};
use cachec_server::namespace::Namespace;
use cachec_server::store::embedded::Embedded;
use cachec_server::store::{BlobUpload, Publication, Store};
use harness::{Blob, MIB, files, harm, options, result};

fn open(data: &Path) -> Result<Embedded, cachec_server::store::StoreError> {
    Embedded::open(&options(data, 64 * MIB).store)
}

fn namespace() -> Namespace {
    "default".parse().unwrap()
}

/// What is in the store that is harmed.
struct Contents {
    blobs: Vec<Blob>,
    results: Vec<StoredResult>,
}

impl Contents {
    fn new() -> Self {
        let blobs: Vec<_> =
            (0..24).map(|seed| Blob::noise(seed, [300, 5_000, 20_000, 60_000][seed as usize % 4])).collect();
        let results = (0..24).map(|number| {
            let pack = Some(blobs[number as usize].digest);
            result(number as u8, number, pack)
        });
        Self { results: results.collect(), blobs }
    }

    async fn put(&self, store: &Embedded) {
        for blob in &self.blobs {
            let body = Box::new(std::io::Cursor::new(blob.frames.clone()));
            let upload = BlobUpload { namespace: namespace(), digest: blob.digest, stored_bytes: None, body };
            store.put_blob(upload).await.unwrap();
        }
        for result in &self.results {
            let publication = Publication {
                namespace: namespace(),
                result_key: result.result_key(),
                action_key: result.action_key,
                pack: result.pack.map(|pack| pack.digest),
                encoded: encode(result).into(),
                action_fields: b"fields".to_vec(),
            };
            store.publish(publication).await.unwrap();
        }
    }

    /// Counts what is served as it was put, and what is not served. Panics where something else is.
    async fn check(&self, store: &Embedded) -> (usize, usize) {
        let (mut right, mut absent) = (0, 0);
        let mut count = |is_right: bool| if is_right { right += 1 } else { absent += 1 };
        for blob in &self.blobs {
            let served = match store.open_blob(namespace(), blob.digest).await {
                Ok(Some(open)) => frames(open.into_reader()).await,
                _ => None,
            };
            let content = served.and_then(|frames| content(&frames, blob.content.len() as u64));
            let accepted = content.filter(|content| Digest::of(content) == blob.digest);
            assert!(
                accepted.as_ref().is_none_or(|content| *content == blob.content),
                "a wrong blob is served"
            );
            count(accepted.is_some());
        }
        for result in &self.results {
            let keys: Vec<ActionKey> = vec![result.action_key];
            let manifests = store.lookup(namespace(), keys, 1 << 20).await.unwrap_or_default();
            let found: Vec<_> = manifests.iter().flat_map(|manifest| manifest.readable_results()).collect();
            assert!(found.iter().all(|found| found == result), "a wrong result is served");
            count(!found.is_empty());
        }
        (right, absent)
    }
}

async fn frames(mut reader: cachec_server::store::BlobReader) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.next_chunk().await.ok()? {
        bytes.extend_from_slice(&chunk);
    }
    Some(bytes)
}

fn content(frames: &[u8], limit_bytes: u64) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    let mut decompressor = Decompressor::new(frames, limit_bytes).ok()?;
    std::io::Read::read_to_end(&mut decompressor, &mut content).ok()?;
    Some(content)
}

/// A copy whose files are links to those of the original.
fn copy(original: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir_in(original.parent().unwrap()).unwrap();
    for file in files(original) {
        let target = copy.path().join(file.strip_prefix(original).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        // RocksDB writes on in some of its files.
        if file.parent().unwrap().ends_with("db") {
            std::fs::copy(&file, &target).unwrap();
        } else {
            std::fs::hard_link(&file, &target).unwrap();
        }
    }
    copy
}

async fn store_with(contents: &Contents, data: &Path) {
    let store = open(data).unwrap();
    contents.put(&store).await;
    // Half of it in tables, half in the log, as at most moments.
    store.close().unwrap();
    drop(store);
    let store = open(data).unwrap();
    assert_eq!(contents.check(&store).await, (48, 0));
    store.close().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_and_cut_files_never_make_anything_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let original = directory.path().join("original");
    let contents = Arc::new(Contents::new());
    store_with(&contents, &original).await;
    let mut outcomes: BTreeMap<(String, &str), u64> = BTreeMap::new();
    for round in 0..harness::rounds("CACHEC_FLIPS", 120) {
        let copy = copy(&original);
        let random = blake3::hash(&round.to_le_bytes());
        let [which, place] =
            [0, 8].map(|at| u64::from_le_bytes(random.as_bytes()[at..at + 8].try_into().unwrap()));
        let mut candidates: Vec<PathBuf> = files(copy.path());
        candidates.retain(|path| path.metadata().unwrap().len() > 0 && !path.ends_with("control"));
        candidates.sort_unstable();
        let file = candidates[(which % candidates.len() as u64) as usize].clone();
        harm(&file, place, round % 5 == 0);
        let outcome = match open(copy.path()) {
            Err(_) => "refused to start",
            Ok(store) => {
                let (_, absent) = contents.check(&store).await;
                let _ = store.close();
                if absent > 0 { "absent" } else { "no harm" }
            }
        };
        let kind = file.extension().map_or_else(
            || {
                if file.starts_with(copy.path().join("blobs")) {
                    "blob".to_owned()
                } else {
                    "other".to_owned()
                }
            },
            |extension| extension.to_string_lossy().into_owned(),
        );
        *outcomes.entry((kind, outcome)).or_default() += 1;
    }
    println!("{outcomes:#?}");
    assert!(outcomes[&("blob".to_owned(), "absent")] > 0);
    assert!(!outcomes.contains_key(&("blob".to_owned(), "no harm")), "a harmed blob was not noticed");
    assert!(outcomes.keys().any(|(kind, outcome)| kind == "sst" && *outcome != "no harm"), "{outcomes:?}");
}

/// The campaign catches a store that serves something else.
#[tokio::test(flavor = "multi_thread")]
#[should_panic(expected = "a wrong result is served")]
async fn a_wrong_result_would_be_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let contents = Contents::new();
    store_with(&contents, directory.path()).await;
    let mut expected = contents;
    expected.results[7].stderr = b"another".to_vec();
    expected.check(&open(directory.path()).unwrap()).await;
}
