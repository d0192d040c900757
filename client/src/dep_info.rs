//! Reading rustc's dep-info files: which files a run read, and which variables.
//!
//! Grammar: that of cargo's `parse_rustc_dep_info` (cargo 1.95, `core/compiler/fingerprint/dep_info.rs`).
//! Lines `target: file file …` with spaces in names as `\ `; `# env-dep:NAME=value`, or without a value
//! where the variable was not set, with `\\`, `\n` and `\r` escaped.

/// What a dep-info file says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct DepInfo {
    /// Files that were read, as written there (relative ones from the compiler's working directory).
    pub(crate) files: Vec<Vec<u8>>,
    /// Variables that were read, and their values.
    pub(crate) variables: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

/// Not a dep-info file, as far as is known here. The result is not stored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed dep-info file")]
pub(crate) struct MalformedDepInfo;

impl DepInfo {
    /// Reads the text of a dep-info file.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, MalformedDepInfo> {
        let mut dep_info = Self::default();
        for line in text.split(|byte| *byte == b'\n') {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if let Some(variable) = line.strip_prefix(b"# env-dep:") {
                dep_info.variables.push(parse_variable(variable)?);
            } else if line.is_empty() || line.starts_with(b"#") {
                // Checksums of unstable cargo features, and comments.
            } else {
                let colon = memchr::memmem::find(line, b": ").or_else(|| line.len().checked_sub(1));
                let colon = colon.filter(|at| line[*at] == b':').ok_or(MalformedDepInfo)?;
                parse_files(&line[colon + 1..], &mut dep_info.files)?;
            }
        }
        dep_info.files.sort_unstable();
        dep_info.files.dedup();
        Ok(dep_info)
    }
}

fn parse_files(text: &[u8], files: &mut Vec<Vec<u8>>) -> Result<(), MalformedDepInfo> {
    let mut words = text.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
    while let Some(word) = words.next() {
        let mut file = word.to_vec();
        while file.ends_with(b"\\") {
            file.pop();
            file.push(b' ');
            file.extend_from_slice(words.next().ok_or(MalformedDepInfo)?);
        }
        files.push(file);
    }
    Ok(())
}

fn parse_variable(text: &[u8]) -> Result<(Vec<u8>, Option<Vec<u8>>), MalformedDepInfo> {
    match text.iter().position(|byte| *byte == b'=') {
        Some(equals) => Ok((unescape(&text[..equals])?, Some(unescape(&text[equals + 1..])?))),
        None => Ok((unescape(text)?, None)),
    }
}

fn unescape(text: &[u8]) -> Result<Vec<u8>, MalformedDepInfo> {
    let mut unescaped = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        unescaped.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'\\') => b'\\',
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                _ => return Err(MalformedDepInfo),
            },
            byte => *byte,
        });
    }
    Ok(unescaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_variables_are_read() {
        let text = b"/t/demo.d: src/lib.rs /w/with\\ space.txt\n\n/t/libdemo.rlib: src/lib.rs src/a.rs\n\n\
            src/lib.rs:\nsrc/a.rs:\n\n# env-dep:HELLO=a\\nb\\\\c=d\n# env-dep:UNSET\n";
        let dep_info = DepInfo::parse(text).unwrap();
        assert_eq!(dep_info.files, [b"/w/with space.txt".to_vec(), b"src/a.rs".into(), b"src/lib.rs".into()]);
        assert_eq!(
            dep_info.variables,
            [(b"HELLO".to_vec(), Some(b"a\nb\\c=d".to_vec())), (b"UNSET".to_vec(), None)]
        );
    }

    #[test]
    fn what_is_not_dep_info_is_refused() {
        for text in ["no colon at all", "target: trailing\\", "# env-dep:A=\\x"] {
            assert_eq!(DepInfo::parse(text.as_bytes()), Err(MalformedDepInfo), "{text}");
        }
    }
}
