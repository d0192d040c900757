//! `GET /v1/{namespace}/builds/{build key}`: everything that the last such build asked for, in one stream: the
//! manifests of all its units, then their packs in the order they were needed, those of the record's bundle together.

use std::collections::HashSet;
use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::response::Response;
use bytes::Bytes;
use cachec_protocol::frame::{Frame, MAGIC};
use cachec_protocol::message::{LookupResponse, Manifest};
use cachec_protocol::pack::{self, UPLOAD_LEVEL};
use cachec_protocol::{ActionKey, BuildEntry, BuildRecord, Digest, StoredResult, encode};
use serde::Deserialize;

use super::fetch::Stream;
use crate::access::Reader;
use crate::app::{self, App};
use crate::error::ApiError;
use crate::namespace::Namespace;

/// Longest manifests of one stream, before compression. Of what is over, the last units' are left out; the client
/// asks for them.
const MANIFESTS_BYTES: usize = 32 << 20;

/// How the client wants it.
#[derive(Debug, Deserialize)]
pub struct Options {
    #[serde(default)]
    packs: Packs,
}

/// Which packs follow the manifests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Packs {
    /// For a client with a local tier, which has most of them.
    #[default]
    None,
    /// Those of units that not only compilers read: for a client that defers the others.
    Final,
    /// The others, without the manifests: for such a client that has to run a compiler after all.
    Rest,
    All,
}

/// Starts the stream.
pub async fn get(
    State(app): State<App>,
    Reader(namespace, _place): Reader,
    Path((_, build)): Path<(String, String)>,
    Query(options): Query<Options>,
) -> Result<Response, ApiError> {
    let build: ActionKey = build.parse().map_err(|_| ApiError::INVALID_DIGEST)?;
    let (result, record) = newest_record(&app, &namespace, build).await?.ok_or(ApiError::BLOB_NOT_FOUND)?;
    let mut first = vec![Bytes::from_static(&MAGIC)];
    if options.packs != Packs::Rest {
        first.extend(manifests(&app, &namespace, build, &record).await?);
    }
    let bundled: HashSet<Digest> = result.packed().map(|pack| pack.digest).collect();
    let in_bundle =
        |pack: Digest| result.pack.filter(|_| bundled.contains(&pack)).map_or(pack, |bundle| bundle.digest);
    let mut seen = HashSet::new();
    let is_wanted = |entry: &&BuildEntry| match options.packs {
        Packs::None => false,
        Packs::Final => !entry.for_compilers,
        Packs::Rest => entry.for_compilers,
        Packs::All => true,
    };
    let wanted = record.entries.iter().filter(is_wanted);
    let blobs =
        wanted.filter_map(|entry| entry.pack).map(in_bundle).filter(|blob| seen.insert(*blob)).collect();
    Ok(Stream::new(app, namespace, first, blobs).into_response())
}

/// The frame of the manifests of all units of a build: its header and its body.
async fn manifests(
    app: &App,
    namespace: &Namespace,
    build: ActionKey,
    record: &BuildRecord,
) -> Result<[Bytes; 2], ApiError> {
    // The results, their encoding and its compressed form are held at the same time.
    let memory = app.message_memory(3 * MANIFESTS_BYTES).await?;
    // The record itself comes first: it tells the client which packs to wait for.
    let keys = std::iter::once(build).chain(record.entries.iter().map(|entry| entry.action_key)).collect();
    let (store, namespace) = (Arc::clone(&app.store), namespace.clone());
    let compressed = app::finish(async move {
        let manifests = store.lookup(namespace, keys, MANIFESTS_BYTES).await?;
        let compressed = tokio::task::spawn_blocking(move || compress(manifests)).await;
        drop(memory);
        compressed.ok().and_then(Result::ok).ok_or(ApiError::INTERNAL)
    })
    .await?;
    let header = Frame::Manifests { body_bytes: compressed.len() as u64 }.to_header();
    Ok([Bytes::copy_from_slice(&header), compressed])
}

/// The record of the last such build that this version can read.
async fn newest_record(
    app: &App,
    namespace: &Namespace,
    build: ActionKey,
) -> Result<Option<(StoredResult, BuildRecord)>, ApiError> {
    let memory = app.message_memory(MANIFESTS_BYTES).await?;
    let (store, namespace) = (Arc::clone(&app.store), namespace.clone());
    let manifests = app::finish(async move {
        let manifests = store.lookup(namespace, vec![build], MANIFESTS_BYTES).await?;
        drop(memory);
        Ok(manifests)
    })
    .await?;
    let mut results = manifests.iter().flat_map(Manifest::readable_results);
    Ok(results.find_map(|result| BuildRecord::from_result(&result).ok().map(|record| (result, record))))
}

fn compress(manifests: Vec<Manifest>) -> std::io::Result<Bytes> {
    Ok(pack::compress(&encode(&LookupResponse { manifests }), UPLOAD_LEVEL)?.into())
}
