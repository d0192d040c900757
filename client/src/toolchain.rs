//! Which compiler a unit runs: its identity and its sysroot, mostly without running it.
//!
//! The identity of a toolchain installed by rustup is the channel manifest it was installed from (which
//! holds the digests of all components), the list of installed components, the compiler executable's
//! content, and names and sizes of the driver and of the standard libraries. Of any other toolchain all
//! these files count with their contents.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use cachec_protocol::{Digest, Fields};

use crate::memo::{Identity, Memo};

const IDENTITY_CONTEXT: &str = "cachec 2026-11 toolchain identity v1";
/// Left by rustup beside the components it installs.
const CHANNEL_MANIFEST: &str = "lib/rustlib/multirust-channel-manifest.toml";
/// No script is longer.
const MAX_SCRIPT_BYTES: u64 = 1 << 20;
/// How deep below `lib/rustlib` the standard libraries and their backends are.
const MAX_DEPTH: usize = 5;

/// An identified compiler.
#[derive(Debug)]
pub(crate) struct Toolchain {
    pub(crate) identity: Digest,
    pub(crate) sysroot: PathBuf,
    /// The compiler's text, where it is a script, which may read anything.
    pub(crate) script: Option<Vec<u8>>,
}

/// Everything that decides which compiler a name means.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Query {
    /// First word of the command line.
    pub(crate) compiler: Vec<u8>,
    pub(crate) working_directory: PathBuf,
    /// `PATH`, `HOME`, `RUSTUP_HOME` and `RUSTUP_TOOLCHAIN` of the unit, as far as they are set.
    pub(crate) variables: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The variables of [`Query::variables`].
pub(crate) const QUERY_VARIABLES: [&[u8]; 4] = [b"PATH", b"HOME", b"RUSTUP_HOME", b"RUSTUP_TOOLCHAIN"];

impl Query {
    fn variable(&self, name: &str) -> Option<&OsStr> {
        let entry = self.variables.iter().find(|(known, _)| known == name.as_bytes())?;
        Some(OsStr::from_bytes(&entry.1))
    }

    /// The executable's real path.
    fn executable(&self) -> io::Result<PathBuf> {
        let name = Path::new(OsStr::from_bytes(&self.compiler));
        if name.components().count() > 1 {
            return fs::canonicalize(self.working_directory.join(name));
        }
        std::env::split_paths(self.variable("PATH").unwrap_or_default())
            .map(|directory| self.working_directory.join(directory).join(name))
            .find(|candidate| candidate.is_file())
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the compiler is not in PATH"))
            .and_then(fs::canonicalize)
    }

