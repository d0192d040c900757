//! Packs: all outputs of one result, one after the other, in one zstd frame.
//!
//! Long-distance matching finds the `.rmeta` again inside the `.rlib` that follows it. The window is large
//! enough for the whole pack up to [`MAX_WINDOW_LOG`], and no larger than the pack needs, since a reader
//! must hold a window's worth of memory.
//!
//! Blobs of any other kind are compressed the same way. Readers count what comes out: more bytes than were
//! announced, or a window over the limit, means a corrupt blob, not memory.

use std::io::{self, BufReader, Read, Write};

use crate::digest::Digest;

/// Largest window, as a power of two: 32 MiB. Memory that one reader needs at most, a little aside.
pub const MAX_WINDOW_LOG: u32 = 25;

/// Smallest window: below, zstd's own parameters are better.
const MIN_WINDOW_LOG: u32 = 17;

/// Level used for uploads: on the client, time counts more than the last tenth of the size.
pub const UPLOAD_LEVEL: i32 = 3;

/// A compressing writer for content of `content_bytes` bytes; call `finish` on it at the end.
///
/// # Errors
/// Those of zstd's set-up, which only fails for lack of memory, and later those of `writer`.
pub fn compressor<W: Write>(writer: W, length: Length, level: i32) -> io::Result<zstd::Encoder<'static, W>> {
    let mut encoder = zstd::Encoder::new(writer, level)?;
    let (Length::Exactly(content_bytes) | Length::About(content_bytes)) = length;
    let window_log = content_bytes.next_power_of_two().trailing_zeros().clamp(MIN_WINDOW_LOG, MAX_WINDOW_LOG);
    encoder.window_log(window_log)?;
    encoder.long_distance_matching(content_bytes > 1 << MIN_WINDOW_LOG)?;
    if length == Length::Exactly(content_bytes) {
        encoder.include_contentsize(true)?;
        encoder.set_pledged_src_size(Some(content_bytes))?;
    }
    Ok(encoder)
}

/// How many bytes are going to be compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// So many, or compressing fails.
    Exactly(u64),
    /// So many, more or less: decides how far back matches are looked for.
    About(u64),
}

/// Compresses bytes that are at hand.
///
/// # Errors
/// As [`compressor`].
pub fn compress(content: &[u8], level: i32) -> io::Result<Vec<u8>> {
    let mut encoder = compressor(Vec::new(), Length::Exactly(content.len() as u64), level)?;
    encoder.write_all(content)?;
    encoder.finish()
}

/// A decompressing reader that counts what it yields.
pub struct Contents<R: Read> {
    inner: io::Take<zstd::Decoder<'static, BufReader<R>>>,
    limit_bytes: u64,
}

impl<R: Read> Contents<R> {
    /// Reads zstd frames from `compressed`, of at most `limit_bytes` content.
    ///
    /// # Errors
    /// Those of zstd's set-up. Reading fails with `InvalidData` where the content is over the limit, the
    /// window is over [`MAX_WINDOW_LOG`] or the data is corrupt, with `UnexpectedEof` where it is cut off.
    pub fn new(compressed: R, limit_bytes: u64) -> io::Result<Self> {
        let mut decoder = zstd::Decoder::new(compressed)?;
        decoder.window_log_max(MAX_WINDOW_LOG)?;
        Ok(Self { inner: decoder.take(limit_bytes.saturating_add(1)), limit_bytes })
    }

    /// Content bytes that were read so far.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        self.limit_bytes.saturating_add(1) - self.inner.limit()
    }
}

impl<R: Read> Read for Contents<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if self.content_bytes() > self.limit_bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more content than announced"));
        }
        Ok(count)
    }
}

/// [`Contents`] that are hashed as a whole.
pub struct Decompressor<R: Read> {
    contents: Contents<R>,
    hasher: blake3::Hasher,
}

impl<R: Read> Decompressor<R> {
    /// # Errors
    /// As [`Contents::new`].
    pub fn new(compressed: R, limit_bytes: u64) -> io::Result<Self> {
        Ok(Self { contents: Contents::new(compressed, limit_bytes)?, hasher: blake3::Hasher::new() })
    }

    /// Content bytes that were read so far.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        self.contents.content_bytes()
    }

    /// Reads what is left, and returns digest and length of the whole content.
    ///
    /// # Errors
    /// As for reading.
    pub fn finish(mut self) -> io::Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((self.hasher.finalize().into(), self.content_bytes()))
    }
}

impl<R: Read> Read for Decompressor<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.contents.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that do not compress by themselves.
    fn noise(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    fn read_all(compressed: &[u8], limit: u64) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        Decompressor::new(compressed, limit)?.read_to_end(&mut content)?;
        Ok(content)
    }

    #[test]
    fn a_repetition_far_behind_costs_nothing() {
        let rmeta = noise(3 << 20);
        let pack = [rmeta.as_slice(), &noise(1 << 20), &rmeta].concat();
        let compressed = compress(&pack, UPLOAD_LEVEL).unwrap();
        assert!(compressed.len() < rmeta.len() + (64 << 10), "{} bytes", compressed.len());
        assert_eq!(
            Decompressor::new(compressed.as_slice(), pack.len() as u64).unwrap().finish().unwrap(),
            (Digest::of(&pack), pack.len() as u64)
        );
    }

    #[test]
    fn more_content_than_announced_is_an_error() {
        let compressed = compress(&vec![0; 1 << 20], UPLOAD_LEVEL).unwrap();
        let error = read_all(&compressed, (1 << 20) - 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(read_all(&compressed, 1 << 20).unwrap().len(), 1 << 20);
    }

    #[test]
    fn a_truncated_pack_is_an_error() {
        let compressed = compress(&noise(100_000), UPLOAD_LEVEL).unwrap();
        for cut in [0, 1, 4, 50_000, compressed.len() - 1] {
            let result = read_all(&compressed[..cut], 1 << 20);
            assert!(cut == 0 || result.is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_window_over_the_limit_is_refused() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
        encoder.window_log(MAX_WINDOW_LOG + 1).unwrap();
        io::copy(&mut noise(1 << 20).as_slice(), &mut encoder).unwrap();
        let compressed = encoder.finish().unwrap();
        assert!(read_all(&compressed, 1 << 30).is_err());
    }

    proptest! {
        #[test]
        fn packs_round_trip(content in prop::collection::vec(any::<u8>(), 0..5000)) {
            let compressed = compress(&content, UPLOAD_LEVEL).unwrap();
            prop_assert_eq!(read_all(&compressed, content.len() as u64).unwrap(), content);
        }

        #[test]
        fn garbage_never_panics(content in prop::collection::vec(any::<u8>(), 0..500)) {
            let _ = read_all(&content, 1 << 16);
        }
    }
}
