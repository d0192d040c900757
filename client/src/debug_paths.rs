//! Debug information of C and C++ that a build script has compiled: roots' paths in it are replaced, so that the objects
//! fit a moved checkout and what is linked from them does, too.
//!
//! rustc is told to do so (`--remap-path-prefix`); C compilers could be told by variables alone, which scripts see. So
//! it is done afterwards, in place: `/home/me/app/target` becomes `/cachec/////target`, of the same length, in the
//! sections `.debug_…` of ELF files and of archives of them. Nothing else in a file changes. A root whose path is
//! shorter than that stays, and binds the result.

use std::fs::{self, DirEntry, File, FileTimes};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use memchr::memmem;
use object::read::archive::ArchiveFile;
use object::{Architecture, Object, ObjectKind, ObjectSection, SectionFlags, elf};

use crate::ipc::Remapping;
use crate::unit::REMAPPED;

/// A larger file is left alone.
const MAX_FILE_BYTES: u64 = 512 << 20;

/// Replaces roots' paths in the debug information of all relocatable objects and archives below a directory. What fails
/// is left as it is; everything is, where debug information of an object is in another file, which is found by its path
/// or its checksum.
pub(crate) fn remap_all(directory: &Path, remappings: &[Remapping]) {
    let mut objects = Vec::new();
    if collect(directory, remappings, &mut objects).is_ok() {
        for object in objects {
            let _ = object.write();
        }
    }
}

/// An object or archive that names a root, and what is to be written where.
struct Named {
    path: PathBuf,
    metadata: fs::Metadata,
    edits: Vec<(usize, Vec<u8>)>,
}

impl Named {
    fn write(&self) -> io::Result<()> {
        let file = File::options().write(true).open(&self.path)?;
        for (at, text) in &self.edits {
            file.write_all_at(text, *at as u64)?;
        }
        // Make compares times.
        let times = FileTimes::new().set_accessed(self.metadata.accessed()?);
        file.set_times(times.set_modified(self.metadata.modified()?))
    }
}

/// Finds objects and archives that name a root.
///
/// # Errors
/// Where there is debug information in a file of its own.
fn collect(directory: &Path, remappings: &[Remapping], found: &mut Vec<Named>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let (path, metadata) = (entry.as_ref().map(DirEntry::path), entry.as_ref().map(DirEntry::metadata));
        let (Ok(path), Ok(Ok(metadata))) = (path, metadata) else { continue };
        if metadata.is_dir() {
            collect(&path, remappings, found)?;
        } else if metadata.is_file() && metadata.len() <= MAX_FILE_BYTES {
            let is_apart = path.extension().is_some_and(|ending| ending == "dwo" || ending == "dwp");
            let content = read_object(&path).unwrap_or_default();
            if is_apart || memmem::find(&content, b".gnu_debuglink").is_some() {
                return Err(io::Error::other("debug information of its own"));
            }
            // Another name of the file may be somebody else's.
            let edits = if metadata.nlink() == 1 { edits(&content, remappings) } else { Vec::new() };
            if !edits.is_empty() {
                found.push(Named { path, metadata, edits });
            }
        }
    }
    Ok(())
}

/// The content of an ELF file or an archive; nothing of another.
fn read_object(path: &Path) -> io::Result<Vec<u8>> {
    let mut magic = [0; 4];
    File::open(path)?.read_exact_at(&mut magic, 0)?;
    if [b"\x7fELF", b"!<ar"].contains(&&magic) { fs::read(path) } else { Ok(Vec::new()) }
}

/// What is to be written where.
fn edits(content: &[u8], remappings: &[Remapping]) -> Vec<(usize, Vec<u8>)> {
    let mut edits: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut sections = None;
    for remapping in remappings {
        let path = remapping.path.as_slice();
        let Some(replacement) = padded(&remapping.name, path.len()) else { continue };
        for at in memmem::find_iter(content, path) {
            let end = at + path.len();
            let begins = at
                .checked_sub(1)
                .and_then(|before| content.get(before))
                .is_none_or(|byte| !is_of_path(*byte));
            let ends = content.get(end).is_none_or(|byte| matches!(byte, 0 | b'/'));
            let sections = sections.get_or_insert_with(|| debug_sections(content));
            let is_debug = sections.iter().any(|section| section.start <= at && end <= section.end);
            // Longer paths come first; a root may be in another.
            let is_free = !edits.iter().any(|(other, text)| *other < end && at < other + text.len());
            if begins && ends && is_debug && is_free {
                edits.push((at, replacement.clone()));
            }
        }
    }
    edits
}

/// `/cachec/NAME` with as many slashes as it takes.
fn padded(name: &str, length: usize) -> Option<Vec<u8>> {
    let slashes = length.checked_sub(REMAPPED.len() + name.len()).filter(|slashes| *slashes > 0)?;
    Some([REMAPPED.as_bytes(), &vec![b'/'; slashes], name.as_bytes()].concat())
}

