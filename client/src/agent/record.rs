//! From a finished compiler run to a result and its pack.
//!
//! The outputs are opened before the wrapper may end, since another run may replace them at once: what is
//! stored is one run's, whole. rustc replaces `.rlib` and `.rmeta` by renames, which an open file does not
//! notice; dep-info it rewrites in place, so that is read at once.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cachec_protocol::codec::Message;
use cachec_protocol::message::PublishRequest;
use cachec_protocol::pack::{self, Length, UPLOAD_LEVEL};
use cachec_protocol::result::{MAX_INLINE_BYTES, MAX_STREAM_BYTES};
use cachec_protocol::{
    Digest, Input, InputKind, InputSet, Output, OutputKind, Pack, Root, StoredResult, encode,
};
use tempfile::{NamedTempFile, SpooledTempFile};

use super::tree;
use crate::dep_info::DepInfo;
use crate::inputs::{self, NotStorable};
use crate::invocation::Invocation;
use crate::ipc::Finished;
use crate::local::LocalTier;
use crate::memo::{Identity, Memo};
use crate::places;
use crate::script::{self, Directives};
use crate::streams::ARTIFACT_NOTIFICATION;
use crate::tracer::Trace;
use crate::unit::Unit;

/// A pack up to this size stays in memory until it is uploaded; a larger one is spooled to a file.
const SPOOL_BYTES: usize = 4 << 20;
const CHUNK_BYTES: usize = 1 << 20;

/// The outputs of a run that has just ended, in pack order.
#[derive(Debug)]
pub(crate) struct OpenOutputs {
    files: Vec<OpenOutput>,
    dep_info: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct OpenOutput {
    pub(super) name: String,
    pub(super) source: Source,
    pub(super) identity: Identity,
    pub(super) executable: bool,
    /// See [`Output::permissions`].
    pub(super) permissions: Option<u32>,
}

/// Where an output's content is.
#[derive(Debug)]
pub(super) enum Source {
    Open(File),
    /// At a path where nobody replaces it, or its identity tells.
    At(PathBuf),
    Directory,
    /// In a link's text.
    Link(String),
}

/// A result that is ready to be stored. The pack is compressed and stands at its beginning.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub(crate) publish: PublishRequest,
    pub(crate) pack: Option<SpooledTempFile>,
    pub(crate) bound: bool,
}

/// Where a result goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stores<'a> {
    pub(crate) memo: &'a Memo,
    pub(crate) tier: Option<&'a LocalTier>,
    /// Whether a server takes the pack; compressing it for nobody would only slow the build.
    pub(crate) wants_pack: bool,
}

/// Opens what the run left: what it was seen to leave, or what such a unit must leave.
pub(crate) fn open_outputs(unit: &Unit, trace: Option<&Trace>) -> Result<OpenOutputs, NotStorable> {
    let required = unit.required_outputs();
    let names = match trace {
        Some(Trace { obstacle: Some(obstacle), .. }) => return Err(NotStorable::Observed(obstacle.clone())),
        Some(trace) => observed_outputs(unit, trace)?,
        None if unit.needs_trace => return Err(NotStorable::Untraced),
        None => required.clone(),
    };
    if let Some(script) = unit.script() {
        return Ok(OpenOutputs {
            files: tree::walk(&script.output_directory, unit.umask)?,
            dep_info: Vec::new(),
        });
    }
    let leaves_nothing = unit.invocation().is_some() && names.is_empty();
    if leaves_nothing || required.iter().any(|name| !names.contains(name)) {
        return Err(NotStorable::MissingOutput);
    }
    let directory = unit.output_directory();
    let mut files = Vec::new();
    let mut dep_info = Vec::new();
    for name in names {
        let mut file = File::open(directory.join(&name)).map_err(|_| NotStorable::MissingOutput)?;
        let metadata = file.metadata()?;
        if unit.dep_info_name().as_deref() == Some(name.as_str()) {
            file.read_to_end(&mut dep_info)?;
        }
        let executable = metadata.mode() & 0o100 != 0;
        files.push(OpenOutput {
            name,
            source: Source::Open(file),
            identity: Identity::of(&metadata),
            executable,
            permissions: None,
        });
    }
    Ok(OpenOutputs { files, dep_info })
}

