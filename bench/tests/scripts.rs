//! Runs of build scripts: restored where what they read is the same, and as without cachec otherwise.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use cachec_bench::tier::forget_inputs;
use cachec_bench::{Build, Case, Machine};
use serde_json::Value;

/// Prints what the script has left.
const PRINT_TEXT: &str =
    "fn main() { println!(\"{}\", include_str!(concat!(env!(\"OUT_DIR\"), \"/text.txt\"))); }\n";

/// Builds of a program `app` with a build script, which notes each of its starts.
trait ScriptCase: Sized {
    /// `body` is the body of the script's `main`; `out` is the path of `OUT_DIR` in it.
    fn script(app: &str, body: &str) -> Result<Self>;
    fn write_script(&self, body: &str) -> Result<()>;
    /// Builds from nothing; says whether the script was started.
    fn runs(&self) -> Result<bool>;
    fn statistics(&self) -> Result<Value>;
    fn not_stored(&self, reason: &str) -> Result<()>;
    fn out_directory(&self) -> Result<PathBuf>;
}

impl ScriptCase for Case {
    fn script(app: &str, body: &str) -> Result<Self> {
        let case = Self::new(app, &[])?;
        case.write_script(body)?;
        Ok(case)
    }

    fn write_script(&self, body: &str) -> Result<()> {
        // A pipe, which the tracer knows to be no file, held open by the machine.
        let text = format!(
            "use std::{{env, fs, path::PathBuf, process::Command}};\n#[allow(unused)]\nfn main() {{\n    \
             let out = PathBuf::from(env::var(\"OUT_DIR\").unwrap());\n    \
             let _ = Command::new(\"sh\").args([\"-c\", \"echo script >> $COMPILED\"]).status();\n    {body}\n}}\n"
        );
        self.project.write("app/build.rs", &text)
    }

    fn runs(&self) -> Result<bool> {
        Ok(was_run(&self.build()?))
    }

    fn statistics(&self) -> Result<Value> {
        self.machine.statistics(&self.project.root)
    }

    fn not_stored(&self, reason: &str) -> Result<()> {
        assert!(self.runs()?);
        assert!(self.runs()?, "a run was restored that must not be stored ({reason})");
        let counts = self.statistics()?["not_stored"].clone();
        assert!(counts[reason].as_u64() > Some(0), "{counts}");
        Ok(())
    }

    fn out_directory(&self) -> Result<PathBuf> {
        below_build(&self.project.root, "out")
    }
}

/// What a script's directories have of this name.
fn below_build(root: &Path, name: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(root.join("target/debug/build"))?;
    let paths = entries.map(|entry| Ok(entry?.path().join(name))).collect::<Result<Vec<_>>>()?;
    paths.into_iter().find(|path| path.exists()).with_context(|| format!("{name} of a script"))
}

fn was_run(build: &Build) -> bool {
    build.compiled.iter().any(|noted| noted == "script")
}

const WRITE_TEXT: &str =
    "fs::write(out.join(\"text.txt\"), fs::read_to_string(\"data.txt\").unwrap()).unwrap();";

#[test]
fn a_run_is_restored_and_a_changed_input_runs_it_again() -> Result<()> {
    let case = Case::script(PRINT_TEXT, WRITE_TEXT)?;
    case.project.write("app/data.txt", "one")?;
    let cold = case.build()?;
    assert!(was_run(&cold) && cold.probes > 0);
    let warm = case.build()?;
    assert_eq!(
        (warm.compiled.len(), warm.probes),
        (0, 0),
        "a warm build starts something: {:?}",
        warm.compiled
    );
    assert_eq!(case.project.run_app()?, "one");
    let again = case.machine.cargo(&case.project.root, &["build", "-v"])?;
    assert!(again.compiled.is_empty() && !again.stderr.contains("Dirty"), "{}", again.stderr);
    case.project.write("app/data.txt", "two")?;
    assert!(case.runs()?, "the change was not noticed");
    assert_eq!(case.project.run_app()?, "two");
    case.project.write("app/data.txt", "one")?;
    assert!(!case.runs()?);
    assert_eq!(case.project.run_app()?, "one");
    Ok(())
}

#[test]
fn a_moved_checkout_is_restored_with_its_own_paths() -> Result<()> {
    let script = "let root = env::var(\"CARGO_MANIFEST_DIR\").unwrap();\n\
        fs::write(out.join(\"text.txt\"), format!(\"{root}/data {}\", out.display())).unwrap();\n\
        println!(\"cargo:rustc-env=PLACE={}\", out.display());";
    let app = "fn main() { println!(\"{} {}\", include_str!(concat!(env!(\"OUT_DIR\"), \"/text.txt\")), env!(\"PLACE\")); }";
    let case = Case::script(app, script)?;
    case.build()?;
    let moved = case.project.copy_to(&case.outside("elsewhere/moved"))?;
    let build = case.machine.cargo(&moved.root, &["build"])?;
    assert!(build.success && !was_run(&build), "{}", build.stderr);
    let printed = moved.run_app()?;
    assert!(printed.starts_with(&format!("{}/app/data", moved.root.display())), "{printed}");
    assert_eq!(printed.matches("elsewhere/moved").count(), 3, "{printed}");
    Ok(())
}

