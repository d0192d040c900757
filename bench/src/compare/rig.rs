//! One arm's machine, and one measured build.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::arm::Arm;
use super::memory::Watch;
use super::remote::Remote;
use super::report::{Measurement, Scenario};
use super::{Line, Options};
use crate::slow_line::SlowLine;
use crate::{Build, Machine, Project, crates};

/// A line is idle when nothing was sent for so long.
const IDLE: Duration = Duration::from_secs(2);
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);

pub(super) struct Rig {
    pub(super) arm: Arm,
    pub(super) peers: PathBuf,
    profile: String,
    machine: Machine,
    pristine: Project,
    directory: tempfile::TempDir,
}

impl Rig {
    pub(super) fn new(options: &Options, arm: Arm) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("compare-").tempdir()?;
        let (name, version) = crates::name_and_version(&options.program)?;
        let pristine = Project { root: directory.path().join("pristine") };
        crates::unpack(name, version, &pristine.root)?;
        let rig = Self {
            arm,
            peers: std::path::absolute(&options.peers)?,
            profile: options.profile.clone(),
            machine: Machine::new()?.without("CACHEC_DIR").with_crates()?,
            pristine,
            directory,
        };
        rig.copy_sources("sources")?;
        Ok(rig)
    }

    /// The checkout that is built where no other is named.
    pub(super) fn sources(&self) -> PathBuf {
        self.directory.path().join("sources")
    }

    /// A fresh checkout at another place.
    pub(super) fn copy_sources(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.directory.path().join(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        Ok(self.pristine.copy_to(&path)?.root)
    }

    /// Ends the arm's processes and removes all that it has: the machine is a fresh container.
    pub(super) fn forget(&self) -> anyhow::Result<()> {
        self.stop(&[])?;
        self.machine.reset()
    }

    /// Builds from an empty target directory.
    pub(super) fn measure(
        &self,
        scenario: Scenario,
        remote: Option<(Line, &Remote)>,
        sources: &Path,
    ) -> anyhow::Result<Measurement> {
        let line = remote.map(|(line, remote)| SlowLine::open(&remote.url, line.0)).transpose()?;
        let url = line.as_ref().map(|line| line.url.as_str());
        if let Some((file, text)) = self.arm.configuration(url) {
            Project { root: self.machine.path("home") }.write(file, &text)?;
        }
        let variables = self.arm.variables(&self.machine.path(""), &self.peers, url);
        Project { root: sources.to_owned() }.wipe()?;
        let watch = self.arm.process_name().map(Watch::start);
        let build = self.build(sources, &variables)?;
        let peak_memory_bytes = watch.map(Watch::peak_bytes);
        anyhow::ensure!(build.success, "{} failed: {}", self.arm.name(), build.stderr);
        if let Some(line) = &line {
            wait_until_idle(line)?;
            self.stop(&variables)?;
            wait_until_idle(line)?;
        }
        let (sent, received) = line.map(|line| line.bytes()).unzip();
        let measurement = Measurement {
            arm: self.arm.name().to_owned(),
            scenario,
            line: remote.map(|(line, _)| line.to_string()),
            seconds: build.elapsed.as_secs_f64(),
            compiled: build.compiled.len(),
            sent_bytes: sent,
            received_bytes: received,
            peak_memory_bytes,
        };
        eprintln!("{measurement}");
        Ok(measurement)
    }

    fn build(&self, sources: &Path, variables: &[(&str, String)]) -> anyhow::Result<Build> {
        let mut command = self.machine.command(&self.arm.front(&self.peers));
        let target = sources.join("target");
        command.args(["build", "--locked", "--profile", &self.profile, "--target-dir"]).arg(target);
        command.current_dir(sources).envs(variables.iter().map(|(name, value)| (name, value)));
        self.machine.run(|| Ok(command.output()?))
    }

    fn stop(&self, variables: &[(&str, String)]) -> anyhow::Result<()> {
        if let Some((program, arguments)) = self.arm.stop(&self.peers) {
            let own = self.arm.variables(&self.machine.path(""), &self.peers, None);
            let variables = if variables.is_empty() { &own } else { variables };
            // Where nothing runs, some say so with an error.
            let mut command = self.machine.command(&program);
            command.args(arguments).envs(variables.iter().map(|(name, value)| (name, value))).output()?;
        }
        Ok(())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.stop(&[]);
    }
}

/// Waits until what a build has left behind is uploaded.
fn wait_until_idle(line: &SlowLine) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut before = line.bytes();
    let mut changed = Instant::now();
    while changed.elapsed() < IDLE {
        anyhow::ensure!(started.elapsed() < IDLE_TIMEOUT, "the line does not come to rest");
        std::thread::sleep(Duration::from_millis(50));
        let now = line.bytes();
        if now != before {
            (before, changed) = (now, Instant::now());
        }
    }
    Ok(())
}
