//! The configuration: what the file, the environment and flags say, checked and put together once. Nothing else reads
//! any of them.
//!
//! Flags win over the environment, and that over the file. The file is TOML; unknown keys are refused:
//!
//! ```toml
//! [server]                     # the same words as the flags, with '_'
//! listen = "127.0.0.1:7373"
//! data = "/var/lib/cachec"
//! max_size = "50GiB"
//!
//! [namespaces.main]            # see crate::policy
//! quota = "30GiB"
//!
//! [namespaces."pr-*"]
//! parent = "main"
//! max_age = "7d"
//!
//! [[identity]]                 # see crate::identity
//! ```

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytesize::ByteSize;
use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::age::Age;
use crate::cli::ServeArguments;
use crate::identity::Issuer;
use crate::namespace::Pattern;
use crate::policy::{Policy, Rules};
use crate::server::ServerOptions;
use crate::store::embedded::EmbeddedOptions;
use crate::tls::TlsFiles;

/// Below this, RocksDB's own files would be most of the store.
const MIN_SIZE: ByteSize = ByteSize::mib(32);

/// With less, nearly every upload would be refused: most likely the unit is mistyped.
const MIN_QUOTA: ByteSize = ByteSize::mib(1);

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// Where the clients' programs are, unless something else is said.
const CLIENTS: &str = "/usr/local/share/cachec/clients";

/// What the file's section `[server]`, the environment or flags say.
#[derive(Debug, Default, Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Address and port to listen on; port 0 takes a free one [default: 127.0.0.1:7373]
    #[arg(long, env = "CACHEC_SERVER_LISTEN")]
    listen: Option<SocketAddr>,
    /// Address and port for metrics and probes alone; they name namespaces, and need no token [default: with the rest on
    /// a loopback address, else nowhere]
    #[arg(long, env = "CACHEC_SERVER_METRICS_LISTEN")]
    metrics_listen: Option<SocketAddr>,
    /// The data directory
    #[arg(long, env = "CACHEC_SERVER_DATA")]
    data: Option<PathBuf>,
    /// Most bytes that the data directory takes, for example 50GiB [default: 50GiB]
    #[arg(long, env = "CACHEC_SERVER_MAX_SIZE")]
    max_size: Option<ByteSize>,
    /// Most bytes of one blob's content [default: 4GiB]
    #[arg(long, env = "CACHEC_SERVER_MAX_BLOB_SIZE")]
    max_blob_size: Option<ByteSize>,
    /// How long entries stay that nobody uses, in time that the server runs [default: until the room is needed]
    #[arg(long, env = "CACHEC_SERVER_MAX_AGE")]
    max_age: Option<Age>,
    /// Directory with the client's program for each machine (x86_64-linux), for /install.sh and /client/MACHINE
    /// [default: /usr/local/share/cachec/clients]
    #[arg(long, env = "CACHEC_SERVER_CLIENTS")]
    clients: Option<PathBuf>,
    /// Certificate for TLS, with those of the authorities in between (PEM); looked at again once a minute
    #[arg(long, env = "CACHEC_SERVER_TLS_CERTIFICATE")]
    tls_certificate: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, env = "CACHEC_SERVER_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// Connections at a time; more wait [default: 4096]
    #[arg(long, env = "CACHEC_SERVER_MAX_CONNECTIONS")]
    max_connections: Option<u32>,
    /// Connections of one address at a time; more are closed. A proxy needs more, unless it is on this machine
    /// [default: 256]
    #[arg(long, env = "CACHEC_SERVER_MAX_CONNECTIONS_PER_ADDRESS")]
    max_connections_per_address: Option<u32>,
    /// How long a CI job's session lasts [default: 6h]
    #[arg(long, env = "CACHEC_SERVER_SESSION")]
    session: Option<Age>,
    /// Uploads at a time; each takes up to 33 MiB of memory [default: 16]
    #[arg(long, env = "CACHEC_SERVER_MAX_UPLOADS")]
    max_uploads: Option<u16>,
    /// Level at which blobs are compressed again in the background, at the lowest priority; 0 for never. 19 takes
    /// some 100 MiB of memory meanwhile [default: 19]
    #[arg(long, env = "CACHEC_SERVER_RECOMPRESS_LEVEL")]
    recompress_level: Option<i32>,
    /// How often all blobs are read and checked, in the background and at the lowest priority; 0s for never
    /// [default: 30d]
    #[arg(long, env = "CACHEC_SERVER_SCRUB_INTERVAL")]
    scrub_interval: Option<Age>,
    /// Listen beyond loopback without any token
    #[arg(long, env = "CACHEC_SERVER_OPEN", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = BoolishValueParser::new())]
    open: Option<bool>,
    /// What to log, for example info or cachec_server=debug [default: info]
    #[arg(long, env = "CACHEC_SERVER_LOG")]
    log: Option<String>,
    /// How to log it [default: text]
    #[arg(long, env = "CACHEC_SERVER_LOG_FORMAT")]
    log_format: Option<LogFormat>,
}

