//! What a build's restored units still owe it (`CACHEC_LAZY=1`); see [`crate::deferred`].
//!
//! Once a compiler has to run, nothing more is deferred in that build: what is compiled next reads what came before.
//!
//! Locks: `owed` is held while what is owed is fetched and moved to its place, so that no other compiler starts
//! meanwhile.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use cachec_protocol::{Digest, Output, OutputKind, StoredResult};
use futures_util::StreamExt as _;
use tokio::sync::{Mutex, MutexGuard};

use super::lookup::{self, Patience};
use super::prefetch::Build;
use super::restore::Restored;
use super::{Agent, launcher};
use crate::deferred::{Deferred, DeferredFiles, file_time};
use crate::ipc::{Promise, Promised};
use crate::unit::Unit;

/// Packs that are waited for and staged at a time.
const STAGING_TASKS: usize = 4;

/// See the module.
#[derive(Debug)]
pub(super) struct Deferral {
    is_on: AtomicBool,
    pub(super) files: DeferredFiles,
    owed: Mutex<Vec<Owed>>,
}

/// A unit whose outputs are not there.
#[derive(Debug, Clone)]
pub(super) struct Owed {
    unit: Arc<Unit>,
    result: StoredResult,
    since: SystemTime,
}

impl Deferral {
    pub(super) fn new(is_on: bool) -> Self {
        Self { is_on: AtomicBool::new(is_on), files: DeferredFiles::default(), owed: Mutex::default() }
    }

    /// Whether units may still be deferred.
    pub(super) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Notes that a unit's outputs are to come; what depends on it may ask at any moment.
    pub(super) async fn owe(&self, unit: &Arc<Unit>, result: &StoredResult) {
        let since =
            unit.target_directory().map(|directory| file_time(&unit.working_directory.join(directory)));
        // Where no file can be made, none will be noted.
        let since = since.and_then(Result::ok).unwrap_or_else(SystemTime::now);
        self.owed.lock().await.push(Owed { unit: Arc::clone(unit), result: result.clone(), since });
        self.files.extend(deferred_files(unit, result));
    }

    /// What is owed now; nobody else sees to it until this is dropped.
    pub(super) async fn settle(&self) -> MutexGuard<'_, Vec<Owed>> {
        self.is_on.store(false, Ordering::Relaxed);
        self.owed.lock().await
    }

    /// Forgets about outputs that are there, or are going to be made by their commands.
    pub(super) fn forget(&self, owed: &[Owed]) {
        for Owed { unit, result, .. } in owed {
            self.files.remove(deferred_files(unit, result).map(|(path, _)| path));
        }
    }
}

/// What was owed, staged.
pub(super) struct Fetched {
    pub(super) restored: Restored,
    /// See [`Promise`].
    pub(super) mark: Option<Vec<u8>>,
}

/// Fetches and stages what is owed; what cannot be had is left out.
pub(super) async fn fetch_all(agent: &Arc<Agent>, build: &Arc<Build>, owed: &[Owed]) -> Vec<Fetched> {
    build.fetch_rest(agent);
    let fetch = |Owed { unit, result, since }: Owed| async move {
        let mut restored = lookup::obtain(agent, &unit, &result, Some(build), Patience::OfADownload).await?;
        restored.set_modified(since).ok()?;
        Some(Fetched { restored, mark: mark(&unit) })
    };
    let fetched = futures_util::stream::iter(owed.to_vec()).map(fetch).buffered(STAGING_TASKS);
    fetched.filter_map(std::future::ready).collect().await
}

/// Whether a result can be restored now and its pack later: all that is in it is what compilers read. Of a script's
/// outputs none is there meanwhile, so that it finds nothing half done should it run.
pub(super) fn can_be_deferred(unit: &Unit, result: &StoredResult) -> bool {
    let is_for_compilers = |output: &Output| {
        let is_library = [".rlib", ".rmeta", ".so"].iter().any(|ending| output.name.ends_with(ending));
        output.kind == OutputKind::Binary && (is_library || unit.script().is_some())
    };
    let has_links = result.outputs.iter().any(|output| output.kind == OutputKind::Link);
    unit.is_for_compilers()
        && unit.target_directory().is_some()
        && result.pack.is_some()
        && result.packed().all(is_for_compilers)
        && !has_links
}

/// How a unit's outputs could be made again; `None` where it has none that something could depend on.
pub(super) fn promise(
    unit: &Unit,
    words: &[Vec<u8>],
    result: &StoredResult,
    is_deferred: bool,
) -> Option<Promise> {
    let promised = |(path, file): (PathBuf, Deferred)| match file {
        Deferred::File { digest, .. } => {
            Some(Promised { path: path.into_os_string().into_encoded_bytes(), digest })
        }
        Deferred::Directory => None,
    };
    let outputs: Vec<Promised> = deferred_files(unit, result).filter_map(promised).collect();
    if outputs.is_empty() || launcher::kept_program(unit).is_some() {
        return None;
    }
    let arguments = unit.compiler_arguments(words).into_iter().map(Into::into).collect();
    let mark = mark(unit).filter(|_| is_deferred).map(Into::into);
    Some(Promise { arguments, outputs, is_deferred, mark })
}

/// For a script whose outputs are deferred, a file beside its output directory.
fn mark(unit: &Unit) -> Option<Vec<u8>> {
    let directory = unit.script()?.output_directory.parent()?;
    Some(directory.join(".cachec-deferred").into_os_string().into_encoded_bytes())
}

/// Has cargo run a script again in a later build, as long as its outputs are not there.
pub(super) fn keep_stale(unit: &Unit, stdout: &mut Vec<u8>) {
    let Some(mark) = mark(unit) else { return };
    if stdout.last().is_some_and(|last| *last != b'\n') {
        stdout.push(b'\n');
    }
    stdout.extend([b"cargo:rerun-if-changed=".as_slice(), &mark, b"\n"].concat());
}

/// What of a result is deferred, if it is: a compiler's libraries, everything of a script's.
fn deferred_files(unit: &Unit, result: &StoredResult) -> impl Iterator<Item = (PathBuf, Deferred)> {
    let directory = unit.output_directory();
    result.outputs.iter().filter_map(move |output| {
        let digest = match (output.kind, &output.inline) {
            (OutputKind::Binary, _) => output.digest,
            (OutputKind::Text, Some(text)) if unit.script().is_some() => {
                Digest::of(&unit.roots.expand(text).ok()?)
            }
            (OutputKind::Directory, _) => return Some((directory.join(&output.name), Deferred::Directory)),
            _ => return None,
        };
        let file = Deferred::File { digest, executable: output.executable };
        Some((directory.join(&output.name), file))
    })
}
