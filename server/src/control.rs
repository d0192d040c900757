//! Commands to a running server: HTTP on a socket in its data directory, for whoever may write there.
//!
//! | call | does |
//! |---|---|
//! | `POST /backup`, a path as body | makes a backup there |
//!
//! The database lets one process in at a time, so that a command that finds the socket asks, and works by itself
//! where there is no server.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use tokio::net::UnixListener;

use crate::outbound;
use crate::store::embedded::Embedded;

/// A backup of millions of files takes minutes.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60 * 60);

/// The socket of a data directory.
#[must_use]
pub fn socket(data: &Path) -> PathBuf {
    data.join("control")
}

/// Listens on the socket of a data directory that belongs to this process.
///
/// # Errors
/// Those of making it; its path may be too long for one.
pub fn listen(data: &Path) -> io::Result<UnixListener> {
    let path = socket(data);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers commands until it is dropped.
pub async fn serve(listener: UnixListener, store: Embedded) {
    let router = Router::new().route("/backup", post(backup)).with_state(store);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "commands are not answered any more");
    }
}

async fn backup(State(store): State<Embedded>, body: Bytes) -> Result<String, (StatusCode, String)> {
    let path = PathBuf::from(OsStr::from_bytes(&body));
    let made = store.back_up(path).await;
    made.map(|report| report.to_string())
        .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

/// Has the running server make a backup; `None` where none runs.
///
/// # Errors
/// What the server says.
pub async fn ask_for_backup(data: &Path, to: &Path) -> anyhow::Result<Option<String>> {
    let client = outbound::client(ANSWER_TIMEOUT)?.unix_socket(socket(data)).build()?;
    let body = to.as_os_str().as_bytes().to_vec();
    let response = match client.post("http://localhost/backup").body(body).send().await {
        Err(error) if error.is_connect() => return Ok(None),
        response => response?,
    };
    let is_made = response.status().is_success();
    let text = response.text().await.context("the server broke off")?;
    if is_made { Ok(Some(text)) } else { bail!("no backup was made: {text}") }
}
