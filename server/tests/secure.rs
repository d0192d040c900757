//! TLS, its renewal, and sessions for CI jobs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cachec_server::identity::Issuer;
use cachec_server::tls::{Tls, TlsFiles};
use harness::{Blob, MIB, TestServer, error_of};
use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rsa::pkcs1::EncodeRsaPrivateKey;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// Writes a new certificate for 127.0.0.1 and returns it.
fn certificate(directory: &Path) -> (TlsFiles, reqwest::Certificate) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let files = TlsFiles { certificate: directory.join("tls.crt"), key: directory.join("tls.key") };
    std::fs::write(&files.certificate, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    (files, reqwest::Certificate::from_pem(made.cert.pem().as_bytes()).unwrap())
}

fn trusting(certificate: reqwest::Certificate) -> reqwest::Client {
    harness::http_client_builder().tls_certs_only([certificate]).build().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_serves_http2_and_keeps_strangers_out() {
    let directory = tempfile::tempdir().unwrap();
    let (files, root) = certificate(directory.path());
    let server = TestServer::start_with(64 * MIB, |options| options.tls = Some(files)).await;
    assert!(server.running.url.starts_with("https://"));
    let client = trusting(root);
    let blob = Blob::noise(1, 3_000_000);
    let put = client.put(server.blob_url(&blob.digest)).body(blob.frames.clone()).send().await.unwrap();
    assert_eq!((put.status().as_u16(), put.version()), (201, reqwest::Version::HTTP_2));
    let got = client.get(server.blob_url(&blob.digest)).send().await.unwrap();
    assert_eq!(got.bytes().await.unwrap(), blob.frames);
    // Plain HTTP, and a client that does not know the certificate.
    assert!(server.client.get(server.running.url.replace("https", "http")).send().await.is_err());
    assert!(server.client.get(server.url("/healthz")).send().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_does_not_end_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let (files, root) = certificate(directory.path());
    let server = TestServer::start_with(64 * MIB, |options| {
        options.tls = Some(files);
        options.deadlines.handshake = Duration::from_millis(200);
        options.deadlines.first_request = Duration::from_secs(3600);
    })
    .await;
    let address = server.running.url.trim_start_matches("https://").to_owned();
    let mut silent = tokio::net::TcpStream::connect(&address).await.unwrap();
    // The start of a handshake, and no more of it.
    silent.write_all(&[0x16, 3, 1, 2]).await.unwrap();
    let closed = tokio::time::timeout(Duration::from_secs(20), async { silent.read(&mut [0; 16]).await });
    assert_eq!(closed.await.expect("it goes on waiting").unwrap_or(0), 0);
    let health = trusting(root).get(server.url("/healthz")).send().await.unwrap();
    assert_eq!(health.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_taken_without_a_restart_and_a_broken_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let (files, old) = certificate(directory.path());
    let tls = Tls::load(files.clone()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = tls.acceptor().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
            }
        }
    });
    let is_trusted = async |root: &reqwest::Certificate| {
        let client =
            harness::http_client_builder().http1_only().tls_certs_only([root.clone()]).build().unwrap();
        client.get(format!("https://{address}/")).send().await.is_ok()
    };
    assert!(is_trusted(&old).await);
    assert!(!tls.reload().unwrap());
    let (_, new) = certificate(directory.path());
    assert!(tls.reload().unwrap());
    assert!(is_trusted(&new).await && !is_trusted(&old).await);
    std::fs::write(&files.certificate, "half a file").unwrap();
    assert!(tls.reload().is_err() && tls.reload().is_err());
    assert!(is_trusted(&new).await);
    // A key of another certificate.
    let (_, newest) = certificate(directory.path());
    let pair = std::fs::read(&files.key).unwrap();
    let other = tempfile::tempdir().unwrap();
    std::fs::copy(certificate(other.path()).0.key, &files.key).unwrap();
    assert!(tls.reload().is_err());
    assert!(is_trusted(&new).await);
    std::fs::write(&files.key, pair).unwrap();
    assert!(tls.reload().unwrap());
    assert!(is_trusted(&newest).await);
}

/// A service that signs tokens, on this machine: its key, and its documents.
struct Service {
    url: String,
    key: EncodingKey,
    other_key: EncodingKey,
}

impl Service {
    async fn start() -> Self {
        let key = rsa_key();
        let mut jwk = Jwk::from_encoding_key(&key, Algorithm::RS256).unwrap();
        jwk.common.key_id = Some("one".to_owned());
        let keys = serde_json::to_string(&JwkSet { keys: vec![jwk] }).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let discovery = json!({ "issuer": url, "jwks_uri": format!("{url}/keys") }).to_string();
        let routes = axum::Router::new()
            .route("/keys", axum::routing::get(move || async move { keys }))
            .route("/.well-known/openid-configuration", axum::routing::get(move || async move { discovery }));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Self { url, key, other_key: rsa_key() }
    }

