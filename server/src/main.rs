//! The `cachec-server` program.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use bytesize::ByteSize;
use cachec_server::cli::{Cli, Command, ServeArguments, TokenCommand};
use cachec_server::config::{Config, LogFormat};
use cachec_server::server::Server;
use cachec_server::store::embedded::{Embedded, EmbeddedOptions};
use cachec_server::tls::Tls;
use cachec_server::tokens::Tokens;
use cachec_server::{control, outbound};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// How long calls into the store may still take after the last request.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(10);

/// A health check that takes longer has failed.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    match Cli::parse_from(with_default_command(std::env::args_os().collect())).command {
        Command::Serve(arguments) => serve(arguments),
        Command::CheckConfig(arguments) => check_config(arguments),
        Command::Backup { data, to } => backup(&data.directory()?, &to),
        Command::Scrub { data } => scrub(&data.directory()?),
        Command::Health { url } => health(&url),
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

fn serve(arguments: ServeArguments) -> anyhow::Result<()> {
    let config = Config::load(arguments)?;
    start_log(&config)?;
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let store = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let server = Server::bind(config.server).await?;
        let store = server.store();
        writeln!(io::stdout(), "listening on {}", server.url())?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("stopping");
        };
        server.serve(stop).await?;
        anyhow::Ok(store)
    })?;
    runtime.shutdown_timeout(SHUTDOWN_WAIT);
    store.close().context("cannot close the store cleanly")
}

fn start_log(config: &Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log).context("--log is not a filter")?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match config.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Says what a configuration comes to, for whoever is about to start a server with it.
fn check_config(arguments: ServeArguments) -> anyhow::Result<()> {
    let config = Config::load(arguments)?;
    EnvFilter::try_new(&config.log).context("--log is not a filter")?;
    let server = config.server;
    let gate = server.gate()?;
    let tls = server.tls.clone().map(Tls::load).transpose()?;
    let mut out = io::stdout().lock();
    writeln!(out, "listens on    {}{}", server.listen, if tls.is_some() { ", TLS" } else { "" })?;
    writeln!(
        out,
        "keeps         {} in {}",
        ByteSize(server.store.max_size_bytes),
        server.store.directory.display()
    )?;
    writeln!(
        out,
        "access        {}",
        if gate.is_closed()? { "by token" } else { "for everybody who can reach it" }
    )?;
    for (pattern, rules) in server.store.policy.iter() {
        writeln!(out, "namespace     {pattern}: {rules}")?;
    }
    for issuer in &server.identities {
        for rule in &issuer.rules {
            writeln!(out, "identity      {}: {} may {}", issuer.issuer, rule.namespace, rule.allow)?;
        }
    }
    Ok(())
}

fn backup(data: &Path, to: &Path) -> anyhow::Result<()> {
    let to = &std::path::absolute(to)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let made = runtime.block_on(async {
        match control::ask_for_backup(data, to).await? {
            Some(_) if !to.exists() => bail!(
                "the server has made {} where only it sees it; a service may have a /tmp of its own",
                to.display()
            ),
            Some(report) => anyhow::Ok(report),
            None => Ok(open_existing(data)?.back_up(to.to_owned()).await?.to_string()),
        }
    })?;
    writeln!(io::stdout(), "{}: {made}", to.display())?;
    Ok(())
}

fn scrub(data: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let store = open_existing(data)?;
    let report = runtime.block_on(store.scrub())?;
    store.close()?;
    writeln!(io::stdout(), "{report}")?;
    if !report.is_clean() {
        bail!(
            "not everything was as it should be; what is damaged counts as absent now, and lies in {}",
            data.join("quarantine").display()
        );
    }
    Ok(())
}

fn health(url: &str) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let url = format!("{}/readyz", url.trim_end_matches('/'));
    let ask =
        async { outbound::client(HEALTH_TIMEOUT)?.build()?.get(&url).send().await.context(url.clone()) };
    let status = runtime.block_on(ask)?.status();
    if !status.is_success() {
        bail!("{url}: {status}");
    }
    Ok(())
}

/// Opens the store of a server that does not run, without evicting anything.
fn open_existing(data: &Path) -> anyhow::Result<Embedded> {
    if !data.join("db").is_dir() {
        bail!("{} is no data directory of a server", data.display());
    }
    let policy = Arc::default();
    let directory = data.to_owned();
    let options = EmbeddedOptions { directory, max_size_bytes: u64::MAX, max_blob_bytes: u64::MAX, policy };
    Embedded::open(&options)
        .with_context(|| format!("cannot open {}; does a server run on it?", data.display()))
}

/// The tokens of a directory that has some: a mistyped one is not made.
fn existing_tokens(data: &Path) -> anyhow::Result<Tokens> {
    if !data.join("tokens").is_dir() {
        bail!("{} has no tokens", data.display());
    }
    Ok(Tokens::open(data)?)
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
                Some(after) => {
                    Some(SystemTime::now().checked_add(after.duration()).context("--expires is too long")?)
                }
                None => None,
            };
            let (token, id) = Tokens::open(&data.directory()?)?.create(&namespace, allow, expires)?;
            writeln!(io::stderr(), "token {id} for namespace {namespace}; it is not shown again")?;
            writeln!(out, "{token}")?;
        }
        TokenCommand::List { data } => {
            let now = SystemTime::now();
            for token in existing_tokens(&data.directory()?)?.list()? {
                let state = match token.expires {
                    _ if token.revoked => "revoked".to_owned(),
                    None => "active".to_owned(),
                    Some(expires) => match expires.duration_since(now) {
                        Ok(left) => format!("active for {} hours", left.as_secs() / 3600),
                        Err(_) => "expired".to_owned(),
                    },
                };
                writeln!(out, "{}\t{}\t{}\t{state}", token.id, token.namespaces, token.verbs)?;
            }
        }
        TokenCommand::Revoke { data, id } => {
            if !existing_tokens(&data.directory()?)?.revoke(&id)? {
                bail!("there is no token {id:?}; `cachec-server token list` shows them");
            }
        }
    }
    Ok(())
}
