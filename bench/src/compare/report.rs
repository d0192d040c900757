//! What was measured, as JSON and as a table.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use bytesize::ByteSize;
use comfy_table::{Table, presets};
use serde::Serialize;

use super::{Options, plot};
use crate::crates;

/// What is built from what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Scenario {
    /// From nothing, with a local store
    Cold,
    /// Again, at the same path
    Warm,
    /// Again, in another checkout
    Moved,
    /// From nothing, with an empty server and nothing else
    ColdRemote,
    /// In a fresh container, with a full server
    Fresh,
    /// As `Fresh`, with a changed package
    NextCommit,
}

impl Scenario {
    fn text(self) -> &'static str {
        match self {
            Self::Cold => "cold, local store",
            Self::Warm => "warm, local store",
            Self::Moved => "warm, other checkout",
            Self::ColdRemote => "cold, empty server",
            Self::Fresh => "fresh container",
            Self::NextCommit => "fresh container, next commit",
        }
    }

    /// Whether such a build must be spared some compiling: else it has measured something else.
    fn must_hit(self) -> bool {
        !matches!(self, Self::Cold | Self::ColdRemote)
    }
}

/// One build.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measurement {
    pub(super) arm: String,
    pub(super) scenario: Scenario,
    pub(super) line: Option<String>,
    pub(super) seconds: f64,
    /// Units whose compiler was started.
    pub(super) compiled: usize,
    pub(super) sent_bytes: Option<u64>,
    pub(super) received_bytes: Option<u64>,
    pub(super) peak_memory_bytes: Option<u64>,
}

impl Measurement {
    /// What a row of the table shows.
    pub(super) fn row(&self) -> (Scenario, Option<String>) {
        (self.scenario, self.line.clone())
    }
}

impl fmt::Display for Measurement {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = self.line.as_deref().unwrap_or("-");
        write!(
            formatter,
            "{:8} {:30} {line:20} {:7.2} s, {} compiled",
            self.arm,
            self.scenario.text(),
            self.seconds,
            self.compiled
        )?;
        let bytes = self.sent_bytes.zip(self.received_bytes);
        bytes.map_or(Ok(()), |(sent, received)| {
            write!(formatter, ", {} sent, {} received", ByteSize::b(sent), ByteSize::b(received))
        })
    }
}

/// All builds of a comparison.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    program: String,
    profile: String,
    machine: String,
    versions: Vec<String>,
    pub(super) arms: Vec<String>,
    measurements: Vec<Measurement>,
    /// What did not exercise the cache, and is in no table.
    invalid: Vec<Measurement>,
}

impl Report {
    pub(super) fn new(options: &Options) -> anyhow::Result<Self> {
        Ok(Self {
            program: options.program.clone(),
            profile: options.profile.clone(),
            machine: describe_machine()?,
            versions: options.arms.iter().filter(|arm| arm.has_remote()).map(|arm| arm.version()).collect(),
            arms: options.arms.iter().map(|arm| arm.name().to_owned()).collect(),
            measurements: Vec::new(),
            invalid: Vec::new(),
        })
    }

    pub(super) fn add(&mut self, measurement: Measurement) {
        let is_cold = |other: &&Measurement| other.arm == measurement.arm && other.scenario == Scenario::Cold;
        let cold = self.measurements.iter().find(is_cold).map_or(usize::MAX, |cold| cold.compiled);
        if measurement.scenario.must_hit() && measurement.compiled >= cold {
            eprintln!("invalid, since it has not exercised the cache: {measurement}");
            self.invalid.push(measurement);
        } else {
            self.measurements.push(measurement);
        }
    }

