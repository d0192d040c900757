//! Storing results in the background: packing, the local tier, the upload.
//!
//! A job owns its open outputs and its gate. Memory is bounded: [`super::PACKING_TASKS`] jobs read and
//! compress at a time, and a pack waits for its upload in a file where it is large.

use std::io::{Seek, SeekFrom};
use std::sync::Arc;

use cachec_protocol::message::PublishRequest;
use cachec_protocol::{Digest, Output, Pack, StoredResult};
use reqwest::Body;
use tempfile::{SpooledData, SpooledTempFile};
use tokio::sync::OwnedMutexGuard;
use tokio_util::io::ReaderStream;

use super::bundle::{self, Bundle, ScriptProgram};
use super::prefetch::{Build, NewRecord};
use super::record::{self, OpenOutputs, Recorded, Stores};
use super::{Agent, Counted, verify};
use crate::inputs::NotStorable;
use crate::ipc::Finished;
use crate::remote::{Remote, RemoteError};
use crate::unit::Unit;

/// Bytes of a pack that are read at a time.
const READ_BYTES: usize = 256 << 10;

/// More jobs than this wait only where compiling is faster than packing; then a result is forgotten.
const MAX_PENDING: usize = 256;

/// A run whose result is to be stored.
pub(super) struct Job {
    pub(super) unit: Arc<Unit>,
    pub(super) finished: Finished,
    pub(super) outputs: OpenOutputs,
    pub(super) gate: Option<OwnedMutexGuard<()>>,
    pub(super) build: Option<Arc<Build>>,
    /// What it is to be compared with, instead of being stored.
    pub(super) stored: Option<Box<StoredResult>>,
}

/// Starts storing; returns at once.
pub(super) fn start(agent: &Arc<Agent>, job: Job) {
    if *agent.pending.borrow() >= MAX_PENDING {
        count_not_stored(agent, &job.unit, "queue-full");
        return;
    }
    let counted = Counted::new(&agent.pending);
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        let Job { unit, finished, outputs, gate, build, stored } = job;
        match pack(&agent, Arc::clone(&unit), finished, outputs).await {
            Ok(recorded) if let Some(stored) = stored => {
                verify::compare(&agent, &unit, &stored, &recorded.publish.result);
            }
            Ok(recorded) => {
                // Who waits for the result finds it in the local tier, where there is one.
                let gate = gate.filter(|_| agent.local.is_none());
                store(&agent, &unit, recorded, build.as_deref()).await;
                drop(gate);
            }
            Err(reason) => {
                tracing::info!("not stored: {reason:?}");
                count_not_stored(&agent, &unit, &reason.to_string());
            }
        }
        drop(counted);
    });
}

/// Counts a compiled unit whose result is not stored.
pub(super) fn count_not_stored(agent: &Agent, unit: &Unit, reason: &str) {
    *agent.statistics_of(unit).not_stored.entry(reason.to_owned()).or_default() += 1;
}

async fn pack(
    agent: &Arc<Agent>,
    unit: Arc<Unit>,
    finished: Finished,
    outputs: OpenOutputs,
) -> Result<Recorded, NotStorable> {
    let _permit = agent.packing.acquire().await.map_err(std::io::Error::other)?;
    let agent = Arc::clone(agent);
    tokio::task::spawn_blocking(move || {
        let wants_pack = agent.writable_remote().is_some();
        let tier = agent.local.as_ref().filter(|_| agent.stores());
        let stores = Stores { memo: &agent.memo, tier, wants_pack };
        let recorded = record::record(&unit, &finished, outputs, stores)?;
        if let Some(tier) = stores.tier {
            tier.keep_result(&recorded.publish)?;
        }
        Ok(recorded)
    })
    .await
    .map_err(std::io::Error::other)?
}

