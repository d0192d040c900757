//! The compiler's standard output and error: passed on live, recorded for the cache, replayed on a hit.
//!
//! Roots are remapped in what the compiler writes to files; in what it says to people and to cargo the
//! real paths are put back, line by line, so that a build through cachec reads like one without.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Command, ExitStatus, Stdio};

use cachec_protocol::Root;
use cachec_protocol::result::MAX_STREAM_BYTES;

use crate::ipc::Hit;
use crate::tracer::{Places, Trace, Tracer};
use crate::unit::REMAPPED;

/// How rustc begins the line that tells cargo of a finished file (`--json=artifacts`).
pub(crate) const ARTIFACT_NOTIFICATION: &[u8] = b"{\"$message_type\":\"artifact\"";

/// What a recorded run wrote; `None` where it was too long to store.
pub(crate) struct Recorded {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Option<Vec<u8>>,
    pub(crate) stderr: Option<Vec<u8>>,
    /// What it was seen to do; `None` where it was not, or could not be traced.
    pub(crate) trace: Option<Trace>,
    /// Whether it failed under remapped paths before cargo has heard anything of it.
    pub(crate) failed_unheard: bool,
}

impl Recorded {
    /// A run whose streams were the wrapper's own.
    pub(crate) fn unrecorded(status: ExitStatus) -> Self {
        Self { status, stdout: None, stderr: None, trace: None, failed_unheard: false }
    }
}

/// Runs the compiler, traced where there are places to trace it with; its streams go to this process's own
/// as they come, and are recorded. Under remapped paths they are held back until the first file is finished:
/// `include_str!(file!())` finds nothing there, and a run that fails is to be repeated as if nothing had
/// happened.
///
/// # Errors
/// Where it cannot be started, or its streams cannot be passed on.
pub(crate) fn run_recorded(
    command: &mut Command,
    arguments: &[Vec<u8>],
    places: Option<Places>,
) -> io::Result<Recorded> {
    let mut tracer = places.and_then(|places| Tracer::prepare(command, places).ok());
    let started = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    if let Some(tracer) = tracer.as_mut() {
        tracer.started();
    }
    let mut child = match started {
        Ok(child) => child,
        Err(error) => {
            tracer.and_then(Tracer::finish);
            return Err(error);
        }
    };
    let translator = Translator::new(arguments);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = std::thread::scope(|scope| {
        let copy = |source: Option<&mut dyn Read>, target: &mut dyn Write| match source {
            Some(source) => translator.pass_on(source, target),
            None => Ok(Passed::default()),
        };
        let (mut stdout, mut stderr) = (stdout, stderr);
        let first = scope
            .spawn(move || copy(stdout.as_mut().map(|source| source as &mut dyn Read), &mut io::stdout()));
        let second = copy(stderr.as_mut().map(|source| source as &mut dyn Read), &mut io::stderr());
        (first.join().unwrap_or_else(|_| Err(io::Error::other("a reader panicked"))), second)
    });
    let status = child.wait()?;
    let trace = tracer.and_then(Tracer::finish);
    // Where the reader of this process's output is gone, nobody misses the rest.
    let (stdout, stderr) = (stdout.unwrap_or_default(), stderr.unwrap_or_default());
    // Paths are not to blame for a signal.
    let failed = status.code().is_some_and(|code| code != 0);
    let failed_unheard = failed && !translator.is_empty() && !stdout.heard && !stderr.heard;
    if !failed_unheard {
        let _ = io::stdout().write_all(&stdout.held);
        let _ = io::stderr().write_all(&stderr.held);
    }
    Ok(Recorded { status, stdout: stdout.recording, stderr: stderr.recording, trace, failed_unheard })
}

/// Writes a stored result's streams.
///
/// # Errors
/// Where cargo is gone.
pub(crate) fn replay(hit: &Hit) -> io::Result<()> {
    io::stdout().write_all(&hit.stdout)?;
    io::stdout().flush()?;
    io::stderr().write_all(&hit.stderr)
}

/// What became of a stream.
#[derive(Debug, Default)]
struct Passed {
    /// All of it, unless it was too long.
    recording: Option<Vec<u8>>,
    /// What was not passed on yet.
    held: Vec<u8>,
    /// Whether anything was passed on.
    heard: bool,
}

