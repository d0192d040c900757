//! Threads that work in the background at the lowest priority, and end when they are told to.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A thread; stopped and waited for when dropped.
#[derive(Debug)]
pub struct Background {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What tells such a thread that it is over.
#[derive(Debug)]
pub(super) struct End(Arc<AtomicBool>);

impl Background {
    pub(super) fn start(name: &str, work: impl FnOnce(End) + Send + 'static) -> io::Result<Self> {
        let is_over = Arc::new(AtomicBool::new(false));
        let end = End(Arc::clone(&is_over));
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Of this thread alone, as Linux counts it.
            let _ = rustix::process::nice(19);
            work(end);
        })?;
        Ok(Self { is_over, thread: Some(thread) })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl End {
    pub(super) fn has_come(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Rests, but not beyond the end.
    pub(super) fn rest(&self, time: Duration) {
        if !self.has_come() {
            thread::park_timeout(time);
        }
    }
}
