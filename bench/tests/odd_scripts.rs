//! Build scripts that nobody should write: with cachec as without it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cachec_bench::programs::cargo;
use cachec_bench::{Case, Machine, Project};

const QUIET_APP: &str = "fn main() { println!(\"app\"); }\n";

/// A program with a build script of this body; `out` is `OUT_DIR` in it.
fn case(body: &str) -> Result<Case> {
    let case = Case::new(QUIET_APP, &[])?;
    let script = format!(
        "use std::{{env, fs, io::Write, path::PathBuf, process::Command, time::Duration}};\n#[allow(unused)]\n\
         fn main() {{\n    let out = PathBuf::from(env::var(\"OUT_DIR\").unwrap());\n    {body}\n}}\n"
    );
    case.project.write("app/build.rs", &script)?;
    Ok(case)
}

/// What cargo says of a build without cachec, whether it succeeds, and what the script has left for cargo.
fn outcome(machine: &Machine, project: &Project) -> Result<(bool, String, Vec<u8>)> {
    project.wipe()?;
    let build = machine.cargo(&project.root, &["build"])?;
    let mut said = Vec::new();
    for entry in fs::read_dir(project.root.join("target/debug/build"))? {
        said.extend(fs::read(entry?.path().join("output")).unwrap_or_default());
    }
    Ok((build.success, build.diagnostics(), said))
}

#[test]
fn what_they_say_and_leave_is_as_without_cachec() -> Result<()> {
    for (body, reason) in [
        ("fs::remove_dir_all(&out).unwrap();", None),
        (
            "std::io::stdout().write_all(b\"cargo:warning=odd \\xff\\ncargo:rustc-env=A=\\xfe\\n\").unwrap();",
            None,
        ),
        (
            "println!(\"cargo:rustc-env=A=b\"); eprintln!(\"{}\", \"x\".repeat(5_000_000));",
            Some("large-streams"),
        ),
        // Sparse, as far as the file system is concerned.
        (
            "fs::File::create(out.join(\"large\")).unwrap().set_len((1 << 30) + 1).unwrap();",
            Some("large-out-dir"),
        ),
        (
            "fs::create_dir(out.join(\"pipe.d\")).unwrap(); \
          Command::new(\"mkfifo\").arg(out.join(\"pipe.d/pipe\")).status().unwrap();",
            Some("unusual-output"),
        ),
    ] {
        let case = case(body)?;
        let plain = outcome(&Machine::new()?.with("RUSTC_WRAPPER", ""), &case.project)?;
        // Cold, and once more from what was stored, if it was.
        for round in ["cold", "warm"] {
            let with = outcome(&case.machine, &case.project)?;
            assert_eq!(with, plain, "{round}: {body}");
            case.machine.cachec(&case.project.root, &["flush"])?;
        }
        let not_stored = case.machine.statistics(&case.project.root)?["not_stored"].clone();
        if let Some(reason) = reason {
            assert!(not_stored[reason].as_u64() > Some(0), "{body}: {not_stored}");
        }
    }
    Ok(())
}

/// Whether a process runs whose command line has a text in it.
fn is_running(text: &str) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .map(|entry| fs::read(entry.path().join("cmdline")).unwrap_or_default())
        .any(|line| String::from_utf8_lossy(&line).contains(text))
}

fn wait_for(what: &str, is_so: impl Fn() -> bool) -> Result<()> {
    let started = Instant::now();
    while !is_so() {
        ensure!(started.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn one_that_hangs_ends_with_the_interrupted_build() -> Result<()> {
    let case =
        case("fs::write(out.join(\"hangs\"), \"\").unwrap(); std::thread::sleep(Duration::from_secs(600));")?;
    for _ in 0..2 {
        case.project.wipe()?;
        let mut command = case.machine.command(&cargo());
        // As a shell does for what it starts; an interrupt from the terminal reaches all of it.
        command.arg("build").current_dir(&case.project.root).process_group(0);
        let mut building = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let build_directory = case.project.root.join("target/debug/build");
        let hangs = || {
            let scripts = fs::read_dir(&build_directory).into_iter().flatten().flatten();
            scripts.map(|entry| entry.path().join("out/hangs")).any(|mark| mark.exists())
        };
        wait_for("the script hangs", hangs)?;
        let group = format!("-{}", building.id());
        ensure!(Command::new("kill").args(["-INT", "--", &group]).status()?.success(), "no process group");
        assert!(!building.wait()?.success());
        let place = build_directory.to_string_lossy().into_owned();
        wait_for("nothing of the build runs", || !is_running(&place))?;
    }
    Ok(())
}

#[test]
fn two_builds_that_run_one_at_once_both_succeed() -> Result<()> {
    let case = case(
        "std::thread::sleep(Duration::from_millis(500)); fs::write(out.join(\"text\"), \"text\").unwrap();",
    )?;
    std::thread::scope(|scope| -> Result<()> {
        let builds: Vec<_> = ["one", "two"]
            .map(|target| {
                let directory = case.outside(target).to_string_lossy().into_owned();
                let case = &case;
                scope.spawn(move || {
                    case.machine.cargo(&case.project.root, &["build", "--target-dir", &directory])
                })
            })
            .into_iter()
            .collect();
        for build in builds {
            let build = build.join().ok().context("a build panicked")??;
            assert!(build.success, "{}", build.stderr);
        }
        Ok(())
    })?;
    for target in ["one", "two"] {
        let output = Command::new(case.outside(target).join("debug/app")).output()?;
        assert_eq!(output.stdout, b"app\n");
    }
    Ok(())
}
