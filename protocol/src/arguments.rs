//! Reading a rustc command line into a list of flags and values, without interpreting them.
//!
//! Invariants: order is kept; every spelling of a flag (`-Copt-level=3`, `-C opt-level=3`,
//! `--codegen=opt-level=3`) becomes one form; a flag that is not in the table is an error, since it is then
//! unknown whether the word behind it is its value.
//!
//! Source of the table: `rustc --help -v` of 1.95 and `rustc_session::config::rustc_optgroups`.

/// One flag with its value, or one positional word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Argument {
    /// The flag's long form (`--edition`), with the option's name for `-C` and `-Z` (`-C opt-level`);
    /// empty for a positional word.
    pub flag: String,
    /// What belongs to the flag; `None` for a switch.
    pub value: Option<Vec<u8>>,
}

/// A command line that is not understood. The unit is not cached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// A flag that is not in the table.
    #[error("unknown flag {0}")]
    UnknownFlag(String),
    /// A flag that needs a value stands last.
    #[error("{0} has no value")]
    MissingValue(String),
}

/// Flags with a value: long form and the short form that may have the value attached.
const VALUED: &[(&str, &str)] = &[
    ("--allow", "-A"),
    ("--cap-lints", ""),
    ("--cfg", ""),
    ("--check-cfg", ""),
    ("--codegen", "-C"),
    ("--color", ""),
    ("--crate-name", ""),
    ("--crate-type", ""),
    ("--deny", "-D"),
    ("--diagnostic-width", ""),
    ("--edition", ""),
    ("--emit", ""),
    ("--env-set", ""),
    ("--error-format", ""),
    ("--explain", ""),
    ("--extern", ""),
    ("--forbid", "-F"),
    ("--force-warn", ""),
    ("--json", ""),
    ("--library", "-l"),
    ("--out-dir", ""),
    ("--output", "-o"),
    ("--print", ""),
    ("--remap-path-prefix", ""),
    ("--remap-path-scope", ""),
    ("--search-path", "-L"),
    ("--sysroot", ""),
    ("--target", ""),
    ("--unstable", "-Z"),
    ("--warn", "-W"),
];

/// Flags without a value.
const SWITCHES: &[&str] =
    &["--test", "--verbose", "-O", "-V", "-g", "-h", "-v", "-vV", "--version", "--help"];

/// Splits rustc's arguments (without the program's name) into flags and values.
///
/// # Errors
/// [`ArgumentError`]; the caller runs the compiler and caches nothing.
pub fn parse(words: &[Vec<u8>]) -> Result<Vec<Argument>, ArgumentError> {
    let mut arguments = Vec::with_capacity(words.len());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if !word.starts_with(b"-") || word == b"-" {
            arguments.push(Argument { flag: String::new(), value: Some(word.clone()) });
            continue;
        }
        let text = String::from_utf8_lossy(word);
        if SWITCHES.contains(&text.as_ref()) {
            arguments.push(Argument { flag: text.into_owned(), value: None });
            continue;
        }
        let (long, attached) =
            split_flag(word).ok_or_else(|| ArgumentError::UnknownFlag(text.to_string()))?;
        let value = match attached {
            Some(value) => value.to_vec(),
            None => words.next().cloned().ok_or_else(|| ArgumentError::MissingValue(text.to_string()))?,
        };
        arguments.push(with_option_name(long, value));
    }
    Ok(arguments)
}

/// The long form of the flag that `word` starts with, and the value attached to it.
fn split_flag(word: &[u8]) -> Option<(&'static str, Option<&[u8]>)> {
    VALUED.iter().find_map(|(long, short)| {
        if let Some(rest) = word.strip_prefix(long.as_bytes()) {
            match rest {
                [] => return Some((*long, None)),
                [b'=', value @ ..] => return Some((*long, Some(value))),
                _ => {}
            }
        }
        match word.strip_prefix(short.as_bytes())? {
            _ if short.is_empty() => None,
            [] => Some((*long, None)),
            [b'=', value @ ..] if *short != "-L" && *short != "-l" => Some((*long, Some(value))),
            value => Some((*long, Some(value))),
        }
    })
}

/// Moves the option's name of `-C name=value` and `-Z name=value` from the value into the flag.
fn with_option_name(long: &str, value: Vec<u8>) -> Argument {
    let short = match long {
        "--codegen" => "-C",
        "--unstable" => "-Z",
        _ => return Argument { flag: long.to_owned(), value: Some(value) },
    };
    let (name, value) = match value.iter().position(|byte| *byte == b'=') {
        Some(equals) => (&value[..equals], Some(value[equals + 1..].to_vec())),
        None => (value.as_slice(), None),
    };
    // rustc takes `_` for `-` in option names.
    let name = String::from_utf8_lossy(name).replace('_', "-");
    Argument { flag: format!("{short} {name}"), value }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse_line(line: &str) -> Result<Vec<(String, Option<String>)>, ArgumentError> {
        let words: Vec<Vec<u8>> = line.split(' ').map(Into::into).collect();
        let text = |value: Vec<u8>| String::from_utf8(value).unwrap();
        Ok(parse(&words)?.into_iter().map(|argument| (argument.flag, argument.value.map(text))).collect())
    }

    #[test]
    fn every_spelling_becomes_one_form() {
        for line in ["-Copt-level=3", "-C opt-level=3", "--codegen opt-level=3", "--codegen=opt_level=3"] {
            assert_eq!(parse_line(line).unwrap(), [("-C opt-level".into(), Some("3".into()))], "{line}");
        }
        for line in ["-L native=/x", "-Lnative=/x"] {
            assert_eq!(
                parse_line(line).unwrap(),
                [("--search-path".into(), Some("native=/x".into()))],
                "{line}"
            );
        }
        assert_eq!(parse_line("-Dwarnings").unwrap(), parse_line("--deny warnings").unwrap());
    }

    #[test]
    fn words_switches_and_values_keep_their_order() {
        let parsed = parse_line("src/lib.rs --test --crate-name a -g -C lto").unwrap();
        let flags: Vec<_> = parsed.iter().map(|(flag, _)| flag.as_str()).collect();
        assert_eq!(flags, ["", "--test", "--crate-name", "-g", "-C lto"]);
        assert_eq!(parsed[4].1, None);
    }

    #[test]
    fn what_is_not_in_the_table_is_refused() {
        assert_eq!(parse_line("--new-flag x"), Err(ArgumentError::UnknownFlag("--new-flag".into())));
        assert_eq!(parse_line("--crate-name"), Err(ArgumentError::MissingValue("--crate-name".into())));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(words in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..12), 0..6)) {
            let _ = parse(&words);
        }
    }
}
