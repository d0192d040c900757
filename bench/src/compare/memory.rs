//! Memory of a cache's processes while a build runs.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(100);

/// Watches until it is asked for its result.
#[derive(Debug)]
pub(super) struct Watch {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Watch {
    /// Watches all processes of a name.
    pub(super) fn start(name: &'static str) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&ended);
        let thread = thread::spawn(move || {
            let mut peak = 0;
            while !is_over.load(Ordering::Relaxed) {
                peak = peak.max(resident_bytes(name));
                thread::sleep(INTERVAL);
            }
            peak
        });
        Self { ended, thread }
    }

    /// The highest sum seen, in bytes.
    pub(super) fn peak_bytes(self) -> u64 {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

/// Resident sets of all processes of a name, added up.
fn resident_bytes(name: &str) -> u64 {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let own = processes.filter(|entry| {
        fs::read_to_string(entry.path().join("comm")).is_ok_and(|command| command.trim_end() == name)
    });
    own.filter_map(|entry| {
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()? * 1024)
    })
    .sum()
}