/// Names of the files that a traced run left, `.rmeta` before what contains it.
fn observed_outputs(unit: &Unit, trace: &Trace) -> Result<Vec<String>, NotStorable> {
    let directory = unit.output_directory();
    // A compiler removes its temporary files; other programs forget some.
    let ignored = unit.script().map(|_| unit.temporary_directory());
    let mut names = Vec::with_capacity(trace.outputs.len());
    for path in &trace.outputs {
        let path = Path::new(OsStr::from_bytes(path));
        if unit.script().is_some() && path.starts_with(&directory)
            || ignored.as_ref().is_some_and(|ignored| path.starts_with(ignored) && !unit.holds(path))
        {
            continue;
        }
        let name = path.strip_prefix(&directory).ok().and_then(Path::to_str);
        let name = name.filter(|name| unit.owns_output(name)).ok_or(NotStorable::WritesElsewhere)?;
        if !fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file()) {
            return Err(NotStorable::WritesElsewhere);
        }
        names.push(name.to_owned());
    }
    names.sort_unstable_by_key(|name| (!name.ends_with(".d"), !name.ends_with(".rmeta"), name.clone()));
    Ok(names)
}

/// Hashes inputs and outputs, compresses the pack and keeps the outputs in the local tier.
pub(crate) fn record(
    unit: &Unit,
    finished: &Finished,
    outputs: OpenOutputs,
    stores: Stores<'_>,
) -> Result<Recorded, NotStorable> {
    let memo = stores.memo;
    let dep_info = DepInfo::parse(&outputs.dep_info).map_err(|_| NotStorable::MalformedDepInfo)?;
    let mut inputs = match &finished.trace {
        Some(trace) => inputs::from_trace(unit, trace, &dep_info, memo, finished.started_ns)?,
        None => inputs::gather(unit, &dep_info, memo, finished.started_ns)?,
    };
    let normalise = |text: &[u8]| unit.roots.normalise(text).map_err(|_| NotStorable::UnnormalisablePath);
    let stdout = normalise(finished.stdout.as_deref().map_or(&[], Vec::as_slice))?;
    let stderr = normalise(finished.stderr.as_deref().map_or(&[], Vec::as_slice))?;
    if stdout.len().max(stderr.len()) > MAX_STREAM_BYTES {
        return Err(NotStorable::LargeStreams);
    }
    if unit.invocation().is_some() && has_diagnostics(&stderr) {
        let flag = "--diagnostic-width";
        let digest = unit.argument(flag).map(Digest::of);
        inputs.push(Input { kind: InputKind::Argument, name: flag.into(), digest });
    }
    let text = normalise(&outputs.dep_info)?;
    let mut found = Vec::new();
    if unit.invocation().is_some_and(Invocation::writes_rpath) {
        // The linker writes the way from the output to its libraries.
        found.extend(unit.roots.iter().map(|(root, _)| root));
    }
    for content in [&stdout, &stderr, &text] {
        found.extend(unit.roots.found_in(content));
    }
    let mut replaced = Vec::new();
    if let Some(script) = unit.script() {
        let said = finished.stdout.as_deref().map_or(&[] as &[u8], Vec::as_slice);
        let directives = Directives::parse(said);
        script.check_run(&directives, &unit.working_directory)?;
        script::check_clock(said, finished.started_ns)?;
        inputs.extend(inputs::declared_variables(unit, &directives.variables)?);
        replaced = unit.roots.found_in(said);
        found.extend(unit.roots.parents_found_in(&stdout));
    }
    let packer = Packer::new(unit, finished, stores, &outputs, text.len() as u64)?;
    let packed = packer.pack(outputs, &text)?;
    found.extend(packed.found);
    replaced.extend(packed.replaced);
    found.extend(places::named_in_files(unit, &inputs, &replaced));
    inputs.extend(places::beside_roots(unit, &inputs));
    inputs.extend(found.iter().filter_map(|root| places::root_input(unit, *root)));
    let bound = inputs.iter().any(|input| input.kind == InputKind::Root);
    let has_pack = packed.outputs.iter().any(|output| output.inline.is_none());
    let result = StoredResult {
        action_key: unit.action_key,
        input_set: InputSet::new(inputs),
        outputs: packed.outputs,
        stdout,
        stderr,
        compile_ms: finished.compile_ms,
        pack: has_pack.then_some(Pack { digest: packed.digest }),
        signature: None,
    };
    // What a reader would refuse.
    result.check().map_err(|_| NotStorable::LargeResult)?;
    let action_fields = pack::compress(&encode(&unit.action_fields), UPLOAD_LEVEL)?;
    let pack = packed.spool.filter(|_| has_pack);
    Ok(Recorded { publish: PublishRequest { result, action_fields }, pack, bound })
}

/// Whether standard error has more than the notifications of finished files.
fn has_diagnostics(stderr: &[u8]) -> bool {
    let mut lines = stderr.split(|byte| *byte == b'\n');
    lines.any(|line| !line.is_empty() && !line.starts_with(ARTIFACT_NOTIFICATION))
}

