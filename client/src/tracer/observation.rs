//! What a run does to files, put together from its calls: which paths are inputs, which are its own.
//!
//! A path is looked at once, before the first call that names it goes on: what is there then is what the
//! run found. What the run makes itself is its own from then on, and no input; a name it found absent and
//! made afterwards is neither. What it made and left is an output.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use cachec_protocol::Digest;
use minicbor::bytes::ByteVec;

use crate::elf;
use crate::inputs::is_absence;
use crate::memo::Identity;

use super::{Access, Places, Seen, Trace};

/// Directories of the kernel's own files: they describe the machine and the process, not the build.
const KERNEL_DIRECTORIES: [&str; 3] = ["/proc", "/dev", "/sys"];
/// But these are ordinary files.
const SHARED_MEMORY: &str = "/dev/shm";

/// A script's interpreter may be a script, and so on; the kernel follows four.
const MAX_INTERPRETERS: usize = 4;

/// The kernel follows as many on one path.
const MAX_LINKS: usize = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Known(Seen),
    /// A socket, a pipe, a device.
    Special,
    /// Something that cannot be looked at.
    Unreadable,
}

#[derive(Debug)]
struct Entry {
    found: Found,
    /// Of a file.
    identity: Option<Identity>,
    /// Opened for reading, listed or executed, rather than only looked at.
    read: bool,
    /// Made, replaced or removed by the run.
    own: bool,
}

/// What a call asks of a path, and changes nothing by. Asked again it says nothing new: a compiler looks for the same
/// header thousands of times.
#[derive(Debug, Clone, Copy)]
enum Question {
    Look,
    LookAtLink,
    Read,
    ReadAtLink,
    MayExecute,
}

