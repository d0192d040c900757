//! What the agent has counted since it started.

use std::collections::BTreeMap;

use serde::Serialize;

/// Most latencies kept for the percentiles; later ones replace the oldest.
const MAX_LATENCIES: usize = 100_000;

/// Counters of one agent. Serialised, this is the format of `cachec stats --json`.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Statistics {
    /// Units that asked.
    pub(crate) units: u64,
    /// Units restored from the local tier.
    pub(crate) local_hits: u64,
    /// Units restored from the server.
    pub(crate) remote_hits: u64,
    /// Units among those whose outputs were deferred.
    pub(crate) deferred: u64,
    /// Units that were looked up and compiled.
    pub(crate) misses: u64,
    /// Misses whose action is known, with the normalised name of the first input that differed.
    pub(crate) changed_inputs: BTreeMap<String, u64>,
    /// Units that are not cached: reason code → crate → count.
    pub(crate) refused: BTreeMap<String, BTreeMap<String, u64>>,
    /// Results stored, locally, remotely or both.
    pub(crate) stored: u64,
    /// Compiled units whose result was not stored: reason code → count.
    pub(crate) not_stored: BTreeMap<String, u64>,
    /// Results bound to a root's path, because an output contains it.
    pub(crate) bound: u64,
    /// Compiled units that were observed by the tracer.
    pub(crate) traced: u64,
    /// Results uploaded.
    pub(crate) uploaded: u64,
    /// Restores that failed after a match; the compiler ran.
    pub(crate) failed_restores: u64,
    /// Compiled units that came out as they are stored (`CACHEC_MODE=verify`).
    pub(crate) verified: u64,
    /// Those that did not: crate → names of outputs and streams.
    pub(crate) differences: BTreeMap<String, Vec<String>>,
    /// Inputs of stored results that were compared with what is here.
    pub(crate) validated_inputs: u64,
    /// Microseconds that this took, first reads of files included.
    pub(crate) validation_us: u64,
    /// Compile milliseconds that hits have saved, as they were measured when stored.
    pub(crate) saved_ms: u64,
    #[serde(skip)]
    hit_latencies_us: Vec<u64>,
    #[serde(skip)]
    hits_timed: usize,
}

/// Latency of hits from the wrapper's start to its last rename.
#[derive(Debug, Serialize)]
pub(crate) struct HitLatency {
    pub(crate) median_us: u64,
    pub(crate) p99_us: u64,
}

impl Statistics {
    /// Counts a unit that is not cached.
    pub(crate) fn refuse(&mut self, reason: &str, crate_name: &str) {
        *self.refused.entry(reason.to_owned()).or_default().entry(crate_name.to_owned()).or_default() += 1;
    }

    /// Counts a comparison of inputs.
    pub(crate) fn validated(&mut self, inputs: usize, elapsed_us: u64) {
        self.validated_inputs += inputs as u64;
        self.validation_us = self.validation_us.saturating_add(elapsed_us);
    }

    /// Adds a hit's latency.
    pub(crate) fn time_hit(&mut self, latency_us: u64) {
        let slot = self.hits_timed % MAX_LATENCIES;
        self.hits_timed += 1;
        match self.hit_latencies_us.get_mut(slot) {
            Some(oldest) => *oldest = latency_us,
            None => self.hit_latencies_us.push(latency_us),
        }
    }

    /// The percentiles, once there was a hit.
    pub(crate) fn hit_latency(&self) -> Option<HitLatency> {
        let mut sorted = self.hit_latencies_us.clone();
        sorted.sort_unstable();
        let at = |percent: usize| sorted.get((sorted.len().checked_sub(1)?) * percent / 100).copied();
        Some(HitLatency { median_us: at(50)?, p99_us: at(99)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_hits() {
        let mut statistics = Statistics::default();
        assert!(statistics.hit_latency().is_none());
        (1..=101).for_each(|latency| statistics.time_hit(latency));
        let latency = statistics.hit_latency().unwrap();
        assert_eq!((latency.median_us, latency.p99_us), (51, 100));
    }
}