async fn store(agent: &Agent, unit: &Unit, recorded: Recorded, build: Option<&Build>) {
    {
        let mut statistics = agent.statistics_of(unit);
        statistics.stored += 1;
        statistics.bound += u64::from(recorded.bound);
    }
    // Without the pack's bytes there was no server to take them when the result was recorded.
    let is_whole = recorded.pack.is_some() || recorded.publish.result.pack.is_none();
    let Some(remote) = agent.writable_remote().filter(|_| is_whole) else { return };
    let result = recorded.publish.result.clone();
    match upload(agent, remote, recorded).await {
        Ok(()) => {
            agent.statistics_of(unit).uploaded += 1;
            if let Some(build) = build {
                build.fits(unit, &result);
            }
        }
        Err(error) => {
            tracing::warn!("a result could not be uploaded: {error}");
            if let RemoteError::Refused { status: 507, .. } = error {
                agent.notify(format!("storing without the server: {error}"));
            }
        }
    }
}

/// Publishes what a build asked for, where the last record does not say so already. Without it the next build asks
/// unit by unit.
pub(super) async fn leave_record(agent: &Agent, build: &Build) {
    let (Some(remote), Some(record)) = (agent.writable_remote(), build.new_record()) else { return };
    match upload_record(agent, remote, record).await {
        Ok(result) => build.has_left(result),
        Err(error) => tracing::info!("no build record: {error}"),
    }
}

async fn upload_record(
    agent: &Agent,
    remote: &Remote,
    record: NewRecord,
) -> Result<StoredResult, RemoteError> {
    let NewRecord { mut result, programs } = record;
    let has_bundle = match result.pack {
        Some(pack) => !remote.needs(pack.digest).await?,
        None => false,
    };
    if !has_bundle {
        (result.outputs, result.pack) = (Vec::new(), None);
        match upload_bundle(agent, remote, programs).await {
            Ok(Some((outputs, pack))) => bundle::attach(&mut result, outputs, pack),
            Ok(None) => {}
            Err(error) => tracing::info!("a build record without a bundle: {error}"),
        }
    }
    remote.publish(&PublishRequest { result: result.clone(), action_fields: Vec::new() }).await?;
    Ok(result)
}

async fn upload_bundle(
    agent: &Agent,
    remote: &Remote,
    programs: Vec<ScriptProgram>,
) -> anyhow::Result<Option<(Vec<Output>, Pack)>> {
    let made = {
        let _permit = agent.packing.acquire().await?;
        tokio::task::spawn_blocking(move || bundle::make(programs)).await??
    };
    let Some(Bundle { outputs, pack, compressed }) = made else { return Ok(None) };
    put_missing_pack(remote, &pack.digest, compressed).await?;
    Ok(Some((outputs, pack)))
}

async fn upload(agent: &Agent, remote: &Remote, mut recorded: Recorded) -> Result<(), RemoteError> {
    if let (Some(pack), Some(spool)) = (recorded.publish.result.pack, recorded.pack) {
        put_missing_pack(remote, &pack.digest, spool).await?;
    }
    if let Some(signer) = &agent.signer {
        signer.sign(&mut recorded.publish.result);
    }
    remote.publish(&recorded.publish).await
}

async fn put_missing_pack(
    remote: &Remote,
    digest: &Digest,
    mut spool: SpooledTempFile,
) -> Result<(), RemoteError> {
    if !remote.needs(*digest).await? {
        return Ok(());
    }
    let unreadable = |error: std::io::Error| RemoteError::Unreachable(format!("the spooled pack: {error}"));
    let size_bytes = spool.seek(SeekFrom::End(0)).map_err(unreadable)?;
    let pack = spool.into_inner();
    let put = || async {
        let body = body_of(&pack).map_err(unreadable)?;
        remote.put_blob(digest, body, size_bytes).await
    };
    remote.patiently(put).await
}

/// A pack from its beginning.
fn body_of(pack: &SpooledData) -> std::io::Result<Body> {
    match pack {
        SpooledData::InMemory(content) => Ok(Body::from(content.get_ref().clone())),
        SpooledData::OnDisk(file) => {
            let mut file = file.try_clone()?;
            file.seek(SeekFrom::Start(0))?;
            let file = tokio::fs::File::from_std(file);
            Ok(Body::wrap_stream(ReaderStream::with_capacity(file, READ_BYTES)))
        }
    }
}