struct Packed {
    outputs: Vec<Output>,
    digest: Digest,
    /// Roots whose literal paths are in the stored bytes.
    found: Vec<Root>,
    /// Roots that were written as variables in files of a build script.
    replaced: Vec<Root>,
    spool: Option<SpooledTempFile>,
}

/// Reads every output once: into its digest, the pack's digest, the pack, the local tier, and the search
/// for roots' literal paths.
struct Packer<'a> {
    unit: &'a Unit,
    started_ns: i64,
    /// Where nothing is traced a changed ctime, as a new link leaves, counts as a changed input.
    is_traced: bool,
    stores: Stores<'a>,
    encoder: Option<zstd::Encoder<'static, SpooledTempFile>>,
    hasher: blake3::Hasher,
    found: Vec<Root>,
    replaced: Vec<Root>,
    /// What the result itself may still hold.
    inline_left_bytes: u64,
}

impl<'a> Packer<'a> {
    fn new(
        unit: &'a Unit,
        finished: &Finished,
        stores: Stores<'a>,
        outputs: &OpenOutputs,
        text_bytes: u64,
    ) -> Result<Self, NotStorable> {
        let dep_info = unit.dep_info_name();
        let binary_bytes: u64 = outputs
            .files
            .iter()
            .filter(|output| dep_info.as_ref() != Some(&output.name))
            .map(|output| output.identity.size_bytes)
            .sum();
        // Texts of a build script change on their way into the pack.
        let length = if unit.script().is_some() { Length::About } else { Length::Exactly };
        let packed_text_bytes = if text_bytes > MAX_INLINE_BYTES { text_bytes } else { 0 };
        let length = length(binary_bytes + packed_text_bytes);
        let compressor = || pack::compressor(SpooledTempFile::new(SPOOL_BYTES), length, UPLOAD_LEVEL);
        let encoder = stores.wants_pack.then(compressor).transpose()?;
        Ok(Self {
            unit,
            started_ns: finished.started_ns,
            is_traced: finished.trace.is_some(),
            stores,
            encoder,
            hasher: blake3::Hasher::new(),
            found: Vec::new(),
            replaced: Vec::new(),
            inline_left_bytes: MAX_INLINE_BYTES,
        })
    }

