//! Data of another version.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::path::Path;
use std::sync::Arc;

use cachec_protocol::Digest;
use cachec_protocol::pack::Decompressor;
use cachec_server::policy::Policy;
use harness::{MIB, TestServer, files, program};

/// A data directory that cachec-server wrote when its format was 1: a library in namespace `alpha`, then another in
/// `beta`, each with the records of cargo's probes and of its build.
const FORMAT_1: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/format-1");

fn copy(from: &Path, to: &Path) {
    for file in files(from) {
        let copied = to.join(file.strip_prefix(from).unwrap());
        std::fs::create_dir_all(copied.parent().unwrap()).unwrap();
        std::fs::copy(file, copied).unwrap();
    }
}

async fn content(server: &TestServer, namespace: &str, digest: &str) -> Option<Digest> {
    let url = server.url(&format!("/v1/{namespace}/blobs/{digest}"));
    let response = server.client.get(url).send().await.unwrap();
    if response.status() == 404 {
        return None;
    }
    let frames = response.bytes().await.unwrap();
    Some(Decompressor::new(frames.as_ref(), MIB).unwrap().finish().unwrap().0)
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_format_1_is_read_and_goes_on() {
    const ALPHA: &str = "1c282560fdf0af019b3a2ce2f02a012844fb886a59069221dc039434a49c7fe0";
    const BETA: &str = "054644c32056882a0536ebca4a685a35222cdf1e7188820f2d77f07def96b334";
    let start = |options: &mut cachec_server::server::ServerOptions| {
        copy(Path::new(FORMAT_1), &options.store.directory);
    };
    let server = TestServer::start_with(64 * MIB, start).await;
    for _ in 0..2 {
        assert_eq!(content(&server, "alpha", ALPHA).await, ALPHA.parse().ok());
        assert_eq!(content(&server, "beta", BETA).await, BETA.parse().ok());
        assert_eq!(content(&server, "alpha", BETA).await, None);
    }
    let mut server = server.restart().await;
    let stats = server.stats().await;
    assert_eq!((stats.blobs, stats.results, stats.stored_bytes), (2, 6, 119_373));
    assert_eq!(stats.namespace_bytes["other"], 119_373);
    // The order of the entries was kept, by namespace.
    let rules = toml::from_str("[alpha]\nquota = '1KiB'\n[beta]\nquota = '1MiB'").unwrap();
    server.options.store.policy = Arc::new(Policy::new(rules, None).unwrap());
    let server = server.restart().await;
    assert_eq!(content(&server, "alpha", ALPHA).await, None);
    assert_eq!(content(&server, "beta", BETA).await, BETA.parse().ok());
    let stats = server.stats().await;
    assert!(
        stats.namespace_bytes["beta"] > 40_000 && !stats.namespace_bytes.contains_key("alpha"),
        "{stats:?}"
    );
    assert_eq!(stats.namespace_bytes.values().sum::<u64>(), stats.stored_bytes);
}

#[test]
fn data_of_a_later_format_is_refused_and_left_alone() {
    let data = tempfile::tempdir().unwrap();
    copy(Path::new(FORMAT_1), data.path());
    let database = data.path().join("db");
    let format = |new: Option<u8>| {
        let options = rocksdb::Options::default();
        let families = rocksdb::DB::list_cf(&options, &database).unwrap();
        let db = rocksdb::DB::open_cf(&options, &database, families).unwrap();
        if let Some(new) = new {
            db.put("format", [new]).unwrap();
        }
        db.get("format").unwrap()
    };
    format(Some(99));
    let output = program().args(["--listen", "127.0.0.1:0", "--data"]).arg(data.path()).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && message.contains("another version"), "{message}");
    assert_eq!(format(None), Some(vec![99]));
    assert_eq!(files(&data.path().join("blobs")).len(), 2);
}
