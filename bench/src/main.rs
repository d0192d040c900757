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
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Demo { plain } => cachec_bench::demo::run(plain),
    }
}
