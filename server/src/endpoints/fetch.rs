//! `POST /v1/{namespace}/fetch`: several blobs in one stream of [`cachec_protocol::frame`]s, in the order
//! asked for.

use std::io;
use std::vec;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use cachec_protocol::Digest;
use cachec_protocol::frame::{Frame, MAGIC};
use cachec_protocol::message::{BlobList, FRAMES};

use crate::access::Reader;
use crate::app::App;
use crate::body::RequestBody;
use crate::error::ApiError;
use crate::namespace::Namespace;
use crate::store::BlobReader;

/// Starts the stream. One blob is open, and one step of it held, at a time.
pub async fn post(
    State(app): State<App>,
    Reader(namespace, _place): Reader,
    request: Request,
) -> Result<Response, ApiError> {
    let BlobList { digests } = RequestBody::new(&app, request.into_body()).message().await?;
    Ok(Stream::new(app, namespace, vec![Bytes::from_static(&MAGIC)], digests).into_response())
}

/// A stream of frames: what is at hand, then blobs.
pub(super) struct Stream {
    app: App,
    namespace: Namespace,
    first: vec::IntoIter<Bytes>,
    digests: vec::IntoIter<Digest>,
    state: Position,
}

enum Position {
    Between,
    Within(BlobReader),
    Ended,
}

impl Stream {
    pub(super) fn new(app: App, namespace: Namespace, first: Vec<Bytes>, digests: Vec<Digest>) -> Self {
        let (first, digests) = (first.into_iter(), digests.into_iter());
        Self { app, namespace, first, digests, state: Position::Between }
    }

    pub(super) fn into_response(self) -> Response {
        let steps = futures_util::stream::try_unfold(self, async |mut stream: Self| {
            Ok::<_, io::Error>(stream.next().await?.map(|step| (step, stream)))
        });
        ([(CONTENT_TYPE, FRAMES)], Body::from_stream(steps)).into_response()
    }

    /// The next bytes of the stream. An error breaks it off, without an end frame.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let step = self.step().await?;
        self.app.metrics.sent_bytes.inc_by(step.as_ref().map_or(0, Bytes::len) as u64);
        Ok(step)
    }

    async fn step(&mut self) -> io::Result<Option<Bytes>> {
        if let Some(bytes) = self.first.next() {
            return Ok(Some(bytes));
        }
        match &mut self.state {
            Position::Within(reader) => {
                if let Some(chunk) = reader.next_chunk().await? {
                    return Ok(Some(chunk));
                }
            }
            Position::Between => {}
            Position::Ended => return Ok(None),
        }
        let frame = match self.digests.next() {
            None => {
                self.state = Position::Ended;
                Frame::End
            }
            Some(digest) => self.open(digest).await?,
        };
        Ok(Some(Bytes::copy_from_slice(&frame.to_header())))
    }

    async fn open(&mut self, digest: Digest) -> io::Result<Frame> {
        let opened = self.app.store.open_blob(self.namespace.clone(), digest).await;
        let opened = opened.map_err(|error| io::Error::other(ApiError::from(error).code))?;
        let Some(blob) = opened else {
            self.state = Position::Between;
            return Ok(Frame::Absent(digest));
        };
        let body_bytes = blob.stored_bytes;
        self.state = Position::Within(blob.into_reader());
        Ok(Frame::Blob { digest, body_bytes })
    }
}
