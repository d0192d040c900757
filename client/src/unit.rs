//! A unit ready to be looked up: its roots and its action key.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use cachec_protocol::script::script_action_key;
use cachec_protocol::{ActionKey, Argument, Digest, Fields, Root, Roots, RustcAction, ScriptAction, action};

use crate::config::{Config, PathMode};
use crate::invocation::{Invocation, Refusal, is_probe};
use crate::ipc::{Remapping, UnitRequest};
use crate::memo::Memo;
use crate::script::{self, Script};
use crate::toolchain::{QUERY_VARIABLES, Query, Toolchain, Toolchains};
use crate::tracer::Places;

/// Directory that roots are remapped to in outputs: a root `cargo` is `REMAPPED/cargo` there.
pub(crate) const REMAPPED: &str = "/cachec";

/// What a unit runs.
#[derive(Debug)]
pub(crate) enum Task {
    /// A compiler, for a crate.
    Compile(Invocation),
    /// A compiler, for one of cargo's questions: nothing is left but what it prints.
    Probe,
    /// A build script.
    Script(Script),
}

/// A unit that is cached.
#[derive(Debug)]
pub(crate) struct Unit {
    pub(crate) task: Task,
    pub(crate) working_directory: PathBuf,
    /// Names and values.
    environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// As cargo names it.
    compiler: Vec<u8>,
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
    /// toolchain's, once, and a build script's program.
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
        let working_directory = PathBuf::from(OsStr::from_bytes(&request.working_directory));
        let task = if request.is_script {
            let is_foreign = cargo_home(&environment)
                .is_some_and(|home| working_directory.starts_with(OsStr::from_bytes(&home)));
            Task::Script(Script::new(request, &environment, &working_directory, is_foreign)?)
        } else if is_probe(&words) {
            Task::Probe
        } else {
            Task::Compile(Invocation::parse(&words, drops_incremental(&environment, config))?)
        };
        let compiler = match &task {
            Task::Script(_) => variable(&environment, "RUSTC").unwrap_or(b"rustc").to_vec(),
            _ => request.compiler.clone(),
        };
        let query = Query {
            compiler: compiler.clone(),
            working_directory: working_directory.clone(),
            variables: environment
                .iter()
                .filter(|(name, _)| QUERY_VARIABLES.contains(&name.as_slice()))
                .cloned()
                .collect(),
        };
        let toolchain = toolchains.identify(&query, memo).map_err(|_| Refusal::Toolchain)?;
        let roots = if task.has_exact_paths() || config.path_mode == PathMode::Exact {
            Roots::default()
        } else {
            find_roots(&task, &working_directory, &environment, &toolchain.sysroot)
        };
        let ingredients =
            KeyIngredients { words: &words, request, environment: &environment, config, roots: &roots };
        let (action_key, action_fields) = ingredients.action(&task, &toolchain, memo)?;
        let real_sysroot = fs::canonicalize(&toolchain.sysroot).ok();
        Ok(Self {
            needs_trace: toolchain.script.is_some() || task.invocation().is_none_or(Invocation::needs_trace),
            is_primary: variable(&environment, "CARGO_PRIMARY_PACKAGE").is_some(),
            umask: request.umask,
            sysroots: real_sysroot.into_iter().chain([toolchain.sysroot.clone()]).collect(),
            task,
            working_directory,
            environment,
            compiler,
            roots,
            action_key,
            action_fields,
        })
    }

    /// What it is called in logs and counts.
    pub(crate) fn name(&self) -> &str {
        match &self.task {
            Task::Compile(invocation) => &invocation.crate_name,
            Task::Probe => "probe",
            Task::Script(script) => &script.package,
        }
    }

    /// A compile's command line.
    pub(crate) fn invocation(&self) -> Option<&Invocation> {
        self.task.invocation()
    }

    /// The build script, if that is what is run.
    pub(crate) fn script(&self) -> Option<&Script> {
        match &self.task {
            Task::Script(script) => Some(script),
            _ => None,
        }
    }

    /// Names of files that a successful run must leave, as far as they are known.
    pub(crate) fn required_outputs(&self) -> Vec<String> {
        self.invocation().map(Invocation::required_outputs).unwrap_or_default()
    }

    /// Whether a name in the output directory can only be this unit's.
    pub(crate) fn owns_output(&self, name: &str) -> bool {
        match &self.task {
            Task::Compile(invocation) => invocation.owns_output(name),
            Task::Probe => false,
            Task::Script(_) => true,
        }
    }

    /// Whether an output is only ever replaced by another file, and edited in place by nobody: a library, which rustc
    /// renames to its place, a proc macro, and a build script's program, which is kept beside its launcher.
    pub(crate) fn is_only_replaced(&self, name: &str) -> bool {
        self.invocation().is_some_and(|invocation| {
            let is_library = name.ends_with(".rlib") || name.ends_with(".rmeta");
            is_library || invocation.is_proc_macro() || invocation.script_program() == Some(name)
        })
    }

    /// Whether only compilers read the outputs, but for the texts that cargo reads: those of a dependency that is a
    /// library or a proc macro, and of a build script.
    pub(crate) fn is_for_compilers(&self) -> bool {
        match &self.task {
            Task::Compile(invocation) => invocation.is_library() && !self.is_primary,
            Task::Probe => false,
            Task::Script(_) => true,
        }
    }

    /// Name of the dep-info file, if there is one.
    pub(crate) fn dep_info_name(&self) -> Option<String> {
        self.invocation().and_then(Invocation::dep_info_name)
    }

    /// Directories that are searched by name for crates.
    pub(crate) fn searched_directories(&self) -> impl Iterator<Item = &[u8]> {
        self.invocation().into_iter().flat_map(Invocation::searched_directories)
    }

    /// The last value of a flag that is no part of the action key.
    pub(crate) fn argument(&self, flag: &str) -> Option<&[u8]> {
        self.invocation().and_then(|invocation| invocation.last_value(flag))
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
        let Some(invocation) = self.invocation() else { return words.to_vec() };
        let tool = words[..invocation.tool_words].to_vec();
        let rest = without_incremental(&words[invocation.tool_words..]);
        [tool, arguments, rest].concat()
    }

    /// The roots to replace in the debug information that a build script leaves.
    pub(crate) fn remappings(&self) -> Vec<Remapping> {
        let of_a_root = |(root, path): (Root, &[u8])| Remapping {
            path: path.to_vec().into(),
            name: root.name().to_owned(),
        };
        if self.script().is_some() { self.roots.iter().map(of_a_root).collect() } else { Vec::new() }
    }

    /// Directories that are there wherever this unit can run: roots, outputs, dependencies.
    pub(crate) fn known_directories(&self) -> Vec<PathBuf> {
        let roots = self.roots.iter().map(|(_, path)| PathBuf::from(OsStr::from_bytes(path)));
        let searched = self.searched_directories().map(|path| self.absolute(path));
        let own = [self.working_directory.clone(), self.output_directory()];
        roots.chain(searched).chain(self.sysroots.iter().cloned()).chain(own).collect()
    }

    /// The directories of `PATH`.
    pub(crate) fn program_directories(&self) -> Vec<PathBuf> {
        let path = OsStr::from_bytes(self.variable(b"PATH").unwrap_or_default());
        std::env::split_paths(path).filter(|directory| directory.is_absolute()).collect()
    }

    /// Whether a path lies in the package, its workspace, the target directory or another root: what is left there
    /// is no temporary file, wherever that is.
    pub(crate) fn holds(&self, path: &Path) -> bool {
        let roots = self.roots.iter().map(|(_, root)| PathBuf::from(OsStr::from_bytes(root)));
        let script = self.script().into_iter().flat_map(|script| {
            let target = script.target_directory().map(Path::to_owned);
            [script.workspace.clone(), target].into_iter().flatten()
        });
        roots
            .chain(script)
            .chain([self.working_directory.clone()])
            .any(|directory| path.starts_with(directory))
    }

    /// Whether a path is found by its own name wherever the unit's roots are: it is the compiler, or in `PATH`.
    pub(crate) fn is_searched(&self, path: &Path) -> bool {
        let directories = self.program_directories();
        path == Path::new(OsStr::from_bytes(&self.compiler))
            || path.parent().is_some_and(|parent| directories.iter().any(|known| known == parent))
    }

    /// The directory for temporary files.
    pub(crate) fn temporary_directory(&self) -> PathBuf {
        PathBuf::from(OsStr::from_bytes(self.variable(b"TMPDIR").unwrap_or(b"/tmp")))
    }

    /// Where the outputs go; nowhere for a probe.
    pub(crate) fn output_directory(&self) -> PathBuf {
        match &self.task {
            Task::Compile(invocation) => self.working_directory.join(&invocation.output_directory),
            Task::Probe => PathBuf::new(),
            Task::Script(script) => script.output_directory.clone(),
        }
    }

    /// The directory of all of cargo's outputs, if it is known.
    pub(crate) fn target_directory(&self) -> Option<&Path> {
        match &self.task {
            Task::Compile(invocation) => invocation.target_directory(),
            Task::Probe => None,
            Task::Script(script) => script.target_directory(),
        }
    }

    /// What the tracer must know of this unit.
    pub(crate) fn places(&self) -> Places {
        let bytes = |path: PathBuf| path.into_os_string().into_vec();
        let own = self.script().filter(|script| script.starts_clean).map(|script| &script.output_directory);
        let searched = self.searched_directories().map(|path| self.absolute(path));
        let filled = self.script().into_iter().flat_map(Script::directories_of_cargo);
        Places {
            output_directory: bytes(self.output_directory()),
            searched: searched.chain(filled).map(|path| bytes(path).into()).collect(),
            own: own.into_iter().map(|path| bytes(path.clone()).into()).collect(),
            caches: self.tool_caches().into_iter().map(|path| bytes(path).into()).collect(),
        }
    }

    /// Directories in which tools keep what they have made, by content, for themselves alone.
    fn tool_caches(&self) -> Vec<PathBuf> {
        let path = |name: &[u8]| self.variable(name).map(|value| PathBuf::from(OsStr::from_bytes(value)));
        let cache = path(b"XDG_CACHE_HOME").or_else(|| Some(path(b"HOME")?.join(".cache")));
        let named = [path(b"ZIG_GLOBAL_CACHE_DIR"), path(b"ZIG_LOCAL_CACHE_DIR"), path(b"CCACHE_DIR")];
        let usual = ["zig", "ccache"].into_iter().filter_map(|tool| Some(cache.as_ref()?.join(tool)));
        named.into_iter().flatten().chain(usual).filter(|path| path.is_absolute()).collect()
    }
}

