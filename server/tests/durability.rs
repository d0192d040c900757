//! Restarts, kills, full disks, large blobs, and the end of a server.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use cachec_protocol::message::BlobList;
use cachec_protocol::pack::Decompressor;
use cachec_protocol::{Digest, encode};
use harness::{Blob, MIB, Program, TestServer, files, result};

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_everything() {
    let server = TestServer::start().await;
    let blobs: Vec<Blob> = [100, 16_000, 17_000, 1_000_000].map(|length| Blob::noise(1, length)).to_vec();
    for blob in &blobs {
        server.put(blob).await;
    }
    let published = result(1, 1, Some(blobs[3].digest));
    server.publish(&published).await;
    let before = server.stats().await;
    // Of an upload that a crash interrupted.
    std::fs::write(server.data.path().join("staging/0000"), b"left").unwrap();
    let server = server.restart().await;
    assert!(files(&server.data.path().join("staging")).is_empty());
    let after = server.stats().await;
    assert_eq!((after.stored_bytes, after.blobs, after.results), (before.stored_bytes, 4, 1));
    for blob in &blobs {
        assert_eq!(server.get(&blob.digest).await.as_ref(), Some(&blob.frames));
    }
    assert_eq!(server.lookup(1).await, [published]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_on_the_same_directory_is_refused() {
    let server = TestServer::start().await;
    server.put(&Blob::noise(1, 100_000)).await;
    std::fs::write(server.data.path().join("staging/of-the-first"), b"").unwrap();
    let second = harness::program()
        .args(["--listen", "127.0.0.1:0", "--data"])
        .arg(server.data.path())
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(server.data.path().join("staging/of-the-first").exists());
}

fn url(program: &Program, digest: &Digest) -> String {
    format!("{}/v1/default/blobs/{digest}", program.url)
}

/// Uploads until the server is gone. Returns what was acknowledged.
async fn upload_until_killed(program_url: String, first_seed: u64) -> Vec<Blob> {
    let client = harness::http_client();
    let mut acknowledged = Vec::new();
    for seed in first_seed..first_seed + 500 {
        let blob = noise_blob(seed);
        let url = format!("{program_url}/v1/default/blobs/{}", blob.digest);
        match client.put(url).body(blob.frames.clone()).send().await {
            Ok(response) if response.status().is_success() => acknowledged.push(blob.clone()),
            Ok(response) => assert_eq!(response.status(), 507),
            Err(_) => break,
        }
        let result = result((seed % 200) as u8, seed, Some(blob.digest));
        let url = format!("{program_url}/v1/default/results/{}", result.result_key());
        let _ = client.put(url).body(harness::publication(&result)).send().await;
    }
    acknowledged
}

/// Reads what was written, until the server is gone. What is served is whole.
async fn read_until_killed(program_url: String, first_seeds: Vec<u64>) -> u64 {
    let client = harness::http_client();
    let mut served = 0;
    for round in 0.. {
        for first_seed in &first_seeds {
            let blob = noise_blob(first_seed + round);
            let Ok(response) =
                client.get(format!("{program_url}/v1/default/blobs/{}", blob.digest)).send().await
            else {
                return served;
            };
            let is_there = response.status().is_success();
            match response.bytes().await {
                Ok(bytes) if is_there => {
                    assert!(bytes == blob.frames, "a blob is not what was put");
                    served += 1;
                }
                // Cut off: the client knows, because the length was announced.
                _ => {}
            }
        }
    }
    served
}

fn noise_blob(seed: u64) -> Blob {
    Blob::noise(seed, [2_000, 40_000, 600_000][(seed % 3) as usize])
}

/// Kills a server again and again while three clients upload, publish and read, and the store is full. Between a kill
/// and the next start `meddle` may do something.
async fn kill_campaign(kills: u64, meddle: impl Fn(&Path)) {
    let data = tempfile::tempdir().unwrap();
    let arguments = ["--max-size", "32MiB", "--recompress-level", "1"];
    let client = harness::http_client();
    let (mut served, mut slowest) = (0, Duration::ZERO);
    for kill in 0..kills {
        let mut program = Program::start(data.path(), &arguments);
        let first_seeds: Vec<_> = (0..3).map(|writer| kill * 10_000 + writer * 1000).collect();
        let uploads: Vec<_> = first_seeds
            .iter()
            .map(|first_seed| tokio::spawn(upload_until_killed(program.url.clone(), *first_seed)))
            .collect();
        let reads = tokio::spawn(read_until_killed(program.url.clone(), first_seeds));
        tokio::time::sleep(Duration::from_millis(80 + 37 * (kill % 20))).await;
        program.child.kill().unwrap();
        program.child.wait().unwrap();
        let mut acknowledged = Vec::new();
        for upload in uploads {
            acknowledged.push(upload.await.unwrap());
        }
        served += reads.await.unwrap();
        meddle(data.path());

        let restarted = SystemTime::now();
        let started = Instant::now();
        let program = Program::start(data.path(), &arguments);
        slowest = slowest.max(started.elapsed());
        // Recompression may have begun with files of its own, by a clock that is some milliseconds late.
        let is_left = |path: &std::path::PathBuf| {
            let modified = path.metadata().and_then(|metadata| metadata.modified());
            modified.is_ok_and(|modified| modified + Duration::from_millis(50) < restarted)
        };
        assert!(!files(&data.path().join("staging")).iter().any(is_left), "staging is not swept");
        // The last one of each that was acknowledged is among the newest: a kill forgets nothing.
        for last in acknowledged.iter().filter_map(|blobs| blobs.last()) {
            let response = client.head(url(&program, &last.digest)).send().await.unwrap();
            assert_eq!(response.status(), 200, "an acknowledged blob is gone");
        }
        for blob in acknowledged.iter().flatten() {
            let response = client.get(url(&program, &blob.digest)).send().await.unwrap();
            // It may have been evicted, but what is served is whole.
            if response.status() == 200 {
                assert!(response.bytes().await.unwrap() == blob.frames, "a blob is not what was put");
                served += 1;
            }
        }
        assert_all_files_are_known(data.path(), &program, &client).await;
    }
    println!("{kills} kills, {served} blobs served, slowest start {slowest:?}");
    assert!(served > kills * 5, "only {served} blobs were served");
    assert!(slowest < Duration::from_secs(5), "a start took {slowest:?}");
    let scrubbed = harness::program().args(["scrub", "--data"]).arg(data.path()).output().unwrap();
    assert!(scrubbed.status.success(), "{scrubbed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_comes_back_with_whole_blobs_only() {
    kill_campaign(harness::rounds("CACHEC_KILLS", 20), |_| {}).await;
}

/// The campaign catches a server that serves what is not what was put.
#[tokio::test(flavor = "multi_thread")]
#[should_panic(expected = "not what was put")]
async fn a_blob_that_a_kill_spoils_is_noticed() {
    let spoil = |data: &Path| {
        for file in files(&data.join("blobs")) {
            harness::harm(&file, 12_345, false);
        }
    };
    kill_campaign(5, spoil).await;
}

/// The campaign catches a server that forgets what it has acknowledged.
#[tokio::test(flavor = "multi_thread")]
#[should_panic(expected = "an acknowledged blob is gone")]
async fn a_blob_that_a_kill_loses_is_noticed() {
    kill_campaign(5, |data| {
        for file in files(&data.join("blobs")) {
            std::fs::remove_file(file).unwrap();
        }
        // The write-ahead log.
        for file in files(&data.join("db")) {
            if file.extension().is_some_and(|extension| extension == "log") {
                std::fs::write(file, "").unwrap();
            }
        }
    })
    .await;
}

/// Fails where a blob file is not served, whole: it would take space for ever. Recompression may have one evicted
/// meanwhile; its file is then about to go.
async fn assert_all_files_are_known(data: &Path, program: &Program, client: &reqwest::Client) {
    for path in files(&data.join("blobs")) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let digest: Digest = name[..64].parse().unwrap();
        let response = client.get(url(program, &digest)).send().await.unwrap();
        if response.status() == 404 {
            harness::wait_for(&format!("{name}, which has no row, is gone"), async || !path.exists()).await;
            continue;
        }
        assert_eq!(response.status(), 200);
        let frames = response.bytes().await.unwrap();
        let (found, _) = Decompressor::new(&frames[..], 64 << 20).unwrap().finish().unwrap();
        assert_eq!(found, digest, "{name} is corrupt");
    }
}

/// A body of incompressible bytes that is made while it is sent.
struct Noise {
    output: blake3::OutputReader,
    left: u64,
}

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.output.fill(&mut buffer[..count]);
        self.left -= count as u64;
        Ok(count)
    }
}