/// What a line of the log is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Words and `key=value`.
    #[default]
    Text,
    /// A JSON object.
    Json,
}

impl Settings {
    fn or(self, other: Self) -> Self {
        Self {
            listen: self.listen.or(other.listen),
            metrics_listen: self.metrics_listen.or(other.metrics_listen),
            data: self.data.or(other.data),
            max_size: self.max_size.or(other.max_size),
            max_blob_size: self.max_blob_size.or(other.max_blob_size),
            max_age: self.max_age.or(other.max_age),
            clients: self.clients.or(other.clients),
            tls_certificate: self.tls_certificate.or(other.tls_certificate),
            tls_key: self.tls_key.or(other.tls_key),
            max_connections: self.max_connections.or(other.max_connections),
            max_connections_per_address: self
                .max_connections_per_address
                .or(other.max_connections_per_address),
            session: self.session.or(other.session),
            max_uploads: self.max_uploads.or(other.max_uploads),
            recompress_level: self.recompress_level.or(other.recompress_level),
            scrub_interval: self.scrub_interval.or(other.scrub_interval),
            open: self.open.or(other.open),
            log: self.log.or(other.log),
            log_format: self.log_format.or(other.log_format),
        }
    }
}

/// The file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    server: Settings,
    namespaces: BTreeMap<Pattern, Rules>,
    identity: Vec<Issuer>,
}

impl File {
    fn read(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is not right", path.display()))
    }
}

/// Everything that a server is started with.
#[derive(Debug)]
pub struct Config {
    /// The server.
    pub server: ServerOptions,
    /// What is logged.
    pub log: String,
    /// How it is logged.
    pub log_format: LogFormat,
}

impl Config {
    /// Puts together what all sources say.
    ///
    /// # Errors
    /// A sentence about the value that cannot be, and where it stands.
    pub fn load(arguments: ServeArguments) -> anyhow::Result<Self> {
        let file = File::read(arguments.config.as_deref())?;
        let settings = arguments.settings.or(file.server);
        let max_size = settings.max_size.unwrap_or(ByteSize::gib(50));
        ensure!(max_size >= MIN_SIZE, "max-size must be at least {MIN_SIZE}");
        let uploads = settings.max_uploads.unwrap_or(16);
        ensure!((1..=256).contains(&uploads), "max-uploads must be 1 to 256");
        let level = settings.recompress_level.unwrap_or(19);
        ensure!((0..=19).contains(&level), "recompress-level must be 0 to 19");
        if let Some(interval) = settings.scrub_interval.map(Age::duration) {
            ensure!(interval.is_zero() || interval >= HOUR, "scrub-interval must be 0s or at least 1h");
        }
        let session = settings.session.map(Age::duration);
        ensure!(session.is_none_or(|session| session >= MINUTE), "session must be at least 1m");
        let max_blob_size = settings.max_blob_size.unwrap_or(ByteSize::gib(4));
        ensure!(max_blob_size >= ByteSize::mib(1), "max-blob-size must be at least 1MiB");
        for limit in [settings.max_connections, settings.max_connections_per_address] {
            ensure!(limit != Some(0), "max-connections and max-connections-per-address must be at least 1");
        }
        let ages = file.namespaces.values().map(|rules| rules.max_age).chain([settings.max_age]);
        ensure!(
            ages.flatten().all(|age| age.duration() >= HOUR),
            "max-age must be at least 1h: hours are what ages are counted in"
        );
        for (pattern, rules) in &file.namespaces {
            let is_small =
                [rules.quota, rules.total_quota].into_iter().flatten().any(|quota| quota < MIN_QUOTA);
            ensure!(!is_small, "a quota of {pattern} is less than {MIN_QUOTA}, which most results need");
        }
        let tls = match (settings.tls_certificate, settings.tls_key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(TlsFiles { certificate, key }),
            _ => bail!("TLS needs both, tls-certificate and tls-key"),
        };
        let store = EmbeddedOptions {
            directory: named(settings.data)?,
            max_size_bytes: max_size.as_u64(),
            max_blob_bytes: max_blob_size.as_u64(),
            policy: Arc::new(Policy::new(file.namespaces, settings.max_age)?),
        };
        let listen = settings.listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 7373)));
        let mut server = ServerOptions::new(listen, store);
        server.recompress_level = (level > 0).then_some(level);
        let month = Duration::from_secs(30 * 24 * 60 * 60);
        let scrub_interval = settings.scrub_interval.map_or(month, Age::duration);
        server.scrub_interval = Some(scrub_interval).filter(|interval| !interval.is_zero());
        server.open = settings.open.unwrap_or(false);
        server.metrics_listen = settings.metrics_listen;
        server.identities = file.identity;
        server.tls = tls;
        server.clients = Some(settings.clients.unwrap_or_else(|| CLIENTS.into()));
        let number = |setting: Option<u32>, default: usize| {
            setting.map_or(default, |number| usize::try_from(number).unwrap_or(usize::MAX))
        };
        server.max_connections = number(settings.max_connections, server.max_connections);
        server.max_connections_per_address =
            number(settings.max_connections_per_address, server.max_connections_per_address);
        server.limits.uploads = usize::from(uploads);
        server.limits.session = session.unwrap_or(server.limits.session);
        let log = settings.log.unwrap_or_else(|| "info".to_owned());
        Ok(Self { server, log, log_format: settings.log_format.unwrap_or_default() })
    }
}

