//! The compiler's standard output and error: passed on live, recorded for the cache, replayed on a hit.
//!
//! Roots are remapped in what the compiler writes to files; in what it says to people and to cargo the
//! real paths are put back, line by line, so that a build through cachec reads like one without.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Command, ExitStatus, Stdio};

use cachec_protocol::result::MAX_STREAM_BYTES;
use cachec_protocol::{Root, Roots};

use crate::ipc::Hit;
use crate::tracer::{Places, Trace, Tracer};
use crate::unit::REMAPPED;

/// What a recorded run wrote; `None` where it was too long to store.
pub(crate) struct Recorded {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Option<Vec<u8>>,
    pub(crate) stderr: Option<Vec<u8>>,
    /// What it was seen to do; `None` where it was not, or could not be traced.
    pub(crate) trace: Option<Trace>,
}

/// Runs the compiler, traced where there are places to trace it with; its streams go to this process's own
/// as they come, and are recorded.
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
    let copy = |source: Option<&mut dyn Read>, target: &mut dyn Write| match source {
        Some(source) => translator.pass_on(source, target),
        None => Ok(None),
    };
    let (stdout, stderr) = std::thread::scope(|scope| {
        let mut stdout = stdout;
        let mut stderr = stderr;
        let first = scope
            .spawn(move || copy(stdout.as_mut().map(|source| source as &mut dyn Read), &mut io::stdout()));
        let second = copy(stderr.as_mut().map(|source| source as &mut dyn Read), &mut io::stderr());
        (first.join().unwrap_or_else(|_| Err(io::Error::other("a reader panicked"))), second)
    });
    let status = child.wait()?;
    // Where the reader of this process's output is gone, nobody misses the rest.
    let trace = tracer.and_then(Tracer::finish);
    Ok(Recorded { status, stdout: stdout.unwrap_or_default(), stderr: stderr.unwrap_or_default(), trace })
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

/// Puts real paths in place of remapped ones.
struct Translator {
    remapped: Roots,
    real: Roots,
}

impl Translator {
    /// Reads the remappings from the compiler's own arguments.
    fn new(arguments: &[Vec<u8>]) -> Self {
        let real = Roots::new(arguments.iter().filter_map(|argument| {
            let mapping = argument.strip_prefix(b"--remap-path-prefix=")?;
            let equals = mapping.iter().rposition(|byte| *byte == b'=')?;
            let name = mapping[equals + 1..].strip_prefix(REMAPPED.as_bytes())?.strip_prefix(b"/")?;
            Some((Root::from_name(name)?, mapping[..equals].to_vec()))
        }));
        let remapped = Roots::new(
            real.iter().map(|(root, _)| (root, format!("{REMAPPED}/{}", root.name()).into_bytes())),
        );
        Self { remapped, real }
    }

    fn line(&self, line: Vec<u8>) -> Vec<u8> {
        if memchr::memmem::find(&line, REMAPPED.as_bytes()).is_none() {
            return line;
        }
        match self.remapped.normalise(&line).and_then(|marked| self.real.expand(&marked)) {
            Ok(translated) => translated,
            Err(_) => line,
        }
    }

    /// Copies a stream line by line; the recording, unless it is too long.
    fn pass_on(&self, source: &mut dyn Read, target: &mut dyn Write) -> io::Result<Option<Vec<u8>>> {
        let mut source = BufReader::with_capacity(64 << 10, source);
        let mut recording = Some(Vec::new());
        let mut failure = None;
        loop {
            let mut line = Vec::new();
            if source.read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let line = self.line(line);
            // After a failure the compiler's output is still taken, or it would wait for ever.
            if failure.is_none() {
                failure = target.write_all(&line).and_then(|()| target.flush()).err();
            }
            recording = recording.filter(|kept: &Vec<u8>| kept.len() + line.len() <= MAX_STREAM_BYTES);
            if let Some(kept) = recording.as_mut() {
                kept.extend_from_slice(&line);
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(recording),
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
        let mut passed = Vec::new();
        let said =
            format!("--> {REMAPPED}/workspace/src/a.rs:1\n{REMAPPED}/workspaces \"{REMAPPED}/home/x\"\nlast");
        let recorded = translator().pass_on(&mut said.as_bytes(), &mut passed).unwrap().unwrap();
        let expected = format!("--> /home/ann/shop/src/a.rs:1\n{REMAPPED}/workspaces \"/home/ann/x\"\nlast");
        assert_eq!(String::from_utf8(passed).unwrap(), expected);
        assert_eq!(recorded, expected.into_bytes());
    }

    #[test]
    fn a_stream_that_is_too_long_is_passed_on_and_not_recorded() {
        let said = vec![b'\n'; MAX_STREAM_BYTES + 1];
        let mut passed = Vec::new();
        assert_eq!(translator().pass_on(&mut said.as_slice(), &mut passed).unwrap(), None);
        assert_eq!(passed.len(), said.len());
    }
}