#[test]
fn a_blob_of_300_mb_streams_through_little_memory() {
    const CONTENT_BYTES: u64 = 300_000_000;
    const MEMORY_KIB: u64 = 150 << 10;
    let noise = || Noise { output: blake3::Hasher::new().finalize_xof(), left: CONTENT_BYTES };
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut noise(), &mut hasher).unwrap();
    let digest = Digest::from(hasher.finalize());
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), &["--max-size", "2GiB"]);
    let address = program.url.strip_prefix("http://").unwrap().to_owned();

    // The window as large as it may be, which is the most that the server needs to read it.
    let mut stream = TcpStream::connect(&address).unwrap();
    write!(
        stream,
        "PUT /v1/default/blobs/{digest} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    .unwrap();
    let mut encoder = zstd::Encoder::new(Chunks(&mut stream), 1).unwrap();
    encoder.window_log(cachec_protocol::pack::MAX_WINDOW_LOG).unwrap();
    std::io::copy(&mut noise(), &mut encoder).unwrap();
    encoder.finish().unwrap();
    stream.write_all(b"0\r\n\r\n").unwrap();
    let mut head = [0; 12];
    stream.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 201");

    let mut stream = TcpStream::connect(&address).unwrap();
    write!(stream, "GET /v1/default/blobs/{digest} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut stream = std::io::BufReader::with_capacity(1 << 20, stream);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        std::io::BufRead::read_line(&mut stream, &mut line).unwrap();
    }
    let (received, length) = Decompressor::new(stream, CONTENT_BYTES).unwrap().finish().unwrap();
    assert_eq!((received, length), (digest, CONTENT_BYTES));
    let peak_kib = program.peak_memory_kib();
    println!("peak memory of the server: {peak_kib} KiB");
    assert!(peak_kib < MEMORY_KIB, "{peak_kib} KiB");
}

