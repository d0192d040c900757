//! Demonstrations, benchmarks and campaigns, as commands.

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
    /// Builds ripgrep in fresh containers at some distance from their server
    Container {
        /// Round-trip times in milliseconds
        #[arg(long, value_delimiter = ',', default_values_t = [0, 20, 100])]
        round_trips_ms: Vec<u64>,
        /// The limited line's speed in Mbit/s
        #[arg(long, default_value_t = 100)]
        megabits: u32,
        /// Builds of each kind
        #[arg(long, default_value_t = 3)]
        runs: usize,
    },
    /// Compares restored builds of real programs with plain ones, byte for byte
    Differential {
        /// Programs as name@version; a list of twelve where none is named
        programs: Vec<String>,
        /// Cargo's command: build or check
        #[arg(long, default_value = "build")]
        command: String,
    },
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Demo { plain } => cachec_bench::demo::run(plain),
        Command::Container { round_trips_ms, megabits, runs } => {
            cachec_bench::container::run(&round_trips_ms, megabits, runs)
        }
        Command::Differential { programs, command } => cachec_bench::differential::run(&programs, &command),
    }
}
