//! The commands that people type.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

use crate::config::{Config, Surroundings};
use crate::connect::{Address, CONFIG_VARIABLE, Program, SOCKET_VARIABLE};
use crate::doctor;
use crate::ipc::{self, Control, Request, Response};
use crate::report;
use crate::signature::Signer;

/// The first words that are commands; anything else is a compiler.
const COMMANDS: [&str; 9] =
    ["agent", "doctor", "flush", "help", "new-key", "serve-leftover", "stats", "stop", "verify"];

/// A compile cache: set RUSTC_WRAPPER=cachec and build.
#[derive(Debug, Parser)]
#[command(name = "cachec", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows what the agent of this directory's configuration has done
    Stats {
        /// Prints one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Tries everything that a build needs of cachec, and says what is wrong
    Doctor,
    /// Waits until every result is stored
    Flush,
    /// Waits until every result is stored, and ends the agent
    Stop,
    /// Runs a build that compiles everything, and fails where something is stored that differs from what has come out.
    /// What cargo finds in its target directory is not compiled: give it a new one
    Verify {
        /// The build, for example: cargo build --release --target-dir /tmp/verified
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
    /// Makes a key that signs what this machine publishes (CACHEC_SIGN_KEY_FILE), and prints the one for those who
    /// trust it (CACHEC_TRUSTED_KEYS)
    NewKey {
        /// The key's file, which must not exist
        file: PathBuf,
    },
    /// Runs the agent; wrappers start it by themselves
    #[command(hide = true)]
    Agent,
    /// Answers the stopped calls of processes that outlive a traced compiler
    #[command(hide = true)]
    ServeLeftover,
}

/// Whether a first argument is one of cachec's own, rather than a compiler.
pub(crate) fn is_command(word: &std::ffi::OsStr) -> bool {
    word.to_str().is_some_and(|text| text.starts_with('-') || COMMANDS.contains(&text))
}

/// Runs a command.
pub(crate) fn run() -> ExitCode {
    let command = Cli::parse().command;
    let is_summary = matches!(command, Command::Stats { json: false });
    let result = match command {
        Command::Stats { json } => stats(json),
        Command::Doctor => return if doctor::run() { ExitCode::SUCCESS } else { ExitCode::FAILURE },
        Command::Flush => ask_running(Control::Flush).map(drop),
        Command::Stop => stop(),
        Command::Verify { command } => verify(&command),
        Command::NewKey { file } => new_key(&file),
        Command::Agent => agent(),
        Command::ServeLeftover => serve_leftover(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cachec: {error:#}");
            // Behind `cargo build &&` it must not fail a build that has no statistics.
            if is_summary { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}

fn address() -> anyhow::Result<Address> {
    Ok(Address::of(&Config::load(&Surroundings::of_this_process(None))?, &Program::own()?))
}

fn stats(json: bool) -> anyhow::Result<()> {
    let text = match ask_running(Control::Statistics)? {
        Some(text) => text,
        None => fs::read_to_string(address()?.last_report()).context(
            "no agent has run with this configuration; build something with RUSTC_WRAPPER=cachec first",
        )?,
    };
    let shown = if json { format!("{text}\n") } else { report::to_text(&text)? };
    // A reader that has seen enough is no error.
    let _ = std::io::stdout().write_all(shown.as_bytes());
    Ok(())
}

/// Runs a command with every compile verified.
fn verify(command: &[OsString]) -> anyhow::Result<()> {
    let own = std::env::current_exe()?;
    // An agent of its own: what an earlier one has counted is not this build's.
    let directory = tempfile::tempdir()?;
    let run = |words: &[OsString]| -> anyhow::Result<process::Command> {
        let (program, arguments) = words.split_first().context("no command")?;
        let mut command = process::Command::new(program);
        command.args(arguments).env("RUSTC_WRAPPER", &own).env("CACHEC_MODE", "verify");
        command.env("CACHEC_RUNTIME_DIR", directory.path());
        Ok(command)
    };
    let ask = |words: &[&str]| {
        run(&[&[own.clone().into()][..], &words.iter().map(Into::into).collect::<Vec<_>>()].concat())
    };
    let status =
        run(command)?.status().with_context(|| format!("cannot run {}", command[0].to_string_lossy()))?;
    if !status.success() {
        bail!("the build failed: {status}");
    }
    let (report, text) = (ask(&["stats", "--json"])?.output()?, ask(&["stats"])?.output()?);
    ask(&["stop"])?.status()?;
    let Ok(report) = serde_json::from_slice::<serde_json::Value>(&report.stdout) else {
        bail!(
            "nothing was compiled through cachec: cargo needs a new target directory; `cachec doctor` says if \
             anything else is wrong"
        );
    };
    let verified = report["verified"].as_u64().unwrap_or_default();
    let differing = report["differences"].as_object().map_or(0, serde_json::Map::len);
    let unknown = report["misses"].as_u64().unwrap_or_default().saturating_sub(verified + differing as u64);
    println!("{verified} as stored, {differing} differ, {unknown} not stored");
    if differing > 0 || verified == 0 {
        print!("{}", String::from_utf8_lossy(&text.stdout));
        bail!(if differing > 0 {
            "what is stored is not what this build has made"
        } else {
            "nothing was compared"
        });
    }
    Ok(())
}

fn new_key(file: &Path) -> anyhow::Result<()> {
    let signer = Signer::create(file).with_context(|| format!("cannot write {}", file.display()))?;
    writeln!(std::io::stdout(), "{}", signer.public())?;
    Ok(())
}

fn stop() -> anyhow::Result<()> {
    if ask_running(Control::Stop)?.is_some() {
        // The agent ends when its socket is gone.
        address()?.abandon();
    }
    Ok(())
}

/// The running agent's answer; `None` where there is no agent.
fn ask_running(control: Control) -> anyhow::Result<Option<String>> {
    let Ok(mut stream) = address()?.connect() else { return Ok(None) };
    ipc::send(&mut stream, &Request::Control(control)).context("the agent does not listen")?;
    match ipc::receive(&mut stream).context("the agent does not answer")? {
        Response::Report(text) => Ok(Some(text)),
        _ => bail!("the agent answered something unexpected"),
    }
}

/// What the hidden `serve-leftover` command does, with the listener as its standard input.
fn serve_leftover() -> anyhow::Result<()> {
    let listener = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned()?;
    let _ = rustix::process::setsid();
    crate::tracer::serve_leftover(&listener);
    Ok(())
}

/// What the hidden `agent` command does, in the process that a wrapper has started.
fn agent() -> anyhow::Result<()> {
    let by_hand = "the agent is started by wrappers, not by hand";
    let config: Config = serde_json::from_str(&std::env::var(CONFIG_VARIABLE).context(by_hand)?)?;
    let socket = PathBuf::from(std::env::var_os(SOCKET_VARIABLE).context(by_hand)?);
    let stdin = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned()?;
    let listener = UnixListener::from(stdin);
    // Away from the terminal's signals. Fails only for who leads a group already, and then does not matter.
    let _ = rustix::process::setsid();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(&config.log))
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    crate::agent::run(listener, config, &socket)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn no_command_is_taken_for_a_compiler() {
        for command in Cli::command().get_subcommands() {
            assert!(is_command(command.get_name().as_ref()), "{}", command.get_name());
        }
        assert!(is_command("--version".as_ref()) && is_command("help".as_ref()));
        assert!(!is_command("rustc".as_ref()) && !is_command("/usr/bin/rustc".as_ref()));
    }
}
