//! Who asks: the namespace in the path and the token in the header, checked before anything else is done.
//!
//! Invariant: whether a namespace exists, or a token is good elsewhere, cannot be told from the answer.

use axum::extract::{FromRequestParts, Path};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use serde::Deserialize;

use crate::app::App;
use crate::error::ApiError;
use crate::namespace::Namespace;
use crate::tokens::{Grant, Verb};

/// The namespace of a request that may read it.
pub struct Reader(pub Namespace);

/// The namespace of a request that may write it.
pub struct Writer(pub Namespace);

#[derive(Deserialize)]
struct NamespaceInPath {
    namespace: String,
}

impl FromRequestParts<App> for Reader {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        authorise(parts, app, Verb::Read).await.map(Self)
    }
}

impl FromRequestParts<App> for Writer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        authorise(parts, app, Verb::Write).await.map(Self)
    }
}

async fn authorise(parts: &mut Parts, app: &App, verb: Verb) -> Result<Namespace, ApiError> {
    let path = Path::<NamespaceInPath>::from_request_parts(parts, app).await;
    let Path(NamespaceInPath { namespace }) = path.map_err(|_| ApiError::INVALID_NAMESPACE)?;
    let namespace: Namespace = namespace.parse().map_err(|_| ApiError::INVALID_NAMESPACE)?;
    let token = bearer_token(parts).map(ToOwned::to_owned);
    let (tokens, asked) = (app.tokens.clone(), namespace.clone());
    let grant = tokio::task::spawn_blocking(move || tokens.check(token.as_deref(), &asked, verb)).await;
    match grant {
        Ok(Ok(Grant::Allowed)) => Ok(namespace),
        Ok(Ok(Grant::Unknown)) => Err(ApiError::UNAUTHORIZED),
        Ok(Ok(Grant::Forbidden)) => Err(ApiError::FORBIDDEN),
        Ok(Err(error)) => {
            tracing::error!(%error, "cannot read the tokens");
            Err(ApiError::INTERNAL)
        }
        Err(_) => Err(ApiError::INTERNAL),
    }
}

fn bearer_token(parts: &Parts) -> Option<&str> {
    let (scheme, token) = parts.headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}
