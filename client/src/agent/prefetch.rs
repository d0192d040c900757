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
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cachec_protocol::codec::Message;
use cachec_protocol::frame::{Frame, HEADER_BYTES, MAGIC};
use cachec_protocol::message::{LookupResponse, Manifest};
use cachec_protocol::pack::Contents;
use cachec_protocol::{ActionKey, BuildEntry, BuildRecord, Digest, StoredResult, decode};
use tempfile::SpooledTempFile;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::bundle::{self, ScriptProgram};
use super::cargo_command::CargoCommand;
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
    fn of_cargo(cargo: u32) -> Option<Self> {
        let command = CargoCommand::of(cargo)?;
        Some(Self {
            key: command.key,
            cargo,
            deferral: Deferral::new(command.only_compiles),
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

#[cfg(test)]
mod tests {
    use super::*;

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
