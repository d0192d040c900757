//! Configuration: environment, then `cachec.toml` beside `Cargo.lock`, then the user's `cachec.toml`.
//!
//! Invariant: everything is read and checked here, once. The agent receives the checked form, and its
//! socket is named by that form's digest, so differently configured builds never share an agent.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use crate::signature::{InvalidKey, Signer, TrustedKey};

/// Where Docker puts a build secret of that name.
const DEFAULT_TOKEN_FILE: &str = "/run/secrets/cachec_token";
const DEFAULT_DIRECTORY_SIZE: ByteSize = ByteSize::gib(10);
/// Files that container engines leave in a container's root directory.
const CONTAINER_MARKERS: [&str; 2] = ["/.dockerenv", "/run/.containerenv"];

/// What may be done with the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mode {
    ReadWrite,
    ReadOnly,
    /// Compile, and compare with what is stored.
    Verify,
    Off,
}

/// Whether paths are stored as variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PathMode {
    Portable,
    Exact,
}

/// A bearer token; never printed.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Token(String);

impl Token {
    /// The text for the `Authorization` header.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Token(…)")
    }
}

/// Why a configuration is refused; the build goes on uncached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("{file}: {message}")]
    File { file: String, message: String },
    #[error("{name}={value}: {message}")]
    Value { name: &'static str, value: String, message: String },
    #[error("there is no home directory to keep the local tier in: set CACHEC_DIR or CACHEC_URL")]
    NothingToUse,
}

/// The same keys as the `CACHEC_` variables, all optional.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawConfig {
    url: Option<String>,
    token: Option<String>,
    token_file: Option<PathBuf>,
    namespace: Option<String>,
    mode: Option<String>,
    dir: Option<PathBuf>,
    dir_size: Option<String>,
    runtime_dir: Option<PathBuf>,
    paths: Option<String>,
    lazy: Option<Switch>,
    env: Option<Vec<String>>,
    sign_key_file: Option<PathBuf>,
    trusted_keys: Option<Vec<String>>,
    log: Option<String>,
}

/// On or off, as it stands in a file or in a variable.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Switch {
    Flag(bool),
    Text(String),
}

impl Switch {
    fn is_on(&self, name: &'static str) -> Result<bool, ConfigError> {
        match self {
            Self::Flag(is_on) => Ok(*is_on),
            Self::Text(text) => match text.as_str() {
                "1" | "true" => Ok(true),
                "0" | "false" | "" => Ok(false),
                other => Err(invalid(name, other, "use 1 or 0")),
            },
        }
    }
}

/// The checked configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Config {
    /// Base URL of the server, without a trailing slash; none: local tier only.
    pub(crate) url: Option<String>,
    pub(crate) token: Option<Token>,
    pub(crate) namespace: String,
    pub(crate) mode: Mode,
    /// The local tier's directory; none: no local tier.
    pub(crate) directory: Option<PathBuf>,
    pub(crate) directory_bytes: u64,
    /// Whether this is a container, whose target directory is probably thrown away.
    pub(crate) in_container: bool,
    /// Where the agent's socket and log are.
    pub(crate) runtime_directory: PathBuf,
    pub(crate) path_mode: PathMode,
    /// Whether outputs are deferred that only compilers read.
    pub(crate) lazy: bool,
    /// More variables for the action key, sorted.
    pub(crate) extra_variables: Vec<String>,
    /// The key that signs what is published.
    #[serde(default)]
    pub(crate) sign_key_file: Option<PathBuf>,
    /// Whose results are restored from the server; none: anybody's.
    #[serde(default)]
    pub(crate) trusted_keys: Vec<TrustedKey>,
    /// Filter for the agent's log, in the syntax of `tracing`'s `EnvFilter`.
    pub(crate) log: String,
    /// Variables that TLS and proxy set-up read, for the agent; they do not name it.
    pub(crate) network_variables: Vec<(String, String)>,
}

/// Variables that decide about certificates and proxies.
const NETWORK_VARIABLES: [&str; 10] = [
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
];

/// The environment that a configuration is read from.
pub(crate) struct Surroundings {
    pub(crate) variables: HashMap<OsString, OsString>,
    /// Directories to search upwards for `Cargo.lock`; the first that has one above it counts.
    pub(crate) directories: Vec<PathBuf>,
    pub(crate) user_id: u32,
    pub(crate) in_container: bool,
}

impl Surroundings {
    /// Those of this process. `parent` is the process that started it: cargo, for a wrapper, whose
    /// working directory is where the user is, while the wrapper's own is the package's.
    pub(crate) fn of_this_process(parent: Option<u32>) -> Self {
        let parent_directory = parent.and_then(|id| std::fs::read_link(format!("/proc/{id}/cwd")).ok());
        let own_directory = std::env::current_dir().ok();
        Self {
            variables: std::env::vars_os().collect(),
            directories: parent_directory.into_iter().chain(own_directory).collect(),
            user_id: rustix::process::getuid().as_raw(),
            in_container: is_container(),
        }
    }

