//! A compiler's command line, of any words.
#![no_main]

use cachec_protocol::arguments;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let words: Vec<Vec<u8>> = bytes.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
    let _ = arguments::parse(&words);
});
