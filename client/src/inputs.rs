//! Input sets: gathered after a run, checked before a restore.
//!
//! The inputs of a traced run are what it was seen to read. Without a tracer the inputs of a library unit are what rustc's dep-info names (source files, files of
//! `include!` and the like, variables of `env!`), the `--extern` files, every argument that names a file,
//! and the content of the directories in which native libraries are searched.
//!
//! Invariant: what cannot be established with certainty makes the unit not stored, or not matched.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cachec_protocol::{Digest, Input, InputKind, InputSet, Root};

use crate::deferred::{Deferred, DeferredFiles};
use crate::dep_info::DepInfo;
use crate::memo::Memo;
use crate::places;
use crate::tracer::{Access, Seen, Trace};
use crate::unit::{Unit, cpu_identity};

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
    #[error("stale-out-dir")]
    StaleOutDir,
    #[error("large-out-dir")]
    LargeOutDir,
    #[error("unusual-output")]
    UnusualOutput,
    #[error("link-leads-out")]
    LinkLeadsOut,
    #[error("always-runs")]
    AlwaysRuns,
    #[error("clock")]
    Clock,
    #[error("large-result")]
    LargeResult,
    /// The tracer's own reason code.
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
    let gatherer = Gatherer { unit, memo, started_ns };
    let mut inputs = Vec::new();
    for access in trace.inputs.iter().filter(|access| !is_left_out(unit, access)) {
        inputs.push(match access.seen {
            Seen::File => gatherer.seen_file(access)?,
            Seen::Absent => gatherer.input(InputKind::Absent, &access.path, None)?,
            Seen::Directory => gatherer.input(InputKind::Directory, &access.path, None)?,
            Seen::Link => gatherer.input(InputKind::Link, &access.path, access.digest)?,
            Seen::Listing => gatherer.input(InputKind::Listing, &access.path, access.digest)?,
            Seen::Executable => gatherer.input(InputKind::Mode, &access.path, Some(mode_digest(true)))?,
            Seen::NotExecutable => gatherer.input(InputKind::Mode, &access.path, Some(mode_digest(false)))?,
        });
    }
    if unit.script().is_some() {
        // Copies of a file may be executed where it may, and sources are marked so by git.
        let modes: Vec<Input> = inputs.iter().filter_map(|input| file_mode(unit, input)).collect();
        inputs.extend(modes);
    }
    if trace.looks_at_cpu {
        let digest = Some(cpu_identity().ok_or(NotStorable::UnreadableInput)?);
        inputs.push(Input { kind: InputKind::Cpu, name: Vec::new(), digest });
    }
    gatherer.searched_programs(trace, &mut inputs);
    gatherer.in_sources(dep_info, &mut inputs)?;
    Ok(inputs)
}

/// Whether a file in one of the roots may be executed, as an input.
fn file_mode(unit: &Unit, input: &Input) -> Option<Input> {
    let is_in_a_root = input.kind == InputKind::File && input.name.starts_with(&[0]);
    let path = is_in_a_root.then(|| unit.roots.expand(&input.name).ok())??;
    let mode = fs::metadata(OsStr::from_bytes(&path)).ok()?.mode();
    let digest = Some(mode_digest(mode & 0o111 != 0));
    Some(Input { kind: InputKind::Mode, name: input.name.clone(), digest })
}

/// What a run reads that is no input of its result:
///
/// | left out | why |
/// |---|---|
/// | compiler, driver and `lib/rustlib` below the sysroot | the toolchain's identity is in the action key |
/// | a build script's program | its content is in the action key |
/// | `/etc/ld.so.cache` | an index of libraries; the libraries that are loaded are inputs |
/// | the directory for temporary files itself | what the run makes there is its own |
/// | directories around outputs, dependencies and roots | they are there wherever those are |
/// | `/proc`, `/dev` but `/dev/shm`, `/sys` | left out by the tracer: they describe machine and process |
fn is_left_out(unit: &Unit, access: &Access) -> bool {
    let path = Path::new(OsStr::from_bytes(&access.path));
    let in_toolchain = |sysroot: &PathBuf| path.strip_prefix(sysroot).is_ok_and(is_identified);
    let is_around = || unit.known_directories().iter().any(|known| known.starts_with(path));
    unit.sysroots.iter().any(in_toolchain)
        || unit.script().is_some_and(|script| path == script.program)
        || path == Path::new("/etc/ld.so.cache")
        || (access.seen == Seen::Directory && (is_around() || path == unit.temporary_directory()))
}

