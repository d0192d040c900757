//! A build script's run, as a unit.
//!
//! Its inputs are what it was observed to read, and the variables of its environment that it can know of (see
//! [`cachec_protocol::script`]); its outputs are what it prints and all of `OUT_DIR`.
//!
//! Only a run that begins with an empty `OUT_DIR` is stored: another one may have used what was there.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cachec_protocol::{Digest, script::is_undeclared};
use jiff::Timestamp;

use crate::inputs::NotStorable;
use crate::invocation::{Refusal, target_directory};
use crate::ipc::UnitRequest;
use crate::memo::{self, Memo};

/// No build script's program is larger.
const MAX_PROGRAM_BYTES: u64 = 1 << 30;

/// See the module.
#[derive(Debug)]
pub(crate) struct Script {
    pub(crate) package: String,
    pub(crate) program: PathBuf,
    /// `OUT_DIR`.
    pub(crate) output_directory: PathBuf,
    /// The directory with a `Cargo.lock` around the package, or around the target directory for one of a registry.
    pub(crate) workspace: Option<PathBuf>,
    /// Name of the compilation's target.
    target: String,
    /// Whether nothing was in the output directory before.
    pub(crate) starts_clean: bool,
}

impl Script {
    /// `is_foreign` says that the package is in `CARGO_HOME`.
    ///
    /// # Errors
    /// [`Refusal::OutputPath`] where cargo did not start this, or its output directory is not there.
    pub(crate) fn new(
        request: &UnitRequest,
        environment: &[(Vec<u8>, Vec<u8>)],
        working_directory: &Path,
        is_foreign: bool,
    ) -> Result<Self, Refusal> {
        let text = |name: &str| -> Option<String> {
            let (_, value) = environment.iter().find(|(known, _)| known == name.as_bytes())?;
            String::from_utf8(value.clone()).ok()
        };
        let output_directory = PathBuf::from(text("OUT_DIR").ok_or(Refusal::OutputPath)?);
        let mut entries = fs::read_dir(&output_directory).map_err(|_| Refusal::OutputPath)?;
        if !output_directory.is_absolute() || output_directory.parent().is_none() {
            return Err(Refusal::OutputPath);
        }
        let locked = |path: &Path| {
            path.ancestors().find(|directory| directory.join("Cargo.lock").is_file()).map(Path::to_owned)
        };
        // Packages of registries and git checkouts have lock files of their own.
        let workspace = if is_foreign {
            locked(&output_directory)
        } else {
            Some(locked(working_directory).unwrap_or_else(|| working_directory.to_owned()))
        };
        Ok(Self {
            package: text("CARGO_PKG_NAME").unwrap_or_default(),
            program: PathBuf::from(OsStr::from_bytes(&request.compiler)),
            workspace,
            target: text("TARGET").unwrap_or_default(),
            starts_clean: entries.next().is_none(),
            output_directory,
        })
    }

    /// See [`target_directory`].
    pub(crate) fn target_directory(&self) -> Option<&Path> {
        target_directory(&self.output_directory, OsStr::new(&self.target))
    }

    /// Directories that cargo fills while scripts run, and searches libraries in for them: `target/PROFILE` and its
    /// `deps`. What is there at some moment is chance.
    pub(crate) fn directories_of_cargo(&self) -> impl Iterator<Item = PathBuf> {
        let profile = self.output_directory.ancestors().nth(3).map(Path::to_owned);
        let dependencies = profile.as_ref().map(|profile| profile.join("deps"));
        profile.into_iter().chain(dependencies)
    }

    /// Checks that a run may be stored at all: it began with nothing, and cargo will not run it again anyway.
    ///
    /// # Errors
    /// Why it is not stored.
    pub(crate) fn check_run(
        &self,
        directives: &Directives,
        working_directory: &Path,
    ) -> Result<(), NotStorable> {
        if !self.starts_clean {
            return Err(NotStorable::StaleOutDir);
        }
        let is_missing =
            |path: &Vec<u8>| fs::symlink_metadata(working_directory.join(OsStr::from_bytes(path))).is_err();
        if directives.paths.iter().any(is_missing) {
            // Cargo runs such a script in every build, which is what its author wants.
            return Err(NotStorable::AlwaysRuns);
        }
        Ok(())
    }

    /// The program's digest, and the variables of the environment whose names its own text has.
    ///
    /// # Errors
    /// [`Refusal::Program`] where it cannot be read.
    pub(crate) fn read_program(
        &self,
        environment: &[(Vec<u8>, Vec<u8>)],
        memo: &Memo,
    ) -> Result<(Digest, Vec<String>), Refusal> {
        let read = || -> io::Result<(Digest, Vec<u8>)> {
            let (digest, identity) = memo.digest(&self.program)?;
            if identity.size_bytes > MAX_PROGRAM_BYTES {
                return Err(io::Error::from(io::ErrorKind::FileTooLarge));
            }
            Ok((digest, fs::read(&self.program)?))
        };
        let (digest, text) = read().map_err(|_| Refusal::Program)?;
        let named = named_variables(loaded_part(&text), environment, is_undeclared);
        Ok((digest, named))
    }
}

/// The variables of an environment that no rule declares, and whose names a text has; sorted.
pub(crate) fn named_variables(
    text: &[u8],
    environment: &[(Vec<u8>, Vec<u8>)],
    is_undeclared: impl Fn(&str) -> bool,
) -> Vec<String> {
    let mut named: Vec<String> = environment
        .iter()
        .filter_map(|(name, _)| std::str::from_utf8(name).ok())
        // The shell's name for the last word of a command.
        .filter(|name| is_undeclared(name) && *name != "_")
        .filter(|name| memchr::memmem::find(text, name.as_bytes()).is_some())
        .map(str::to_owned)
        .collect();
    named.sort_unstable();
    named
}

