//! A build machine: a home, a `CARGO_HOME`, an agent and perhaps a local tier, all below one directory.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;
use tempfile::TempDir;

use crate::crates;
use crate::programs::{cargo, programs};

/// What a compiler notes that is asked for something else than a unit.
const PROBE: &str = "?";

/// What a tool notes.
const TOOL: &str = "!";

/// Linux's value on every architecture cachec runs on.
const O_NONBLOCK: i32 = 0o4000;

/// See the module. Its agent is stopped when it is dropped.
#[derive(Debug)]
pub struct Machine {
    directory: TempDir,
    /// The pipe that compilers note their units to.
    noted: File,
    /// Variables on top of the fixed ones.
    variables: Vec<(String, String)>,
}

/// One run of cargo.
#[derive(Debug)]
pub struct Build {
    /// Whether it succeeded.
    pub success: bool,
    /// Cargo's standard output.
    pub stdout: String,
    /// Cargo's standard error.
    pub stderr: String,
    /// How long it took.
    pub elapsed: Duration,
    /// The units whose compiler was started, by crate, as the compiler itself has noted them.
    pub compiled: Vec<String>,
    /// How often a compiler was started to be asked something.
    pub probes: usize,
    /// How often a tool of [`Machine::note_tools`] was started.
    pub tools: usize,
}

impl Build {
    /// The lines that cachec printed.
    #[must_use]
    pub fn notices(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| line.starts_with("cachec: ")).collect()
    }

    /// Cargo's standard error without its lines about progress, which name times and places.
    #[must_use]
    pub fn diagnostics(&self) -> String {
        let progress = ["Compiling ", "Finished ", "Checking ", "Locking ", "Fresh ", "Dirty ", "Running "];
        let is_progress = |line: &&str| progress.iter().any(|word| line.trim_start().starts_with(word));
        self.stderr.lines().filter(|line| !is_progress(line)).map(|line| format!("{line}\n")).collect()
    }
}

