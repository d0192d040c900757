//! One server, from its configuration to its end.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use crate::access::Gate;
use crate::app::{self, App, Limits};
use crate::connection::{self, Connections, Deadlines};
use crate::control;
use crate::identity::{Identities, Issuer};
use crate::metrics::Metrics;
use crate::store::embedded::{Embedded, EmbeddedOptions};
use crate::store::layered::Layered;
use crate::store::metered::Metered;
use crate::tls::{Tls, TlsFiles};

/// How often the store does its housekeeping, and so the most that a power cut forgets.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(1);

/// How often the certificate's files are looked at.
const TLS_INTERVAL: Duration = Duration::from_secs(60);

/// Connections at a time to the address for metrics.
const METRICS_CONNECTIONS: usize = 64;

/// What a server is started with.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where metrics and probes are alone; without it they are with the rest, on a loopback address.
    pub metrics_listen: Option<SocketAddr>,
    /// The store.
    pub store: EmbeddedOptions,
    /// The level at which blobs are compressed again, if they are.
    pub recompress_level: Option<i32>,
    /// How often all blobs are read and checked, if they are.
    pub scrub_interval: Option<Duration>,
    /// Whether it may listen beyond loopback without tokens.
    pub open: bool,
    /// A directory with the clients' programs, which are handed out.
    pub clients: Option<PathBuf>,
    /// Who CI jobs may be.
    pub identities: Vec<Issuer>,
    /// What makes connections secure, if they are to be.
    pub tls: Option<TlsFiles>,
    /// Most connections at a time.
    pub max_connections: usize,
    /// Most connections of one address at a time.
    pub max_connections_per_address: usize,
    /// What bounds its work.
    pub limits: Limits,
    /// How long clients may take.
    pub deadlines: Deadlines,
}

impl ServerOptions {
    /// Options with everything else as it is without configuration.
    #[must_use]
    pub fn new(listen: SocketAddr, store: EmbeddedOptions) -> Self {
        Self {
            listen,
            metrics_listen: None,
            store,
            recompress_level: None,
            scrub_interval: None,
            open: false,
            clients: None,
            identities: Vec::new(),
            tls: None,
            max_connections: 4096,
            max_connections_per_address: 256,
            limits: Limits::default(),
            deadlines: Deadlines::default(),
        }
    }

    /// What decides who may do what. Also a check of the options about that.
    ///
    /// # Errors
    /// A rule that cannot be, a directory that cannot be used, or an address beyond loopback for everybody.
    pub fn gate(&self) -> anyhow::Result<Gate> {
        let data = &self.store.directory;
        let identities = match self.identities.as_slice() {
            [] => None,
            issuers => Some(Identities::new(issuers.to_vec())?),
        };
        let gate = Gate::open(data, Arc::clone(&self.store.policy), identities)
            .with_context(|| format!("cannot use {}", data.display()))?;
        if !self.listen.ip().is_loopback() && !self.open && !gate.is_closed()? {
            bail!(
                "{} is not a loopback address and there is no token; create one with `cachec-server token \
                 create`, or allow everybody with `--open`",
                self.listen
            );
        }
        Ok(gate)
    }
}

/// A server that listens, and is about to serve.
pub struct Server {
    listener: TcpListener,
    metrics_listener: Option<TcpListener>,
    address: SocketAddr,
    store: Embedded,
    app: App,
    tls: Option<Arc<Tls>>,
    options: ServerOptions,
}

