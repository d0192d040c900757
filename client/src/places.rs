//! Results that fit one place alone: what binds them to a root's path.
//!
//! Roots are variables in what is stored, so that a moved checkout hits. That is wrong where a run has looked beside a
//! root, or where a root's path in its output came from somewhere else; then the root's place joins the input set.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use cachec_protocol::{Digest, Input, InputKind, Root};

use crate::unit::Unit;

/// The input that binds a result to a root's present path.
pub(crate) fn root_input(unit: &Unit, root: Root) -> Option<Input> {
    let path = unit.roots.path(root)?;
    Some(Input { kind: InputKind::Root, name: root.name().into(), digest: Some(Digest::of(path)) })
}

/// Directories of the system, which nobody reaches by going up from a checkout.
const SYSTEM_DIRECTORIES: [&str; 13] = [
    "/etc",
    "/usr/bin",
    "/usr/include",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/libexec",
    "/usr/local/bin",
    "/usr/local/include",
    "/usr/local/lib",
    "/usr/local/share",
    "/usr/sbin",
    "/usr/share",
];

/// The inputs that bind a result to the places of roots that it has looked beside: from another place, the same way
/// (`../VERSION`, or one made of the root's own path) leads to another file.
pub(crate) fn beside_roots(unit: &Unit, inputs: &[Input]) -> Vec<Input> {
    let of_files = [
        InputKind::File,
        InputKind::Absent,
        InputKind::Directory,
        InputKind::Link,
        InputKind::Listing,
        InputKind::Mode,
    ];
    let movable = [Root::Workspace, Root::Target, Root::CargoHome];
    let mut bindings = Vec::new();
    for input in inputs.iter().filter(|input| of_files.contains(&input.kind)) {
        let Some(path) =
            unit.roots.expand(&input.name).ok().map(|path| PathBuf::from(OsStr::from_bytes(&path)))
        else {
            continue;
        };
        for root in movable {
            let Some(place) = unit.roots.path(root).map(|place| Path::new(OsStr::from_bytes(place))) else {
                continue;
            };
            let is_in_a_root = unit
                .roots
                .iter()
                .any(|(known, place)| known != Root::Home && path.starts_with(OsStr::from_bytes(place)));
            if !is_in_a_root && is_beside(unit, &path, place) {
                bindings.extend(place_input(unit, root, &path));
            }
        }
    }
    bindings.sort_unstable();
    bindings.dedup();
    bindings
}

/// Whether a path and a root have more in common than the top of the file system, and the path is not searched by
/// a name of its own.
fn is_beside(unit: &Unit, path: &Path, place: &Path) -> bool {
    let top = path.ancestors().find(|ancestor| place.starts_with(ancestor)).unwrap_or(Path::new("/"));
    let temporary = unit.temporary_directory();
    let is_temporary = path.starts_with(&temporary) && !place.starts_with(&temporary);
    let is_system = SYSTEM_DIRECTORIES
        .iter()
        .any(|directory| path.starts_with(directory) && !place.starts_with(directory));
    // Directories around the root are there wherever it is.
    top != Path::new("/") && top != path && !is_system && !is_temporary && !unit.is_searched(path)
}

/// Binds a result to a root's place: its path, or where both are below the home directory, its path from there.
pub(crate) fn place_input(unit: &Unit, root: Root, path: &Path) -> Option<Input> {
    let place = unit.roots.path(root)?;
    let home = unit.roots.path(Root::Home).map(|home| Path::new(OsStr::from_bytes(home)));
    match home.filter(|home| path.starts_with(home)) {
        Some(home) => {
            let from_home = Path::new(OsStr::from_bytes(place)).strip_prefix(home).ok()?;
            let digest = Some(Digest::of(from_home.as_os_str().as_bytes()));
            Some(Input { kind: InputKind::Place, name: root.name().into(), digest })
        }
        None => root_input(unit, root),
    }
}

/// Which of some roots the files of an input set name by their literal paths: where those come from there, they do
/// not mean the root.
pub(crate) fn named_in_files(unit: &Unit, inputs: &[Input], roots: &[Root]) -> Vec<Root> {
    let mut named = Vec::new();
    if roots.is_empty() {
        return named;
    }
    for input in inputs {
        let Ok(path) = unit.roots.expand(&input.name) else { continue };
        let path = OsStr::from_bytes(&path);
        let text = match input.kind {
            InputKind::File => fs::read(path).unwrap_or_default(),
            InputKind::Link => {
                fs::read_link(path).map(|link| link.into_os_string().into_vec()).unwrap_or_default()
            }
            _ => continue,
        };
        // A program holds paths for other reasons.
        let is_program = text.starts_with(b"\x7fELF");
        let present =
            unit.roots.found_in(&text).into_iter().filter(|root| !is_program && roots.contains(root));
        named.extend(present.filter(|root| !named.contains(root)).collect::<Vec<_>>());
    }
    named
}
