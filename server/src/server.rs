//! One server, from its configuration to its end.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::app::{self, App, Limits};
use crate::connection::{self, Deadlines};
use crate::metrics::Metrics;
use crate::store::embedded::{Embedded, EmbeddedOptions};
use crate::store::metered::Metered;
use crate::tokens::Tokens;

/// How often the store does its housekeeping, and so the most that a power cut forgets.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(1);

/// What a server is started with.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The store.
    pub store: EmbeddedOptions,
    /// The level at which blobs are compressed again, if they are.
    pub recompress_level: Option<i32>,
    /// Whether it may listen beyond loopback without tokens.
    pub open: bool,
    /// What bounds its work.
    pub limits: Limits,
    /// How long clients may take.
    pub deadlines: Deadlines,
}

/// A server that listens, and is about to serve.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    store: Embedded,
    recompress_level: Option<i32>,
    app: App,
    deadlines: Deadlines,
}

impl Server {
    /// Opens the store and listens.
    ///
    /// # Errors
    /// A store that cannot be opened, an address that cannot be had, or one beyond loopback without tokens.
    pub async fn bind(options: ServerOptions) -> anyhow::Result<Self> {
        let data = options.store.directory.clone();
        let tokens = Tokens::open(&data).with_context(|| format!("cannot use {}", data.display()))?;
        if !options.listen.ip().is_loopback() && !options.open && !tokens.are_needed()? {
            bail!(
                "{} is not a loopback address and there is no token; create one with `cachec-server token \
                 create`, or allow everybody with `--open`",
                options.listen
            );
        }
        let store_options = options.store;
        let store = tokio::task::spawn_blocking(move || Embedded::open(&store_options))
            .await?
            .with_context(|| format!("cannot open the store in {}", data.display()))?;
        let listener = TcpListener::bind(options.listen)
            .await
            .with_context(|| format!("cannot listen on {}", options.listen))?;
        let metrics = Arc::new(Metrics::new()?);
        let metered = Metered::new(store.clone(), Arc::clone(&metrics));
        let app = App::new(Arc::new(metered), Arc::new(tokens), metrics, options.limits);
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            store,
            recompress_level: options.recompress_level,
            app,
            deadlines: options.deadlines,
        })
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

    /// Serves until `stop` is ready, and then until the requests in flight are answered.
    pub async fn serve(self, stop: impl Future<Output = ()>) {
        let recompression = self.recompress_level.and_then(|level| {
            let started = self.store.recompress(level);
            started.inspect_err(|error| tracing::error!(%error, "blobs are not recompressed")).ok()
        });
        let maintenance = tokio::spawn(maintain(self.store));
        let metrics = Arc::clone(&self.app.metrics);
        connection::serve(self.listener, app::router(self.app), metrics, self.deadlines, stop).await;
        maintenance.abort();
        // Waits for its thread.
        let _ = tokio::task::spawn_blocking(move || drop(recompression)).await;
    }
}

/// A server in the background of a test.
pub struct RunningServer {
    /// Its URL, without a slash at the end.
    pub url: String,
    store: Embedded,
    stop: tokio::sync::oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl RunningServer {
    /// Starts a server in the present runtime.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub async fn start(options: ServerOptions) -> anyhow::Result<Self> {
        let server = Server::bind(options).await?;
        let url = format!("http://{}", server.address());
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
        self.task.await?;
        self.store.close()?;
        Ok(())
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
