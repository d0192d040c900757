//! The action key of a build script's run: what is known about it before any file is read.
//!
//! As for rustc units (see [`crate::action`]): without I/O, decided here and nowhere else; the first row that fits
//! a variable decides. What no row names counts where the script can know of it.
//!
//! | field | treatment | why |
//! |---|---|---|
//! | `program` | included | another program does other things |
//! | `tool` | included | many scripts ask the compiler what it can do |
//! | `working directory` | normalised | the package's directory |
//! | `umask` | included | a mode that a script sets cannot be told from one that the mask leaves |
//! | `variable CARGO_MAKEFLAGS` | left out | the job server: how much runs at a time |
//! | `variable MAKEFLAGS` | normalised | flags for Make, without those of the job server |
//! | `variable MFLAGS` | normalised | flags for Make, without those of the job server |
//! | `variable MAKEFILES` | normalised | read by Make |
//! | `variable NUM_JOBS` | left out | how much runs at a time |
//! | `variable RUSTC_WRAPPER` | left out | cachec itself, which steps aside inside of a run |
//! | `variable CACHEC_{…}` | left out | cachec's own settings |
//! | `variable XDG_CONFIG_HOME` | normalised | where programs, git among them, find their settings |
//! | `variable XDG_{…}` | left out | a session's directories; files found there are inputs |
//! | `variable PATH` | left out | programs searched in it are inputs |
//! | `variable LD_LIBRARY_PATH` | left out | what the loader searched and found are inputs |
//! | `variable TMPDIR` | left out | where temporary files go |
//! | `variable PWD` | left out | a shell's; the working directory is a field |
//! | `variable OLDPWD` | left out | a shell's |
//! | `variable SHLVL` | left out | a shell's |
//! | `variable RUST_BACKTRACE` | left out | what a panic prints; such a run is not stored |
//! | `variable RUST_LIB_BACKTRACE` | left out | what a panic prints; such a run is not stored |
//! | `variable RUST_MIN_STACK` | left out | a thread's stack |
//! | `variable CARGO` | normalised | set by cargo |
//! | `variable CARGO_MANIFEST_{…}` | normalised | set by cargo: the package's directory, manifest and `links` |
//! | `variable CARGO_PKG_{…}` | included | set by cargo: the package's description |
//! | `variable CARGO_FEATURE_{…}` | included | set by cargo: the package's features |
//! | `variable CARGO_CFG_{…}` | included | set by cargo: the target's description |
//! | `variable CARGO_ENCODED_RUSTFLAGS` | normalised | set by cargo: flags for rustc |
//! | `variable OUT_DIR` | normalised | set by cargo: where outputs go |
//! | `variable TARGET` | included | set by cargo |
//! | `variable HOST` | included | set by cargo |
//! | `variable OPT_LEVEL` | included | set by cargo: the profile |
//! | `variable PROFILE` | included | set by cargo: the profile |
//! | `variable DEBUG` | included | set by cargo: the profile |
//! | `variable RUSTC{…}` | normalised | set by cargo, or read by rustc: compiler, linker, workspace wrapper, bootstrap |
//! | `variable RUSTDOC{…}` | normalised | set by cargo, or read by rustdoc |
//! | `variable RUSTFLAGS` | normalised | flags for rustc |
//! | `variable DEP_{…}` | normalised | set by cargo: what the scripts of dependencies have said |
//! | `variable CC{…}` | normalised | C compiler and its settings |
//! | `variable CXX{…}` | normalised | C++ compiler and its settings |
//! | `variable CFLAGS{…}` | normalised | C compiler |
//! | `variable CPPFLAGS{…}` | normalised | C preprocessor |
//! | `variable CPATH` | normalised | C preprocessor |
//! | `variable C_INCLUDE_PATH` | normalised | C preprocessor |
//! | `variable CPLUS_INCLUDE_PATH` | normalised | C preprocessor |
//! | `variable CRATE_CC_{…}` | normalised | the `cc` crate |
//! | `variable AR{…}` | normalised | archiver and its flags; cross-compilers' `ARCH` |
//! | `variable AS{…}` | normalised | assembler and its flags |
//! | `variable NM{…}` | normalised | symbol lister |
//! | `variable RANLIB{…}` | normalised | archive indexer |
//! | `variable STRIP{…}` | normalised | stripper |
//! | `variable LD{…}` | normalised | linker and its flags |
//! | `variable LIBRARY_PATH` | normalised | linker |
//! | `variable COMPILER_PATH` | normalised | where a C compiler driver finds its parts |
//! | `variable GCC_{…}` | normalised | C compiler driver |
//! | `variable HOST_{…}` | normalised | tools for the host |
//! | `variable TARGET_{…}` | normalised | tools for the target |
//! | `variable CMAKE{…}` | normalised | CMake |
//! | `variable PKG_CONFIG{…}` | normalised | pkg-config |
//! | `variable LIBCLANG_{…}` | normalised | bindgen |
//! | `variable LLVM_{…}` | normalised | bindgen and others |
//! | `variable CLANG_{…}` | normalised | bindgen |
//! | `variable BINDGEN_{…}` | normalised | bindgen |
//! | `variable PROTOC{…}` | normalised | prost and others |
//! | `variable PYTHON{…}` | normalised | Python, which many scripts start |
//! | `variable PYO3_{…}` | normalised | pyo3 |
//! | `variable PERL{…}` | normalised | Perl, which OpenSSL's script starts |
//! | `variable VCPKG{…}` | normalised | vcpkg |
//! | `variable ZIG_{…}` | normalised | `zig cc` |
//! | `variable NIX_{…}` | normalised | the compiler wrappers of Nix |
//! | `variable ANDROID_{…}` | normalised | Android's compilers |
//! | `variable EMCC_{…}` | normalised | Emscripten |
//! | `variable SDKROOT` | normalised | Apple's compilers |
//! | `variable {…}_DEPLOYMENT_TARGET` | included | Apple's compilers |
//! | `variable SOURCE_DATE_EPOCH` | included | the date that outputs are to carry |
//! | `variable LANG{…}` | included | languages and sort orders of programs |
//! | `variable LC_{…}` | included | languages and sort orders of programs |
//! | `variable TZ` | included | dates of programs |
//! | `variable GIT_{…}` | normalised | git, its settings included |
//! | `variable BASH_ENV` | normalised | read by shells |
//! | `variable ENV` | normalised | read by shells |
//! | `variable POSIXLY_CORRECT` | included | how many programs understand their arguments |
//! | `variable CI` | included | too short to be searched in a program |
//! | `variable {…}_DIR` | normalised | where a library is; searched by most `-sys` crates |
//! | `variable {…}_STATIC` | included | how a library is linked |
//! | `variable {…}_DYNAMIC` | included | how a library is linked |
//! | `variable {…}_NO_VENDOR` | included | whether a library is built from source |
//! | `variable {…}_NO_PKG_CONFIG` | included | whether a library is searched |
//! | `variable {…}` | left out | unless the program's own text has the name, or the user lists it in `CACHEC_ENV`: then normalised. What the script names in `rerun-if-env-changed` joins the input set |