    /// The sysroot: the directory around `bin`, or what rustup's variables say, or what the compiler says.
    fn sysroot(&self, executable: &Path) -> io::Result<PathBuf> {
        let around = executable.parent().and_then(Path::parent);
        if let Some(directory) = around.filter(|directory| directory.join("lib/rustlib").is_dir()) {
            return Ok(directory.to_owned());
        }
        if executable.file_name() == Some(OsStr::new("rustup"))
            && let Some(directory) = self.rustup_toolchain().filter(|path| path.join("lib/rustlib").is_dir())
        {
            return Ok(directory);
        }
        let mut command = Command::new(OsStr::from_bytes(&self.compiler));
        command
            .args(["--print", "sysroot"])
            .current_dir(&self.working_directory)
            .env_clear()
            .envs(
                self.variables.iter().map(|(name, value)| {
                    (OsString::from_vec(name.clone()), OsString::from_vec(value.clone()))
                }),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let output = crate::process::spawn(&mut command)?.wait_with_output()?;
        let path = PathBuf::from(OsStr::from_bytes(output.stdout.trim_ascii_end()));
        if output.status.success() && path.join("lib/rustlib").is_dir() {
            Ok(path)
        } else {
            Err(io::Error::other("the compiler does not name its sysroot"))
        }
    }

    fn rustup_toolchain(&self) -> Option<PathBuf> {
        let home = match self.variable("RUSTUP_HOME") {
            Some(home) => PathBuf::from(home),
            None => Path::new(self.variable("HOME")?).join(".rustup"),
        };
        Some(home.join("toolchains").join(self.variable("RUSTUP_TOOLCHAIN")?))
    }
}

/// For each query the toolchain, and the identities of the files that would change with it.
type Known = HashMap<Query, (Vec<Identity>, Arc<Toolchain>)>;

/// The toolchains that were seen, with what would change if one were replaced.
#[derive(Debug, Default)]
pub(crate) struct Toolchains {
    known: Mutex<Known>,
}

impl Toolchains {
    /// Identifies the compiler.
    ///
    /// # Errors
    /// Those of finding and reading it; the unit is not cached.
    pub(crate) fn identify(&self, query: &Query, memo: &Memo) -> io::Result<Arc<Toolchain>> {
        let executable = query.executable()?;
        if let Some((witnesses, toolchain)) = self.lock().get(query)
            && *witnesses == self::witnesses(&executable, &toolchain.sysroot)
        {
            return Ok(Arc::clone(toolchain));
        }
        let sysroot = query.sysroot(&executable)?;
        let witnesses = self::witnesses(&executable, &sysroot);
        let identity = identity_of(&executable, &sysroot, memo)?;
        let toolchain = Arc::new(Toolchain { identity, sysroot, script: script_text(&executable)? });
        self.lock().insert(query.clone(), (witnesses, Arc::clone(&toolchain)));
        Ok(toolchain)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Files and directories whose identity changes when a toolchain is replaced or a component installed; of
/// one that is not rustup's, all that its identity is made of.
fn witnesses(executable: &Path, sysroot: &Path) -> Vec<Identity> {
    let parts = ["lib", "lib/rustlib", CHANNEL_MANIFEST].map(|part| sysroot.join(part));
    let libraries = if parts[2].is_file() { Vec::new() } else { library_files(sysroot).unwrap_or_default() };
    let paths = [executable.to_owned()].into_iter().chain(parts).chain(libraries);
    paths.filter_map(|path| fs::metadata(path).ok()).map(|metadata| Identity::of(&metadata)).collect()
}

fn identity_of(executable: &Path, sysroot: &Path, memo: &Memo) -> io::Result<Digest> {
    let mut fields = Fields::default();
    push_content(&mut fields, executable, memo)?;
    let manifest = sysroot.join(CHANNEL_MANIFEST);
    let official = manifest.is_file();
    if official {
        push_content(&mut fields, &manifest, memo)?;
        push_content(&mut fields, &sysroot.join("lib/rustlib/components"), memo)?;
    }
    for file in library_files(sysroot)? {
        let name = file.strip_prefix(sysroot).unwrap_or(&file);
        fields.push("library", name.as_os_str().as_bytes());
        if official {
            fields.push("size", fs::metadata(&file)?.len().to_le_bytes());
        } else {
            push_content(&mut fields, &file, memo)?;
        }
    }
    Ok(fields.digest(IDENTITY_CONTEXT).into())
}

fn script_text(executable: &Path) -> io::Result<Option<Vec<u8>>> {
    use std::io::Read;
    let mut text = Vec::new();
    fs::File::open(executable)?.take(MAX_SCRIPT_BYTES).read_to_end(&mut text)?;
    Ok(text.starts_with(b"#!").then_some(text))
}

fn push_content(fields: &mut Fields, path: &Path, memo: &Memo) -> io::Result<()> {
    fields.push("content", memo.digest(path)?.0.as_bytes().as_slice());
    Ok(())
}

/// The driver (`lib/*.so`) and what lies below `lib/rustlib/*/lib` and beside it, sorted.
fn library_files(sysroot: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(sysroot.join("lib"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_file() && (name.starts_with("librustc_driver") || name.starts_with("libLLVM")) {
            files.push(path);
        }
    }
    for entry in fs::read_dir(sysroot.join("lib/rustlib"))? {
        let target = entry?.path();
        for part in ["lib", "codegen-backends", "bin"] {
            collect_files(&target.join(part), MAX_DEPTH, &mut files)?;
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn collect_files(directory: &Path, depth: usize, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if depth == 0 || !directory.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect_files(&path, depth - 1, files)?;
        } else if path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toolchain(official: bool) -> (tempfile::TempDir, Query) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::create_dir_all(root.join("lib/rustlib/x86_64-unknown-linux-gnu/lib")).unwrap();
        fs::write(root.join("bin/rustc"), "compiler").unwrap();
        fs::write(root.join("lib/librustc_driver-1.so"), "driver").unwrap();
        fs::write(root.join("lib/rustlib/x86_64-unknown-linux-gnu/lib/libstd-1.rlib"), "std").unwrap();
        fs::write(root.join("lib/rustlib/components"), "rustc\n").unwrap();
        if official {
            fs::write(root.join(CHANNEL_MANIFEST), "version = '1'").unwrap();
        }
        let query = Query {
            compiler: root.join("bin/rustc").into_os_string().into_vec(),
            working_directory: root.to_owned(),
            variables: Vec::new(),
        };
        (directory, query)
    }

    fn identity(toolchains: &Toolchains, query: &Query) -> Digest {
        toolchains.identify(query, &Memo::default()).unwrap().identity
    }

    #[test]
    fn a_replaced_part_is_another_toolchain() {
        for (part, official) in [
            ("bin/rustc", true),
            ("bin/rustc", false),
            (CHANNEL_MANIFEST, true),
            ("lib/rustlib/components", true),
            ("lib/librustc_driver-1.so", false),
            ("lib/rustlib/x86_64-unknown-linux-gnu/lib/libstd-1.rlib", false),
        ] {
            let (directory, query) = toolchain(official);
            let before = identity(&Toolchains::default(), &query);
            assert_eq!(before, identity(&Toolchains::default(), &query));
            let old = fs::read(directory.path().join(part)).unwrap();
            fs::write(directory.path().join(part), vec![b'x'; old.len()]).unwrap();
            assert_ne!(before, identity(&Toolchains::default(), &query), "{part}");
        }
    }

    #[test]
    fn a_known_toolchain_is_identified_again_when_its_executable_changes() {
        let (directory, query) = toolchain(true);
        let toolchains = Toolchains::default();
        let before = identity(&toolchains, &query);
        fs::write(directory.path().join("bin/rustc"), "another compiler").unwrap();
        assert_ne!(before, identity(&toolchains, &query));
    }

    #[test]
    fn rustup_proxies_are_resolved_without_running_them() {
        let (directory, mut query) = toolchain(true);
        let home = directory.path().join("home");
        fs::create_dir_all(home.join(".rustup/toolchains")).unwrap();
        std::os::unix::fs::symlink(directory.path(), home.join(".rustup/toolchains/mine")).unwrap();
        fs::create_dir_all(home.join("bin")).unwrap();
        fs::write(home.join("bin/rustup"), "exit 1").unwrap();
        std::os::unix::fs::symlink("rustup", home.join("bin/rustc")).unwrap();
        query.compiler = b"rustc".to_vec();
        query.variables = vec![
            (b"PATH".to_vec(), home.join("bin").into_os_string().into_vec()),
            (b"HOME".to_vec(), home.clone().into_os_string().into_vec()),
            (b"RUSTUP_TOOLCHAIN".to_vec(), b"mine".to_vec()),
        ];
        let found = Toolchains::default().identify(&query, &Memo::default()).unwrap();
        assert_eq!(found.sysroot, home.join(".rustup/toolchains/mine"));
    }
}
