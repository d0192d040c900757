//! One wrapper's (or command's) connection.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use minicbor::{Decode, Encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::OwnedMutexGuard;

use super::lookup::{self, Found, Tier};
use super::prefetch::Build;
use super::publish::{self, Job};
use super::{Agent, Counted, DRAIN_TIMEOUT, deferral, launcher, record};
use crate::invocation::{Invocation, Refusal};
use crate::ipc::{self, Control, Finished, Request, Response, Run, UnitRequest};
use crate::unit::{Task, Unit};
use cachec_protocol::StoredResult;

/// How often a wrapper hears that the agent is alive; a third of what it waits for.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// Said where the flag is dropped, which happens in CI and in containers only.
const INCREMENTAL_NOTICE: &str = "incremental compilation is off in CI and containers, where it cannot be cached; \
    CARGO_INCREMENTAL=1 turns it on, and this line off with CARGO_INCREMENTAL=0";

/// Said once where the tracer cannot run.
const UNOBSERVED_NOTICE: &str = "what compiles read cannot be observed here, so only libraries are cached; \
    'cachec doctor' says more";

/// Serves one connection to its end.
///
/// # Errors
/// Those of the socket: the wrapper is gone, or gave up. Whatever was staged for it is removed.
pub(super) async fn serve(agent: Arc<Agent>, stream: UnixStream) -> io::Result<()> {
    let wrapper = stream.peer_cred().ok().and_then(|peer| peer.pid());
    let mut connection = Connection { stream };
    match connection.receive().await? {
        Request::Unit(request) => {
            // A verified build restores nothing, so nothing is to be fetched for it.
            let build = agent.builds.of(wrapper).filter(|_| !agent.verifies());
            serve_unit(&agent, &mut connection, request, build).await
        }
        Request::Control(control) => serve_control(&agent, &mut connection, control).await,
        _ => Err(unexpected()),
    }
}

async fn serve_control(agent: &Arc<Agent>, connection: &mut Connection, control: Control) -> io::Result<()> {
    if control != Control::Statistics {
        connection.while_working(agent.drain(DRAIN_TIMEOUT)).await?;
    }
    if control == Control::Stop {
        agent.keep_memo().await;
        agent.leave_report();
    }
    connection.send(&Response::Report(agent.report())).await
}

async fn serve_unit(
    agent: &Arc<Agent>,
    connection: &mut Connection,
    request: UnitRequest,
    build: Option<Arc<Build>>,
) -> io::Result<()> {
    let active = Counted::new(&agent.active);
    let is_heard = request.is_heard;
    let primary = request.environment.iter().any(|pair| pair.name == b"CARGO_PRIMARY_PACKAGE");
    let words: Vec<Vec<u8>> = request.arguments.iter().map(|word| word.to_vec()).collect();
    let mut launcher = None;
    match connection.while_working(decide(agent, request, build.as_ref())).await? {
        Decision::Restore(unit, found) => {
            let asked = Asked { words: &words, build: build.as_ref() };
            if !restore(agent, connection, &unit, *found, asked).await? {
                fulfil(agent, connection, build.as_ref()).await?;
                run(connection, words, None, agent).await?;
            }
        }
        Decision::Compile { unit, gate, stored } => {
            if !matches!(unit.task, Task::Probe) {
                fulfil(agent, connection, build.as_ref()).await?;
            }
            let arguments = unit.compiler_arguments(&words);
            let recording = Recording { unit: Arc::clone(&unit), gate, build: build.clone(), stored };
            if run(connection, arguments, Some(recording), agent).await? {
                launcher = launcher::stage(&unit).map(|staged| (unit, staged));
            }
        }
        Decision::Refuse => {
            fulfil(agent, connection, build.as_ref()).await?;
            run(connection, words, None, agent).await?;
        }
    }
    drop(active);
    // The last unit of a build is one of the packages the user asked for, and nothing runs beside it.
    // The build's end may be the end of this machine.
    if primary && *agent.active.borrow() == 0 {
        let drained = connection.while_working(agent.drain(DRAIN_TIMEOUT)).await?;
        // A build does not end with the program of a script, which is not in its place yet.
        if let Some(build) = build.filter(|_| drained && launcher.is_none()) {
            let leaving = publish::leave_record(agent, &build);
            let _ = connection.while_working(tokio::time::timeout(DRAIN_TIMEOUT, leaving)).await?;
        }
        if !drained {
            agent.notify(format!("gave up waiting for uploads after {} s", DRAIN_TIMEOUT.as_secs()));
        }
    }
    let placement = launcher.as_ref().and_then(|(unit, staged)| launcher::placement(unit, staged));
    let notices = if is_heard { agent.take_notices() } else { Vec::new() };
    connection.send(&Response::Done(notices, placement)).await?;
    if launcher.is_some() {
        // The wrapper moves the launcher, then ends; what it could not move is removed here.
        connection.closed().await;
    }
    Ok(())
}

