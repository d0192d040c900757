//! The floor: a wrapper that links back what a compiler once left under the same file names, and looks at nothing else.
//! No cache can be faster and still start the wrapper.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Names the directory of what was recorded, and makes this program the wrapper.
pub const FLOOR_VARIABLE: &str = "CACHEC_BENCH_FLOOR";

/// Replays a unit's compiler, or runs and records it.
///
/// # Errors
/// Those of the file system.
pub fn replay(store: &Path, words: &[OsString]) -> io::Result<ExitCode> {
    let (compiler, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(compiler);
    command.args(arguments);
    let Some(unit) = Unit::of(arguments) else {
        return Ok(code(command.status()?.code()));
    };
    let entry = store.join(&unit.name);
    if let Ok(files) = fs::read_dir(entry.join("files")) {
        for file in files {
            let file = file?;
            let destination = unit.directory.join(file.file_name());
            let _ = fs::remove_file(&destination);
            fs::hard_link(file.path(), destination)?;
        }
        io::stderr().write_all(&fs::read(entry.join("stderr"))?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let output = command.output()?;
    io::stdout().write_all(&output.stdout)?;
    io::stderr().write_all(&output.stderr)?;
    if output.status.success() {
        fs::create_dir_all(entry.join("files"))?;
        fs::write(entry.join("stderr"), &output.stderr)?;
        for file in fs::read_dir(&unit.directory)? {
            let file = file?;
            let name = file.file_name();
            if name.to_string_lossy().contains(&unit.suffix) && file.file_type()?.is_file() {
                fs::hard_link(file.path(), entry.join("files").join(name))?;
            }
        }
    }
    Ok(code(output.status.code()))
}

struct Unit {
    name: String,
    suffix: String,
    directory: PathBuf,
}

impl Unit {
    /// What cargo compiles into a directory under a name of its own.
    fn of(arguments: &[OsString]) -> Option<Self> {
        let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
        let after = |flag: &str| words.iter().skip_while(|word| *word != flag).nth(1);
        let suffix = words.iter().find_map(|word| word.strip_prefix("extra-filename="))?;
        let name = format!("{}{suffix}", after("--crate-name")?);
        Some(Self { name, suffix: suffix.to_owned(), directory: after("--out-dir")?.to_string().into() })
    }
}

fn code(code: Option<i32>) -> ExitCode {
    code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
