//! The action key of a rustc unit: what is known about it before any file is read.
//!
//! Without I/O, from a plain description of the invocation. What enters is decided here and nowhere else.
//! `{…}` stands for any name; the first row that fits an argument or a variable decides.
//!
//! | field | treatment | why |
//! |---|---|---|
//! | `tool` | included | another compiler, or another standard library, gives other outputs |
//! | `working directory` | normalised | relative paths in the arguments start there |
//! | `cpu` | included | `-C target-cpu=native` means this machine's features; only then is it a field |
//! | `argument -C incremental` | left out | the client drops the flag before it runs the compiler |
//! | `argument --diagnostic-width` | left out | an `Argument` input wherever a diagnostic was printed |
//! | `argument --cfg` | included | a value that looks like a path is a plain string to the program |
//! | `argument --check-cfg` | included | a value that looks like a path is a plain string to the program |
//! | `argument {…}` | normalised | order and content of all other arguments count; `--out-dir` among them, which dep-info and notifications name |
//! | `variable CARGO_MANIFEST_DIR` | normalised | read by macros; differs with the checkout's path |
//! | `variable CARGO_MANIFEST_PATH` | normalised | read by macros; differs with the checkout's path |
//! | `variable CARGO_TARGET_TMPDIR` | normalised | read by macros; differs with the target directory |
//! | `variable OUT_DIR` | normalised | read by macros; differs with the target directory |
//! | `variable CARGO_BIN_EXE_{…}` | normalised | read by macros; differs with the target directory |
//! | `variable CARGO_PKG_{…}` | included | read by macros, mostly through `env!` |
//! | `variable CARGO_CRATE_NAME` | included | read by macros |
//! | `variable CARGO_BIN_NAME` | included | read by macros |
//! | `variable CARGO_CFG_{…}` | included | read by macros |
//! | `variable DEP_{…}` | normalised | read by macros; often paths below the target directory |
//! | `variable RUSTC_BOOTSTRAP` | included | turns unstable features on in a stable compiler |
//! | `variable RUSTC_FORCE_RUSTC_VERSION` | included | changes the version in the crate's metadata |
//! | `variable RUSTC_OVERRIDE_VERSION_STRING` | included | changes the version in the crate's metadata |
//! | `variable RUST_TARGET_PATH` | normalised | where target specifications are searched |
//! | `variable SOURCE_DATE_EPOCH` | included | read by macros and linkers that write a date |
//! | `variable MACOSX_DEPLOYMENT_TARGET` | included | read by rustc for Apple targets |
//! | `variable IPHONEOS_DEPLOYMENT_TARGET` | included | read by rustc for Apple targets |
//! | `variable CLIPPY_ARGS` | included | lints of clippy-driver |
//! | `variable CLIPPY_CONF_DIR` | normalised | where clippy-driver finds its settings |
//! | `variable LIBRARY_PATH` | normalised | read by linkers |
//! | `variable LD_{…}` | normalised | where loaders find libraries; `LD_RUN_PATH` is written into outputs |
//! | `variable LDEMULATION` | included | read by linkers |
//! | `variable GNUTARGET` | included | read by linkers |
//! | `variable CCC_OVERRIDE_OPTIONS` | included | read by clang as a linker driver |
//! | `variable NIX_{…}` | normalised | read by the compiler wrappers of Nix |
//! | `variable ZIG_{…}` | normalised | read by `zig cc` |
//! | `variable GCC_EXEC_PREFIX` | normalised | where a C compiler driver finds its parts |
//! | `variable COMPILER_PATH` | normalised | where a C compiler driver finds its parts |
//! | `variable DATABASE_URL` | included | `sqlx` macros connect to it |
//! | `variable SQLX_{…}` | normalised | `sqlx` macros; offline data directory |
//! | `variable {…}` | left out | unless the user lists it in `CACHEC_ENV`: then normalised. Variables that `env!` reads join the input set |

use std::borrow::Cow;

use crate::arguments::Argument;
use crate::digest::{ActionKey, Digest};
use crate::fields::Fields;
use crate::roots::{RootError, Roots};

