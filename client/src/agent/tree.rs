//! A build script's output directory: all of it is the result.
//!
//! Files, directories and symbolic links that stay inside, with their permissions; owners and times are not kept.
//! Anything else in there makes the run not stored.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path};

use cachec_protocol::result::MAX_OUTPUTS;

use super::record::{OpenOutput, Source};
use crate::inputs::NotStorable;
use crate::memo::Identity;

/// A larger directory is made faster than it is kept and sent.
const MAX_TREE_BYTES: u64 = 1 << 30;

/// A file up to this size may be text, in which roots are looked for.
pub(super) const MAX_TEXT_BYTES: u64 = 4 << 20;

/// Everything below a directory, each entry behind the directory it is in.
pub(super) fn walk(root: &Path, umask: u32) -> Result<Vec<OpenOutput>, NotStorable> {
    if !fs::symlink_metadata(root).is_ok_and(|metadata| metadata.is_dir()) {
        return Err(NotStorable::MissingOutput);
    }
    let mut outputs = Vec::new();
    let mut size_bytes = 0;
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).map_err(|_| NotStorable::MissingOutput)? {
            let path = entry?.path();
            let output = open(root, &path, umask)?;
            if matches!(output.source, Source::Directory) {
                directories.push(path);
            }
            size_bytes += output.identity.size_bytes;
            outputs.push(output);
            if outputs.len() > MAX_OUTPUTS || size_bytes > MAX_TREE_BYTES {
                return Err(NotStorable::LargeOutDir);
            }
        }
    }
    outputs.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(outputs)
}

fn open(root: &Path, path: &Path, umask: u32) -> Result<OpenOutput, NotStorable> {
    let name = path.strip_prefix(root).ok().and_then(Path::to_str).ok_or(NotStorable::UnusualOutput)?;
    let metadata = fs::symlink_metadata(path)?;
    let source = match metadata.file_type() {
        kind if kind.is_file() => Source::At(path.to_owned()),
        kind if kind.is_dir() => Source::Directory,
        kind if kind.is_symlink() => {
            let target = fs::read_link(path)?
                .into_os_string()
                .into_string()
                .map_err(|_| NotStorable::UnusualOutput)?;
            if !stays_inside(name, &target) {
                return Err(NotStorable::LinkLeadsOut);
            }
            Source::Link(target)
        }
        _ => return Err(NotStorable::UnusualOutput),
    };
    let executable = metadata.is_file() && metadata.mode() & 0o100 != 0;
    if metadata.mode() & 0o7000 != 0 {
        return Err(NotStorable::UnusualOutput);
    }
    let usual = if executable || metadata.is_dir() { 0o777 } else { 0o666 } & !umask;
    let mode = metadata.mode() & 0o777;
    let permissions = (mode != usual && !metadata.is_symlink()).then_some(mode);
    let identity = Identity::of(&metadata);
    Ok(OpenOutput { name: name.to_owned(), source, identity, executable, permissions })
}

/// Whether a link's text leads to a place below the output directory, whatever the names on its way are there: it
/// goes up at its beginning alone, and not too far.
pub(super) fn stays_inside(name: &str, target: &str) -> bool {
    let depth = name.split('/').count() - 1;
    let components = || Path::new(target).components().filter(|component| *component != Component::CurDir);
    let up = components().take_while(|component| *component == Component::ParentDir).count();
    let plain = components().skip(up).all(|component| matches!(component, Component::Normal(_)));
    plain && up <= depth && !target.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_lead_out_are_found() {
        for (name, target) in [("a", "b"), ("lib/a.so", "a.so.1"), ("lib/a", "../include/a"), ("a", "./b")] {
            assert!(stays_inside(name, target), "{name} -> {target}");
        }
        for (name, target) in
            [("a", "/etc/passwd"), ("a", "../b"), ("lib/a", "../../b"), ("a", "b/../../c"), ("a", "")]
        {
            assert!(!stays_inside(name, target), "{name} -> {target}");
        }
    }

    #[test]
    fn a_directory_comes_before_what_is_in_it() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("b/c")).unwrap();
        fs::write(root.path().join("b/c/file"), "").unwrap();
        fs::write(root.path().join("b-file"), "").unwrap();
        std::os::unix::fs::symlink("b/c", root.path().join("a")).unwrap();
        let names: Vec<String> =
            walk(root.path(), 0o022).unwrap().into_iter().map(|output| output.name).collect();
        assert_eq!(names, ["a", "b", "b-file", "b/c", "b/c/file"]);
        std::os::unix::fs::symlink("/etc", root.path().join("out")).unwrap();
        assert!(walk(root.path(), 0o022).is_err());
    }
}
