//! A fresh container far from its server: ripgrep built with nothing but what the server has, at several round-trip
//! times and speeds.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bytesize::ByteSize;
use comfy_table::{Table, presets};

use crate::slow_line::{SlowLine, Speed};
use crate::{Machine, Server, crates};

const NAME: &str = "ripgrep";
const VERSION: &str = "15.2.0";

/// Fills a server, then builds in fresh containers on the far side of lines with these round-trip times (ms), each
/// without a limit and at `megabits` per second. Prints medians of `runs` builds.
///
/// # Errors
/// Where a build fails, or has compiled something: then it has measured something else.
pub fn run(round_trips_ms: &[u64], megabits: u32, runs: usize) -> anyhow::Result<()> {
    let directory = tempfile::Builder::new().prefix("cachec-container-").tempdir()?;
    let sources = directory.path().join(NAME);
    crates::unpack(NAME, VERSION, &sources)?;
    let server = Server::start(&directory.path().join("server"), &[])?;
    let first = machine(&server.url)?;
    eprintln!("==> Filling the server");
    let cold = first.cargo(&sources, &["build", "--release", "--locked"])?;
    anyhow::ensure!(cold.success, "{}", cold.stderr);
    let compiler = first.path("bin/rustc");
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["round trip", "line", "seconds (median)", "lowest", "received", "requests"]);
    for limit in [None, Some(megabits)] {
        for &round_trip_ms in round_trips_ms {
            let speed =
                Speed { round_trip: Duration::from_millis(round_trip_ms), megabits_per_second: limit };
            let line = SlowLine::open(&server.url, speed)?;
            let before = server.requests()?;
            let mut seconds = Vec::new();
            let mut received = 0;
            for _ in 0..runs {
                let (elapsed, bytes) = fresh_container(&line.url, &compiler, &sources)?;
                seconds.push(elapsed);
                received = bytes;
            }
            seconds.sort_by(f64::total_cmp);
            let requests = (server.requests()? - before) / runs.max(1) as u64;
            table.add_row([
                format!("{round_trip_ms} ms"),
                limit.map_or_else(|| "no limit".to_owned(), |rate| format!("{rate} Mbit/s")),
                format!("{:.2}", seconds[seconds.len() / 2]),
                format!("{:.2}", seconds[0]),
                ByteSize::b(received).to_string(),
                requests.to_string(),
            ]);
            println!("{table}");
        }
    }
    server.stop()
}

/// Builds as a machine that knows nothing; seconds and bytes received.
fn fresh_container(url: &str, compiler: &Path, sources: &Path) -> anyhow::Result<(f64, u64)> {
    let target = sources.join("target");
    if target.exists() {
        fs::remove_dir_all(&target)?;
    }
    // Scripts may print where the compiler is, which is the same in all containers.
    let machine = machine(url)?.with("RUSTC", compiler.to_string_lossy());
    let build = machine.cargo(sources, &["build", "--release", "--locked"])?;
    anyhow::ensure!(build.success, "{}", build.stderr);
    anyhow::ensure!(build.compiled.is_empty(), "compiled: {:?} {}", build.compiled, build.stderr);
    let statistics = machine.statistics(sources)?;
    let received = statistics["remote"]["received_bytes"].as_u64().unwrap_or_default();
    Ok((build.elapsed.as_secs_f64(), received))
}

fn machine(url: &str) -> anyhow::Result<Machine> {
    Ok(Machine::with_server(url)?.with("CARGO_HOME", crates::cargo_home()?.to_string_lossy()))
}