impl Server {
    /// Opens the store and listens.
    ///
    /// # Errors
    /// A store that cannot be opened, an address that cannot be had, or one beyond loopback without tokens.
    pub async fn bind(options: ServerOptions) -> anyhow::Result<Self> {
        let gate = options.gate()?;
        let tls = options.tls.clone().map(Tls::load).transpose()?;
        let store_options = options.store.clone();
        let store = tokio::task::spawn_blocking(move || Embedded::open(&store_options))
            .await?
            .with_context(|| format!("cannot open the store in {}", options.store.directory.display()))?;
        let listener = listen(options.listen).await?;
        let metrics_listener = match options.metrics_listen {
            Some(address) => Some(listen(address).await?),
            None => None,
        };
        let metrics = Arc::new(Metrics::new()?);
        let layered = Layered::new(store.clone(), Arc::clone(&options.store.policy));
        let metered = Metered::new(layered, Arc::clone(&metrics));
        let (limits, clients) = (options.limits.clone(), options.clients.clone());
        let app = App::new(Arc::new(metered), Arc::new(gate), metrics, limits, clients);
        Ok(Self { address: listener.local_addr()?, listener, metrics_listener, store, app, tls, options })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The store, to be closed when [`Self::serve`] has returned and the runtime is gone.
    #[must_use]
    pub fn store(&self) -> Embedded {
        self.store.clone()
    }

    /// Its URL, without a slash at the end.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Serves until `stop` is ready, and then until the requests in flight are answered.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub async fn serve(self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        let options = self.options;
        let background = [
            options.recompress_level.map(|level| self.store.recompress(level)),
            options.scrub_interval.map(|interval| self.store.scrub_every(interval)),
        ];
        let background = background.into_iter().flatten().collect::<Result<Vec<_>, _>>()?;
        let connections = Connections {
            metrics: Arc::clone(&self.app.metrics),
            router: app::router(
                self.app.clone(),
                options.metrics_listen.is_none() && options.listen.ip().is_loopback(),
            ),
            deadlines: options.deadlines.clone(),
            max_connections: options.max_connections,
            max_connections_per_address: options.max_connections_per_address,
            tls: self.tls.as_ref().map(Tls::acceptor).transpose()?,
        };
        let mut tasks = JoinSet::new();
        match control::listen(&options.store.directory) {
            Ok(listener) => drop(tasks.spawn(control::serve(listener, self.store.clone()))),
            Err(error) => tracing::warn!(%error, "there is no socket for commands"),
        }
        if let Some(listener) = self.metrics_listener {
            let connections = Connections {
                router: app::probes_router(self.app.clone()),
                metrics: Arc::clone(&self.app.metrics),
                deadlines: options.deadlines.clone(),
                max_connections: METRICS_CONNECTIONS,
                max_connections_per_address: METRICS_CONNECTIONS,
                tls: None,
            };
            tasks.spawn(connection::serve(listener, connections, std::future::pending()));
        }
        tasks.spawn(maintain(self.store));
        if let Some(tls) = self.tls {
            tasks.spawn(renew(tls));
        }
        connection::serve(self.listener, connections, stop).await;
        tasks.shutdown().await;
        // Waits for the threads.
        let _ = tokio::task::spawn_blocking(move || drop(background)).await;
        Ok(())
    }
}

/// A server in the background of a test.
pub struct RunningServer {
    /// Its URL, without a slash at the end.
    pub url: String,
    store: Embedded,
    stop: tokio::sync::oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl RunningServer {
    /// Starts a server in the present runtime.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub async fn start(options: ServerOptions) -> anyhow::Result<Self> {
        let server = Server::bind(options).await?;
        let url = server.url();
        let store = server.store();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(server.serve(async {
            let _ = stopped.await;
        }));
        Ok(Self { url, store, stop, task })
    }

    /// Its store.
    #[must_use]
    pub const fn store(&self) -> &Embedded {
        &self.store
    }

    /// Stops it, and waits until it has.
    ///
    /// # Errors
    /// It panicked, or its store could not be closed.
    pub async fn stop(self) -> anyhow::Result<()> {
        let _ = self.stop.send(());
        self.task.await??;
        self.store.close()?;
        Ok(())
    }
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Looks for a new certificate from time to time.
async fn renew(tls: Arc<Tls>) {
    let mut ticks = tokio::time::interval(TLS_INTERVAL);
    loop {
        ticks.tick().await;
        match tls.reload() {
            Ok(true) => tracing::info!("the certificate was exchanged"),
            Ok(false) => {}
            Err(error) => tracing::error!("the new certificate is not used: {error:#}"),
        }
    }
}

async fn maintain(store: Embedded) {
    let mut ticks = tokio::time::interval(MAINTENANCE_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // A full disk may stay full for long; its log should not grow meanwhile.
    let mut is_failing = false;
    loop {
        ticks.tick().await;
        match store.maintain().await {
            Err(error) if !is_failing => {
                tracing::error!(%error, "housekeeping of the store fails; it is tried again every second");
                is_failing = true;
            }
            Ok(()) if is_failing => {
                tracing::info!("housekeeping of the store works again");
                is_failing = false;
            }
            _ => {}
        }
    }
}
