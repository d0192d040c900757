//! The agent: the client's background process for one user and one configuration.
//!
//! It is started by the first wrapper with the listening socket as its standard input, holds the connection
//! to the server, the digest memo, the upload queue and the statistics, and ends when idle or when its
//! socket is gone.
//!
//! Ownership and shut-down: [`listen`] owns the socket and one task a wrapper; each task owns its unit, its
//! staged files (removed when dropped) and its place in [`gates`]. [`publish`] owns the jobs that outlive
//! their wrapper; an orderly end waits for them. Locks: `Statistics`, `Memo`, `Toolchains` and `Gates` are
//! leaf mutexes; none is held across another or across an `await`.

mod bundle;
mod cargo_command;
mod deferral;
mod gates;
mod launcher;
mod listen;
mod lookup;
mod prefetch;
mod publish;
mod record;
mod restore;
mod session;
mod statistics;
mod tree;
mod verify;

pub(crate) use listen::run;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use crate::config::{Config, Mode};
use crate::local::LocalTier;
use crate::memo::Memo;
use crate::remote::Remote;
use crate::signature::Signer;
use crate::toolchain::Toolchains;
use crate::unit::{Task, Unit};
use gates::Gates;
use prefetch::Builds;
use statistics::Statistics;

/// Longest wait for uploads when a build may be over.
pub(crate) const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Results that are packed at the same time.
const PACKING_TASKS: usize = 2;

/// Everything the agent's tasks share.
#[derive(Debug)]
pub(crate) struct Agent {
    config: Config,
    memo: Memo,
    toolchains: Toolchains,
    local: Option<LocalTier>,
    remote: Option<Remote>,
    statistics: Mutex<Statistics>,
    /// Those of probes, which are no units.
    probe_statistics: Mutex<Statistics>,
    gates: Gates,
    builds: Builds,
    /// Units between their request and their end.
    active: watch::Sender<usize>,
    /// Jobs that are not stored everywhere yet.
    pending: watch::Sender<usize>,
    packing: Semaphore,
    /// Signs what is published, if anything does.
    signer: Option<Signer>,
    /// Lines for the user that no wrapper has printed yet, and those that were printed.
    notices: Mutex<(Vec<String>, BTreeSet<String>)>,
    /// Where the statistics stay when the agent has ended.
    last_report: PathBuf,
}

impl Agent {
    fn new(config: Config, name: &str, last_report: PathBuf) -> Self {
        let mut notices = Vec::new();
        let local = config.directory.as_ref().and_then(|directory| {
            LocalTier::open(directory, config.directory_bytes)
                .map_err(|error| notices.push(format!("no local tier in {}: {error}", directory.display())))
                .ok()
        });
        let remote = config.url.as_ref().and_then(|url| {
            Remote::new(&config, url, name).map_err(|error| notices.push(format!("no server: {error}"))).ok()
        });
        let signer = config.sign_key_file.as_ref().and_then(|file| {
            let read = Signer::read(file);
            read.map_err(|error| notices.push(format!("nothing is signed: {}: {error}", file.display()))).ok()
        });
        let memo = Memo::default();
        if let Some(tier) = &local {
            memo.load(&tier.memo_file());
        }
        let agent = Self {
            memo,
            toolchains: Toolchains::default(),
            local,
            remote,
            statistics: Mutex::default(),
            probe_statistics: Mutex::default(),
            gates: Gates::default(),
            builds: Builds::default(),
            active: watch::Sender::new(0),
            pending: watch::Sender::new(0),
            packing: Semaphore::new(PACKING_TASKS),
            signer,
            notices: Mutex::default(),
            last_report,
            config,
        };
        notices.into_iter().for_each(|notice| agent.notify(notice));
        agent
    }

    fn probe_statistics(&self) -> MutexGuard<'_, Statistics> {
        self.probe_statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn statistics(&self) -> MutexGuard<'_, Statistics> {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The statistics that a unit counts in.
    fn statistics_of(&self, unit: &Unit) -> MutexGuard<'_, Statistics> {
        match unit.task {
            Task::Probe => self.probe_statistics(),
            _ => self.statistics(),
        }
    }

    /// Queues a line for the user; each text is shown once.
    fn notify(&self, notice: String) {
        tracing::warn!("{notice}");
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        if notices.1.insert(notice.clone()) {
            notices.0.push(notice);
        }
    }

    /// The lines to show now.
    fn take_notices(&self) -> Vec<String> {
        if let Some(complaint) = self.remote.as_ref().and_then(Remote::complaint) {
            self.notify(format!("no help from the server: {complaint}"));
        }
        std::mem::take(&mut self.notices.lock().unwrap_or_else(PoisonError::into_inner).0)
    }

    fn verifies(&self) -> bool {
        self.config.mode == Mode::Verify
    }

    fn stores(&self) -> bool {
        self.config.mode == Mode::ReadWrite
    }

    /// The server, where it may be written to.
    fn writable_remote(&self) -> Option<&Remote> {
        self.remote.as_ref().filter(|remote| self.stores() && !remote.writes.is_open())
    }

    /// Waits until nothing is left to store, or for `limit`; says whether it is done.
    async fn drain(&self, limit: Duration) -> bool {
        let mut pending = self.pending.subscribe();
        tokio::time::timeout(limit, pending.wait_for(|count| *count == 0)).await.is_ok()
    }

    /// Keeps the digest memo for the next agent, where it has changed.
    async fn keep_memo(self: &Arc<Self>) {
        let agent = Arc::clone(self);
        let keep = move || agent.local.as_ref().map(|tier| agent.memo.save(&tier.memo_file()));
        if let Ok(Some(Err(error))) = tokio::task::spawn_blocking(keep).await {
            tracing::info!("the digest memo is not kept: {error}");
        }
    }

    /// Leaves the statistics for `cachec stats` after the agent's end.
    fn leave_report(&self) {
        // Without it, `cachec stats` says that there is no agent.
        let _ = std::fs::write(&self.last_report, self.report());
    }

    /// The JSON that `cachec stats` shows.
    fn report(&self) -> String {
        let statistics = self.statistics();
        let mut report = serde_json::to_value(&*statistics).unwrap_or_default();
        let count = |number: &std::sync::atomic::AtomicU64| number.load(std::sync::atomic::Ordering::Relaxed);
        report["hit_latency"] = serde_json::json!(statistics.hit_latency());
        report["probes"] = serde_json::json!(*self.probe_statistics());
        report["pending"] = serde_json::json!(*self.pending.borrow());
        report["version"] = serde_json::json!(env!("CARGO_PKG_VERSION"));
        report["namespace"] = serde_json::json!(self.config.namespace);
        report["local"] = serde_json::json!(self.local.as_ref().map(|tier| serde_json::json!({
            "directory": self.config.directory.clone().unwrap_or_default(),
            "stored_bytes": tier.stored_bytes(),
            "limit_bytes": self.config.directory_bytes,
        })));
        report["remote"] = serde_json::json!(self.remote.as_ref().map(|remote| serde_json::json!({
            "url": self.config.url,
            "received_bytes": count(&remote.received_bytes),
            "sent_bytes": count(&remote.sent_bytes),
            "reads_stopped": remote.reads.reason(),
            "writes_stopped": remote.writes.reason(),
        })));
        report.to_string()
    }
}

/// A count that goes down when this is dropped.
#[derive(Debug)]
struct Counted(watch::Sender<usize>);

impl Counted {
    fn new(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}
