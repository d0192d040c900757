//! What the last such build asked for, fetched before this one asks: a fresh container then waits for the line's
//! bandwidth alone, and not for a round trip a unit.
//!
//! A build is one cargo process. The first unit that is not in the local tier starts one stream from the server:
//! the manifests of all units of the last build of this workspace with these arguments, then (where there is no
//! local tier) their packs in the order they were needed, those of the record's [`bundle`] together. Lookups wait for
//! what is on its way, and ask for the rest. At a build's end its own record is published, where it differs.
//!
//! Invariants: what comes from the stream is checked as any other answer; where the stream ends early, or was wrong
//! about what is needed, units ask as if there were none. Waiting is bounded by what the compile would take.
//!
//! Locks: `Builds` and each build's `State`, leaf mutexes that are not held across an `await`.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cachec_protocol::codec::Message;
use cachec_protocol::frame::{Frame, HEADER_BYTES, MAGIC};
use cachec_protocol::message::{LookupResponse, Manifest};
use cachec_protocol::pack::Contents;
use cachec_protocol::{ActionKey, BuildAction, BuildEntry, BuildRecord, Digest, StoredResult, decode};
use serde::Deserialize;
use tempfile::SpooledTempFile;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::bundle::{self, ScriptProgram};
use super::deferral::Deferral;
use super::{Agent, launcher};
use crate::process::{parent, start_time};
use crate::remote::{Packs, Remote};
use crate::unit::Unit;

/// Longest wait for the first answer; as for a lookup.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// A pack is waited for at least so long, however short its compile was.
const LEAST_PATIENCE: Duration = Duration::from_secs(2);

/// Compressed bytes that one stream may bring.
const MAX_STREAM_BYTES: u64 = 1 << 30;

/// A pack up to this size waits in memory, a larger one in a file.
const SPOOL_BYTES: usize = 64 << 10;

/// All builds that are going on, by their cargo.
#[derive(Debug, Default)]
pub(super) struct Builds {
    known: Mutex<HashMap<Process, Arc<Build>>>,
}

/// What is left of a stream.
type Reader = Box<dyn AsyncRead + Send + Unpin>;

/// A process's id and start time.
type Process = (u32, String);

impl Builds {
    /// The build that a wrapper belongs to, by the process that has started it.
    pub(super) fn of(&self, wrapper: Option<i32>) -> Option<Arc<Build>> {
        let cargo = parent(u32::try_from(wrapper?).ok()?)?;
        let process = (cargo, start_time(cargo)?);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(build) = known.get(&process) {
            return Some(Arc::clone(build));
        }
        known.retain(|(id, started), _| start_time(*id).as_ref() == Some(started));
        // Cargo may ask the compiler something before it has written a lock file.
        let build = Arc::new(Build::of_cargo(cargo)?);
        known.insert(process, Arc::clone(&build));
        Some(build)
    }
}

/// One build; see the module.
#[derive(Debug)]
pub(super) struct Build {
    key: ActionKey,
    /// Cargo's process id.
    cargo: u32,
    pub(super) deferral: Deferral,
    progress: watch::Sender<Progress>,
    state: Mutex<State>,
}

/// How far the stream is. Changes with every pack that arrives.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    started: bool,
    answered: bool,
    /// Streams that are open, or about to be.
    streams: u32,
    arrived: u64,
}

impl Progress {
    fn has_ended(&self) -> bool {
        self.started && self.streams == 0
    }
}

#[derive(Debug, Default)]
struct State {
    manifests: HashMap<ActionKey, Manifest>,
    /// Packs that are on their way, or here.
    packs: HashMap<Digest, Option<Arrived>>,
    /// Packs that the first stream is not to bring; see [`Build::fetch_rest`].
    left_out: HashSet<Digest>,
    /// What the last build has left, or this one, and the result that keeps it.
    last: BuildRecord,
    last_result: Option<StoredResult>,
    /// The same, until its bundle comes.
    bundle: Option<StoredResult>,
    has_lost_bundle: bool,
    /// Units of this build in the order they asked, and what fitted.
    asked: Vec<(ActionKey, Option<Fitting>)>,
}

/// What was restored or stored for a unit.
#[derive(Debug)]
struct Fitting {
    entry: BuildEntry,
    program: Option<ScriptProgram>,
}

