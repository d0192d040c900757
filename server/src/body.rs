//! Request bodies: counted, paced, and bounded; and bodies of responses that are sent in steps.
//!
//! A body may be silent for [`Limits::body_idle`](crate::app::Limits) at most, and must keep a least average
//! rate behind a head start of the same length. Only time that is spent waiting for the sender counts.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use axum::http::{HeaderValue, StatusCode, Version};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use cachec_protocol::DecodeError;
use cachec_protocol::codec::{self, Message};
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use minicbor::Decode;
use tokio::sync::mpsc;

use crate::app::App;
use crate::error::ApiError;
use crate::store::{BlobReader, BlobSource, OpenBlob};
use crate::turns::Turn;

/// Pieces of a body that wait between the connection and the thread that verifies it.
const WAITING_PIECES: usize = 4;

/// Most bytes that are read only to be thrown away, before the connection is closed instead. More than any
/// message may have.
const DISCARD_BYTES: u64 = 64 << 20;

/// A request body that is being read.
pub struct RequestBody<'a> {
    app: &'a App,
    body: Body,
    announced_bytes: Option<u64>,
    received_bytes: u64,
    waited: Duration,
}

impl<'a> RequestBody<'a> {
    /// Begins to read.
    #[must_use]
    pub fn new(app: &'a App, body: Body) -> Self {
        let announced_bytes = body.size_hint().exact();
        Self { app, body, announced_bytes, received_bytes: 0, waited: Duration::ZERO }
    }

    /// Its length, where the sender said it.
    #[must_use]
    pub const fn announced_bytes(&self) -> Option<u64> {
        self.announced_bytes
    }

    /// The next piece; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            let limits = &self.app.limits;
            let earned = Duration::from_secs(self.received_bytes / limits.body_bytes_per_second.max(1));
            let patience = limits.body_idle.saturating_add(earned).saturating_sub(self.waited);
            let started = Instant::now();
            let frame = tokio::time::timeout(patience.min(limits.body_idle), self.body.frame()).await;
            self.waited += started.elapsed();
            match frame {
                Err(_) => return Err(ApiError::BODY_STALLED),
                Ok(None) => return Ok(None),
                Ok(Some(Err(_))) => return Err(ApiError::BODY_ABORTED),
                Ok(Some(Ok(frame))) => {
                    // Trailers say nothing here.
                    let Ok(data) = frame.into_data() else { continue };
                    self.received_bytes += data.len() as u64;
                    self.app.metrics.received_bytes.inc_by(data.len() as u64);
                    return Ok(Some(data));
                }
            }
        }
    }

    /// Reads a whole body of at most `limit_bytes`.
    ///
    /// # Errors
    /// [`ApiError::TOO_LARGE`], unread where its length was announced; the errors of a slow or broken body.
    pub async fn collect(mut self, limit_bytes: usize) -> Result<Vec<u8>, ApiError> {
        let announced = self.announced_bytes.map_or(Ok(0), usize::try_from);
        let announced = announced.ok().filter(|length| *length <= limit_bytes).ok_or(ApiError::TOO_LARGE)?;
        let mut whole = Vec::with_capacity(announced);
        while let Some(piece) = self.next().await? {
            if whole.len() + piece.len() > limit_bytes {
                return Err(ApiError::TOO_LARGE);
            }
            whole.extend_from_slice(&piece);
        }
        Ok(whole)
    }

    /// Reads a message.
    ///
    /// # Errors
    /// As [`Self::collect`], and [`ApiError::MALFORMED_REQUEST`].
    pub async fn message<T: Message + for<'b> Decode<'b, ()>>(self) -> Result<T, ApiError> {
        let bytes = self.collect(T::LIMIT_BYTES).await?;
        codec::decode(&bytes).map_err(|error| match error {
            DecodeError::TooLarge { .. } => ApiError::TOO_LARGE,
            _ => ApiError::MALFORMED_REQUEST,
        })
    }

    /// Hands the body on, piece by piece, until it ends or nobody takes it any more.
    ///
    /// # Errors
    /// Those of a slow or broken body; the other side then sees it fail.
    pub async fn pump(&mut self, pieces: mpsc::Sender<Piece>) -> Result<(), ApiError> {
        while let Some(data) = self.next().await? {
            if pieces.send(Piece::Data(data)).await.is_err() {
                return Ok(());
            }
        }
        let _ = pieces.send(Piece::End).await;
        Ok(())
    }
}

