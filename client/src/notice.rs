//! Lines for the user, once a build.
//!
//! A wrapper is a new process for each unit, so what was said is remembered by a file named after cargo's
//! process (the parent) and the text.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use cachec_protocol::Digest;

/// A file this old belongs to a build that is over.
const FORGET_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Prints the line, unless another wrapper of the same cargo process has printed it. Where nothing can be
/// remembered, only units of the user's own packages print, which are few.
pub(crate) fn once(directory: &Path, text: &str) {
    let parent = rustix::process::getppid().map_or(0, |id| id.as_raw_nonzero().get());
    let said = directory.join("said");
    let _ = fs::create_dir_all(&said);
    forget_old(&said);
    let name = format!("{parent}-{}", &Digest::of(text.as_bytes()).to_string()[..16]);
    match File::create_new(said.join(name)) {
        Ok(_) => print(text),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(_) if std::env::var_os("CARGO_PRIMARY_PACKAGE").is_some() => print(text),
        Err(_) => {}
    }
}

/// Prints a line.
pub(crate) fn print(text: &str) {
    eprintln!("cachec: {text}");
}

fn forget_old(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        if modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > FORGET_AFTER)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
