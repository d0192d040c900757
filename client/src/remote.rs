//! The server, as the agent sees it: every call bounded in time, and none after repeated failures.
//!
//! Invariants:
//! - A call that failed tells the [`Breaker`] of its direction (reads, writes). An open breaker answers at
//!   once, for the agent's life; new agents respect it for [`BREAKER_TTL`].
//! - When the calls of a build have cost more time than the compiles they saved, reads stop.
//! - Nothing that the server says is believed: bodies are bounded, digests are checked by the caller.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cachec_protocol::codec::Message;
use cachec_protocol::message::{
    BlobList, CBOR, ErrorBody, FRAMES, LookupRequest, LookupResponse, Manifest, PROTOCOL_HEADER,
    PROTOCOL_VERSION, PublishRequest, ZSTD,
};
use cachec_protocol::{ActionKey, Digest, StoredResult, decode, encode};
use futures_util::{Stream, StreamExt};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use reqwest::{Body, Method, Response, StatusCode};

use crate::batch::Batch;
use crate::breaker::Breaker;
use crate::config::{Config, Token};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// For a lookup, and for the first byte of any answer.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest pause within a body.
const STALL_TIMEOUT: Duration = Duration::from_secs(2);
/// An upload may take this long, and a second more for each [`UPLOAD_BYTES_PER_SECOND`].
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(10);
const UPLOAD_BYTES_PER_SECOND: u64 = 100_000;
/// How long an upload waits for a busy server, in all; one that asks for more has failed.
const UPLOAD_PATIENCE: Duration = Duration::from_secs(10);
/// Most that one request asks about.
const MAX_BATCH: usize = 256;
/// Time that reads may cost before they have saved any.
const READ_GRACE_MS: u64 = 15_000;
/// Flow-control windows: what a 1 Gbit/s line with 20 ms round trip holds, and more for the connection.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Why a call brought nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoteError {
    #[error("not asked, after earlier failures")]
    BreakerOpen,
    #[error("{0}")]
    Unreachable(String),
    #[error("no answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    #[error("it refuses the token (HTTP {0})")]
    Unauthorised(u16),
    #[error("what answers there is not a cachec server that speaks protocol {PROTOCOL_VERSION}")]
    Foreign,
    #[error("it does not have the blob")]
    Absent,
    #[error("HTTP {status}: {message}")]
    Refused { status: u16, message: String },
    #[error("it is busy, and asks to be left alone for {} s", .0.as_secs())]
    Busy(Duration),
    #[error("its answer is malformed: {0}")]
    Malformed(String),
}

impl RemoteError {
    /// Whether the server is in trouble, rather than this one request.
    fn is_failure(&self) -> bool {
        match self {
            Self::BreakerOpen | Self::Absent | Self::Busy(_) => false,
            Self::Refused { status, .. } => *status >= 500,
            _ => true,
        }
    }