#[test]
fn what_cargo_has_made_so_far_is_no_input() -> Result<()> {
    // As clang's search for its library does, in the directories of LD_LIBRARY_PATH.
    let script = "let profile = out.ancestors().nth(3).unwrap();\n\
        for directory in [profile.to_owned(), profile.join(\"deps\")] { fs::read_dir(directory).unwrap().count(); }\n\
        fs::write(out.join(\"text.txt\"), \"text\").unwrap();";
    let case = Case::script(PRINT_TEXT, script)?;
    assert!(case.runs()?);
    case.project.wipe()?;
    case.project.write("target/debug/deps/libother-0123456789abcdef.rlib", "made earlier this time")?;
    let build = case.machine.cargo(&case.project.root, &["build"])?;
    assert!(build.success && !was_run(&build), "{}", build.stderr);
    Ok(())
}

#[test]
fn c_code_is_compiled_once() -> Result<()> {
    let script = "let run = |program: &str, words: &[&str]| assert!(Command::new(program).args(words).status().unwrap().success());\n\
        let object = out.join(\"answer.o\");\n\
        run(\"cc\", &[\"-c\", \"answer.c\", \"-Iinclude\", \"-o\", object.to_str().unwrap()]);\n\
        run(\"ar\", &[\"crs\", out.join(\"libanswer.a\").to_str().unwrap(), object.to_str().unwrap()]);\n\
        println!(\"cargo:rustc-link-search=native={}\\ncargo:rustc-link-lib=static=answer\", out.display());";
    let app = "unsafe extern \"C\" { safe fn answer() -> i32; }\nfn main() { println!(\"{}\", answer()); }";
    let case = Case::script(app, script)?;
    case.project.write("app/answer.c", "#include <answer.h>\nint answer(void) { return ANSWER; }\n")?;
    case.project.write("app/include/answer.h", "#define ANSWER 1\n")?;
    assert!(case.runs()?);
    assert!(!case.runs()?);
    assert_eq!(case.project.run_app()?, "1");
    case.project.write("app/include/answer.h", "#define ANSWER 2\n")?;
    assert!(case.runs()?, "a changed header was not noticed");
    assert_eq!(case.project.run_app()?, "2");
    // A header that comes first in the search.
    case.project.write("app/include/answer.h", "#define ANSWER 1\n")?;
    assert!(!case.runs()?);
    let mut case = case;
    let shadow = case.outside("shadow");
    fs::create_dir(&shadow)?;
    case.machine.set("CPATH", shadow.to_string_lossy());
    case.runs()?;
    case.project.write(
        "app/answer.c",
        "#include <stdlib.h>\n#include <answer.h>\nint answer(void) { return ANSWER; }\n",
    )?;
    assert!(case.runs()?);
    assert!(!case.runs()?);
    fs::write(shadow.join("stdlib.h"), "")?;
    assert!(case.runs()?, "a header that shadows another was not noticed");
    Ok(())
}

#[test]
fn debug_information_of_c_code_fits_a_moved_checkout() -> Result<()> {
    // As `configure` and CMake do: compiled in the output directory, from sources that were copied there.
    let script = "let run = |program: &str, words: &[&str]| assert!(Command::new(program).args(words).current_dir(&out).status().unwrap().success());\n\
        let source = out.join(\"answer.c\");\n\
        fs::copy(\"answer.c\", &source).unwrap();\n\
        run(\"cc\", &[\"-g\", \"-c\", source.to_str().unwrap(), \"-o\", \"answer.o\"]);\n\
        run(\"cc\", &[\"-gdwarf-4\", \"-Dother=second\", \"-Danswer=third\", \"-c\", source.to_str().unwrap(), \"-o\", \"second.o\"]);\n\
        run(\"ar\", &[\"crs\", \"libanswer.a\", \"answer.o\", \"second.o\"]);\n\
        println!(\"cargo:rustc-link-search=native={}\\ncargo:rustc-link-lib=static=answer\", out.display());";
    let app = "unsafe extern \"C\" { safe fn answer() -> i32; }\nfn main() { println!(\"{}\", answer()); }";
    let case = Case::script(app, script)?;
    case.project.write("app/answer.c", "int answer(void) { return 1; }\nint other(void) { return 2; }\n")?;
    assert!(case.runs()?);
    let objects = || -> Result<[Vec<u8>; 3]> {
        let out = case.out_directory()?;
        Ok([
            fs::read(out.join("answer.o"))?,
            fs::read(out.join("libanswer.a"))?,
            fs::read(case.project.root.join("target/debug/app"))?,
        ])
    };
    let root = case.project.root.to_string_lossy().into_owned();
    for object in objects()? {
        let text = String::from_utf8_lossy(&object);
        assert!(text.contains("/cachec///") && !text.contains(&root), "the object names {root}");
    }
    let moved = case.project.copy_to(&case.outside("elsewhere/moved"))?;
    let build = case.machine.cargo(&moved.root, &["build"])?;
    assert!(build.success && build.compiled.is_empty(), "{:?} {}", build.compiled, build.stderr);
    assert_eq!(moved.run_app()?, "1");
    // What the program itself can see of its place stays as it is, and binds it there.
    case.project.write("app/answer.c", "static const char place[] __attribute__((section(\".debug_own\"), used)) = __FILE__;\nint answer(void) { return place[0]; }\nint other(void) { return 2; }\n")?;
    assert!(case.runs()? && !case.runs()?);
    assert!(String::from_utf8_lossy(&objects()?[1]).contains(&root));
    let moved = case.project.copy_to(&case.outside("elsewhere/again"))?;
    assert!(was_run(&case.machine.cargo(&moved.root, &["build"])?));
    Ok(())
}

