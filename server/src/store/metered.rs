//! A store that counts what another store does.

use std::sync::Arc;
use std::time::Instant;

use cachec_protocol::message::Manifest;
use cachec_protocol::{ActionKey, Digest};

use super::{
    BlobLengths, BlobUpload, OpenBlob, Publication, PutOutcome, Store, StoreError, StoreFuture, StoreStats,
};
use crate::metrics::Metrics;
use crate::namespace::Namespace;

/// The decorator. It adds nothing but counts.
pub struct Metered<S> {
    inner: S,
    metrics: Arc<Metrics>,
}

impl<S: Store> Metered<S> {
    /// Counts what `inner` does.
    pub const fn new(inner: S, metrics: Arc<Metrics>) -> Self {
        Self { inner, metrics }
    }

    fn count_blob(&self, found: bool) {
        self.metrics.blobs.with_label_values(&[if found { "hit" } else { "miss" }]).inc();
    }

    fn count_put(&self, kind: &str, outcome: &Result<PutOutcome, StoreError>) {
        let outcome = match outcome {
            Ok(PutOutcome::Created) => "created",
            Ok(PutOutcome::Existed) => "existed",
            Err(_) => "rejected",
        };
        self.metrics.puts.with_label_values(&[kind, outcome]).inc();
    }
}

impl<S: Store> Store for Metered<S> {
    fn lookup(
        &self,
        namespace: Namespace,
        keys: Vec<ActionKey>,
        limit_bytes: usize,
    ) -> StoreFuture<'_, Vec<Manifest>> {
        Box::pin(async move {
            let asked = keys.len();
            let manifests = self.inner.lookup(namespace, keys, limit_bytes).await?;
            self.metrics.lookups.with_label_values(&["hit"]).inc_by(manifests.len() as u64);
            let missed = asked.saturating_sub(manifests.len()) as u64;
            self.metrics.lookups.with_label_values(&["miss"]).inc_by(missed);
            Ok(manifests)
        })
    }

    fn blob_lengths(&self, namespace: Namespace, digest: Digest) -> StoreFuture<'_, Option<BlobLengths>> {
        Box::pin(async move {
            let lengths = self.inner.blob_lengths(namespace, digest).await?;
            self.count_blob(lengths.is_some());
            Ok(lengths)
        })
    }

    fn open_blob(&self, namespace: Namespace, digest: Digest) -> StoreFuture<'_, Option<OpenBlob>> {
        Box::pin(async move {
            let blob = self.inner.open_blob(namespace, digest).await?;
            self.count_blob(blob.is_some());
            Ok(blob)
        })
    }

    fn missing_blobs(&self, namespace: Namespace, digests: Vec<Digest>) -> StoreFuture<'_, Vec<Digest>> {
        self.inner.missing_blobs(namespace, digests)
    }

    fn put_blob(&self, upload: BlobUpload) -> StoreFuture<'_, PutOutcome> {
        Box::pin(async move {
            let started = Instant::now();
            let outcome = self.inner.put_blob(upload).await;
            self.metrics.upload_seconds.observe(started.elapsed().as_secs_f64());
            self.count_put("blob", &outcome);
            outcome
        })
    }

    fn publish(&self, publication: Publication) -> StoreFuture<'_, PutOutcome> {
        Box::pin(async move {
            let outcome = self.inner.publish(publication).await;
            self.count_put("result", &outcome);
            outcome
        })
    }

    fn stats(&self) -> StoreFuture<'_, StoreStats> {
        self.inner.stats()
    }
}