enum Decision {
    Restore(Arc<Unit>, Box<Found>),
    Compile {
        unit: Arc<Unit>,
        gate: Option<OwnedMutexGuard<()>>,
        /// What is to be compared with what comes out.
        stored: Option<Box<StoredResult>>,
    },
    Refuse,
}

async fn decide(agent: &Arc<Agent>, request: UnitRequest, build: Option<&Arc<Build>>) -> Decision {
    let crate_name = crate_name(&request);
    let unit = {
        let agent = Arc::clone(agent);
        let understand = move || Unit::new(&request, &agent.config, &agent.toolchains, &agent.memo);
        tokio::task::spawn_blocking(understand).await.unwrap_or(Err(Refusal::Arguments))
    };
    let unit = match unit {
        Ok(unit) => Arc::new(unit),
        Err(refusal) => {
            agent.statistics().units += 1;
            agent.statistics().refuse(&refusal.to_string(), &crate_name);
            return Decision::Refuse;
        }
    };
    agent.statistics_of(&unit).units += 1;
    if unit.invocation().is_some_and(Invocation::drops_incremental) {
        agent.notify(INCREMENTAL_NOTICE.to_owned());
    }
    let gate = agent.gates.pass(&unit.action_key).await;
    let stored = if agent.verifies() {
        lookup::stored(agent, &unit).await.map(Box::new)
    } else {
        match lookup::find(agent, &unit, build).await {
            Some(found) => return Decision::Restore(unit, Box::new(found)),
            None => None,
        }
    };
    agent.statistics_of(&unit).misses += 1;
    Decision::Compile { unit, gate, stored }
}

/// What a unit was asked for with, and in which build.
struct Asked<'a> {
    words: &'a [Vec<u8>],
    build: Option<&'a Arc<Build>>,
}

/// Has the wrapper rename what is staged; says whether it could.
async fn restore(
    agent: &Agent,
    connection: &mut Connection,
    unit: &Arc<Unit>,
    found: Found,
    asked: Asked<'_>,
) -> io::Result<bool> {
    let mut hit = found.restored.to_hit();
    if let Some(build) = asked.build.filter(|_| agent.config.lazy) {
        hit.promise = deferral::promise(unit, asked.words, &found.result, found.is_deferred);
        if found.is_deferred {
            deferral::keep_stale(unit, &mut hit.stdout);
            // What depends on it may ask as soon as cargo has heard of the hit.
            connection.while_working(build.deferral.owe(unit, &found.result)).await?;
        }
    }
    connection.send(&Response::Hit(hit)).await?;
    let Request::Restored(renamed, latency_us) = connection.receive().await? else {
        return Err(unexpected());
    };
    let mut statistics = agent.statistics_of(unit);
    if !renamed {
        statistics.failed_restores += 1;
        return Ok(false);
    }
    match found.tier {
        Tier::Local => statistics.local_hits += 1,
        Tier::Remote => statistics.remote_hits += 1,
    }
    statistics.deferred += u64::from(found.is_deferred);
    statistics.saved_ms += found.result.compile_ms;
    statistics.time_hit(latency_us);
    drop(statistics);
    found.restored.remember(&agent.memo);
    Ok(true)
}

/// Before a compiler runs: has the wrapper move to its place what was deferred. What cannot be had it makes itself.
async fn fulfil(
    agent: &Arc<Agent>,
    connection: &mut Connection,
    build: Option<&Arc<Build>>,
) -> io::Result<()> {
    let Some(build) = build.filter(|_| agent.config.lazy) else { return Ok(()) };
    let mut owed = connection.while_working(build.deferral.settle()).await?;
    if owed.is_empty() {
        return Ok(());
    }
    let fetched = connection.while_working(deferral::fetch_all(agent, build, &owed)).await?;
    let renames = fetched.iter().flat_map(|fetched| fetched.restored.renames()).collect();
    let marks = fetched.iter().filter_map(|fetched| fetched.mark.clone()).map(Into::into).collect();
    connection.send(&Response::Fulfil(renames, marks)).await?;
    let Request::Restored(renamed, _) = connection.receive().await? else { return Err(unexpected()) };
    if renamed {
        fetched.into_iter().for_each(|fetched| fetched.restored.remember(&agent.memo));
    }
    build.deferral.forget(&owed);
    owed.clear();
    Ok(())
}

