//! The agent's main loop: accepts wrappers, and ends when nobody needs it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener as StdListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::net::{UnixListener, UnixStream};

use super::{Agent, session};
use crate::config::Config;
use crate::local::LocalTier;

/// An agent without a unit for this long ends.
const IDLE_LIMIT: Duration = Duration::from_secs(600);
/// How often the socket file is looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Serves the listening socket until idle, or until its file is gone or another agent's.
///
/// # Errors
/// Where the runtime cannot be set up; wrappers then run the compiler.
pub(crate) fn run(listener: StdListener, config: Config, socket: &Path) -> anyhow::Result<()> {
    raise_descriptor_limit();
    listener.set_nonblocking(true).context("the listening socket")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let name = socket.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let agent = Arc::new(Agent::new(config, &name, socket.with_extension("json")));
    if agent.local.is_some() {
        let agent = Arc::clone(&agent);
        runtime.spawn_blocking(move || agent.local.as_ref().map(LocalTier::take_stock));
    }
    runtime.block_on(serve(&agent, listener, socket))?;
    Ok(())
}

async fn serve(agent: &Arc<Agent>, listener: StdListener, socket: &Path) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let own = fs::metadata(socket).map(|metadata| metadata.ino()).ok();
    let mut last_active = Instant::now();
    let mut watch = tokio::time::interval(WATCH_INTERVAL);
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                last_active = Instant::now();
                accept(agent, accepted?.0);
            }
            _ = watch.tick() => {
                if *agent.active.borrow() > 0 || *agent.pending.borrow() > 0 {
                    last_active = Instant::now();
                } else {
                    agent.keep_memo().await;
                }
                let present = fs::metadata(socket).map(|metadata| metadata.ino()).ok();
                if present != own {
                    break;
                }
                if last_active.elapsed() > IDLE_LIMIT {
                    let _ = fs::remove_file(socket);
                    break;
                }
            }
        }
    }
    // Wrappers that are connected already are served; new ones find no socket and start another agent.
    let mut active = agent.active.subscribe();
    let _ = active.wait_for(|count| *count == 0).await;
    agent.drain(super::DRAIN_TIMEOUT).await;
    agent.keep_memo().await;
    agent.leave_report();
    Ok(())
}

fn accept(agent: &Arc<Agent>, stream: UnixStream) {
    let own_user = rustix::process::getuid().as_raw();
    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == own_user) {
        return;
    }
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        if let Err(error) = session::serve(agent, stream).await {
            tracing::debug!("a connection ended early: {error}");
        }
    });
}

/// Each unit that is being stored holds a few files open.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // With the old limit fewer results are stored at a time.
    let _ = setrlimit(Resource::Nofile, limit);
}
