//! `POST /v1/{namespace}/token`: a CI job proves what it is (see [`crate::identity`]), and gets a session.
//!
//! The answer is the session's token, as text: a job's own token ends after a few minutes, which many builds outlast.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};

use crate::access::{self, Named};
use crate::app::App;
use crate::error::ApiError;

/// Begins a session.
pub async fn post(
    State(app): State<App>,
    Named(namespace): Named,
    headers: HeaderMap,
) -> Result<(StatusCode, String), ApiError> {
    let identities = app.gate.identities.as_ref().ok_or(ApiError::UNAUTHORIZED)?;
    let proof = access::bearer_token(&headers).ok_or(ApiError::UNAUTHORIZED)?;
    let verbs = identities.verbs(proof, &namespace).await.map_err(|_| ApiError::ISSUER_UNREACHABLE)?;
    let verbs = verbs.ok_or(ApiError::UNAUTHORIZED)?;
    let (gate, length) = (Arc::clone(&app.gate), app.limits.session);
    let token = tokio::task::spawn_blocking(move || gate.sessions.create(&namespace, verbs, length)).await;
    match token {
        Ok(Ok(token)) => Ok((StatusCode::CREATED, token)),
        Ok(Err(error)) => {
            tracing::error!(%error, "cannot begin a session");
            Err(ApiError::INTERNAL)
        }
        Err(_) => Err(ApiError::INTERNAL),
    }
}
