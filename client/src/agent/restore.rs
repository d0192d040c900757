//! Staging a result's outputs beside their destinations.
//!
//! Every byte is checked against its digest before the wrapper hears of a hit. Files that nobody edits in
//! place (libraries, which compilers replace whole; a build script's program, which is kept beside its launcher; what
//! scripts have made) are hard links into the local tier, if the object had no other name: it gets the present time
//! with the new one. Otherwise its mtime is that of an earlier restore. This needs a fresh `.rmeta` beside it, since
//! cargo looks at the newest output of a unit, or else it is copied. A program that the user asked for is copied: people
//! strip them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use cachec_protocol::{Digest, Output, OutputKind, StoredResult};
use tempfile::{Builder, NamedTempFile, TempDir, TempPath};

use super::launcher::{self, StagedLauncher};
use super::tree;
use crate::deferred::set_modified;
use crate::ipc::{Hit, Rename};
use crate::local::LocalTier;
use crate::memo::{Identity, Memo};
use crate::process::wait_for_starting;
use crate::unit::Unit;

/// A text output is held in memory; a larger one is corrupt.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// A larger program is linked, too: it has debug information, which nobody strips from a program to be kept.
const MAX_COPIED_PROGRAM_BYTES: u64 = 64 << 20;

/// One staged file; removed when dropped, unless the wrapper has renamed it.
#[derive(Debug)]
struct Staged {
    /// None in a tree, which is renamed as a whole.
    path: Option<TempPath>,
    destination: PathBuf,
    identity: Identity,
    digest: Digest,
    /// Whether no other checkout looks at its time.
    has_own_time: bool,
}

/// All outputs of a result, staged.
#[derive(Debug)]
pub(crate) struct Restored {
    files: Vec<Staged>,
    /// A build script's staged output directory, and its destination.
    tree: Option<(TempDir, PathBuf)>,
    /// What takes the place of a build script's program.
    launcher: Option<StagedLauncher>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// Stages from the local tier.
///
/// # Errors
/// Any: the caller has a miss, and nothing is left behind.
pub(crate) fn from_local(
    unit: &Unit,
    result: &StoredResult,
    tier: &LocalTier,
    memo: &Memo,
) -> io::Result<Restored> {
    let mut stager = Stager::new(unit, result)?;
    let mut files = Vec::with_capacity(result.outputs.len());
    for output in &result.outputs {
        files.push(match (&output.inline, output.kind) {
            (Some(bytes), _) => stager.stage_bytes(output, bytes)?,
            (None, OutputKind::Binary) => {
                Some(stager.place(output, &tier.object(&output.digest, memo)?, tier)?)
            }
            (None, _) => stager.stage_bytes(output, &fs::read(tier.object(&output.digest, memo)?.0)?)?,
        });
    }
    stager.finish(files.into_iter().flatten().collect())
}

/// Stages from a pack's content; the outputs are kept in the local tier, if there is one.
///
/// # Errors
/// As [`from_local`]; `InvalidData` where the content is not what the result says.
pub(crate) fn from_pack(
    unit: &Unit,
    result: &StoredResult,
    mut content: impl Read,
    tier: Option<&LocalTier>,
    memo: &Memo,
) -> io::Result<Restored> {
    let mut stager = Stager::new(unit, result)?;
    let mut files = Vec::with_capacity(result.outputs.len());
    for output in &result.outputs {
        if let Some(bytes) = &output.inline {
            files.push(stager.stage_bytes(output, bytes)?);
            continue;
        }
        let mut part = (&mut content).take(output.size_bytes);
        files.push(match (output.kind, tier) {
            (OutputKind::Text | OutputKind::Directory | OutputKind::Link, _) => {
                let text = read_text(&mut part, output)?;
                // Checks its digest.
                let staged = stager.stage_bytes(output, &text)?;
                if let Some(tier) = tier {
                    keep_bytes(tier, &text, &output.digest, memo)?;
                }
                staged
            }
            (OutputKind::Binary, Some(tier)) => {
                let mut staged = tier.stage()?;
                copy_checked(&mut part, staged.as_file_mut(), output)?;
                tier.keep_object(staged.into_temp_path(), &output.digest, memo)?;
                Some(stager.place(output, &tier.object(&output.digest, memo)?, tier)?)
            }
            (OutputKind::Binary, None) => {
                let mut staged = stager.new_file(output)?;
                copy_checked(&mut part, staged.as_file_mut(), output)?;
                Some(stager.staged(output, staged.into_temp_path(), output.digest)?)
            }
        });
    }
    if content.read(&mut [0])? != 0 {
        return Err(corrupt());
    }
    stager.finish(files.into_iter().flatten().collect())
}

/// Stages a result whose outputs are deferred: the texts that cargo reads, and an empty directory for a script's.
///
/// # Errors
/// As [`from_local`].
pub(crate) fn deferred(unit: &Unit, result: &StoredResult) -> io::Result<Restored> {
    match unit.script() {
        Some(_) => Stager::new(unit, result)?.finish(Vec::new()),
        None => without_pack(unit, result),
    }
}

/// Stages what the result itself holds.
///
/// # Errors
/// As [`from_local`].
pub(crate) fn without_pack(unit: &Unit, result: &StoredResult) -> io::Result<Restored> {
    let mut stager = Stager::new(unit, result)?;
    let mut files = Vec::new();
    for output in &result.outputs {
        if let Some(bytes) = &output.inline {
            files.extend(stager.stage_bytes(output, bytes)?);
        }
    }
    stager.finish(files)
}

impl Restored {
    /// The message to the wrapper.
    pub(crate) fn to_hit(&self) -> Hit {
        Hit {
            renames: self.renames(),
            stdout: self.stdout.clone(),
            stderr: self.stderr.clone(),
            promise: None,
        }
    }