/// Whether a path below the sysroot is part of the toolchain's identity.
fn is_identified(path: &Path) -> bool {
    let name = path.as_os_str().as_bytes();
    path.starts_with("lib/rustlib")
        || ["bin/rustc", "bin/clippy-driver"].iter().any(|program| path == Path::new(program))
        || [b"lib/librustc_driver".as_slice(), b"lib/libLLVM"].iter().any(|start| name.starts_with(start))
        || ["", "bin", "lib"].iter().any(|directory| path == Path::new(directory))
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
    let invocation = unit.invocation().ok_or(NotStorable::Untraced)?;
    for file in invocation.extern_files() {
        inputs.push(gatherer.file(file)?);
    }
    for argument in &invocation.arguments {
        // Of `name=path` values (profile-use=…, linker=…, target=spec.json) the last part may be a file.
        let value = argument.value.as_deref().unwrap_or_default();
        let path = value.rsplit(|byte| *byte == b'=').next().unwrap_or_default();
        if unit.absolute(path).is_file() {
            inputs.push(gatherer.file(path)?);
        }
    }
    for directory in unit.searched_directories() {
        gatherer.loadable_files(directory, &mut inputs)?;
    }
    gatherer.in_sources(dep_info, &mut inputs)?;
    Ok(inputs)
}

struct Gatherer<'a> {
    unit: &'a Unit,
    memo: &'a Memo,
    started_ns: i64,
}

impl Gatherer<'_> {
    fn file(&self, path: &[u8]) -> Result<Input, NotStorable> {
        let absolute = self.unit.absolute(path);
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

    /// The programs that were searched in `PATH`, found or not: what matters is what is found first.
    fn searched_programs(&self, trace: &Trace, inputs: &mut Vec<Input>) {
        let directories = self.unit.program_directories();
        let mut names: Vec<&OsStr> = trace
            .inputs
            .iter()
            .filter(|access| matches!(access.seen, Seen::File | Seen::Absent))
            .map(|access| Path::new(OsStr::from_bytes(&access.path)))
            .filter(|path| directories.iter().any(|directory| path.parent() == Some(directory)))
            .filter_map(Path::file_name)
            .collect();
        names.sort_unstable();
        names.dedup();
        inputs.extend(names.into_iter().map(|name| Input {
            kind: InputKind::Program,
            name: name.as_bytes().to_vec(),
            digest: program_digest(self.unit, name, self.memo),
        }));
    }

    /// What the sources say themselves: the variables they read, and roots they name. A source that names a
    /// root by its path means that place, wherever the root is: the result is bound.
    fn in_sources(&self, dep_info: &DepInfo, inputs: &mut Vec<Input>) -> Result<(), NotStorable> {
        for file in &dep_info.files {
            let text = fs::read(self.unit.absolute(file)).unwrap_or_default();
            inputs.extend(self.bindings(&text));
        }
        for (name, value) in &dep_info.variables {
            self.variable(name, value.as_deref(), dep_info, inputs)?;
        }
        Ok(())
    }

    /// The inputs that bind a result to the roots found in a text.
    fn bindings(&self, text: &[u8]) -> impl Iterator<Item = Input> {
        self.unit.roots.found_in(text).into_iter().filter_map(|root| places::root_input(self.unit, root))
    }

    /// A name at which nothing is; if something is there, the compiler did not mind.
    fn absent(&self, path: &[u8], inputs: &mut Vec<Input>) -> Result<(), NotStorable> {
        let absolute = self.unit.absolute(path);
        if fs::symlink_metadata(absolute).is_err() {
            inputs.push(self.input(InputKind::Absent, path, None)?);
        }
        Ok(())
    }

    /// The proc macros in a search directory: the compiler loads those of its dependencies' dependencies,
    /// and nobody says which. Their native code is not in any crate's hash.
    fn loadable_files(&self, directory: &[u8], inputs: &mut Vec<Input>) -> Result<(), NotStorable> {
        for entry in fs::read_dir(self.unit.absolute(directory))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "so") {
                inputs.push(self.file(path.as_os_str().as_bytes())?);
            }
        }
        Ok(())
    }

    /// A file that the tracer has seen: it must still be the one that was there then. Somebody may have
    /// exchanged a directory or a link on the way to it.
    fn seen_file(&self, access: &Access) -> Result<Input, NotStorable> {
        let path = Path::new(OsStr::from_bytes(&access.path));
        let (digest, identity) = self.memo.digest(path).map_err(|_| NotStorable::UnreadableInput)?;
        let seen = access.identity.ok_or(NotStorable::UnreadableInput)?;
        // A new link to the file changes its ctime alone, but so does whoever sets the old mtime again.
        let unchanged =
            identity == seen || (identity.same_content_times(&seen) && identity.ctime_ns <= self.started_ns);
        // Cargo sets the times of a dependency that it has checked while dependents run; compilers replace
        // such files by others.
        let is_library =
            ["rmeta", "rlib"].iter().any(|kind| path.extension().is_some_and(|own| own == *kind));
        // The local tier may have got a link to it, a proc macro included.
        let is_same = if is_library { identity.same_file(&seen) } else { identity.same_content_times(&seen) };
        let retimed = is_same && self.is_dependency(path);
        if !unchanged && !retimed {
            return Err(NotStorable::InputChanged);
        }
        self.input(InputKind::File, &access.path, Some(digest))
    }

    /// Whether a file is in one of the directories where compiled dependencies are searched.
    fn is_dependency(&self, path: &Path) -> bool {
        let mut directories = self.unit.searched_directories();
        directories.any(|directory| path.parent() == Some(&self.unit.absolute(directory)))
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
            inputs.extend(self.bindings(&[value, b"/"].concat()));
        }
        Ok(())
    }

    /// Whether every mention of a variable in the crate's sources is in an `include!` of its kind.
    fn is_for_inclusion_alone(&self, name: &[u8], dep_info: &DepInfo) -> bool {
        let quoted = [b"\"", name, b"\""].concat();
        let mut mentions = 0;
        for file in dep_info.files.iter().filter(|file| file.ends_with(b".rs")) {
            let path = self.unit.absolute(file);
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

/// The variables that a build script has told cargo of.
pub(crate) fn declared_variables(unit: &Unit, names: &[Vec<u8>]) -> Result<Vec<Input>, NotStorable> {
    let input = |name: &Vec<u8>| {
        let digest = variable_digest(unit, unit.variable(name)).ok_or(NotStorable::UnnormalisablePath)?;
        Ok(Input { kind: InputKind::Environment, name: name.clone(), digest })
    };
    names.iter().map(input).collect()
}

/// The files as they are now: those that are there, and those that are still to come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Files<'a> {
    pub(crate) memo: &'a Memo,
    pub(crate) deferred: Option<&'a DeferredFiles>,
}

impl Files<'_> {
    fn digest(&self, path: &Path) -> Option<Digest> {
        match self.memo.digest(path) {
            Ok((digest, _)) => Some(digest),
            Err(_) => match self.deferred(path)? {
                Deferred::File { digest, .. } => Some(digest),
                Deferred::Directory => None,
            },
        }
    }

    fn may_execute(&self, path: &Path) -> Option<bool> {
        match fs::metadata(path) {
            Ok(metadata) => Some(metadata.mode() & 0o111 != 0),
            Err(_) => match self.deferred(path)? {
                Deferred::File { executable, .. } => Some(executable),
                Deferred::Directory => Some(true),
            },
        }
    }

    fn is_directory(&self, path: &Path) -> bool {
        let is_there = fs::metadata(path).is_ok_and(|metadata| metadata.is_dir());
        is_there || self.deferred(path) == Some(Deferred::Directory)
    }

    fn listing(&self, path: &Path) -> Option<Digest> {
        let to_come = self.deferred.map(|deferred| deferred.inside(path)).unwrap_or_default();
        let mut entries = match entries(path, |_| true) {
            Err(error) if is_absence(&error) && self.is_directory(path) => Vec::new(),
            found => found.ok()?,
        };
        entries.extend(to_come.into_iter().map(|(name, file)| match file {
            Deferred::File { .. } => (name, b'f'),
            Deferred::Directory => (name, b'd'),
        }));
        Some(digest_of_entries(entries))
    }

    fn is_absent(&self, path: &Path) -> bool {
        fs::metadata(path).is_err_and(|error| is_absence(&error)) && self.deferred(path).is_none()
    }

    fn deferred(&self, path: &Path) -> Option<Deferred> {
        self.deferred?.get(path)
    }
}