/// What of a program's file is there when it runs: all up to the last loaded segment's end; debug information lies
/// behind.
fn loaded_part(program: &[u8]) -> &[u8] {
    crate::elf::loaded_end(program).and_then(|end| program.get(..end)).unwrap_or(program)
}

/// What a script has said to cargo, as far as it matters here.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Directives {
    /// Names in `rerun-if-env-changed`.
    pub(crate) variables: Vec<Vec<u8>>,
    /// Paths in `rerun-if-changed`.
    pub(crate) paths: Vec<Vec<u8>>,
}

impl Directives {
    /// Reads the lines that begin with `cargo:` or `cargo::`, as cargo does.
    pub(crate) fn parse(stdout: &[u8]) -> Self {
        let mut directives = Self::default();
        for line in stdout.split(|byte| *byte == b'\n') {
            let Some(rest) = line.strip_prefix(b"cargo:") else { continue };
            let rest = rest.strip_prefix(b":").unwrap_or(rest).trim_ascii_end();
            if let Some(name) = rest.strip_prefix(b"rerun-if-env-changed=") {
                directives.variables.push(name.to_vec());
            } else if let Some(path) = rest.strip_prefix(b"rerun-if-changed=") {
                directives.paths.push(path.to_vec());
            }
        }
        directives
    }
}

/// How programs write dates.
const DATE_FORMATS: [&str; 10] = [
    "%Y-%m-%d",
    "%Y%m%d",
    "%Y/%m/%d",
    "%d.%m.%Y",
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d %b %Y",
    "%b %d %Y",
    "%b %d, %Y",
    // As `date` and C's `ctime` write it: Sat Nov 21 10:30:00 2026.
    "%a %b %e ",
];

/// Somewhere on earth it is that much earlier or later.
const MOST_OFFSET_SECONDS: i64 = 14 * 3600;

/// Checks that the time of a run does not show in a text: today's date, or the time since the epoch.
///
/// # Errors
/// Where it does: the script means to say when it ran.
pub(crate) fn check_clock(text: &[u8], started_ns: i64) -> Result<(), NotStorable> {
    let now_ns = memo::now_ns();
    // Seconds, milliseconds, microseconds and nanoseconds have so many digits.
    let is_now = |number: &[u8]| {
        let unit_ns = match number.len() {
            10 => 1_000_000_000,
            13 => 1_000_000,
            16 => 1_000,
            19 => 1,
            _ => return false,
        };
        let number = std::str::from_utf8(number).ok().and_then(|digits| digits.parse::<i64>().ok());
        let range = (started_ns - 1_000_000_000) / unit_ns..=(now_ns + 1_000_000_000) / unit_ns;
        number.is_some_and(|number| range.contains(&number))
    };
    let (started, now) = (started_ns / 1_000_000_000, now_ns / 1_000_000_000);
    let moments = [started - MOST_OFFSET_SECONDS, started, now, now + MOST_OFFSET_SECONDS];
    let shows = |moment: &i64| {
        let Ok(moment) = Timestamp::from_second(*moment) else { return false };
        DATE_FORMATS.iter().any(|format| {
            // A day of one digit may be written with a space before it, or with nothing.
            let date = moment.strftime(format).to_string();
            let spaced = date.replace(" 0", "  ");
            let short = date.replace(" 0", " ");
            [date, spaced, short].iter().any(|date| memchr::memmem::find(text, date.as_bytes()).is_some())
        })
    };
    if text.split(|byte| !byte.is_ascii_digit()).any(is_now) || moments.iter().any(shows) {
        return Err(NotStorable::Clock);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_read_as_cargo_reads_them() {
        let said =
            b"cargo:rerun-if-changed=a b\ncargo::rerun-if-env-changed=CC\r\n cargo:rerun-if-changed=no\n\
            cargo:rustc-env=A=rerun-if-changed=x\n\xff\n";
        let directives = Directives { variables: vec![b"CC".to_vec()], paths: vec![b"a b".to_vec()] };
        assert_eq!(Directives::parse(said), directives);
    }

    #[test]
    fn the_time_of_the_run_is_found() {
        let started_ns = memo::now_ns();
        let second = started_ns / 1_000_000_000;
        let date = Timestamp::from_second(second).unwrap().strftime("%Y-%m-%d").to_string();
        let written = |format: &str| Timestamp::from_second(second).unwrap().strftime(format).to_string();
        let texts = [
            format!("cargo:rustc-env=TIME={second}"),
            format!("cargo:rustc-env=TIME={}", second * 1000 + 7),
            format!("const BUILT: &str = \"{date} 10:00\";"),
            written("%a, %d %b %Y %H:%M:%S GMT"),
            written("%a %b %e %H:%M:%S %Y"),
            written("%Y%m%d%H%M%S"),
            written("%d.%m.%Y"),
        ];
        for text in texts {
            assert!(check_clock(text.as_bytes(), started_ns).is_err(), "{text}");
        }
        for text in ["1234567890", "2020-02-02", "cargo:rustc-cfg=a", ""] {
            assert!(check_clock(text.as_bytes(), started_ns).is_ok(), "{text}");
        }
    }

    #[test]
    fn only_what_is_loaded_of_a_program_is_searched() {
        let program = fs::read("/proc/self/exe").unwrap();
        assert!(
            memchr::memmem::find(loaded_part(&program), b"a variable that only this test names").is_some()
        );
        assert!(loaded_part(&program).len() < program.len());
        assert_eq!(loaded_part(b"#!/bin/sh"), b"#!/bin/sh");
    }
}