impl Question {
    fn new(follow: bool, read: bool) -> Self {
        match (follow, read) {
            (true, false) => Self::Look,
            (false, false) => Self::LookAtLink,
            (true, true) => Self::Read,
            (false, true) => Self::ReadAtLink,
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Observation {
    entries: BTreeMap<PathBuf, Entry>,
    links: BTreeMap<PathBuf, Digest>,
    /// Paths that were found to be no links.
    plain: HashSet<PathBuf>,
    /// Files whose mode mattered, and whether they may be executed.
    modes: BTreeMap<PathBuf, bool>,
    listings: BTreeMap<PathBuf, Digest>,
    /// Own files and directories that are there now.
    own: BTreeSet<PathBuf>,
    searched: Vec<PathBuf>,
    /// See [`Places::caches`].
    caches: Vec<PathBuf>,
    output_directory: PathBuf,
    /// Whether the run has made a symbolic link: then its own paths may lead anywhere.
    makes_links: bool,
    /// Whether it looked at the CPU.
    pub(super) looks_at_cpu: bool,
    resolved: HashMap<PathBuf, PathBuf>,
    /// What was asked of a path as calls spell it: a bit for each [`Question`].
    asked: HashMap<OsString, u8>,
    obstacle: Option<&'static str>,
    pub(super) notifications: u64,
}

impl Observation {
    pub(super) fn new(places: &Places) -> Self {
        let path = |bytes: &[u8]| -> PathBuf { Path::new(OsStr::from_bytes(bytes)).components().collect() };
        // The kernel names an open directory without links on the way.
        let both = |directories: &[ByteVec]| -> Vec<PathBuf> {
            let paths = directories.iter().map(|directory| path(directory));
            paths.flat_map(|path| fs::canonicalize(&path).into_iter().chain([path])).collect()
        };
        let mut observation = Self {
            searched: both(&places.searched),
            caches: both(&places.caches),
            output_directory: path(&places.output_directory),
            ..Self::default()
        };
        both(&places.own).iter().for_each(|directory| observation.take(directory));
        observation
    }

    /// Notes that the run cannot be stored; the first reason stays.
    pub(super) fn obstruct(&mut self, reason: &'static str) {
        self.obstacle.get_or_insert(reason);
    }

    /// A call that opens a file, with `open`'s flags.
    pub(super) fn open(&mut self, path: &Path, flags: i32) {
        self.looks_at_cpu |= path == Path::new("/proc/cpuinfo");
        let may_follow = flags & libc::O_NOFOLLOW == 0;
        let writes =
            flags & libc::O_ACCMODE != libc::O_RDONLY || flags & (libc::O_TRUNC | libc::O_CREAT) != 0;
        // With O_PATH nothing is read yet.
        let reads = flags & libc::O_PATH == 0;
        if !writes && self.was_asked(path, Question::new(may_follow, reads)) {
            return;
        }
        let Some(path) = self.resolve(path, may_follow) else { return };
        if flags & libc::O_TMPFILE == libc::O_TMPFILE {
            // Without a name, so nobody else's business until it is linked.
            return;
        }
        if !writes {
            self.note(&path, may_follow, reads);
        } else if flags & libc::O_CREAT == 0 && fs::metadata(&path).is_err_and(|error| is_absence(&error)) {
            // The call fails.
            self.note(&path, true, false);
        } else if flags & libc::O_TRUNC != 0 {
            self.replace(&path);
        } else {
            self.modify_or_create(&path, flags);
        }
    }

    /// A call that makes a symbolic link.
    pub(super) fn make_link(&mut self, path: &Path) {
        self.makes_links = true;
        self.asked.clear();
        self.make(path);
    }

    /// A call that makes a directory, a special file or another name.
    pub(super) fn make(&mut self, path: &Path) {
        let Some(path) = self.resolve(path, false) else { return };
        // Where something is there already the call fails, and has only looked.
        match fs::symlink_metadata(&path) {
            Ok(_) => self.note(&path, false, false),
            Err(_) => self.take(&path),
        }
    }

    /// A call that asks what is at a path.
    pub(super) fn look(&mut self, path: &Path, follow: bool) {
        if !self.was_asked(path, Question::new(follow, false))
            && let Some(path) = self.resolve(path, follow)
        {
            self.note(&path, follow, false);
        }
    }

    /// A call that asks for extended attributes: that there are none is all that can be followed.
    pub(super) fn attributes(&mut self, path: &Path) {
        let Some(path) = self.resolve(path, true) else { return };
        self.note(&path, true, false);
        if !self.is_own(&path) && has_user_attributes(&path) {
            self.obstruct("extended-attributes");
        }
    }

    /// A call that asks for permissions.
    pub(super) fn access(&mut self, path: &Path, for_execution: bool) {
        if self.was_asked(path, if for_execution { Question::MayExecute } else { Question::Look }) {
            return;
        }
        let Some(path) = self.resolve(path, true) else { return };
        self.note(&path, true, false);
        if for_execution {
            self.note_mode(&path);
        }
    }

    /// A call that starts a program: its file, and the interpreters that the kernel reads for it.
    pub(super) fn execute(&mut self, path: &Path) {
        let mut program = path.to_owned();
        for _ in 0..=MAX_INTERPRETERS {
            let Some(resolved) = self.resolve(&program, true) else { return };
            self.note(&resolved, true, true);
            self.note_mode(&resolved);
            match interpreter(&resolved) {
                Some(next) if next.is_absolute() => program = next,
                Some(_) => return self.obstruct("relative-interpreter"),
                None => return,
            }
        }
    }

    /// A call that lists a directory, named as the kernel knows it.
    pub(super) fn list(&mut self, directory: &Path) {
        if self.is_ignored(directory) || self.is_own(directory) || self.listings.contains_key(directory) {
            return;
        }
        if self.searched.iter().any(|searched| searched == directory) {
            return;
        }
        match crate::inputs::listing_digest(directory, |path| !self.own.contains(path)) {
            Ok(digest) => drop(self.listings.insert(directory.to_owned(), digest)),
            Err(_) => self.obstruct("unreadable-directory"),
        }
    }

    /// A call that renames.
    pub(super) fn rename(&mut self, from: &Path, to: &Path) {
        let (Some(from), Some(to)) = (self.resolve(from, false), self.resolve(to, false)) else { return };
        if self.is_ignored(&from) && self.is_ignored(&to) {
            return;
        }
        if fs::symlink_metadata(&from).is_err() {
            return self.note(&from, false, false);
        }
        if let Some(parent) = to.parent().filter(|parent| fs::metadata(parent).is_err()) {
            // The call fails.
            return self.note(parent, true, false);
        }
        if !self.is_own(&from) {
            return self.obstruct("moves-input");
        }
        if self.makes_links {
            self.asked.clear();
        }
        self.replace(&to);
        let moved: Vec<PathBuf> = self.own.iter().filter(|path| path.starts_with(&from)).cloned().collect();
        for path in moved {
            self.own.remove(&path);
            let rest = path.strip_prefix(&from).unwrap_or(Path::new(""));
            self.take(&if rest.as_os_str().is_empty() { to.clone() } else { to.join(rest) });
        }
    }

    /// A call that gives a file another name.
    pub(super) fn link(&mut self, from: &Path, to: &Path) {
        let Some(from) = self.resolve(from, false) else { return };
        if !self.is_own(&from) {
            self.note(&from, false, true);
        }
        self.make(to);
    }

    /// A call that removes a name.
    pub(super) fn remove(&mut self, path: &Path) {
        let Some(path) = self.resolve(path, false) else { return };
        if self.own.remove(&path) || self.is_own(&path) {
            return;
        }
        if fs::symlink_metadata(&path).is_err() {
            // Old outputs are removed wherever there are some.
            if path.parent() != Some(self.output_directory.as_path()) {
                self.note(&path, false, false);
            }
            return;
        }
        self.replace(&path);
        self.own.remove(&path);
    }

    /// A call that changes a file's content in place.
    pub(super) fn modify(&mut self, path: &Path) {
        if let Some(path) = self.resolve(path, true)
            && !self.is_own(&path)
            && !self.is_ignored(&path)
        {
            self.obstruct("modifies-input");
        }
    }

    /// The trace, once the run has ended.
    pub(super) fn finish(self) -> Trace {
        let mut inputs = Vec::new();
        let mut obstacle = self.obstacle;
        for (path, entry) in &self.entries {
            match entry.found {
                _ if entry.own => {}
                Found::Known(seen) => {
                    inputs.push(Access { seen, path: bytes(path), digest: None, identity: entry.identity });
                }
                Found::Special => drop(obstacle.get_or_insert("special-file")),
                Found::Unreadable => drop(obstacle.get_or_insert("unreadable-path")),
            }
        }
        let digested = [(Seen::Link, &self.links), (Seen::Listing, &self.listings)];
        for (seen, (path, digest)) in
            digested.into_iter().flat_map(|(seen, map)| map.iter().map(move |pair| (seen, pair)))
        {
            inputs.push(Access { seen, path: bytes(path), digest: Some(*digest), identity: None });
        }
        for (path, may) in &self.modes {
            let seen = if *may { Seen::Executable } else { Seen::NotExecutable };
            inputs.push(Access { seen, path: bytes(path), digest: None, identity: None });
        }
        let left = |path: &&PathBuf| fs::symlink_metadata(path).is_ok();
        let outputs = self.own.iter().filter(left).map(|path| bytes(path).into()).collect();
        Trace {
            inputs,
            outputs,
            obstacle: obstacle.map(str::to_owned),
            notifications: self.notifications,
            looks_at_cpu: self.looks_at_cpu,
        }
    }

    /// Whether a question was asked before, since which no path can have come to mean another file.
    fn was_asked(&mut self, path: &Path, question: Question) -> bool {
        let bit = 1 << question as u8;
        if let Some(asked) = self.asked.get_mut(path.as_os_str()) {
            let was_asked = *asked & bit != 0;
            *asked |= bit;
            return was_asked;
        }
        self.asked.insert(path.as_os_str().to_owned(), bit);
        false
    }

    /// Notes what is at a path, unless that is known, or the run's own.
    fn note(&mut self, path: &Path, follow: bool, read: bool) {
        if self.is_ignored(path) || self.is_own(path) || (!follow && self.note_link(path)) {
            return;
        }
        if let Some(entry) = self.entries.get_mut(path) {
            entry.read |= read;
            return;
        }
        let mut identity = None;
        let found = match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Found::Known(Seen::Directory),
            Ok(metadata) if metadata.is_file() => {
                identity = Some(Identity::of(&metadata));
                Found::Known(Seen::File)
            }
            // A link to a device, which is noted itself; services that are turned off lead to `/dev/null`.
            Ok(_) if fs::canonicalize(path).is_ok_and(|real| is_kernels(&real)) => return,
            Ok(_) => Found::Special,
            Err(error) if is_absence(&error) => Found::Known(Seen::Absent),
            Err(_) => Found::Unreadable,
        };
        self.entries.insert(path.to_owned(), Entry { found, identity, read, own: false });
    }

    /// Notes a symbolic link's own text; says whether there is one.
    fn note_link(&mut self, path: &Path) -> bool {
        if self.links.contains_key(path) {
            return true;
        }
        if self.plain.contains(path) || self.is_own(path) {
            return false;
        }
        match fs::read_link(path) {
            Ok(target) => {
                self.links.insert(path.to_owned(), Digest::of(target.as_os_str().as_bytes()));
                true
            }
            Err(_) => {
                self.plain.insert(path.to_owned());
                false
            }
        }
    }

    /// Notes the links on the way to a path: where one leads elsewhere later, the path means another file,
    /// though the one that was read is still there.
    fn note_way(&mut self, path: &Path) {
        let mut unknown: Vec<&Path> =
            path.ancestors().take_while(|ancestor| !self.plain.contains(*ancestor)).collect();
        while let Some(ancestor) = unknown.pop() {
            if !self.is_ignored(ancestor) {
                self.note_link(ancestor);
            }
        }
    }

    /// Notes whether a file may be executed.
    fn note_mode(&mut self, path: &Path) {
        if self.is_ignored(path) || self.is_own(path) || self.modes.contains_key(path) {
            return;
        }
        if let Ok(metadata) = fs::metadata(path)
            && metadata.is_file()
        {
            if metadata.mode() & (libc::S_ISUID | libc::S_ISGID) != 0 {
                self.obstruct("set-user-id");
            }
            self.modes.insert(path.to_owned(), metadata.mode() & 0o111 != 0);
        }
    }

    /// The run replaces what is at a path, or removes it. That is its business in the output directory
    /// alone, and only where it has not read what was there.
    fn replace(&mut self, path: &Path) {
        if !self.is_own(path)
            && !self.is_ignored(path)
            && fs::symlink_metadata(path).is_ok_and(|now| !now.is_dir())
        {
            let was_read = self.entries.get(path).is_some_and(|entry| entry.read);
            if was_read || path.parent() != Some(self.output_directory.as_path()) {
                self.obstruct("replaces-file");
            }
        }
        self.take(path);
    }

    fn modify_or_create(&mut self, path: &Path, flags: i32) {
        if self.is_ignored(path) || self.is_own(path) {
            return;
        }
        match fs::metadata(path) {
            Err(_) => self.take(path),
            // The call fails.
            Ok(_) if flags & libc::O_EXCL != 0 => self.note(path, true, false),
            Ok(metadata) if metadata.is_file() => self.obstruct("modifies-input"),
            Ok(_) => {}
        }
    }

    /// Makes a path the run's own.
    fn take(&mut self, path: &Path) {
        if self.is_ignored(path) {
            return;
        }
        if let Some(parent) = path.parent().filter(|parent| fs::metadata(parent).is_err()) {
            // The call fails.
            return self.note(parent, true, false);
        }
        self.own.insert(path.to_owned());
        let found = Found::Known(Seen::Absent);
        self.entries
            .entry(path.to_owned())
            .or_insert(Entry { found, identity: None, read: false, own: true })
            .own = true;
    }

    /// Whether a path is the kernel's, or in a tool's cache.
    fn is_ignored(&self, path: &Path) -> bool {
        is_kernels(path) || self.caches.iter().any(|cache| path.starts_with(cache))
    }

    /// Whether a path, or a directory above it, was made by the run.
    fn is_own(&self, path: &Path) -> bool {
        self.entries.get(path).is_some_and(|entry| entry.own)
            || path.ancestors().skip(1).any(|ancestor| self.own.contains(ancestor))
    }

    /// An absolute path without `.`, `..` and double slashes; links on the way to it are noted, and the run's own
    /// links followed. Where a directory before a `..` is missing, that is what the call finds, and nothing is
    /// left to look at.
    fn resolve(&mut self, path: &Path, follow: bool) -> Option<PathBuf> {
        let mut path = self.without_dots(path)?;
        for _ in 0..MAX_LINKS {
            match self.past_own_link(&path, follow) {
                Some(next) => path = self.without_dots(&next)?,
                None => return Some(path),
            }
        }
        // The call fails.
        None
    }

    /// Where a path leads on from the first of the run's own links on its way.
    fn past_own_link(&self, path: &Path, follow: bool) -> Option<PathBuf> {
        if !self.makes_links {
            return None;
        }
        let is_link = |path: &&Path| {
            self.is_own(path) && fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink())
        };
        let link = path.ancestors().skip(usize::from(!follow)).filter(is_link).last()?;
        let rest = path.strip_prefix(link).ok()?;
        Some(link.parent()?.join(fs::read_link(link).ok()?).join(rest))
    }

    fn without_dots(&mut self, path: &Path) -> Option<PathBuf> {
        if leads_out_of_proc(path) {
            self.obstruct("process-link");
        }
        let components: Vec<Component<'_>> = path.components().collect();
        let Some(last) = components.iter().rposition(|component| *component == Component::ParentDir) else {
            let path: PathBuf = components.iter().collect();
            self.note_way(&path);
            return Some(path);
        };
        if let Some(known) = self.resolved.get(path) {
            return Some(known.clone());
        }
        let real = self.walk_up(&components[..=last])?;
        let resolved = components[last + 1..].iter().fold(real, |real, component| real.join(component));
        self.resolved.insert(path.to_owned(), resolved.clone());
        Some(resolved)
    }

    /// The real directory that a path with `..` at its end leads to. Notes the links on the way, each under
    /// the name it is reached by, and where the way ends early, the directory that is not there.
    fn walk_up(&mut self, components: &[Component<'_>]) -> Option<PathBuf> {
        let mut walked = PathBuf::new();
        for component in components {
            if *component == Component::ParentDir {
                self.note_way(&walked);
                let Ok(real) = fs::canonicalize(&walked) else {
                    self.note(&walked, true, false);
                    return None;
                };
                walked = real.parent().map(Path::to_owned).unwrap_or(real);
            } else {
                walked.push(component);
            }
        }
        Some(walked)
    }
}

fn is_kernels(path: &Path) -> bool {
    KERNEL_DIRECTORIES.iter().any(|directory| path.starts_with(directory)) && !path.starts_with(SHARED_MEMORY)
}

/// Whether a file has attributes that somebody gave it, besides those of access control.
fn has_user_attributes(path: &Path) -> bool {
    let mut names = vec![0; 64 << 10];
    match rustix::fs::listxattr(path, &mut names) {
        Ok(length) => names[..length].split(|byte| *byte == 0).any(|name| name.starts_with(b"user.")),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTSUP) => false,
        Err(_) => true,
    }
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// Whether a path goes through a process's working directory, root directory or open directory to an
/// ordinary file.
fn leads_out_of_proc(path: &Path) -> bool {
    let names: Vec<&OsStr> = path.components().map(Component::as_os_str).collect();
    let followed_by = |name: &str, count: usize| {
        names.iter().position(|part| *part == name).is_some_and(|at| names.len() > at + count)
    };
    (path.starts_with("/proc") && (followed_by("cwd", 1) || followed_by("root", 1) || followed_by("fd", 2)))
        || (path.starts_with("/dev/fd") && names.len() > 4)
}

/// The interpreter that the kernel starts for a program: a script's, or an ELF file's dynamic loader.
fn interpreter(program: &Path) -> Option<PathBuf> {
    // Opening a pipe would wait for its writer.
    if !fs::metadata(program).is_ok_and(|metadata| metadata.is_file()) {
        return None;
    }
    let mut start = Vec::new();
    File::open(program).ok()?.take(4096).read_to_end(&mut start).ok()?;
    if let Some(script) = start.strip_prefix(b"#!") {
        let line = script.split(|byte| *byte == b'\n').next()?.trim_ascii();
        let word = line.split(|byte| matches!(byte, b' ' | b'\t')).next()?;
        return Some(PathBuf::from(OsStr::from_bytes(word)));
    }
    elf::interpreter(&start).map(|path| PathBuf::from(OsString::from_vec(path)))
}