/// Writes HTTP/1 chunks.
struct Chunks<'s>(&'s mut TcpStream);

impl Write for Chunks<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if !bytes.is_empty() {
            write!(self.0, "{:x}\r\n", bytes.len())?;
            self.0.write_all(bytes)?;
            self.0.write_all(b"\r\n")?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

#[test]
fn sigterm_finishes_the_request_in_flight() {
    let data = tempfile::tempdir().unwrap();
    let mut program = Program::start(data.path(), &[]);
    let blob = Blob::noise(1, 400_000);
    let address = program.url.strip_prefix("http://").unwrap().to_owned();
    let mut stream = TcpStream::connect(&address).unwrap();
    write!(
        stream,
        "PUT /v1/default/blobs/{} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        blob.digest,
        blob.frames.len()
    )
    .unwrap();
    stream.write_all(&blob.frames[..200_000]).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    program.terminate();
    std::thread::sleep(Duration::from_millis(300));
    assert!(program.child.try_wait().unwrap().is_none(), "it did not wait");
    assert!(TcpStream::connect(&address).is_err(), "it still takes connections");
    stream.write_all(&blob.frames[200_000..]).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    assert!(response.starts_with("HTTP/1.1 201"), "{response}");
    let status = program.child.wait().unwrap();
    assert!(status.success(), "{status}");

    let program = Program::start(data.path(), &[]);
    let mut stream = TcpStream::connect(program.url.strip_prefix("http://").unwrap()).unwrap();
    let head =
        format!("HEAD /v1/default/blobs/{} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", blob.digest);
    stream.write_all(head.as_bytes()).unwrap();
    response.clear();
    stream.read_to_string(&mut response).unwrap();
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
}

/// A small file system of its own; unmounted when it is dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// `None` where this process may not mount.
    fn new(size: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(directory.path())
            .output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(directory))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_serves_reads_and_recovers() {
    let Some(disk) = SmallDisk::new("96m") else {
        eprintln!(
            "SKIPPED: a_full_disk_refuses_writes_serves_reads_and_recovers needs the right to mount a tmpfs"
        );
        return;
    };
    let data = disk.0.path().join("data");
    let program = Program::start(&data, &["--max-size", "64MiB"]);
    let client = harness::http_client();
    let mut kept = vec![Blob::noise(1, 1_000), Blob::noise(2, 3_000_000)];
    kept.extend((1000..2000).map(|seed| Blob::noise(seed, 100)));
    for blob in &kept {
        let put = client.put(url(&program, &blob.digest)).body(blob.frames.clone());
        assert_eq!(put.send().await.unwrap().status(), 201);
    }
    let published = result(1, 1, Some(kept[1].digest));
    let publish_url = format!("{}/v1/default/results/{}", program.url, published.result_key());
    assert_eq!(
        client.put(publish_url).body(harness::publication(&published)).send().await.unwrap().status(),
        201
    );

    // First nearly full, then so that not one block is free and RocksDB's own writes fail.
    for filler_mib in [75_u64, 200] {
        let filler = disk.0.path().join("filler");
        let mut file = std::fs::File::create(&filler).unwrap();
        for _ in 0..filler_mib {
            if file.write_all(&vec![1; MIB as usize]).is_err() {
                // To the last byte.
                while file.write_all(&[1; 512]).is_ok() {}
                break;
            }
        }
        drop(file);
        for (seed, length) in [(10, 1_000), (11, 8_000_000), (12, 500)] {
            let blob = Blob::noise(seed, length);
            let response = client.put(url(&program, &blob.digest)).body(blob.frames).send().await.unwrap();
            assert_eq!(harness::error_of(response).await, (507, "insufficient_storage".to_owned()));
        }
        // Many access times are written meanwhile, until RocksDB has used up what it allocated ahead.
        let list = BlobList { digests: kept.iter().map(|blob| blob.digest).collect() };
        for _ in 0..100 {
            let missing = client.post(format!("{}/v1/default/blobs/missing", program.url));
            assert_eq!(missing.body(encode(&list)).send().await.unwrap().status(), 200);
        }
        for blob in &kept {
            let response = client.get(url(&program, &blob.digest)).send().await.unwrap();
            assert_eq!(response.bytes().await.unwrap(), blob.frames);
        }
        assert!(files(&data.join("staging")).is_empty());
        std::fs::remove_file(&filler).unwrap();
        let blob = Blob::noise(100 + filler_mib, 2_000_000);
        let recovered = Instant::now();
        loop {
            let put = client.put(url(&program, &blob.digest)).body(blob.frames.clone());
            let status = put.send().await.unwrap().status();
            if status == 201 {
                break;
            }
            assert_eq!(status, 507);
            assert!(recovered.elapsed() < Duration::from_secs(30), "it does not recover");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        println!("recovered after {:?}", recovered.elapsed());
    }
}
