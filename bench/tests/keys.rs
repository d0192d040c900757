//! What must be told apart before any file is read, one test each: the same hits; changed, it misses; and with one
//! action key for both, the stale output really appears (so the test can fail).

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use cachec_bench::Build;
use cachec_bench::case::{Case, PRINT_MADE};
use cachec_bench::programs::programs;
use cachec_bench::tier::forget_inputs;

fn run_app(case: &Case, _: &Build) -> Result<String> {
    case.project.run_app()
}

/// A program that prints a variable, which a proc macro has read behind the compiler's back.
fn prove_variable(name: &str) -> Result<()> {
    let body = format!("std::env::var({name:?}).unwrap_or_default()");
    let mut case = Case::new(PRINT_MADE, &["maker"])?.with_macro(&body)?;
    case.machine.set("CACHEC_ENV", "LISTED_SETTING");
    let set = |case: &mut Case, changed| {
        case.machine.set(name, if changed { "two" } else { "one" });
        Ok(())
    };
    case.prove_key(set, run_app, ["one", "two"]).with_context(|| name.to_owned())
}

#[test]
fn a_variable_that_the_user_lists() -> Result<()> {
    prove_variable("LISTED_SETTING")
}

#[test]
fn the_variable_that_turns_unstable_features_on() -> Result<()> {
    prove_variable("RUSTC_BOOTSTRAP")
}

#[test]
fn variables_that_proc_macros_are_known_to_read() -> Result<()> {
    prove_variable("DATABASE_URL")?;
    prove_variable("SQLX_OFFLINE_DIR")
}

#[test]
fn what_cargo_says_of_the_package() -> Result<()> {
    let case = Case::new(PRINT_MADE, &["maker"])?
        .with_macro("std::env::var(\"CARGO_PKG_DESCRIPTION\").unwrap_or_default()")?;
    let set = |case: &mut Case, changed| {
        let description = if changed { "two" } else { "one" };
        case.project.write(
            "app/Cargo.toml",
            &format!(
                "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\
                 description = \"{description}\"\n[dependencies]\nmaker = {{ path = \"../maker\" }}\n"
            ),
        )
    };
    case.prove_key(set, run_app, ["one", "two"])
}

#[test]
fn the_edition() -> Result<()> {
    let app = "fn main() { println!(\"{}\", std::mem::size_of_val(&[1u8].into_iter().next().unwrap())); }";
    let case = Case::new(app, &[])?;
    let set = |case: &mut Case, changed| {
        let edition = if changed { "2021" } else { "2018" };
        let manifest = format!("[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"{edition}\"\n");
        case.project.write("app/Cargo.toml", &manifest)
    };
    case.prove_key(set, run_app, ["8", "1"])
}

#[test]
fn names_of_dependencies() -> Result<()> {
    let case = Case::new("fn main() { println!(\"{}{}\", x::NAME, y::NAME); }", &[])?;
    for name in ["first", "second"] {
        case.project.package(name, &[])?;
        case.project
            .write(&format!("{name}/src/lib.rs"), &format!("pub const NAME: &str = {:?};", &name[..1]))?;
    }
    let set = |case: &mut Case, changed: bool| {
        let names = if changed { ["second", "first"] } else { ["first", "second"] };
        let dependency =
            |alias: &str, name: &str| format!("{alias} = {{ package = \"{name}\", path = \"../{name}\" }}\n");
        let manifest = "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[dependencies]\n";
        let text = [manifest, &dependency("x", names[0]), &dependency("y", names[1])].concat();
        case.project.write("app/Cargo.toml", &text)
    };
    case.prove_key(set, run_app, ["fs", "sf"])
}

#[test]
fn levels_of_lints() -> Result<()> {
    let case = Case::new("fn main() { let unused = 1; }", &[])?;
    let set = |case: &mut Case, changed: bool| {
        let level = if changed { "allow" } else { "warn" };
        let manifest = "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[lints.rust]\n";
        case.project.write("app/Cargo.toml", &format!("{manifest}unused_variables = \"{level}\"\n"))
    };
    let show = |_: &Case, build: &Build| Ok(build.stderr.contains("unused variable").to_string());
    case.prove_key(set, show, ["true", "false"])
}

#[test]
fn another_compiler_that_says_it_is_the_same() -> Result<()> {
    let case = Case::new("fn main() { println!(\"{}\", cfg!(other_compiler)); }", &[])?;
    let script = case.machine.path("bin/rustc");
    let text = fs::read_to_string(&script)?;
    let set = move |_: &mut Case, changed: bool| {
        let other = text.replace("\"$@\"\n", "\"$@\" --cfg other_compiler\n");
        Ok(fs::write(&script, if changed { &other } else { &text })?)
    };
    case.prove_key(set, run_app, ["false", "true"])
}