    fn text(&self, name: &str) -> Option<String> {
        let value = self.variables.get(OsString::from(name).as_os_str())?;
        let text = value.to_string_lossy();
        if text.is_empty() { None } else { Some(text.into_owned()) }
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from).filter(|path| path.is_absolute())
    }

    /// The socket and log directory used when nothing is configured.
    pub(crate) fn default_runtime_directory(&self) -> PathBuf {
        match self.path("XDG_RUNTIME_DIR").filter(|directory| directory.is_dir()) {
            Some(directory) => directory.join("cachec"),
            None => PathBuf::from(format!("/tmp/cachec-{}", self.user_id)),
        }
    }

    fn workspace_file(&self) -> Option<PathBuf> {
        let root = self.directories.iter().find_map(|directory| {
            directory.ancestors().find(|ancestor| ancestor.join("Cargo.lock").is_file())
        })?;
        Some(root.join("cachec.toml"))
    }

    fn user_file(&self) -> Option<PathBuf> {
        let directory =
            self.path("XDG_CONFIG_HOME").or_else(|| self.path("HOME").map(|home| home.join(".config")))?;
        Some(directory.join("cachec/cachec.toml"))
    }
}

impl Config {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// [`ConfigError`] names the file or variable and what is wrong; the caller reports it once.
    pub(crate) fn load(surroundings: &Surroundings) -> Result<Self, ConfigError> {
        let mut raw = RawConfig::from_environment(surroundings);
        for file in [surroundings.workspace_file(), surroundings.user_file()].into_iter().flatten() {
            raw = raw.or(RawConfig::from_file(&file)?);
        }
        raw.check(surroundings)
    }
}

impl RawConfig {
    fn from_environment(surroundings: &Surroundings) -> Self {
        let path = |name| surroundings.text(name).map(PathBuf::from);
        let list =
            |text: String| text.split([',', ' ']).filter(|name| !name.is_empty()).map(Into::into).collect();
        Self {
            url: surroundings.text("CACHEC_URL"),
            token: surroundings.text("CACHEC_TOKEN"),
            token_file: path("CACHEC_TOKEN_FILE"),
            namespace: surroundings.text("CACHEC_NAMESPACE"),
            mode: surroundings.text("CACHEC_MODE"),
            dir: path("CACHEC_DIR"),
            dir_size: surroundings.text("CACHEC_DIR_SIZE"),
            runtime_dir: path("CACHEC_RUNTIME_DIR"),
            paths: surroundings.text("CACHEC_PATHS"),
            lazy: surroundings.text("CACHEC_LAZY").map(Switch::Text),
            env: surroundings.text("CACHEC_ENV").map(list),
            sign_key_file: path("CACHEC_SIGN_KEY_FILE"),
            trusted_keys: surroundings.text("CACHEC_TRUSTED_KEYS").map(list),
            log: surroundings.text("CACHEC_LOG"),
        }
    }

    fn from_file(file: &Path) -> Result<Self, ConfigError> {
        let error = |message: String| ConfigError::File { file: file.display().to_string(), message };
        match std::fs::read_to_string(file) {
            Ok(text) => {
                toml::from_str(&text).map_err(|cause| error(cause.to_string().trim().replace('\n', " ")))
            }
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(cause) => Err(error(cause.to_string())),
        }
    }

    fn or(self, other: Self) -> Self {
        Self {
            url: self.url.or(other.url),
            // A token belongs to the place that names it: a nearer token file wins over a farther token.
            token: self.token.or(if self.token_file.is_some() { None } else { other.token }),
            token_file: self.token_file.or(other.token_file),
            namespace: self.namespace.or(other.namespace),
            mode: self.mode.or(other.mode),
            dir: self.dir.or(other.dir),
            dir_size: self.dir_size.or(other.dir_size),
            runtime_dir: self.runtime_dir.or(other.runtime_dir),
            paths: self.paths.or(other.paths),
            lazy: self.lazy.or(other.lazy),
            env: self.env.or(other.env),
            sign_key_file: self.sign_key_file.or(other.sign_key_file),
            trusted_keys: self.trusted_keys.or(other.trusted_keys),
            log: self.log.or(other.log),
        }
    }