    fn claims(&self) -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        json!({
            "iss": self.url, "aud": "cachec", "exp": now + 300, "nbf": now - 5, "iat": now,
            "sub": "repo:team/product:pull_request", "repository_id": "12", "ref": "refs/pull/7/merge",
        })
    }

    fn token(&self, changes: &Value, key: &EncodingKey) -> String {
        let mut claims = self.claims();
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        let header = Header { kid: Some("one".to_owned()), ..Header::new(Algorithm::RS256) };
        jsonwebtoken::encode(&header, &claims, key).unwrap()
    }

    fn issuer(&self) -> Issuer {
        let text = format!(
            "issuer = '{}'
            audience = 'cachec'
            [[rules]]
            claims = {{ repository_id = '12', ref = 'refs/heads/main' }}
            namespace = 'main'
            allow = 'read,write'
            [[rules]]
            claims = {{ repository_id = '12', ref = 'refs/pull/*/merge' }}
            namespace = 'pr-*'
            allow = 'read,write'
            [[rules]]
            claims = {{ repository_id = '12' }}
            namespace = 'main'
            allow = 'read'",
            self.url
        );
        toml::from_str(&text).unwrap()
    }
}

fn rsa_key() -> EncodingKey {
    let key = rsa::RsaPrivateKey::new(&mut rsa::rand_core::OsRng, 2048).unwrap();
    EncodingKey::from_rsa_der(key.to_pkcs1_der().unwrap().as_bytes())
}

async fn session(server: &TestServer, namespace: &str, proof: &str) -> Result<String, (u16, String)> {
    let url = server.url(&format!("/v1/{namespace}/token"));
    let response = server.client.post(url).bearer_auth(proof).send().await.unwrap();
    if response.status() == 201 { Ok(response.text().await.unwrap()) } else { Err(error_of(response).await) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_gets_a_session_for_what_it_can_prove() {
    let service = Service::start().await;
    let issuer = service.issuer();
    let server = TestServer::start_with(64 * MIB, |options| options.identities = vec![issuer]).await;
    let refused = || Err((401, "unauthorized".to_owned()));
    let token = |changes: &Value| service.token(changes, &service.key);
    let pull_request = token(&json!({}));
    let blob = Blob::noise(1, 1000);
    let put = async |bearer: &str, namespace: &str| {
        let url = server.url(&format!("/v1/{namespace}/blobs/{}", blob.digest));
        let request = server.client.put(url).bearer_auth(bearer).body(blob.frames.clone());
        request.send().await.unwrap().status().as_u16()
    };
    // A server with issuers is closed, and what a job proves itself with is no token.
    assert_eq!(put("x", "pr-7").await, 401);
    assert_eq!(put(&pull_request, "pr-7").await, 401);

    let of_pr = session(&server, "pr-7", &pull_request).await.unwrap();
    assert_eq!(
        (put(&of_pr, "pr-7").await, put(&of_pr, "pr-8").await, put(&of_pr, "main").await),
        (201, 401, 401)
    );
    let reader = session(&server, "main", &pull_request).await.unwrap();
    assert_eq!(put(&reader, "main").await, 403);
    let of_main = session(&server, "main", &token(&json!({ "ref": "refs/heads/main" }))).await.unwrap();
    assert_eq!(put(&of_main, "main").await, 201);
    assert_eq!(session(&server, "pr-8", &pull_request).await, refused());
    assert_eq!(session(&server, "other", &pull_request).await, refused());

    let past = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() - 3600;
    for changes in [
        json!({ "repository_id": "13" }),
        json!({ "repository_id": "12", "ref": "refs/tags/7" }),
        json!({ "aud": "another" }),
        json!({ "iss": "https://ci.example.org" }),
        json!({ "exp": past }),
        json!({ "nbf": past + 7200 }),
    ] {
        assert_eq!(session(&server, "pr-7", &token(&changes)).await, refused(), "{changes}");
    }
    for forged in forgeries(&service, &pull_request) {
        assert_eq!(session(&server, "pr-7", &forged).await, refused(), "{forged}");
    }
}

/// Tokens that nobody signed, or somebody else.
fn forgeries(service: &Service, good: &str) -> Vec<String> {
    let parts: Vec<&str> = good.split('.').collect();
    let evil = service.token(&json!({ "ref": "refs/pull/7/merge", "evil": true }), &service.other_key);
    let evil_claims = evil.split('.').nth(1).unwrap();
    let mut unknown_key = Header::new(Algorithm::RS256);
    unknown_key.kid = Some("two".to_owned());
    let unsigned = Header { kid: Some("one".to_owned()), ..Header::new(Algorithm::HS256) };
    let public = "one".as_bytes();
    vec![
        service.token(&json!({}), &service.other_key),
        format!("{}.{evil_claims}.{}", parts[0], parts[2]),
        format!("{}.{}.", parts[0], parts[1]),
        // {"alg":"none","kid":"one"}
        format!("eyJhbGciOiJub25lIiwia2lkIjoib25lIn0.{}.", parts[1]),
        jsonwebtoken::encode(&unsigned, &service.claims(), &EncodingKey::from_secret(public)).unwrap(),
        jsonwebtoken::encode(&unknown_key, &service.claims(), &service.key).unwrap(),
        "a.b.c".to_owned(),
        format!("{good}{}", "A".repeat(20_000)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_that_is_not_there_is_said_to_be() {
    let service = Service::start().await;
    let mut issuer = service.issuer();
    issuer.jwks_url = Some("http://127.0.0.1:1/keys".to_owned());
    let server = TestServer::start_with(64 * MIB, |options| options.identities = vec![issuer]).await;
    for _ in 0..2 {
        let answer = session(&server, "pr-7", &service.token(&json!({}), &service.key)).await;
        assert_eq!(answer, Err((503, "issuer_unreachable".to_owned())));
    }
}
