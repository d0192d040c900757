//! `GET /client/{machine}` and `GET /install.sh`: the client's program for a machine (`x86_64-linux`), and a script that
//! installs it. For everybody: a token is what a client needs later.

use axum::extract::{Path, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use tower::ServiceExt;
use tower_http::services::ServeFile;

use crate::app::App;
use crate::error::ApiError;

/// Sends the program, which is a file of that name in [`crate::app::Shared::clients`].
pub async fn get(
    State(app): State<App>,
    Path(machine): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let is_name = |name: &str| {
        name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte))
    };
    let directory = app.clients.as_ref().filter(|_| is_name(&machine)).ok_or(ApiError::CLIENT_NOT_FOUND)?;
    let program = directory.join(machine);
    if !tokio::fs::metadata(&program).await.is_ok_and(|metadata| metadata.is_file()) {
        return Err(ApiError::CLIENT_NOT_FOUND);
    }
    let sent = ServeFile::new(program).oneshot(request).await;
    Ok(sent.unwrap_or_else(|never| match never {}).into_response())
}

/// Sends the script.
pub async fn install_script() -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/x-shellscript")], include_str!("install.sh"))
}
