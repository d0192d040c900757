//! A server on a loopback port of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};

use crate::programs::programs;

/// A running server; killed when dropped.
#[derive(Debug)]
pub struct Server {
    process: Child,
    /// `http://127.0.0.1:PORT`
    pub url: String,
    data: PathBuf,
}

impl Server {
    /// Starts a server over a data directory, with more arguments.
    ///
    /// # Errors
    /// Where it does not start to listen.
    pub fn start(data: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        Self::start_on("127.0.0.1:0", data, arguments)
    }

    fn start_on(listen: &str, data: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut process = Command::new(&programs().server)
            .args(["serve", "--listen", listen, "--data"])
            .arg(data)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("the server program")?;
        let stdout = process.stdout.take().context("the server's output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let Some(url) = line.trim().strip_prefix("listening on ").map(str::to_owned) else {
            let _ = process.kill();
            bail!("the server did not start to listen: {line}");
        };
        Ok(Self { process, url, data: data.to_owned() })
    }

    /// Creates a token for the `default` namespace.
    ///
    /// # Errors
    /// Where the command fails.
    pub fn create_token(&self, verbs: &str) -> anyhow::Result<String> {
        let output = Command::new(&programs().server)
            .args(["token", "create", "--namespace", "default", "--allow", verbs, "--data"])
            .arg(&self.data)
            .stderr(Stdio::inherit())
            .output()?;
        anyhow::ensure!(output.status.success(), "no token was created");
        let text = String::from_utf8(output.stdout)?;
        text.split_whitespace().last().map(str::to_owned).context("no token was printed")
    }

    /// Requests answered so far, probes of this kind aside.
    ///
    /// # Errors
    /// Where the server does not answer.
    pub fn requests(&self) -> anyhow::Result<u64> {
        self.sum_of(|metric| metric.starts_with("cachec_requests_total") && metric.contains("/v1/"))
    }

    /// Blobs that wait for being compressed again.
    ///
    /// # Errors
    /// Where the server does not answer.
    pub fn waiting_blobs(&self) -> anyhow::Result<u64> {
        self.sum_of(|metric| metric.starts_with("cachec_recompression_waiting_blobs "))
    }

    /// The sum of some metrics.
    fn sum_of(&self, counts: impl Fn(&str) -> bool) -> anyhow::Result<u64> {
        let address = self.url.strip_prefix("http://").context("a plain server")?;
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let lines = text.lines().filter(|line| counts(line));
        Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
    }

    /// Highest resident set of the server so far, in bytes.
    ///
    /// # Errors
    /// Where it is not running.
    pub fn peak_memory_bytes(&self) -> anyhow::Result<u64> {
        crate::machine::peak_memory_bytes(self.process.id())
    }

    /// Kills it like a power cut, without a word.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Ends it in order.
    ///
    /// # Errors
    /// Where it does not end well.
    pub fn stop(mut self) -> anyhow::Result<()> {
        let id = self.process.id().to_string();
        Command::new("kill").args(["-TERM", &id]).status()?;
        let status = self.process.wait()?;
        anyhow::ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