    /// Whether asking again is pointless.
    fn is_final(&self) -> bool {
        matches!(self, Self::Unauthorised(_) | Self::Foreign)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Remote {
    /// HTTP/2, by prior knowledge where there is no TLS to negotiate it.
    http: reqwest::Client,
    /// For a plain-text server, or a proxy before it, that speaks HTTP/1.1 alone.
    http1: reqwest::Client,
    use_http1: AtomicBool,
    /// `URL/v1/namespace`.
    base: String,
    token: Option<Token>,
    pub(crate) reads: Breaker,
    pub(crate) writes: Breaker,
    /// The first failure, in the user's words.
    failure: OnceLock<String>,
    spent_ms: AtomicU64,
    saved_ms: AtomicU64,
    pub(crate) received_bytes: Arc<AtomicU64>,
    pub(crate) sent_bytes: AtomicU64,
    lookups: Batch<ActionKey, Vec<StoredResult>>,
    presence: Batch<Digest, bool>,
}

impl Remote {
    /// Prepares for calls; connects with the first one.
    ///
    /// # Errors
    /// A text where TLS cannot be set up.
    pub(crate) fn new(config: &Config, url: &str, breaker_file: &str) -> Result<Self, String> {
        let builder = || {
            reqwest::Client::builder()
                .tls_backend_preconfigured(crate::tls::client_config())
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .redirect(reqwest::redirect::Policy::none())
                .user_agent(concat!("cachec/", env!("CARGO_PKG_VERSION")))
        };
        let mut http2 = builder()
            .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
            .http2_initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        if url.starts_with("http:") {
            http2 = http2.http2_prior_knowledge();
        }
        let file = |direction: &str| -> PathBuf {
            config.runtime_directory.join(format!("{breaker_file}.{direction}"))
        };
        Ok(Self {
            http: http2.build().map_err(|error| describe(&error))?,
            http1: builder().http1_only().build().map_err(|error| describe(&error))?,
            use_http1: AtomicBool::new(false),
            base: format!("{url}/v{PROTOCOL_VERSION}/{}", config.namespace),
            token: config.token.clone(),
            reads: Breaker::new(file("reads")),
            writes: Breaker::new(file("writes")),
            failure: OnceLock::new(),
            spent_ms: AtomicU64::new(0),
            saved_ms: AtomicU64::new(0),
            received_bytes: Arc::default(),
            sent_bytes: AtomicU64::new(0),
            lookups: Batch::default(),
            presence: Batch::default(),
        })
    }

    /// The results of a key that the server knows; `None` where it does not answer. Goes together with what others
    /// look up.
    pub(crate) async fn results(&self, key: ActionKey) -> Option<Vec<StoredResult>> {
        let ask = |keys: Vec<ActionKey>| async move {
            let Ok(manifests) = self.lookup(keys.clone()).await else { return Vec::new() };
            let of = |key: &ActionKey| {
                let own = manifests.iter().filter(|manifest| manifest.action_key == *key);
                own.flat_map(Manifest::readable_results).collect()
            };
            keys.iter().map(of).collect()
        };
        self.lookups.ask(key, MAX_BATCH, ask).await
    }

    /// Whether the server needs a blob. Goes together with what others ask.
    ///
    /// # Errors
    /// See [`RemoteError`]; the result is not uploaded.
    pub(crate) async fn needs(&self, digest: Digest) -> Result<bool, RemoteError> {
        let ask = |digests: Vec<Digest>| async move {
            let Ok(missing) = self.missing(digests.clone()).await else { return Vec::new() };
            digests.iter().map(|digest| missing.contains(digest)).collect()
        };
        // The breaker knows why.
        let answer = self.presence.ask(digest, MAX_BATCH, ask).await;
        answer.ok_or_else(|| RemoteError::Unreachable("it does not say what it has".to_owned()))
    }

    /// The manifests of those keys that the server knows.
    ///
    /// # Errors
    /// See [`RemoteError`]; the caller has a miss.
    pub(crate) async fn lookup(&self, action_keys: Vec<ActionKey>) -> Result<Vec<Manifest>, RemoteError> {
        let started = Instant::now();
        let body = encode(&LookupRequest { action_keys });
        let outcome = within(LOOKUP_TIMEOUT, async {
            let response = self.call(&self.reads, Call::post("lookup", body)).await?;
            let bytes = self.read_whole(response, LookupResponse::LIMIT_BYTES).await?;
            decode::<LookupResponse>(&bytes).map_err(|error| RemoteError::Malformed(error.to_string()))
        })
        .await;
        self.spend(started);
        Ok(self.settle(&self.reads, outcome)?.manifests)
    }

    /// A blob's compressed bytes.
    ///
    /// # Errors
    /// See [`RemoteError`]; an error within the stream must be reported with [`Self::read_failed`].
    pub(crate) async fn blob(
        &self,
        digest: &Digest,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + use<>, RemoteError> {
        self.stream(&format!("blobs/{digest}"), ZSTD).await
    }

    /// The frames of what the last such build asked for.
    ///
    /// # Errors
    /// See [`RemoteError`]; [`RemoteError::Absent`] where there was no such build.
    pub(crate) async fn build(
        &self,
        key: &ActionKey,
        packs: Packs,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + use<>, RemoteError> {
        let packs = match packs {
            Packs::None => "none",
            Packs::Final => "final",
            Packs::Rest => "rest",
            Packs::All => "all",
        };
        self.stream(&format!("builds/{key}?packs={packs}"), FRAMES).await
    }

    async fn stream(
        &self,
        path: &str,
        media_type: &'static str,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + use<>, RemoteError> {
        let get = Call { method: Method::GET, path, media_type, body: Body::default(), size_bytes: None };
        let response = self.settle(&self.reads, within(LOOKUP_TIMEOUT, self.call(&self.reads, get)).await)?;
        let stream = response.bytes_stream();
        let received_bytes = Arc::clone(&self.received_bytes);
        let first = (Box::pin(stream), received_bytes);
        Ok(futures_util::stream::unfold(first, async |(mut stream, received_bytes)| {
            let item = match tokio::time::timeout(STALL_TIMEOUT, stream.next()).await {
                Ok(None) => return None,
                Ok(Some(Ok(bytes))) => {
                    received_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    Ok(bytes)
                }
                Ok(Some(Err(error))) => Err(io::Error::other(describe(&error))),
                Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
            };
            Some((item, (stream, received_bytes)))
        }))
    }

    /// The blobs of a list that the server does not have.
    ///
    /// # Errors
    /// See [`RemoteError`]; the result is not uploaded.
    async fn missing(&self, digests: Vec<Digest>) -> Result<Vec<Digest>, RemoteError> {
        let body = Bytes::from(encode(&BlobList { digests }));
        let ask = || async {
            let response = self.call(&self.writes, Call::post("blobs/missing", body.clone())).await?;
            let bytes = self.read_whole(response, BlobList::LIMIT_BYTES).await?;
            decode::<BlobList>(&bytes).map_err(|error| RemoteError::Malformed(error.to_string()))
        };
        let outcome = self.patiently(|| within(LOOKUP_TIMEOUT, ask())).await;
        Ok(self.settle(&self.writes, outcome)?.digests)
    }

    /// Uploads a blob of that many compressed bytes.
    ///
    /// # Errors
    /// See [`RemoteError`]; the result is not uploaded.
    pub(crate) async fn put_blob(
        &self,
        digest: &Digest,
        body: Body,
        size_bytes: u64,
    ) -> Result<(), RemoteError> {
        let path = format!("blobs/{digest}");
        self.put(Call {
            method: Method::PUT,
            path: &path,
            media_type: ZSTD,
            body,
            size_bytes: Some(size_bytes),
        })
        .await
    }

    /// Publishes a result whose blobs are uploaded.
    ///
    /// # Errors
    /// See [`RemoteError`]; the result is not stored.
    pub(crate) async fn publish(&self, request: &PublishRequest) -> Result<(), RemoteError> {
        let body = Bytes::from(encode(request));
        let size_bytes = Some(body.len() as u64);
        let path = format!("results/{}", request.result.result_key());
        self.patiently(|| {
            let body = body.clone().into();
            self.put(Call { method: Method::PUT, path: &path, media_type: CBOR, body, size_bytes })
        })
        .await
    }

    async fn put(&self, call: Call<'_>) -> Result<(), RemoteError> {
        let size_bytes = call.size_bytes.unwrap_or_default();
        let limit = UPLOAD_TIMEOUT + Duration::from_secs(size_bytes / UPLOAD_BYTES_PER_SECOND);
        self.settle(&self.writes, within(limit, self.call(&self.writes, call)).await)?;
        self.sent_bytes.fetch_add(size_bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Calls again where the server is busy, when it said to. For uploads: a read that waits is worse than a miss. A
    /// server that stays busy has failed.
    ///
    /// # Errors
    /// Those of the call; [`RemoteError::Busy`] where the server stays so.
    pub(crate) async fn patiently<T, F: Future<Output = Result<T, RemoteError>>>(
        &self,
        mut call: impl FnMut() -> F,
    ) -> Result<T, RemoteError> {
        let end = Instant::now() + UPLOAD_PATIENCE;
        loop {
            match call().await {
                Err(RemoteError::Busy(time)) if Instant::now() + time < end => tokio::time::sleep(time).await,
                Err(error @ RemoteError::Busy(_)) => {
                    self.writes.failed(&format!("{}: {error}", self.base));
                    return Err(error);
                }
                outcome => return outcome,
            }
        }
    }

    /// Reports that a body which the server sent was cut off, or not what it should be.
    pub(crate) fn read_failed(&self, message: &str) {
        let _ = self.settle::<()>(&self.reads, Err(RemoteError::Malformed(message.to_owned())));
    }

    /// Counts waiting, which must not outgrow what was saved.
    pub(crate) fn spend(&self, started: Instant) {
        let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let spent_ms = self.spent_ms.fetch_add(elapsed_ms, Ordering::Relaxed) + elapsed_ms;
        if spent_ms > READ_GRACE_MS.saturating_add(self.saved_ms.load(Ordering::Relaxed)) {
            self.reads.open(&format!("waiting for {} has cost more time than it saved", self.base));
        }
    }

    /// Counts a compile that was not needed.
    pub(crate) fn save(&self, compile_ms: u64) {
        self.saved_ms.fetch_add(compile_ms, Ordering::Relaxed);
    }

    /// Why the server was of no help, as soon as it was not once.
    pub(crate) fn complaint(&self) -> Option<String> {
        let failure = self.failure.get().cloned();
        failure.or_else(|| self.reads.reason()).or_else(|| self.writes.reason())
    }

    fn settle<T>(&self, breaker: &Breaker, outcome: Result<T, RemoteError>) -> Result<T, RemoteError> {
        match &outcome {
            Ok(_) => breaker.succeeded(),
            // Uploads wait and try again, each by itself.
            Err(RemoteError::Busy(time)) if std::ptr::eq(breaker, &self.reads) => breaker.pause(*time),
            Err(error) if error.is_failure() => {
                let reason = format!("{}: {error}", self.base);
                if error.is_final() {
                    breaker.open(&reason);
                } else {
                    breaker.failed(&reason);
                }
                let _ = self.failure.set(reason);
            }
            Err(_) => {}
        }
        outcome
    }

    async fn call(&self, breaker: &Breaker, call: Call<'_>) -> Result<Response, RemoteError> {
        if breaker.is_open() {
            return Err(RemoteError::BreakerOpen);
        }
        let client = if self.use_http1.load(Ordering::Relaxed) { &self.http1 } else { &self.http };
        let mut request = client
            .request(call.method, format!("{}/{}", self.base, call.path))
            .header(CONTENT_TYPE, call.media_type)
            .body(call.body);
        if let Some(size_bytes) = call.size_bytes {
            request = request.header(CONTENT_LENGTH, size_bytes);
        }
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        match request.send().await {
            Ok(response) => check(response).await,
            Err(error) => {
                if !error.is_connect() && !error.is_timeout() {
                    // Perhaps no HTTP/2 there; the next call tries the older version.
                    self.use_http1.store(self.base.starts_with("http:"), Ordering::Relaxed);
                }
                Err(RemoteError::Unreachable(describe(&error)))
            }
        }
    }

    async fn read_whole(&self, response: Response, limit_bytes: usize) -> Result<Vec<u8>, RemoteError> {
        let mut stream = response.bytes_stream();
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| RemoteError::Unreachable(describe(&error)))?;
            if bytes.len() + chunk.len() > limit_bytes {
                return Err(RemoteError::Malformed("longer than any such answer".to_owned()));
            }
            bytes.extend_from_slice(&chunk);
        }
        self.received_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

/// Which packs a build's stream is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packs {
    None,
    /// Those of units that not only compilers read.
    Final,
    /// The others, and no manifests.
    Rest,
    All,
}

/// One request.
struct Call<'a> {
    method: Method,
    /// Below the namespace.
    path: &'a str,
    media_type: &'static str,
    body: Body,
    /// Length of a body that is streamed.
    size_bytes: Option<u64>,
}

impl<'a> Call<'a> {
    fn post(path: &'a str, body: impl Into<Body>) -> Self {
        Self { method: Method::POST, path, media_type: CBOR, body: body.into(), size_bytes: None }
    }
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, RemoteError>>,
) -> Result<T, RemoteError> {
    tokio::time::timeout(limit, call).await.unwrap_or(Err(RemoteError::TimedOut(limit)))
}

/// Turns answers other than success into errors.
async fn check(response: Response) -> Result<Response, RemoteError> {
    let status = response.status();
    let versions = response.headers().get(PROTOCOL_HEADER).and_then(|value| value.to_str().ok());
    let speaks =
        versions.is_some_and(|list| list.split(',').any(|version| version.trim() == PROTOCOL_VERSION));
    match status {
        // A proxy in front answers these without the server's header.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(RemoteError::Unauthorised(status.as_u16())),
        status if status.is_server_error() => Err(refusal(response).await),
        _ if !speaks => Err(RemoteError::Foreign),
        status if status.is_success() => Ok(response),
        StatusCode::NOT_FOUND => Err(RemoteError::Absent),
        _ => Err(refusal(response).await),
    }
}

async fn refusal(response: Response) -> RemoteError {
    if let Some(time) = retry_after(&response) {
        return RemoteError::Busy(time);
    }
    let status = response.status().as_u16();
    let body = response.bytes().await.ok().and_then(|bytes| decode::<ErrorBody>(&bytes).ok());
    let message = body.map_or_else(|| "no reason given".to_owned(), |body| body.message);
    RemoteError::Refused { status, message }
}

/// When a server that has too much to do wants to be asked again; what says another day is no help.
fn retry_after(response: &Response) -> Option<Duration> {
    let is_busy =
        [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&response.status());
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds)).filter(|time| is_busy && *time <= UPLOAD_PATIENCE)
}

/// The innermost cause, which is what a person can act on; without the URL, which is said already.
fn describe(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(directory: &std::path::Path) -> Remote {
        let config = serde_json::json!({
            "url": "http://127.0.0.1:1", "token": null, "namespace": "default", "mode": "read-write",
            "directory": null, "directory_bytes": 0, "in_container": false, "runtime_directory": directory,
            "path_mode": "portable", "lazy": false, "extra_variables": [], "log": "warn", "network_variables": [],
        });
        Remote::new(&serde_json::from_value(config).unwrap(), "http://127.0.0.1:1", "test").unwrap()
    }

    /// A server that gives these answers, one after the other, and counts what it was asked.
    fn answering(answers: &'static [&'static str]) -> (String, std::thread::JoinHandle<usize>) {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let served = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = 0;
            for answer in answers {
                if stream.read(&mut [0; 64 << 10]).unwrap() == 0 {
                    break;
                }
                asked += 1;
                let head = "cachec-protocol: 1\r\ncontent-length: 0\r\n\r\n";
                write!(stream, "HTTP/1.1 {answer}\r\n{head}").unwrap();
            }
            asked
        });
        (url, served)
    }

    #[tokio::test]
    async fn a_busy_server_is_left_alone_for_as_long_as_it_says() {
        let directory = tempfile::tempdir().unwrap();
        let (url, served) = answering(&[
            "503 Service Unavailable\r\nretry-after: 0",
            "429 Too Many Requests\r\nretry-after: 0",
            "201 Created",
            "503 Service Unavailable\r\nretry-after: 3600",
            "503 Service Unavailable\r\nretry-after: 9",
        ]);
        let remote = Remote { base: format!("{url}/v1/default"), ..remote(directory.path()) };
        remote.use_http1.store(true, Ordering::Relaxed);
        let digest = Digest::of(b"");
        // An upload is tried again; it is no failure.
        remote.patiently(|| remote.put_blob(&digest, Body::from("x"), 1)).await.unwrap();
        assert!(remote.complaint().is_none());
        // What is too long to wait for is a failure.
        let refused = remote.patiently(|| remote.put_blob(&digest, Body::from("x"), 1)).await;
        assert!(matches!(refused, Err(RemoteError::Refused { status: 503, .. })), "{refused:?}");
        // A read does not wait, and the next one does not ask.
        assert!(matches!(remote.lookup(vec![]).await, Err(RemoteError::Busy(_))));
        assert!(matches!(remote.lookup(vec![]).await, Err(RemoteError::BreakerOpen)));
        drop(remote);
        assert_eq!(served.join().unwrap(), 5);
    }

    fn ago(milliseconds: u64) -> Instant {
        Instant::now().checked_sub(Duration::from_millis(milliseconds)).unwrap()
    }

    #[test]
    fn waiting_that_does_not_pay_stops_reads_and_saved_time_pays() {
        let directory = tempfile::tempdir().unwrap();
        let remote = remote(directory.path());
        remote.save(20_000);
        remote.spend(ago(READ_GRACE_MS + 10_000));
        assert!(!remote.reads.is_open());
        remote.spend(ago(15_000));
        assert!(remote.reads.reason().unwrap().contains("more time than it saved"));
        assert!(!remote.writes.is_open());
    }

    #[test]
    fn a_server_that_refuses_or_is_none_is_not_asked_again() {
        for error in [RemoteError::Unauthorised(401), RemoteError::Foreign] {
            let directory = tempfile::tempdir().unwrap();
            let remote = remote(directory.path());
            assert!(remote.settle::<()>(&remote.reads, Err(error)).is_err());
            assert!(remote.reads.is_open() && remote.complaint().is_some());
        }
        let directory = tempfile::tempdir().unwrap();
        let remote = remote(directory.path());
        let absent = remote.settle::<()>(&remote.reads, Err(RemoteError::Absent));
        assert!(absent.is_err() && remote.complaint().is_none());
    }
}
