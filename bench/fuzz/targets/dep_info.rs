//! Dep-info files of any bytes: no panic, and what is read means the same when it is written down again.
#![no_main]

#[path = "../../../client/src/dep_info.rs"]
mod dep_info;

use dep_info::DepInfo;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let Ok(first) = DepInfo::parse(text) else { return };
    let second = DepInfo::parse(&written(&first)).expect("what was written can be read");
    assert_eq!(first, second);
});

/// As rustc would write it.
fn written(dep_info: &DepInfo) -> Vec<u8> {
    let mut text = Vec::new();
    for file in &dep_info.files {
        text.extend_from_slice(b"x: ");
        file.iter().for_each(|byte| match byte {
            b' ' => text.extend_from_slice(b"\\ "),
            byte => text.push(*byte),
        });
        text.extend_from_slice(b" \n");
    }
    for (name, value) in &dep_info.variables {
        text.extend_from_slice(b"# env-dep:");
        escape(name, &mut text);
        if let Some(value) = value {
            text.push(b'=');
            escape(value, &mut text);
        }
        text.push(b'\n');
    }
    text
}

fn escape(value: &[u8], text: &mut Vec<u8>) {
    for byte in value {
        match byte {
            b'\\' => text.extend_from_slice(b"\\\\"),
            b'\n' => text.extend_from_slice(b"\\n"),
            b'\r' => text.extend_from_slice(b"\\r"),
            byte => text.push(*byte),
        }
    }
}