/// Has the wrapper run the command; starts storing the result where there is a unit to record. Says whether it
/// succeeded.
async fn run(
    connection: &mut Connection,
    arguments: Vec<Vec<u8>>,
    recording: Option<Recording>,
    agent: &Arc<Agent>,
) -> io::Result<bool> {
    let remappings = recording.as_ref().map(|recording| recording.unit.remappings()).unwrap_or_default();
    let recording = recording.filter(|recording| agent.stores() || recording.stored.is_some());
    let message = Run {
        arguments: arguments.into_iter().map(Into::into).collect(),
        record: recording.as_ref().map(|recording| recording.unit.places()),
        remappings,
    };
    connection.send(&Response::Run(message)).await?;
    let Request::Finished(finished) = connection.receive().await? else {
        return Err(unexpected());
    };
    let succeeded = finished.succeeded;
    if let Some(recording) = recording.filter(|_| succeeded) {
        keep(agent, recording, finished).await;
    }
    Ok(succeeded)
}

async fn keep(agent: &Arc<Agent>, recording: Recording, finished: Finished) {
    let Recording { unit, gate, build, stored } = recording;
    if finished.trace.is_none() {
        agent.notify(UNOBSERVED_NOTICE.to_owned());
    }
    if finished.needs_real_paths {
        publish::count_not_stored(agent, &unit, "needs-real-paths");
        return;
    }
    if finished.stdout.is_none() || finished.stderr.is_none() {
        publish::count_not_stored(agent, &unit, "large-streams");
        return;
    }
    let opening = {
        let (unit, trace) = (Arc::clone(&unit), finished.trace.clone());
        tokio::task::spawn_blocking(move || record::open_outputs(&unit, trace.as_ref())).await
    };
    agent.statistics_of(&unit).traced += u64::from(finished.trace.is_some());
    match opening {
        Ok(Ok(outputs)) => publish::start(agent, Job { unit, finished, outputs, gate, build, stored }),
        Ok(Err(reason)) => publish::count_not_stored(agent, &unit, &reason.to_string()),
        Err(_) => publish::count_not_stored(agent, &unit, "internal"),
    }
}

/// What a unit is counted under: its crate, or the package of a build script.
fn crate_name(request: &UnitRequest) -> String {
    if request.is_script {
        let package = request.environment.iter().find(|pair| pair.name == b"CARGO_PKG_NAME");
        return package.map(|pair| String::from_utf8_lossy(&pair.value).into_owned()).unwrap_or_default();
    }
    let mut words = request.arguments.iter().skip_while(|word| word.as_slice() != b"--crate-name");
    words.nth(1).map(|name| String::from_utf8_lossy(name).into_owned()).unwrap_or_default()
}

/// A unit that is to be recorded, and what goes with it.
struct Recording {
    unit: Arc<Unit>,
    gate: Option<OwnedMutexGuard<()>>,
    build: Option<Arc<Build>>,
    stored: Option<Box<StoredResult>>,
}

fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "unexpected message")
}

struct Connection {
    stream: UnixStream,
}

impl Connection {
    async fn send<T: Encode<()>>(&mut self, message: &T) -> io::Result<()> {
        self.stream.write_all(&ipc::to_bytes(message)).await
    }

    /// Waits until the other side has ended.
    async fn closed(&mut self) {
        let _ = self.stream.read(&mut [0]).await;
    }

    async fn receive<T: for<'b> Decode<'b, ()>>(&mut self) -> io::Result<T> {
        let mut header = [0; 4];
        self.stream.read_exact(&mut header).await?;
        let mut body = vec![0; ipc::body_length(header)?];
        self.stream.read_exact(&mut body).await?;
        ipc::from_body(&body)
    }

    /// Awaits work and tells the wrapper meanwhile that the agent is alive. Where the wrapper is gone the
    /// work is dropped.
    async fn while_working<T>(&mut self, work: impl Future<Output = T>) -> io::Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                result = &mut work => return Ok(result),
                () = tokio::time::sleep(HEARTBEAT) => self.send(&Response::Working).await?,
            }
        }
    }
}
