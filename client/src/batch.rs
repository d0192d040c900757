//! Questions that go together: those that come up while one is under way wait, and are the next one. However many ask at
//! once, a slow line sees one request at a time, and nobody waits longer than for two answers.
//!
//! Locks: `waiting`, a leaf mutex that is not held across an `await`; `turn`, held while a question is under way.

use std::sync::{Mutex, PoisonError};

use tokio::sync::oneshot;

/// See the module. `K` is what is asked about, `A` what is answered of each.
#[derive(Debug)]
pub(crate) struct Batch<K, A> {
    waiting: Mutex<Vec<(K, oneshot::Sender<A>)>>,
    turn: tokio::sync::Mutex<()>,
}

impl<K, A> Default for Batch<K, A> {
    fn default() -> Self {
        Self { waiting: Mutex::default(), turn: tokio::sync::Mutex::default() }
    }
}

impl<K: Copy, A> Batch<K, A> {
    /// Asks about one, together with whatever waits by then. `ask` gets at most `limit` of them, and answers in their
    /// order; `None` where it has no answer for this one, as after a failure.
    pub(crate) async fn ask<F: Future<Output = Vec<A>>>(
        &self,
        key: K,
        limit: usize,
        ask: impl Fn(Vec<K>) -> F,
    ) -> Option<A> {
        let (sender, mut receiver) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push((key, sender));
        let _turn = self.turn.lock().await;
        loop {
            // Somebody before may have asked for this one, too.
            match receiver.try_recv() {
                Ok(answer) => return Some(answer),
                Err(oneshot::error::TryRecvError::Closed) => return None,
                Err(oneshot::error::TryRecvError::Empty) => {}
            }
            let batch: Vec<_> = {
                let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                let count = waiting.len().min(limit);
                waiting.drain(..count).collect()
            };
            let (keys, senders): (Vec<K>, Vec<_>) = batch.into_iter().unzip();
            for (sender, answer) in senders.into_iter().zip(ask(keys).await) {
                // Who has stopped waiting needs no answer.
                let _ = sender.send(answer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn what_waits_goes_together() {
        let batch = Arc::new(Batch::<u32, u32>::default());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> = (0..10)
            .map(|number| {
                let (batch, asked) = (Arc::clone(&batch), Arc::clone(&asked));
                tokio::spawn(async move {
                    let ask = |keys: Vec<u32>| {
                        asked.lock().unwrap().push(keys.len());
                        async {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                            keys.into_iter().map(|key| key * 2).collect()
                        }
                    };
                    batch.ask(number, 6, ask).await
                })
            })
            .collect();
        for (number, task) in (0..).zip(tasks) {
            assert_eq!(task.await.unwrap(), Some(number * 2));
        }
        let asked = asked.lock().unwrap().clone();
        assert_eq!(asked.iter().sum::<usize>(), 10);
        assert!(asked.len() <= 4, "{asked:?}");
        assert!(asked.iter().all(|count| *count <= 6), "{asked:?}");
    }

    #[tokio::test]
    async fn a_failure_is_everybodys_and_ends_the_wait() {
        let batch = Batch::<u32, u32>::default();
        let fail = |_: Vec<u32>| std::future::ready(Vec::new());
        let (first, second) = tokio::join!(batch.ask(1, 8, &fail), batch.ask(2, 8, &fail));
        assert_eq!((first, second), (None, None));
        assert_eq!(batch.ask(3, 8, std::future::ready).await, Some(3));
    }

    #[tokio::test]
    async fn who_asks_and_is_gone_keeps_nobody_from_asking() {
        let batch = Arc::new(Batch::<u32, u32>::default());
        let never = |_: Vec<u32>| std::future::pending();
        let leader = {
            let batch = Arc::clone(&batch);
            tokio::spawn(async move { batch.ask(1, 8, never).await })
        };
        tokio::task::yield_now().await;
        let follower = {
            let batch = Arc::clone(&batch);
            tokio::spawn(async move { batch.ask(2, 8, std::future::ready).await })
        };
        tokio::task::yield_now().await;
        leader.abort();
        assert_eq!(follower.await.unwrap(), Some(2));
    }
}
