//! What a rustc (or clippy-driver) command line asks for, and whether such a unit is cached.
//!
//! Deciding only; nothing is read. A unit that is not cached has a [`Refusal`], whose code the statistics
//! count by crate.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use cachec_protocol::{Argument, ArgumentError, arguments};

/// Why a unit is not cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("arguments")]
    Arguments,
    #[error("response-file")]
    ResponseFile,
    #[error("standard-input")]
    StandardInput,
    #[error("incremental")]
    Incremental,
    #[error("output-path")]
    OutputPath,
    #[error("no-dep-info")]
    NoDepInfo,
    #[error("logging")]
    Logging,
    #[error("toolchain")]
    Toolchain,
    #[error("paths")]
    Paths,
    #[error("program")]
    Program,
}

/// A unit's command line, understood.
#[derive(Debug)]
pub(crate) struct Invocation {
    /// All arguments, in order.
    pub(crate) arguments: Vec<Argument>,
    pub(crate) crate_name: String,
    pub(crate) output_directory: PathBuf,
    /// Number of leading words that belong to the tool: `rustc` in `clippy-driver rustc --crate-name …`.
    pub(crate) tool_words: usize,
    /// Common part of the output names: crate name and `-C extra-filename`.
    stem: String,
    emits: Vec<String>,
    crate_types: Vec<String>,
}

impl Invocation {
    /// Understands the arguments of a unit.
    ///
    /// # Errors
    /// The first [`Refusal`] that applies.
    pub(crate) fn parse(words: &[Vec<u8>], drop_incremental: bool) -> Result<Self, Refusal> {
        if words.iter().any(|word| word.starts_with(b"@")) {
            return Err(Refusal::ResponseFile);
        }
        // A workspace wrapper gets the compiler's path in front of its arguments.
        let tool_words =
            usize::from(words.first().is_some_and(|word| !word.starts_with(b"-") && !word.ends_with(b".rs")));
        let arguments = arguments::parse(words).map_err(|error| match error {
            ArgumentError::UnknownFlag(_) | ArgumentError::MissingValue(_) => Refusal::Arguments,
        })?;
        check_flags(&arguments, drop_incremental)?;
        let crate_name = single(&arguments, "--crate-name").ok_or(Refusal::Arguments)?;
        let output_directory = single(&arguments, "--out-dir").ok_or(Refusal::OutputPath)?;
        let extra = single(&arguments, "-C extra-filename").unwrap_or_default();
        let emits = list(&arguments, "--emit");
        if emits.iter().any(|kind| kind.contains('=')) || emits.is_empty() {
            return Err(Refusal::OutputPath);
        }
        // Only dep-info names the variables that were read.
        if !emits.iter().any(|kind| kind == "dep-info") {
            return Err(Refusal::NoDepInfo);
        }
        Ok(Self {
            stem: format!("{crate_name}{extra}"),
            crate_name,
            output_directory: PathBuf::from(output_directory),
            tool_words,
            emits,
            crate_types: list(&arguments, "--crate-type"),
            arguments,
        })
    }

    /// Whether only an observed run says what such a unit reads and leaves. Without a tracer, library units
    /// are left, whose dep-info says it.
    pub(crate) fn needs_trace(&self) -> bool {
        let plain_emits = ["dep-info", "metadata", "link"];
        let libraries = ["lib", "rlib", "staticlib"];
        let unusual = self.arguments.iter().any(|argument| {
            let value = argument.value.as_deref().unwrap_or_default();
            match argument.flag.as_str() {
                "--test" | "--sysroot" | "--library" | "-C save-temps" | "-C llvm-args" => true,
                "-C split-debuginfo" => value != b"off",
                "--extern" => !value.contains(&b'=') && !is_sysroot_crate(value),
                "--search-path" => split_kind(value).0 != "dependency",
                flag => flag.starts_with("-Z"),
            }
        });
        unusual
            || self.tool_words > 0
            || self.crate_types.is_empty()
            || self.crate_types.iter().any(|kind| !libraries.contains(&kind.as_str()))
            || self.emits.iter().any(|kind| !plain_emits.contains(&kind.as_str()))
    }

