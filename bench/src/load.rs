//! The server under load, beside nginx that serves the same bytes as static files.
//!
//! Needs `wrk`, `nginx` and `h2load` (Debian: wrk, nginx-light, nghttp2-client). Everything stays on loopback. Each pair is
//! measured in turns, several times; the median counts.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use cachec_protocol::message::{LookupRequest, PublishRequest};
use cachec_protocol::pack::{self, UPLOAD_LEVEL};
use cachec_protocol::{ActionKey, BuildRecord, Digest, encode};
use clap::Args;
use comfy_table::Table;

use crate::server::Server;

/// How long and how often.
#[derive(Debug, Args)]
pub struct Options {
    /// Seconds of each measurement
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Measurements of each kind
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Connections at a time
    #[arg(long, default_value_t = 16)]
    connections: u32,
}

/// Bytes of the files that are served.
const SIZES: [(&str, usize); 4] =
    [("1 KiB", 1 << 10), ("64 KiB", 64 << 10), ("1 MiB", 1 << 20), ("32 MiB", 32 << 20)];

/// Results that are looked up.
const RESULTS: u8 = 100;

/// Lookups per second whose latency is measured.
const LOOKUPS_PER_SECOND: u32 = 2000;

/// Measures, and prints a table.
///
/// # Errors
/// Where a program is missing, or answers something else than it should.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let server = Server::start(&directory.path().join("data"), &["--recompress-level", "0"])?;
    let address = server.url.strip_prefix("http://").context("a plain server")?.to_owned();
    let nginx = Nginx::start(directory.path())?;
    let mut table = Table::new();
    table.set_header(["size", "cachec", "nginx", "ratio", "p99 cachec", "p99 nginx"]);
    for (name, size) in SIZES {
        let content = noise(size);
        let frames = pack::compress(&content, UPLOAD_LEVEL)?;
        let digest = Digest::of(&content);
        request(&address, "PUT", &format!("/v1/default/blobs/{digest}"), &frames)?;
        fs::write(nginx.root.join(digest.to_string()), &frames)?;
        let urls = [
            format!("{}/v1/default/blobs/{digest}", server.url),
            format!("http://127.0.0.1:{}/{digest}", nginx.port),
        ];
        let [own, other] = compare(&urls, options)?;
        table.add_row([
            name.to_owned(),
            format!("{:.0}/s", own.per_second),
            format!("{:.0}/s", other.per_second),
            format!("{:.2}", own.per_second / other.per_second),
            format!("{:.2} ms", own.p99_ms),
            format!("{:.2} ms", other.p99_ms),
        ]);
    }
    println!("{table}");
    let (lookups, p50_ms, p99_ms) = lookups(&server, &address, directory.path(), options)?;
    println!("{lookups} lookups at {LOOKUPS_PER_SECOND} per second: p50 {p50_ms:.2} ms, p99 {p99_ms:.2} ms");
    println!("peak memory {} MiB", server.peak_memory_bytes()? >> 20);
    Ok(())
}

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

/// Sends one request, and expects success.
fn request(address: &str, method: &str, path: &str, body: &[u8]) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let status = answer.get(9..12).unwrap_or_default();
    ensure!(status.starts_with(b"2"), "{method} {path}: {}", String::from_utf8_lossy(status));
    Ok(())
}

/// What one measurement found.
#[derive(Debug, Clone, Copy)]
struct Load {
    per_second: f64,
    p99_ms: f64,
}

