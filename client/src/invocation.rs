//! What a rustc command line asks for, and whether such a unit is cached.
//!
//! Deciding only; nothing is read. A unit that is not cached has a [`Refusal`], whose code the statistics
//! count by crate.

use std::path::{Path, PathBuf};

use cachec_protocol::{Argument, ArgumentError, arguments};

/// Why a unit is not cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("arguments")]
    Arguments,
    #[error("response-file")]
    ResponseFile,
    #[error("workspace-wrapper")]
    WorkspaceWrapper,
    #[error("crate-type")]
    CrateType,
    #[error("test-harness")]
    TestHarness,
    #[error("incremental")]
    Incremental,
    #[error("output-path")]
    OutputPath,
    #[error("emit-kind")]
    EmitKind,
    #[error("unstable-flag")]
    UnstableFlag,
    #[error("extern-without-path")]
    ExternWithoutPath,
    #[error("search-path")]
    SearchPath,
    #[error("logging")]
    Logging,
    #[error("toolchain")]
    Toolchain,
    #[error("paths")]
    Paths,
}

/// A kind of output file of a library unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Emit {
    DepInfo,
    Metadata,
    Link,
}

/// A library unit's command line, understood.
#[derive(Debug)]
pub(crate) struct Invocation {
    /// All arguments, in order.
    pub(crate) arguments: Vec<Argument>,
    pub(crate) crate_name: String,
    pub(crate) output_directory: PathBuf,
    /// Common part of the output names: crate name and `-C extra-filename`.
    stem: String,
    emits: Vec<Emit>,
    archive: bool,
    library: bool,
}