    pub(crate) fn is_proc_macro(&self) -> bool {
        self.crate_types == ["proc-macro"]
    }

    /// Whether it makes nothing but what compilers read.
    pub(crate) fn is_library(&self) -> bool {
        let is_one = |kind: &String| matches!(kind.as_str(), "lib" | "rlib" | "proc-macro");
        !self.crate_types.is_empty() && self.crate_types.iter().all(is_one)
    }

    fn emits(&self, kind: &str) -> bool {
        self.emits.iter().any(|emitted| emitted == kind)
    }

    /// Whether cargo asked for an incremental compile, which this is not going to be.
    pub(crate) fn drops_incremental(&self) -> bool {
        self.values("-C incremental").next().is_some()
    }

    /// Whether the linker writes the way from the output to its libraries into it.
    pub(crate) fn writes_rpath(&self) -> bool {
        let last = self.arguments.iter().rev().find(|argument| argument.flag == "-C rpath");
        last.is_some_and(|argument| {
            !matches!(argument.value.as_deref(), Some(b"no" | b"n" | b"off" | b"false"))
        })
    }

    /// The last value of a flag, as text.
    pub(crate) fn value(&self, flag: &str) -> Option<String> {
        single(&self.arguments, flag)
    }

    /// All values of a flag.
    pub(crate) fn values<'a>(&'a self, flag: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.arguments.iter().filter(move |argument| argument.flag == flag).filter_map(|a| a.value.as_deref())
    }

    /// The last value of a flag.
    pub(crate) fn last_value(&self, flag: &str) -> Option<&[u8]> {
        let mut values = self.arguments.iter().rev().filter(|argument| argument.flag == flag);
        values.find_map(|argument| argument.value.as_deref())
    }

    /// Names of files that a successful run of a library unit must leave.
    pub(crate) fn required_outputs(&self) -> Vec<String> {
        let is = |kinds: &[&str]| self.crate_types.iter().any(|kind| kinds.contains(&kind.as_str()));
        let mut names = Vec::from_iter(self.dep_info_name());
        if self.emits("metadata") {
            names.push(format!("lib{}.rmeta", self.stem));
        }
        if self.emits("link") && is(&["lib", "rlib"]) {
            names.push(format!("lib{}.rlib", self.stem));
        }
        if self.emits("link") && is(&["staticlib"]) {
            names.push(format!("lib{}.a", self.stem));
        }
        names
    }

    /// Whether a file of that name in the output directory can only be this unit's: it begins with crate
    /// name and `-C extra-filename`.
    pub(crate) fn owns_output(&self, name: &str) -> bool {
        let own = |name: &str| {
            name.strip_prefix(&self.stem).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        !name.contains('/') && (own(name) || name.strip_prefix("lib").is_some_and(own))
    }

    /// Name of the dep-info file, if one is asked for.
    pub(crate) fn dep_info_name(&self) -> Option<String> {
        self.emits("dep-info").then(|| format!("{}.d", self.stem))
    }

    /// The files named by `--extern`.
    pub(crate) fn extern_files(&self) -> impl Iterator<Item = &[u8]> {
        self.values("--extern")
            .filter_map(|value| value.iter().position(|byte| *byte == b'=').map(|at| &value[at + 1..]))
    }

    /// Directories that the compiler searches by name for crates.
    pub(crate) fn searched_directories(&self) -> impl Iterator<Item = &[u8]> {
        self.values("--search-path")
            .map(split_kind)
            .filter(|(kind, _)| *kind == "dependency")
            .map(|(_, path)| path)
    }

    /// Whether code is generated for the very CPU that the compiler runs on.
    pub(crate) fn for_this_cpu(&self) -> bool {
        ["-C target-cpu", "-C tune-cpu"].iter().any(|flag| self.value(flag).as_deref() == Some("native"))
    }

    /// See [`target_directory`].
    pub(crate) fn target_directory(&self) -> Option<&Path> {
        let target = self.value("--target").unwrap_or_default();
        target_directory(&self.output_directory, Path::new(&target).file_stem().unwrap_or_default())
    }

    /// Name of the program that this unit makes, where that is a package's build script.
    pub(crate) fn script_program(&self) -> Option<&str> {
        let is_program = self.crate_types == ["bin"] && self.emits("link");
        let place = self.output_directory.parent().and_then(Path::file_name);
        (is_program && self.crate_name.starts_with("build_script_") && place == Some(OsStr::new("build")))
            .then_some(self.stem.as_str())
    }
}

