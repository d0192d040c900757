//! One compile at a time for an action key: the second build waits for the first, then looks again.
//!
//! A gate is passed with an owned guard, which is held until the result can be found (or will not be).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use cachec_protocol::ActionKey;
use tokio::sync::{Mutex as Gate, OwnedMutexGuard};

/// Who waited this long compiles as well: the other may hang.
const GATE_TIMEOUT: Duration = Duration::from_secs(120);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Gates {
    gates: Mutex<HashMap<ActionKey, Weak<Gate<()>>>>,
}

impl Gates {
    /// Waits for the gate of a key; `None` after [`GATE_TIMEOUT`].
    pub(super) async fn pass(&self, key: &ActionKey) -> Option<OwnedMutexGuard<()>> {
        let gate = {
            let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
            if gates.len() > 10_000 {
                gates.retain(|_, gate| gate.strong_count() > 0);
            }
            let present = gates.get(key).and_then(Weak::upgrade);
            present.unwrap_or_else(|| {
                let gate = Arc::new(Gate::new(()));
                gates.insert(*key, Arc::downgrade(&gate));
                gate
            })
        };
        tokio::time::timeout(GATE_TIMEOUT, gate.lock_owned()).await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_second_waits_for_the_first_and_other_keys_do_not() {
        let gates = Gates::default();
        let (one, two) = (ActionKey::from_bytes([1; 32]), ActionKey::from_bytes([2; 32]));
        let first = gates.pass(&one).await;
        assert!(gates.pass(&two).await.is_some());
        let soon = Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, gates.pass(&one)).await.is_err());
        drop(first);
        assert!(gates.pass(&one).await.is_some());
    }
}