/// What the next build is to be told.
#[derive(Debug)]
pub(super) struct NewRecord {
    /// With the last bundle where it has the same programs, else without.
    pub(super) result: StoredResult,
    pub(super) programs: Vec<ScriptProgram>,
}

/// A pack that is here, at its beginning.
#[derive(Debug)]
pub(super) enum Arrived {
    /// As zstd frames.
    Frames(SpooledTempFile),
    /// What is in it, from a bundle.
    Content(SpooledTempFile),
}

impl Arrived {
    /// What is in it, of at most so many bytes.
    ///
    /// # Errors
    /// As [`Contents::new`].
    pub(super) fn content(self, limit_bytes: u64) -> io::Result<Box<dyn Read>> {
        Ok(match self {
            Self::Frames(frames) => Box::new(Contents::new(frames, limit_bytes)?),
            Self::Content(content) => Box::new(content),
        })
    }
}

/// A pack that may have been announced.
#[derive(Debug)]
pub(super) enum Announced {
    /// Here it is.
    Here(Arrived),
    /// It is not going to come by this way.
    No,
    /// It is still on its way, and the compiler would be done by now.
    Late,
}

impl Build {
    /// The build of a cargo process; `None` where it has no workspace with a `Cargo.lock`.
    fn of_cargo(cargo: u32) -> Option<Self> {
        let words = fs::read(format!("/proc/{cargo}/cmdline")).ok()?;
        let directory = fs::read_link(format!("/proc/{cargo}/cwd")).ok()?;
        let (mut arguments, manifest) = what_is_built(words.split(|byte| *byte == 0).skip(1));
        let (lock, package) = manifest
            .and_then(|manifest| lock_above(&directory.join(manifest.parent()?)))
            .or_else(|| lock_above(&directory))?;
        let packages = own_packages(&lock)?;
        // The packages of a workspace are built one at a time from their own directories.
        arguments
            .extend(package.map(|package| [b"--manifest-path=", package.as_os_str().as_bytes()].concat()));
        let machine = format!("{} {}", std::env::consts::ARCH, std::env::consts::OS);
        let key = BuildAction { packages: &packages, arguments: &arguments, machine: &machine }.key();
        Some(Self {
            key,
            cargo,
            deferral: Deferral::new(is_only_compiling(&arguments)),
            progress: watch::Sender::default(),
            state: Mutex::default(),
        })
    }

    /// The last build's manifest of a unit, which is as good as asking for it; `None` where there is none.
    pub(super) async fn manifest(
        self: &Arc<Self>,
        agent: &Arc<Agent>,
        key: &ActionKey,
    ) -> Option<Vec<StoredResult>> {
        self.start(agent);
        let mut progress = self.progress.subscribe();
        let answered = progress.wait_for(|progress| progress.answered || progress.has_ended());
        let _ = tokio::time::timeout(ANSWER_TIMEOUT, answered).await;
        Some(self.state().manifests.get(key)?.readable_results().collect())
    }

    /// A pack, as soon as it is here. Waits no longer than the compile took that it saves.
    pub(super) async fn pack(&self, digest: &Digest, compile_ms: u64) -> Announced {
        let mut progress = self.progress.subscribe();
        let patience = LEAST_PATIENCE.max(Duration::from_millis(compile_ms));
        let arrived = progress.wait_for(|progress| {
            progress.has_ended() || !matches!(self.state().packs.get(digest), Some(None))
        });
        if tokio::time::timeout(patience, arrived).await.is_err() {
            return Announced::Late;
        }
        match self.state().packs.remove(digest) {
            Some(Some(pack)) => Announced::Here(pack),
            _ => Announced::No,
        }
    }

    /// Notes that a unit asks.
    pub(super) fn ask(&self, key: ActionKey) {
        let mut state = self.state();
        if !state.asked.iter().any(|(known, _)| *known == key) {
            state.asked.push((key, None));
        }
    }

    /// Notes which result was restored or stored for a unit.
    pub(super) fn fits(&self, unit: &Unit, result: &StoredResult) {
        let program = launcher::kept_path(unit).and_then(|path| ScriptProgram::of(result, path));
        self.note(result, unit.is_for_compilers(), program);
    }

    fn note(&self, result: &StoredResult, for_compilers: bool, program: Option<ScriptProgram>) {
        let pack = result.pack.map(|pack| pack.digest);
        let entry = BuildEntry { action_key: result.action_key, pack, for_compilers };
        if let Some((_, fitting)) = self.state().asked.iter_mut().find(|(key, _)| *key == result.action_key) {
            *fitting = Some(Fitting { entry, program });
        }
    }

