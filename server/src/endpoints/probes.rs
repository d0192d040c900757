//! `/healthz`, `/readyz`, `/metrics`: for load balancers and Prometheus. They need no token and tell nothing
//! about entries but their number and size.

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;

use crate::app::App;
use crate::error::ApiError;

/// The process answers.
pub async fn health() -> &'static str {
    "ok\n"
}

/// The store answers.
pub async fn ready(State(app): State<App>) -> Result<&'static str, ApiError> {
    match app.store.stats().await {
        Ok(_) => Ok("ready\n"),
        Err(error) => {
            tracing::error!(%error, "the store does not answer");
            Err(ApiError::NOT_READY)
        }
    }
}

/// Everything that is measured, in Prometheus' text format.
pub async fn metrics(State(app): State<App>) -> Result<impl IntoResponse, ApiError> {
    let stats = app.store.stats().await?;
    let text = app.metrics.render(&stats).map_err(|error| {
        tracing::error!(%error, "cannot render the metrics");
        ApiError::INTERNAL
    })?;
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], text))
}
