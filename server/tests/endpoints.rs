//! What each endpoint does when all is well.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::io::{Read, Write};
use std::net::TcpStream;

use cachec_protocol::frame::{Frame, HEADER_BYTES, MAGIC};
use cachec_protocol::message::{
    BlobList, LookupRequest, LookupResponse, MAX_MANIFEST_RESULTS, PROTOCOL_HEADER, PROTOCOL_VERSION,
};
use cachec_protocol::{ActionKey, BuildEntry, BuildRecord, Digest, StoredResult, decode, encode};
use harness::{Blob, MIB, TestServer, result};

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_comes_back_as_it_was_put() {
    let server = TestServer::start().await;
    // Inline, at the border, in a file, and of several frames.
    let mut blobs: Vec<Blob> = [0, 1, 16_000, 17_000, 3_000_000]
        .into_iter()
        .enumerate()
        .map(|(seed, length)| Blob::noise(seed as u64, length))
        .collect();
    let (first, second) = (blobs[1].clone(), blobs[4].clone());
    blobs.push(Blob {
        digest: Digest::of(&[first.content, second.content].concat()),
        content: vec![],
        frames: [first.frames, second.frames].concat(),
    });
    for blob in &blobs {
        assert_eq!(server.get(&blob.digest).await, None);
        assert_eq!(server.put(blob).await, 201);
        assert_eq!(server.put(blob).await, 200);
        assert_eq!(server.get(&blob.digest).await.as_ref(), Some(&blob.frames));
    }
    server.assert_nothing_left_behind().await;
    assert_eq!(server.stats().await.blobs, blobs.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn head_tells_both_lengths() {
    let server = TestServer::start().await;
    let blob = Blob::new(vec![7; 500_000]);
    assert_eq!(server.client.head(server.blob_url(&blob.digest)).send().await.unwrap().status(), 404);
    server.put(&blob).await;
    let response = server.client.head(server.blob_url(&blob.digest)).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-length"], blob.frames.len().to_string());
    assert_eq!(response.headers()["cachec-content-bytes"], "500000");
    assert_eq!(response.headers()[PROTOCOL_HEADER], PROTOCOL_VERSION);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_of_unknown_length_is_taken_in() {
    let server = TestServer::start().await;
    let blob = Blob::noise(1, 2_000_000);
    let pieces: Vec<_> =
        blob.frames.chunks(10_000).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    let response = server.client.put(server.blob_url(&blob.digest)).body(body).send().await.unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(server.get(&blob.digest).await, Some(blob.frames));
    server.assert_nothing_left_behind().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_lists_what_is_to_be_uploaded_in_order() {
    let server = TestServer::start().await;
    let blobs: Vec<Blob> = (0..4).map(|seed| Blob::noise(seed, 1000)).collect();
    server.put(&blobs[1]).await;
    let digests = blobs.iter().map(|blob| blob.digest).collect();
    let response = server.post("/v1/default/blobs/missing", encode(&BlobList { digests })).await;
    let missing: BlobList = decode(&response.bytes().await.unwrap()).unwrap();
    assert_eq!(missing.digests, [blobs[0].digest, blobs[2].digest, blobs[3].digest]);
}

#[tokio::test(flavor = "multi_thread")]
async fn fetch_answers_in_the_order_asked_for_and_ends_with_an_end_frame() {
    let server = TestServer::start().await;
    let small = Blob::noise(1, 100);
    let large = Blob::noise(2, 1_500_000);
    server.put(&small).await;
    server.put(&large).await;
    let absent = Digest::of(b"absent");
    let digests = vec![large.digest, absent, small.digest, large.digest];
    let response = server.post("/v1/default/fetch", encode(&BlobList { digests })).await;
    let frames = frames(&response.bytes().await.unwrap());
    let blob = |blob: &Blob| {
        let body_bytes = blob.frames.len() as u64;
        (Frame::Blob { digest: blob.digest, body_bytes }, blob.frames.clone())
    };
    let expected =
        [blob(&large), (Frame::Absent(absent), vec![]), blob(&small), blob(&large), (Frame::End, vec![])];
    assert!(frames == expected);
}

/// The frames of a whole stream, with their bodies.
fn frames(stream: &[u8]) -> Vec<(Frame, Vec<u8>)> {
    let (magic, mut rest) = stream.split_at(4);
    assert_eq!(magic, MAGIC);
    let mut frames = Vec::new();
    while frames.last().is_none_or(|(frame, _)| *frame != Frame::End) {
        let (header, body) = rest.split_first_chunk::<HEADER_BYTES>().unwrap();
        let frame = Frame::from_header(header).unwrap();
        let length = match frame {
            Frame::Blob { body_bytes, .. } | Frame::Manifests { body_bytes } => body_bytes as usize,
            _ => 0,
        };
        frames.push((frame, body[..length].to_vec()));
        rest = &body[length..];
    }
    assert!(rest.is_empty());
    frames
}

#[tokio::test(flavor = "multi_thread")]
async fn a_builds_stream_has_its_manifests_and_then_its_packs() {
    let server = TestServer::start().await;
    let (one, two) = (Blob::noise(1, 50_000), Blob::noise(2, 100));
    let results = [result(1, 1, Some(one.digest)), result(2, 1, None), result(3, 1, Some(two.digest))];
    server.put(&one).await;
    server.put(&two).await;
    for result in &results {
        assert_eq!(server.publish(result).await, 201);
    }
    let build = ActionKey::from_bytes([9; 32]);
    let path = |packs: &str| server.url(&format!("/v1/default/builds/{build}{packs}"));
    assert_eq!(server.client.get(path("")).send().await.unwrap().status(), 404);
    // A record of another shape, an older record, and the newest, which names one unit that is gone.
    let gone = result(4, 1, Some(Digest::of(b"gone")));
    let entry = |result: &StoredResult| BuildEntry {
        action_key: result.action_key,
        pack: result.pack.map(|pack| pack.digest),
        for_compilers: result.action_key == results[0].action_key,
    };
    let record = |results: &[&StoredResult]| BuildRecord {
        entries: results.iter().map(|result| entry(result)).collect(),
    };
    let newest = record(&[&results[2], &gone, &results[1], &results[0], &results[2]]);
    for record in [record(&[&results[0]]), newest] {
        assert_eq!(server.publish(&record.into_result(build)).await, 201);
    }
    let mut foreign = record(&[]).into_result(build);
    foreign.stdout = b"of another version".to_vec();
    foreign.input_set = results[0].input_set.clone();
    assert_eq!(server.publish(&foreign).await, 201);
    let stream = server.client.get(path("?packs=all")).send().await.unwrap().bytes().await.unwrap();
    let received = frames(&stream);
    let names: Vec<Option<Digest>> = received[1..]
        .iter()
        .map(|(frame, _)| match frame {
            Frame::Blob { digest, .. } => Some(*digest),
            _ => None,
        })
        .collect();
    assert_eq!(names, [Some(two.digest), None, Some(one.digest), None]);
    assert_eq!(received[2].0, Frame::Absent(Digest::of(b"gone")));
    assert!(received[3].1 == one.frames);
    let mut encoded = Vec::new();
    zstd::Decoder::new(received[0].1.as_slice()).unwrap().read_to_end(&mut encoded).unwrap();
    let manifests = decode::<LookupResponse>(&encoded).unwrap().manifests;
    let keys: Vec<u8> = manifests.iter().map(|manifest| manifest.action_key.as_bytes()[0]).collect();
    assert_eq!(keys, [9, 3, 2, 1]);
    let final_packs = server.client.get(path("?packs=final")).send().await.unwrap().bytes().await.unwrap();
    let names: Vec<Frame> = frames(&final_packs)[1..].iter().map(|(frame, _)| *frame).collect();
    assert_eq!(names, [received[1].0, received[2].0, Frame::End]);
    let rest = server.client.get(path("?packs=rest")).send().await.unwrap().bytes().await.unwrap();
    let names: Vec<Frame> = frames(&rest).iter().map(|(frame, _)| *frame).collect();
    assert_eq!(names, [received[3].0, Frame::End]);
    let without_packs = server.client.get(path("")).send().await.unwrap().bytes().await.unwrap();
    assert_eq!(frames(&without_packs).len(), 2);
    let malformed = server.client.get(server.url("/v1/default/builds/x")).send().await.unwrap();
    assert_eq!(malformed.status(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_result_is_found_by_its_action_key() {
    let server = TestServer::start().await;
    let pack = Blob::noise(1, 50_000);
    server.put(&pack).await;
    let first = result(1, 1, Some(pack.digest));
    let without_outputs = result(2, 1, None);
    assert_eq!(server.publish(&first).await, 201);
    assert_eq!(server.publish(&without_outputs).await, 201);
    assert_eq!(server.lookup(1).await, [first]);
    assert_eq!(server.lookup(2).await, [without_outputs]);
    assert_eq!(server.lookup(3).await, []);

    // In one request: in its order, unknown keys left out.
    let keys = [2, 9, 1].map(|action| ActionKey::from_bytes([action; 32]));
    let request = LookupRequest { action_keys: keys.to_vec() };
    let response = server.post("/v1/default/lookup", encode(&request)).await;
    let answer: LookupResponse = decode(&response.bytes().await.unwrap()).unwrap();
    let found: Vec<_> = answer.manifests.iter().map(|manifest| manifest.action_key).collect();
    assert_eq!(found, [keys[0], keys[2]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_result_of_a_key_stays() {
    let server = TestServer::start().await;
    let first = result(1, 1, None);
    let mut second = first.clone();
    second.stderr = b"something else".to_vec();
    assert_eq!(first.result_key(), second.result_key());
    assert_eq!(server.publish(&first).await, 201);
    assert_eq!(server.publish(&second).await, 200);
    assert_eq!(server.lookup(1).await, [first]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_keeps_the_newest_results_and_really_deletes_the_others() {
    let server = TestServer::start().await;
    let published: Vec<_> = (0..20).map(|variant| result(1, variant, None)).collect();
    for result in &published[..MAX_MANIFEST_RESULTS] {
        assert_eq!(server.publish(result).await, 201);
    }
    let full = server.stats().await;
    for result in &published[MAX_MANIFEST_RESULTS..] {
        assert_eq!(server.publish(result).await, 201);
    }
    let mut newest = published[20 - MAX_MANIFEST_RESULTS..].to_vec();
    newest.reverse();
    assert_eq!(server.lookup(1).await, newest);
    let now = server.stats().await;
    assert_eq!((now.results, now.stored_bytes), (full.results, full.stored_bytes));
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_metrics_answer() {
    let server = TestServer::start().await;
    let blob = Blob::noise(1, 100_000);
    server.put(&blob).await;
    server.get(&blob.digest).await;
    server.get(&Digest::of(b"absent")).await;
    server.publish(&result(1, 1, None)).await;
    server.lookup(1).await;
    server.lookup(2).await;
    for (path, body) in [("/healthz", "ok\n"), ("/readyz", "ready\n")] {
        let response = server.client.get(server.url(path)).send().await.unwrap();
        assert_eq!(response.headers()[PROTOCOL_HEADER], PROTOCOL_VERSION);
        assert_eq!(response.text().await.unwrap(), body);
    }
    let text = server.client.get(server.url("/metrics")).send().await.unwrap().text().await.unwrap();
    for line in [
        "cachec_lookup_keys_total{outcome=\"hit\"} 1",
        "cachec_lookup_keys_total{outcome=\"miss\"} 1",
        "cachec_blob_reads_total{outcome=\"hit\"} 1",
        "cachec_blob_reads_total{outcome=\"miss\"} 1",
        "cachec_puts_total{kind=\"blob\",outcome=\"created\"} 1",
        "cachec_requests_total{route=\"/v1/{namespace}/lookup\",status=\"2xx\"} 2",
        "cachec_stored_blobs 1",
        "cachec_stored_results 1",
        "cachec_rocksdb_background_errors 0",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    for name in ["cachec_request_seconds_bucket", "cachec_rocksdb_live_sst_bytes", "cachec_limit_bytes"] {
        assert!(text.contains(name), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_without_tls_works() {
    let server = TestServer::start().await;
    let client = harness::http_client_builder().http2_prior_knowledge().build().unwrap();
    let blob = Blob::noise(1, 3_000_000);
    for expected in [201, 200] {
        let put = client.put(server.blob_url(&blob.digest)).body(blob.frames.clone());
        let response = put.send().await.unwrap();
        assert_eq!(response.version(), reqwest::Version::HTTP_2);
        assert_eq!(response.status(), expected);
    }
    let response = client.get(server.blob_url(&blob.digest)).send().await.unwrap();
    assert_eq!(response.bytes().await.unwrap(), blob.frames);
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_wait_for_their_turn_do_not_hold_up_the_others() {
    let server = TestServer::start_with(512 * MIB, |options| options.limits.uploads = 2).await;
    let client = harness::http_client_builder().http2_prior_knowledge().build().unwrap();
    let uploads: Vec<_> = (0..60)
        .map(|seed| {
            let blob = Blob::noise(seed, 1_500_000);
            tokio::spawn(client.put(server.blob_url(&blob.digest)).body(blob.frames).send())
        })
        .collect();
    for upload in uploads {
        assert_eq!(upload.await.unwrap().unwrap().status(), 201);
    }
}

/// Reads one response of known length from a keep-alive connection.
fn read_response(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_of_a_blob_that_is_there_leaves_the_connection_usable() {
    let server = TestServer::start().await;
    let blob = Blob::noise(1, 1_000_000);
    server.put(&blob).await;
    let address = server.running.url.strip_prefix("http://").unwrap().to_owned();
    let path = format!("/v1/default/blobs/{}", blob.digest);
    tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        for _ in 0..2 {
            let length = blob.frames.len();
            write!(stream, "PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n").unwrap();
            stream.write_all(&blob.frames).unwrap();
            assert!(read_response(&mut stream).starts_with("HTTP/1.1 200"));
        }
        // One that asks first is told before it has sent anything.
        write!(
            stream,
            "PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
        )
        .unwrap();
        assert!(read_response(&mut stream).starts_with("HTTP/1.1 200"));
    })
    .await
    .unwrap();
}