impl Invocation {
    /// Understands the arguments of a library unit.
    ///
    /// # Errors
    /// The first [`Refusal`] that applies.
    pub(crate) fn parse(words: &[Vec<u8>], drop_incremental: bool) -> Result<Self, Refusal> {
        if words.iter().any(|word| word.starts_with(b"@")) {
            return Err(Refusal::ResponseFile);
        }
        if words.first().is_some_and(|word| !word.starts_with(b"-") && !word.ends_with(b".rs")) {
            return Err(Refusal::WorkspaceWrapper);
        }
        let arguments = arguments::parse(words).map_err(|error| match error {
            ArgumentError::UnknownFlag(_) | ArgumentError::MissingValue(_) => Refusal::Arguments,
        })?;
        check_flags(&arguments, drop_incremental)?;
        let crate_name = single(&arguments, "--crate-name").ok_or(Refusal::Arguments)?;
        let output_directory = single(&arguments, "--out-dir").ok_or(Refusal::OutputPath)?;
        let extra = single(&arguments, "-C extra-filename").unwrap_or_default();
        let (library, archive) = crate_types(&arguments)?;
        Ok(Self {
            stem: format!("{crate_name}{extra}"),
            crate_name,
            output_directory: PathBuf::from(output_directory),
            emits: emits(&arguments)?,
            archive,
            library,
            arguments,
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

    /// Names of the files that a successful run leaves, in pack order: an `.rlib` contains its `.rmeta`.
    pub(crate) fn output_names(&self) -> Vec<String> {
        let mut names = Vec::new();
        if self.emits.contains(&Emit::DepInfo) {
            names.push(format!("{}.d", self.stem));
        }
        if self.emits.contains(&Emit::Metadata) {
            names.push(format!("lib{}.rmeta", self.stem));
        }
        if self.emits.contains(&Emit::Link) && self.library {
            names.push(format!("lib{}.rlib", self.stem));
        }
        if self.emits.contains(&Emit::Link) && self.archive {
            names.push(format!("lib{}.a", self.stem));
        }
        names
    }

    /// Name of the dep-info file, if one is asked for.
    pub(crate) fn dep_info_name(&self) -> Option<String> {
        self.emits.contains(&Emit::DepInfo).then(|| format!("{}.d", self.stem))
    }

    /// The files named by `--extern`.
    pub(crate) fn extern_files(&self) -> impl Iterator<Item = &[u8]> {
        self.values("--extern")
            .filter_map(|value| value.iter().position(|byte| *byte == b'=').map(|at| &value[at + 1..]))
    }

    /// Directories in which the compiler may look for native libraries.
    pub(crate) fn native_directories(&self) -> impl Iterator<Item = &[u8]> {
        self.values("--search-path").filter_map(|value| match split_kind(value) {
            ("dependency", _) => None,
            (_, path) => Some(path),
        })
    }

    /// Whether code is generated for the very CPU that the compiler runs on.
    pub(crate) fn for_this_cpu(&self) -> bool {
        ["-C target-cpu", "-C tune-cpu"].iter().any(|flag| self.value(flag).as_deref() == Some("native"))
    }

    /// The directory of all of cargo's outputs, from the place of this unit's: the parent of the profile's
    /// directory, or of the directory of the `--target` around it.
    pub(crate) fn target_directory(&self) -> Option<&Path> {
        let inside_profile = |ancestor: &&Path| {
            matches!(ancestor.file_name().and_then(|name| name.to_str()), Some("deps" | "examples" | "build"))
        };
        let profile = self.output_directory.ancestors().take(4).find(inside_profile)?.parent()?;
        let parent = profile.parent()?;
        let target = self.value("--target").unwrap_or_default();
        let triple = Path::new(&target).file_stem().unwrap_or_default();
        if !triple.is_empty() && parent.file_name() == Some(triple) { parent.parent() } else { Some(parent) }
    }
}

/// Whether the wrapper need not ask the agent: not a unit, but one of cargo's questions to the compiler.
pub(crate) fn is_probe(words: &[Vec<u8>]) -> bool {
    match words.iter().position(|word| word == b"--crate-name") {
        Some(at) => words.get(at + 1).is_none_or(|name| name == b"___"),
        None => true,
    }
}

fn single(arguments: &[Argument], flag: &str) -> Option<String> {
    let value = arguments.iter().rev().find(|argument| argument.flag == flag)?.value.clone()?;
    String::from_utf8(value).ok()
}

fn check_flags(arguments: &[Argument], drop_incremental: bool) -> Result<(), Refusal> {
    for argument in arguments {
        let value = argument.value.as_deref().unwrap_or_default();
        match argument.flag.as_str() {
            "--test" => return Err(Refusal::TestHarness),
            "-C incremental" if !drop_incremental => return Err(Refusal::Incremental),
            "--output" | "--print" | "--explain" => return Err(Refusal::OutputPath),
            "-C save-temps" | "-C split-debuginfo" if !matches!(value, b"off" | b"no" | b"n") => {
                return Err(Refusal::EmitKind);
            }
            "--sysroot" => return Err(Refusal::Toolchain),
            "--extern" if !value.contains(&b'=') && !is_sysroot_crate(value) => {
                return Err(Refusal::ExternWithoutPath);
            }
            "--search-path" if matches!(split_kind(value).0, "crate") => return Err(Refusal::SearchPath),
            flag if flag.starts_with("-Z") => return Err(Refusal::UnstableFlag),
            "" if value == b"-" => return Err(Refusal::Arguments),
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

/// Whether an `.rlib` and whether an `.a` is made.
fn crate_types(arguments: &[Argument]) -> Result<(bool, bool), Refusal> {
    let (mut library, mut archive) = (false, false);
    let values = arguments.iter().filter(|argument| argument.flag == "--crate-type");
    for kind in
        values.flat_map(|argument| argument.value.as_deref().unwrap_or_default().split(|b| *b == b','))
    {
        match kind {
            b"lib" | b"rlib" => library = true,
            b"staticlib" => archive = true,
            _ => return Err(Refusal::CrateType),
        }
    }
    if library || archive { Ok((library, archive)) } else { Err(Refusal::CrateType) }
}

fn emits(arguments: &[Argument]) -> Result<Vec<Emit>, Refusal> {
    let mut emits = Vec::new();
    let values = arguments.iter().filter(|argument| argument.flag == "--emit");
    for kind in
        values.flat_map(|argument| argument.value.as_deref().unwrap_or_default().split(|b| *b == b','))
    {
        emits.push(match kind {
            b"dep-info" => Emit::DepInfo,
            b"metadata" => Emit::Metadata,
            b"link" => Emit::Link,
            _ => return Err(Refusal::EmitKind),
        });
    }
    // Without dep-info nobody says which files were read.
    if emits.contains(&Emit::DepInfo) && emits.len() > 1 { Ok(emits) } else { Err(Refusal::EmitKind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "--crate-name demo --edition=2024 src/lib.rs --crate-type lib \
        --emit=dep-info,metadata,link -C extra-filename=-1f --out-dir /w/target/release/deps \
        --extern memchr=/w/target/release/deps/libmemchr-1.rmeta -L dependency=/w/target/release/deps \
        -L native=/w/target/release/build/z/out";

    fn parse(line: &str) -> Result<Invocation, Refusal> {
        let words: Vec<Vec<u8>> = line.split_whitespace().map(Into::into).collect();
        Invocation::parse(&words, false)
    }

    #[test]
    fn a_library_unit_is_understood() {
        let unit = parse(LINE).unwrap();
        assert_eq!(unit.output_names(), ["demo-1f.d", "libdemo-1f.rmeta", "libdemo-1f.rlib"]);
        assert_eq!(unit.extern_files().collect::<Vec<_>>(), [b"/w/target/release/deps/libmemchr-1.rmeta"]);
        assert_eq!(unit.native_directories().collect::<Vec<_>>(), [b"/w/target/release/build/z/out"]);
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
            ("--test", Refusal::TestHarness),
            ("--crate-type bin", Refusal::CrateType),
            ("-C incremental=/x", Refusal::Incremental),
            ("--emit asm", Refusal::EmitKind),
            ("-o out", Refusal::OutputPath),
            ("@args", Refusal::ResponseFile),
            ("-Zno-codegen", Refusal::UnstableFlag),
            ("--extern other", Refusal::ExternWithoutPath),
            ("--sysroot /x", Refusal::Toolchain),
            ("--unheard-of", Refusal::Arguments),
        ] {
            assert_eq!(parse(&format!("{LINE} {change}")).unwrap_err(), refusal, "{change}");
        }
        assert_eq!(parse(&format!("/usr/bin/rustc {LINE}")).unwrap_err(), Refusal::WorkspaceWrapper);
        assert!(parse(&format!("{LINE} --extern proc_macro")).is_ok());
    }

    #[test]
    fn cargos_questions_are_no_units() {
        let words = |line: &str| line.split(' ').map(|word| word.as_bytes().to_vec()).collect::<Vec<_>>();
        assert!(is_probe(&words("-vV")));
        assert!(is_probe(&words("- --crate-name ___ --print=file-names")));
        assert!(!is_probe(&words("--crate-name build_script_build build.rs")));
    }
}
