//! The application: what the endpoints share, the routes, and what wraps every request.

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
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
use crate::endpoints::{blobs, builds, clients, fetch, lookup, missing, probes, results, token};
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::namespace::Namespace;
use crate::store::Store;
use crate::tokens::Verb;
use crate::turns::{Place, Turn, Turns, acquire};

/// Memory that bodies held as a whole may take together, in MiB: lookups' answers and publications.
pub const MESSAGE_MEMORY_MIB: u32 = 256;

/// How long a message waits for memory. A client that looks something up waits two seconds in all.
const MESSAGE_WAIT: Duration = Duration::from_secs(1);

/// What bounds the work of one server.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Uploads at a time. Each takes up to about 33 MiB of memory and one blocking thread.
    pub uploads: usize,
    /// Requests at a time, of which one pattern of namespaces may have a part (see `turns`). One that waits for its turn may have
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

/// What the endpoints share. Cheap to clone, as every layer does for every request.
#[derive(Clone)]
pub struct App(Arc<Shared>);

/// See [`App`].
pub struct Shared {
    /// The entries.
    pub store: Arc<dyn Store>,
    /// Who may do what.
    pub gate: Arc<Gate>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What bounds the work.
    pub limits: Limits,
    /// The directory with the clients' programs, if there is one.
    pub clients: Option<PathBuf>,
    turns: Turns,
    message_memory: Arc<Semaphore>,
}

impl App {
    /// Puts an application together.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        gate: Arc<Gate>,
        metrics: Arc<Metrics>,
        limits: Limits,
        clients: Option<PathBuf>,
    ) -> Self {
        Self(Arc::new(Shared {
            store,
            gate,
            metrics,
            clients,
            turns: Turns::new(limits.uploads, limits.requests),
            message_memory: Arc::new(Semaphore::new(MESSAGE_MEMORY_MIB as usize)),
            limits,
        }))
    }

    /// A place for a request that reads or writes this namespace.
    ///
    /// # Errors
    /// As [`Turns::enter`].
    pub fn place(&self, namespace: &Namespace, verb: Verb) -> Result<Place, ApiError> {
        self.turns.enter(self.gate.policy().label(namespace), verb)
    }

    /// Waits for a turn to upload.
    ///
    /// # Errors
    /// As [`Turns::take`].
    pub async fn upload_turn(&self, namespace: &Namespace) -> Result<Turn, ApiError> {
        self.turns.take(self.gate.policy().label(namespace)).await
    }

    /// Waits until so much memory for whole messages is free.
    ///
    /// # Errors
    /// [`ApiError::OVERLOADED`] where it is not soon.
    pub async fn message_memory(&self, bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        acquire(&self.message_memory, mebibytes(bytes).min(MESSAGE_MEMORY_MIB), MESSAGE_WAIT).await
    }
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// Does to the end what holds memory, also where whoever asked has gone: the memory is free when the work is done.
///
/// # Errors
/// Those of the work; [`ApiError::INTERNAL`] where it has panicked.
pub async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::spawn(work).await.unwrap_or(Err(ApiError::INTERNAL))
}

/// Whole mebibytes that hold so many bytes.
#[must_use]
pub fn mebibytes(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX)
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
        .route("/client/{machine}", get(clients::get))
        .route("/install.sh", get(clients::install_script))
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
