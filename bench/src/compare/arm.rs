//! What builds the program: cargo alone, a floor, cachec, and its peers.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::ValueEnum;

use super::floor::FLOOR_VARIABLE;
use crate::programs::{cargo, programs};

/// Key and secret of the loopback object store.
pub(super) const STORE_KEY: &str = "benchmark";

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Arm {
    /// Cargo without a cache
    None,
    /// What a compiler has left is linked back; nothing is looked at
    Floor,
    /// sccache, with a disk or a Redis server
    Sccache,
    /// kache, with a disk or an object store
    Kache,
    /// mbx, with a disk or an object store
    Mbx,
    /// cachec
    Cachec,
    /// cachec with `CACHEC_LAZY=1`, which has nothing to do with a local store
    Lazy,
}

impl Arm {
    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Floor => "floor",
            Self::Sccache => "sccache",
            Self::Kache => "kache",
            Self::Mbx => "mbx",
            Self::Cachec => "cachec",
            Self::Lazy => "lazy",
        }
    }

    pub(super) fn has_local(self) -> bool {
        self != Self::Lazy
    }

    pub(super) fn has_remote(self) -> bool {
        !matches!(self, Self::None | Self::Floor)
    }

    pub(super) fn is_own(self) -> bool {
        matches!(self, Self::Cachec | Self::Lazy)
    }

    /// The packages that it is installed from, with their versions and features.
    fn packages(self) -> &'static [(&'static str, &'static [&'static str])] {
        const STORE: (&str, &[&str]) = ("s3s-fs@0.14.1", &["--features=binary"]);
        match self {
            Self::None | Self::Floor | Self::Cachec | Self::Lazy => &[],
            Self::Sccache => &[("sccache@0.19.0", &["--no-default-features", "--features=redis"])],
            Self::Kache => &[("kache@2.0.0", &[]), STORE],
            Self::Mbx => &[("mbx@1.29.0", &[]), STORE],
        }
    }

    /// Its version, for the report.
    pub(super) fn version(self) -> String {
        let own = format!("{} {}", self.name(), env!("CARGO_PKG_VERSION"));
        self.packages().first().map_or(own, |(package, _)| package.replace('@', " "))
    }

    /// The program that users start in cargo's place.
    pub(super) fn front(self, peers: &Path) -> PathBuf {
        if self == Self::Mbx { peers.join("bin/mbx") } else { cargo() }
    }

    /// The program whose processes are counted as the cache's.
    pub(super) fn process_name(self) -> Option<&'static str> {
        if self.is_own() { Some("cachec") } else { self.has_remote().then_some(self.name()) }
    }

    /// Variables of a build with its state below `state`, and a server if there is one.
    pub(super) fn variables(
        self,
        state: &Path,
        peers: &Path,
        remote: Option<&str>,
    ) -> Vec<(&'static str, String)> {
        let below = |name: &str| state.join(name).display().to_string();
        let peer = |name: &str| peers.join("bin").join(name).display().to_string();
        let mut variables = match self {
            Self::None => vec![("RUSTC_WRAPPER", String::new())],
            Self::Floor => vec![
                ("RUSTC_WRAPPER", std::env::current_exe().unwrap_or_default().display().to_string()),
                (FLOOR_VARIABLE, below("tier")),
            ],
            Self::Sccache => vec![
                ("RUSTC_WRAPPER", peer("sccache")),
                ("SCCACHE_DIR", below("tier")),
                ("SCCACHE_SERVER_UDS", below("sccache.sock")),
            ],
            Self::Kache => vec![
                ("RUSTC_WRAPPER", peer("kache")),
                ("KACHE_CACHE_DIR", below("tier")),
                ("KACHE_RUNTIME_DIR", below("run")),
            ],
            Self::Mbx => vec![("RUSTC_WRAPPER", String::new()), ("MBX_CACHE_DIR", below("tier"))],
            Self::Cachec | Self::Lazy => {
                let mut variables = vec![("RUSTC_WRAPPER", programs().client.display().to_string())];
                if remote.is_none() {
                    variables.push(("CACHEC_DIR", below("tier")));
                }
                variables
            }
        };
        if let Some(url) = remote {
            let credentials =
                ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"].map(|name| (name, STORE_KEY.into()));
            match self {
                Self::Sccache => {
                    variables.push(("SCCACHE_REDIS_ENDPOINT", url.replace("http://", "redis://")));
                }
                Self::Kache => variables.extend(credentials),
                Self::Mbx => {
                    variables.extend(credentials);
                    variables.extend(
                        [
                            ("MBX_REMOTE_URL", "s3://cache/mbx"),
                            ("MBX_REMOTE_NAMESPACE", "benchmark"),
                            ("MBX_REMOTE_S3_ENDPOINT", url),
                            ("MBX_REMOTE_S3_REGION", "us-east-1"),
                            ("MBX_REMOTE_S3_FORCE_PATH_STYLE", "true"),
                            ("MBX_REMOTE_TRUST_WRITES", "true"),
                        ]
                        .map(|(name, value)| (name, value.to_owned())),
                    );
                }
                Self::Cachec | Self::Lazy => {
                    let lazy = if self == Self::Lazy { "1" } else { "0" };
                    variables.extend([
                        ("CACHEC_URL", url.into()),
                        ("CI", "true".into()),
                        ("CACHEC_LAZY", lazy.into()),
                    ]);
                }
                Self::None | Self::Floor => {}
            }
        }
        variables
    }

    /// A file that it reads its server's address from, below the home directory, and its text.
    pub(super) fn configuration(self, remote: Option<&str>) -> Option<(&'static str, String)> {
        let url = remote.filter(|_| self == Self::Kache)?;
        let text = format!(
            "[cache.remote]\ntype = \"s3\"\nbucket = \"cache\"\nregion = \"us-east-1\"\nendpoint = \"{url}\"\n"
        );
        Some((".config/kache/config.toml", text))
    }

    /// What ends its processes in order: program and arguments.
    pub(super) fn stop(self, peers: &Path) -> Option<(PathBuf, &'static [&'static str])> {
        let peer = |name: &str| peers.join("bin").join(name);
        match self {
            Self::Sccache => Some((peer("sccache"), &["--stop-server"])),
            Self::Kache => Some((peer("kache"), &["daemon", "stop"])),
            Self::Cachec | Self::Lazy => Some((programs().client.clone(), &["stop"])),
            Self::None | Self::Floor | Self::Mbx => None,
        }
    }
}

/// Installs the peers among the arms, by name, below a directory.
///
/// # Errors
/// Where one does not build.
pub fn install(peers: &Path, arms: &[Arm]) -> anyhow::Result<()> {
    for (package, options) in arms.iter().flat_map(|arm| arm.packages()) {
        let mut command = Command::new(cargo());
        command.args(["install", "--root"]).arg(peers).args(*options).arg(package);
        // Of the user's own cache nothing is to be seen in the programs that it is compared with.
        let installed = command.env_remove("RUSTC_WRAPPER").status()?;
        anyhow::ensure!(installed.success(), "{package} could not be installed");
    }
    Ok(())
}
