//! Layers of namespaces, their quotas, and who may do what in them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cachec_protocol::message::{BlobList, LookupRequest, LookupResponse};
use cachec_protocol::{ActionKey, Digest, StoredResult, decode, encode};
use cachec_server::namespace::Pattern;
use cachec_server::policy::{Policy, Rules};
use cachec_server::sessions::Sessions;
use cachec_server::tokens::Tokens;
use harness::{Blob, MIB, TestServer, publication, result};
use reqwest::{Method, RequestBuilder};

fn policy(text: &str) -> Arc<Policy> {
    let rules: BTreeMap<Pattern, Rules> = toml::from_str(text).unwrap();
    Arc::new(Policy::new(rules, None).unwrap())
}

async fn server(text: &str) -> TestServer {
    let policy = policy(text);
    TestServer::start_with(256 * MIB, |options| options.store.policy = policy).await
}

/// A request with a token, if any.
fn request(server: &TestServer, method: Method, token: Option<&str>, path: &str) -> RequestBuilder {
    let request = server.client.request(method, server.url(path));
    match token {
        Some(token) => request.bearer_auth(token),
        None => request,
    }
}

async fn put(server: &TestServer, token: Option<&str>, namespace: &str, blob: &Blob) -> u16 {
    let path = format!("/v1/{namespace}/blobs/{}", blob.digest);
    let request = request(server, Method::PUT, token, &path).body(blob.frames.clone());
    request.send().await.unwrap().status().as_u16()
}

async fn get(server: &TestServer, token: Option<&str>, namespace: &str, digest: &Digest) -> u16 {
    let path = format!("/v1/{namespace}/blobs/{digest}");
    request(server, Method::GET, token, &path).send().await.unwrap().status().as_u16()
}

async fn publish(server: &TestServer, token: Option<&str>, namespace: &str, result: &StoredResult) -> u16 {
    let path = format!("/v1/{namespace}/results/{}", result.result_key());
    let request = request(server, Method::PUT, token, &path).body(publication(result));
    request.send().await.unwrap().status().as_u16()
}

async fn lookup(
    server: &TestServer,
    token: Option<&str>,
    namespace: &str,
    actions: &[u8],
) -> Vec<Vec<StoredResult>> {
    let action_keys = actions.iter().map(|action| ActionKey::from_bytes([*action; 32])).collect();
    let request = request(server, Method::POST, token, &format!("/v1/{namespace}/lookup"));
    let response = request.body(encode(&LookupRequest { action_keys })).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let answer: LookupResponse = decode(&response.bytes().await.unwrap()).unwrap();
    answer.manifests.iter().map(|manifest| manifest.readable_results().collect()).collect()
}

