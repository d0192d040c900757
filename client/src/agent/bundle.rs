//! Bundles: the programs of all build scripts of a build, in one zstd frame.
//!
//! Each of them has the standard library in it, so that behind the first they take a fifth of what their packs take.
//! A bundle is the pack of a build's record, whose outputs are packs, each named by its digest. They stay blobs of their
//! own as well: a unit that asks by itself gets its own.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom};
use std::path::PathBuf;

use cachec_protocol::pack::{self, Contents, Length, UPLOAD_LEVEL};
use cachec_protocol::{Digest, Input, InputKind, InputSet, Output, OutputKind, Pack, StoredResult};
use tempfile::SpooledTempFile;

/// Uncompressed; programs over it are left out.
const MAX_CONTENT_BYTES: u64 = 256 << 20;

/// A bundle or a program up to this size waits in memory, a larger one in a file.
const SPOOL_BYTES: usize = 64 << 10;

/// Bytes that are hashed and written at a time.
const STEP_BYTES: usize = 256 << 10;

/// A build script's program that is alone in its pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ScriptProgram {
    pub(super) pack: Digest,
    size_bytes: u64,
    path: PathBuf,
}

impl ScriptProgram {
    /// `None` where a result has more than the program in its pack.
    pub(super) fn of(result: &StoredResult, path: PathBuf) -> Option<Self> {
        let mut packed = result.packed();
        let (program, None) = (packed.next()?, packed.next()) else { return None };
        Some(Self { pack: program.digest, size_bytes: program.size_bytes, path })
    }
}

/// What a record gets of a bundle, and the bundle's bytes.
#[derive(Debug)]
pub(super) struct Bundle {
    pub(super) outputs: Vec<Output>,
    pub(super) pack: Pack,
    pub(super) compressed: SpooledTempFile,
}

/// Compresses programs into a bundle. Those are left out that are no longer what they were;
/// `None` where fewer than two are left, since one gains nothing.
///
/// # Errors
/// Those of reading and of the temporary file.
pub(super) fn make(mut programs: Vec<ScriptProgram>) -> io::Result<Option<Bundle>> {
    programs.sort_unstable_by_key(|program| program.pack);
    programs.dedup_by_key(|program| program.pack);
    let mut content_bytes = 0_u64;
    let mut files = Vec::new();
    for program in programs {
        let Ok(file) = File::open(&program.path) else { continue };
        let digest = blake3::Hasher::new().update_reader(&file)?.finalize();
        if Digest::from(digest) == program.pack && content_bytes + program.size_bytes <= MAX_CONTENT_BYTES {
            content_bytes += program.size_bytes;
            files.push((program, file));
        }
    }
    if files.len() < 2 {
        return Ok(None);
    }
    let spool = SpooledTempFile::new(SPOOL_BYTES);
    let mut encoder = pack::compressor(spool, Length::Exactly(content_bytes), UPLOAD_LEVEL)?;
    let mut whole = blake3::Hasher::new();
    let mut outputs = Vec::with_capacity(files.len());
    for (program, mut file) in files {
        file.seek(SeekFrom::Start(0))?;
        // It may be another by now.
        let mut part = Hashing::new(Hashing { inner: file.take(program.size_bytes), hasher: whole });
        io::copy(&mut part, &mut encoder)?;
        part.check(&program.pack)?;
        whole = part.inner.hasher;
        outputs.push(Output {
            name: program.pack.to_string(),
            kind: OutputKind::Binary,
            executable: false,
            digest: program.pack,
            size_bytes: program.size_bytes,
            permissions: None,
            inline: None,
        });
    }
    let pack = Pack { digest: whole.finalize().into() };
    Ok(Some(Bundle { outputs, pack, compressed: encoder.finish()? }))
}

/// Reads what it passes on into a hash.
struct Hashing<R> {
    inner: R,
    hasher: blake3::Hasher,
}

impl<R> Hashing<R> {
    fn new(inner: R) -> Self {
        Self { inner, hasher: blake3::Hasher::new() }
    }

