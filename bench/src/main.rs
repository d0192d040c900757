//! Demonstrations, benchmarks and campaigns, as commands.

use std::path::Path;
use std::process::ExitCode;

use cachec_bench::compare;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cachec-bench", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Builds ripgrep twice through a server of its own, and prints what that took
    Demo {
        /// Builds it without cachec first
        #[arg(long)]
        plain: bool,
    },
    /// Builds a program through cachec and its peers, on this machine and in fresh containers far from their server
    Compare(compare::Options),
    /// Loads a server beside nginx with the same bytes, and measures lookups at a steady rate
    Load(cachec_bench::load::Options),
    /// Compares restored builds of real programs with plain ones, byte for byte
    Differential {
        /// Programs as name@version; a list of twelve where none is named
        programs: Vec<String>,
        /// Cargo's command: build or check
        #[arg(long, default_value = "build")]
        command: String,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    if let Some(store) = std::env::var_os(compare::FLOOR_VARIABLE) {
        let words: Vec<_> = std::env::args_os().skip(1).collect();
        return Ok(compare::replay(Path::new(&store), &words)?);
    }
    match Cli::parse().command {
        Command::Demo { plain } => cachec_bench::demo::run(plain),
        Command::Compare(options) => compare::run(&options),
        Command::Load(options) => cachec_bench::load::run(&options),
        Command::Differential { programs, command } => cachec_bench::differential::run(&programs, &command),
    }?;
    Ok(ExitCode::SUCCESS)
}