/// Puts real paths in place of remapped ones.
struct Translator {
    /// Remapped and real path of each root.
    paths: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Translator {
    /// Reads the remappings from the compiler's own arguments.
    fn new(arguments: &[Vec<u8>]) -> Self {
        let prefix = [REMAPPED.as_bytes(), b"/"].concat();
        let paths = arguments.iter().filter_map(|argument| {
            let mapping = argument.strip_prefix(b"--remap-path-prefix=")?;
            let equals = mapping.iter().rposition(|byte| *byte == b'=')?;
            let (real, remapped) = (&mapping[..equals], &mapping[equals + 1..]);
            Root::from_name(remapped.strip_prefix(prefix.as_slice())?)?;
            Some((remapped.to_vec(), real.to_vec()))
        });
        Self { paths: paths.collect() }
    }

    fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// Replaces remapped paths wherever they stand: in coloured text a letter of an escape sequence is right
    /// before them.
    fn line(&self, line: Vec<u8>) -> Vec<u8> {
        self.paths.iter().fold(line, |line, (remapped, real)| {
            let mut translated = Vec::new();
            let mut copied = 0;
            for at in memchr::memmem::find_iter(&line, remapped) {
                let end = at + remapped.len();
                let ends =
                    line.get(end).is_none_or(|byte| !byte.is_ascii_alphanumeric() && !b"_-.".contains(byte));
                if ends {
                    translated.extend_from_slice(&line[copied..at]);
                    translated.extend_from_slice(real);
                    copied = end;
                }
            }
            translated.extend_from_slice(&line[copied..]);
            translated
        })
    }

    /// Copies a stream line by line.
    fn pass_on(&self, source: &mut dyn Read, target: &mut dyn Write) -> io::Result<Passed> {
        let mut source = BufReader::with_capacity(64 << 10, source);
        let mut passed = Passed { recording: Some(Vec::new()), held: Vec::new(), heard: self.is_empty() };
        let mut failure = None;
        loop {
            let mut line = Vec::new();
            if source.read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let line = self.line(line);
            passed.record(&line);
            passed.held.extend_from_slice(&line);
            let may_hold = passed.held.len() <= MAX_STREAM_BYTES;
            if !passed.heard && may_hold && !tells_of_success(&line) {
                continue;
            }
            // After a failure the compiler's output is still taken, or it would wait for ever.
            if failure.is_none() {
                failure = target.write_all(&passed.held).and_then(|()| target.flush()).err();
            }
            passed.held.clear();
            passed.heard = true;
        }
        failure.map_or(Ok(passed), Err)
    }
}

/// Whether a line tells cargo of metadata or of a linked file. Dep-info comes before the last errors.
fn tells_of_success(line: &[u8]) -> bool {
    let emits: [&[u8]; 2] = [b"\"emit\":\"metadata\"", b"\"emit\":\"link\""];
    line.starts_with(ARTIFACT_NOTIFICATION)
        && emits.iter().any(|emit| memchr::memmem::find(line, emit).is_some())
}

impl Passed {
    fn record(&mut self, line: &[u8]) {
        if self.recording.as_ref().is_some_and(|kept| kept.len() + line.len() > MAX_STREAM_BYTES) {
            self.recording = None;
        }
        if let Some(kept) = self.recording.as_mut() {
            kept.extend_from_slice(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translator() -> Translator {
        Translator::new(&[
            format!("--remap-path-prefix=/home/ann={REMAPPED}/home").into_bytes(),
            format!("--remap-path-prefix=/home/ann/shop={REMAPPED}/workspace").into_bytes(),
            b"--remap-path-prefix=/other=/elsewhere".to_vec(),
        ])
    }

    #[test]
    fn real_paths_are_put_back_in_what_the_compiler_says() {
        let said = format!(
            "\u{1b}[0m{REMAPPED}/workspace/src/a.rs:1 {REMAPPED}/workspaces \"{REMAPPED}/home/x\" {REMAPPED}/home"
        );
        let expected =
            format!("\u{1b}[0m/home/ann/shop/src/a.rs:1 {REMAPPED}/workspaces \"/home/ann/x\" /home/ann");
        assert_eq!(String::from_utf8(translator().line(said.into_bytes())).unwrap(), expected);
    }

    #[test]
    fn what_is_said_is_held_back_until_a_file_is_finished() {
        let notification = String::from_utf8_lossy(ARTIFACT_NOTIFICATION);
        let said = format!("warning\n{notification},\"emit\":\"metadata\"}}\nlast");
        let mut passed_on = Vec::new();
        let passed = translator().pass_on(&mut said.as_bytes(), &mut passed_on).unwrap();
        assert!(passed.heard && passed.held.is_empty());
        assert_eq!(passed_on, said.as_bytes());
        assert_eq!(passed.recording.unwrap(), said.as_bytes());
        let failed = format!("{notification},\"emit\":\"dep-info\"}}\nerror\n");
        let mut passed_on = Vec::new();
        let passed = translator().pass_on(&mut failed.as_bytes(), &mut passed_on).unwrap();
        assert!(!passed.heard && passed_on.is_empty());
        assert_eq!(passed.held, failed.as_bytes());
    }

    #[test]
    fn a_stream_that_is_too_long_is_passed_on_and_not_recorded() {
        let said = vec![b'\n'; MAX_STREAM_BYTES + 1];
        let mut passed_on = Vec::new();
        let passed = Translator::new(&[]).pass_on(&mut said.as_slice(), &mut passed_on).unwrap();
        assert_eq!(passed.recording, None);
        assert_eq!(passed_on.len(), said.len());
        // Nor is it held back for ever.
        let mut passed_on = Vec::new();
        let passed = translator().pass_on(&mut said.as_slice(), &mut passed_on).unwrap();
        assert!(passed.heard && passed_on.len() == said.len());
    }
}
