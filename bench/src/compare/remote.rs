//! Servers for what is compared: cachec's own, Redis, and an object store over a directory.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use tempfile::TempDir;

use super::arm::{Arm, STORE_KEY};
use super::rig::Rig;
use crate::Server;

const START_TIMEOUT: Duration = Duration::from_secs(10);

/// An empty server of an arm's kind; ended when dropped.
#[derive(Debug)]
pub(super) struct Remote {
    /// `http://127.0.0.1:PORT`, whatever it speaks.
    pub(super) url: String,
    process: Process,
    _data: TempDir,
}

#[derive(Debug)]
enum Process {
    Own(Server),
    Foreign(Child),
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Self::Foreign(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Remote {
    pub(super) fn start(rig: &Rig) -> anyhow::Result<Self> {
        let data = tempfile::Builder::new().prefix("remote-").tempdir()?;
        if rig.arm.is_own() {
            let server = Server::start(data.path(), &[])?;
            let url = server.url.clone();
            return Ok(Self { url, process: Process::Own(server), _data: data });
        }
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let number = port.to_string();
        let mut command = if rig.arm == Arm::Sccache {
            let mut command = Command::new("redis-server");
            command.args(["--bind", "127.0.0.1", "--save", "", "--port", &number]);
            command
        } else {
            fs::create_dir(data.path().join("cache"))?;
            let mut command = Command::new(rig.peers.join("bin/s3s-fs"));
            command.args(["--host=127.0.0.1", "--port", &number]);
            command.args(["--access-key", STORE_KEY, "--secret-key", STORE_KEY]).arg(data.path());
            command
        };
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process = Process::Foreign(child.context("Debian's redis-server, or s3s-fs by --install-peers")?);
        let started = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            anyhow::ensure!(started.elapsed() < START_TIMEOUT, "{command:?} does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { url: format!("http://127.0.0.1:{port}"), process, _data: data })
    }

    /// Waits until the server has nothing to do any more: what follows is another day's build. Says where it still has.
    pub(super) fn settle(&self, limit: Duration) -> anyhow::Result<()> {
        let Process::Own(server) = &self.process else { return Ok(()) };
        let started = Instant::now();
        loop {
            let waiting = server.waiting_blobs()?;
            if waiting == 0 {
                return Ok(());
            }
            if started.elapsed() >= limit {
                println!("{waiting} blobs still wait for being compressed again");
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
