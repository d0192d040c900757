//! `PUT /v1/{namespace}/results/{result key}`: publishes a result.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use bytes::Bytes;
use cachec_protocol::codec::{self, Message};
use cachec_protocol::message::PublishRequest;
use cachec_protocol::{DecodeError, ResultKey, StoredResult};
use ring::signature::{ED25519, UnparsedPublicKey};

use super::blobs::put_status;
use crate::access::Writer;
use crate::app::{self, App};
use crate::body::RequestBody;
use crate::error::ApiError;
use crate::namespace::Namespace;
use crate::store::Publication;

/// A decoded result takes about twice its encoded size, beside the body itself.
const MEMORY_PER_BYTE: usize = 3;

/// Keeps a result whose key and pack are right.
pub async fn put(
    State(app): State<App>,
    Writer(namespace, _place): Writer,
    Path((_, result_key)): Path<(String, String)>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let result_key = result_key.parse().map_err(|_| ApiError::INVALID_DIGEST)?;
    let body = RequestBody::new(&app, request.into_body());
    let outcome = publish(&app, namespace, result_key, body).await;
    outcome.inspect_err(|error| app.metrics.rejected.with_label_values(&[error.code]).inc())
}

async fn publish(
    app: &App,
    namespace: Namespace,
    result_key: ResultKey,
    body: RequestBody<'_>,
) -> Result<StatusCode, ApiError> {
    let limit_bytes = PublishRequest::LIMIT_BYTES;
    let length =
        body.announced_bytes().and_then(|length| usize::try_from(length).ok()).unwrap_or(limit_bytes);
    let memory = app.message_memory(length.min(limit_bytes) * MEMORY_PER_BYTE).await?;
    let bytes = Bytes::from(body.collect(limit_bytes).await?);
    let store = Arc::clone(&app.store);
    app::finish(async move {
        let publication = tokio::task::spawn_blocking(move || read(&bytes, namespace, result_key))
            .await
            .unwrap_or(Err(ApiError::INTERNAL))?;
        let outcome = store.publish(publication).await;
        drop(memory);
        Ok(put_status(outcome?))
    })
    .await
}

fn read(bytes: &Bytes, namespace: Namespace, result_key: ResultKey) -> Result<Publication, ApiError> {
    let request: PublishRequest = codec::decode(bytes).map_err(|error| match error {
        DecodeError::Invalid(_) => ApiError::INVALID_RESULT,
        _ => ApiError::MALFORMED_REQUEST,
    })?;
    if request.result.result_key() != result_key {
        return Err(ApiError::RESULT_KEY_MISMATCH);
    }
    if !is_rightly_signed(&request.result) {
        return Err(ApiError::INVALID_RESULT);
    }
    let encoded = encoded_result(bytes).ok_or(ApiError::MALFORMED_REQUEST)?;
    Ok(Publication {
        namespace,
        result_key,
        action_key: request.result.action_key,
        pack: request.result.pack.map(|pack| pack.digest),
        encoded,
        action_fields: request.action_fields,
    })
}

/// Whether a signature, if there is one, is its writer's: the first result of a key stays, and a false one would keep out
/// the right one.
fn is_rightly_signed(result: &StoredResult) -> bool {
    result.signature.is_none_or(|signature| {
        let key = UnparsedPublicKey::new(&ED25519, signature.key);
        key.verify(&result.signed_bytes(), &signature.bytes).is_ok()
    })
}

/// The bytes of the request's field 0 as they were sent, so that fields of a later version are kept.
fn encoded_result(bytes: &Bytes) -> Option<Bytes> {
    let mut decoder = minicbor::Decoder::new(bytes);
    let entries = decoder.map().ok()?;
    let mut left = entries.unwrap_or(u64::MAX);
    while left > 0 {
        left -= 1;
        let key = decoder.u64().ok()?;
        let start = decoder.position();
        decoder.skip().ok()?;
        if key == 0 {
            return Some(bytes.slice(start..decoder.position()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use cachec_protocol::result::Signature;
    use cachec_protocol::{ActionKey, InputSet, encode};
    use ring::signature::{Ed25519KeyPair, KeyPair};

    use super::*;

    fn result() -> StoredResult {
        StoredResult {
            action_key: ActionKey::from_bytes([1; 32]),
            input_set: InputSet::default(),
            outputs: vec![],
            stdout: vec![],
            stderr: vec![],
            compile_ms: 7,
            pack: None,
            signature: None,
        }
    }

    #[test]
    fn a_result_is_kept_as_it_was_sent_with_fields_of_later_versions() {
        let result = result();
        let mut encoded = encode(&result);
        // One more field: 99, with value 5.
        encoded[0] += 1;
        encoded.extend_from_slice(&[0x18, 99, 5]);
        for map in [[0xa3].as_slice(), &[0xbf]] {
            // Unknown field 7 first, then fields 0 and 1.
            let mut body = [map, &[7, 1, 0], &encoded, &[1, 0x41, 0xff]].concat();
            body.extend_from_slice(if map == [0xbf] { &[0xff] } else { &[] });
            let namespace: Namespace = "a".parse().unwrap();
            let publication = read(&body.into(), namespace, result.result_key()).unwrap();
            assert_eq!(publication.encoded, encoded);
            assert_eq!(publication.action_fields, [0xff]);
        }
    }

    #[test]
    fn a_signature_that_nobody_has_made_is_refused() {
        let signer = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
        let mut result = result();
        assert!(is_rightly_signed(&result));
        let mut signature = Signature { key: [0; 32], bytes: [0; 64] };
        signature.key.copy_from_slice(signer.public_key().as_ref());
        signature.bytes.copy_from_slice(signer.sign(&result.signed_bytes()).as_ref());
        result.signature = Some(signature);
        assert!(is_rightly_signed(&result));
        result.compile_ms = 8;
        assert!(!is_rightly_signed(&result));
    }
}
