//! Real programs built twice without cachec and once from its cache: where the two plain builds agree byte
//! for byte, the restored one must agree too.
//!
//! Paths are exact here (`CACHEC_PATHS=exact`), so that even debug information is compared with plain
//! cargo's. All builds use the same target path.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context;
use comfy_table::{Table, presets};

use crate::tier::files_below;
use crate::{Build, Machine, crates};

/// Programs of different nature: C dependencies, many proc macros, large graphs.
const PROGRAMS: &[&str] = &[
    "ripgrep@15.2.0",
    "fd-find@10.5.0",
    "hyperfine@1.20.0",
    "bat@0.26.1",
    "eza@0.23.5",
    "tokei@15.0.0",
    "just@1.59.0",
    "zoxide@0.10.0",
    "sd@1.0.0",
    "hexyl@0.17.0",
    "du-dust@1.2.7",
    "typos-cli@1.52.0",
];

/// Runs the comparison for some programs (`name@version`), or a list of twelve.
///
/// # Errors
/// Where a build fails, or a restored file differs.
pub fn run(programs: &[String], command: &str) -> anyhow::Result<()> {
    let default: Vec<String> = PROGRAMS.iter().map(|&name| name.to_owned()).collect();
    let programs = if programs.is_empty() { &default } else { programs };
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "program",
        "plain s",
        "cold s",
        "warm s",
        "units",
        "hits",
        "C tools plain / warm",
        "rustc warm",
        "bound",
        "not stored",
        "files",
        "plain differ",
        "warm differ",
    ]);
    let mut failures = Vec::new();
    for program in programs {
        eprintln!("==> {program}");
        match compare(program, command) {
            Ok((row, differing)) => {
                table.add_row(row);
                failures.extend(differing.into_iter().map(|file| format!("{program}: {file}")));
            }
            Err(error) => failures.push(format!("{program}: {error:#}")),
        }
        println!("{table}");
    }
    anyhow::ensure!(failures.is_empty(), "restored builds differ from plain ones:\n{}", failures.join("\n"));
    Ok(())
}

fn compare(program: &str, command: &str) -> anyhow::Result<(Vec<String>, Vec<String>)> {
    let (name, version) = crates::name_and_version(program)?;
    let directory = tempfile::Builder::new().prefix("differential-").tempdir()?;
    let sources = directory.path().join(name);
    crates::unpack(name, version, &sources)?;
    let mut machine = Machine::new()?.with_crates()?.with("CACHEC_PATHS", "exact");
    machine.note_tools()?;
    let target = sources.join("target");
    let build = |variables: &[(&str, &str)]| -> anyhow::Result<(Build, BTreeMap<String, String>)> {
        let build = machine.cargo_shown(&sources, &[command, "--quiet", "--locked"], variables)?;
        anyhow::ensure!(build.success, "the build failed");
        let files = digests(&target)?;
        Ok((build, files))
    };
    let wipe = || fs::remove_dir_all(&target).context("the target directory");
    let (first, plain) = build(&[("RUSTC_WRAPPER", "")])?;
    wipe()?;
    let (_, again) = build(&[("RUSTC_WRAPPER", "")])?;
    wipe()?;
    let (cold, _) = build(&[])?;
    machine.cachec(&sources, &["stop"])?;
    let stored = machine.statistics(&sources)?;
    wipe()?;
    let (warm, restored) = build(&[])?;
    let statistics = machine.statistics(&sources)?;
    let (fresh, _) = build(&[])?;
    anyhow::ensure!(fresh.compiled.is_empty(), "compiled after a restored build: {:?}", fresh.compiled);
    let agreeing: Vec<&String> = plain
        .iter()
        .filter(|(file, digest)| again.get(*file) == Some(*digest))
        .map(|(file, _)| file)
        .collect();
    let differing: Vec<String> = agreeing
        .iter()
        .filter(|file| restored.get(**file) != plain.get(**file))
        .map(|file| (*file).clone())
        .collect();
    let number = |name: &str| statistics[name].as_u64().unwrap_or_default();
    if number("misses") > 0 {
        let (changed, failed) = (&statistics["changed_inputs"], number("failed_restores"));
        eprintln!("misses: compiled {:?}; changed inputs {changed}; failed restores {failed}", warm.compiled);
    }
    let row = vec![
        program.to_owned(),
        format!("{:.1}", first.elapsed.as_secs_f64()),
        format!("{:.1}", cold.elapsed.as_secs_f64()),
        format!("{:.1}", warm.elapsed.as_secs_f64()),
        number("units").to_string(),
        number("local_hits").to_string(),
        format!("{} / {}", first.tools, warm.tools),
        (warm.compiled.len() + warm.probes).to_string(),
        stored["bound"].to_string(),
        stored["not_stored"].to_string(),
        plain.len().to_string(),
        (plain.len() - agreeing.len()).to_string(),
        differing.len().to_string(),
    ];
    Ok((row, differing))
}

/// Digests of what compilers and build scripts have left below a target directory, not of what cargo notes. Where a
/// build script's program has a launcher in its place, the program kept beside it counts.
fn digests(target: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let mut digests = BTreeMap::new();
    for file in files_below(target)? {
        let name = file.strip_prefix(target)?.to_string_lossy().into_owned();
        let is_made = name.contains("/deps/") || name.contains("/build/");
        let file_name = name.rsplit('/').next().unwrap_or_default();
        // Cargo's own notes, its link to a script's program, and the program where it is kept.
        let is_noted = ["output", "root-output", "stderr", "invoked.timestamp"].contains(&file_name)
            && !name.contains("/out/");
        let is_other_name = file_name.starts_with("build-script-") || file_name.ends_with(".cachec");
        if is_made && !is_noted && !is_other_name {
            let crate_name = file_name.split('-').next().unwrap_or_default();
            let kept = file.with_file_name(format!("{crate_name}.cachec"));
            let file = if !file_name.contains('.') && kept.exists() { kept } else { file };
            let content = match fs::read_link(&file) {
                Ok(target) => target.into_os_string().into_encoded_bytes(),
                Err(_) => fs::read(&file)?,
            };
            digests.insert(name, cachec_protocol::Digest::of(&content).to_string());
        }
    }
    Ok(digests)
}
