//! Packs, from any bytes: no more content comes out than was allowed, whatever their headers say.
#![no_main]

use std::io::Read;

use cachec_protocol::Digest;
use cachec_protocol::pack::Decompressor;
use libfuzzer_sys::fuzz_target;

const LIMIT_BYTES: u64 = 1 << 16;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut pack) = Decompressor::new(bytes, LIMIT_BYTES) else { return };
    let mut content = Vec::new();
    let read = pack.read_to_end(&mut content);
    assert!(content.len() as u64 <= LIMIT_BYTES);
    if read.is_ok()
        && let Ok((digest, content_bytes)) = pack.finish()
    {
        assert_eq!((digest, content_bytes), (Digest::of(&content), content.len() as u64));
    }
});
