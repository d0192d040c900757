//! The application: what the endpoints share, the routes, and what wraps every request.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::error_handling::HandleErrorLayer;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use cachec_protocol::message::{PROTOCOL_HEADER, PROTOCOL_VERSION};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceBuilder;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::load_shed::LoadShedLayer;

use crate::access::Gate;
use crate::body;
use crate::endpoints::{blobs, builds, fetch, lookup, missing, probes, results, token};
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::namespace::Namespace;
use crate::store::Store;

/// Memory that bodies held as a whole may take together, in MiB: lookups' answers and publications.
pub const MESSAGE_MEMORY_MIB: u32 = 256;

/// How long an upload waits for its turn before it is told to come back; clients wait longer for the answer.
const UPLOAD_WAIT: Duration = Duration::from_secs(5);

/// How long a message waits for memory. A client that looks something up waits two seconds in all.
const MESSAGE_WAIT: Duration = Duration::from_secs(1);

/// The part of all turns that uploads into the namespaces of one pattern may have, so that others get theirs.
const MOST_TURNS: (usize, usize) = (3, 4);

/// What bounds the work of one server.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Uploads at a time. Each takes up to about 33 MiB of memory and one blocking thread.
    pub uploads: usize,
    /// Requests at a time, of which uploads of one namespace are at most half. One that waits for its turn may have
    /// filled an HTTP/2 window of 512 KiB.
    pub requests: usize,
    /// Longest silence within a body, and the head start that a slow body has.
    pub body_idle: Duration,
    /// Least average rate of a body behind its head start.
    pub body_bytes_per_second: u64,
    /// How long a CI job's session lasts.
    pub session: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            uploads: 16,
            requests: 512,
            body_idle: Duration::from_secs(30),
            body_bytes_per_second: 8 << 10,
            session: Duration::from_secs(6 * 60 * 60),
        }
    }
}

/// What the endpoints share. Cheap to clone.
#[derive(Clone)]
pub struct App {
    /// The entries.
    pub store: Arc<dyn Store>,
    /// Who may do what.
    pub gate: Arc<Gate>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What bounds the work.
    pub limits: Arc<Limits>,
    upload_slots: Arc<Semaphore>,
    /// Turns that the namespaces of each pattern may have.
    pattern_slots: Arc<Mutex<HashMap<String, Arc<Semaphore>>>>,
    /// Uploads that run or wait for their turn, by namespace.
    uploads: Arc<Mutex<HashMap<Namespace, usize>>>,
    message_memory: Arc<Semaphore>,
}

/// A turn to upload.
pub struct UploadSlot {
    _slots: [OwnedSemaphorePermit; 2],
    _upload: Upload,
}

/// An upload that runs or waits; counted until it is dropped.
struct Upload {
    uploads: Arc<Mutex<HashMap<Namespace, usize>>>,
    namespace: Namespace,
}

impl App {
    /// Puts an application together.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, gate: Arc<Gate>, metrics: Arc<Metrics>, limits: Limits) -> Self {
        Self {
            store,
            gate,
            metrics,
            upload_slots: Arc::new(Semaphore::new(limits.uploads)),
            pattern_slots: Arc::default(),
            uploads: Arc::default(),
            message_memory: Arc::new(Semaphore::new(MESSAGE_MEMORY_MIB as usize)),
            limits: Arc::new(limits),
        }
    }

    /// Waits for a turn to upload.
    ///
    /// # Errors
    /// [`ApiError::OVERLOADED`] where none comes soon, [`ApiError::TOO_MANY_UPLOADS`] where too many of the namespace
    /// wait already, so that it cannot keep the others out.
    pub async fn upload_slot(&self, namespace: &Namespace) -> Result<UploadSlot, ApiError> {
        let upload = self.upload(namespace)?;
        let own = {
            let label = self.gate.policy().label(namespace);
            let mut slots = self.pattern_slots.lock().unwrap_or_else(PoisonError::into_inner);
            let most = (self.limits.uploads * MOST_TURNS.0 / MOST_TURNS.1).max(1);
            Arc::clone(slots.entry(label).or_insert_with(|| Arc::new(Semaphore::new(most))))
        };
        let own = acquire(&own, 1, UPLOAD_WAIT).await?;
        Ok(UploadSlot { _slots: [own, acquire(&self.upload_slots, 1, UPLOAD_WAIT).await?], _upload: upload })
    }

    fn upload(&self, namespace: &Namespace) -> Result<Upload, ApiError> {
        let mut uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        let count = uploads.entry(namespace.clone()).or_default();
        if *count >= self.limits.requests.div_ceil(2) {
            return Err(ApiError::TOO_MANY_UPLOADS);
        }
        *count += 1;
        Ok(Upload { uploads: Arc::clone(&self.uploads), namespace: namespace.clone() })
    }

    /// Waits until so much memory for whole messages is free.
    ///
    /// # Errors
    /// [`ApiError::OVERLOADED`] where it is not soon.
    pub async fn message_memory(&self, bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        acquire(&self.message_memory, mebibytes(bytes).min(MESSAGE_MEMORY_MIB), MESSAGE_WAIT).await
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let mut uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = uploads.get_mut(&self.namespace) {
            *count -= 1;
            if *count == 0 {
                uploads.remove(&self.namespace);
            }
        }
    }
}