    /// What the wrapper is to move to its place.
    pub(crate) fn renames(&self) -> Vec<Rename> {
        let bytes = |path: &Path| OsString::from(path).into_vec();
        let rename = |staged: &Path, destination: &Path| Rename {
            staged: bytes(staged),
            destination: bytes(destination),
        };
        let files = self.files.iter().filter_map(|file| Some(rename(file.path.as_ref()?, &file.destination)));
        let tree = self.tree.iter().map(|(staged, destination)| rename(staged.path(), destination));
        let launcher = self.launcher.iter().map(StagedLauncher::rename);
        files.chain(tree).chain(launcher).collect()
    }

    /// Gives what is staged another time than now, but for files that others share.
    ///
    /// # Errors
    /// Those of setting it.
    pub(crate) fn set_modified(&mut self, time: SystemTime) -> io::Result<()> {
        for file in &mut self.files {
            let in_tree = self.tree.as_ref().and_then(|(staged, destination)| {
                Some(staged.path().join(file.destination.strip_prefix(destination).ok()?))
            });
            let Some(path) = file.path.as_deref().or(in_tree.as_deref()) else { continue };
            if file.has_own_time {
                set_modified(path, time)?;
                file.identity = Identity::of(&fs::metadata(path)?);
            }
        }
        Ok(())
    }

    /// After the wrapper has renamed all: remembers the digests, so that dependents need not read the files.
    pub(crate) fn remember(self, memo: &Memo) {
        for file in self.files {
            if let Ok(metadata) = fs::symlink_metadata(&file.destination) {
                let now = Identity::of(&metadata);
                if now.same_content_times(&file.identity) {
                    memo.remember(now, file.digest);
                }
            }
            // The path is gone; there is nothing to remove.
            let _ = file.path.map(TempPath::keep);
        }
        if let Some((staged, _)) = self.tree {
            let _ = staged.keep();
        }
    }
}

struct Stager<'a> {
    unit: &'a Unit,
    result: &'a StoredResult,
    /// Where files are staged.
    directory: PathBuf,
    tree: Option<TempDir>,
    /// Links of the tree and their texts; made at the end, so that nothing is written through one.
    links: Vec<(PathBuf, String)>,
    /// Directories of the tree; they get their permissions when they are filled.
    directories: Vec<(PathBuf, fs::Permissions)>,
}

impl<'a> Stager<'a> {
    /// Checks that the result's outputs can only be this unit's, by its own command line, and that none
    /// that it must have is missing.
    fn new(unit: &'a Unit, result: &'a StoredResult) -> io::Result<Self> {
        let stored: Vec<&str> = result.outputs.iter().map(|output| output.name.as_str()).collect();
        let missing = unit.required_outputs().iter().any(|name| !stored.contains(&name.as_str()));
        if missing || !stored.iter().all(|name| unit.owns_output(name)) {
            return Err(corrupt());
        }
        let directory = unit.output_directory();
        let tree = match unit.script() {
            Some(_) => Some(Self::new_tree(unit, &directory)?),
            None => None,
        };
        let directory = tree.as_ref().map_or(directory, |tree| tree.path().to_owned());
        Ok(Self { unit, result, directory, tree, links: Vec::new(), directories: Vec::new() })
    }

