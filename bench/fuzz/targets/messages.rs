//! Every message, from any bytes: no panic, and what is read is written and read as the same again.
#![no_main]

use cachec_protocol::codec::Message;
use cachec_protocol::message::{BlobList, ErrorBody, LookupRequest, LookupResponse, Manifest, PublishRequest};
use cachec_protocol::{BuildRecord, StoredResult, decode, encode};
use libfuzzer_sys::fuzz_target;

macro_rules! round_trip {
    ($message:ty, $bytes:expr) => {
        if let Ok(first) = decode::<$message>($bytes) {
            let bytes = encode(&first);
            assert!(bytes.len() <= <$message>::LIMIT_BYTES);
            let second: $message = decode(&bytes).expect("what was written can be read");
            assert_eq!(encode(&second), bytes);
        }
    };
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    match which % 6 {
        0 => round_trip!(LookupRequest, bytes),
        1 => {
            round_trip!(LookupResponse, bytes);
            if let Ok(answer) = decode::<LookupResponse>(bytes) {
                answer.manifests.iter().flat_map(Manifest::readable_results).for_each(drop);
            }
        }
        2 => round_trip!(BlobList, bytes),
        3 => round_trip!(ErrorBody, bytes),
        4 => {
            round_trip!(PublishRequest, bytes);
            if let Ok(request) = decode::<PublishRequest>(bytes) {
                let _ = (request.result.result_key(), request.result.packed_bytes());
            }
        }
        _ => {
            round_trip!(StoredResult, bytes);
            if let Ok(result) = decode::<StoredResult>(bytes) {
                let _ = BuildRecord::from_result(&result);
            }
        }
    }
});