/// Whether everything the stored run read is the same now.
///
/// # Errors
/// The normalised name of the first input that differs.
pub(crate) fn validate<'s>(unit: &Unit, set: &'s InputSet, files: Files<'_>) -> Result<(), &'s [u8]> {
    set.inputs().iter().try_for_each(|input| match present_digest(unit, input, files) {
        Some(digest) if digest == input.digest => Ok(()),
        _ => Err(input.name.as_slice()),
    })
}

/// An input's digest now; `None` where it cannot be established.
fn present_digest(unit: &Unit, input: &Input, files: Files<'_>) -> Option<Option<Digest>> {
    let path = || -> Option<PathBuf> {
        let expanded = unit.roots.expand(&input.name).ok()?;
        Some(PathBuf::from(OsStr::from_bytes(&expanded)))
    };
    match input.kind {
        InputKind::File => Some(Some(files.digest(&path()?)?)),
        InputKind::Absent => files.is_absent(&path()?).then_some(None),
        InputKind::Directory => files.is_directory(&path()?).then_some(None),
        InputKind::Link => {
            let target = fs::read_link(path()?).ok()?;
            Some(Some(Digest::of(target.as_os_str().as_bytes())))
        }
        InputKind::Listing => Some(Some(files.listing(&path()?)?)),
        InputKind::Mode => Some(Some(mode_digest(files.may_execute(&path()?)?))),
        InputKind::Program => Some(program_digest(unit, OsStr::from_bytes(&input.name), files.memo)),
        InputKind::Environment => variable_digest(unit, unit.variable(&input.name)),
        InputKind::Argument => {
            let flag = std::str::from_utf8(&input.name).ok()?;
            Some(unit.argument(flag).map(Digest::of))
        }
        InputKind::Root => Some(Some(Digest::of(unit.roots.path(Root::from_name(&input.name)?)?))),
        InputKind::Cpu => Some(Some(cpu_identity()?)),
        InputKind::Place => {
            let home = PathBuf::from(OsStr::from_bytes(unit.roots.path(Root::Home)?));
            places::place_input(unit, Root::from_name(&input.name)?, &home).map(|present| present.digest)
        }
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

/// Whether a failed look at a path means that nothing is there.
pub(crate) fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || error.raw_os_error() == Some(libc::ENAMETOOLONG)
}

/// Digest of the names in a directory that `counts`, sorted, with what each is; see [`InputKind::Listing`].
///
/// # Errors
/// Those of reading the directory.
pub(crate) fn listing_digest(directory: &Path, counts: impl Fn(&Path) -> bool) -> io::Result<Digest> {
    Ok(digest_of_entries(entries(directory, counts)?))
}

/// The names in a directory, with a letter for what each is.
fn entries(directory: &Path, counts: impl Fn(&Path) -> bool) -> io::Result<Vec<(OsString, u8)>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if counts(&entry.path()) {
            let kind = entry.file_type()?;
            let letter = match () {
                () if kind.is_file() => b'f',
                () if kind.is_dir() => b'd',
                () if kind.is_symlink() => b'l',
                () => b'o',
            };
            entries.push((entry.file_name(), letter));
        }
    }
    Ok(entries)
}