#[test]
fn debug_information_in_files_of_its_own_is_found_where_it_is() -> Result<()> {
    let script = "let run = |program: &str, words: &[&str]| assert!(Command::new(program).args(words).current_dir(&out).status().unwrap().success());\n\
        fs::write(out.join(\"a.c\"), \"int a(void) { return 1; }\").unwrap();";
    for more in [
        "run(\"cc\", &[\"-g\", \"-gsplit-dwarf\", \"-c\", \"a.c\", \"-o\", \"kept.o\"]);",
        "run(\"cc\", &[\"-g\", \"-shared\", \"a.c\", \"-o\", \"kept.o\"]);",
        "run(\"cc\", &[\"-g\", \"-c\", \"a.c\", \"-o\", \"kept.o\"]);\n\
         run(\"objcopy\", &[\"--only-keep-debug\", \"kept.o\", \"a.debug\"]);\n\
         run(\"objcopy\", &[\"--strip-debug\", \"--add-gnu-debuglink=a.debug\", \"kept.o\", \"stripped.o\"]);",
    ] {
        let case = Case::script("fn main() {}", &format!("{script}\n{more}"))?;
        assert!(case.runs()?);
        let object = fs::read(case.out_directory()?.join("kept.o"))?;
        let root = case.project.root.to_string_lossy().into_owned();
        assert!(String::from_utf8_lossy(&object).contains(&root), "{more}");
    }
    Ok(())
}