use crate::action::Treatment::{Included, LeftOut, Normalised};
use crate::action::{VariableRules, push_variables, rule};
use crate::digest::{ActionKey, Digest};
use crate::fields::Fields;
use crate::roots::{RootError, Roots};

/// Context of the key's derivation; see [`crate::action::KEY_VERSION`].
pub const SCRIPT_KEY_VERSION: &str = "cachec 2026-11 script action key v2";

const VARIABLE_RULES: VariableRules = &[
    ("CARGO_MAKEFLAGS", LeftOut),
    ("MAKEFLAGS", Normalised),
    ("MFLAGS", Normalised),
    ("MAKEFILES", Normalised),
    ("NUM_JOBS", LeftOut),
    ("RUSTC_WRAPPER", LeftOut),
    ("CACHEC_*", LeftOut),
    ("XDG_CONFIG_HOME", Normalised),
    ("XDG_*", LeftOut),
    ("PATH", LeftOut),
    ("LD_LIBRARY_PATH", LeftOut),
    ("TMPDIR", LeftOut),
    ("PWD", LeftOut),
    ("OLDPWD", LeftOut),
    ("SHLVL", LeftOut),
    ("RUST_BACKTRACE", LeftOut),
    ("RUST_LIB_BACKTRACE", LeftOut),
    ("RUST_MIN_STACK", LeftOut),
    ("CARGO", Normalised),
    ("CARGO_MANIFEST_*", Normalised),
    ("CARGO_PKG_*", Included),
    ("CARGO_FEATURE_*", Included),
    ("CARGO_CFG_*", Included),
    ("CARGO_ENCODED_RUSTFLAGS", Normalised),
    ("OUT_DIR", Normalised),
    ("TARGET", Included),
    ("HOST", Included),
    ("OPT_LEVEL", Included),
    ("PROFILE", Included),
    ("DEBUG", Included),
    ("RUSTC*", Normalised),
    ("RUSTDOC*", Normalised),
    ("RUSTFLAGS", Normalised),
    ("DEP_*", Normalised),
    ("CC*", Normalised),
    ("CXX*", Normalised),
    ("CFLAGS*", Normalised),
    ("CPPFLAGS*", Normalised),
    ("CPATH", Normalised),
    ("C_INCLUDE_PATH", Normalised),
    ("CPLUS_INCLUDE_PATH", Normalised),
    ("CRATE_CC_*", Normalised),
    ("AR*", Normalised),
    ("AS*", Normalised),
    ("NM*", Normalised),
    ("RANLIB*", Normalised),
    ("STRIP*", Normalised),
    ("LD*", Normalised),
    ("LIBRARY_PATH", Normalised),
    ("COMPILER_PATH", Normalised),
    ("GCC_*", Normalised),
    ("HOST_*", Normalised),
    ("TARGET_*", Normalised),
    ("CMAKE*", Normalised),
    ("PKG_CONFIG*", Normalised),
    ("LIBCLANG_*", Normalised),
    ("LLVM_*", Normalised),
    ("CLANG_*", Normalised),
    ("BINDGEN_*", Normalised),
    ("PROTOC*", Normalised),
    ("PYTHON*", Normalised),
    ("PYO3_*", Normalised),
    ("PERL*", Normalised),
    ("VCPKG*", Normalised),
    ("ZIG_*", Normalised),
    ("NIX_*", Normalised),
    ("ANDROID_*", Normalised),
    ("EMCC_*", Normalised),
    ("SDKROOT", Normalised),
    ("*_DEPLOYMENT_TARGET", Included),
    ("SOURCE_DATE_EPOCH", Included),
    ("LANG*", Included),
    ("LC_*", Included),
    ("TZ", Included),
    ("GIT_*", Normalised),
    ("BASH_ENV", Normalised),
    ("ENV", Normalised),
    ("POSIXLY_CORRECT", Included),
    ("CI", Included),
    ("*_DIR", Normalised),
    ("*_STATIC", Included),
    ("*_DYNAMIC", Included),
    ("*_NO_VENDOR", Included),
    ("*_NO_PKG_CONFIG", Included),
];

