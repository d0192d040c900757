//! Many clients that are slow, silent or gone, and one that is not.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use harness::{Blob, Program, program, wait_for};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a client sends that then says nothing more. None has a token.
const STARTS: [&[u8]; 6] = [
    b"",
    b"GET /v1/default/bl",
    b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-slow: ",
    b"PUT /v1/default/blobs/0000000000000000000000000000000000000000000000000000000000000000 HTTP/1.1\r\n\
      host: x\r\ncontent-length: 1000000\r\n\r\n0123456789",
    b"POST /v1/default/lookup HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
];

async fn metric(url: &str, name: &str) -> u64 {
    let text =
        harness::http_client().get(format!("{url}/metrics")).send().await.unwrap().text().await.unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)).expect(name);
    value.trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_slow_clients_neither_stops_nor_swells_the_server() {
    let count = harness::rounds("CACHEC_CONNECTIONS", 600) as usize;
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let data = tempfile::tempdir().unwrap();
    let token = program()
        .args(["token", "create", "--namespace", "default", "--allow", "read,write", "--data"])
        .arg(data.path())
        .output()
        .unwrap();
    let token = String::from_utf8(token.stdout).unwrap().trim().to_owned();
    let server = Program::start(data.path(), &["--max-connections", "20000"]);
    let address = server.url.trim_start_matches("http://").to_owned();
    let client = harness::http_client();
    let blob = Blob::noise(1, 300_000);
    let blob_url =
        |seed: u64| format!("{}/v1/default/blobs/{}", server.url, Blob::noise(seed, 300_000).digest);
    let put = client.put(blob_url(1)).bearer_auth(&token).body(blob.frames.clone());
    assert_eq!(put.send().await.unwrap().status(), 201);
    let (descriptors, memory_kib) =
        (metric(&server.url, "process_open_fds ").await, server.peak_memory_kib());

    let crowd = tokio::task::spawn_blocking(move || {
        let connect = |number: usize| {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.write_all(STARTS[number % STARTS.len()]).unwrap();
            stream
        };
        (0..count).map(connect).collect::<Vec<_>>()
    });
    let crowd = crowd.await.unwrap();
    assert!(metric(&server.url, "cachec_connections ").await as usize > count / 2);
    let started = Instant::now();
    for seed in 2..42 {
        let got = client.get(blob_url(1)).bearer_auth(&token).send().await.unwrap();
        assert_eq!(got.bytes().await.unwrap(), blob.frames);
        let other = Blob::noise(seed, 300_000);
        let put = client.put(blob_url(seed)).bearer_auth(&token).body(other.frames);
        assert_eq!(put.send().await.unwrap().status(), 201);
    }
    let crowded_kib = server.peak_memory_kib();
    println!(
        "{count} slow clients: {memory_kib} KiB before, {crowded_kib} KiB with them; 80 requests in {:?}",
        started.elapsed()
    );
    // A connection costs its buffers; the rest is what 40 uploads take.
    assert!(crowded_kib < memory_kib + 64 * 1024 + 32 * count as u64, "{crowded_kib} KiB");
    drop(crowd);
    wait_for("the crowd is forgotten", async || {
        let connections = metric(&server.url, "cachec_connections ").await;
        let open = metric(&server.url, "process_open_fds ").await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        connections < 8 && open < descriptors + 100
    })
    .await;
}
