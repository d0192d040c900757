//! The little that is needed of 64-bit little-endian ELF files: their program headers.

use std::ops::Range;

const PT_LOAD: u64 = 1;
const PT_INTERP: u64 = 3;

/// The dynamic loader that an ELF file names in its first bytes.
pub(crate) fn interpreter(start: &[u8]) -> Option<Vec<u8>> {
    let (_, range) = segments(start)?.find(|(kind, _)| *kind == PT_INTERP)?;
    let path = start.get(range.start..)?.split(|byte| *byte == 0).next()?;
    (!path.is_empty()).then(|| path.to_vec())
}

/// Where the part of an ELF file ends that is loaded when it is started.
pub(crate) fn loaded_end(start: &[u8]) -> Option<usize> {
    segments(start)?.filter(|(kind, _)| *kind == PT_LOAD).map(|(_, range)| range.end).max()
}

/// Kind and place in the file of each segment.
fn segments(start: &[u8]) -> Option<impl Iterator<Item = (u64, Range<usize>)>> {
    let number = |at: usize, length: usize| -> Option<u64> {
        let bytes = start.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    if !start.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = usize::try_from(number(0x20, 8)?).ok()?;
    let (entry_bytes, entries) =
        (usize::try_from(number(0x36, 2)?).ok()?, usize::try_from(number(0x38, 2)?).ok()?);
    Some((0..entries).filter_map(move |index| {
        let header = table.checked_add(index.checked_mul(entry_bytes)?)?;
        let field = |at: usize, length| number(header.checked_add(at)?, length);
        let begin = usize::try_from(field(8, 8)?).ok()?;
        let length = usize::try_from(field(0x20, 8)?).ok()?;
        Some((field(0, 4)?, begin..begin.checked_add(length)?))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_programs_own_headers_are_read() {
        let program = std::fs::read("/proc/self/exe").unwrap();
        assert!(interpreter(&program).is_none_or(|path| path.starts_with(b"/")));
        let end = loaded_end(&program).unwrap();
        assert!(end > 4096 && end <= program.len());
    }

    #[test]
    fn what_is_no_elf_file_has_none() {
        for start in [b"#!/bin/sh".as_slice(), b"", b"\x7fELF\x02\x01", &[0xff; 200]] {
            assert!(interpreter(start).is_none() && loaded_end(start).is_none());
        }
        let mut wild = vec![0xff; 200];
        wild[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert!(interpreter(&wild).is_none() && loaded_end(&wild).is_none());
    }
}