    /// Adds bytes to the pack and its digest.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.encoder.as_mut().map_or(Ok(()), |encoder| encoder.write_all(bytes))
    }

    fn pack(mut self, opened: OpenOutputs, text: &[u8]) -> Result<Packed, NotStorable> {
        let dep_info = self.unit.dep_info_name();
        let mut outputs = Vec::with_capacity(opened.files.len());
        for OpenOutput { name, source, identity, executable, permissions } in opened.files {
            let output = match source {
                _ if dep_info.as_ref() == Some(&name) => self.add_bytes(name, OutputKind::Text, text)?,
                Source::Open(file) => self.add_binary(name, file, identity, executable)?,
                Source::At(path) => self.add_tree_file(name, &path, identity, executable)?,
                Source::Directory => self.add_bytes(name, OutputKind::Directory, b"")?,
                Source::Link(target) => self.add_bytes(name, OutputKind::Link, target.as_bytes())?,
            };
            outputs.push(Output { permissions, ..output });
        }
        let mut spool = self.encoder.map(zstd::Encoder::finish).transpose()?;
        if let Some(spool) = spool.as_mut() {
            spool.seek(SeekFrom::Start(0))?;
        }
        let digest = self.hasher.finalize().into();
        Ok(Packed { outputs, digest, found: self.found, replaced: self.replaced, spool })
    }

    /// Adds what is at hand: a text, a link's text, or nothing for a directory. It goes into the result itself, while
    /// that has room.
    fn add_bytes(&mut self, name: String, kind: OutputKind, bytes: &[u8]) -> Result<Output, NotStorable> {
        let digest = Digest::of(bytes);
        let size_bytes = bytes.len() as u64;
        let inline = match self.inline_left_bytes.checked_sub(size_bytes) {
            Some(left_bytes) => {
                self.inline_left_bytes = left_bytes;
                Some(bytes.to_vec().into())
            }
            None => {
                self.write(bytes)?;
                if let Some(tier) = self.stores.tier {
                    super::restore::keep_bytes(tier, bytes, &digest, self.stores.memo)?;
                }
                None
            }
        };
        Ok(Output { name, kind, executable: false, digest, size_bytes, permissions: None, inline })
    }

    /// Adds a file of a build script's: as text with variables, where it names a root and is text.
    fn add_tree_file(
        &mut self,
        name: String,
        path: &Path,
        identity: Identity,
        executable: bool,
    ) -> Result<Output, NotStorable> {
        let mut file = File::open(path).map_err(|_| NotStorable::MissingOutput)?;
        if Identity::of(&file.metadata()?) != identity {
            return Err(NotStorable::OutputChanged);
        }
        if identity.size_bytes <= tree::MAX_TEXT_BYTES {
            let mut content = Vec::new();
            file.read_to_end(&mut content)?;
            file.seek(SeekFrom::Start(0))?;
            if name.ends_with(".rs") {
                script::check_clock(&content, self.started_ns)?;
            }
            let roots = self.unit.roots.found_in(&content);
            self.found.extend(self.unit.roots.parents_found_in(&content));
            let normalised = self.unit.roots.normalise(&content).ok();
            if let Some(text) =
                normalised.filter(|text| *text != content && std::str::from_utf8(&content).is_ok())
            {
                self.found.extend(self.unit.roots.found_in(&text));
                self.replaced.extend(roots);
                return Ok(Output { executable, ..self.add_bytes(name, OutputKind::Text, &text)? });
            }
        }
        self.add_binary(name, file, identity, executable)
    }

    fn add_binary(
        &mut self,
        name: String,
        mut file: File,
        identity: Identity,
        executable: bool,
    ) -> Result<Output, NotStorable> {
        let link = self
            .stores
            .tier
            .filter(|_| self.is_traced && self.unit.is_only_replaced(&name))
            .and_then(|tier| tier.stage_link(&file).ok());
        let mut copy = match (self.stores.tier, &link) {
            (Some(tier), None) => Some(tier.stage()?),
            _ => None,
        };
        let digest = self.read_chunks(&mut file, copy.as_mut())?;
        let object = link.or_else(|| copy.map(NamedTempFile::into_temp_path));
        let mut after = Identity::of(&file.metadata()?);
        if !after.same_content_times(&identity) {
            // Cargo sets the mtime of what it has checked. The content must be what was read.
            after = self.confirm(&mut file, &digest)?;
        }
        // An object may be the same file, and keeping it gives that another ctime.
        self.stores.memo.remember(after, digest);
        if let (Some(tier), Some(object)) = (self.stores.tier, object) {
            tier.keep_object(object, &digest, self.stores.memo)?;
        }
        Ok(Output {
            name,
            kind: OutputKind::Binary,
            executable,
            digest,
            size_bytes: identity.size_bytes,
            permissions: None,
            inline: None,
        })
    }

    /// Reads a file again whose times have changed while it was read; its identity, if its content has not.
    fn confirm(&self, file: &mut File, digest: &Digest) -> Result<Identity, NotStorable> {
        let before = Identity::of(&file.metadata()?);
        file.seek(SeekFrom::Start(0))?;
        let present = Digest::from(blake3::Hasher::new().update_reader(&*file)?.finalize());
        let after = Identity::of(&file.metadata()?);
        if present == *digest && after.same_content_times(&before) {
            Ok(after)
        } else {
            Err(NotStorable::OutputChanged)
        }
    }

    fn read_chunks(&mut self, file: &mut File, mut object: Option<&mut NamedTempFile>) -> io::Result<Digest> {
        let overlap = self.unit.roots.iter().map(|(_, path)| path.len() + 1).max().unwrap_or_default();
        let mut hasher = blake3::Hasher::new();
        // A chunk stands behind the end of the one before it, so that no path is cut in two.
        let mut buffer = vec![0; overlap + CHUNK_BYTES];
        let mut carried = 0;
        loop {
            let count = file.read(&mut buffer[carried..])?;
            if count == 0 {
                return Ok(hasher.finalize().into());
            }
            let chunk = &buffer[carried..carried + count];
            hasher.update(chunk);
            self.write(chunk)?;
            if let Some(object) = object.as_mut() {
                object.write_all(chunk)?;
            }
            let filled = carried + count;
            for root in self.unit.roots.found_in(&buffer[..filled]) {
                if !self.found.contains(&root) {
                    self.found.push(root);
                }
            }
            carried = filled.min(overlap);
            buffer.copy_within(filled - carried..filled, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifications_are_no_diagnostics() {
        let artifact = "{\"$message_type\":\"artifact\",\"artifact\":\"/x\",\"emit\":\"link\"}\n";
        assert!(!has_diagnostics(b""));
        assert!(!has_diagnostics(artifact.as_bytes()));
        let diagnostic = format!("{artifact}{{\"$message_type\":\"diagnostic\"}}\n");
        assert!(has_diagnostics(diagnostic.as_bytes()));
    }
}
