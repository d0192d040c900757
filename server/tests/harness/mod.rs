//! What the tests share: a server in this process, the real program, and things to store.

#![allow(dead_code, reason = "each test program uses its own part")]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cachec_protocol::message::{ErrorBody, PublishRequest};
use cachec_protocol::pack::{self, UPLOAD_LEVEL};
use cachec_protocol::{
    ActionKey, Digest, Input, InputKind, InputSet, Output, OutputKind, Pack, StoredResult, decode, encode,
};
use cachec_server::policy::Policy;
use cachec_server::server::{RunningServer, ServerOptions};
use cachec_server::store::StoreStats;
use cachec_server::store::embedded::{EmbeddedOptions, working_bytes};
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;

/// How many rounds a campaign has: few, unless a variable says more. `bench/campaigns.sh` does.
pub(crate) fn rounds(variable: &str, few: u64) -> u64 {
    std::env::var(variable).map_or(few, |text| text.parse().expect(variable))
}

/// Flips one bit of a file, or cuts it off there.
pub(crate) fn harm(path: &Path, place: u64, cut: bool) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = usize::try_from(place).unwrap() % bytes.len();
    if cut {
        bytes.truncate(at);
    } else {
        bytes[at] ^= 1 << (place % 8);
    }
    // Another file, where the old one has more names.
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Bytes that do not compress, others for each seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// A blob: its digest and its zstd frames.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) content: Vec<u8>,
    pub(crate) frames: Vec<u8>,
}

impl Blob {
    pub(crate) fn new(content: Vec<u8>) -> Self {
        let frames = pack::compress(&content, UPLOAD_LEVEL).unwrap();
        Self { digest: Digest::of(&content), content, frames }
    }

    pub(crate) fn noise(seed: u64, length: usize) -> Self {
        Self::new(noise(seed, length))
    }
}

/// A result of action `action` with an input that differs with `variant`.
pub(crate) fn result(action: u8, variant: u64, pack: Option<Digest>) -> StoredResult {
    let output = |digest| Output {
        name: "libdemo.rlib".to_owned(),
        kind: OutputKind::Binary,
        executable: false,
        digest,
        size_bytes: 1,
        permissions: None,
        inline: None,
    };
    StoredResult {
        action_key: ActionKey::from_bytes([action; 32]),
        input_set: InputSet::new(vec![Input {
            kind: InputKind::File,
            name: b"src/lib.rs".to_vec(),
            digest: Some(Digest::of(&variant.to_le_bytes())),
        }]),
        outputs: pack.map(output).into_iter().collect(),
        stdout: vec![],
        stderr: b"warning: unused".to_vec(),
        compile_ms: variant,
        pack: pack.map(|digest| Pack { digest }),
        signature: None,
    }
}

pub(crate) fn publication(result: &StoredResult) -> Vec<u8> {
    encode(&PublishRequest { result: result.clone(), action_fields: b"fields".to_vec() })
}

/// A server in this process, on its own data directory.
pub(crate) struct TestServer {
    pub(crate) data: TempDir,
    pub(crate) options: ServerOptions,
    pub(crate) running: RunningServer,
    pub(crate) client: reqwest::Client,
}

pub(crate) fn options(data: &Path, max_size_bytes: u64) -> ServerOptions {
    let directory = data.to_owned();
    let policy = Arc::new(Policy::default());
    let store = EmbeddedOptions { directory, max_size_bytes, max_blob_bytes: 32 * MIB, policy };
    ServerOptions::new(SocketAddr::from(([127, 0, 0, 1], 0)), store)
}

impl TestServer {
    pub(crate) async fn start() -> Self {
        Self::start_with(256 * MIB, |_| {}).await
    }

    pub(crate) async fn start_with(max_size_bytes: u64, change: impl FnOnce(&mut ServerOptions)) -> Self {
        let data = tempfile::tempdir().unwrap();
        let mut options = options(data.path(), max_size_bytes);
        change(&mut options);
        let running = RunningServer::start(options.clone()).await.unwrap();
        Self { data, options, running, client: http_client() }
    }