    /// What is to be published for the next build; `None` where the last record says the same, or the server was not
    /// asked for anything.
    pub(super) fn new_record(&self) -> Option<NewRecord> {
        if !self.progress.borrow().started {
            return None;
        }
        let state = self.state();
        let fitting = || state.asked.iter().filter_map(|(_, fitting)| fitting.as_ref());
        let entries: Vec<BuildEntry> = fitting().map(|fitting| fitting.entry).collect();
        let is_known = entries.iter().all(|entry| state.last.entries.contains(entry));
        if entries.is_empty() || is_known && !state.has_lost_bundle {
            return None;
        }
        let record = BuildRecord { entries };
        record.check().ok()?;
        let mut result = record.into_result(self.key);
        let programs: Vec<ScriptProgram> = fitting().filter_map(|fitting| fitting.program.clone()).collect();
        let last = state.last_result.as_ref().filter(|last| bundle::is_of(last, &programs));
        if let Some((last, pack)) = last.and_then(|last| Some((last, last.pack?))) {
            bundle::attach(&mut result, last.outputs.clone(), pack);
        }
        Some(NewRecord { result, programs })
    }

    /// Notes what was left, so that it is not left twice.
    pub(super) fn has_left(&self, result: StoredResult) {
        let mut state = self.state();
        state.last = BuildRecord::from_result(&result).unwrap_or_default();
        state.last_result = Some(result);
        state.has_lost_bundle = false;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the stream, the first time.
    fn start(self: &Arc<Self>, agent: &Arc<Agent>) {
        let is_first = self.progress.send_if_modified(|progress| {
            let is_first = !std::mem::replace(&mut progress.started, true);
            progress.streams += u32::from(is_first);
            is_first
        });
        if is_first {
            self.spawn_stream(agent, self.wanted_packs(agent));
        }
    }

    fn wanted_packs(&self, agent: &Agent) -> Packs {
        match () {
            () if agent.local.is_some() => Packs::None,
            () if agent.config.lazy && self.deferral.is_on() => Packs::Final,
            () => Packs::All,
        }
    }

    /// Starts a stream of the packs that the first one has left out, once.
    pub(super) fn fetch_rest(self: &Arc<Self>, agent: &Arc<Agent>) {
        let mut state = self.state();
        let rest = std::mem::take(&mut state.left_out);
        if rest.is_empty() {
            return;
        }
        state.packs.extend(rest.into_iter().map(|pack| (pack, None)));
        drop(state);
        self.progress.send_modify(|progress| progress.streams += 1);
        self.spawn_stream(agent, Packs::Rest);
    }

    /// Receives one stream to its end, in a task of its own; it is counted already.
    fn spawn_stream(self: &Arc<Self>, agent: &Arc<Agent>, packs: Packs) {
        let (build, agent) = (Arc::clone(self), Arc::clone(agent));
        tokio::spawn(async move {
            if let Some(remote) = &agent.remote {
                remote.reads.resumed().await;
                if !remote.reads.is_open()
                    && let Err(error) = build.receive(remote, packs).await
                {
                    tracing::info!("the last build's stream ended early: {error}");
                }
            }
            build.progress.send_modify(|progress| progress.streams -= 1);
        });
    }

    async fn receive(self: &Arc<Self>, remote: &Remote, packs: Packs) -> io::Result<()> {
        let stream = remote.build(&self.key, packs).await.map_err(io::Error::other)?;
        let mut reader: Reader = Box::new(StreamReader::new(Box::pin(stream)));
        let mut magic = [0; MAGIC.len()];
        reader.read_exact(&mut magic).await?;
        if magic != MAGIC {
            return Err(malformed());
        }
        let mut received_bytes = 0;
        loop {
            let mut header = [0; HEADER_BYTES];
            reader.read_exact(&mut header).await?;
            match Frame::from_header(&header).map_err(io::Error::other)? {
                Frame::Manifests { body_bytes } => self.answer(&mut reader, body_bytes, packs).await?,
                Frame::Blob { digest, body_bytes } => {
                    received_bytes += body_bytes;
                    if received_bytes > MAX_STREAM_BYTES || start_time(self.cargo).is_none() {
                        return Ok(());
                    }
                    match self.bundle(&digest) {
                        Some(record) => reader = self.take_apart(record, reader, body_bytes).await?,
                        None => {
                            let frames = spool(&mut reader, body_bytes).await?;
                            self.place(digest, Arrived::Frames(frames));
                        }
                    }
                }
                Frame::Absent(digest) => match self.bundle(&digest) {
                    Some(record) => self.give_up(&record),
                    None => {
                        self.state().packs.remove(&digest);
                        self.progress.send_modify(|progress| progress.arrived += 1);
                    }
                },
                Frame::End => return Ok(()),
            }
        }
    }

    /// The last build's result, where its bundle is the blob of that digest; once.
    fn bundle(&self, digest: &Digest) -> Option<StoredResult> {
        self.state().bundle.take_if(|record| record.pack.is_some_and(|pack| pack.digest == *digest))
    }

    fn place(&self, digest: Digest, pack: Arrived) {
        if let Some(place) = self.state().packs.get_mut(&digest) {
            *place = Some(pack);
        }
        self.progress.send_modify(|progress| progress.arrived += 1);
    }

    /// Places what is in a bundle while it is received; returns what comes behind it.
    async fn take_apart(
        self: &Arc<Self>,
        record: StoredResult,
        reader: Reader,
        body_bytes: u64,
    ) -> io::Result<Reader> {
        let build = Arc::clone(self);
        let taking_apart = move || {
            let mut body = SyncIoBridge::new(reader.take(body_bytes));
            let placing = |digest, content| build.place(digest, Arrived::Content(content));
            if let Err(error) = bundle::take_apart(&record, &mut body, placing) {
                tracing::info!("a bundle is of no use: {error}");
                build.give_up(&record);
            }
            io::copy(&mut body, &mut io::sink())?;
            Ok(body.into_inner().into_inner())
        };
        tokio::task::spawn_blocking(taking_apart).await.map_err(io::Error::other)?
    }

    /// What has not come of a bundle is asked for by itself.
    fn give_up(&self, record: &StoredResult) {
        let mut state = self.state();
        state.has_lost_bundle = true;
        for output in &record.outputs {
            if matches!(state.packs.get(&output.digest), Some(None)) {
                state.packs.remove(&output.digest);
            }
        }
        drop(state);
        self.progress.send_modify(|progress| progress.arrived += 1);
    }

    /// Takes the manifests, and the last build's record among them.
    async fn answer(
        &self,
        reader: &mut (impl AsyncRead + Unpin),
        body_bytes: u64,
        packs: Packs,
    ) -> io::Result<()> {
        if body_bytes > LookupResponse::LIMIT_BYTES as u64 {
            return Err(malformed());
        }
        let mut compressed = Vec::new();
        reader.take(body_bytes).read_to_end(&mut compressed).await?;
        let decoding = tokio::task::spawn_blocking(move || decode_manifests(&compressed));
        let response = decoding.await.map_err(io::Error::other)??;
        let mut state = self.state();
        state.manifests =
            response.manifests.into_iter().map(|manifest| (manifest.action_key, manifest)).collect();
        let own = state.manifests.remove(&self.key);
        let results = own.iter().flat_map(Manifest::readable_results);
        let records = results.filter_map(|result| Some((BuildRecord::from_result(&result).ok()?, result)));
        let newest = records.map(|(record, result)| (record, Some(result))).next();
        (state.last, state.last_result) = newest.unwrap_or_default();
        state.bundle = state.last_result.clone();
        let (mut to_come, mut left_out) = (HashMap::new(), HashSet::new());
        for entry in &state.last.entries {
            match (packs, entry.pack) {
                (Packs::Final, Some(pack)) if entry.for_compilers => drop(left_out.insert(pack)),
                (Packs::Final | Packs::All, Some(pack)) => drop(to_come.insert(pack, None)),
                _ => {}
            }
        }
        (state.packs, state.left_out) = (to_come, left_out);
        drop(state);
        self.progress.send_modify(|progress| progress.answered = true);
        Ok(())
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed stream")
}

fn decode_manifests(compressed: &[u8]) -> io::Result<LookupResponse> {
    let mut content = Contents::new(compressed, LookupResponse::LIMIT_BYTES as u64)?;
    let mut encoded = Vec::new();
    content.read_to_end(&mut encoded)?;
    decode(&encoded).map_err(io::Error::other)
}

/// Takes exactly so many bytes to where they wait.
async fn spool(reader: &mut (impl AsyncRead + Unpin), body_bytes: u64) -> io::Result<SpooledTempFile> {
    let mut pack = SpooledTempFile::new(SPOOL_BYTES);
    let mut left_bytes = body_bytes;
    let mut buffer = vec![0; SPOOL_BYTES];
    while left_bytes > 0 {
        let wanted = usize::try_from(left_bytes).unwrap_or(SPOOL_BYTES).min(SPOOL_BYTES);
        let count = reader.read(&mut buffer[..wanted]).await?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        pack.write_all(&buffer[..count])?;
        left_bytes -= count as u64;
    }
    pack.seek(SeekFrom::Start(0))?;
    Ok(pack)
}

/// The `Cargo.lock` of a directory or one above it, and the way from there, if there is any.
fn lock_above(directory: &Path) -> Option<(PathBuf, Option<PathBuf>)> {
    let directory = fs::canonicalize(directory).ok()?;
    let root = directory.ancestors().find(|directory| directory.join("Cargo.lock").is_file())?;
    let way = directory.strip_prefix(root).ok().filter(|way| !way.as_os_str().is_empty());
    Some((root.join("Cargo.lock"), way.map(Path::to_owned)))
}

/// Names of a `Cargo.lock`'s packages that come from nowhere else: the workspace's own, sorted.
fn own_packages(lock: &Path) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct Lock {
        #[serde(default)]
        package: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        source: Option<String>,
    }
    let lock: Lock = toml::from_str(&fs::read_to_string(lock).ok()?).ok()?;
    let own = lock.package.into_iter().filter(|package| package.source.is_none());
    let mut names: Vec<String> = own.map(|package| package.name).collect();
    names.sort_unstable();
    Some(names)
}

/// Whether a cargo command runs compilers alone on what it has compiled: neither rustdoc nor the program, and no tests,
/// which are run from where they are.
fn is_only_compiling(arguments: &[Vec<u8>]) -> bool {
    let commands = [b"build".as_slice(), b"b", b"check", b"c", b"rustc", b"install"];
    let is_one = arguments.first().is_some_and(|command| commands.contains(&command.as_slice()));
    let tests = ["--test", "--bench", "--all-targets", "--example"];
    is_one && !arguments.iter().any(|word| tests.iter().any(|test| word.starts_with(test.as_bytes())))
}

/// Cargo's arguments without those that say how it talks, how much it does at a time and where things are; and where the
/// manifest is, if they say that.
fn what_is_built<'w>(words: impl Iterator<Item = &'w [u8]>) -> (Vec<Vec<u8>>, Option<&'w Path>) {
    let plain =
        [b"-q".as_slice(), b"-v", b"-vv", b"--quiet", b"--verbose", b"--locked", b"--offline", b"--frozen"];
    let with_value =
        ["-j", "--jobs", "--color", "--message-format", "--target-dir", "--manifest-path"].map(str::as_bytes);
    let (mut arguments, mut manifest) = (Vec::new(), None);
    let mut words = words.filter(|word| !word.is_empty() && !plain.contains(word));
    while let Some(word) = words.next() {
        if word == b"--" {
            // What follows is for the program.
            arguments.extend(words.map(<[u8]>::to_vec));
            break;
        }
        // `--name value`, `--name=value` or `-j4`.
        let is_its = |name: &&[u8]| {
            let rest = word.strip_prefix(*name);
            rest.is_some_and(|rest| *name == b"-j" || rest.is_empty() || rest.starts_with(b"="))
        };
        let Some(name) = with_value.into_iter().find(is_its) else {
            arguments.push(word.to_vec());
            continue;
        };
        let attached = word.strip_prefix(name).filter(|rest| !rest.is_empty());
        let value =
            attached.map_or_else(|| words.next(), |rest| Some(rest.strip_prefix(b"=").unwrap_or(rest)));
        if name == b"--manifest-path" {
            manifest = value.map(|path| Path::new(OsStr::from_bytes(path)));
        }
    }
    (arguments, manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspaces_own_packages_have_no_source() {
        let directory = tempfile::tempdir().unwrap();
        let lock = directory.path().join("Cargo.lock");
        let text = "version = 4\n[[package]]\nname = \"b\"\nversion = \"1.0.0\"\n[[package]]\nname = \"dep\"\n\
            version = \"1.0.0\"\nsource = \"registry\"\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n";
        fs::write(&lock, text).unwrap();
        assert_eq!(own_packages(&lock).unwrap(), ["a", "b"]);
        fs::write(&lock, "no lock").unwrap();
        assert!(own_packages(&lock).is_none());
    }

    #[test]
    fn a_package_is_told_from_others_of_its_workspace_wherever_that_is() {
        let directory = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(directory.path()).unwrap();
        let member = root.join("w/a/src");
        fs::create_dir_all(&member).unwrap();
        assert!(lock_above(&member).is_none() && lock_above(&root.join("absent")).is_none());
        let lock = root.join("w/Cargo.lock");
        fs::write(&lock, "").unwrap();
        assert_eq!(lock_above(&root.join("w")), Some((lock.clone(), None)));
        assert_eq!(lock_above(&root.join("w/a")), Some((lock.clone(), Some("a".into()))));
        assert_eq!(lock_above(&member.join("..")), Some((lock, Some("a".into()))));
    }

    #[test]
    fn how_and_where_something_is_built_is_left_out() {
        let of = |line: &str| {
            let line = line.replace(' ', "\0");
            let (arguments, manifest) = what_is_built(line.as_bytes().split(|byte| *byte == 0));
            let text = |word: &Vec<u8>| String::from_utf8_lossy(word).into_owned();
            let manifest = manifest.map(|path| path.display().to_string()).unwrap_or_default();
            format!("{} | {manifest}", arguments.iter().map(text).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(of("build -j 4 -q --release"), "build --release | ");
        assert_eq!(of("build -j4 --jobs=2 --color never --locked"), "build | ");
        assert_eq!(of("test --manifest-path a/Cargo.toml --target-dir=/t -p x"), "test -p x | a/Cargo.toml");
        assert_eq!(of("test --manifest-path=../Cargo.toml"), "test | ../Cargo.toml");
        assert_eq!(of("run -- --manifest-path x"), "run --manifest-path x | ");
        assert_eq!(of("build --manifest-path"), "build | ");
        assert_eq!(of("build --colors --target-directory x"), "build --colors --target-directory x | ");
    }

    fn build() -> Build {
        let key = ActionKey::from_bytes([9; 32]);
        Build {
            key,
            cargo: std::process::id(),
            deferral: Deferral::new(true),
            progress: watch::Sender::default(),
            state: Mutex::default(),
        }
    }

    fn result(number: u8) -> StoredResult {
        let record = BuildRecord::default();
        StoredResult {
            action_key: ActionKey::from_bytes([number; 32]),
            ..record.into_result(ActionKey::from_bytes([0; 32]))
        }
    }

    #[test]
    fn a_record_is_left_where_it_says_something_new() {
        let build = build();
        build.ask(result(1).action_key);
        build.note(&result(1), false, None);
        assert!(build.new_record().is_none());
        build.state().asked.clear();
        build.progress.send_modify(|progress| progress.started = true);
        assert!(build.new_record().is_none());
        for number in [1, 2] {
            build.ask(result(number).action_key);
        }
        build.note(&result(2), true, None);
        let record = BuildRecord::from_result(&build.new_record().unwrap().result).unwrap();
        assert_eq!(
            record.entries,
            [BuildEntry { action_key: result(2).action_key, pack: None, for_compilers: true }]
        );
        build.state().last = record;
        assert!(build.new_record().is_none());
        build.note(&result(1), false, None);
        let record = BuildRecord::from_result(&build.new_record().unwrap().result).unwrap();
        assert_eq!(record.entries[0].action_key, result(1).action_key);
    }

    #[tokio::test]
    async fn a_pack_is_waited_for_no_longer_than_its_compile_takes() {
        let build = build();
        let (near, far, unknown) = (Digest::of(b"near"), Digest::of(b"far"), Digest::of(b"unknown"));
        build.state().packs.insert(near, Some(Arrived::Frames(SpooledTempFile::new(1))));
        build.state().packs.insert(far, None);
        build.progress.send_modify(|progress| (progress.started, progress.streams) = (true, 1));
        assert!(matches!(build.pack(&near, 0).await, Announced::Here(_)));
        assert!(matches!(build.pack(&near, 0).await, Announced::No));
        assert!(matches!(build.pack(&unknown, 0).await, Announced::No));
        assert!(matches!(build.pack(&far, 0).await, Announced::Late));
        build.progress.send_modify(|progress| progress.streams = 0);
        assert!(matches!(build.pack(&far, 60_000).await, Announced::No));
    }
}