    fn check(self, surroundings: &Surroundings) -> Result<Config, ConfigError> {
        let mode = match self.mode.as_deref() {
            None | Some("read-write") => Mode::ReadWrite,
            Some("read-only") => Mode::ReadOnly,
            Some("verify") => Mode::Verify,
            Some("off") => Mode::Off,
            Some(other) => {
                return Err(invalid("CACHEC_MODE", other, "use read-write, read-only, verify or off"));
            }
        };
        let path_mode = match self.paths.as_deref() {
            None | Some("portable") => PathMode::Portable,
            Some("exact") => PathMode::Exact,
            Some(other) => return Err(invalid("CACHEC_PATHS", other, "use portable or exact")),
        };
        let directory_bytes = match self.dir_size.as_deref() {
            None => DEFAULT_DIRECTORY_SIZE,
            Some(text) => ByteSize::from_str(text)
                .map_err(|_| invalid("CACHEC_DIR_SIZE", text, "use a size such as 10GiB"))?,
        };
        let directory = check_directory(self.dir, surroundings)?;
        if let Some(path) = self.runtime_dir.as_ref().filter(|path| !path.is_absolute()) {
            return Err(invalid("CACHEC_RUNTIME_DIR", &path.to_string_lossy(), "use an absolute path"));
        }
        let url = self.url.as_deref().map(check_url).transpose()?;
        if url.is_none() && directory.is_none() && mode != Mode::Off {
            return Err(ConfigError::NothingToUse);
        }
        if let Some(file) = self.sign_key_file.as_ref().filter(|file| !file.is_absolute()) {
            return Err(invalid("CACHEC_SIGN_KEY_FILE", &file.to_string_lossy(), "use an absolute path"));
        }
        if let Some(file) = &self.sign_key_file {
            Signer::read(file).map_err(|cause| ConfigError::File {
                file: file.display().to_string(),
                message: cause.to_string(),
            })?;
        }
        if self.trusted_keys.as_ref().is_some_and(Vec::is_empty) {
            return Err(invalid("CACHEC_TRUSTED_KEYS", "", "name at least one key, or do not set it"));
        }
        let trusted_keys = self.trusted_keys.unwrap_or_default();
        let mut extra_variables = self.env.unwrap_or_default();
        extra_variables.sort_unstable();
        Ok(Config {
            token: if url.is_some() { read_token(self.token, self.token_file)? } else { None },
            url,
            namespace: check_namespace(self.namespace)?,
            mode,
            directory,
            directory_bytes: directory_bytes.as_u64(),
            runtime_directory: self.runtime_dir.unwrap_or_else(|| surroundings.default_runtime_directory()),
            path_mode,
            lazy: self.lazy.map_or(Ok(false), |lazy| lazy.is_on("CACHEC_LAZY"))?,
            extra_variables,
            sign_key_file: self.sign_key_file,
            trusted_keys: trusted_keys
                .iter()
                .map(|key| {
                    key.parse()
                        .map_err(|error: InvalidKey| invalid("CACHEC_TRUSTED_KEYS", key, &error.to_string()))
                })
                .collect::<Result<_, _>>()?,
            in_container: surroundings.in_container,
            log: self.log.unwrap_or_else(|| "warn".to_owned()),
            network_variables: NETWORK_VARIABLES
                .iter()
                .filter_map(|name| Some(((*name).to_owned(), surroundings.text(name)?)))
                .collect(),
        })
    }
}

/// Whether this is a container: by the files that engines leave, by the name of BuildKit's hosts (a `RUN`
/// step has no such file), or by a root directory that is an overlay.
fn is_container() -> bool {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    // Fields of a line: …, mount point (the fifth), …, a dash, the type of file system.
    let is_overlay_root = |line: &str| {
        let is_root = line.split(' ').nth(4) == Some("/");
        is_root && line.split(" - ").nth(1).is_some_and(|rest| rest.contains("overlay"))
    };
    CONTAINER_MARKERS.iter().any(|marker| Path::new(marker).exists())
        || text("/proc/sys/kernel/hostname").trim() == "buildkitsandbox"
        || text("/proc/self/mountinfo").lines().any(is_overlay_root)
}

fn invalid(name: &'static str, value: &str, message: &str) -> ConfigError {
    ConfigError::Value { name, value: value.to_owned(), message: message.to_owned() }
}

/// The configured directory, or the user's cache directory outside of containers and CI.
fn check_directory(
    configured: Option<PathBuf>,
    surroundings: &Surroundings,
) -> Result<Option<PathBuf>, ConfigError> {
    match configured {
        Some(path) if path.is_absolute() => Ok(Some(path)),
        Some(path) => Err(invalid("CACHEC_DIR", &path.to_string_lossy(), "use an absolute path")),
        None if surroundings.in_container || surroundings.text("CI").is_some() => Ok(None),
        None => Ok(surroundings
            .path("XDG_CACHE_HOME")
            .or_else(|| surroundings.path("HOME").map(|home| home.join(".cache")))
            .map(|directory| directory.join("cachec"))),
    }
}

