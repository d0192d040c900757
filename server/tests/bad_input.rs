//! Bad input: the right status, a stable code, and nothing left behind.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use cachec_protocol::message::{BlobList, ErrorBody, LookupRequest, MAX_LIST_ENTRIES, PROTOCOL_HEADER};
use cachec_protocol::pack::{MAX_WINDOW_LOG, compress};
use cachec_protocol::{ActionKey, Digest, Input, InputKind, InputSet, ResultKey, decode, encode};
use cachec_server::policy::Policy;
use harness::{Blob, MIB, TestServer, error_of, noise, publication, result};
use tokio::io::AsyncWriteExt;

/// Puts a body that must be refused, and checks that nothing of it stays.
async fn refuse(server: &TestServer, digest: &Digest, body: Vec<u8>, status: u16, code: &str) {
    let before = server.stats().await;
    let response = server.put_bytes(digest, body).await;
    assert!(response.headers().contains_key(PROTOCOL_HEADER));
    assert_eq!(error_of(response).await, (status, code.to_owned()));
    assert_eq!(server.get(digest).await, None);
    server.assert_nothing_left_behind().await;
    let after = server.stats().await;
    assert_eq!((after.stored_bytes, after.blobs), (before.stored_bytes, before.blobs));
    assert_eq!(harness::disk_bytes(server.data.path()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_that_are_not_what_they_say_are_refused() {
    let server = TestServer::start().await;
    for length in [1000, 1_000_000] {
        let blob = Blob::noise(1, length);
        let other = Digest::of(b"other");
        refuse(&server, &other, blob.frames.clone(), 422, "digest_mismatch").await;
        refuse(&server, &blob.digest, blob.content.clone(), 422, "malformed_blob").await;
        let cut = blob.frames[..blob.frames.len() - 1].to_vec();
        refuse(&server, &blob.digest, cut, 422, "malformed_blob").await;
        let trailing = [blob.frames.as_slice(), b"x"].concat();
        refuse(&server, &blob.digest, trailing, 422, "malformed_blob").await;
        let mut flipped = blob.frames.clone();
        flipped[length / 2] ^= 1;
        refuse(&server, &blob.digest, flipped, 422, "digest_mismatch").await;
    }
    refuse(&server, &Digest::of(b""), vec![], 422, "malformed_blob").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bombs_and_padded_blobs_are_refused() {
    let server = TestServer::start().await;
    // 64 MiB of zeros, about 2 KB compressed; the limit of the tests is 32 MiB.
    let bomb = compress(&vec![0; 64 << 20], 3).unwrap();
    assert!(bomb.len() < 16 << 10);
    refuse(&server, &Digest::of(&vec![0; 64 << 20]), bomb, 413, "too_large").await;

    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    encoder.window_log(MAX_WINDOW_LOG + 1).unwrap();
    let content = noise(1, 1 << 20);
    encoder.write_all(&content).unwrap();
    let window = encoder.finish().unwrap();
    refuse(&server, &Digest::of(&content), window, 422, "malformed_blob").await;

    // One frame, and a megabyte in a frame that decompressors skip.
    let blob = Blob::noise(1, 1000);
    let mut padded = blob.frames;
    padded.extend_from_slice(&[0x50, 0x2a, 0x4d, 0x18]);
    padded.extend_from_slice(&(1u32 << 20).to_le_bytes());
    padded.extend_from_slice(&noise(2, 1 << 20));
    refuse(&server, &blob.digest, padded, 422, "malformed_blob").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_limit_is_refused_whether_announced_or_not() {
    let server = TestServer::start().await;
    let blob = Blob::noise(1, 40 << 20);
    refuse(&server, &blob.digest, blob.frames.clone(), 413, "too_large").await;
    let pieces: Vec<_> =
        blob.frames.chunks(1 << 20).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    let response = server.client.put(server.blob_url(&blob.digest)).body(body).send().await.unwrap();
    assert_eq!(error_of(response).await, (413, "too_large".to_owned()));
    server.assert_nothing_left_behind().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_into_the_store_is_refused_before_anything_is_evicted() {
    let server = TestServer::start_with(16 * MIB, |_| {}).await;
    let kept = Blob::noise(1, 1_000_000);
    server.put(&kept).await;
    let large = Blob::noise(2, 15 << 20);
    let response = server.put_bytes(&large.digest, large.frames).await;
    assert_eq!(error_of(response).await, (507, "insufficient_storage".to_owned()));
    assert!(server.get(&kept.digest).await.is_some());
    server.assert_nothing_left_behind().await;
}

/// Sends bytes as they are, and returns the response's text; empty where the server just closed.
async fn raw(server: &TestServer, request: Vec<u8>, half_close: bool) -> Vec<u8> {
    let address = server.running.url.strip_prefix("http://").unwrap().to_owned();
    tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(&request).unwrap();
        if half_close {
            stream.shutdown(Shutdown::Write).unwrap();
        }
        let mut response = Vec::new();
        let _ = stream.read_to_end(&mut response);
        response
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_upload_is_never_visible() {
    let server = TestServer::start().await;
    for length in [5_000, 1_000_000] {
        let blob = Blob::noise(1, length);
        for cut in [0, 1, length / 2, blob.frames.len() - 1] {
            let head = format!(
                "PUT /v1/default/blobs/{} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
                blob.digest,
                blob.frames.len()
            );
            let request = [head.as_bytes(), &blob.frames[..cut]].concat();
            let response = String::from_utf8_lossy(&raw(&server, request, true).await).into_owned();
            assert!(!response.starts_with("HTTP/1.1 2"), "{response}");
            assert_eq!(server.get(&blob.digest).await, None);
            server.assert_nothing_left_behind().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_another_length_than_announced_is_refused() {
    let server = TestServer::start().await;
    let blob = Blob::noise(1, 100_000);
    // Longer: what is over the announced length is no part of the body, and no request either.
    let head = format!(
        "PUT /v1/default/blobs/{} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        blob.digest,
        blob.frames.len() - 10
    );
    let response = raw(&server, [head.as_bytes(), &blob.frames].concat(), true).await;
    let response = String::from_utf8_lossy(&response);
    assert!(response.starts_with("HTTP/1.1 422") && response.contains("malformed_blob"), "{response}");
    assert_eq!(server.get(&blob.digest).await, None);
    server.assert_nothing_left_behind().await;
    // No number at all.
    let head =
        format!("PUT /v1/default/blobs/{} HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n", blob.digest);
    let response = raw(&server, head.into_bytes(), true).await;
    assert!(response.starts_with(b"HTTP/1.1 400"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_whose_client_goes_away_leaves_nothing() {
    let server = TestServer::start().await;
    let blob = Blob::noise(1, 4_000_000);
    for _ in 0..5 {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Vec<u8>, std::io::Error>>(1);
        let stream = futures_util::stream::unfold(receiver, async |mut receiver| {
            receiver.recv().await.map(|piece| (piece, receiver))
        });
        let put = server.client.put(server.blob_url(&blob.digest)).body(reqwest::Body::wrap_stream(stream));
        let upload = tokio::spawn(put.send());
        sender.send(Ok(blob.frames[..1_000_000].to_vec())).await.unwrap();
        for _ in 0..200 {
            if !harness::files(&server.data.path().join("staging")).is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(server.stats().await.reserved_bytes > 0);
        upload.abort();
        let _ = upload.await;
        drop(sender);
        server.assert_nothing_left_behind().await;
        assert_eq!(server.get(&blob.digest).await, None);
    }
    assert_eq!(server.put(&blob).await, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_body_is_given_up() {
    let server = TestServer::start_with(64 * MIB, |options| {
        options.limits.body_idle = Duration::from_millis(300);
    })
    .await;
    let blob = Blob::noise(1, 100_000);
    let head = format!(
        "PUT /v1/default/blobs/{} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        blob.digest,
        blob.frames.len()
    );
    let response = raw(&server, [head.as_bytes(), &blob.frames[..50_000]].concat(), false).await;
    let response = String::from_utf8_lossy(&response);
    assert!(response.starts_with("HTTP/1.1 408") && response.contains("body_stalled"), "{response}");
    server.assert_nothing_left_behind().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_are_dropped() {
    let server = TestServer::start_with(64 * MIB, |options| {
        options.deadlines.first_request = Duration::from_millis(200);
        options.deadlines.header = Duration::from_millis(200);
    })
    .await;
    for silent in
        [&b""[..], b"PRI * HT", b"GET /healthz HTTP/1.1\r\nHost: ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    {
        let started = std::time::Instant::now();
        raw(&server, silent.to_vec(), false).await;
        assert!(started.elapsed() < Duration::from_secs(5), "{silent:?} holds its connection");
    }
    assert_eq!(server.client.get(server.url("/healthz")).send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_uploads_at_once_are_told_to_come_back() {
    let server = TestServer::start_with(64 * MIB, |options| options.limits.uploads = 1).await;
    let blob = Blob::noise(1, 100_000);
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Vec<u8>, std::io::Error>>(1);
    let stream = futures_util::stream::unfold(receiver, async |mut receiver| {
        receiver.recv().await.map(|piece| (piece, receiver))
    });
    let put = server.client.put(server.blob_url(&blob.digest)).body(reqwest::Body::wrap_stream(stream));
    let first = tokio::spawn(put.send());
    sender.send(Ok(blob.frames[..50_000].to_vec())).await.unwrap();
    while server.stats().await.reserved_bytes == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let second = Blob::noise(2, 1000);
    let response = server.put_bytes(&second.digest, second.frames).await;
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(error_of(response).await, (503, "overloaded".to_owned()));
    sender.send(Ok(blob.frames[50_000..].to_vec())).await.unwrap();
    drop(sender);
    assert_eq!(first.await.unwrap().unwrap().status(), 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_with_too_many_uploads_leaves_room_for_the_others() {
    let server = TestServer::start_with(64 * MIB, |options| {
        options.limits.uploads = 1;
        options.limits.requests = 4;
        let rules = toml::from_str("[default]\n[other]").unwrap();
        options.store.policy = std::sync::Arc::new(Policy::new(rules, None).unwrap());
    })
    .await;
    let address = server.running.url.trim_start_matches("http://").to_owned();
    let third = Blob::noise(9, 1000);
    // Uploads of one namespace that do not go on: one has the only turn, one waits, for some seconds each. Then:
    let mut waiting = Vec::new();
    let refused = loop {
        let digest = Blob::noise(waiting.len() as u64, 100).digest;
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        let head =
            format!("PUT /v1/default/blobs/{digest} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        waiting.push(stream);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let put = server.client.put(server.blob_url(&third.digest)).body(third.frames.clone());
        match put.timeout(Duration::from_millis(500)).send().await {
            Ok(response) if response.status() == 429 => break response,
            other => assert!(waiting.len() < 50, "{other:?}"),
        }
    };
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(error_of(refused).await, (429, "too_many_requests".to_owned()));
    // Another namespace is told to wait for its turn at most, and reads are not concerned.
    assert_eq!(server.get(&third.digest).await, None);
    drop(waiting);
    let other = server.url(&format!("/v1/other/blobs/{}", third.digest));
    assert_eq!(server.client.put(other).body(third.frames).send().await.unwrap().status(), 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_are_refused() {
    let server = TestServer::start().await;
    let garbage = noise(1, 100);
    for path in ["lookup", "fetch", "blobs/missing"] {
        let path = format!("/v1/default/{path}");
        let refused = [(vec![], "malformed_request"), (garbage.clone(), "malformed_request")];
        for (body, code) in refused {
            assert_eq!(error_of(server.post(&path, body).await).await, (400, code.to_owned()), "{path}");
        }
        let response = server.post(&path, vec![0; (1 << 20) + 1]).await;
        assert_eq!(error_of(response).await, (413, "too_large".to_owned()), "{path}");
        let digests = vec![Digest::of(b""); MAX_LIST_ENTRIES + 1];
        let response = server.post(&path, encode(&BlobList { digests })).await;
        assert_eq!(error_of(response).await, (400, "malformed_request".to_owned()), "{path}");
    }
    let mut trailing = encode(&LookupRequest { action_keys: vec![] });
    trailing.push(0);
    let response = server.post("/v1/default/lookup", trailing).await;
    assert_eq!(error_of(response).await, (400, "malformed_request".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn results_that_are_not_right_are_refused() {
    let server = TestServer::start().await;
    let good = result(1, 1, None);
    let put = |key: String, body: Vec<u8>| {
        server.client.put(server.url(&format!("/v1/default/results/{key}"))).body(body).send()
    };
    let key = good.result_key().to_string();
    let lost_pack = result(1, 2, Some(Digest::of(b"not there")));
    let mut unsafe_name = result(1, 3, Some(Digest::of(b"x")));
    unsafe_name.outputs[0].name = "../../etc/passwd".to_owned();
    let cases = [
        (ResultKey::from_bytes([1; 32]).to_string(), publication(&good), 422, "result_key_mismatch"),
        (lost_pack.result_key().to_string(), publication(&lost_pack), 409, "pack_missing"),
        (unsafe_name.result_key().to_string(), publication(&unsafe_name), 422, "invalid_result"),
        (key.clone(), noise(1, 1000), 400, "malformed_request"),
        (key.clone(), vec![], 400, "malformed_request"),
        (key.clone(), vec![0; 50 << 20], 413, "too_large"),
        ("x".to_owned(), publication(&good), 400, "invalid_digest"),
        (key.to_uppercase(), publication(&good), 400, "invalid_digest"),
    ];
    for (key, body, status, code) in cases {
        let response = put(key, body).await.unwrap();
        assert_eq!(error_of(response).await, (status, code.to_owned()));
    }
    server.assert_nothing_left_behind().await;
    let stats = server.stats().await;
    assert_eq!((stats.results, stats.stored_bytes), (0, 0));
    assert_eq!(server.lookup(1).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_are_none_are_refused() {
    let server = TestServer::start().await;
    let digest = Digest::of(b"");
    let cases = [
        ("GET", "/".to_owned(), 404, "not_found"),
        ("GET", "/v1".to_owned(), 404, "not_found"),
        ("GET", format!("/v1/default/blobs/{digest}/x"), 404, "not_found"),
        ("GET", format!("/v2/default/blobs/{digest}"), 404, "unknown_protocol"),
        ("POST", "/v17/default/lookup".to_owned(), 404, "unknown_protocol"),
        ("GET", "/vx/default/lookup".to_owned(), 404, "not_found"),
        ("GET", "/v1/default/lookup".to_owned(), 405, "method_not_allowed"),
        ("DELETE", format!("/v1/default/blobs/{digest}"), 405, "method_not_allowed"),
        ("GET", "/v1/default/blobs/abc".to_owned(), 400, "invalid_digest"),
        ("GET", format!("/v1/default/blobs/{}", "../".repeat(22)), 404, "not_found"),
        ("GET", format!("/v1/default/blobs/..%2f..%2f{digest}"), 400, "invalid_digest"),
        ("GET", format!("/v1/Default/blobs/{digest}"), 400, "invalid_namespace"),
        ("GET", format!("/v1/..%2f..%2fetc/blobs/{digest}"), 400, "invalid_namespace"),
        ("GET", format!("/v1/../blobs/{digest}"), 400, "invalid_namespace"),
        ("GET", format!("/v1/a%00b/blobs/{digest}"), 400, "invalid_namespace"),
        ("GET", format!("/v1/%ff/blobs/{digest}"), 400, "invalid_namespace"),
        ("GET", format!("/v1/{}/blobs/{digest}", "a".repeat(65)), 400, "invalid_namespace"),
    ];
    for (method, path, status, code) in cases {
        // A client library would tidy these paths up.
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let response = raw(&server, request.into_bytes(), false).await;
        let text = String::from_utf8_lossy(&response);
        let body = response.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        assert!(text.starts_with(&format!("HTTP/1.1 {status}")), "{method} {path}: {text}");
        assert_eq!(decode::<ErrorBody>(&response[body..]).unwrap().code, code, "{method} {path}");
        assert!(text.to_lowercase().contains("cachec-protocol: 1"), "{method} {path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_answered_once_however_often_it_is_asked_for() {
    let server = TestServer::start_with(256 * MIB, |_| {}).await;
    // Some megabytes of inputs, asked for again and again.
    let input = |number: u32| Input {
        kind: InputKind::Absent,
        name: format!("{number:08}{}", "x".repeat(90)).into_bytes(),
        digest: None,
    };
    let mut large = result(1, 0, None);
    large.outputs = vec![];
    large.input_set = InputSet::new((0..60_000).map(input).collect());
    assert_eq!(server.publish(&large).await, 201);
    let ask = async |action_keys: Vec<ActionKey>| {
        let response = server.post("/v1/default/lookup", encode(&LookupRequest { action_keys })).await;
        response.bytes().await.unwrap().len()
    };
    let once = ask(vec![large.action_key]).await;
    assert!(once > 5_000_000);
    assert_eq!(ask(vec![large.action_key; MAX_LIST_ENTRIES]).await, once);
}
