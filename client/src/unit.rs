//! A unit ready to be looked up: its roots and its action key.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use cachec_protocol::{ActionKey, Digest, Fields, Root, Roots, RustcAction, action};

use crate::config::{Config, PathMode};
use crate::invocation::{Invocation, Refusal};
use crate::ipc::UnitRequest;
use crate::memo::Memo;
use crate::toolchain::{QUERY_VARIABLES, Query, Toolchains};
use crate::tracer::Places;

/// Directory that roots are remapped to in outputs: a root `cargo` is `REMAPPED/cargo` there.
pub(crate) const REMAPPED: &str = "/cachec";

/// A unit that is cached.
#[derive(Debug)]
pub(crate) struct Unit {
    pub(crate) invocation: Invocation,
    pub(crate) working_directory: PathBuf,
    /// Names and values.
    environment: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) roots: Roots,
    /// The toolchain's directory, by every name it is known under.
    pub(crate) sysroots: Vec<PathBuf>,
    /// Whether only an observed run can be stored.
    pub(crate) needs_trace: bool,
    /// Whether the user asked for this package: then its outputs are looked at, and edited, by people.
    pub(crate) is_primary: bool,
    /// The file mode creation mask of the build.
    pub(crate) umask: u32,
    pub(crate) action_key: ActionKey,
    pub(crate) action_fields: Fields,
}

impl Unit {
    /// Understands the request, identifies the toolchain and derives the action key. Reads files: the
    /// toolchain's, once.
    ///
    /// # Errors
    /// Why the unit is not cached.
    pub(crate) fn new(
        request: &UnitRequest,
        config: &Config,
        toolchains: &Toolchains,
        memo: &Memo,
    ) -> Result<Self, Refusal> {
        let words: Vec<Vec<u8>> = request.arguments.iter().map(|word| word.to_vec()).collect();
        let environment: Vec<(Vec<u8>, Vec<u8>)> =
            request.environment.iter().map(|pair| (pair.name.clone(), pair.value.clone())).collect();
        if variable(&environment, "RUSTC_LOG").is_some() {
            return Err(Refusal::Logging);
        }
        let invocation = Invocation::parse(&words, drops_incremental(&environment, config))?;
        let working_directory = PathBuf::from(OsStr::from_bytes(&request.working_directory));
        let query = Query {
            compiler: request.compiler.clone(),
            working_directory: working_directory.clone(),
            variables: environment
                .iter()
                .filter(|(name, _)| QUERY_VARIABLES.contains(&name.as_slice()))
                .cloned()
                .collect(),
        };
        let toolchain = toolchains.identify(&query, memo).map_err(|_| Refusal::Toolchain)?;
        let exact =
            config.path_mode == PathMode::Exact || invocation.value("-C instrument-coverage").is_some();
        let roots = if exact {
            Roots::default()
        } else {
            find_roots(&invocation, &working_directory, &environment, &toolchain.sysroot)
        };
        let action_fields = RustcAction {
            tool: toolchain.identity,
            arguments: &invocation.arguments,
            working_directory: &request.working_directory,
            environment: &environment,
            extra_variables: &config.extra_variables,
            cpu: if invocation.for_this_cpu() { Some(cpu_identity()?) } else { None },
            roots: &roots,
        }
        .fields()
        .map_err(|_| Refusal::Paths)?;
        let action_key = action::action_key(&action_fields);
        let real_sysroot = fs::canonicalize(&toolchain.sysroot).ok();
        Ok(Self {
            needs_trace: toolchain.is_script || invocation.needs_trace(),
            is_primary: variable(&environment, "CARGO_PRIMARY_PACKAGE").is_some(),
            umask: request.umask,
            sysroots: real_sysroot.into_iter().chain([toolchain.sysroot.clone()]).collect(),
            invocation,
            working_directory,
            environment,
            roots,
            action_key,
            action_fields,
        })
    }