#[test]
fn a_variable_that_a_compiler_script_reads() -> Result<()> {
    let case = Case::new("fn main() { println!(\"{}\", cfg!(other_compiler)); }", &[])?;
    let script = case.machine.path("bin/rustc");
    let text = fs::read_to_string(&script)?;
    fs::write(&script, text.replace("\"$@\"\n", "\"$@\" ${OTHER_COMPILER:+--cfg=other_compiler}\n"))?;
    let set = |case: &mut Case, changed: bool| {
        case.machine.set("OTHER_COMPILER", if changed { "1" } else { "" });
        Ok(())
    };
    case.prove_key(set, run_app, ["false", "true"])
}

/// Compiles a library through the wrapper alone: cargo tells the compiles below apart by itself. Returns the library.
fn compile(case: &Case, source: &str, flags: &[&str]) -> Result<Vec<u8>> {
    let root = &case.project.root;
    let out = root.join("target/debug/deps");
    case.project.wipe()?;
    fs::create_dir_all(&out)?;
    fs::write(root.join("demo.rs"), source)?;
    let fixed = [
        "--crate-name",
        "demo",
        "--crate-type",
        "lib",
        "--edition",
        "2024",
        "--emit",
        "dep-info,metadata,link",
    ];
    let mut command = case.machine.command(&programs().client);
    command
        .arg(case.machine.path("bin/rustc"))
        .args(fixed)
        .args(["demo.rs", "-O", "--out-dir"])
        .arg(&out)
        .args(flags);
    let output = command.current_dir(root).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    case.machine.cachec(root, &["flush"])?;
    Ok(fs::read(out.join("libdemo.rlib"))?)
}

/// Proves that the content of a file counts which a flag names: where it changes the library is compiled, and where
/// the stored result does not know it, restored.
fn prove_file(
    mut case: Case,
    source: &str,
    flags: &[&str],
    name: &str,
    change: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let count = |case: &Case, what: &str| -> Result<Option<u64>> {
        Ok(case.machine.statistics(&case.project.root)?[what].as_u64())
    };
    let first = compile(&case, source, flags)?;
    assert!(compile(&case, source, flags)? == first);
    assert_eq!((count(&case, "local_hits")?, count(&case, "misses")?), (Some(1), Some(1)));
    let (tier, forged) = (case.machine.path("tier"), case.machine.path("forged"));
    assert!(Command::new("cp").arg("-r").args([&tier, &forged]).status()?.success());
    let named = |input: &cachec_protocol::Input| String::from_utf8_lossy(&input.name).contains(name);
    assert!(forget_inputs(&forged, named)? > 0, "no stored result knows {name}");
    change()?;
    let second = compile(&case, source, flags)?;
    assert_eq!(count(&case, "misses")?, Some(2), "the change was not noticed");
    assert!(second != first, "the change changes nothing");
    case.machine.set("CACHEC_DIR", forged.to_string_lossy());
    assert!(
        compile(&case, source, flags)? == first,
        "the negative control: without the input, the stale library"
    );
    Ok(())
}

#[test]
fn the_content_of_a_profile() -> Result<()> {
    let case = Case::new("", &[])?;
    // An indexed profile of LLVM 14, made by `llvm-profdata merge`; then the same with another counter.
    let profile = include_bytes!("data/main.profdata");
    let file = case.outside("main.profdata");
    fs::write(&file, profile)?;
    let flag = format!("-Cprofile-use={}", file.display());
    let change = || {
        let mut changed = *profile;
        changed[0x60] += 1;
        Ok(fs::write(&file, changed)?)
    };
    prove_file(case, "pub fn main() {}", &[&flag], "main.profdata", &change)
}

#[test]
fn a_target_specification() -> Result<()> {
    let mut case = Case::new("", &[])?;
    let source = "#![feature(no_core, lang_items)]\n#![allow(internal_features)]\n#![no_core]\n\
         #[lang = \"pointee_sized\"] pub trait PointeeSized {}\n#[lang = \"meta_sized\"] pub trait MetaSized: PointeeSized {}\n\
         #[lang = \"sized\"] pub trait Sized: MetaSized {}\n#[lang = \"copy\"] pub trait Copy {}\nimpl Copy for usize {}\n\
         #[cfg(target_env = \"gnu\")]\n#[unsafe(no_mangle)]\npub extern \"C\" fn width() -> usize { 64 }\n";
    case.machine.set("RUSTC_BOOTSTRAP", "1");
    let print = ["--print", "target-spec-json", "-Zunstable-options", "--target", "x86_64-unknown-linux-gnu"];
    let output = Command::new("rustc").args(print).env("RUSTC_BOOTSTRAP", "1").output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let specification = String::from_utf8(output.stdout)?;
    let file = case.outside("special.json");
    fs::write(&file, &specification)?;
    let change = || {
        let changed = specification.replace("\"env\": \"gnu\"", "\"env\": \"musl\"");
        assert_ne!(changed, specification);
        Ok(fs::write(&file, changed)?)
    };
    let target = file.to_string_lossy().into_owned();
    prove_file(case, source, &["-Zunstable-options", "--target", &target], "special.json", &change)
}