impl Machine {
    /// A new machine with a local tier and no server.
    ///
    /// # Errors
    /// Where its directories cannot be made.
    pub fn new() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("machine-").tempdir()?;
        for part in ["home", "cargo", "bin", "tmp"] {
            fs::create_dir(directory.path().join(part))?;
        }
        let pipe = directory.path().join("compiled");
        anyhow::ensure!(Command::new("mkfifo").arg(&pipe).status()?.success(), "no pipe can be made");
        let noted = File::options().read(true).write(true).custom_flags(O_NONBLOCK).open(pipe)?;
        let machine = Self { directory, noted, variables: Vec::new() };
        machine.install_noting_compiler()?;
        let tier = machine.path("tier");
        Ok(machine.with("CACHEC_DIR", tier.to_string_lossy()).with("CARGO_INCREMENTAL", "0"))
    }

    /// A new machine as a container is: no local tier, but a server.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_server(url: &str) -> anyhow::Result<Self> {
        Ok(Self::new()?.without("CACHEC_DIR").with("CI", "true").with("CACHEC_URL", url))
    }

    /// Sets a variable.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl AsRef<str>) -> Self {
        self = self.without(name);
        self.variables.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Uses the packages that the user who runs this has fetched.
    ///
    /// # Errors
    /// Where there is no home directory.
    pub fn with_crates(self) -> anyhow::Result<Self> {
        Ok(self.with("CARGO_HOME", crates::cargo_home()?.to_string_lossy()))
    }

    /// Sets a variable for what follows.
    pub fn set(&mut self, name: &str, value: impl AsRef<str>) {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value.as_ref().to_owned()));
    }

    /// Unsets a variable.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.variables.retain(|(known, _)| known != name);
        self
    }

    /// A path below the machine's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A `rustc` that notes each unit it is started for, and is otherwise the real one.
    fn install_noting_compiler(&self) -> anyhow::Result<()> {
        let compiler = real_compiler()?;
        // The same text on every machine: it is part of the compiler's identity.
        let text = format!(
            "#!/bin/sh\nprevious=\nnoted={PROBE}\nfor word in \"$@\"; do\n  \
             [ \"$previous\" = --crate-name ] && [ \"$word\" != ___ ] && noted=$word\n  \
             previous=$word\ndone\necho \"$noted\" >> \"$HOME/../compiled\"\nexec {} \"$@\"\n",
            compiler.display(),
        );
        write_script(&self.path("bin/rustc"), &text)
    }

    /// Has the tools that build C code note each start, too.
    ///
    /// # Errors
    /// Where the scripts cannot be written.
    pub fn note_tools(&mut self) -> anyhow::Result<()> {
        let directory = self.path("tools");
        fs::create_dir(&directory)?;
        let path = std::env::var("PATH")?;
        for tool in ["cc", "c++", "gcc", "g++", "clang", "clang++", "ar", "ld", "cmake", "make", "perl"] {
            let found =
                std::env::split_paths(&path).map(|directory| directory.join(tool)).find(|path| path.exists());
            let Some(real) = found else { continue };
            let text =
                format!("#!/bin/sh\necho {TOOL} >> \"$HOME/../compiled\"\nexec {} \"$@\"\n", real.display());
            write_script(&directory.join(tool), &text)?;
        }
        self.set("PATH", format!("{}:{path}", directory.display()));
        Ok(())
    }

    /// What compilers have noted since the last call. They write to a pipe, which the tracer knows to be
    /// no file; it is held open so that none of them waits for a reader.
    fn take_noted(&self) -> anyhow::Result<String> {
        let mut noted = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match (&self.noted).read(&mut buffer) {
                Ok(count) => noted.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(String::from_utf8(noted)?);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Makes the compiler another one, by its content.
    ///
    /// # Errors
    /// Where the script cannot be written.
    pub fn change_compiler(&self) -> anyhow::Result<()> {
        let script = self.path("bin/rustc");
        let text = fs::read_to_string(&script)?;
        fs::write(&script, text + "# another version\n")?;
        Ok(())
    }

    /// A command with the machine's environment, and no other.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let keep = ["PATH", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN"];
        let rustup_home = std::env::var("RUSTUP_HOME")
            .or_else(|_| std::env::var("HOME").map(|home| format!("{home}/.rustup")))
            .unwrap_or_default();
        let mut command = Command::new(program);
        command
            .env_clear()
            .envs(std::env::vars().filter(|(name, _)| keep.contains(&name.as_str())))
            .env("RUSTUP_HOME", rustup_home)
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"))
            .env("CARGO_HOME", self.path("cargo"))
            .env("CARGO_NET_OFFLINE", "true")
            .env("CARGO_TERM_COLOR", "never")
            .env("COMPILED", self.path("compiled"))
            .env("RUSTC", self.path("bin/rustc"))
            .env("RUSTC_WRAPPER", &programs().client)
            .env("CACHEC_RUNTIME_DIR", self.path("run"))
            .envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs cargo in a directory.
    ///
    /// # Errors
    /// Where cargo cannot be started; its own failure is in the result.
    pub fn cargo(&self, directory: &Path, arguments: &[&str]) -> anyhow::Result<Build> {
        let mut command = self.command(&cargo());
        command.args(arguments).current_dir(directory);
        self.run(|| Ok(command.output()?))
    }

    /// As [`Self::cargo`] with more variables, showing cargo's progress as it comes.
    ///
    /// # Errors
    /// As [`Self::cargo`].
    pub fn cargo_shown(
        &self,
        directory: &Path,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> anyhow::Result<Build> {
        let mut command = self.command(&cargo());
        command.args(arguments).current_dir(directory).envs(variables.iter().copied());
        self.run(|| {
            let status = command.status()?;
            Ok(Output { status, stdout: Vec::new(), stderr: Vec::new() })
        })
    }

    /// Ends the machine's agents and removes all that was stored on it.
    ///
    /// # Errors
    /// Where something cannot be removed.
    pub fn reset(&self) -> anyhow::Result<()> {
        self.signal_agents("KILL");
        for part in ["home", "tmp", "run", "tier"] {
            match fs::remove_dir_all(self.path(part)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        fs::create_dir(self.path("home"))?;
        Ok(fs::create_dir(self.path("tmp"))?)
    }

    /// Observes one run of cargo.
    ///
    /// # Errors
    /// Where it cannot be started.
    pub fn run(&self, cargo: impl FnOnce() -> anyhow::Result<Output>) -> anyhow::Result<Build> {
        let started = Instant::now();
        let Output { status, stdout, stderr } = cargo().context("cargo")?;
        let compiled = self.take_noted()?;
        let count = |what: &str| compiled.lines().filter(|noted| *noted == what).count();
        let (probes, tools) = (count(PROBE), count(TOOL));
        let units = compiled.lines().filter(|noted| ![PROBE, TOOL].contains(noted));
        let mut compiled: Vec<String> = units.map(str::to_owned).collect();
        compiled.sort_unstable();
        Ok(Build {
            success: status.success(),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            elapsed: started.elapsed(),
            compiled,
            probes,
            tools,
        })
    }

    /// Runs a command of the client in a directory and returns its standard output.
    ///
    /// # Errors
    /// Where it fails.
    pub fn cachec(&self, directory: &Path, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.command(&programs().client).args(arguments).current_dir(directory).output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        anyhow::ensure!(output.status.success(), "cachec {arguments:?}: {error}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The agent's statistics.
    ///
    /// # Errors
    /// Where there is no agent.
    pub fn statistics(&self, directory: &Path) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.cachec(directory, &["stats", "--json"])?)?)
    }

    /// Process ids of the machine's agents.
    #[must_use]
    pub fn agents(&self) -> Vec<u32> {
        let marker = self.path("run").to_string_lossy().into_owned();
        let own = |id: &u32| {
            let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
            let words = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            words.ends_with(b"\0agent\0") && String::from_utf8_lossy(&environment).contains(&marker)
        };
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(own).collect()
    }

    /// Sends a signal (`KILL`, `STOP`) to all of the machine's agents.
    pub fn signal_agents(&self, signal: &str) {
        for id in self.agents() {
            let _ = Command::new("kill").args([&format!("-{signal}"), &id.to_string()]).status();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.signal_agents("KILL");
    }
}

fn write_script(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(())
}

/// The compiler itself, behind rustup's proxy.
///
/// # Errors
/// Where there is none.
pub fn real_compiler() -> anyhow::Result<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().context("rustc")?;
    Ok(Path::new(String::from_utf8(output.stdout)?.trim()).join("bin/rustc"))
}

/// Highest resident set of a process so far, in bytes.
///
/// # Errors
/// Where there is no such process.
pub fn peak_memory_bytes(process_id: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process_id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kib * 1024)
}