    fn new_tree(unit: &Unit, destination: &Path) -> io::Result<TempDir> {
        let tree =
            Builder::new().prefix(".cachec-").tempdir_in(destination.parent().unwrap_or(destination))?;
        // The agent's own mask may be narrower than the build's.
        fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o777 & !unit.umask))?;
        Ok(tree)
    }

    fn new_file(&self, output: &Output) -> io::Result<NamedTempFile> {
        self.with_name(output, |builder, directory| {
            builder.permissions(self.permissions(output)).tempfile_in(directory)
        })
    }

    /// Has a file made under a name of its own, beside where the output goes.
    fn with_name<T>(&self, output: &Output, make: impl FnOnce(&mut Builder<'_, '_>, &Path) -> T) -> T {
        let path = self.directory.join(&output.name);
        let suffix = format!("-{}", path.file_name().unwrap_or_default().to_string_lossy());
        make(Builder::new().prefix(".cachec-").suffix(&suffix), path.parent().unwrap_or(&self.directory))
    }

    fn staged(&self, output: &Output, path: TempPath, digest: Digest) -> io::Result<Staged> {
        // The agent's own mask may be narrower than the build's.
        if fs::metadata(&path)?.mode() & 0o777 != self.permissions(output).mode() {
            fs::set_permissions(&path, self.permissions(output))?;
        }
        let identity = Identity::of(&fs::metadata(&path)?);
        let destination = self.destination(&output.name);
        if self.tree.is_some() {
            path.persist_noclobber(self.directory.join(&output.name)).map_err(io::Error::from)?;
            return Ok(Staged { path: None, destination, identity, digest, has_own_time: true });
        }
        Ok(Staged { path: Some(path), destination, identity, digest, has_own_time: true })
    }

    /// Where an output goes: beside its place, for the program of a build script.
    fn destination(&self, name: &str) -> PathBuf {
        let directory = self.unit.output_directory();
        match launcher::kept_program(self.unit) {
            Some((program, kept)) if program == name => directory.join(kept),
            _ => directory.join(name),
        }
    }

    /// Stages a text, or makes the directory or link in a tree; nothing is left to be renamed then.
    fn stage_bytes(&mut self, output: &Output, stored: &[u8]) -> io::Result<Option<Staged>> {
        if Digest::of(stored) != output.digest || stored.len() as u64 != output.size_bytes {
            return Err(corrupt());
        }
        let is_in_tree = self.tree.is_some();
        let path = self.directory.join(&output.name);
        match output.kind {
            OutputKind::Directory if is_in_tree => {
                fs::create_dir(&path)?;
                self.directories.push((path, self.permissions(output)));
                return Ok(None);
            }
            OutputKind::Link if is_in_tree => {
                let target = std::str::from_utf8(stored).map_err(|_| corrupt())?;
                if !tree::stays_inside(&output.name, target) {
                    return Err(corrupt());
                }
                self.links.push((path, target.to_owned()));
                return Ok(None);
            }
            OutputKind::Text => {}
            _ => return Err(corrupt()),
        }
        let text = self.expand(stored)?;
        let mut staged = self.new_file(output)?;
        staged.write_all(&text)?;
        self.staged(output, staged.into_temp_path(), Digest::of(&text)).map(Some)
    }

    /// Clones, else hard-links where that is safe, else copies a verified object.
    fn place(&self, output: &Output, object: &(PathBuf, Identity), tier: &LocalTier) -> io::Result<Staged> {
        let (path, verified) = object;
        if let Some(cloned) = self.clone(output, object, tier)? {
            return self.staged(output, cloned, output.digest);
        }
        if self.may_link(output)
            && let Some((linked, has_own_time)) = self.link(output, object, tier)
        {
            return Ok(Staged { has_own_time, ..self.staged(output, linked, output.digest)? });
        }
        let mut staged = self.new_file(output)?;
        if !copy_unchanged(path, verified, staged.as_file_mut())? {
            // The object has another link since, or other content: the digest tells.
            staged = self.new_file(output)?;
            copy_checked(&mut File::open(path)?, staged.as_file_mut(), output)?;
        }
        self.staged(output, staged.into_temp_path(), output.digest)
    }

    /// A copy that shares its blocks with the object, where the file system has such.
    fn clone(
        &self,
        output: &Output,
        (path, verified): &(PathBuf, Identity),
        tier: &LocalTier,
    ) -> io::Result<Option<TempPath>> {
        if !tier.may_clone() {
            return Ok(None);
        }
        let staged = self.new_file(output)?;
        if rustix::fs::ioctl_ficlone(staged.as_file(), File::open(path)?).is_err() {
            tier.never_clone();
            return Ok(None);
        }
        let is_unchanged = Identity::of(&fs::metadata(path)?) == *verified;
        Ok(is_unchanged.then(|| staged.into_temp_path()))
    }

    /// Another name of the object, and whether nobody else looks at its time.
    fn link(
        &self,
        output: &Output,
        object: &(PathBuf, Identity),
        tier: &LocalTier,
    ) -> Option<(TempPath, bool)> {
        let mode = self.permissions(output).mode();
        let is_like_own = |metadata: fs::Metadata| {
            metadata.mode() & 0o7777 == mode && metadata.uid() == rustix::process::geteuid().as_raw()
        };
        let may_share = self.may_be_old(output) && fs::metadata(&object.0).is_ok_and(is_like_own);
        let link = |name: &Path| match tier.lend(object, name, mode) {
            true => Ok(true),
            false if may_share => fs::hard_link(&object.0, name).map(|()| false),
            false => Err(io::Error::from(io::ErrorKind::Unsupported)),
        };
        let linked = self.with_name(output, |builder, directory| builder.make_in(directory, link)).ok()?;
        let has_own_time = *linked.as_file();
        Some((linked.into_temp_path(), has_own_time))
    }

    /// Whether nobody will edit the output. Where somebody does all the same, the object is no longer used.
    fn may_link(&self, output: &Output) -> bool {
        let is_users = self.tree.is_none() && self.unit.is_primary && !self.is_script_program(output);
        let is_library = [".rlib", ".rmeta"].iter().any(|ending| output.name.ends_with(ending));
        !is_users || is_library || output.size_bytes > MAX_COPIED_PROGRAM_BYTES
    }

    /// Whether another checkout's file will do: a library, with a newer file of the unit for cargo to look at. Nobody
    /// edits those; a script's program is run again without being looked at.
    fn may_be_old(&self, output: &Output) -> bool {
        let has_fresh_companion = self.result.outputs.iter().any(|other| other.name.ends_with(".rmeta"));
        output.name.ends_with(".rlib") && has_fresh_companion && !self.unit.is_primary
    }

    fn is_script_program(&self, output: &Output) -> bool {
        launcher::kept_program(self.unit).is_some_and(|(name, _)| name == output.name)
    }

    /// The mode that a compiler gives its outputs.
    fn permissions(&self, output: &Output) -> fs::Permissions {
        let usual = if output.executable || output.kind == OutputKind::Directory { 0o777 } else { 0o666 };
        // Only a build script's outputs have others.
        let own = output.permissions.filter(|_| self.tree.is_some()).map(|mode| mode & 0o777);
        fs::Permissions::from_mode(own.unwrap_or(usual & !self.unit.umask))
    }

    fn expand(&self, stored: &[u8]) -> io::Result<Vec<u8>> {
        self.unit.roots.expand(stored).map_err(|_| corrupt())
    }

    fn finish(self, files: Vec<Staged>) -> io::Result<Restored> {
        for (path, target) in &self.links {
            std::os::unix::fs::symlink(target, path)?;
        }
        for (path, permissions) in self.directories.iter().rev() {
            fs::set_permissions(path, permissions.clone())?;
        }
        let (stdout, stderr) = (self.expand(&self.result.stdout)?, self.expand(&self.result.stderr)?);
        let tree = self.tree.map(|staged| (staged, self.unit.output_directory()));
        if self.result.outputs.iter().any(|output| output.executable) {
            wait_for_starting();
        }
        Ok(Restored { files, tree, launcher: launcher::stage(self.unit), stdout, stderr })
    }
}