/// Whole mebibytes that hold so many bytes.
#[must_use]
pub fn mebibytes(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX)
}

async fn acquire(
    semaphore: &Arc<Semaphore>,
    permits: u32,
    wait: Duration,
) -> Result<OwnedSemaphorePermit, ApiError> {
    let acquired = tokio::time::timeout(wait, Arc::clone(semaphore).acquire_many_owned(permits)).await;
    acquired.ok().and_then(Result::ok).ok_or(ApiError::OVERLOADED)
}

/// What is for operators alone.
pub fn probes_router(app: App) -> Router {
    Router::new()
        .route("/healthz", get(probes::health))
        .route("/readyz", get(probes::ready))
        .route("/metrics", get(probes::metrics))
        .with_state(app)
}

/// The routes of protocol version 1, and the probes. Metrics name namespaces, and are not for everybody.
pub fn router(app: App, with_metrics: bool) -> Router {
    let overload = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(|_: tower::BoxError| async { ApiError::OVERLOADED }))
        .layer(LoadShedLayer::new())
        .layer(GlobalConcurrencyLimitLayer::new(app.limits.requests));
    let metrics = Router::new().route("/metrics", get(probes::metrics));
    Router::new()
        .route("/v1/{namespace}/lookup", post(lookup::post))
        .route("/v1/{namespace}/blobs/missing", post(missing::post))
        .route("/v1/{namespace}/blobs/{digest}", get(blobs::get).head(blobs::head).put(blobs::put))
        .route("/v1/{namespace}/fetch", post(fetch::post))
        .route("/v1/{namespace}/builds/{build_key}", get(builds::get))
        .route("/v1/{namespace}/results/{result_key}", put(results::put))
        .route("/v1/{namespace}/token", post(token::post))
        .layer(overload)
        .route("/healthz", get(probes::health))
        .route("/readyz", get(probes::ready))
        .merge(if with_metrics { metrics } else { Router::new() })
        .fallback(unknown_path)
        .method_not_allowed_fallback(|| async { ApiError::METHOD_NOT_ALLOWED })
        .layer(middleware::from_fn_with_state(app.clone(), body::answer_when_sent))
        .layer(middleware::from_fn_with_state(app.clone(), observe))
        .with_state(app)
}

async fn unknown_path(uri: Uri) -> ApiError {
    let first = uri.path().split('/').nth(1).unwrap_or_default();
    let version = first.strip_prefix('v').filter(|rest| !rest.is_empty());
    match version {
        Some(version) if version != PROTOCOL_VERSION && version.bytes().all(|byte| byte.is_ascii_digit()) => {
            ApiError::UNKNOWN_PROTOCOL
        }
        _ => ApiError::NOT_FOUND,
    }
}

/// Counts a request, and says on its response which protocol is spoken here.
async fn observe(State(app): State<App>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await.into_response();
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    let status = response.status().as_u16();
    let class = match status / 100 {
        1 => "1xx",
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        _ => "5xx",
    };
    app.metrics.requests.with_label_values(&[route, class]).inc();
    app.metrics.request_seconds.with_label_values(&[route]).observe(started.elapsed().as_secs_f64());
    tracing::debug!(%method, route, status, "request");
    let protocol = HeaderName::from_static(PROTOCOL_HEADER);
    response.headers_mut().insert(protocol, HeaderValue::from_static(PROTOCOL_VERSION));
    response
}