/// The directory of all of cargo's outputs, from the place of a unit's: the parent of the profile's directory,
/// or of the directory of the target around it.
pub(crate) fn target_directory<'p>(output_directory: &'p Path, target: &OsStr) -> Option<&'p Path> {
    let inside_profile = |ancestor: &&Path| {
        matches!(ancestor.file_name().and_then(OsStr::to_str), Some("deps" | "examples" | "build"))
    };
    let profile = output_directory.ancestors().take(4).find(inside_profile)?.parent()?;
    let parent = profile.parent()?;
    if !target.is_empty() && parent.file_name() == Some(target) { parent.parent() } else { Some(parent) }
}

/// Whether this is no unit, but one of cargo's questions to the compiler.
pub(crate) fn is_probe(words: &[Vec<u8>]) -> bool {
    match words.iter().position(|word| word == b"--crate-name") {
        Some(at) => words.get(at + 1).is_none_or(|name| name == b"___"),
        None => true,
    }
}

/// Whether the answer to such a question can be stored: it is printed, and what is asked is in the arguments
/// (or, for `-`, in a standard input that the caller knows to be empty).
pub(crate) fn is_storable_probe(words: &[Vec<u8>], has_empty_input: bool) -> bool {
    let asks = |word: &Vec<u8>| {
        matches!(word.as_slice(), b"-vV" | b"-Vv" | b"-V" | b"--version") || word.starts_with(b"--print")
    };
    let outside = |word: &Vec<u8>| word.starts_with(b"@") || (word == b"-" && !has_empty_input);
    words.iter().any(asks) && !words.iter().any(outside)
}

fn single(arguments: &[Argument], flag: &str) -> Option<String> {
    let value = arguments.iter().rev().find(|argument| argument.flag == flag)?.value.clone()?;
    String::from_utf8(value).ok()
}

fn list(arguments: &[Argument], flag: &str) -> Vec<String> {
    let values = arguments.iter().filter(|argument| argument.flag == flag).filter_map(|a| a.value.as_deref());
    values
        .flat_map(|value| value.split(|byte| *byte == b','))
        .map(|kind| String::from_utf8_lossy(kind).into_owned())
        .collect()
}

fn check_flags(arguments: &[Argument], drop_incremental: bool) -> Result<(), Refusal> {
    for argument in arguments {
        match argument.flag.as_str() {
            "-C incremental" if !drop_incremental => return Err(Refusal::Incremental),
            "--output" | "--print" | "--explain" => return Err(Refusal::OutputPath),
            "" if argument.value.as_deref() == Some(b"-") => return Err(Refusal::StandardInput),
            _ => {}
        }
    }
    Ok(())
}

/// Crates that come with every toolchain.
fn is_sysroot_crate(name: &[u8]) -> bool {
    matches!(name, b"proc_macro" | b"std" | b"core" | b"alloc" | b"test")
}