    /// A variable of the unit's environment.
    pub(crate) fn variable(&self, name: &[u8]) -> Option<&[u8]> {
        self.environment.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_slice())
    }

    /// A path as the compiler takes it: from the working directory.
    pub(crate) fn absolute(&self, path: &[u8]) -> PathBuf {
        self.working_directory.join(OsStr::from_bytes(path))
    }

    /// A path of this unit as stored: absolute, with roots as markers.
    pub(crate) fn normalised_path(&self, path: &[u8]) -> Option<Vec<u8>> {
        self.roots.normalise(self.absolute(path).as_os_str().as_bytes()).ok()
    }

    /// The arguments to run the compiler with: remapped roots, and no incremental compilation. The user's
    /// own remappings stand behind and win. Shorter paths come first, since the last match counts.
    pub(crate) fn compiler_arguments(&self, words: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut roots: Vec<(Root, &[u8])> = self.roots.iter().collect();
        roots.reverse();
        let arguments: Vec<Vec<u8>> = roots
            .into_iter()
            .map(|(root, path)| {
                [b"--remap-path-prefix=", path, b"=", REMAPPED.as_bytes(), b"/", root.name().as_bytes()]
                    .concat()
            })
            .collect();
        let tool = words[..self.invocation.tool_words].to_vec();
        let rest = without_incremental(&words[self.invocation.tool_words..]);
        [tool, arguments, rest].concat()
    }

    /// Directories that are there wherever this unit can run: roots, outputs, dependencies.
    pub(crate) fn known_directories(&self) -> Vec<PathBuf> {
        let roots = self.roots.iter().map(|(_, path)| PathBuf::from(OsStr::from_bytes(path)));
        let searched = self.invocation.searched_directories().map(|path| self.absolute(path));
        let own = [self.working_directory.clone(), self.output_directory()];
        roots.chain(searched).chain(self.sysroots.iter().cloned()).chain(own).collect()
    }

    /// The directories of `PATH`.
    pub(crate) fn program_directories(&self) -> Vec<PathBuf> {
        let path = OsStr::from_bytes(self.variable(b"PATH").unwrap_or_default());
        std::env::split_paths(path).filter(|directory| directory.is_absolute()).collect()
    }

    /// The directory for temporary files.
    pub(crate) fn temporary_directory(&self) -> PathBuf {
        PathBuf::from(OsStr::from_bytes(self.variable(b"TMPDIR").unwrap_or(b"/tmp")))
    }

    /// Where the outputs go.
    pub(crate) fn output_directory(&self) -> PathBuf {
        self.working_directory.join(&self.invocation.output_directory)
    }

    /// What the tracer must know of this unit.
    pub(crate) fn places(&self) -> Places {
        let absolute = |path: &[u8]| self.absolute(path).into_os_string().into_vec();
        Places {
            output_directory: self.output_directory().into_os_string().into_vec(),
            searched: self.invocation.searched_directories().map(|path| absolute(path).into()).collect(),
        }
    }
}

/// Leaves out `-C incremental=…` in both of cargo's spellings.
fn without_incremental(words: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut kept: Vec<Vec<u8>> = Vec::with_capacity(words.len());
    for word in words {
        if word.starts_with(b"-Cincremental=") {
            continue;
        }
        if word.starts_with(b"incremental=") && kept.last().is_some_and(|last| last == b"-C") {
            kept.pop();
            continue;
        }
        kept.push(word.clone());
    }
    kept
}

/// Whether `-C incremental` is dropped: where nobody asked for it (`CARGO_INCREMENTAL`) and the target
/// directory is thrown away, in CI and in containers.
fn drops_incremental(environment: &[(Vec<u8>, Vec<u8>)], config: &Config) -> bool {
    variable(environment, "CARGO_INCREMENTAL").is_none()
        && (variable(environment, "CI").is_some() || config.in_container)
}

fn variable<'a>(environment: &'a [(Vec<u8>, Vec<u8>)], name: &str) -> Option<&'a [u8]> {
    environment.iter().find(|(known, _)| known == name.as_bytes()).map(|(_, value)| value.as_slice())
}

fn find_roots(
    invocation: &Invocation,
    working_directory: &Path,
    environment: &[(Vec<u8>, Vec<u8>)],
    sysroot: &Path,
) -> Roots {
    let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
    let home = variable(environment, "HOME").map(<[u8]>::to_vec);
    let cargo_home = variable(environment, "CARGO_HOME")
        .map(<[u8]>::to_vec)
        .or_else(|| home.as_ref().map(|home| [home.as_slice(), b"/.cargo"].concat()));
    let in_cargo_home =
        cargo_home.as_ref().is_some_and(|path| working_directory.starts_with(OsStr::from_bytes(path)));
    let workspace = (!in_cargo_home).then(|| bytes(working_directory));
    let target = invocation.target_directory().map(|path| bytes(&working_directory.join(path)));
    Roots::new(
        [
            (Root::Workspace, workspace),
            (Root::Target, target),
            (Root::CargoHome, cargo_home),
            (Root::Sysroot, Some(bytes(sysroot))),
            (Root::Home, home),
        ]
        .into_iter()
        .filter_map(|(root, path)| Some((root, path?))),
    )
}

/// Digest of the CPU's model and features as the kernel reports them.
fn cpu_identity() -> Result<Digest, Refusal> {
    let text = fs::read_to_string("/proc/cpuinfo").map_err(|_| Refusal::Toolchain)?;
    let relevant = ["vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU "];
    let mut lines: Vec<&str> =
        text.lines().filter(|line| relevant.iter().any(|prefix| line.starts_with(prefix))).collect();
    lines.sort_unstable();
    lines.dedup();
    if lines.is_empty() { Err(Refusal::Toolchain) } else { Ok(Digest::of(lines.join("\n").as_bytes())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incremental_is_left_out_in_both_spellings() {
        let words = |line: &str| line.split(' ').map(|word| word.as_bytes().to_vec()).collect::<Vec<_>>();
        let kept = words("--crate-name a -C debuginfo=2 a.rs");
        assert_eq!(without_incremental(&words("--crate-name a -C debuginfo=2 -C incremental=/x a.rs")), kept);
        assert_eq!(without_incremental(&words("--crate-name a -C debuginfo=2 -Cincremental=/x a.rs")), kept);
    }
}
