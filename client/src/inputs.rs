//! Input sets: gathered after a run, checked before a restore.
//!
//! The inputs of a traced run are what it was seen to read. Without a tracer the inputs of a library unit are what rustc's dep-info names (source files, files of
//! `include!` and the like, variables of `env!`), the `--extern` files, every argument that names a file,
//! and the content of the directories in which native libraries are searched.
//!
//! Invariant: what cannot be established with certainty makes the unit not stored, or not matched.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cachec_protocol::{Digest, Input, InputKind, InputSet, Root};

use crate::dep_info::DepInfo;
use crate::memo::Memo;
use crate::tracer::{Access, Seen, Trace};
use crate::unit::Unit;

/// Why a run's result is not stored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotStorable {
    #[error("unreadable-input")]
    UnreadableInput,
    #[error("input-changed")]
    InputChanged,
    #[error("unnormalisable-path")]
    UnnormalisablePath,
    #[error("missing-output")]
    MissingOutput,
    #[error("malformed-dep-info")]
    MalformedDepInfo,
    #[error("large-streams")]
    LargeStreams,
    #[error("output-changed")]
    OutputChanged,
    #[error("untraced")]
    Untraced,
    #[error("writes-elsewhere")]
    WritesElsewhere,
    #[error("{0}")]
    Observed(String),
    #[error("io-error")]
    Io(#[from] io::Error),
}

/// Gathers what a traced run was seen to read. See the table of what is left out in [`is_left_out`].
pub(crate) fn from_trace(
    unit: &Unit,
    trace: &Trace,
    dep_info: &DepInfo,
    memo: &Memo,
    started_ns: i64,
) -> Result<Vec<Input>, NotStorable> {
    if let Some(obstacle) = &trace.obstacle {
        return Err(NotStorable::Observed(obstacle.clone()));
    }
    let gatherer = Gatherer { unit, memo, started_ns };
    let mut inputs = Vec::new();
    for access in trace.inputs.iter().filter(|access| !is_left_out(unit, access)) {
        inputs.push(match access.seen {
            Seen::File => gatherer.seen_file(access)?,
            Seen::Absent => gatherer.input(InputKind::Absent, &access.path, None)?,
            Seen::Directory => gatherer.input(InputKind::Directory, &access.path, None)?,
            Seen::Link => gatherer.input(InputKind::Link, &access.path, access.digest)?,
            Seen::Listing => gatherer.input(InputKind::Listing, &access.path, access.digest)?,
        });
    }
    for (name, value) in &dep_info.variables {
        gatherer.variable(name, value.as_deref(), dep_info, &mut inputs)?;
    }
    Ok(inputs)
}

/// What a run reads that is no input of its result:
///
/// | left out | why |
/// |---|---|
/// | below the sysroot | the toolchain's identity is in the action key |
/// | `/etc/ld.so.cache` | an index of libraries; the libraries that are loaded are inputs |
/// | the directory for temporary files itself | what the run makes there is its own |
/// | directories below the target directory | cargo makes them as it goes; files in them are inputs |
/// | directories around a root | they are there wherever the root is, under other names |
/// | `/proc`, `/dev` but `/dev/shm`, `/sys` | left out by the tracer: they describe machine and process |
fn is_left_out(unit: &Unit, access: &Access) -> bool {
    let path = Path::new(OsStr::from_bytes(&access.path));
    let around_root = || unit.root_directories().any(|root| root.starts_with(path));
    let in_target = || unit.target_directory.as_ref().is_some_and(|target| path.starts_with(target));
    unit.sysroots.iter().any(|sysroot| path.starts_with(sysroot))
        || path == Path::new("/etc/ld.so.cache")
        || (access.seen == Seen::Directory
            && (in_target() || around_root() || path == unit.temporary_directory()))
}