/// Splits `kind=path` of a `-L` value; without a kind it is `all`.
fn split_kind(value: &[u8]) -> (&str, &[u8]) {
    const KINDS: [&str; 5] = ["dependency", "crate", "native", "framework", "all"];
    KINDS
        .into_iter()
        .find_map(|kind| Some((kind, value.strip_prefix(kind.as_bytes())?.strip_prefix(b"=")?)))
        .unwrap_or(("all", value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "--crate-name demo --edition=2024 src/lib.rs --crate-type lib \
        --emit=dep-info,metadata,link -C extra-filename=-1f --out-dir /w/target/release/deps \
        --extern memchr=/w/target/release/deps/libmemchr-1.rmeta -L dependency=/w/target/release/deps";

    fn parse(line: &str) -> Result<Invocation, Refusal> {
        let words: Vec<Vec<u8>> = line.split_whitespace().map(Into::into).collect();
        Invocation::parse(&words, false)
    }

    #[test]
    fn a_library_unit_is_understood() {
        let unit = parse(LINE).unwrap();
        assert_eq!(unit.required_outputs(), ["demo-1f.d", "libdemo-1f.rmeta", "libdemo-1f.rlib"]);
        assert_eq!(unit.extern_files().collect::<Vec<_>>(), [b"/w/target/release/deps/libmemchr-1.rmeta"]);
        assert_eq!(unit.searched_directories().collect::<Vec<_>>(), [b"/w/target/release/deps"]);
        assert_eq!(unit.target_directory(), Some(Path::new("/w/target")));
    }

    #[test]
    fn the_target_directory_is_found_behind_a_target_triple() {
        let line = LINE.replace("/w/target/release/deps", "/w/target/x86_64-unknown-linux-musl/release/deps");
        let with_target = format!("{line} --target x86_64-unknown-linux-musl");
        assert_eq!(parse(&with_target).unwrap().target_directory(), Some(Path::new("/w/target")));
    }

    #[test]
    fn what_cannot_be_cached_says_why() {
        for (change, refusal) in [
            ("-C incremental=/x", Refusal::Incremental),
            ("--emit asm=/x", Refusal::OutputPath),
            ("-o out", Refusal::OutputPath),
            ("@args", Refusal::ResponseFile),
            ("-", Refusal::StandardInput),
            ("--unheard-of", Refusal::Arguments),
        ] {
            assert_eq!(parse(&format!("{LINE} {change}")).unwrap_err(), refusal, "{change}");
        }
    }

    #[test]
    fn without_a_tracer_only_plain_libraries_are_left() {
        assert!(!parse(LINE).unwrap().needs_trace());
        assert!(!parse(&format!("{LINE} --extern proc_macro -C split-debuginfo=off")).unwrap().needs_trace());
        for change in [
            "--test",
            "--crate-type bin",
            "--emit asm",
            "-Zno-codegen",
            "--extern other",
            "--sysroot /x",
            "-L /x",
        ] {
            assert!(parse(&format!("{LINE} {change}")).unwrap().needs_trace(), "{change}");
        }
        let clippy = parse(&format!("/usr/bin/rustc {LINE}")).unwrap();
        assert!(clippy.needs_trace() && clippy.tool_words == 1);
    }

    #[test]
    fn only_files_with_the_units_own_name_are_its_outputs() {
        let unit = parse(LINE).unwrap();
        for name in ["demo-1f", "demo-1f.d", "libdemo-1f.so", "demo-1f.demo.7rcb-cgu.0.rcgu.o"] {
            assert!(unit.owns_output(name), "{name}");
        }
        for name in ["demo-1f2.d", "libother-1f.rlib", "demo", "x/demo-1f", "../demo-1f"] {
            assert!(!unit.owns_output(name), "{name}");
        }
    }

    #[test]
    fn cargos_questions_are_no_units() {
        let words = |line: &str| line.split(' ').map(|word| word.as_bytes().to_vec()).collect::<Vec<_>>();
        assert!(is_probe(&words("-vV")));
        assert!(is_probe(&words("- --crate-name ___ --print=file-names")));
        assert!(!is_probe(&words("--crate-name build_script_build build.rs")));
    }
}