    /// The rows of a table, in order.
    pub(super) fn rows(&self) -> Vec<(Scenario, Option<String>)> {
        let mut rows: Vec<_> = Vec::new();
        for row in self.measurements.iter().map(Measurement::row) {
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        rows.sort_by_key(|(scenario, _)| *scenario);
        rows
    }

    /// The median of a figure over an arm's builds of a row.
    pub(super) fn median(
        &self,
        arm: &str,
        row: &(Scenario, Option<String>),
        figure: impl Fn(&Measurement) -> Option<f64>,
    ) -> Option<f64> {
        let of_row = self.measurements.iter().filter(|one| one.arm == arm && one.row() == *row);
        let mut values: Vec<f64> = of_row.filter_map(figure).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }

    fn table(&self, figure: impl Fn(&Measurement) -> Option<f64>, show: impl Fn(f64) -> String) -> String {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        table.set_header([String::new()].into_iter().chain(self.arms.iter().cloned()));
        for row in self.rows() {
            let cells: Vec<_> = self.arms.iter().map(|arm| self.median(arm, &row, &figure)).collect();
            if cells.iter().any(Option::is_some) {
                let shown = cells.into_iter().map(|cell| cell.map_or_else(String::new, &show));
                table.add_row([title(&row)].into_iter().chain(shown));
            }
        }
        table.to_string()
    }

    pub(super) fn to_markdown(&self) -> String {
        let (name, profile) = (&self.program, &self.profile);
        let mut rows = BTreeMap::new();
        for one in &self.measurements {
            *rows.entry((one.arm.clone(), one.row())).or_insert(0) += 1;
        }
        let most = rows.values().max().copied().unwrap_or_default();
        let bytes = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
        let seconds = self.table(|one| Some(one.seconds), |seconds| format!("{seconds:.2}"));
        #[expect(clippy::cast_precision_loss, reason = "shown in MiB")]
        let wire = self.table(|one| Some((one.sent_bytes? + one.received_bytes?) as f64), bytes);
        #[expect(clippy::cast_precision_loss, reason = "shown in MiB")]
        let memory = self.table(|one| one.peak_memory_bytes.map(|bytes| bytes as f64), bytes);
        #[expect(clippy::cast_precision_loss, reason = "a number of units")]
        let compiled = self.table(|one| Some(one.compiled as f64), |units| format!("{units}"));
        format!(
            "# {name}, {profile} profile\n\n{}\n\nMedians of up to {most} builds, all in one run; {}.\n\
             A fresh container has an empty target directory, no local store and no agent; its server is on the far \
             side of a loopback line with the round trip and speed named, which all connections share.\n\n\
             Seconds:\n\n{seconds}\n\nBytes on the wire, both ways (MiB):\n\n{wire}\n\n\
             Compilers started:\n\n{compiled}\n\nPeak memory of the cache's processes on the building side (MiB):\n\n\
             {memory}\n",
            self.machine,
            self.versions.join(", "),
        )
    }

    /// Writes the JSON, the tables and the plots.
    pub(super) fn write(&self, directory: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(directory)?;
        let (name, _) = crates::name_and_version(&self.program)?;
        let path = |extension: &str| directory.join(format!("{name}-{}.{extension}", self.profile));
        fs::write(path("json"), serde_json::to_string_pretty(self)? + "\n")?;
        fs::write(path("md"), self.to_markdown())?;
        plot::draw(self, &path("svg"))
    }
}

/// A row's name.
pub(super) fn title((scenario, line): &(Scenario, Option<String>)) -> String {
    line.as_ref().map_or_else(|| scenario.text().to_owned(), |line| format!("{}, {line}", scenario.text()))
}

fn describe_machine() -> anyhow::Result<String> {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let (processors, memory) = (text("/proc/cpuinfo"), text("/proc/meminfo"));
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned())).unwrap_or_default()
    };
    let cores = std::thread::available_parallelism()?;
    let kib: u64 = field(&memory, "MemTotal").trim_end_matches(" kB").parse().unwrap_or_default();
    let rustc = std::process::Command::new("rustc").arg("--version").output()?;
    Ok(format!(
        "{}, {cores} cores, {:.0}, Linux {}, {}",
        field(&processors, "model name"),
        ByteSize::kib(kib),
        text("/proc/sys/kernel/osrelease").trim(),
        String::from_utf8_lossy(&rustc.stdout).trim(),
    ))
}
