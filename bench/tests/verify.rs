//! `cachec verify`: everything is compiled and compared with what is stored.

use std::fs;

use anyhow::Result;
use cachec_bench::case::PRINT_MADE;
use cachec_bench::programs::{cargo, programs};
use cachec_bench::{Build, Case};

/// Runs `cachec verify cargo build` from nothing.
fn verify(case: &Case) -> Result<Build> {
    case.project.wipe()?;
    verify_what_is_left(case)
}

/// As [`verify`], of what cargo does not find in its target directory.
fn verify_what_is_left(case: &Case) -> Result<Build> {
    let mut command = case.machine.command(&programs().client);
    command.args(["verify"]).arg(cargo()).arg("build").current_dir(&case.project.root);
    case.machine.run(|| Ok(command.output()?))
}

fn with_macro(body: &str) -> Result<Case> {
    let case = Case::new(PRINT_MADE, &["maker", "inner"])?.with_macro(body)?;
    case.project.package("inner", &[])?;
    // A script, whose run is a unit, too.
    case.project.write(
        "inner/build.rs",
        "fn main() { std::fs::write(format!(\"{}/made.rs\", std::env::var(\"OUT_DIR\").unwrap()), \"1\").unwrap(); }\n",
    )?;
    case.project.write(
        "inner/src/lib.rs",
        "pub const MADE: u8 = include!(concat!(env!(\"OUT_DIR\"), \"/made.rs\"));\n",
    )?;
    Ok(case)
}

/// All files of the local tier that say what is stored.
fn results(case: &Case) -> Result<usize> {
    let mut count = 0;
    let mut directories = vec![case.machine.path("tier/v1/results")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() { directories.push(path) } else { count += 1 }
        }
    }
    Ok(count)
}

#[test]
fn a_build_that_is_as_stored_is_said_to_be() -> Result<()> {
    let case = with_macro("\"made\".to_owned()")?;
    let first = case.build()?;
    let stored = results(&case)?;
    let verified = verify(&case)?;
    assert!(verified.success, "{} {}", verified.stdout, verified.stderr);
    // The script's program and its run, both libraries, the program, and cargo's probes.
    assert!(verified.stdout.contains("5 as stored, 0 differ, 0 not stored"), "{}", verified.stdout);
    assert_eq!(verified.compiled, first.compiled);
    assert_eq!(case.project.run_app()?, "made");
    assert_eq!(results(&case)?, stored);
    // Cargo finds all of it fresh now: that is no proof, and what was counted before is none either.
    let again = verify_what_is_left(&case)?;
    assert!(
        !again.success && again.stderr.contains("nothing was compiled"),
        "{}{}",
        again.stdout,
        again.stderr
    );
    Ok(())
}

#[test]
fn a_difference_is_named_and_fails() -> Result<()> {
    // The clock is not an input.
    let case = with_macro("format!(\"{:?}\", std::time::SystemTime::now())")?;
    case.build()?;
    let verified = verify(&case)?;
    assert!(!verified.success);
    assert!(verified.stdout.contains("4 as stored, 1 differ, 0 not stored"), "{}", verified.stdout);
    assert!(
        verified.stdout.lines().any(|line| line.starts_with("differs") && line.contains("app: app-")),
        "{}",
        verified.stdout
    );
    assert!(verified.stderr.contains("cachec: app: what is stored differs"), "{}", verified.stderr);
    Ok(())
}

#[test]
fn a_build_of_which_nothing_is_stored_is_not_verified() -> Result<()> {
    let case = with_macro("\"made\".to_owned()")?;
    let verified = verify(&case)?;
    assert!(!verified.success);
    assert!(verified.stdout.contains("0 as stored, 0 differ, 5 not stored"), "{}", verified.stdout);
    assert_eq!(results(&case)?, 0);
    // A build that fails says so itself.
    case.build()?;
    case.project.write("app/src/main.rs", "fn main() { nonsense }\n")?;
    let verified = verify(&case)?;
    assert!(!verified.success && verified.stderr.contains("the build failed"), "{}", verified.stderr);
    Ok(())
}
