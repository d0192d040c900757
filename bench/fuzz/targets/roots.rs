//! Roots in any text: a text that was made portable is the same text again at the same place.
#![no_main]

use cachec_protocol::roots::{Root, Roots};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|parts: (Vec<u8>, Vec<u8>, Vec<u8>)| {
    let (first, second, text) = parts;
    if [&first, &second].iter().any(|path| !path.starts_with(b"/") || path.len() < 2 || path.contains(&0)) {
        return;
    }
    let roots = Roots::new([(Root::Workspace, first), (Root::CargoHome, second)]);
    if let Ok(portable) = roots.normalise(&text) {
        assert_eq!(roots.expand(&portable).expect("it can be expanded"), text);
    }
    let _ = (roots.expand(&text), roots.found_in(&text), roots.parents_found_in(&text));
});