#[test]
fn a_script_that_asks_git_runs_again_after_a_commit() -> Result<()> {
    let script = "let output = Command::new(\"git\").args([\"describe\", \"--always\"]).output().unwrap();\n\
        fs::write(out.join(\"text.txt\"), output.stdout).unwrap();";
    let case = Case::script(PRINT_TEXT, script)?;
    let git = |arguments: &[&str]| -> Result<String> {
        let fixed = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"];
        let output =
            Command::new("git").args(fixed).args(arguments).current_dir(&case.project.root).output()?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    git(&["init", "-q"])?;
    git(&["add", "app"])?;
    git(&["commit", "-qm", "one"])?;
    assert!(case.runs()?);
    assert!(!case.runs()?, "{}", case.statistics()?);
    assert_eq!(case.project.run_app()?, git(&["describe", "--always"])?);
    git(&["commit", "-qm", "two", "--allow-empty"])?;
    assert!(case.runs()?, "the commit was not noticed");
    assert_eq!(case.project.run_app()?, git(&["describe", "--always"])?);
    Ok(())
}

#[test]
fn a_library_that_is_installed_or_removed_is_noticed() -> Result<()> {
    // What pkg-config does: the first `NAME.pc` in a list of directories.
    let script = "let found = env::split_paths(&env::var_os(\"PKG_CONFIG_PATH\").unwrap())\n\
        .map(|directory| directory.join(\"demo.pc\")).find(|path| path.exists());\n\
        fs::write(out.join(\"text.txt\"), found.map_or(\"none\".into(), |path| fs::read_to_string(path).unwrap())).unwrap();";
    let mut case = Case::script(PRINT_TEXT, script)?;
    let (first, second) = (case.outside("first"), case.outside("second"));
    fs::create_dir(&first)?;
    fs::create_dir(&second)?;
    case.machine.set("PKG_CONFIG_PATH", format!("{}:{}", first.display(), second.display()));
    let expect = |runs: bool, printed: &str| -> Result<()> {
        assert_eq!((case.runs()?, case.project.run_app()?.as_str()), (runs, printed));
        Ok(())
    };
    expect(true, "none")?;
    expect(false, "none")?;
    fs::write(second.join("demo.pc"), "one")?;
    expect(true, "one")?;
    fs::write(first.join("demo.pc"), "two")?;
    expect(true, "two")?;
    fs::remove_file(first.join("demo.pc"))?;
    expect(false, "one")?;
    fs::remove_file(second.join("demo.pc"))?;
    expect(false, "none")
}

#[test]
fn a_script_that_lists_a_directory_runs_again_when_it_grows() -> Result<()> {
    let script = "let mut names: Vec<_> = fs::read_dir(\"parts\").unwrap().map(|part| part.unwrap().file_name().into_string().unwrap()).collect();\n\
        names.sort();\nfs::write(out.join(\"text.txt\"), names.join(\" \")).unwrap();";
    let case = Case::script(PRINT_TEXT, script)?;
    case.project.write("app/parts/a", "")?;
    assert!(case.runs()? && !case.runs()?);
    case.project.write("app/parts/b", "")?;
    assert!(case.runs()?);
    assert_eq!(case.project.run_app()?, "a b");
    Ok(())
}

#[test]
fn variables_count_where_a_script_can_know_of_them() -> Result<()> {
    // Named in the program itself; put together in it, but told to cargo; put together, and listed by the user.
    let script = "println!(\"cargo:rerun-if-env-changed=TOLD_SETTING\");\n\
        let read = |name: String| env::var(name).unwrap_or_default();\n\
        let text = [env::var(\"NAMED_SETTING\").unwrap_or_default(), read([\"TOLD\", \"SETTING\"].join(\"_\")), read([\"LISTED\", \"SETTING\"].join(\"_\")), read([\"HIDDEN\", \"SETTING\"].join(\"_\"))];\n\
        fs::write(out.join(\"text.txt\"), text.join(\",\")).unwrap();";
    let mut case = Case::script(PRINT_TEXT, script)?;
    case.machine.set("CACHEC_ENV", "LISTED_SETTING");
    assert!(case.runs()? && !case.runs()?);
    for (name, printed) in
        [("NAMED_SETTING", "1,,,"), ("TOLD_SETTING", "1,1,,"), ("LISTED_SETTING", "1,1,1,")]
    {
        case.machine.set(name, "1");
        assert!(case.runs()?, "{name} was not noticed");
        assert_eq!(case.project.run_app()?, printed);
        assert!(!case.runs()?);
    }
    // The documented limit: nobody can know of this one.
    case.machine.set("HIDDEN_SETTING", "1");
    assert!(!case.runs()?);
    case.machine.set("CACHEC_ENV", "LISTED_SETTING,HIDDEN_SETTING");
    assert!(case.runs()?);
    assert_eq!(case.project.run_app()?, "1,1,1,1");
    Ok(())
}

#[test]
fn what_depends_on_more_than_files_is_not_stored() -> Result<()> {
    let text = "fs::write(out.join(\"text.txt\"), \"text\").unwrap();";
    for (reason, body) in [
        ("network", "let _ = std::net::TcpStream::connect(\"127.0.0.1:9\");"),
        (
            "clock",
            "println!(\"cargo:rustc-env=BUILT={}\", std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs());",
        ),
        ("always-runs", "println!(\"cargo:rerun-if-changed=not-there\");"),
        (
            "writes-elsewhere",
            "fs::write(\"generated.rs\", \"\").unwrap(); fs::write(\"generated.rs\", \"\").unwrap();",
        ),
        ("link-leads-out", "std::os::unix::fs::symlink(\"/etc/hostname\", out.join(\"link\")).unwrap();"),
        (
            "leaves-processes",
            "Command::new(\"sh\").args([\"-c\", \"exec >/dev/null 2>&1; sleep 3 &\"]).status().unwrap();",
        ),
    ] {
        let case = Case::script(PRINT_TEXT, &format!("{body}\n{text}"))?;
        if reason == "writes-elsewhere" {
            // What is there the second time is replaced, which is another reason.
            assert!(case.runs()?);
            assert!(case.statistics()?["not_stored"][reason].as_u64() > Some(0), "{}", case.statistics()?);
            continue;
        }
        case.not_stored(reason).with_context(|| reason.to_owned())?;
    }
    Ok(())
}

#[test]
fn what_is_read_through_own_links_is_read() -> Result<()> {
    for link in [
        "std::os::unix::fs::symlink(&data, out.join(\"a\")).unwrap(); let path = out.join(\"a/data.txt\");",
        "fs::create_dir(out.join(\"a\")).unwrap(); std::os::unix::fs::symlink(data.join(\"data.txt\"), out.join(\"a/b\")).unwrap(); let path = out.join(\"a/../a/b\");",
        "std::os::unix::fs::symlink(&data, out.join(\"a\")).unwrap(); env::set_current_dir(out.join(\"a\")).unwrap(); let path = PathBuf::from(\"data.txt\");",
        "fs::hard_link(data.join(\"data.txt\"), out.join(\"a\")).unwrap(); let path = out.join(\"a\");",
    ] {
        let script = format!(
            "let data = fs::canonicalize(\"data\").unwrap();\n{link}\nlet text = fs::read_to_string(path).unwrap();\n\
             env::set_current_dir(env::var(\"CARGO_MANIFEST_DIR\").unwrap()).unwrap();\n\
             Command::new(\"rm\").arg(\"-r\").arg(out.join(\"a\")).status().unwrap();\n\
             fs::write(out.join(\"text.txt\"), text).unwrap();"
        );
        let case = Case::script(PRINT_TEXT, &script)?;
        case.project.write("app/data/data.txt", "one")?;
        assert!(case.runs()?);
        // A new name of a file changes its ctime: it may have changed meanwhile, so that run is not stored.
        assert_eq!(case.runs()?, link.contains("hard_link"), "{link}: {}", case.statistics()?);
        case.project.write("app/data/data.txt", "two")?;
        assert!(case.runs()?, "the change was not noticed: {link}");
        assert_eq!(case.project.run_app()?, "two");
    }
    Ok(())
}

#[test]
fn a_link_to_a_device_that_is_looked_at() -> Result<()> {
    let script =
        "fs::write(out.join(\"text.txt\"), fs::metadata(\"link\").unwrap().is_file().to_string()).unwrap();";
    let case = Case::script(PRINT_TEXT, script)?;
    let link = case.project.root.join("app/link");
    std::os::unix::fs::symlink("/dev/null", &link)?;
    assert!(case.runs()? && !case.runs()?, "{}", case.statistics()?);
    fs::remove_file(&link)?;
    std::os::unix::fs::symlink("/etc/passwd", &link)?;
    assert!(case.runs()?);
    assert_eq!(case.project.run_app()?, "true");
    Ok(())
}

#[test]
fn compiling_for_this_cpu_makes_it_an_input() -> Result<()> {
    let script = "let run = |flag: &str| assert!(Command::new(\"cc\").args([\"-c\", flag, \"a.c\", \"-o\"]).arg(out.join(\"a.o\")).status().unwrap().success());\n\
        run(\"FLAG\"); fs::write(out.join(\"text.txt\"), \"x\").unwrap();";
    for (flag, counts) in [("-O1", false), ("-march=native", true)] {
        let case = Case::script(PRINT_TEXT, &script.replace("FLAG", flag))?;
        case.project.write("app/a.c", "int a;")?;
        assert!(case.runs()? && !case.runs()?);
        let is_cpu = |input: &cachec_protocol::Input| input.kind == cachec_protocol::InputKind::Cpu;
        assert_eq!(forget_inputs(&case.machine.path("tier"), is_cpu)? > 0, counts, "{flag}");
    }
    Ok(())
}

#[test]
fn what_lies_beside_a_checkout_is_not_taken_from_another() -> Result<()> {
    let read = "fs::read_to_string(\"../../VERSION\").unwrap_or(\"none\".into())";
    let parent = "fs::read_to_string(PathBuf::from(env::var(\"CARGO_MANIFEST_DIR\").unwrap()).parent().unwrap().parent().unwrap().join(\"VERSION\")).unwrap_or(\"none\".into())";
    let printed = "PathBuf::from(env::var(\"CARGO_MANIFEST_DIR\").unwrap()).parent().unwrap().parent().unwrap().display().to_string()";
    for text in [read, parent, printed] {
        let case = Case::script(PRINT_TEXT, &format!("fs::write(out.join(\"text.txt\"), {text}).unwrap();"))?;
        let other = case.project.copy_to(&case.outside("other/checkout"))?;
        fs::write(case.outside("VERSION"), "first")?;
        for (version, runs) in
            [(None, true), (Some("second"), true), (Some("second"), false), (Some("third"), true)]
        {
            assert!(case.runs()? || version.is_some());
            let own = case.project.run_app()?;
            if let Some(version) = version {
                fs::write(case.outside("other/VERSION"), version)?;
            }
            other.wipe()?;
            let build = case.machine.cargo(&other.root, &["build"])?;
            assert!(build.success, "{}", build.stderr);
            case.machine.cachec(&other.root, &["flush"])?;
            if text == printed {
                assert_eq!(other.run_app()?, case.outside("other").to_string_lossy());
                continue;
            }
            assert_eq!(
                (was_run(&build), other.run_app()?.as_str()),
                (runs, version.unwrap_or("none")),
                "{text}"
            );
            assert_eq!(own, "first");
        }
    }
    Ok(())
}

#[test]
fn what_is_written_into_a_package_below_the_temporary_directory_is_no_temporary_file() -> Result<()> {
    let mut case = Case::script(
        "mod made;\nfn main() { println!(\"{}\", made::TEXT); }",
        "fs::write(\"src/made.rs\", \"pub const TEXT: &str = \\\"made\\\";\").unwrap();",
    )?;
    case.machine.set("TMPDIR", case.outside("").to_string_lossy());
    assert!(case.runs()?);
    fs::remove_file(case.project.root.join("app/src/made.rs"))?;
    assert!(case.runs()?);
    assert_eq!(case.project.run_app()?, "made");
    Ok(())
}

#[test]
fn whether_a_copied_file_may_be_executed_counts() -> Result<()> {
    let script = "fs::copy(\"tool.sh\", out.join(\"tool.sh\")).unwrap();\n\
        let ran = Command::new(out.join(\"tool.sh\")).status().is_ok();\n\
        fs::write(out.join(\"text.txt\"), ran.to_string()).unwrap();";
    let case = Case::script(PRINT_TEXT, script)?;
    case.project.write("app/tool.sh", "#!/bin/sh\n")?;
    assert!(case.runs()? && !case.runs()?);
    assert_eq!(case.project.run_app()?, "false");
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(case.project.root.join("app/tool.sh"), fs::Permissions::from_mode(0o755))?;
    assert!(case.runs()?);
    assert_eq!(case.project.run_app()?, "true");
    Ok(())
}

#[test]
fn directories_links_and_modes_are_restored() -> Result<()> {
    let script = "fs::create_dir_all(out.join(\"a/empty\")).unwrap();\n\
        fs::write(out.join(\"a/tool\"), \"#!/bin/sh\\necho tool\\n\").unwrap();\n\
        use std::os::unix::fs::PermissionsExt;\n\
        fs::set_permissions(out.join(\"a/tool\"), fs::Permissions::from_mode(0o755)).unwrap();\n\
        fs::write(out.join(\"a/-dash\"), [0, 159, 146, 150]).unwrap();\n\
        fs::write(out.join(\"secret\"), \"x\").unwrap();\n\
        fs::set_permissions(out.join(\"secret\"), fs::Permissions::from_mode(0o600)).unwrap();\n\
        fs::create_dir(out.join(\"b\")).unwrap();\n\
        fs::write(out.join(\"b/x\"), out.to_str().unwrap()).unwrap();\n\
        fs::set_permissions(out.join(\"b\"), fs::Permissions::from_mode(0o555)).unwrap();\n\
        std::os::unix::fs::symlink(\"a/tool\", out.join(\"link\")).unwrap();\n\
        fs::write(out.join(\"text.txt\"), fs::read_to_string(out.join(\"link\")).unwrap()).unwrap();";
    let case = Case::script(PRINT_TEXT, script)?;
    let picture = || -> Result<String> {
        let out = case.out_directory()?;
        let list =
            Command::new("find").arg(".").args(["-printf", "%p %y %m %l\\n"]).current_dir(&out).output()?;
        let sums = Command::new("sh")
            .args(["-c", "find . -type f | sort | xargs cksum"])
            .current_dir(&out)
            .output()?;
        let mut lines: Vec<String> = String::from_utf8(list.stdout)?.lines().map(str::to_owned).collect();
        lines.sort();
        Ok(lines.join("\n") + &String::from_utf8(sums.stdout)?)
    };
    assert!(case.runs()?);
    let made = picture()?;
    assert!(made.contains("a/empty d") && made.contains("link l 777 a/tool"), "{made}");
    assert!(!case.runs()?, "{}", case.statistics()?);
    assert_eq!(picture()?, made);
    let names = fs::read_dir(case.out_directory()?.parent().context("a parent")?)?;
    let left: Vec<String> = names
        .map(|name| name.map(|name| name.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, _>>()?;
    assert!(!left.iter().any(|name| name.starts_with(".cachec-")), "{left:?}");
    Ok(())
}

#[test]
fn modes_that_a_script_sets_stay_under_another_mask() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let script = "fs::write(out.join(\"text.txt\"), \"x\").unwrap();\n\
        fs::write(out.join(\"secret\"), \"x\").unwrap();\n\
        use std::os::unix::fs::PermissionsExt;\n\
        fs::set_permissions(out.join(\"secret\"), fs::Permissions::from_mode(0o600)).unwrap();";
    let case = Case::script(PRINT_TEXT, script)?;
    // The agent is of the first build, and has its mask. A mask's first build runs the script.
    let rounds = [("077", 0o700, true), ("022", 0o755, true), ("022", 0o755, false), ("077", 0o700, false)];
    for (umask, allowed, runs) in rounds {
        case.project.wipe()?;
        let mut command = case.machine.command(Path::new("sh"));
        command.args(["-c", &format!("umask {umask} && exec cargo build --quiet")]);
        let build = case.machine.run(|| Ok(command.current_dir(&case.project.root).output()?))?;
        assert!(build.success, "{}", build.stderr);
        case.machine.cachec(&case.project.root, &["flush"])?;
        let mode = |path: &Path| fs::metadata(path).map(|metadata| metadata.permissions().mode() & 0o777);
        let (out, launcher) = (case.out_directory()?, below_build(&case.project.root, "build-script-build")?);
        let modes = (mode(&out.join("secret"))?, mode(&out)?, mode(&launcher)?);
        assert_eq!(modes, (0o600, allowed, allowed), "{umask}");
        assert_eq!(was_run(&build), runs, "{umask}");
    }
    Ok(())
}

#[test]
fn a_scripts_program_is_not_that_of_another_checkout() -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let case = Case::script(PRINT_TEXT, "fs::write(out.join(\"text.txt\"), \"x\").unwrap();")?;
    assert!(case.runs()?);
    let elsewhere = tempfile::tempdir()?;
    let other = case.project.copy_to(&elsewhere.path().join("other"))?;
    let mut programs = std::collections::BTreeSet::new();
    for root in [&case.project.root, &other.root] {
        assert!(case.machine.cargo(root, &["build"])?.compiled.is_empty());
        for package in fs::read_dir(root.join("target/debug/build"))? {
            let kept = package?.path().join("build_script_build.cachec");
            programs.extend(fs::metadata(kept).map(|kept| kept.ino()));
        }
    }
    assert_eq!(programs.len(), 2, "whoever edits the one must not change the other");
    Ok(())
}

#[test]
fn what_scripts_say_reaches_cargo_as_without_cachec() -> Result<()> {
    let script = "println!(\"cargo:warning=from the script\\ncargo:rustc-env=TOLD=value\\ncargo:rustc-cfg=told\\ncargo:rustc-check-cfg=cfg(told)\\ncargo:key=meta\");\n\
        eprintln!(\"said\");\nfs::write(out.join(\"text.txt\"), \"x\").unwrap();";
    let app = "#[cfg(told)]\nfn main() { println!(\"{} {}\", env!(\"TOLD\"), env!(\"META\")); }";
    let case = Case::script(
        app,
        "println!(\"cargo:rustc-env=META={}\", env::var(\"DEP_NATIVE_KEY\").unwrap()); println!(\"cargo:rustc-cfg=told\"); println!(\"cargo:rustc-check-cfg=cfg(told)\"); println!(\"cargo:rustc-env=TOLD=value\");",
    )?;
    case.project.write("Cargo.toml", "[workspace]\nmembers = [\"app\", \"native\"]\nresolver = \"3\"\n")?;
    case.project.package("app", &["native"])?;
    case.project.write(
        "native/Cargo.toml",
        "[package]\nname = \"native\"\nversion = \"0.1.0\"\nedition = \"2024\"\nlinks = \"native\"\n",
    )?;
    case.project.write("native/src/lib.rs", "")?;
    let own = fs::read_to_string(case.project.root.join("app/build.rs"))?;
    let head = own.split("println!").next().context("a head")?;
    case.project.write("native/build.rs", &format!("{head}{script}\n}}\n"))?;
    let cold = case.build()?;
    let warm = case.build()?;
    assert!(was_run(&cold) && !was_run(&warm), "{:?}", warm.compiled);
    // Scripts and compiles of different packages end in any order.
    let sorted = |build: &Build| -> Vec<String> {
        let mut lines: Vec<String> = build.diagnostics().lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&warm), sorted(&cold));
    assert!(warm.stderr.contains("from the script"), "{}", warm.stderr);
    assert_eq!(case.project.run_app()?, "value meta");
    Ok(())
}