fn check_url(url: &str) -> Result<String, ConfigError> {
    let usable = reqwest::Url::parse(url)
        .is_ok_and(|parsed| matches!(parsed.scheme(), "http" | "https") && parsed.has_host());
    if !usable {
        return Err(invalid("CACHEC_URL", url, "use a URL such as https://cache.example.org"));
    }
    Ok(url.trim_end_matches('/').to_owned())
}

fn check_namespace(namespace: Option<String>) -> Result<String, ConfigError> {
    let namespace = namespace.unwrap_or_else(|| "default".to_owned());
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-');
    let starts_well = namespace.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if namespace.len() > 64 || !starts_well || !namespace.bytes().all(plain) {
        let message = "use at most 64 lower-case letters, digits, dots, dashes and underscores";
        return Err(invalid("CACHEC_NAMESPACE", &namespace, message));
    }
    Ok(namespace)
}

fn read_token(token: Option<String>, file: Option<PathBuf>) -> Result<Option<Token>, ConfigError> {
    let configured = file.is_some();
    let file = file.unwrap_or_else(|| PathBuf::from(DEFAULT_TOKEN_FILE));
    let text = match (token, std::fs::read_to_string(&file)) {
        (Some(token), _) => token,
        (None, Ok(text)) => text,
        (None, Err(cause)) if configured => {
            return Err(ConfigError::File { file: file.display().to_string(), message: cause.to_string() });
        }
        (None, Err(_)) => return Ok(None),
    };
    let text = text.trim();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ConfigError::File {
            file: "the token".to_owned(),
            message: "is not one word of ASCII".to_owned(),
        });
    }
    Ok(Some(Token(text.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surroundings(variables: &[(&str, &str)], directory: &Path) -> Surroundings {
        Surroundings {
            variables: variables.iter().map(|(name, value)| (name.into(), value.into())).collect(),
            directories: vec![directory.join("crates/deep")],
            user_id: 1000,
            in_container: false,
        }
    }

    fn workspace(cachec_toml: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("crates/deep")).unwrap();
        std::fs::write(directory.path().join("Cargo.lock"), "").unwrap();
        std::fs::write(directory.path().join("cachec.toml"), cachec_toml).unwrap();
        directory
    }

    #[test]
    fn the_environment_wins_over_the_workspace_file() {
        let workspace = workspace("url = 'http://file:1'\nnamespace = 'shop'\ndir-size = '1GiB'\n");
        let variables = [("CACHEC_URL", "http://environment:2/"), ("HOME", "/home/ann")];
        let config = Config::load(&surroundings(&variables, workspace.path())).unwrap();
        assert_eq!(config.url.as_deref(), Some("http://environment:2"));
        assert_eq!(config.namespace, "shop");
        assert_eq!(config.directory_bytes, 1 << 30);
        assert_eq!(config.directory, Some("/home/ann/.cache/cachec".into()));
        assert_eq!(config.runtime_directory, Path::new("/tmp/cachec-1000"));
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused_with_a_hint() {
        let workspace = workspace("ulr = 'http://file:1'");
        let error = Config::load(&surroundings(&[], workspace.path())).unwrap_err().to_string();
        assert!(error.contains("cachec.toml") && error.contains("ulr") && error.contains("url"), "{error}");
        for (name, value) in [
            ("CACHEC_URL", "cache.example.org"),
            ("CACHEC_MODE", "readonly"),
            ("CACHEC_DIR_SIZE", "much"),
            ("CACHEC_DIR", "relative"),
            ("CACHEC_RUNTIME_DIR", "relative"),
            ("CACHEC_NAMESPACE", "../other"),
            ("CACHEC_PATHS", "short"),
            ("CACHEC_LAZY", "perhaps"),
        ] {
            let variables = [("HOME", "/home/ann"), (name, value)];
            let error = Config::load(&surroundings(&variables, Path::new("/nowhere"))).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn a_container_has_no_local_tier_unless_told() {
        let mut container = surroundings(&[("HOME", "/root")], Path::new("/nowhere"));
        container.in_container = true;
        assert!(matches!(Config::load(&container), Err(ConfigError::NothingToUse)));
        container.variables.insert("CACHEC_DIR".into(), "/cache".into());
        assert_eq!(Config::load(&container).unwrap().directory, Some("/cache".into()));
    }

    #[test]
    fn a_token_is_read_from_its_file_and_never_printed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        std::fs::write(&file, "canary-7\n").unwrap();
        let variables = [("CACHEC_URL", "http://a:1"), ("CACHEC_TOKEN_FILE", file.to_str().unwrap())];
        let config = Config::load(&surroundings(&variables, Path::new("/nowhere"))).unwrap();
        assert_eq!(config.token.as_ref().unwrap().expose(), "canary-7");
        assert!(!format!("{config:?}").contains("canary"));
    }
}
