//! cachec beside its peers: one program built by each of them, from nothing and from a full cache, on this machine and
//! in fresh containers at some distance from their server.

mod arm;
mod floor;
mod memory;
mod plot;
mod remote;
mod report;
mod rig;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

pub use arm::{Arm, install};
pub use floor::{FLOOR_VARIABLE, replay};

use report::{Report, Scenario};
use rig::Rig;

use crate::slow_line::Speed;

/// What is compared.
#[derive(Debug, Args)]
pub struct Options {
    /// The program, as name@version
    #[arg(long, default_value = "ripgrep@15.2.0")]
    pub program: String,
    /// Cargo's profile
    #[arg(long, default_value = "release")]
    pub profile: String,
    /// What builds it
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Arm::None, Arm::Floor, Arm::Cachec])]
    pub arms: Vec<Arm>,
    /// Lines between a fresh container and its server: round trip in ms, or round trip/speed in Mbit/s
    #[arg(long, value_delimiter = ',', default_values = ["0", "20", "100", "20/100"])]
    pub lines: Vec<Line>,
    /// Lines that a server is filled over
    #[arg(long, value_delimiter = ',', default_values = ["0", "20/100"])]
    pub cold_lines: Vec<Line>,
    /// Leave out the local stores of those that have servers
    #[arg(long)]
    pub remote_only: bool,
    /// Longest that a filled server is waited for until it has compressed everything again, in minutes
    #[arg(long, default_value_t = 30)]
    pub settle_minutes: u64,
    /// Builds from nothing of each kind; the order of the arms alternates
    #[arg(long, default_value_t = 1)]
    pub rounds: usize,
    /// Builds from a full cache in each round
    #[arg(long, default_value_t = 3)]
    pub repeats: usize,
    /// Where the peers are installed
    #[arg(long, default_value = "target/peers")]
    pub peers: PathBuf,
    /// Install the peers first, by name
    #[arg(long)]
    pub install_peers: bool,
    /// Where the results are written
    #[arg(long, default_value = "bench/results")]
    pub results: PathBuf,
}

/// A line's name and what it is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line(Speed);

impl FromStr for Line {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (round_trip, megabits) =
            text.split_once('/').map_or((text, None), |(first, second)| (first, Some(second)));
        let number = |text: &str| text.parse::<u32>().map_err(|error| format!("{text}: {error}"));
        let round_trip = Duration::from_millis(number(round_trip)?.into());
        Ok(Self(Speed { round_trip, megabits_per_second: megabits.map(number).transpose()? }))
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} ms", self.0.round_trip.as_millis())?;
        self.0.megabits_per_second.map_or(Ok(()), |rate| write!(formatter, ", {rate} Mbit/s"))
    }
}

/// Runs the comparison, and writes `PROGRAM.json`, `PROGRAM.md` and plots after every arm.
///
/// # Errors
/// Where a build fails, or what an arm needs is not there.
pub fn run(options: &Options) -> anyhow::Result<()> {
    if options.install_peers {
        install(&options.peers, &options.arms)?;
    }
    let mut report = Report::new(options)?;
    for round in 0..options.rounds {
        let mut arms = options.arms.clone();
        let count = arms.len().max(1);
        arms.rotate_left(round % count);
        for arm in arms {
            let rig = Rig::new(options, arm)?;
            if !arm.has_remote() || arm.has_local() && !options.remote_only {
                local(&rig, options, &mut report)?;
            }
            if arm.has_remote() {
                remote(&rig, options, &mut report)?;
            }
            report.write(&options.results)?;
        }
    }
    println!("{}", report.to_markdown());
    Ok(())
}

/// Cold and warm builds with a local store.
fn local(rig: &Rig, options: &Options, report: &mut Report) -> anyhow::Result<()> {
    rig.forget()?;
    let sources = rig.sources();
    let cold = rig.measure(Scenario::Cold, None, &sources)?;
    report.add(cold);
    if rig.arm == Arm::None {
        return Ok(());
    }
    for _ in 0..options.repeats {
        report.add(rig.measure(Scenario::Warm, None, &sources)?);
    }
    if rig.arm == Arm::Floor {
        return Ok(());
    }
    for number in 0..options.repeats {
        let moved = rig.copy_sources(&format!("moved-{number}"))?;
        report.add(rig.measure(Scenario::Moved, None, &moved)?);
    }
    Ok(())
}

/// Builds with a server and nothing else.
fn remote(rig: &Rig, options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let sources = rig.sources();
    let mut full = None;
    // A lazy client fills a server as any other does.
    let cold_lines = if rig.arm == Arm::Lazy {
        options.cold_lines.get(..1).unwrap_or_default()
    } else {
        &options.cold_lines
    };
    for line in cold_lines {
        drop(full.take());
        let server = remote::Remote::start(rig)?;
        rig.forget()?;
        report.add(rig.measure(Scenario::ColdRemote, Some((*line, &server)), &sources)?);
        full = Some(server);
    }
    let Some(server) = full else { return Ok(()) };
    server.settle(Duration::from_secs(60 * options.settle_minutes))?;
    for line in &options.lines {
        for _ in 0..options.repeats {
            rig.forget()?;
            report.add(rig.measure(Scenario::Fresh, Some((*line, &server)), &sources)?);
        }
    }
    let Some(line) = options.lines.last() else { return Ok(()) };
    for number in 0..options.repeats {
        rig.forget()?;
        let next = rig.copy_sources("sources")?;
        touch(&next, number)?;
        report.add(rig.measure(Scenario::NextCommit, Some((*line, &server)), &next)?);
    }
    Ok(())
}

/// Changes the package's own program, and nothing else.
fn touch(sources: &Path, number: usize) -> anyhow::Result<()> {
    let candidates = ["src/lib.rs", "src/main.rs", "crates/core/main.rs"].map(|name| sources.join(name));
    let file = candidates.iter().find(|path| path.is_file()).context("no main source file is known")?;
    let text = std::fs::read_to_string(file)?;
    std::fs::write(file, format!("{text}\n// commit {number}\n"))?;
    Ok(())
}
