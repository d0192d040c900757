//! The one type of every error response: a stable code, an HTTP status, a sentence without internals.
//!
//! | status | codes |
//! |---|---|
//! | 400 | `malformed_request`, `invalid_digest`, `invalid_namespace`, `length_mismatch`, `body_aborted` |
//! | 401 | `unauthorized`: no token, or none that is good for this namespace |
//! | 403 | `forbidden`: the token is good for this namespace, but not for this verb |
//! | 404 | `not_found` (path), `blob_not_found`, `client_not_found`, `unknown_protocol` |
//! | 405 | `method_not_allowed` |
//! | 408 | `body_stalled` |
//! | 409 | `pack_missing` |
//! | 413 | `too_large` |
//! | 422 | `digest_mismatch`, `malformed_blob`, `result_key_mismatch`, `invalid_result` |
//! | 500 | `internal` |
//! | 429 | `too_many_requests` for the namespaces of one pattern (with `Retry-After`) |
//! | 503 | `overloaded` (with `Retry-After`), `issuer_unreachable`, `not_ready` |
//! | 507 | `insufficient_storage`: no room, or writing to disk failed; reads go on |

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use cachec_protocol::encode;
use cachec_protocol::message::{CBOR, ErrorBody};

use crate::store::StoreError;

/// Seconds after which an overloaded server may be asked again.
const RETRY_AFTER_SECONDS: &str = "1";

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// The stable word for programs.
    pub code: &'static str,
    /// The sentence for people.
    pub message: &'static str,
}

impl ApiError {
    /// An error of this status, code and text.
    #[must_use]
    pub const fn new(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        Self { status, code, message }
    }

    /// A body that is not the message it should be.
    pub const MALFORMED_REQUEST: Self =
        Self::new(StatusCode::BAD_REQUEST, "malformed_request", "the body is not a message of this call");
    /// A digest or key in the path that is none.
    pub const INVALID_DIGEST: Self =
        Self::new(StatusCode::BAD_REQUEST, "invalid_digest", "a digest is 64 lower-case hexadecimal digits");
    /// A namespace in the path that is none.
    pub const INVALID_NAMESPACE: Self = Self::new(
        StatusCode::BAD_REQUEST,
        "invalid_namespace",
        "a namespace is 1 to 64 of a-z, 0-9, '.', '_' and '-', and starts with a letter or digit",
    );
    /// A body that ended before its time.
    pub const BODY_ABORTED: Self = Self::new(StatusCode::BAD_REQUEST, "body_aborted", "the body broke off");
    /// A body that came too slowly.
    pub const BODY_STALLED: Self =
        Self::new(StatusCode::REQUEST_TIMEOUT, "body_stalled", "the body came too slowly");
    /// No token, or none that is good for this namespace, whether or not that exists.
    pub const UNAUTHORIZED: Self =
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", "a valid token for this namespace is needed");
    /// A token without the verb that is needed.
    pub const FORBIDDEN: Self =
        Self::new(StatusCode::FORBIDDEN, "forbidden", "the token does not allow this");
    /// No such path.
    pub const NOT_FOUND: Self =
        Self::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path");
    /// No such blob.
    pub const BLOB_NOT_FOUND: Self =
        Self::new(StatusCode::NOT_FOUND, "blob_not_found", "there is no such blob");
    /// No client's program for that machine.
    pub const CLIENT_NOT_FOUND: Self = Self::new(
        StatusCode::NOT_FOUND,
        "client_not_found",
        "this server has no client for that machine; see `clients` in its configuration",
    );
    /// A protocol version in the path that is not spoken here.
    pub const UNKNOWN_PROTOCOL: Self =
        Self::new(StatusCode::NOT_FOUND, "unknown_protocol", "this protocol version is not spoken here");
    /// A known path, but not by this method.
    pub const METHOD_NOT_ALLOWED: Self = Self::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        "this path does not have that method",
    );
    /// A body over its limit.
    pub const TOO_LARGE: Self =
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the body, or its content, is over its limit");
    /// A result under another key than its own.
    pub const RESULT_KEY_MISMATCH: Self = Self::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        "result_key_mismatch",
        "the result has another key than the path",
    );
    /// A well-formed message with a result that cannot be.
    pub const INVALID_RESULT: Self = Self::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        "invalid_result",
        "a value of the result is out of its range",
    );
    /// Too much at once.
    pub const OVERLOADED: Self =
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", "too many requests at once; try again");
    /// Too much at once of the namespaces of one pattern.
    pub const TOO_MANY_REQUESTS: Self = Self::new(
        StatusCode::TOO_MANY_REQUESTS,
        "too_many_requests",
        "this namespace, or others like it, has too many requests at once; try again",
    );
    /// A job's identity cannot be checked.
    pub const ISSUER_UNREACHABLE: Self = Self::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "issuer_unreachable",
        "the keys of the token's issuer cannot be fetched; try again",
    );
    /// Not able to answer requests.
    pub const NOT_READY: Self =
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", "the store does not answer");
    /// No room, or writing failed.
    pub const INSUFFICIENT_STORAGE: Self =
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "insufficient_storage", "there is no room for this");
    /// Something that is not the client's fault.
    pub const INTERNAL: Self =
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the server failed; its log says why");
}

impl From<StoreError> for ApiError {
    /// Also the one place where a store's failures are logged.
    fn from(error: StoreError) -> Self {
        const UNPROCESSABLE: StatusCode = StatusCode::UNPROCESSABLE_ENTITY;
        match error {
            StoreError::TooLarge { .. } => Self::TOO_LARGE,
            StoreError::MalformedBlob => {
                Self::new(UNPROCESSABLE, "malformed_blob", "the body is not a sequence of zstd frames")
            }
            StoreError::DigestMismatch => {
                Self::new(UNPROCESSABLE, "digest_mismatch", "the content has another digest than the path")
            }
            StoreError::LengthMismatch => Self::new(
                StatusCode::BAD_REQUEST,
                "length_mismatch",
                "the body has another length than announced",
            ),
            StoreError::Aborted => Self::BODY_ABORTED,
            StoreError::PackMissing => {
                Self::new(StatusCode::CONFLICT, "pack_missing", "the result's pack is not on the server")
            }
            StoreError::Full { .. } | StoreError::Write(_) => {
                tracing::warn!(%error, "an entry was not stored");
                Self::new(
                    StatusCode::INSUFFICIENT_STORAGE,
                    "insufficient_storage",
                    "there is no room for this",
                )
            }
            StoreError::Read(_) | StoreError::DamagedRow(_) => {
                tracing::error!(%error, "the store failed");
                Self::INTERNAL
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorBody { code: self.code.to_owned(), message: self.message.to_owned() };
        let mut response = Response::new(Body::from(encode(&body)));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(CBOR));
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS));
            }
            _ => {}
        }
        response
    }
}
