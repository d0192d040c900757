//! Turns to upload, and places for requests: bounded for the namespaces of each pattern, so that nobody keeps the others
//! out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::ApiError;
use crate::tokens::Verb;

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
    requests: usize,
}

#[derive(Debug)]
struct Pattern {
    turns: Arc<Semaphore>,
    reading: Arc<Semaphore>,
    writing: Arc<Semaphore>,
}

/// A request's place among those of its pattern, until it is dropped.
#[derive(Debug)]
pub struct Place {
    _permit: OwnedSemaphorePermit,
}

/// A turn, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    _permits: [OwnedSemaphorePermit; 2],
}

impl Turns {
    /// So many turns, for so many requests at a time, of which one pattern reads with at most half and writes with at
    /// most a quarter.
    #[must_use]
    pub fn new(turns: usize, requests: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(turns)),
            patterns: Mutex::default(),
            most_turns: (turns * MOST_TURNS.0 / MOST_TURNS.1).max(1),
            requests,
        }
    }

    /// A place for a request to the namespaces of a pattern.
    ///
    /// # Errors
    /// [`ApiError::TOO_MANY_REQUESTS`] where all are taken.
    pub fn enter(&self, pattern: String, verb: Verb) -> Result<Place, ApiError> {
        let pattern = self.of(pattern);
        let places = match verb {
            Verb::Read => &pattern.reading,
            Verb::Write => &pattern.writing,
        };
        let place = Arc::clone(places).try_acquire_owned();
        place.map(|permit| Place { _permit: permit }).map_err(|_| ApiError::TOO_MANY_REQUESTS)
    }

    /// Waits for a turn of the namespaces of a pattern.
    ///
    /// # Errors
    /// [`ApiError::OVERLOADED`] where none comes soon.
    pub async fn take(&self, pattern: String) -> Result<Turn, ApiError> {
        let own = acquire(&self.of(pattern).turns, 1, WAIT).await?;
        Ok(Turn { _permits: [own, acquire(&self.all, 1, WAIT).await?] })
    }

    fn of(&self, pattern: String) -> Arc<Pattern> {
        let mut patterns = self.patterns.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(patterns.entry(pattern).or_insert_with(|| {
            Arc::new(Pattern {
                turns: Arc::new(Semaphore::new(self.most_turns)),
                reading: Arc::new(Semaphore::new(self.requests.div_ceil(2))),
                writing: Arc::new(Semaphore::new(self.requests.div_ceil(4))),
            })
        }))
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

    #[test]
    fn one_pattern_does_not_fill_all_places() {
        let turns = Turns::new(1, 8);
        for (verb, most) in [(Verb::Read, 4), (Verb::Write, 2)] {
            let enter = |pattern: &str| turns.enter(pattern.to_owned(), verb);
            let places: Vec<_> = (0..most).map(|_| enter("pr-*").unwrap()).collect();
            assert_eq!(enter("pr-*").unwrap_err(), ApiError::TOO_MANY_REQUESTS);
            enter("main").unwrap();
            drop(places);
            enter("pr-*").unwrap();
        }
    }
}