/// Context of the key's derivation. Any change of the table above, of [`crate::roots`] or of
/// [`crate::arguments`] that changes a key's bytes comes with a new number here.
pub const KEY_VERSION: &str = "cachec 2026-11 rustc action key v1";

/// How a field enters a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Treatment {
    Included,
    Normalised,
    LeftOut,
}

use Treatment::{Included, LeftOut, Normalised};

/// The arguments that are not simply normalised.
const ARGUMENT_RULES: &[(&str, Treatment)] = &[
    ("-C incremental", LeftOut),
    ("--diagnostic-width", LeftOut),
    ("--cfg", Included),
    ("--check-cfg", Included),
];

/// What is done with which variables: the first rule that fits decides. A `*` at one end of a name stands for
/// anything.
pub(crate) type VariableRules = &'static [(&'static str, Treatment)];

/// The variables that are not left out.
const VARIABLE_RULES: VariableRules = &[
    ("CARGO_MANIFEST_DIR", Normalised),
    ("CARGO_MANIFEST_PATH", Normalised),
    ("CARGO_TARGET_TMPDIR", Normalised),
    ("OUT_DIR", Normalised),
    ("CARGO_BIN_EXE_*", Normalised),
    ("CARGO_PKG_*", Included),
    ("CARGO_CRATE_NAME", Included),
    ("CARGO_BIN_NAME", Included),
    ("CARGO_CFG_*", Included),
    ("DEP_*", Normalised),
    ("RUSTC_BOOTSTRAP", Included),
    ("RUSTC_FORCE_RUSTC_VERSION", Included),
    ("RUSTC_OVERRIDE_VERSION_STRING", Included),
    ("RUST_TARGET_PATH", Normalised),
    ("SOURCE_DATE_EPOCH", Included),
    ("MACOSX_DEPLOYMENT_TARGET", Included),
    ("IPHONEOS_DEPLOYMENT_TARGET", Included),
    ("CLIPPY_ARGS", Included),
    ("CLIPPY_CONF_DIR", Normalised),
    ("LIBRARY_PATH", Normalised),
    ("LD_*", Normalised),
    ("LDEMULATION", Included),
    ("GNUTARGET", Included),
    ("CCC_OVERRIDE_OPTIONS", Included),
    ("NIX_*", Normalised),
    ("ZIG_*", Normalised),
    ("GCC_EXEC_PREFIX", Normalised),
    ("COMPILER_PATH", Normalised),
    ("DATABASE_URL", Included),
    ("SQLX_*", Normalised),
];

/// A plain description of one rustc invocation.
#[derive(Debug, Clone, Copy)]
pub struct RustcAction<'a> {
    /// Digest of what identifies compiler and standard library.
    pub tool: Digest,
    /// The arguments in order.
    pub arguments: &'a [Argument],
    /// Absolute path of the directory the compiler runs in.
    pub working_directory: &'a [u8],
    /// The whole environment, as names and values, in any order.
    pub environment: &'a [(Vec<u8>, Vec<u8>)],
    /// Names of variables that the user wants in the key (`CACHEC_ENV`).
    pub extra_variables: &'a [String],
    /// Digest of the CPU's model and features, where the code is generated for this very CPU.
    pub cpu: Option<Digest>,
    /// The invocation's roots; empty under `CACHEC_PATHS=exact`.
    pub roots: &'a Roots,
}

impl RustcAction<'_> {
    /// The fields of the key, in their order.
    ///
    /// # Errors
    /// [`RootError::ContainsNul`] where an argument contains NUL; the unit is not cached.
    pub fn fields(&self) -> Result<Fields, RootError> {
        let mut fields = Fields::default();
        fields.push("tool", self.tool.as_bytes().as_slice());
        fields.push("working directory", self.roots.normalise(self.working_directory)?);
        if let Some(cpu) = self.cpu {
            fields.push("cpu", cpu.as_bytes().as_slice());
        }
        for argument in self.arguments {
            let value = argument.value.as_deref().unwrap_or_default();
            if let Some(value) = treat(argument_treatment(&argument.flag), value, self.roots)? {
                fields.push(format!("argument {}", argument.flag), value);
            }
        }
        push_variables(&mut fields, self.environment, self.roots, |name| {
            let listed = self.extra_variables.iter().any(|extra| extra == name);
            rule(VARIABLE_RULES, name).unwrap_or(if listed { Normalised } else { LeftOut })
        })?;
        Ok(fields)
    }
}