#[test]
fn a_failed_run_is_as_without_cachec() -> Result<()> {
    let case = Case::script(
        PRINT_TEXT,
        "println!(\"cargo:warning=before\"); eprintln!(\"why\"); std::process::exit(7);",
    )?;
    let build = |machine: &Machine| machine.cargo(&case.project.root, &["build"]);
    let with = build(&case.machine)?;
    case.project.wipe()?;
    let plain = Machine::new()?.without("CACHEC_DIR").with("CACHEC_MODE", "off");
    let without = build(&plain)?;
    assert!(!with.success && !without.success);
    assert!(with.stderr.contains("exit status: 7") && with.stderr.contains("why"), "{}", with.stderr);
    let again = build(&case.machine)?;
    assert!(was_run(&again));
    Ok(())
}

#[test]
fn a_script_killed_by_a_signal_is_as_without_cachec() -> Result<()> {
    let case = Case::script(
        PRINT_TEXT,
        "Command::new(\"sh\").args([\"-c\", \"kill -9 $PPID\"]).status().unwrap();",
    )?;
    let build = case.machine.cargo(&case.project.root, &["build"])?;
    assert!(!build.success && build.stderr.contains("signal: 9"), "{}", build.stderr);
    Ok(())
}

#[test]
fn a_target_directory_works_without_cachec_afterwards() -> Result<()> {
    let case =
        Case::script(PRINT_TEXT, &format!("println!(\"cargo:rerun-if-changed=data.txt\");{WRITE_TEXT}"))?;
    case.project.write("app/data.txt", "one")?;
    case.build()?;
    // Neither the wrapper nor an agent: cargo starts the launcher, which runs the program.
    case.machine.signal_agents("KILL");
    case.project.write("app/data.txt", "two")?;
    let mut command = case.machine.command(Path::new("cargo"));
    let output = command.arg("build").env_remove("RUSTC_WRAPPER").current_dir(&case.project.root).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(case.machine.agents().is_empty());
    assert_eq!(case.project.run_app()?, "two");
    // The wrapper again, with a dead agent: a script whose output directory is not empty is run and not stored.
    case.project.write("app/data.txt", "three")?;
    let build = case.machine.cargo(&case.project.root, &["build"])?;
    assert!(build.success && was_run(&build), "{}", build.stderr);
    assert_eq!(case.project.run_app()?, "three");
    // But a stored run replaces what is there.
    case.project.write("app/data.txt", "one")?;
    let build = case.machine.cargo(&case.project.root, &["build"])?;
    assert!(build.success && !was_run(&build), "{}", build.stderr);
    assert_eq!(case.project.run_app()?, "one");
    Ok(())
}