fn compare(urls: &[String; 2], options: &Options) -> anyhow::Result<[Load; 2]> {
    let mut found = [Vec::new(), Vec::new()];
    for _ in 0..options.rounds {
        for (url, loads) in urls.iter().zip(&mut found) {
            loads.push(wrk(url, options)?);
        }
    }
    let median = |loads: &Vec<Load>, of: fn(&Load) -> f64| {
        let mut values: Vec<f64> = loads.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    Ok(found.map(|loads| Load {
        per_second: median(&loads, |load| load.per_second),
        p99_ms: median(&loads, |load| load.p99_ms),
    }))
}

fn wrk(url: &str, options: &Options) -> anyhow::Result<Load> {
    let output = Command::new("wrk")
        .args(["--latency", "--threads", "1", "--timeout", "30s"])
        .args(["--connections", &options.connections.to_string()])
        .args(["--duration", &format!("{}s", options.seconds), url])
        .output()
        .context("wrk; on Debian: apt-get install wrk")?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(!text.contains("Non-2xx"), "not every answer was good:\n{text}");
    let value = |name: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(name));
        line.and_then(|line| line.split_whitespace().last()).with_context(|| format!("{name} in:\n{text}"))
    };
    let time = value("99%")?;
    let (number, factor) = match time {
        time if time.ends_with("us") => (time.trim_end_matches("us"), 1e-3),
        time if time.ends_with("ms") => (time.trim_end_matches("ms"), 1.0),
        time => (time.trim_end_matches('s'), 1e3),
    };
    Ok(Load { per_second: value("Requests/sec:")?.parse()?, p99_ms: number.parse::<f64>()? * factor })
}

/// Publishes results and looks them up at a steady rate. Returns how many, median and 99th percentile.
fn lookups(
    server: &Server,
    address: &str,
    directory: &Path,
    options: &Options,
) -> anyhow::Result<(usize, f64, f64)> {
    let mut action_keys = Vec::new();
    for number in 0..RESULTS {
        let result = BuildRecord::default().into_result(ActionKey::from_bytes([number; 32]));
        action_keys.push(result.action_key);
        let path = format!("/v1/default/results/{}", result.result_key());
        request(address, "PUT", &path, &encode(&PublishRequest { result, action_fields: Vec::new() }))?;
    }
    action_keys.truncate(10);
    let (body, log) = (directory.join("lookup"), directory.join("log"));
    fs::write(&body, encode(&LookupRequest { action_keys }))?;
    let clients = 8;
    let status = Command::new("h2load")
        .args(["--clients", &clients.to_string(), "--rps", &(LOOKUPS_PER_SECOND / clients).to_string()])
        .args(["--duration", &(options.seconds * 3).to_string()])
        .arg(format!("--data={}", body.display()))
        .arg(format!("--log-file={}", log.display()))
        .arg(format!("{}/v1/default/lookup", server.url))
        .stdout(Stdio::null())
        .status()
        .context("h2load; on Debian: apt-get install nghttp2-client")?;
    ensure!(status.success(), "h2load ended with {status}");
    // Start, status and microseconds, separated by tabs.
    let text = fs::read_to_string(&log)?;
    let mut times = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [_, status, microseconds] = fields.as_slice() else { bail!("a line of h2load's log: {line}") };
        ensure!(*status == "200", "a lookup was answered with {status}");
        times.push(microseconds.parse::<f64>()? / 1e3);
    }
    times.sort_by(f64::total_cmp);
    let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or_default();
    Ok((times.len(), at(50), at(99)))
}

/// nginx with one root directory; ended when dropped.
struct Nginx {
    process: Child,
    port: u16,
    root: std::path::PathBuf,
}

impl Nginx {
    fn start(directory: &Path) -> anyhow::Result<Self> {
        let root = directory.join("root");
        fs::create_dir_all(&root)?;
        // The workers of a master that runs as root are somebody else.
        let readable = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
        fs::set_permissions(directory, readable)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let configuration = directory.join("nginx.conf");
        let (place, pid) = (root.display(), directory.join("nginx.pid"));
        let text = format!(
            "daemon off; worker_processes auto; pid {}; error_log /dev/null;
            events {{ worker_connections 1024; }}
            http {{ sendfile on; tcp_nopush on; access_log off; keepalive_requests 1000000000;
            server {{ listen 127.0.0.1:{port}; root {place}; }} }}",
            pid.display()
        );
        fs::write(&configuration, text)?;
        let process = Command::new("nginx")
            .arg("-c")
            .arg(&configuration)
            .stdin(Stdio::null())
            .spawn()
            .context("nginx; on Debian: apt-get install nginx-light")?;
        let started = Self { process, port, root };
        for _ in 0..100 {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Ok(started);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("nginx does not answer")
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // A killed master would leave its workers.
        let _ = Command::new("kill").arg(self.process.id().to_string()).status();
        let _ = self.process.wait();
    }
}