/// Adds the variables that rules and names let in, sorted by name.
///
/// # Errors
/// As [`RustcAction::fields`].
pub(crate) fn push_variables(
    fields: &mut Fields,
    environment: &[(Vec<u8>, Vec<u8>)],
    roots: &Roots,
    treatment: impl Fn(&str) -> Treatment,
) -> Result<(), RootError> {
    let mut environment: Vec<&(Vec<u8>, Vec<u8>)> = environment.iter().collect();
    environment.sort_unstable();
    for (name, value) in environment {
        let Ok(name) = std::str::from_utf8(name) else { continue };
        if let Some(value) = treat(treatment(name), value, roots)? {
            fields.push(format!("variable {name}"), value);
        }
    }
    Ok(())
}

/// What the rules say of a variable; `None` where none fits.
pub(crate) fn rule(rules: VariableRules, name: &str) -> Option<Treatment> {
    let fits = |pattern: &str| match (pattern.strip_suffix('*'), pattern.strip_prefix('*')) {
        (Some(prefix), _) => name.starts_with(prefix),
        (_, Some(suffix)) => name.ends_with(suffix),
        _ => name == pattern,
    };
    rules.iter().find(|(pattern, _)| fits(pattern)).map(|(_, treatment)| *treatment)
}

fn treat<'v>(
    treatment: Treatment,
    value: &'v [u8],
    roots: &Roots,
) -> Result<Option<Cow<'v, [u8]>>, RootError> {
    Ok(match treatment {
        LeftOut => None,
        Included => Some(Cow::Borrowed(value)),
        Normalised => Some(Cow::Owned(roots.normalise(value)?)),
    })
}

/// Whether no row names a variable: it counts only where the user, or the compiler itself, does.
#[must_use]
pub fn is_undeclared(name: &str) -> bool {
    rule(VARIABLE_RULES, name).is_none()
}

/// The action key of a rustc unit with these fields.
#[must_use]
pub fn action_key(fields: &Fields) -> ActionKey {
    fields.digest(KEY_VERSION).into()
}

fn argument_treatment(flag: &str) -> Treatment {
    ARGUMENT_RULES.iter().find(|(name, _)| *name == flag).map_or(Normalised, |(_, treatment)| *treatment)
}