/// The data directory that an argument, or else the file, names.
///
/// # Errors
/// Neither does, or the file cannot be used.
pub fn data_directory(argument: Option<PathBuf>, config: Option<&Path>) -> anyhow::Result<PathBuf> {
    let argument = if argument.is_some() { argument } else { File::read(config)?.server.data };
    named(argument)
}

fn named(data: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    data.context(
        "no data directory is named; pass --data DIRECTORY, or write `data` below [server] in the file",
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn load(file: &str, flags: &[&str]) -> anyhow::Result<Config> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("server.toml");
        std::fs::write(&path, file).unwrap();
        let words = ["cachec-server", "serve", "--config", path.to_str().unwrap()];
        match Cli::try_parse_from(words.iter().chain(flags))?.command {
            Command::Serve(arguments) => Config::load(arguments),
            _ => unreachable!(),
        }
    }

    const FILE: &str =
        "[server]\ndata = '/data'\nmax_size = '20 GiB'\nmax_uploads = 3\nopen = true\nmax_age = '30d'
        [namespaces.main]\nquota = '1GiB'";

    #[test]
    fn flags_win_over_the_file_and_defaults_fill_up() {
        let config = load(FILE, &["--max-size", "1GiB", "--recompress-level", "0"]).unwrap();
        let server = config.server;
        assert_eq!(server.store.directory, Path::new("/data"));
        assert_eq!((server.store.max_size_bytes, server.store.max_blob_bytes), (1 << 30, 4 << 30));
        assert_eq!((server.limits.uploads, server.recompress_level, server.open), (3, None, true));
        assert_eq!(server.listen.to_string(), "127.0.0.1:7373");
        assert_eq!(server.store.policy.quota_bytes(&"main".parse().unwrap()), Some(1 << 30));
        assert_eq!((config.log.as_str(), config.log_format), ("info", LogFormat::Text));
        assert!(!load(FILE, &["--open=false"]).unwrap().server.open);
    }

    #[test]
    fn what_cannot_be_is_explained() {
        for (file, flags, hint) in [
            ("", &[][..], "--data"),
            ("[server]\ndata = 'd'\nmaxsize = '1GiB'", &[], "unknown field `maxsize`"),
            ("[servers]", &[], "unknown field `servers`"),
            ("[server]\nmax_size = 'ten'", &[], "max_size"),
            ("[server", &[], "server.toml"),
            ("[namespaces.'../x']", &[], "a namespace is"),
            (FILE, &["--max-size", "1KiB"], "at least 32.0 MiB"),
            (FILE, &["--max-uploads", "0"], "1 to 256"),
            (FILE, &["--scrub-interval", "59s"], "at least 1h"),
            (FILE, &["--session", "0s"], "at least 1m"),
            (FILE, &["--max-age", "0s"], "max-age must be"),
            ("[server]\ndata = 'd'\n[namespaces.main]\nmax_age = '5m'", &[], "max-age must be"),
            (FILE, &["--max-blob-size", "0"], "at least 1MiB"),
            (FILE, &["--max-connections", "0"], "at least 1"),
            ("[server]\ndata = 'd'\n[namespaces.main]\nquota = '1KiB'", &[], "quota"),
            (FILE, &["--recompress-level", "20"], "0 to 19"),
        ] {
            let error = format!("{:?}", load(file, flags).unwrap_err());
            assert!(error.contains(hint), "{file} {flags:?}: {error}");
        }
    }
}
