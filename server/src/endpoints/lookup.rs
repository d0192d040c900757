//! `POST /v1/{namespace}/lookup`: action keys in, manifests with their results out.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use cachec_protocol::encode;
use cachec_protocol::message::{CBOR, LookupRequest, LookupResponse};

use crate::access::Reader;
use crate::app::{self, App};
use crate::body::{self, RequestBody};
use crate::error::ApiError;
use crate::store::{BlobSource, OpenBlob};

/// Longest answer. Of what is over, the oldest results of the last keys are left out, which the client takes
/// for misses.
const ANSWER_BYTES: usize = 32 << 20;

/// Answers a lookup. Results and their encoded answer are held at the same time, the latter while it is sent.
pub async fn post(
    State(app): State<App>,
    Reader(namespace, _place): Reader,
    request: Request,
) -> Result<Response, ApiError> {
    let LookupRequest { action_keys } = RequestBody::new(&app, request.into_body()).message().await?;
    let mut memory = app.message_memory(2 * ANSWER_BYTES).await?;
    let store = Arc::clone(&app.store);
    let (answer, memory) = app::finish(async move {
        let manifests = store.lookup(namespace, action_keys, ANSWER_BYTES).await?;
        let answer = encode(&LookupResponse { manifests });
        let spare = memory.num_permits().saturating_sub(app::mebibytes(answer.len()) as usize);
        drop(memory.split(spare));
        Ok((answer, memory))
    })
    .await?;
    let answer = OpenBlob { stored_bytes: answer.len() as u64, source: BlobSource::Memory(answer.into()) };
    Ok(body::blob_response(&app, answer, CBOR, memory))
}