    /// Stops the server and starts another one on the same data.
    pub(crate) async fn restart(self) -> Self {
        self.running.stop().await.unwrap();
        let running = RunningServer::start(self.options.clone()).await.unwrap();
        Self { running, client: http_client(), ..self }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.running.url)
    }

    pub(crate) fn blob_url(&self, digest: &Digest) -> String {
        self.url(&format!("/v1/default/blobs/{digest}"))
    }

    pub(crate) async fn put_bytes(&self, digest: &Digest, body: Vec<u8>) -> reqwest::Response {
        self.client.put(self.blob_url(digest)).body(body).send().await.unwrap()
    }

    pub(crate) async fn put(&self, blob: &Blob) -> u16 {
        self.put_bytes(&blob.digest, blob.frames.clone()).await.status().as_u16()
    }

    /// The frames of a blob, or `None` where the server says that it is absent.
    pub(crate) async fn get(&self, digest: &Digest) -> Option<Vec<u8>> {
        let response = self.client.get(self.blob_url(digest)).send().await.unwrap();
        match response.status().as_u16() {
            200 => Some(response.bytes().await.unwrap().to_vec()),
            404 => None,
            other => panic!("GET answered {other}"),
        }
    }

    pub(crate) async fn post(&self, path: &str, body: Vec<u8>) -> reqwest::Response {
        self.client.post(self.url(path)).body(body).send().await.unwrap()
    }

    pub(crate) async fn publish(&self, result: &StoredResult) -> u16 {
        let url = self.url(&format!("/v1/default/results/{}", result.result_key()));
        self.client.put(url).body(publication(result)).send().await.unwrap().status().as_u16()
    }

    /// The results of one action key.
    pub(crate) async fn lookup(&self, action: u8) -> Vec<StoredResult> {
        use cachec_protocol::message::{LookupRequest, LookupResponse};
        let request = LookupRequest { action_keys: vec![ActionKey::from_bytes([action; 32])] };
        let response = self.post("/v1/default/lookup", encode(&request)).await;
        assert_eq!(response.status(), 200);
        let answer: LookupResponse = decode(&response.bytes().await.unwrap()).unwrap();
        answer.manifests.iter().flat_map(|manifest| manifest.readable_results()).collect()
    }

    pub(crate) async fn stats(&self) -> StoreStats {
        use cachec_server::store::Store;
        self.running.store().stats().await.unwrap()
    }

    /// Fails unless nothing is staged, nothing reserved, and the account agrees with the files.
    pub(crate) async fn assert_nothing_left_behind(&self) {
        // The thread that received a broken upload may still be cleaning up.
        for _ in 0..200 {
            if self.stats().await.reserved_bytes == 0 && files(&self.data.path().join("staging")).is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(self.stats().await.reserved_bytes, 0, "bytes stay reserved");
        assert_eq!(files(&self.data.path().join("staging")), Vec::<PathBuf>::new());
    }
}

/// What the entries of a store of this size may take.
pub(crate) fn entry_limit(max_size_bytes: u64) -> u64 {
    max_size_bytes - working_bytes(max_size_bytes)
}

/// A client for plain HTTP. Built in one workspace with the cachec client, it needs a TLS provider all the same.
pub(crate) fn http_client() -> reqwest::Client {
    http_client_builder().build().unwrap()
}

/// As [`http_client`], with more to set.
pub(crate) fn http_client_builder() -> reqwest::ClientBuilder {
    // Fails where another test of this process has done it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
}

/// Status and code of an error response.
pub(crate) async fn error_of(response: reqwest::Response) -> (u16, String) {
    let status = response.status().as_u16();
    let body: ErrorBody = decode(&response.bytes().await.unwrap()).unwrap();
    assert!(!body.message.is_empty());
    (status, body.code)
}

/// Waits until something is so, at most for a minute.
pub(crate) async fn wait_for(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !is_so().await {
        assert!(started.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// All regular files below a directory.
pub(crate) fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // A directory or file may go while it is listed.
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(files(&entry.path())),
            Ok(kind) if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

/// Bytes that the blob and staging files take on disk.
pub(crate) fn disk_bytes(data: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    ["blobs", "staging"]
        .iter()
        .flat_map(|part| files(&data.join(part)))
        .filter_map(|path| path.metadata().ok())
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}

/// The real program.
pub(crate) struct Program {
    pub(crate) child: Child,
    pub(crate) url: String,
}

pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cachec-server"));
    command.env_remove("CACHEC_SERVER_DATA");
    command
}

/// Runs a command of the program on a data directory.
pub(crate) fn run(arguments: &[&str], data: &Path) -> process::Output {
    program().args(arguments).arg("--data").arg(data).output().unwrap()
}

impl Program {
    pub(crate) fn start(data: &Path, arguments: &[&str]) -> Self {
        let listen = if arguments.contains(&"--listen") { &[][..] } else { &["--listen", "127.0.0.1:0"] };
        let mut child = program()
            .args(["serve", "--data"])
            .arg(data)
            .args(listen)
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").expect(&line).to_owned();
        Self { child, url }
    }

    /// Sends SIGTERM; the exit status is to be asked for.
    pub(crate) fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// The most memory that the program ever had, in KiB.
    pub(crate) fn peak_memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
