//! Finding a stored result whose inputs are what is here now, and staging its outputs.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cachec_protocol::StoredResult;
use cachec_protocol::message::PublishRequest;
use cachec_protocol::pack::Contents;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::prefetch::{Announced, Arrived, Build};
use super::restore::{self, Restored};
use super::{Agent, deferral};
use crate::inputs::{self, Files};
use crate::remote::Remote;
use crate::signature;
use crate::unit::Unit;

/// A download may take this long, or twice the compile that it saves.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a hit came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier {
    Local,
    Remote,
}

/// A staged hit.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) restored: Restored,
    pub(super) tier: Tier,
    pub(super) result: StoredResult,
    /// Whether only the texts that cargo reads are staged.
    pub(super) is_deferred: bool,
}

/// What either tier has for a unit; stages nothing.
pub(super) async fn stored(agent: &Arc<Agent>, unit: &Arc<Unit>) -> Option<StoredResult> {
    let local = {
        let (agent, unit) = (Arc::clone(agent), Arc::clone(unit));
        blocking(move || matching(&agent, &unit, agent.local.as_ref()?.manifest(&unit.action_key), None))
            .await
    };
    if local.is_some() {
        return local;
    }
    let remote = agent.remote.as_ref().filter(|remote| !remote.reads.is_open())?;
    fitting(agent, unit, remote.results(unit.action_key).await?, None).await
}

/// Looks in the local tier, then on the server.
pub(super) async fn find(agent: &Arc<Agent>, unit: &Arc<Unit>, build: Option<&Arc<Build>>) -> Option<Found> {
    if let Some(build) = build {
        build.ask(unit.action_key);
    }
    let found = match find_locally(agent, unit, build).await {
        Some(found) => Some(found),
        None => {
            let remote = agent.remote.as_ref().filter(|remote| !remote.reads.is_open())?;
            find_remotely(agent, remote, unit, build).await
        }
    }?;
    if let Some(build) = build {
        build.fits(unit, &found.result);
    }
    Some(found)
}

async fn find_locally(agent: &Arc<Agent>, unit: &Arc<Unit>, build: Option<&Arc<Build>>) -> Option<Found> {
    let (agent, unit, build) = (Arc::clone(agent), Arc::clone(unit), build.cloned());
    blocking(move || {
        let tier = agent.local.as_ref()?;
        let result = matching(&agent, &unit, tier.manifest(&unit.action_key), build.as_deref())?;
        match restore::from_local(&unit, &result, tier, &agent.memo) {
            Ok(restored) => {
                tier.touch(&result);
                Some(Found { restored, tier: Tier::Local, result, is_deferred: false })
            }
            Err(error) => {
                restore_failed(&agent, &unit, &error);
                None
            }
        }
    })
    .await
}

async fn find_remotely(
    agent: &Arc<Agent>,
    remote: &Remote,
    unit: &Arc<Unit>,
    build: Option<&Arc<Build>>,
) -> Option<Found> {
    let foretold = match build {
        Some(build) => build.manifest(agent, &unit.action_key).await,
        None => None,
    };
    let results = match foretold {
        Some(results) => results,
        None => remote.results(unit.action_key).await?,
    };
    let result = fitting(agent, unit, results, build).await?;
    let defers = build.is_some_and(|build| agent.config.lazy && build.deferral.is_on());
    let is_deferred = defers && deferral::can_be_deferred(unit, &result);
    let restored = if is_deferred {
        let (unit, result) = (Arc::clone(unit), result.clone());
        blocking(move || restore::deferred(&unit, &result).ok()).await?
    } else {
        obtain(agent, unit, &result, build, Patience::OfItsCompile).await?
    };
    remote.save(result.compile_ms);
    Some(Found { restored, tier: Tier::Remote, result, is_deferred })
}

/// The first of a server's results that is trusted and whose inputs are all the same now.
async fn fitting(
    agent: &Arc<Agent>,
    unit: &Arc<Unit>,
    results: Vec<StoredResult>,
    build: Option<&Arc<Build>>,
) -> Option<StoredResult> {
    let trusted = &agent.config.trusted_keys;
    let results = results.into_iter().filter(|result| signature::is_accepted(result, trusted)).collect();
    let (agent, unit, build) = (Arc::clone(agent), Arc::clone(unit), build.cloned());
    blocking(move || matching(&agent, &unit, results, build.as_deref())).await
}

/// How long a pack is waited for that is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// No longer than the compile takes that it saves.
    OfItsCompile,
    /// As long as a download may take.
    OfADownload,
}