    /// # Errors
    /// `InvalidData` where other content was read than that of the digest.
    fn check(&self, digest: &Digest) -> io::Result<()> {
        let is_right = Digest::from(self.hasher.finalize()) == *digest;
        is_right.then_some(()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

/// Gives a record a bundle. With another bundle it is another result.
pub(super) fn attach(record: &mut StoredResult, outputs: Vec<Output>, pack: Pack) {
    let bundle = Input { kind: InputKind::Argument, name: b"bundle".to_vec(), digest: Some(pack.digest) };
    let inputs = record.input_set.inputs().iter().cloned().chain([bundle]).collect();
    record.input_set = InputSet::new(inputs);
    (record.outputs, record.pack) = (outputs, Some(pack));
}

/// Whether a record's bundle has these programs and no others.
pub(super) fn is_of(record: &StoredResult, programs: &[ScriptProgram]) -> bool {
    let bundled: BTreeSet<Digest> = record.packed().map(|pack| pack.digest).collect();
    bundled == programs.iter().map(|program| program.pack).collect()
}

/// Takes a bundle apart: `place` gets the content of each pack, at its beginning.
///
/// # Errors
/// Those of reading, `InvalidData` for other or more content than a bundle has, and those of the temporary files.
pub(super) fn take_apart(
    record: &StoredResult,
    compressed: impl Read,
    mut place: impl FnMut(Digest, SpooledTempFile),
) -> io::Result<()> {
    if record.packed_bytes() > MAX_CONTENT_BYTES {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let mut content = Contents::new(compressed, record.packed_bytes())?;
    for output in record.packed() {
        let mut part = Hashing::new((&mut content).take(output.size_bytes));
        let mut spool = BufWriter::with_capacity(STEP_BYTES, SpooledTempFile::new(SPOOL_BYTES));
        io::copy(&mut part, &mut spool)?;
        part.check(&output.digest)?;
        let mut program = spool.into_inner()?;
        program.seek(SeekFrom::Start(0))?;
        place(output.digest, program);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};
    use std::path::Path;

    use cachec_protocol::pack::Decompressor;
    use cachec_protocol::{ActionKey, BuildRecord};

    use super::*;

    fn record() -> StoredResult {
        BuildRecord::default().into_result(ActionKey::from_bytes([1; 32]))
    }

    /// Programs that have most of their content in common, which does not compress by itself.
    fn programs(directory: &Path) -> Vec<ScriptProgram> {
        let mut library = vec![0; 1 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut library);
        let program = |number: u8| {
            let content = [&library[..], &[number; 1000]].concat();
            let path = directory.join(number.to_string());
            std::fs::write(&path, &content).unwrap();
            ScriptProgram { pack: Digest::of(&content), size_bytes: content.len() as u64, path }
        };
        (0..4).map(program).collect()
    }

    fn bytes_of(mut spool: SpooledTempFile) -> Vec<u8> {
        let mut bytes = Vec::new();
        spool.seek(SeekFrom::Start(0)).unwrap();
        spool.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_bundle_takes_as_much_as_one_program_and_comes_apart() {
        let directory = tempfile::tempdir().unwrap();
        let programs = programs(directory.path());
        let Bundle { outputs, pack, compressed } = make(programs.clone()).unwrap().unwrap();
        let compressed = bytes_of(compressed);
        assert!(compressed.len() < (1 << 20) + 50_000, "{}", compressed.len());
        let record = StoredResult { outputs, pack: Some(pack), ..record() };
        let mut packs = HashMap::new();
        take_apart(&record, compressed.as_slice(), |digest, pack| drop(packs.insert(digest, bytes_of(pack))))
            .unwrap();
        assert_eq!(packs.len(), 4);
        for program in programs {
            assert_eq!(Digest::of(&packs[&program.pack]), program.pack);
        }
        let whole = Decompressor::new(compressed.as_slice(), record.packed_bytes()).unwrap();
        assert_eq!(whole.finish().unwrap().0, pack.digest);
    }

    #[test]
    fn what_is_not_there_any_more_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let programs = programs(directory.path());
        std::fs::remove_file(directory.path().join("0")).unwrap();
        std::fs::write(directory.path().join("1"), "another").unwrap();
        assert_eq!(make(programs.clone()).unwrap().unwrap().outputs.len(), 2);
        std::fs::remove_file(directory.path().join("2")).unwrap();
        assert!(make(programs).unwrap().is_none());
    }

    #[test]
    fn a_record_with_another_bundle_is_another_result() {
        let directory = tempfile::tempdir().unwrap();
        let programs = programs(directory.path());
        let with_bundle_of = |programs: &[ScriptProgram]| {
            let Bundle { outputs, pack, .. } = make(programs.to_vec()).unwrap().unwrap();
            let mut record = record();
            attach(&mut record, outputs, pack);
            record
        };
        let (whole, part) = (with_bundle_of(&programs), with_bundle_of(&programs[1..]));
        let keys: HashSet<_> = [&record(), &whole, &part].map(StoredResult::result_key).into();
        assert_eq!(keys.len(), 3);
        assert!(is_of(&whole, &programs) && is_of(&part, &programs[1..]));
        assert!(!is_of(&whole, &programs[1..]) && !is_of(&part, &programs) && !is_of(&record(), &programs));
    }

    #[test]
    fn more_content_than_a_bundle_has_is_an_error() {
        let mut record = record();
        let Bundle { outputs, pack, compressed } = {
            let directory = tempfile::tempdir().unwrap();
            make(programs(directory.path())).unwrap().unwrap()
        };
        (record.outputs, record.pack) = (outputs, Some(pack));
        let compressed = bytes_of(compressed);
        record.outputs[0].size_bytes = MAX_CONTENT_BYTES;
        assert!(take_apart(&record, compressed.as_slice(), |_, _| {}).is_err());
        record.outputs.truncate(1);
        // Less than the program has is another content.
        record.outputs[0].size_bytes = 10;
        assert!(take_apart(&record, compressed.as_slice(), |_, _| {}).is_err());
        let content = pack::compress(b"0123456789", UPLOAD_LEVEL).unwrap();
        record.outputs[0].digest = Digest::of(b"0123456789");
        assert!(take_apart(&record, content.as_slice(), |_, _| {}).is_ok());
        assert!(take_apart(&record, &content[..5], |_, _| {}).is_err());
    }
}
