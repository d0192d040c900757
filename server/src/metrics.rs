//! What is measured: names, units, labels. Everything is in one registry of its own.
//!
//! Memory, descriptors and processor time are there too (`process_…`).
//!
//! Labels have few values: routes are patterns, statuses are classes, codes are those of [`crate::error`].

use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::store::StoreStats;

/// Bounds of the latency histogram in seconds.
const LATENCY_SECONDS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0];

/// All metrics of one server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Requests by `route` and `status` class.
    pub requests: IntCounterVec,
    /// Seconds until the response's head, by `route`.
    pub request_seconds: HistogramVec,
    /// Open connections.
    pub connections: IntGauge,
    /// Connections closed because their address had too many.
    pub refused_connections: IntCounter,
    /// Action keys looked up, by `outcome`.
    pub lookups: IntCounterVec,
    /// Blobs asked for, by `outcome`.
    pub blobs: IntCounterVec,
    /// Puts by `kind` and `outcome`.
    pub puts: IntCounterVec,
    /// Uploads and publications that failed, by `code`.
    pub rejected: IntCounterVec,
    /// Bytes of request bodies.
    pub received_bytes: IntCounter,
    /// Bytes of response bodies.
    pub sent_bytes: IntCounter,
    /// Seconds that taking a blob in took.
    pub upload_seconds: Histogram,
    evicted_entries: IntCounter,
    evicted_bytes: IntCounter,
    recompressed_blobs: IntCounter,
    saved_bytes: IntCounter,
    scrubbed_blobs: IntCounter,
    damaged_blobs: IntCounter,
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// Two metrics of one name, which a test rules out.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let counter = |name: &str, help: &str| registered(&registry, IntCounter::new(name, help)?);
        let counters = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        let latency =
            |name: &str, help: &str| HistogramOpts::new(name, help).buckets(LATENCY_SECONDS.to_vec());
        Ok(Self {
            requests: counters("cachec_requests_total", "Requests answered.", &["route", "status"])?,
            request_seconds: registered(
                &registry,
                HistogramVec::new(
                    latency("cachec_request_seconds", "Time until the response's head."),
                    &["route"],
                )?,
            )?,
            connections: registered(&registry, IntGauge::new("cachec_connections", "Open connections.")?)?,
            refused_connections: counter(
                "cachec_refused_connections_total",
                "Connections closed because their address had too many.",
            )?,
            lookups: counters("cachec_lookup_keys_total", "Action keys looked up.", &["outcome"])?,
            blobs: counters("cachec_blob_reads_total", "Blobs asked for.", &["outcome"])?,
            puts: counters("cachec_puts_total", "Blobs and results put.", &["kind", "outcome"])?,
            rejected: counters("cachec_puts_rejected_total", "Puts that failed.", &["code"])?,
            received_bytes: counter("cachec_received_bytes_total", "Bytes of request bodies.")?,
            sent_bytes: counter("cachec_sent_bytes_total", "Bytes of response bodies.")?,
            upload_seconds: registered(
                &registry,
                Histogram::with_opts(latency("cachec_upload_seconds", "Time to take a blob in."))?,
            )?,
            evicted_entries: counter("cachec_evicted_entries_total", "Entries evicted.")?,
            evicted_bytes: counter("cachec_evicted_bytes_total", "Bytes evicted.")?,
            recompressed_blobs: counter(
                "cachec_recompressed_blobs_total",
                "Blobs that were compressed again, to fewer bytes.",
            )?,
            saved_bytes: counter("cachec_recompression_saved_bytes_total", "Bytes that this has freed.")?,
            scrubbed_blobs: counter("cachec_scrubbed_blobs_total", "Blobs that were read and checked.")?,
            damaged_blobs: counter("cachec_damaged_blobs_total", "Blobs that were found to be damaged.")?,
            registry,
        })
    }

    /// The text that Prometheus reads.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn render(&self, stats: &StoreStats) -> prometheus::Result<String> {
        for (counter, now) in [
            (&self.evicted_entries, stats.evicted_entries),
            (&self.evicted_bytes, stats.evicted_bytes),
            (&self.recompressed_blobs, stats.recompressed_blobs),
            (&self.saved_bytes, stats.saved_bytes),
            (&self.scrubbed_blobs, stats.scrubbed_blobs),
            (&self.damaged_blobs, stats.damaged_blobs),
        ] {
            counter.inc_by(now.saturating_sub(counter.get()));
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        TextEncoder::new().encode(&store_registry(stats)?.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

fn registered<C: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

/// The store's figures at this moment.
fn store_registry(stats: &StoreStats) -> prometheus::Result<Registry> {
    let registry = Registry::new();
    let namespaces = IntGaugeVec::new(
        Opts::new("cachec_namespace_bytes", "Store: what is stored, by pattern of namespaces."),
        &["namespace"],
    )?;
    for (label, bytes) in &stats.namespace_bytes {
        namespaces.with_label_values(&[label]).set(i64::try_from(*bytes).unwrap_or(i64::MAX));
    }
    registry.register(Box::new(namespaces))?;
    let own = [
        ("stored_bytes", stats.stored_bytes),
        ("reserved_bytes", stats.reserved_bytes),
        ("recompression_waiting_blobs", stats.waiting_blobs),
        ("limit_bytes", stats.limit_bytes),
        ("disk_free_bytes", stats.disk_free_bytes),
        ("stored_blobs", stats.blobs),
        ("stored_results", stats.results),
    ];
    for (name, value) in own.iter().chain(&stats.database) {
        let gauge = IntGauge::new(format!("cachec_{name}"), format!("Store: {}.", name.replace('_', " ")))?;
        gauge.set(i64::try_from(*value).unwrap_or(i64::MAX));
        registry.register(Box::new(gauge))?;
    }
    Ok(registry)
}
