//! The `cachec-server` program.

use std::ffi::OsString;
use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use cachec_server::config::{Cli, Command, ServeArguments, TokenCommand};
use cachec_server::server::Server;
use cachec_server::tokens::Tokens;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// How long calls into the store may still take after the last request.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(10);

fn main() -> anyhow::Result<()> {
    match Cli::parse_from(with_default_command(std::env::args_os().collect())).command {
        Command::Serve(arguments) => serve(&arguments),
        Command::Token(command) => token(command),
    }
}

/// `cachec-server --data x` is `cachec-server serve --data x`.
fn with_default_command(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let other = ["-h", "--help", "-V", "--version"];
    let first = arguments.get(1).map(|first| first.to_string_lossy());
    if first.is_none_or(|first| first.starts_with('-') && !other.contains(&first.as_ref())) {
        arguments.insert(1.min(arguments.len()), "serve".into());
    }
    arguments
}

fn serve(arguments: &ServeArguments) -> anyhow::Result<()> {
    let options = arguments.options()?;
    let filter = EnvFilter::try_new(&arguments.log).context("--log is not a filter")?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let store = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let server = Server::bind(options).await?;
        let store = server.store();
        writeln!(io::stdout(), "listening on http://{}", server.address())?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("stopping");
        };
        server.serve(stop).await;
        anyhow::Ok(store)
    })?;
    runtime.shutdown_timeout(SHUTDOWN_WAIT);
    store.close().context("cannot close the store cleanly")
}

/// Each connection and each open blob takes a descriptor, and the soft limit is often 1024.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

fn token(command: TokenCommand) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match command {
        TokenCommand::Create { data, namespace, allow, expires } => {
            let expires = match expires {
                Some(after) => Some(SystemTime::now().checked_add(after).context("--expires is too long")?),
                None => None,
            };
            let (token, id) = Tokens::open(&data)?.create(&namespace, allow, expires)?;
            writeln!(io::stderr(), "token {id} for namespace {namespace}; it is not shown again")?;
            writeln!(out, "{token}")?;
        }
        TokenCommand::List { data } => {
            let now = SystemTime::now();
            for token in Tokens::open(&data)?.list()? {
                let state = match token.expires {
                    _ if token.revoked => "revoked".to_owned(),
                    None => "active".to_owned(),
                    Some(expires) => match expires.duration_since(now) {
                        Ok(left) => format!("active for {} hours", left.as_secs() / 3600),
                        Err(_) => "expired".to_owned(),
                    },
                };
                writeln!(out, "{}\t{}\t{}\t{state}", token.id, token.namespace, token.verbs)?;
            }
        }
        TokenCommand::Revoke { data, id } => {
            if !Tokens::open(&data)?.revoke(&id)? {
                bail!("there is no token {id:?}; `cachec-server token list` shows them");
            }
        }
    }
    Ok(())
}