#[test]
fn a_script_that_builds_with_cargo_is_stored_as_a_whole() -> Result<()> {
    let script = "let manifest = out.join(\"inner/Cargo.toml\");\n\
        fs::create_dir_all(out.join(\"inner/src\")).unwrap();\n\
        fs::write(&manifest, \"[package]\\nname = \\\"inner\\\"\\nversion = \\\"0.1.0\\\"\\nedition = \\\"2021\\\"\\n[workspace]\\n\").unwrap();\n\
        fs::write(out.join(\"inner/src/main.rs\"), \"fn main() { print!(\\\"inner\\\"); }\").unwrap();\n\
        let rustc = env::var(\"RUSTC_WRAPPER\").unwrap();\n\
        let built = Command::new(rustc).arg(env::var(\"RUSTC\").unwrap()).arg(\"-o\").arg(out.join(\"tool\")).arg(out.join(\"inner/src/main.rs\")).args([\"--crate-name\", \"inner\"]).status().unwrap();\n\
        assert!(built.success());\n\
        fs::write(out.join(\"text.txt\"), Command::new(out.join(\"tool\")).output().unwrap().stdout).unwrap();";
    let case = Case::script(PRINT_TEXT, script)?;
    assert!(case.runs()?);
    let warm = case.build()?;
    assert!(warm.compiled.is_empty(), "{:?} {}", warm.compiled, case.statistics()?);
    assert_eq!(case.project.run_app()?, "inner");
    Ok(())
}