fn corrupt() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the stored result is not what it should be")
}

fn read_text(part: &mut impl Read, output: &Output) -> io::Result<Vec<u8>> {
    if output.size_bytes > MAX_TEXT_BYTES {
        return Err(corrupt());
    }
    let mut text = Vec::new();
    part.read_to_end(&mut text)?;
    Ok(text)
}

/// Stores an object's bytes in the local tier.
///
/// # Errors
/// Those of writing.
pub(crate) fn keep_bytes(tier: &LocalTier, bytes: &[u8], digest: &Digest, memo: &Memo) -> io::Result<()> {
    let mut staged = tier.stage()?;
    staged.write_all(bytes)?;
    tier.keep_object(staged.into_temp_path(), digest, memo)
}

/// Copies an object that was verified under an identity, within the kernel; says whether it still had that
/// identity afterwards, and so the same content all the time.
fn copy_unchanged(object: &Path, verified: &Identity, target: &mut File) -> io::Result<bool> {
    let mut source = File::open(object)?;
    io::copy(&mut source, target)?;
    Ok(Identity::of(&source.metadata()?) == *verified)
}

/// Copies exactly an output's bytes and checks their digest.
fn copy_checked(source: &mut impl Read, target: &mut File, output: &Output) -> io::Result<()> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    let mut copied_bytes = 0;
    loop {
        let count = source.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        copied_bytes += count as u64;
        hasher.update(&buffer[..count]);
        target.write_all(&buffer[..count])?;
    }
    if copied_bytes == output.size_bytes && Digest::from(hasher.finalize()) == output.digest {
        Ok(())
    } else {
        Err(corrupt())
    }
}
