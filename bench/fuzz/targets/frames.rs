//! Frame headers, from any bytes: what is read is written as the same bytes again.
#![no_main]

use cachec_protocol::frame::{Frame, HEADER_BYTES};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|header: [u8; HEADER_BYTES]| {
    if let Ok(frame) = Frame::from_header(&header) {
        assert_eq!(Frame::from_header(&frame.to_header()), Ok(frame));
    }
});