/// Compares a module's table of fields with its rules.
#[cfg(test)]
pub(crate) fn check_documented_table(
    source: &str,
    before: impl Iterator<Item = (String, Treatment)>,
    rules: VariableRules,
) {
    let word = |treatment| match treatment {
        Included => "included",
        Normalised => "normalised",
        LeftOut => "left out",
    };
    let variables =
        rules.iter().map(|(name, rule)| (format!("variable {}", name.replace('*', "{…}")), *rule));
    let rows: Vec<String> = before
        .chain(variables)
        .chain([("variable {…}".to_owned(), LeftOut)])
        .map(|(name, treatment)| format!("| `{name}` | {} |", word(treatment)))
        .collect();
    let documented: Vec<&str> = source
        .lines()
        .filter_map(|line| line.strip_prefix("//! "))
        .filter(|line| line.starts_with("| `"))
        .collect();
    assert_eq!(documented.len(), rows.len());
    for (documented, row) in documented.iter().zip(&rows) {
        assert!(documented.starts_with(row.as_str()), "{documented} is not {row}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments;
    use crate::roots::Root;

    const LINE: &str = "--crate-name demo --edition=2024 /src/app/src/lib.rs --crate-type lib \
        --emit=dep-info,metadata,link -C opt-level=3 --cfg feature=\"std\" -C metadata=abc \
        --out-dir /src/app/target/release/deps -L dependency=/src/app/target/release/deps \
        --extern memchr=/src/app/target/release/deps/libmemchr-1.rmeta --diagnostic-width=80";

    fn key_of(line: &str, environment: &[(&str, &str)], root: &str) -> ActionKey {
        let words: Vec<Vec<u8>> = line.split_whitespace().map(Into::into).collect();
        let arguments = arguments::parse(&words).unwrap();
        let environment: Vec<_> =
            environment.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let roots = Roots::new([
            (Root::Workspace, root.into()),
            (Root::Target, format!("{root}/target").into_bytes()),
        ]);
        let action = RustcAction {
            tool: Digest::of(b"rustc 1.95"),
            arguments: &arguments,
            working_directory: root.as_bytes(),
            environment: &environment,
            extra_variables: &["LISTED".to_owned()],
            cpu: None,
            roots: &roots,
        };
        action_key(&action.fields().unwrap())
    }

    fn key(line: &str, environment: &[(&str, &str)]) -> ActionKey {
        key_of(line, environment, "/src/app")
    }

    #[test]
    fn golden_action_key() {
        let environment =
            [("CARGO_PKG_VERSION", "1.0.0"), ("CARGO_MANIFEST_DIR", "/src/app"), ("PATH", "/bin")];
        let expected = "5e4aaa75bc29bee2fde92c172066dc66ab81f6dfbb966409cac5cee0e2ea5025";
        assert_eq!(key(LINE, &environment).to_string(), expected);
    }

    #[test]
    fn another_path_gives_the_same_key() {
        let environment = |root| [("CARGO_MANIFEST_DIR", root)];
        let moved = LINE.replace("/src/app", "/home/ann/clone");
        assert_eq!(
            key(LINE, &environment("/src/app")),
            key_of(&moved, &environment("/home/ann/clone"), "/home/ann/clone")
        );
    }

    #[test]
    fn what_is_left_out_does_not_count() {
        let same = LINE.replace("width=80", "width=132");
        assert_eq!(key(LINE, &[]), key(&same, &[("PATH", "/usr/bin"), ("CARGO_MAKEFLAGS", "-j2")]));
        assert_eq!(key(LINE, &[]), key(&format!("{LINE} -C incremental=/x"), &[]));
    }

    #[test]
    fn every_other_argument_and_the_order_count() {
        let changes = [
            LINE.replace("opt-level=3", "opt-level=2"),
            LINE.replace("edition=2024", "edition=2021"),
            LINE.replace("\"std\"", "\"alloc\""),
            LINE.replace("memchr=", "priv:memchr="),
            LINE.replace("metadata,link", "metadata"),
            format!("{LINE} --test"),
            format!("{LINE} -Dwarnings"),
            format!("{LINE} -C target-cpu=native"),
        ];
        for changed in changes {
            assert_ne!(key(LINE, &[]), key(&changed, &[]), "{changed}");
        }
        assert_ne!(
            key(&format!("{LINE} --cfg a --cfg b"), &[]),
            key(&format!("{LINE} --cfg b --cfg a"), &[])
        );
    }

    #[test]
    fn declared_variables_count() {
        for name in ["CARGO_PKG_VERSION", "RUSTC_BOOTSTRAP", "SQLX_OFFLINE", "LISTED", "CARGO_BIN_EXE_demo"] {
            assert_ne!(key(LINE, &[(name, "1")]), key(LINE, &[]), "{name}");
            assert_ne!(key(LINE, &[(name, "1")]), key(LINE, &[(name, "2")]), "{name}");
        }
        assert_eq!(key(LINE, &[("UNLISTED", "1")]), key(LINE, &[]));
    }

    #[test]
    fn the_documented_table_is_the_code() {
        let before = [("tool", Included), ("working directory", Normalised), ("cpu", Included)]
            .into_iter()
            .map(|(name, treatment)| (name.to_owned(), treatment))
            .chain(ARGUMENT_RULES.iter().map(|(name, rule)| (format!("argument {name}"), *rule)))
            .chain([("argument {…}".to_owned(), Normalised)]);
        check_documented_table(include_str!("action.rs"), before, VARIABLE_RULES);
    }
}