#[test]
fn without_a_tracer_scripts_are_simply_run() -> Result<()> {
    let case = Case::script(PRINT_TEXT, WRITE_TEXT)?;
    case.project.write("app/data.txt", "one")?;
    let build = || -> Result<Build> {
        case.project.wipe()?;
        let mut command = case.machine.command(Path::new("cargo"));
        command.arg("build").current_dir(&case.project.root);
        cachec_bench::sandbox::forbid_seccomp(&mut command);
        let output = command.output()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        case.machine.cachec(&case.project.root, &["flush"])?;
        case.machine.cargo(&case.project.root, &["build"])
    };
    build()?;
    build()?;
    assert_eq!(case.project.run_app()?, "one");
    assert!(case.statistics()?["not_stored"]["untraced"].as_u64() > Some(0), "{}", case.statistics()?);
    Ok(())
}

#[test]
fn renames_in_tools_caches_and_those_that_fail_do_not_count() -> Result<()> {
    for renames in [
        // A tool's cache, with a file of an earlier run.
        "let cache = PathBuf::from(env::var(\"HOME\").unwrap()).join(\".cache/zig\"); \
         fs::create_dir_all(&cache).unwrap(); \
         if !cache.join(\"a\").exists() { fs::write(cache.join(\"a\"), \"1\").unwrap(); } \
         Command::new(\"mv\").arg(cache.join(\"a\")).arg(cache.join(\"b\")).status().unwrap(); \
         fs::rename(cache.join(\"b\"), cache.join(\"a\")).unwrap();",
        // To a directory that is not there yet.
        "fs::write(out.join(\"made\"), \"1\").unwrap(); \
         assert!(fs::rename(out.join(\"made\"), out.join(\"later/made\")).is_err()); \
         fs::create_dir(out.join(\"later\")).unwrap(); \
         fs::rename(out.join(\"made\"), out.join(\"later/made\")).unwrap();",
    ] {
        let script = format!("{renames}\nfs::write(out.join(\"text.txt\"), \"text\").unwrap();");
        let case = Case::script(PRINT_TEXT, &script)?;
        assert!(case.runs()?);
        case.project.wipe()?;
        assert!(case.runs()? == renames.contains("HOME"), "{renames}: {}", case.statistics()?);
        assert!(!case.runs()?, "{renames}: {}", case.statistics()?);
        assert_eq!(case.project.run_app()?, "text");
    }
    Ok(())
}
