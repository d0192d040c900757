//! What a cargo process builds, by its command line and its workspace's `Cargo.lock`.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cachec_protocol::{ActionKey, BuildAction};
use serde::Deserialize;

/// See the module.
pub(super) struct CargoCommand {
    /// The key of its build's record.
    pub(super) key: ActionKey,
    /// Whether it runs compilers alone on what it has compiled: neither rustdoc nor the program, and no tests.
    pub(super) only_compiles: bool,
}

impl CargoCommand {
    /// The command of a process; `None` where it has no workspace with a `Cargo.lock`.
    pub(super) fn of(cargo: u32) -> Option<Self> {
        let words = fs::read(format!("/proc/{cargo}/cmdline")).ok()?;
        let directory = fs::read_link(format!("/proc/{cargo}/cwd")).ok()?;
        let (mut arguments, manifest) = what_is_built(words.split(|byte| *byte == 0).skip(1));
        let (lock, package) = manifest
            .and_then(|manifest| lock_above(&directory.join(manifest.parent()?)))
            .or_else(|| lock_above(&directory))?;
        let packages = own_packages(&lock)?;
        // The packages of a workspace are built one at a time from their own directories.
        arguments
            .extend(package.map(|package| [b"--manifest-path=", package.as_os_str().as_bytes()].concat()));
        let machine = format!("{} {}", std::env::consts::ARCH, std::env::consts::OS);
        let key = BuildAction { packages: &packages, arguments: &arguments, machine: &machine }.key();
        Some(Self { key, only_compiles: is_only_compiling(&arguments) })
    }
}

/// The `Cargo.lock` of a directory or one above it, and the way from there, if there is any.
fn lock_above(directory: &Path) -> Option<(PathBuf, Option<PathBuf>)> {
    let directory = fs::canonicalize(directory).ok()?;
    let root = directory.ancestors().find(|directory| directory.join("Cargo.lock").is_file())?;
    let way = directory.strip_prefix(root).ok().filter(|way| !way.as_os_str().is_empty());
    Some((root.join("Cargo.lock"), way.map(Path::to_owned)))
}

/// Names of a `Cargo.lock`'s packages that come from nowhere else: the workspace's own, sorted.
fn own_packages(lock: &Path) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct Lock {
        #[serde(default)]
        package: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        source: Option<String>,
    }
    let lock: Lock = toml::from_str(&fs::read_to_string(lock).ok()?).ok()?;
    let own = lock.package.into_iter().filter(|package| package.source.is_none());
    let mut names: Vec<String> = own.map(|package| package.name).collect();
    names.sort_unstable();
    Some(names)
}

/// Whether a cargo command runs compilers alone on what it has compiled: neither rustdoc nor the program, and no tests,
/// which are run from where they are.
fn is_only_compiling(arguments: &[Vec<u8>]) -> bool {
    let commands = [b"build".as_slice(), b"b", b"check", b"c", b"rustc", b"install"];
    let is_one = arguments.first().is_some_and(|command| commands.contains(&command.as_slice()));
    let tests = ["--test", "--bench", "--all-targets", "--example"];
    is_one && !arguments.iter().any(|word| tests.iter().any(|test| word.starts_with(test.as_bytes())))
}

/// Cargo's arguments without those that say how it talks, how much it does at a time and where things are; and where the
/// manifest is, if they say that.
fn what_is_built<'w>(words: impl Iterator<Item = &'w [u8]>) -> (Vec<Vec<u8>>, Option<&'w Path>) {
    let plain =
        [b"-q".as_slice(), b"-v", b"-vv", b"--quiet", b"--verbose", b"--locked", b"--offline", b"--frozen"];
    let with_value =
        ["-j", "--jobs", "--color", "--message-format", "--target-dir", "--manifest-path"].map(str::as_bytes);
    let (mut arguments, mut manifest) = (Vec::new(), None);
    let mut words = words.filter(|word| !word.is_empty() && !plain.contains(word));
    while let Some(word) = words.next() {
        if word == b"--" {
            // What follows is for the program.
            arguments.extend(words.map(<[u8]>::to_vec));
            break;
        }
        // `--name value`, `--name=value` or `-j4`.
        let is_its = |name: &&[u8]| {
            let rest = word.strip_prefix(*name);
            rest.is_some_and(|rest| *name == b"-j" || rest.is_empty() || rest.starts_with(b"="))
        };
        let Some(name) = with_value.into_iter().find(is_its) else {
            arguments.push(word.to_vec());
            continue;
        };
        let attached = word.strip_prefix(name).filter(|rest| !rest.is_empty());
        let value =
            attached.map_or_else(|| words.next(), |rest| Some(rest.strip_prefix(b"=").unwrap_or(rest)));
        if name == b"--manifest-path" {
            manifest = value.map(|path| Path::new(OsStr::from_bytes(path)));
        }
    }
    (arguments, manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspaces_own_packages_have_no_source() {
        let directory = tempfile::tempdir().unwrap();
        let lock = directory.path().join("Cargo.lock");
        let text = "version = 4\n[[package]]\nname = \"b\"\nversion = \"1.0.0\"\n[[package]]\nname = \"dep\"\n\
            version = \"1.0.0\"\nsource = \"registry\"\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n";
        fs::write(&lock, text).unwrap();
        assert_eq!(own_packages(&lock).unwrap(), ["a", "b"]);
        fs::write(&lock, "no lock").unwrap();
        assert!(own_packages(&lock).is_none());
    }

    #[test]
    fn a_package_is_told_from_others_of_its_workspace_wherever_that_is() {
        let directory = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(directory.path()).unwrap();
        let member = root.join("w/a/src");
        fs::create_dir_all(&member).unwrap();
        assert!(lock_above(&member).is_none() && lock_above(&root.join("absent")).is_none());
        let lock = root.join("w/Cargo.lock");
        fs::write(&lock, "").unwrap();
        assert_eq!(lock_above(&root.join("w")), Some((lock.clone(), None)));
        assert_eq!(lock_above(&root.join("w/a")), Some((lock.clone(), Some("a".into()))));
        assert_eq!(lock_above(&member.join("..")), Some((lock, Some("a".into()))));
    }

    #[test]
    fn how_and_where_something_is_built_is_left_out() {
        let of = |line: &str| {
            let line = line.replace(' ', "\0");
            let (arguments, manifest) = what_is_built(line.as_bytes().split(|byte| *byte == 0));
            let text = |word: &Vec<u8>| String::from_utf8_lossy(word).into_owned();
            let manifest = manifest.map(|path| path.display().to_string()).unwrap_or_default();
            format!("{} | {manifest}", arguments.iter().map(text).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(of("build -j 4 -q --release"), "build --release | ");
        assert_eq!(of("build -j4 --jobs=2 --color never --locked"), "build | ");
        assert_eq!(of("test --manifest-path a/Cargo.toml --target-dir=/t -p x"), "test -p x | a/Cargo.toml");
        assert_eq!(of("test --manifest-path=../Cargo.toml"), "test | ../Cargo.toml");
        assert_eq!(of("run -- --manifest-path x"), "run --manifest-path x | ");
        assert_eq!(of("build --manifest-path"), "build | ");
        assert_eq!(of("build --colors --target-directory x"), "build --colors --target-directory x | ");
    }
}