/// Makes the connection usable for the response to a request whose body was not read to its end: an HTTP/1
/// client that is still sending may not look for an answer before it is done, and closing resets what it has not
/// read. A body that has not begun (`Expect: 100-continue`), and one on an HTTP/2 stream, needs no such care; a
/// very long one is not worth it.
pub async fn answer_when_sent(State(app): State<App>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    if parts.version >= Version::HTTP_2 || body.is_end_stream() {
        return next.run(Request::from_parts(parts, body)).await;
    }
    let expects = parts.headers.contains_key(EXPECT);
    let shared = SharedBody(Arc::new(Mutex::new(CountedBody { body, received_bytes: 0, ended: false })));
    let response = next.run(Request::from_parts(parts, Body::new(shared.clone()))).await;
    let (received_bytes, ended) = shared.progress();
    let has_not_begun = expects && received_bytes == 0;
    let has_stalled = response.status() == StatusCode::REQUEST_TIMEOUT;
    if !(ended || has_not_begun || has_stalled) {
        let mut rest = RequestBody::new(&app, Body::new(shared));
        while rest.received_bytes < DISCARD_BYTES && matches!(rest.next().await, Ok(Some(_))) {}
    }
    response
}

/// A body that a handler reads, and that can be read on when the handler is done with it.
#[derive(Clone)]
struct SharedBody(Arc<Mutex<CountedBody>>);

struct CountedBody {
    body: Body,
    received_bytes: u64,
    ended: bool,
}

impl SharedBody {
    fn lock(&self) -> MutexGuard<'_, CountedBody> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that were read, and whether there is nothing more to read.
    fn progress(&self) -> (u64, bool) {
        let counted = self.lock();
        (counted.received_bytes, counted.ended || counted.body.is_end_stream())
    }
}

impl HttpBody for SharedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut counted = self.lock();
        let polled = ready!(Pin::new(&mut counted.body).poll_frame(context));
        match &polled {
            Some(Ok(frame)) => counted.received_bytes += frame.data_ref().map_or(0, Bytes::len) as u64,
            Some(Err(_)) | None => counted.ended = true,
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.lock().body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.lock().body.size_hint()
    }
}

/// A piece of a body on its way to a thread.
pub enum Piece {
    /// Some bytes.
    Data(Bytes),
    /// The body ended as it should.
    End,
}

/// The thread's side of a body.
pub struct PieceReader {
    pieces: mpsc::Receiver<Piece>,
    piece: Bytes,
    ended: bool,
    /// Held until the thread is done, also where the request that began it is gone.
    _turn: Turn,
}

/// Connects a body with a thread that reads it.
#[must_use]
pub fn pieces(turn: Turn) -> (mpsc::Sender<Piece>, PieceReader) {
    let (sender, receiver) = mpsc::channel(WAITING_PIECES);
    (sender, PieceReader { pieces: receiver, piece: Bytes::new(), ended: false, _turn: turn })
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(data)) => self.piece = data,
                Some(Piece::End) => self.ended = true,
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        let count = self.piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

/// A response whose body is a blob; `guard` lives until its last bytes are sent.
pub fn blob_response<G: Send + 'static>(
    app: &App,
    blob: OpenBlob,
    media_type: &'static str,
    guard: G,
) -> Response {
    let length = blob.stored_bytes;
    let body = match blob.source {
        BlobSource::Memory(bytes) => {
            app.metrics.sent_bytes.inc_by(length);
            Body::from(Bytes::from_owner(Guarded { bytes, _guard: guard }))
        }
        BlobSource::File(_) => steps(app, blob.into_reader(), guard),
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}

/// Bytes that something is to outlive.
struct Guarded<G> {
    bytes: Bytes,
    _guard: G,
}

impl<G> AsRef<[u8]> for Guarded<G> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

fn steps<G: Send + 'static>(app: &App, reader: BlobReader, guard: G) -> Body {
    let sent_bytes = app.metrics.sent_bytes.clone();
    Body::from_stream(futures_util::stream::try_unfold(
        (reader, sent_bytes, guard),
        async |(mut reader, sent_bytes, guard): (BlobReader, prometheus::IntCounter, G)| {
            let Some(chunk) = reader.next_chunk().await? else { return Ok::<_, io::Error>(None) };
            sent_bytes.inc_by(chunk.len() as u64);
            Ok(Some((chunk, (reader, sent_bytes, guard))))
        },
    ))
}