/// Whether a byte could be the end of what a path begins with.
fn is_of_path(byte: u8) -> bool {
    (b'!'..0x7f).contains(&byte) || byte >= 0x80
}

/// Where the uncompressed debug sections of an ELF file, or of an archive's members, are.
fn debug_sections(content: &[u8]) -> Vec<Range<usize>> {
    let Ok(archive) = ArchiveFile::parse(content) else { return sections_of(content, 0) };
    let members = archive.members().filter_map(Result::ok).map(|member| member.file_range());
    members
        .filter(|(_, length)| *length > 0)
        .filter_map(|(start, length)| {
            let start = usize::try_from(start).ok()?;
            Some(sections_of(content.get(start..start.checked_add(usize::try_from(length).ok()?)?)?, start))
        })
        .flatten()
        .collect()
}

/// Those of one file. Programs and shared libraries are left alone, and objects of BPF: scripts embed them as they are.
fn sections_of(file: &[u8], offset: usize) -> Vec<Range<usize>> {
    let Ok(parsed) = object::File::parse(file) else { return Vec::new() };
    if parsed.kind() != ObjectKind::Relocatable || parsed.architecture() == Architecture::Bpf {
        return Vec::new();
    }
    let is_debug = |section: &object::Section<'_, '_>| {
        let is_named = section.name_bytes().is_ok_and(|name| name.starts_with(b".debug_"));
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else { return false };
        // What is loaded the program can see.
        is_named && !sh_flags.contains(elf::SHF_ALLOC)
    };
    parsed
        .sections()
        .filter(is_debug)
        .filter_map(|section| {
            let (start, length) = section.file_range()?;
            let start = offset.checked_add(usize::try_from(start).ok()?)?;
            Some(start..start.checked_add(usize::try_from(length).ok()?)?)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replacement_is_as_long_as_the_path() {
        assert_eq!(padded("target", 18).unwrap(), b"/cachec/////target");
        assert_eq!(padded("target", 14).unwrap(), b"/cachec/target");
        assert!(padded("target", 13).is_none());
    }

    /// A directory with an object whose debug information names it, and what replaces that.
    fn with_object() -> (tempfile::TempDir, PathBuf, Vec<Remapping>) {
        let directory = tempfile::Builder::new().prefix("a-root-of-some-length-").tempdir().unwrap();
        let root = directory.path().to_str().unwrap();
        let source = directory.path().join("part.c");
        // What is loaded stays, under whatever name.
        let loaded = "__attribute__((section(\".debug_mine\"))) const char place[] = \"ROOT/loaded\";\n";
        fs::write(&source, format!("int part(void) {{ return 1; }}\n{}", loaded.replace("ROOT", root)))
            .unwrap();
        let object = directory.path().join("part.o");
        let compiler =
            std::process::Command::new("cc").arg("-g").arg("-c").arg(&source).arg("-o").arg(&object).status();
        assert!(compiler.unwrap().success());
        let remapping = Remapping { path: root.as_bytes().to_vec().into(), name: "target".to_owned() };
        (directory, object, vec![remapping])
    }

    fn names(path: &Path, root: &Path) -> usize {
        memmem::find_iter(&fs::read(path).unwrap(), root.as_os_str().as_encoded_bytes()).count()
    }

    #[test]
    fn debug_information_is_edited_and_nothing_else() {
        let (directory, object, remappings) = with_object();
        let before = fs::metadata(&object).unwrap();
        assert!(names(&object, directory.path()) > 1);
        remap_all(directory.path(), &remappings);
        let after = fs::metadata(&object).unwrap();
        assert_eq!(names(&object, directory.path()), 1, "the loaded one");
        assert_eq!((before.len(), before.modified().unwrap()), (after.len(), after.modified().unwrap()));
    }

    #[test]
    fn what_others_may_rely_on_is_left_alone() {
        fn shared(directory: &Path, object: &Path) {
            fs::hard_link(object, directory.join("other.o")).unwrap();
        }
        fn split(directory: &Path, _: &Path) {
            fs::write(directory.join("part.dwo"), "").unwrap();
        }
        /// The machine is in bytes 18 and 19.
        fn bpf(_: &Path, object: &Path) {
            File::options().write(true).open(object).unwrap().write_all_at(&[247, 0], 18).unwrap();
        }
        let changes: [fn(&Path, &Path); 3] = [shared, split, bpf];
        for change in changes {
            let (directory, object, remappings) = with_object();
            change(directory.path(), &object);
            let before = fs::read(&object).unwrap();
            remap_all(directory.path(), &remappings);
            assert!(fs::read(&object).unwrap() == before);
        }
    }
}