/// A plain description of one run of a build script.
#[derive(Debug, Clone, Copy)]
pub struct ScriptAction<'a> {
    /// Digest of the script's program.
    pub program: Digest,
    /// Digest of what identifies the compiler that cargo builds with.
    pub tool: Digest,
    /// Absolute path of the directory it runs in.
    pub working_directory: &'a [u8],
    /// The mask that takes bits away from the modes of new files.
    pub umask: u32,
    /// The whole environment, as names and values, in any order.
    pub environment: &'a [(Vec<u8>, Vec<u8>)],
    /// Names of variables that count besides those of the table: the user's (`CACHEC_ENV`), and those that
    /// the program's own text has.
    pub extra_variables: &'a [String],
    /// The invocation's roots; empty under `CACHEC_PATHS=exact`.
    pub roots: &'a Roots,
}

impl ScriptAction<'_> {
    /// The fields of the key, in their order.
    ///
    /// # Errors
    /// [`RootError::ContainsNul`] where a path contains NUL; the run is not cached.
    pub fn fields(&self) -> Result<Fields, RootError> {
        let mut fields = Fields::default();
        fields.push("program", self.program.as_bytes().as_slice());
        fields.push("tool", self.tool.as_bytes().as_slice());
        fields.push("working directory", self.roots.normalise(self.working_directory)?);
        fields.push("umask", self.umask.to_le_bytes().as_slice());
        let environment: Vec<(Vec<u8>, Vec<u8>)> = self
            .environment
            .iter()
            .map(|(name, value)| match name.as_slice() {
                b"MAKEFLAGS" | b"MFLAGS" => (name.clone(), without_job_server(value)),
                _ => (name.clone(), value.clone()),
            })
            .collect();
        push_variables(&mut fields, &environment, self.roots, |name| {
            let extra = self.extra_variables.iter().any(|extra| extra == name);
            rule(VARIABLE_RULES, name).unwrap_or(if extra { Normalised } else { LeftOut })
        })?;
        Ok(fields)
    }
}

