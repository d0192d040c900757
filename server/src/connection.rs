//! Connections: accepted, bounded in number and time, and drained at the end.
//!
//! `axum::serve` sets no timers, so that hyper's own deadlines do nothing there; hence this loop. Deadlines:
//!
//! | a client that | is dropped after |
//! |---|---|
//! | does not finish the TLS handshake | [`Deadlines::handshake`] |
//! | sends no whole request after connecting | [`Deadlines::first_request`] |
//! | sends a header too slowly, or is idle (HTTP/1) | [`Deadlines::header`] |
//! | does not answer pings (HTTP/2) | [`Deadlines::ping`], twice |
//! | takes nothing of what is sent | [`Deadlines::write`] |
//! | sends a body too slowly | see [`crate::body`] |
//!
//! Connections are bounded in all, where more wait to be accepted, and for each address, where more are closed at once.

use std::future::{Future, pending};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_util::either::Either;
use tower::ServiceExt;

use crate::addresses::{Addresses, Counted};
use crate::metrics::Metrics;

/// HTTP/2 receive window of one upload: 25 MB/s over a line of 20 ms.
const STREAM_WINDOW_BYTES: u32 = 512 << 10;
const MAX_STREAMS: u32 = 64;

/// All streams' windows together. Were it less, uploads that wait for their turn could fill it, and those whose
/// turn it is would wait for them.
const CONNECTION_WINDOW_BYTES: u32 = MAX_STREAMS * STREAM_WINDOW_BYTES;

const MAX_HEADER_BYTES: u32 = 16 << 10;

/// HTTP/1 read buffer, and so the longest header.
const HTTP1_BUFFER_BYTES: usize = 64 << 10;

/// How long clients may take.
#[derive(Debug, Clone)]
pub struct Deadlines {
    /// For the TLS handshake.
    pub handshake: Duration,
    /// From the connection to its first request.
    pub first_request: Duration,
    /// For a request's header in HTTP/1, and for being idle.
    pub header: Duration,
    /// Between two pings in HTTP/2, and for the answer to one.
    pub ping: Duration,
    /// For taking any of the bytes that are sent.
    pub write: Duration,
    /// For requests in flight when the server is told to stop.
    pub drain: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            first_request: Duration::from_secs(30),
            header: Duration::from_secs(60),
            ping: Duration::from_secs(20),
            write: Duration::from_secs(60),
            drain: Duration::from_secs(30),
        }
    }
}

/// What connections are served with.
pub struct Connections {
    /// The application.
    pub router: Router,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// How long clients may take.
    pub deadlines: Deadlines,
    /// Most connections at a time.
    pub max_connections: usize,
    /// Most connections of one address at a time.
    pub max_connections_per_address: usize,
    /// What makes connections secure, if they are to be.
    pub tls: Option<TlsAcceptor>,
}

/// Serves until `stop` is ready; then finishes the requests in flight, within [`Deadlines::drain`].
pub async fn serve(listener: TcpListener, connections: Connections, stop: impl Future<Output = ()>) {
    let slots = Slots {
        all: Arc::new(Semaphore::new(connections.max_connections)),
        addresses: Addresses::new(connections.max_connections_per_address),
    };
    let graceful = GracefulShutdown::new();
    let server = Server { builder: builder(&connections.deadlines), connections };
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = slots.accept(&listener) => accepted,
        };
        match accepted {
            Ok((stream, Some(slot))) => server.spawn(stream, slot, &graceful),
            Ok((_, None)) => server.connections.metrics.refused_connections.inc(),
            Err(error) => {
                // Mostly: no more descriptors. Some come back when connections end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    if tokio::time::timeout(server.connections.deadlines.drain, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests were still in flight when the server stopped");
    }
}

/// Which connections may be there at the same time.
struct Slots {
    all: Arc<Semaphore>,
    addresses: Addresses,
}

/// A connection's right to be there.
struct Slot {
    _of_all: OwnedSemaphorePermit,
    _of_address: Counted,
}

impl Slots {
    /// The next connection; without a slot where its address has too many.
    async fn accept(&self, listener: &TcpListener) -> io::Result<(TcpStream, Option<Slot>)> {
        let of_all = Arc::clone(&self.all).acquire_owned().await.map_err(io::Error::other)?;
        let (stream, peer) = listener.accept().await?;
        let of_address = self.addresses.admit(peer.ip());
        Ok((stream, of_address.map(|of_address| Slot { _of_all: of_all, _of_address: of_address })))
    }
}

struct Server {
    builder: Builder<TokioExecutor>,
    connections: Connections,
}

impl Server {
    fn spawn(&self, stream: TcpStream, slot: Slot, graceful: &GracefulShutdown) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot turn off Nagle's algorithm");
        }
        let Connections { router, metrics, deadlines, tls, .. } = &self.connections;
        let began = Arc::new(AtomicBool::new(false));
        let mark = Arc::clone(&began);
        let service = router.clone().map_request(move |request: Request<Incoming>| {
            mark.store(true, Ordering::Relaxed);
            request.map(Body::new)
        });
        let stream = WriteDeadline::new(stream, deadlines.write);
        let (builder, tls, watcher) = (self.builder.clone(), tls.clone(), graceful.watcher());
        let (handshake, first_request) = (deadlines.handshake, deadlines.first_request);
        let connection = async move {
            let stream = match tls {
                None => Either::Left(stream),
                Some(tls) => Either::Right(tokio::time::timeout(handshake, tls.accept(stream)).await??),
            };
            let service = TowerToHyperService::new(service);
            let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
            watcher.watch(connection).await
        };
        let gauge = metrics.connections.clone();
        tokio::spawn(async move {
            gauge.inc();
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "a connection failed");
                },
                () = silence(first_request, &began) => tracing::debug!("a connection made no request"),
            }
            gauge.dec();
            drop(slot);
        });
    }
}

/// Ready after `limit` where no request began until then.
async fn silence(limit: Duration, began: &AtomicBool) {
    tokio::time::sleep(limit).await;
    if began.load(Ordering::Relaxed) {
        pending::<()>().await;
    }
}

fn builder(deadlines: &Deadlines) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(deadlines.header)
        .max_buf_size(HTTP1_BUFFER_BYTES)
        .keep_alive(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_BYTES)
        .keep_alive_interval(deadlines.ping)
        .keep_alive_timeout(deadlines.ping);
    builder
}

/// A stream whose writes fail when the peer takes nothing for too long.
struct WriteDeadline<S> {
    stream: S,
    limit: Duration,
    /// Runs while a write waits.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> WriteDeadline<S> {
    const fn new(stream: S, limit: Duration) -> Self {
        Self { stream, limit, timer: None }
    }

    fn watch<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.timer = None;
            return written;
        }
        let limit = self.limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(timer.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteDeadline<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteDeadline<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.watch(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
