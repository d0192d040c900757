//! A store in which reads fall through to the namespaces that one reads from; see [`crate::policy`].
//!
//! Invariants: nothing is written but to the namespace that is asked, and nothing that is written there can be seen in
//! a namespace below it.

use std::collections::HashMap;
use std::sync::Arc;

use cachec_protocol::message::{MAX_MANIFEST_RESULTS, Manifest};
use cachec_protocol::{ActionKey, Digest};

use super::{BlobLengths, BlobUpload, OpenBlob, Publication, PutOutcome, Store, StoreFuture, StoreStats};
use crate::namespace::Namespace;
use crate::policy::Policy;

/// The decorator.
pub struct Layered<S> {
    inner: S,
    policy: Arc<Policy>,
}

impl<S: Store> Layered<S> {
    /// Reads through `inner`'s namespaces as the policy says.
    pub const fn new(inner: S, policy: Arc<Policy>) -> Self {
        Self { inner, policy }
    }
}

impl<S: Store> Store for Layered<S> {
    fn lookup(
        &self,
        namespace: Namespace,
        keys: Vec<ActionKey>,
        limit_bytes: usize,
    ) -> StoreFuture<'_, Vec<Manifest>> {
        Box::pin(async move {
            let mut layers = self.policy.layers(&namespace).into_iter();
            let Some(nearest) = layers.next() else { return Ok(Vec::new()) };
            let mut manifests = self.inner.lookup(nearest, keys.clone(), limit_bytes).await?;
            for layer in layers {
                let left_bytes = limit_bytes.saturating_sub(length_bytes(&manifests));
                let below = self.inner.lookup(layer, keys.clone(), left_bytes).await?;
                manifests = merged(&keys, manifests, below);
            }
            Ok(manifests)
        })
    }

    fn blob_lengths(&self, namespace: Namespace, digest: Digest) -> StoreFuture<'_, Option<BlobLengths>> {
        Box::pin(async move {
            for layer in self.policy.layers(&namespace) {
                let lengths = self.inner.blob_lengths(layer, digest).await?;
                if lengths.is_some() {
                    return Ok(lengths);
                }
            }
            Ok(None)
        })
    }

    fn open_blob(&self, namespace: Namespace, digest: Digest) -> StoreFuture<'_, Option<OpenBlob>> {
        Box::pin(async move {
            for layer in self.policy.layers(&namespace) {
                let blob = self.inner.open_blob(layer, digest).await?;
                if blob.is_some() {
                    return Ok(blob);
                }
            }
            Ok(None)
        })
    }

    /// For whoever is about to upload: what is in the namespace itself counts.
    fn missing_blobs(&self, namespace: Namespace, digests: Vec<Digest>) -> StoreFuture<'_, Vec<Digest>> {
        self.inner.missing_blobs(namespace, digests)
    }

    fn put_blob(&self, upload: BlobUpload) -> StoreFuture<'_, PutOutcome> {
        self.inner.put_blob(upload)
    }

    fn publish(&self, publication: Publication) -> StoreFuture<'_, PutOutcome> {
        self.inner.publish(publication)
    }

    fn stats(&self) -> StoreFuture<'_, StoreStats> {
        self.inner.stats()
    }
}

fn length_bytes(manifests: &[Manifest]) -> usize {
    manifests.iter().flat_map(|manifest| &manifest.results).map(|result| result.len()).sum()
}

/// One manifest for each key that has any, in the order asked for, the nearer layer's results first. Of many, each
/// layer keeps its newest.
fn merged(keys: &[ActionKey], nearer: Vec<Manifest>, below: Vec<Manifest>) -> Vec<Manifest> {
    let by_key = |manifests: Vec<Manifest>| -> HashMap<ActionKey, Manifest> {
        manifests.into_iter().map(|manifest| (manifest.action_key, manifest)).collect()
    };
    let (mut nearer, mut below) = (by_key(nearer), by_key(below));
    let merge = |key: &ActionKey| match (nearer.remove(key), below.remove(key)) {
        (Some(mut first), Some(mut second)) => {
            second.results.retain(|result| !first.results.contains(result));
            second.results.truncate(MAX_MANIFEST_RESULTS / 2);
            first.results.truncate(MAX_MANIFEST_RESULTS - second.results.len());
            first.results.extend(second.results);
            Some(first)
        }
        (one, other) => one.or(other),
    };
    keys.iter().filter_map(merge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearer_results_come_first_and_neither_layer_crowds_out_the_other() {
        let key = |number: u8| ActionKey::from_bytes([number; 32]);
        let manifest = |number: u8, results: std::ops::Range<u8>| Manifest {
            action_key: key(number),
            results: results.map(|result| vec![result].into()).collect(),
        };
        let keys = [key(3), key(1), key(2), key(4)];
        let full = u8::try_from(MAX_MANIFEST_RESULTS).unwrap();
        let nearer = vec![manifest(3, 0..full), manifest(1, 0..1)];
        let below = vec![manifest(3, 4..20), manifest(1, 0..2), manifest(2, 7..8)];
        let merged = merged(&keys, nearer, below);
        let found: Vec<_> = merged.iter().map(|manifest| manifest.action_key).collect();
        assert_eq!(found, keys[..3]);
        let results = |place: usize| merged[place].results.iter().map(|result| result[0]).collect::<Vec<_>>();
        assert_eq!(results(0), [0, 1, 2, 3, 8, 9, 10, 11]);
        assert_eq!(results(1), [0, 1]);
        assert_eq!(results(2), [7]);
    }
}
