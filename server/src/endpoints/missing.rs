//! `POST /v1/{namespace}/blobs/missing`: which of these blobs to upload.

use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use cachec_protocol::encode;
use cachec_protocol::message::{BlobList, CBOR};

use crate::access::Writer;
use crate::app::App;
use crate::body::RequestBody;
use crate::error::ApiError;

/// Answers those that are not there. The others count as used now, so that they stay until the result that
/// needs them is published.
pub async fn post(
    State(app): State<App>,
    Writer(namespace, _place): Writer,
    request: Request,
) -> Result<impl IntoResponse, ApiError> {
    let BlobList { digests } = RequestBody::new(&app, request.into_body()).message().await?;
    let digests = app.store.missing_blobs(namespace, digests).await?;
    let answer = encode(&BlobList { digests });
    app.metrics.sent_bytes.inc_by(answer.len() as u64);
    Ok(([(CONTENT_TYPE, CBOR)], answer))
}