/// Stages what the server has of a result: from the build's stream, else by asking for it.
pub(super) async fn obtain(
    agent: &Arc<Agent>,
    unit: &Arc<Unit>,
    result: &StoredResult,
    build: Option<&Arc<Build>>,
    patience: Patience,
) -> Option<Restored> {
    let remote = agent.remote.as_ref()?;
    if patience == Patience::OfADownload {
        remote.reads.resumed().await;
    }
    if remote.reads.is_open() {
        return None;
    }
    let started = Instant::now();
    let announced = match (build, result.pack) {
        (Some(build), Some(pack)) => build.pack(&pack.digest, result.compile_ms).await,
        _ => Announced::No,
    };
    let staged = match announced {
        Announced::Here(pack) => stage(agent, unit, result, pack).await,
        Announced::Late if patience == Patience::OfItsCompile => {
            remote.spend(started);
            return None;
        }
        Announced::Late | Announced::No => {
            let limit = FETCH_TIMEOUT.max(Duration::from_millis(result.compile_ms.saturating_mul(2)));
            let fetched = tokio::time::timeout(limit, fetch(agent, remote, unit, result)).await;
            fetched.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
        }
    };
    remote.spend(started);
    match staged {
        Ok(restored) => {
            keep_locally(agent, result).await;
            Some(restored)
        }
        Err(error) => {
            remote.read_failed(&format!("a blob could not be restored: {error}"));
            restore_failed(agent, unit, &error);
            None
        }
    }
}

/// Keeps a result whose outputs are in the local tier by now, for the next build.
async fn keep_locally(agent: &Arc<Agent>, result: &StoredResult) {
    if agent.local.is_none() {
        return;
    }
    let agent = Arc::clone(agent);
    let publish = PublishRequest { result: result.clone(), action_fields: Vec::new() };
    let keep = move || agent.local.as_ref().map(|tier| tier.keep_result(&publish));
    if let Ok(Some(Err(error))) = tokio::task::spawn_blocking(keep).await {
        tracing::info!("a restored result is not kept: {error}");
    }
}

/// Stages a pack that is here already.
async fn stage(
    agent: &Arc<Agent>,
    unit: &Arc<Unit>,
    result: &StoredResult,
    pack: Arrived,
) -> io::Result<Restored> {
    let (agent, unit, result) = (Arc::clone(agent), Arc::clone(unit), result.clone());
    let staging = move || {
        let content = pack.content(result.packed_bytes())?;
        restore::from_pack(&unit, &result, content, agent.local.as_ref(), &agent.memo)
    };
    tokio::task::spawn_blocking(staging).await.map_err(io::Error::other)?
}

async fn fetch(
    agent: &Arc<Agent>,
    remote: &Remote,
    unit: &Arc<Unit>,
    result: &StoredResult,
) -> io::Result<Restored> {
    let Some(pack) = result.pack else { return restore::without_pack(unit, result) };
    let stream = Box::pin(remote.blob(&pack.digest).await.map_err(io::Error::other)?);
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    let staging = {
        let (agent, unit, result) = (Arc::clone(agent), Arc::clone(unit), result.clone());
        let chunks = StreamReader::new(futures_util::stream::unfold(receiver, |mut receiver| async move {
            let chunk: Option<io::Result<bytes::Bytes>> = receiver.recv().await;
            chunk.map(|chunk| (chunk, receiver))
        }));
        let reader = SyncIoBridge::new(Box::pin(chunks));
        tokio::task::spawn_blocking(move || {
            let content = Contents::new(reader, result.packed_bytes())?;
            restore::from_pack(&unit, &result, content, agent.local.as_ref(), &agent.memo)
        })
    };
    forward(stream, sender).await;
    staging.await.map_err(io::Error::other)?
}

/// Hands a download to the blocking side, which stops listening where it has seen enough.
async fn forward(
    mut stream: impl futures_util::Stream<Item = io::Result<bytes::Bytes>> + Unpin,
    sender: tokio::sync::mpsc::Sender<io::Result<bytes::Bytes>>,
) {
    use futures_util::StreamExt as _;
    while let Some(chunk) = stream.next().await {
        let failed = chunk.is_err();
        if sender.send(chunk).await.is_err() || failed {
            return;
        }
    }
}

/// The first of some results whose inputs are all the same now.
fn matching(
    agent: &Agent,
    unit: &Unit,
    results: Vec<StoredResult>,
    build: Option<&Build>,
) -> Option<StoredResult> {
    let files = Files { memo: &agent.memo, deferred: build.map(|build| &build.deferral.files) };
    let mut first_difference = None;
    for result in results {
        let started = Instant::now();
        let validated = inputs::validate(unit, &result.input_set, files);
        let validation_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        agent.statistics_of(unit).validated(result.input_set.inputs().len(), validation_us);
        match validated {
            Ok(()) => return Some(result),
            Err(name) => {
                first_difference.get_or_insert_with(|| String::from_utf8_lossy(name).replace('\0', "$"));
            }
        }
    }
    if let Some(name) = first_difference {
        *agent.statistics_of(unit).changed_inputs.entry(name).or_default() += 1;
    }
    None
}

fn restore_failed(agent: &Agent, unit: &Unit, error: &io::Error) {
    tracing::warn!("{} could not be restored: {error}", unit.name());
    agent.statistics_of(unit).failed_restores += 1;
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Option<T> + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok().flatten()
}