/// Gathers what a run read, from its dep-info. `started_ns` is the start of the run: a file that changed
/// later may not be what the compiler saw.
pub(crate) fn gather(
    unit: &Unit,
    dep_info: &DepInfo,
    memo: &Memo,
    started_ns: i64,
) -> Result<Vec<Input>, NotStorable> {
    let mut inputs = Vec::new();
    let gatherer = Gatherer { unit, memo, started_ns };
    for file in &dep_info.files {
        inputs.push(gatherer.file(file)?);
        if let Some(other) = other_module_file(file) {
            gatherer.absent(&other, &mut inputs)?;
        }
    }
    for file in unit.invocation.extern_files() {
        inputs.push(gatherer.file(file)?);
    }
    for argument in &unit.invocation.arguments {
        // Of `name=path` values (profile-use=…, linker=…, target=spec.json) the last part may be a file.
        let value = argument.value.as_deref().unwrap_or_default();
        let path = value.rsplit(|byte| *byte == b'=').next().unwrap_or_default();
        if unit.working_directory.join(OsStr::from_bytes(path)).is_file() {
            inputs.push(gatherer.file(path)?);
        }
    }
    for directory in unit.invocation.searched_directories() {
        gatherer.loadable_files(directory, &mut inputs)?;
    }
    for (name, value) in &dep_info.variables {
        gatherer.variable(name, value.as_deref(), dep_info, &mut inputs)?;
    }
    Ok(inputs)
}

struct Gatherer<'a> {
    unit: &'a Unit,
    memo: &'a Memo,
    started_ns: i64,
}

impl Gatherer<'_> {
    fn file(&self, path: &[u8]) -> Result<Input, NotStorable> {
        let absolute = self.unit.working_directory.join(OsStr::from_bytes(path));
        let (digest, identity) = self.memo.digest(&absolute).map_err(|_| NotStorable::UnreadableInput)?;
        // Whoever changes a file can set its mtime, but not its ctime.
        if identity.ctime_ns > self.started_ns {
            return Err(NotStorable::InputChanged);
        }
        self.input(InputKind::File, path, Some(digest))
    }

    fn input(&self, kind: InputKind, path: &[u8], digest: Option<Digest>) -> Result<Input, NotStorable> {
        let name = self.unit.normalised_path(path).ok_or(NotStorable::UnnormalisablePath)?;
        Ok(Input { kind, name, digest })
    }

    /// A name at which nothing is; if something is there, the compiler did not mind.
    fn absent(&self, path: &[u8], inputs: &mut Vec<Input>) -> Result<(), NotStorable> {
        let absolute = self.unit.working_directory.join(OsStr::from_bytes(path));
        if fs::symlink_metadata(absolute).is_err() {
            inputs.push(self.input(InputKind::Absent, path, None)?);
        }
        Ok(())
    }

    /// The proc macros in a search directory: the compiler loads those of its dependencies' dependencies,
    /// and nobody says which. Their native code is not in any crate's hash.
    fn loadable_files(&self, directory: &[u8], inputs: &mut Vec<Input>) -> Result<(), NotStorable> {
        let path = self.unit.working_directory.join(OsStr::from_bytes(directory));
        for name in sorted_names(&path)?.iter().filter(|name| name.as_bytes().ends_with(b".so")) {
            inputs.push(self.file(path.join(name).as_os_str().as_bytes())?);
        }
        Ok(())
    }

    /// A file that the tracer has seen: it must still be the one that was there then. Somebody may have
    /// exchanged a directory or a link on the way to it.
    fn seen_file(&self, access: &Access) -> Result<Input, NotStorable> {
        let (digest, identity) = self
            .memo
            .digest(Path::new(OsStr::from_bytes(&access.path)))
            .map_err(|_| NotStorable::UnreadableInput)?;
        let seen = access.identity.ok_or(NotStorable::UnreadableInput)?;
        // A new link to the file changes its ctime alone, but so does whoever sets the old mtime again.
        let unchanged =
            identity == seen || (identity.same_content_times(&seen) && identity.ctime_ns <= self.started_ns);
        if !unchanged {
            return Err(NotStorable::InputChanged);
        }
        self.input(InputKind::File, &access.path, Some(digest))
    }

    /// A variable that was read. Where its value names a root, the output may depend on the path itself:
    /// the result is bound to the root, unless the sources use the variable for including files alone.
    fn variable(
        &self,
        name: &[u8],
        value: Option<&[u8]>,
        dep_info: &DepInfo,
        inputs: &mut Vec<Input>,
    ) -> Result<(), NotStorable> {
        let digest = variable_digest(self.unit, value).ok_or(NotStorable::UnnormalisablePath)?;
        inputs.push(Input { kind: InputKind::Environment, name: name.to_vec(), digest });
        let value = value.unwrap_or_default();
        if !self.is_for_inclusion_alone(name, dep_info) {
            let roots = self.unit.roots.found_in(&[value, b"/"].concat());
            inputs.extend(roots.into_iter().filter_map(|root| root_input(self.unit, root)));
        }
        Ok(())
    }

    /// Whether every mention of a variable in the crate's sources is in an `include!` of its kind.
    fn is_for_inclusion_alone(&self, name: &[u8], dep_info: &DepInfo) -> bool {
        let quoted = [b"\"", name, b"\""].concat();
        let mut mentions = 0;
        for file in dep_info.files.iter().filter(|file| file.ends_with(b".rs")) {
            let path = self.unit.working_directory.join(OsStr::from_bytes(file));
            let Ok(mut text) = fs::read(path) else { return false };
            text.retain(|byte| !byte.is_ascii_whitespace());
            for at in memchr::memmem::find_iter(&text, &quoted) {
                mentions += 1;
                if !INCLUSIONS.iter().any(|inclusion| text[..at].ends_with(inclusion)) {
                    return false;
                }
            }
        }
        mentions > 0
    }
}

