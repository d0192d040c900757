//! `GET`, `HEAD` and `PUT /v1/{namespace}/blobs/{digest}`: one blob, as zstd frames.
//!
//! `PUT` answers 201 for a new blob, and 200 for one that is there, without reading the body.

use axum::extract::{Path, Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use cachec_protocol::Digest;
use cachec_protocol::message::ZSTD;

use crate::access::{Reader, Writer};
use crate::app::App;
use crate::body::{self, RequestBody};
use crate::error::ApiError;
use crate::namespace::Namespace;
use crate::store::{BlobUpload, PutOutcome, StoreError};

/// Response header of `HEAD` with the length of the content, in bytes.
pub const CONTENT_BYTES_HEADER: &str = "cachec-content-bytes";

/// Sends a blob.
pub async fn get(
    State(app): State<App>,
    Reader(namespace, _place): Reader,
    Path((_, digest)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let digest = parse_digest(&digest)?;
    let blob = app.store.open_blob(namespace, digest).await?.ok_or(ApiError::BLOB_NOT_FOUND)?;
    Ok(body::blob_response(&app, blob, ZSTD, ()))
}

/// Tells a blob's lengths.
pub async fn head(
    State(app): State<App>,
    Reader(namespace, _place): Reader,
    Path((_, digest)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let digest = parse_digest(&digest)?;
    let lengths = app.store.blob_lengths(namespace, digest).await?.ok_or(ApiError::BLOB_NOT_FOUND)?;
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static(ZSTD)),
        (CONTENT_LENGTH, HeaderValue::from(lengths.stored_bytes)),
        (HeaderName::from_static(CONTENT_BYTES_HEADER), HeaderValue::from(lengths.content_bytes)),
    ];
    Ok(headers.into_response())
}

/// Takes a blob in.
pub async fn put(
    State(app): State<App>,
    Writer(namespace, _place): Writer,
    Path((_, digest)): Path<(String, String)>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let digest = parse_digest(&digest)?;
    let outcome = receive(&app, namespace, digest, RequestBody::new(&app, request.into_body())).await;
    let outcome = outcome.inspect_err(|error| app.metrics.rejected.with_label_values(&[error.code]).inc());
    outcome.map(put_status)
}

async fn receive(
    app: &App,
    namespace: Namespace,
    digest: Digest,
    mut body: RequestBody<'_>,
) -> Result<PutOutcome, ApiError> {
    if app.store.missing_blobs(namespace.clone(), vec![digest]).await?.is_empty() {
        return Ok(PutOutcome::Existed);
    }
    let (sender, reader) = body::pieces(app.upload_turn(&namespace).await?);
    let stored_bytes = body.announced_bytes();
    let upload = BlobUpload { namespace, digest, stored_bytes, body: Box::new(reader) };
    let (kept, pumped) = tokio::join!(app.store.put_blob(upload), body.pump(sender));
    match kept {
        // The store only saw the body fail; the reason is on this side.
        Err(StoreError::Aborted) => Err(pumped.err().unwrap_or(ApiError::BODY_ABORTED)),
        kept => Ok(kept?),
    }
}

/// The status of a put that succeeded.
pub const fn put_status(outcome: PutOutcome) -> StatusCode {
    match outcome {
        PutOutcome::Created => StatusCode::CREATED,
        PutOutcome::Existed => StatusCode::OK,
    }
}

fn parse_digest(text: &str) -> Result<Digest, ApiError> {
    text.parse().map_err(|_| ApiError::INVALID_DIGEST)
}
