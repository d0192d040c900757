//! Turns to upload: bounded in all, and for the namespaces of each pattern, so that nobody keeps the others out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::ApiError;

/// How long an upload waits for its turn before it is told to come back; clients wait longer for the answer.
const WAIT: Duration = Duration::from_secs(5);

/// The part of all turns that the namespaces of one pattern may have.
const MOST_TURNS: (usize, usize) = (3, 4);

/// See the module. Lock: one mutex, never held while waiting.
#[derive(Debug)]
pub struct Turns {
    all: Arc<Semaphore>,
    /// By pattern; there are as many as the configuration has.
    patterns: Mutex<HashMap<String, Arc<Pattern>>>,
    most_turns: usize,
    most_present: usize,
}

#[derive(Debug)]
struct Pattern {
    turns: Arc<Semaphore>,
    /// Of those who upload or wait.
    places: Arc<Semaphore>,
}

/// A turn, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    _permits: [OwnedSemaphorePermit; 3],
}

impl Turns {
    /// So many turns, for so many requests at a time, of which the uploads of one pattern are at most half.
    #[must_use]
    pub fn new(turns: usize, requests: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(turns)),
            patterns: Mutex::default(),
            most_turns: (turns * MOST_TURNS.0 / MOST_TURNS.1).max(1),
            most_present: requests.div_ceil(2),
        }
    }

    /// Waits for a turn of the namespaces of a pattern.
    ///
    /// # Errors
    /// [`ApiError::OVERLOADED`] where none comes soon, [`ApiError::TOO_MANY_UPLOADS`] where too many wait already.
    pub async fn take(&self, pattern: String) -> Result<Turn, ApiError> {
        let pattern = {
            let mut patterns = self.patterns.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(patterns.entry(pattern).or_insert_with(|| {
                Arc::new(Pattern {
                    turns: Arc::new(Semaphore::new(self.most_turns)),
                    places: Arc::new(Semaphore::new(self.most_present)),
                })
            }))
        };
        let place = Arc::clone(&pattern.places).try_acquire_owned();
        let place = place.map_err(|_| ApiError::TOO_MANY_UPLOADS)?;
        let own = acquire(&pattern.turns, 1, WAIT).await?;
        Ok(Turn { _permits: [place, own, acquire(&self.all, 1, WAIT).await?] })
    }
}

/// Waits for permits.
///
/// # Errors
/// [`ApiError::OVERLOADED`] where they do not come in time.
pub async fn acquire(
    semaphore: &Arc<Semaphore>,
    permits: u32,
    wait: Duration,
) -> Result<OwnedSemaphorePermit, ApiError> {
    let acquired = tokio::time::timeout(wait, Arc::clone(semaphore).acquire_many_owned(permits)).await;
    acquired.ok().and_then(Result::ok).ok_or(ApiError::OVERLOADED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_pattern_leaves_turns_to_others() {
        let turns = Turns::new(4, 100);
        let take = |pattern: &str| turns.take(pattern.to_owned());
        let mut taken = Vec::new();
        for _ in 0..3 {
            taken.push(take("pr-*").await.unwrap());
        }
        assert_eq!(take("pr-*").await.unwrap_err(), ApiError::OVERLOADED);
        let other = take("main").await.unwrap();
        assert_eq!(take("main").await.unwrap_err(), ApiError::OVERLOADED);
        drop(other);
        drop(taken);
        take("pr-*").await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn one_pattern_does_not_fill_the_queue() {
        let turns = Arc::new(Turns::new(1, 6));
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let turns = Arc::clone(&turns);
                tokio::spawn(async move {
                    let _turn = turns.take("pr-*".to_owned()).await;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(turns.take("pr-*".to_owned()).await.unwrap_err(), ApiError::TOO_MANY_UPLOADS);
        turns.take("main".to_owned()).await.unwrap();
        for wait in waiting {
            wait.await.unwrap();
        }
        turns.take("pr-*".to_owned()).await.unwrap();
    }
}