/// What stands before a variable's name where it is used for including a file, without spaces.
const INCLUSIONS: [&[u8]; 3] =
    [b"include!(concat!(env!(", b"include_str!(concat!(env!(", b"include_bytes!(concat!(env!("];

/// The other place of a module, `a/mod.rs` for `a.rs`: if a file appears there, the module is ambiguous.
fn other_module_file(file: &[u8]) -> Option<Vec<u8>> {
    match file.strip_suffix(b"/mod.rs") {
        Some(directory) => Some([directory, b".rs"].concat()),
        None => Some([file.strip_suffix(b".rs")?, b"/mod.rs"].concat()),
    }
}

/// The input that binds a result to a root's present path.
pub(crate) fn root_input(unit: &Unit, root: Root) -> Option<Input> {
    let path = unit.roots.path(root)?;
    Some(Input { kind: InputKind::Root, name: root.name().into(), digest: Some(Digest::of(path)) })
}

/// Whether everything the stored run read is the same now.
///
/// # Errors
/// The normalised name of the first input that differs.
pub(crate) fn validate<'s>(unit: &Unit, set: &'s InputSet, memo: &Memo) -> Result<(), &'s [u8]> {
    set.inputs().iter().try_for_each(|input| match present_digest(unit, input, memo) {
        Some(digest) if digest == input.digest => Ok(()),
        _ => Err(input.name.as_slice()),
    })
}

/// An input's digest now; `None` where it cannot be established.
fn present_digest(unit: &Unit, input: &Input, memo: &Memo) -> Option<Option<Digest>> {
    let path = || -> Option<PathBuf> {
        let expanded = unit.roots.expand(&input.name).ok()?;
        Some(PathBuf::from(OsStr::from_bytes(&expanded)))
    };
    match input.kind {
        InputKind::File => Some(Some(memo.digest(&path()?).ok()?.0)),
        InputKind::Absent => match fs::metadata(path()?) {
            Err(error) if is_absence(&error) => Some(None),
            _ => None,
        },
        InputKind::Directory => fs::metadata(path()?).is_ok_and(|metadata| metadata.is_dir()).then_some(None),
        InputKind::Link => {
            let target = fs::read_link(path()?).ok()?;
            Some(Some(Digest::of(target.as_os_str().as_bytes())))
        }
        InputKind::Listing => Some(Some(listing_digest(&sorted_names(&path()?).ok()?))),
        InputKind::Environment => variable_digest(unit, unit.variable(&input.name)),
        InputKind::Argument => {
            let flag = std::str::from_utf8(&input.name).ok()?;
            Some(unit.invocation.values(flag).last().map(Digest::of))
        }
        InputKind::Root => Some(Some(Digest::of(unit.roots.path(Root::from_name(&input.name)?)?))),
    }
}

/// Digest of a variable's normalised value: `Some(None)` where it is not set, `None` where it cannot be
/// normalised.
fn variable_digest(unit: &Unit, value: Option<&[u8]>) -> Option<Option<Digest>> {
    match value {
        Some(value) => Some(Some(Digest::of(&unit.roots.normalise(value).ok()?))),
        None => Some(None),
    }
}

fn sorted_names(directory: &Path) -> io::Result<Vec<std::ffi::OsString>> {
    let mut names =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
    names.sort_unstable();
    Ok(names)
}

/// Whether a failed look at a path means that nothing is there.
pub(crate) fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || error.raw_os_error() == Some(libc::ENAMETOOLONG)
}

/// Digest of a directory's sorted names, each followed by NUL.
pub(crate) fn listing_digest(names: &[std::ffi::OsString]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for name in names {
        hasher.update(name.as_bytes());
        hasher.update(&[0]);
    }
    hasher.finalize().into()
}
