//! The first thing a newcomer runs: a real program built twice through a server of its own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use bytesize::ByteSize;
use comfy_table::{Table, presets};

use crate::machine::peak_memory_bytes;
use crate::{Build, Machine, Server, crates};

const NAME: &str = "ripgrep";
const VERSION: &str = "15.2.0";

/// Builds ripgrep (release) from nothing, wipes the target directory and builds it again; with `plain`
/// also without cachec. Prints a table. Leaves no process and no file behind.
///
/// # Errors
/// Where a build fails, which is a bug in cachec.
pub fn run(plain: bool) -> anyhow::Result<()> {
    let directory = tempfile::Builder::new().prefix("cachec-demo-").tempdir()?;
    let sources = directory.path().join(NAME);
    say(&format!("Fetching {NAME} {VERSION} and its dependencies"));
    crates::unpack(NAME, VERSION, &sources)?;
    let data = directory.path().join("server");
    let server = Server::start(&data, &[])?;
    say(&format!("A server listens on {}", server.url));
    let machine = machine(&server.url)?;
    let mut rows = Vec::new();
    if plain {
        say("Building without cachec");
        let target = directory.path().join("plain");
        rows.push(Row::of("without cachec", &build(&machine, &sources, &target, &[("RUSTC_WRAPPER", "")])?));
    }
    let target = directory.path().join("target");
    for name in ["first build", "second build"] {
        say(&format!("{name}: target directory empty, RUSTC_WRAPPER=cachec"));
        let mut row = Row::of(name, &build(&machine, &sources, &target, &[])?);
        row.add_statistics(&machine, &sources)?;
        rows.push(row);
        fs::remove_dir_all(&target)?;
        machine.cachec(&sources, &["flush"])?;
        if name == "first build" {
            // A new machine would have no agent, and the agent nothing in its memory.
            machine.cachec(&sources, &["stop"])?;
        }
    }
    println!("{}", table(&rows));
    println!("peak memory of the server: {}", ByteSize::b(server.peak_memory_bytes()?));
    let latency = machine.statistics(&sources)?["hit_latency"].clone();
    let ms = |name: &str| latency[name].as_f64().unwrap_or_default() / 1000.0;
    println!("a hit, in the wrapper: {:.1} ms median, {:.1} ms p99", ms("median_us"), ms("p99_us"));
    machine.cachec(&sources, &["stop"])?;
    server.stop()
}

/// A machine like a container, with this machine's crates.
fn machine(url: &str) -> anyhow::Result<Machine> {
    Ok(Machine::with_server(url)?.with_crates()?.with("CARGO_NET_OFFLINE", "true"))
}

fn build(
    machine: &Machine,
    sources: &Path,
    target: &Path,
    variables: &[(&str, &str)],
) -> anyhow::Result<Build> {
    let target = target.to_string_lossy();
    let build = machine.cargo_shown(sources, &["build", "--release", "--target-dir", &target], variables)?;
    anyhow::ensure!(build.success, "the build failed");
    let program = PathBuf::from(&*target).join("release/rg");
    let output =
        std::process::Command::new(program).arg("--version").output().context("the built program")?;
    anyhow::ensure!(String::from_utf8_lossy(&output.stdout).contains(VERSION), "the built program is wrong");
    Ok(build)
}

struct Row {
    name: &'static str,
    seconds: f64,
    compilers: usize,
    hits: Option<(u64, u64)>,
    received: u64,
    sent: u64,
    agent_bytes: u64,
}

impl Row {
    fn of(name: &'static str, build: &Build) -> Self {
        let seconds = build.elapsed.as_secs_f64();
        Self {
            name,
            seconds,
            compilers: build.compiled.len(),
            hits: None,
            received: 0,
            sent: 0,
            agent_bytes: 0,
        }
    }

    fn add_statistics(&mut self, machine: &Machine, sources: &Path) -> anyhow::Result<()> {
        let statistics = machine.statistics(sources)?;
        let number = |name: &str| statistics[name].as_u64().unwrap_or_default();
        let hits = number("local_hits") + number("remote_hits");
        self.hits = Some((hits, hits + number("misses")));
        let memory = machine.agents().into_iter().filter_map(|id| peak_memory_bytes(id).ok());
        self.agent_bytes = memory.max().unwrap_or_default();
        self.received = statistics["remote"]["received_bytes"].as_u64().unwrap_or_default();
        self.sent = statistics["remote"]["sent_bytes"].as_u64().unwrap_or_default();
        Ok(())
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "",
        "seconds",
        "ratio",
        "compilers run",
        "hits",
        "received",
        "sent",
        "agent's peak memory",
    ]);
    let first = rows.first().map_or(1.0, |row| row.seconds);
    for row in rows {
        table.add_row([
            row.name.to_owned(),
            format!("{:.1}", row.seconds),
            format!("{:.2}", row.seconds / first),
            row.compilers.to_string(),
            row.hits.map_or_else(|| "-".to_owned(), |(hits, units)| format!("{hits} of {units}")),
            ByteSize::b(row.received).to_string(),
            ByteSize::b(row.sent).to_string(),
            ByteSize::b(row.agent_bytes).to_string(),
        ]);
    }
    table
}

fn say(text: &str) {
    eprintln!("==> {text}");
}