/// Make's flags without those that say how much runs at a time, and by whose leave.
fn without_job_server(flags: &[u8]) -> Vec<u8> {
    let is_other = |word: &&[u8]| {
        !word.is_empty()
            && ![b"-j".as_slice(), b"--jobs", b"--jobserver"].iter().any(|start| word.starts_with(start))
    };
    let words: Vec<&[u8]> = flags.split(|byte| *byte == b' ').filter(is_other).collect();
    words.join(b" ".as_slice())
}

/// Whether a variable counts only where the program's own text has its name.
#[must_use]
pub fn is_undeclared(name: &str) -> bool {
    rule(VARIABLE_RULES, name).is_none()
}

/// The action key of a run with these fields.
#[must_use]
pub fn script_action_key(fields: &Fields) -> ActionKey {
    fields.digest(SCRIPT_KEY_VERSION).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::check_documented_table;
    use crate::roots::Root;

    fn key(environment: &[(&str, &str)], root: &str) -> ActionKey {
        let environment: Vec<_> =
            environment.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let action = ScriptAction {
            program: Digest::of(b"program"),
            tool: Digest::of(b"rustc"),
            working_directory: format!("{root}/package").as_bytes(),
            umask: 0o22,
            environment: &environment,
            extra_variables: &["NAMED".to_owned()],
            roots: &Roots::new([(Root::Workspace, root.into())]),
        }
        .fields()
        .unwrap();
        script_action_key(&action)
    }

    #[test]
    fn golden_script_action_key() {
        let environment = [("OPT_LEVEL", "0"), ("NUM_JOBS", "8"), ("OUT_DIR", "/src/app/out")];
        let expected = "a4b3edbbb7a1c9f23ef1e0c696cb21fa0c71998d2f3bccef7893f462f0c3d0ea";
        assert_eq!(key(&environment, "/src/app").to_string(), expected);
    }

    #[test]
    fn declared_and_named_variables_count_and_others_do_not() {
        let plain = key(&[], "/src/app");
        for name in ["CC_x86_64-unknown-linux-gnu", "OPENSSL_LIB_DIR", "NAMED", "DEP_Z_INCLUDE", "LC_ALL"] {
            assert_ne!(key(&[(name, "1")], "/src/app"), plain, "{name}");
        }
        assert_ne!(key(&[("MAKEFLAGS", "-n -j4")], "/src/app"), key(&[("MAKEFLAGS", "-j2")], "/src/app"));
        assert_eq!(
            key(&[("MAKEFLAGS", "-j4 --jobserver-auth=3,4 V=1")], "/src/app"),
            key(&[("MAKEFLAGS", "V=1")], "/src/app")
        );
        for name in ["NUM_JOBS", "CARGO_MAKEFLAGS", "PATH", "CACHEC_DIR", "XDG_CONFIG_DIR", "UNNAMED"] {
            assert_eq!(key(&[(name, "1")], "/src/app"), plain, "{name}");
        }
    }

    #[test]
    fn another_path_gives_the_same_key() {
        let environment = |root: &str| format!("{root}/target/out");
        assert_eq!(
            key(&[("OUT_DIR", &environment("/src/app"))], "/src/app"),
            key(&[("OUT_DIR", &environment("/home/ann"))], "/home/ann")
        );
    }

    #[test]
    fn the_documented_table_is_the_code() {
        let before = [
            ("program", Included),
            ("tool", Included),
            ("working directory", Normalised),
            ("umask", Included),
        ];
        let before = before.into_iter().map(|(name, treatment)| (name.to_owned(), treatment));
        check_documented_table(include_str!("script.rs"), before, VARIABLE_RULES);
    }
}