fn digest_of_entries(mut entries: Vec<(OsString, u8)>) -> Digest {
    entries.sort_unstable();
    let mut hasher = blake3::Hasher::new();
    for (name, letter) in entries {
        hasher.update(name.as_bytes());
        hasher.update(&[0, letter]);
    }
    hasher.finalize().into()
}

fn mode_digest(may_execute: bool) -> Digest {
    Digest::of(if may_execute { b"x" } else { b"-" })
}

/// Digest of the first program of that name in the unit's `PATH`.
fn program_digest(unit: &Unit, name: &OsStr, memo: &Memo) -> Option<Digest> {
    let is_program = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.mode() & 0o111 != 0)
    };
    let path =
        unit.program_directories().into_iter().map(|directory| directory.join(name)).find(is_program)?;
    memo.digest(&path).ok().map(|(digest, _)| digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_identifies_a_toolchain_is_left_out_of_its_directory() {
        for part in
            ["lib/rustlib/x86_64-unknown-linux-gnu/lib/libstd-1.rlib", "bin/rustc", "lib/libLLVM.so.22"]
        {
            assert!(is_identified(Path::new(part)), "{part}");
        }
        for part in ["bin/cc", "lib/x86_64-linux-gnu/libc.so.6", "share/text", "include/stdio.h"] {
            assert!(!is_identified(Path::new(part)), "{part}");
        }
    }

    #[test]
    fn what_is_deferred_counts_as_being_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let (memo, deferred) = (Memo::default(), DeferredFiles::default());
        let digest = Digest::of(b"later");
        let later = Deferred::File { digest, executable: true };
        deferred.extend([(path("made"), Deferred::Directory), (path("made/file"), later)]);
        let (now, then) =
            (Files { memo: &memo, deferred: None }, Files { memo: &memo, deferred: Some(&deferred) });
        assert!(now.is_absent(&path("made/file")) && !then.is_absent(&path("made/file")));
        assert!(!now.is_directory(&path("made")) && then.is_directory(&path("made")));
        assert_eq!((now.digest(&path("made/file")), then.digest(&path("made/file"))), (None, Some(digest)));
        assert_eq!(then.may_execute(&path("made/file")), Some(true));
        let listings = [then.listing(directory.path()), then.listing(&path("made"))];
        fs::create_dir(path("made")).unwrap();
        fs::write(path("made/file"), "later").unwrap();
        assert_eq!(listings, [now.listing(directory.path()), now.listing(&path("made"))]);
        assert!(listings.iter().all(Option::is_some));
    }

    #[test]
    fn a_modules_other_place() {
        assert_eq!(other_module_file(b"src/a.rs"), Some(b"src/a/mod.rs".to_vec()));
        assert_eq!(other_module_file(b"src/a/mod.rs"), Some(b"src/a.rs".to_vec()));
        assert_eq!(other_module_file(b"src/text.txt"), None);
    }
}
