//! Who asks: the namespace in the path and the token in the header, checked before anything else is done.
//!
//! Invariant: whether a namespace exists, or a token is good elsewhere, cannot be told from the answer.

use std::io;
use std::path::Path as FilePath;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Path};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use serde::Deserialize;

use crate::app::App;
use crate::error::ApiError;
use crate::identity::Identities;
use crate::namespace::Namespace;
use crate::policy::Policy;
use crate::sessions::Sessions;
use crate::tokens::{Grant, Tokens, Verb};
use crate::turns::Place;

/// Decides who may do what.
#[derive(Debug)]
pub struct Gate {
    tokens: Tokens,
    /// What CI jobs get.
    pub sessions: Sessions,
    /// Who they may be, if any.
    pub identities: Option<Identities>,
    policy: Arc<Policy>,
}

impl Gate {
    /// The gate of a data directory.
    ///
    /// # Errors
    /// The directory of tokens cannot be created.
    pub fn open(data: &FilePath, policy: Arc<Policy>, identities: Option<Identities>) -> io::Result<Self> {
        let tokens = Tokens::open(data)?;
        let rules =
            identities.as_ref().map(|identities| format!("{:?}", identities.issuers().collect::<Vec<_>>()));
        let sessions = Sessions::new(tokens.directory(), &rules.unwrap_or_default());
        Ok(Self { tokens, sessions, identities, policy })
    }

    /// What holds for each namespace.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Whether anybody has to prove anything: there is or was a token, or the configuration says who may do what.
    ///
    /// # Errors
    /// The tokens cannot be read.
    pub fn is_closed(&self) -> io::Result<bool> {
        Ok(self.identities.is_some() || self.policy.has_anonymous_read() || self.tokens.are_needed()?)
    }

    /// Decides about a request with this bearer token, if any. Blocks on small files.
    ///
    /// # Errors
    /// Files cannot be read; the caller refuses.
    pub fn check(&self, token: Option<&str>, namespace: &Namespace, verb: Verb) -> io::Result<Grant> {
        if verb == Verb::Read && self.policy.rules(namespace).anonymous_read || !self.is_closed()? {
            return Ok(Grant::Allowed);
        }
        match token {
            None => Ok(Grant::Unknown),
            Some(token) if Sessions::is_session(token) => self.sessions.check(token, namespace, verb),
            Some(token) => self.tokens.check(token, namespace, verb),
        }
    }
}

/// The namespace of a request that may read it, and its place there while it is answered.
pub struct Reader(pub Namespace, pub Place);

/// The namespace of a request that may write it, likewise.
pub struct Writer(pub Namespace, pub Place);

/// The namespace of a request of which nothing else is known.
pub struct Named(pub Namespace);

#[derive(Deserialize)]
struct NamespaceInPath {
    namespace: String,
}

impl FromRequestParts<App> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let path = Path::<NamespaceInPath>::from_request_parts(parts, app).await;
        let Path(NamespaceInPath { namespace }) = path.map_err(|_| ApiError::INVALID_NAMESPACE)?;
        namespace.parse().map(Self).map_err(|_| ApiError::INVALID_NAMESPACE)
    }
}

impl FromRequestParts<App> for Reader {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        authorise(parts, app, Verb::Read).await.map(|(namespace, place)| Self(namespace, place))
    }
}

impl FromRequestParts<App> for Writer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        authorise(parts, app, Verb::Write).await.map(|(namespace, place)| Self(namespace, place))
    }
}

async fn authorise(parts: &mut Parts, app: &App, verb: Verb) -> Result<(Namespace, Place), ApiError> {
    let Named(namespace) = Named::from_request_parts(parts, app).await?;
    // Reads a file of a few bytes that was read a moment ago, which takes less than handing it to another thread.
    match app.gate.check(bearer_token(&parts.headers), &namespace, verb) {
        Ok(Grant::Allowed) => {
            let place = app.place(&namespace, verb)?;
            Ok((namespace, place))
        }
        Ok(Grant::Unknown) => Err(ApiError::UNAUTHORIZED),
        Ok(Grant::Forbidden) => Err(ApiError::FORBIDDEN),
        Err(error) => {
            tracing::error!(%error, "cannot read the tokens");
            Err(ApiError::INTERNAL)
        }
    }
}

/// The token of a request.
pub fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}
