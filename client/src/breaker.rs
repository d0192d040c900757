//! The circuit breaker: after repeated failures nobody waits for the server any more.
//!
//! A server that says when to come back is not asked before (HTTP's `Retry-After`), and has not failed.
//!
//! It stays open for the agent's life, and through a file for [`BREAKER_TTL`] in agents started later
//! (each Dockerfile `RUN` step and each test run may start its own).

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Failures in a row that open it.
const FAILURE_LIMIT: u32 = 3;

/// How long another agent's open breaker is respected.
pub(crate) const BREAKER_TTL: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub(crate) struct Breaker {
    file: PathBuf,
    failures: AtomicU32,
    reason: Mutex<Option<String>>,
    paused_until: Mutex<Option<Instant>>,
}

impl Breaker {
    /// Closed, unless the file says that it was opened recently.
    pub(crate) fn new(file: PathBuf) -> Self {
        let recent = fs::metadata(&file)
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age < BREAKER_TTL));
        let reason = if recent { fs::read_to_string(&file).ok() } else { None };
        Self { file, failures: AtomicU32::new(0), reason: Mutex::new(reason), paused_until: Mutex::default() }
    }

    /// Whether nobody should ask.
    pub(crate) fn is_open(&self) -> bool {
        let paused_until = *self.paused_until.lock().unwrap_or_else(PoisonError::into_inner);
        self.reason().is_some() || paused_until.is_some_and(|until| Instant::now() < until)
    }

    /// Waits until a pause is over.
    pub(crate) async fn resumed(&self) {
        let paused_until = *self.paused_until.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(until) = paused_until {
            tokio::time::sleep_until(until.into()).await;
        }
    }

    /// Has nobody ask for some time.
    pub(crate) fn pause(&self, time: Duration) {
        *self.paused_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + time);
    }

    /// Why it is open.
    pub(crate) fn reason(&self) -> Option<String> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts a success: failures are counted in a row.
    pub(crate) fn succeeded(&self) {
        self.failures.store(0, Ordering::Relaxed);
    }

    /// Counts a failure.
    pub(crate) fn failed(&self, reason: &str) {
        if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURE_LIMIT {
            self.open(reason);
        }
    }

    /// Opens it for good.
    pub(crate) fn open(&self, reason: &str) {
        let mut present = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if present.is_none() {
            *present = Some(reason.to_owned());
            // Without the file later agents find out by themselves.
            let _ = fs::write(&self.file, reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_ends_and_is_no_failure() {
        let directory = tempfile::tempdir().unwrap();
        let breaker = Breaker::new(directory.path().join("breaker"));
        breaker.pause(Duration::from_secs(60));
        assert!(breaker.is_open() && breaker.reason().is_none());
        breaker.pause(Duration::ZERO);
        assert!(!breaker.is_open());
    }

    #[test]
    fn three_failures_in_a_row_open_it_and_later_agents_see_that() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("breaker");
        let breaker = Breaker::new(file.clone());
        for _ in 0..3 {
            breaker.failed("one");
            breaker.failed("two");
            breaker.succeeded();
        }
        assert!(!breaker.is_open());
        for _ in 0..3 {
            breaker.failed("down");
        }
        assert_eq!(breaker.reason().as_deref(), Some("down"));
        assert_eq!(Breaker::new(file.clone()).reason().as_deref(), Some("down"));
        let long_ago = std::time::SystemTime::now() - BREAKER_TTL;
        fs::File::options().append(true).open(&file).unwrap().set_modified(long_ago).unwrap();
        assert!(!Breaker::new(file).is_open());
    }
}