impl Task {
    fn invocation(&self) -> Option<&Invocation> {
        match self {
            Self::Compile(invocation) => Some(invocation),
            _ => None,
        }
    }

    /// Coverage tools look for sources at the paths that the compiler saw, and debuggers for `.dwo` files.
    fn has_exact_paths(&self) -> bool {
        self.invocation().is_some_and(|invocation| {
            invocation.value("-C instrument-coverage").is_some()
                || invocation.value("-C split-debuginfo").is_some_and(|split| split == "unpacked")
        })
    }
}

/// What an action key is derived from.
struct KeyIngredients<'a> {
    words: &'a [Vec<u8>],
    request: &'a UnitRequest,
    environment: &'a [(Vec<u8>, Vec<u8>)],
    config: &'a Config,
    roots: &'a Roots,
}

impl KeyIngredients<'_> {
    fn action(
        &self,
        task: &Task,
        toolchain: &Toolchain,
        memo: &Memo,
    ) -> Result<(ActionKey, Fields), Refusal> {
        let tool = toolchain.identity;
        // A compiler that is a script may read any variable that it names.
        let script = toolchain.script.as_deref().unwrap_or_default();
        let named = script::named_variables(script, self.environment, action::is_undeclared);
        let listed = [self.config.extra_variables.as_slice(), &named].concat();
        if let Task::Script(script) = task {
            let (program, named) = script.read_program(self.environment, memo)?;
            let fields = ScriptAction {
                program,
                tool,
                working_directory: &self.request.working_directory,
                umask: self.request.umask,
                environment: self.environment,
                extra_variables: &[listed.as_slice(), &named].concat(),
                roots: self.roots,
            }
            .fields()
            .map_err(|_| Refusal::Paths)?;
            return Ok((script_action_key(&fields), fields));
        }
        let words =
            || self.words.iter().map(|word| Argument { flag: String::new(), value: Some(word.clone()) });
        let (arguments, for_this_cpu) = match task.invocation() {
            Some(invocation) => (invocation.arguments.clone(), invocation.for_this_cpu()),
            None => (words().collect(), self.words.iter().any(|word| word.ends_with(b"-cpu=native"))),
        };
        let fields = RustcAction {
            tool,
            arguments: &arguments,
            working_directory: &self.request.working_directory,
            environment: self.environment,
            extra_variables: &listed,
            cpu: if for_this_cpu { Some(cpu_identity().ok_or(Refusal::Toolchain)?) } else { None },
            roots: self.roots,
        }
        .fields()
        .map_err(|_| Refusal::Paths)?;
        Ok((action::action_key(&fields), fields))
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

fn cargo_home(environment: &[(Vec<u8>, Vec<u8>)]) -> Option<Vec<u8>> {
    let named = variable(environment, "CARGO_HOME").map(<[u8]>::to_vec);
    named.or_else(|| Some([variable(environment, "HOME")?, b"/.cargo"].concat()))
}

fn find_roots(
    task: &Task,
    working_directory: &Path,
    environment: &[(Vec<u8>, Vec<u8>)],
    sysroot: &Path,
) -> Roots {
    let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
    let home = variable(environment, "HOME").map(<[u8]>::to_vec);
    let cargo_home = cargo_home(environment);
    let in_cargo_home =
        cargo_home.as_ref().is_some_and(|path| working_directory.starts_with(OsStr::from_bytes(path)));
    let own = (!in_cargo_home).then_some(working_directory);
    let (workspace, target) = match task {
        Task::Compile(invocation) => (own, invocation.target_directory()),
        Task::Probe => (own, None),
        Task::Script(script) => (script.workspace.as_deref(), script.target_directory()),
    };
    let workspace = workspace.map(bytes);
    let target = target.map(|path| bytes(&working_directory.join(path)));
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
pub(crate) fn cpu_identity() -> Option<Digest> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let relevant = ["vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU "];
    let mut lines: Vec<&str> =
        text.lines().filter(|line| relevant.iter().any(|prefix| line.starts_with(prefix))).collect();
    lines.sort_unstable();
    lines.dedup();
    (!lines.is_empty()).then(|| Digest::of(lines.join("\n").as_bytes()))
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