fn token(server: &TestServer, namespaces: &str, allow: &str) -> String {
    let tokens = Tokens::open(server.data.path()).unwrap();
    tokens.create(&namespaces.parse().unwrap(), allow.parse().unwrap(), None).unwrap().0
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_fall_through_to_the_parent_and_writes_do_not() {
    let server = server("[main]\n['pr-*']\nparent = 'main'\n[fork]\nparent = 'pr-1'").await;
    let (old, new) = (Blob::noise(1, 50_000), Blob::noise(2, 1000));
    let (of_main, of_pr) = (result(1, 1, Some(old.digest)), result(1, 2, Some(new.digest)));
    assert_eq!(put(&server, None, "main", &old).await, 201);
    assert_eq!(publish(&server, None, "main", &of_main).await, 201);

    assert_eq!(get(&server, None, "pr-1", &old.digest).await, 200);
    assert_eq!(lookup(&server, None, "pr-1", &[2, 1]).await, [vec![of_main.clone()]]);
    // What the parent has is to be uploaded all the same, so that a result never depends on another namespace.
    let missing = encode(&BlobList { digests: vec![old.digest] });
    let answer = server.post("/v1/pr-1/blobs/missing", missing).await.bytes().await.unwrap();
    assert_eq!(decode::<BlobList>(&answer).unwrap().digests, [old.digest]);
    assert_eq!(publish(&server, None, "pr-1", &result(3, 3, Some(old.digest))).await, 409);

    assert_eq!(put(&server, None, "pr-1", &new).await, 201);
    assert_eq!(publish(&server, None, "pr-1", &of_pr).await, 201);
    assert_eq!(lookup(&server, None, "pr-1", &[1]).await, [vec![of_pr.clone(), of_main.clone()]]);
    assert_eq!(lookup(&server, None, "fork", &[1]).await, [vec![of_pr.clone(), of_main.clone()]]);
    for other in ["main", "pr-2"] {
        assert_eq!(get(&server, None, other, &new.digest).await, 404);
        assert_eq!(lookup(&server, None, other, &[1]).await, [vec![of_main.clone()]]);
    }
    // HEAD and fetch see the same.
    let head = request(&server, Method::HEAD, None, &format!("/v1/fork/blobs/{}", old.digest));
    assert_eq!(head.send().await.unwrap().status(), 200);
    let fetched = server.post("/v1/fork/fetch", encode(&BlobList { digests: vec![old.digest] })).await;
    assert!(fetched.bytes().await.unwrap().len() > 50_000);
}

/// CVE-2025-36852 ("CREEP"): a pull request publishes under the key that the main branch is going to ask for, before it
/// does. Here nobody who reads the trusted layer ever sees it.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_request_that_is_first_poisons_nobody_else() {
    let server = server("[main]\n['pr-*']\nparent = 'main'").await;
    let main = token(&server, "main", "read,write");
    let pr = token(&server, "pr-1", "read,write");
    let (evil, good) = (Blob::noise(66, 20_000), Blob::noise(1, 20_000));
    // The same action and inputs, and so the same result key.
    let (evil_result, good_result) = (result(1, 1, Some(evil.digest)), result(1, 1, Some(good.digest)));
    assert_eq!(evil_result.result_key(), good_result.result_key());

    assert_eq!(put(&server, Some(&pr), "pr-1", &evil).await, 201);
    assert_eq!(publish(&server, Some(&pr), "pr-1", &evil_result).await, 201);
    // Straight into the trusted layer, and into another pull request's: refused.
    for namespace in ["main", "pr-2"] {
        assert_eq!(put(&server, Some(&pr), namespace, &evil).await, 401);
        assert_eq!(publish(&server, Some(&pr), namespace, &evil_result).await, 401);
    }
    assert!(lookup(&server, Some(&main), "main", &[1]).await.is_empty());
    assert_eq!(get(&server, Some(&main), "main", &evil.digest).await, 404);
    assert_eq!(put(&server, Some(&main), "main", &good).await, 201);
    assert_eq!(publish(&server, Some(&main), "main", &good_result).await, 201);
    assert_eq!(lookup(&server, Some(&main), "main", &[1]).await, [vec![good_result]]);
    let other = token(&server, "pr-2", "read");
    assert_eq!(lookup(&server, Some(&other), "pr-2", &[1]).await[0][0].pack.unwrap().digest, good.digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_evicts_within_its_namespace_only() {
    let server = server("['pr-*']\nquota = '4MiB'\n[main]\nquota = '100MiB'").await;
    let kept = Blob::noise(1, MIB as usize);
    assert_eq!(put(&server, None, "main", &kept).await, 201);
    assert_eq!(put(&server, None, "pr-2", &kept).await, 201);
    let blobs: Vec<_> = (10..20).map(|seed| Blob::noise(seed, MIB as usize)).collect();
    for blob in &blobs {
        assert_eq!(put(&server, None, "pr-1", blob).await, 201);
        let stats = server.stats().await;
        assert!(stats.namespace_bytes["pr-*"] <= 4 * MIB + 2 * MIB, "{stats:?}");
    }
    // The newest are there, as many as fit.
    for (blob, status) in blobs.iter().zip([404, 404, 404, 404, 404, 404, 404, 200, 200, 200]) {
        assert_eq!(get(&server, None, "pr-1", &blob.digest).await, status);
    }
    assert_eq!(get(&server, None, "main", &kept.digest).await, 200);
    assert_eq!(get(&server, None, "pr-2", &kept.digest).await, 200);
    let stats = server.stats().await;
    assert_eq!(stats.evicted_entries, 7);
    assert_eq!(stats.namespace_bytes.values().sum::<u64>(), stats.stored_bytes);
    // What can never fit is refused before anything goes.
    let large = Blob::noise(99, 5 * MIB as usize);
    assert_eq!(put(&server, None, "pr-1", &large).await, 507);
    assert_eq!(server.stats().await.evicted_entries, 7);
    server.assert_nothing_left_behind().await;

    // A lowered quota counts from the next start.
    let mut server = server;
    server.options.store.policy = policy("['pr-*']\nquota = '2200KiB'\n[main]");
    let server = server.restart().await;
    let stats = server.stats().await;
    assert!(stats.namespace_bytes["main"] > MIB);
    assert_eq!(get(&server, None, "pr-1", &blobs[9].digest).await, 200);
    assert_eq!(get(&server, None, "pr-1", &blobs[7].digest).await, 404);
    let metrics = server.client.get(server.url("/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("cachec_namespace_bytes{namespace=\"pr-*\"}"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_requests_without_end_leave_what_main_has() {
    let rules = "['pr-*']\nquota = '4MiB'\ntotal_quota = '8MiB'\nparent = 'main'\n[main]";
    let server = TestServer::start_with(32 * MIB, |options| options.store.policy = policy(rules)).await;
    let kept: Vec<_> = (0..8).map(|seed| Blob::noise(seed, MIB as usize)).collect();
    for blob in &kept {
        assert_eq!(put(&server, None, "main", blob).await, 201);
    }
    for number in 0..40 {
        let blob = Blob::noise(100 + number, MIB as usize);
        assert_eq!(put(&server, None, &format!("pr-{number}"), &blob).await, 201);
        let stats = server.stats().await;
        assert!(stats.namespace_bytes["pr-*"] <= 8 * MIB, "{stats:?}");
    }
    for blob in &kept {
        assert_eq!(get(&server, None, "main", &blob.digest).await, 200);
    }
    // The newest are there, whichever namespace they are in.
    let last = Blob::noise(139, MIB as usize);
    assert_eq!(get(&server, None, "pr-39", &last.digest).await, 200);
    assert_eq!(get(&server, None, "pr-1", &Blob::noise(101, MIB as usize).digest).await, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_of_all_namespaces_goes_where_the_store_is_full() {
    let server = TestServer::start_with(16 * MIB, |options| options.store.policy = policy("['pr-*']")).await;
    let blobs: Vec<_> = (0..24).map(|seed| Blob::noise(seed, MIB as usize)).collect();
    for (number, blob) in blobs.iter().enumerate() {
        assert_eq!(put(&server, None, &format!("pr-{}", number % 5), blob).await, 201);
    }
    let mut present = Vec::new();
    for (number, blob) in blobs.iter().enumerate() {
        if get(&server, None, &format!("pr-{}", number % 5), &blob.digest).await == 200 {
            present.push(number);
        }
    }
    assert!(present.len() > 8, "{present:?}");
    assert_eq!(present, (24 - present.len()..24).collect::<Vec<_>>());
}

/// The calls of the protocol, and whether they write.
const CALLS: [(&str, bool); 8] = [
    ("GET blobs", false),
    ("HEAD blobs", false),
    ("POST lookup", false),
    ("POST fetch", false),
    ("GET builds", false),
    ("PUT blobs", true),
    ("POST missing", true),
    ("PUT results", true),
];

async fn call(server: &TestServer, name: &str, token: Option<&str>, namespace: &str) -> reqwest::Response {
    let blob = Blob::noise(7, 100);
    let stored = result(9, 9, None);
    let digests = encode(&BlobList { digests: vec![Digest::of(b"absent")] });
    let request = |method, path: &str| request(server, method, token, &format!("/v1/{namespace}/{path}"));
    let absent = Digest::of(b"absent");
    let request = match name {
        "GET blobs" => request(Method::GET, &format!("blobs/{absent}")),
        "HEAD blobs" => request(Method::HEAD, &format!("blobs/{absent}")),
        "POST lookup" => request(Method::POST, "lookup").body(encode(&LookupRequest { action_keys: vec![] })),
        "POST fetch" => request(Method::POST, "fetch").body(digests),
        "GET builds" => request(Method::GET, &format!("builds/{absent}")),
        "PUT blobs" => request(Method::PUT, &format!("blobs/{}", blob.digest)).body(blob.frames),
        "POST missing" => request(Method::POST, "blobs/missing").body(digests),
        "PUT results" => {
            request(Method::PUT, &format!("results/{}", stored.result_key())).body(publication(&stored))
        }
        _ => unreachable!(),
    };
    request.send().await.unwrap()
}

/// Every kind of token, in every kind of namespace, for every call: what is allowed follows from three rules, written
/// down here once more.
#[tokio::test(flavor = "multi_thread")]
async fn every_token_does_what_it_is_for_and_nothing_else() {
    let server = server("[main]\n['pr-*']\nparent = 'main'\n[public]\nanonymous_read = true").await;
    let tokens = Tokens::open(server.data.path()).unwrap();
    let sessions = Sessions::new(tokens.directory(), "");
    let verbs = |text: &str| text.parse().unwrap();
    let (expired, _) =
        tokens.create(&"main".parse().unwrap(), verbs("read,write"), Some(SystemTime::now())).unwrap();
    let (revoked, id) = tokens.create(&"main".parse().unwrap(), verbs("read,write"), None).unwrap();
    tokens.revoke(&id).unwrap();
    let session = |namespace: &str, allow: &str, seconds: u64| {
        let length = Duration::from_secs(seconds);
        sessions.create(&namespace.parse().unwrap(), verbs(allow), length).unwrap()
    };
    // Token, the namespaces it is for, whether it may read, whether it may write.
    let bearers: Vec<(Option<String>, &str, bool, bool)> = vec![
        (None, "-", false, false),
        (Some("x".to_owned()), "-", false, false),
        (Some(format!("cachec_{}", "0".repeat(64))), "-", false, false),
        (Some(expired), "-", false, false),
        (Some(revoked), "-", false, false),
        (Some(token(&server, "main", "read")), "main", true, false),
        (Some(token(&server, "main", "write")), "main", false, true),
        (Some(token(&server, "main", "read,write")), "main", true, true),
        (Some(token(&server, "pr-*", "read,write")), "pr-", true, true),
        (Some(token(&server, "public", "write")), "public", false, true),
        (Some(session("pr-1", "read,write", 60)), "pr-1", true, true),
        (Some(session("main", "read", 60)), "main", true, false),
        (Some(session("main", "read,write", 0)), "-", false, false),
    ];
    let mut denied: BTreeMap<(u16, bool), Vec<u8>> = BTreeMap::new();
    for (token, own, may_read, may_write) in &bearers {
        for namespace in ["main", "pr-1", "pr-2", "public", "never"] {
            for (name, writes) in CALLS {
                let response = call(&server, name, token.as_deref(), namespace).await;
                let status = response.status().as_u16();
                let what = format!("{name} in {namespace} with a token for {own}");
                let is_own = namespace == *own || *own == "pr-" && namespace.starts_with("pr-");
                let is_public_read = namespace == "public" && !writes;
                if is_public_read || is_own && if writes { *may_write } else { *may_read } {
                    assert!([200, 201, 404].contains(&status), "{what}: {status}");
                } else {
                    assert_eq!(status, if is_own { 403 } else { 401 }, "{what}");
                    // The same bytes, whether the namespace exists or not.
                    let is_head = name == "HEAD blobs";
                    let body = response.bytes().await.unwrap().to_vec();
                    assert_eq!(
                        *denied.entry((status, is_head)).or_insert_with(|| body.clone()),
                        body,
                        "{what}"
                    );
                }
            }
        }
    }
    assert_eq!(denied.len(), 4);
}

/// What is there and what is not cost the same where one may not read: the store is not asked. Prints the times.
#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_read_is_answered_before_the_store_is_asked() {
    let server = server("[main]").await;
    let (present, absent) = (Blob::noise(1, 50_000), Digest::of(b"absent"));
    let writer = token(&server, "main", "read,write");
    assert_eq!(put(&server, Some(&writer), "main", &present).await, 201);
    assert_eq!(get(&server, Some(&writer), "main", &present.digest).await, 200);
    let reads = async || {
        let text = server.client.get(server.url("/metrics")).send().await.unwrap().text().await.unwrap();
        let lines = text.lines().filter(|line| line.starts_with("cachec_blob_reads_total"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let before = reads().await;
    assert!(!before.is_empty());
    let foreign = token(&server, "other", "read");
    let mut times: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for _ in 0..harness::rounds("CACHEC_REQUESTS", 50) {
        for (name, namespace, digest) in [
            ("there, not theirs", "main", &present.digest),
            ("absent, not theirs", "main", &absent),
            ("no such namespace", "never", &absent),
        ] {
            let started = std::time::Instant::now();
            assert_eq!(get(&server, Some(&foreign), namespace, digest).await, 401);
            times.entry(name).or_default().push(started.elapsed());
        }
    }
    assert_eq!(reads().await, before);
    for (name, mut times) in times {
        times.sort_unstable();
        println!("{name}: median {:?}, p99 {:?}", times[times.len() / 2], times[times.len() * 99 / 100]);
    }
}
