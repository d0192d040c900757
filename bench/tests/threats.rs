//! What has made hits wrong elsewhere, one test each: the same inputs hit; a changed one misses; and with
//! that input taken out of the stored result, the stale program really appears (so the test can fail).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use cachec_bench::case::{Case, PRINT_MADE};
use cachec_bench::{Build, Project};

#[test]
fn a_proc_macro_that_reads_a_file() -> Result<()> {
    let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(
        "std::fs::read_to_string(concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/../data.txt\")).unwrap()",
    )?;
    case.project.write("data.txt", "one")?;
    case.prove("one", |case| case.project.write("data.txt", "two"), "two", "data.txt")
}

#[test]
fn a_source_beside_another_checkout() -> Result<()> {
    let case = Case::new("fn main() { println!(\"{}\", include_str!(\"../../../VERSION\")); }", &[])?;
    fs::write(case.outside("VERSION"), "first")?;
    case.build()?;
    let other = case.project.copy_to(&case.outside("other/checkout"))?;
    for version in ["second", "third"] {
        fs::write(case.outside("other/VERSION"), version)?;
        let build = case.machine.cargo(&other.root, &["build"])?;
        assert!(build.success, "{}", build.stderr);
        assert_eq!(other.run_app()?, version);
    }
    Ok(())
}

#[test]
fn a_proc_macro_that_lists_a_directory() -> Result<()> {
    let body = "let mut names: Vec<_> = std::fs::read_dir(\"app/migrations\").unwrap()\
        .map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect(); names.sort(); names.join(\" \")";
    let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
    case.project.write("app/migrations/1.sql", "")?;
    case.prove("1.sql", |case| case.project.write("app/migrations/2.sql", ""), "1.sql 2.sql", "migrations")
}

#[test]
fn a_proc_macro_that_asks_whether_a_file_exists() -> Result<()> {
    let body = "std::path::Path::new(\"switch\").exists().to_string()";
    let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
    case.prove("false", |case| case.project.write("switch", ""), "true", "switch")
}

#[test]
fn a_proc_macro_that_reads_through_a_link() -> Result<()> {
    let body = "std::fs::read_to_string(\"current/data.txt\").unwrap()";
    let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
    case.project.write("first/data.txt", "one")?;
    case.project.write("second/data.txt", "two")?;
    case.project.write("Cargo.toml", "[workspace]\nmembers = [\"app\", \"maker\"]\nresolver = \"3\"\n")?;
    let link = case.project.root.join("current");
    std::os::unix::fs::symlink("first", &link)?;
    let retarget = |case: &Case| -> Result<()> {
        fs::remove_file(case.project.root.join("current"))?;
        Ok(std::os::unix::fs::symlink("second", case.project.root.join("current"))?)
    };
    case.prove("one", retarget, "two", "current")
}

#[test]
fn a_proc_macro_that_reads_a_link() -> Result<()> {
    let body = "std::fs::read_link(\"current\").unwrap().to_string_lossy().into_owned()";
    let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
    std::os::unix::fs::symlink("first", case.project.root.join("current"))?;
    let retarget = |case: &Case| -> Result<()> {
        fs::remove_file(case.project.root.join("current"))?;
        Ok(std::os::unix::fs::symlink("second", case.project.root.join("current"))?)
    };
    case.prove("first", retarget, "second", "current")
}

#[test]
fn a_proc_macro_that_asks_another_program() -> Result<()> {
    let body = "let output = std::process::Command::new(\"../checkout/tool.sh\").output().unwrap(); \
        String::from_utf8(output.stdout).unwrap().trim().to_owned()";
    let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
    let write = |project: &Project, text: &str| -> Result<()> {
        project.write("tool.sh", &format!("#!/bin/sh\necho {text}\n"))?;
        fs::set_permissions(
            project.root.join("tool.sh"),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?;
        Ok(())
    };
    write(&case.project, "one")?;
    case.prove("one", |case| write(&case.project, "two"), "two", "tool.sh")
}

#[test]
fn a_source_of_the_same_size_and_mtime() -> Result<()> {
    let case = Case::new("fn main() { println!(\"one\"); }\n", &[])?;
    let change = |case: &Case| -> Result<()> {
        let path = case.project.root.join("app/src/main.rs");
        let modified = fs::metadata(&path)?.modified()?;
        case.project.write("app/src/main.rs", "fn main() { println!(\"two\"); }\n")?;
        Ok(fs::File::options().append(true).open(path)?.set_modified(modified)?)
    };
    case.prove("one", change, "two", "main.rs")
}

/// Compiles a C function `answer` that returns a number.
fn compile_answer(directory: &Path, object: &str, number: u32) -> Result<()> {
    fs::create_dir_all(directory)?;
    fs::write(directory.join("answer.c"), format!("int answer(void) {{ return {number}; }}\n"))?;
    let status = Command::new("cc").args(["-c", "answer.c", "-o", object]).current_dir(directory).status()?;
    anyhow::ensure!(status.success(), "cc failed");
    Ok(())
}

fn archive_answer(directory: &Path, number: u32) -> Result<()> {
    compile_answer(directory, "answer.o", number)?;
    let status =
        Command::new("ar").args(["crsD", "libanswer.a", "answer.o"]).current_dir(directory).status()?;
    anyhow::ensure!(status.success(), "ar failed");
    Ok(())
}

const PRINT_ANSWER: &str =
    "unsafe extern \"C\" { fn answer() -> i32; }\nfn main() { println!(\"{}\", unsafe { answer() }); }\n";

#[test]
fn a_static_library_of_the_program() -> Result<()> {
    let case = Case::new(PRINT_ANSWER, &[])?;
    let native = case.outside("native");
    archive_answer(&native, 41)?;
    let script = format!(
        "fn main() {{ println!(\"cargo:rustc-link-search=native={}\"); println!(\"cargo:rustc-link-lib=static=answer\"); }}\n",
        native.display()
    );
    case.project.write("app/build.rs", &script)?;
    case.prove("41", |case| archive_answer(&case.outside("native"), 42), "42", "libanswer.a")
}

#[test]
fn a_static_library_inside_a_library() -> Result<()> {
    let case = Case::new("fn main() { println!(\"{}\", inner::get()); }\n", &["inner"])?;
    let native = case.outside("native");
    archive_answer(&native, 41)?;
    case.project.package("inner", &[])?;
    case.project.write(
        "inner/src/lib.rs",
        "#[link(name = \"answer\", kind = \"static\", modifiers = \"+whole-archive\")]\nunsafe extern \"C\" { \
         fn answer() -> i32; }\npub fn get() -> i32 { unsafe { answer() } }\n",
    )?;
    let script = format!("fn main() {{ println!(\"cargo:rustc-link-search={}\"); }}\n", native.display());
    case.project.write("inner/build.rs", &script)?;
    case.prove("41", |case| archive_answer(&case.outside("native"), 42), "42", "libanswer.a")
}

#[test]
fn the_c_library_of_another_system() -> Result<()> {
    let mut case = Case::new(PRINT_ANSWER, &[])?;
    // What the linker takes for the C library is a script; here it holds the program's function, too.
    let system = case.outside("system");
    archive_answer(&system, 1)?;
    let found = Command::new("cc").arg("-print-file-name=libc.so").output()?.stdout;
    let script = fs::read_to_string(String::from_utf8(found)?.trim())?;
    let group = format!("GROUP ( {}/libanswer.a ", system.display());
    assert!(script.contains("GROUP ("), "the C library is no linker script");
    fs::write(system.join("libc.so"), script.replace("GROUP (", &group))?;
    case.machine.set("RUSTFLAGS", format!("-Lnative={}", system.display()));
    let install = |case: &Case| -> Result<()> {
        let system = case.outside("system");
        archive_answer(&case.outside("newer"), 2)?;
        let script = fs::read_to_string(system.join("libc.so"))?;
        let new = script.replace("system/libanswer.a", "newer/libanswer.a");
        Ok(fs::write(system.join("libc.so"), new)?)
    };
    case.prove("1", install, "2", "libc.so")
}

#[test]
fn another_linker() -> Result<()> {
    let mut case = Case::new(PRINT_ANSWER, &[])?;
    let native = case.outside("native");
    compile_answer(&native, "one.o", 1)?;
    compile_answer(&native, "two.o", 2)?;
    let write = |native: &Path, object: &str| -> Result<()> {
        let script = native.join("linker.sh");
        fs::write(&script, format!("#!/bin/sh\nexec cc \"$@\" {}/{object}\n", native.display()))?;
        fs::set_permissions(script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(())
    };
    write(&native, "one.o")?;
    case.machine.set("RUSTFLAGS", format!("-Clinker={}", native.join("linker.sh").display()));
    case.prove("1", |case| write(&case.outside("native"), "two.o"), "2", "linker.sh")
}

#[test]
fn a_linker_that_appears_earlier_in_the_path() -> Result<()> {
    let mut case = Case::new(PRINT_ANSWER, &[])?;
    let native = case.outside("native");
    compile_answer(&native, "one.o", 1)?;
    compile_answer(&native, "two.o", 2)?;
    let early = case.outside("early");
    fs::create_dir(&early)?;
    let path = std::env::var("PATH")?;
    case.machine.set("PATH", format!("{}:{path}", early.display()));
    case.machine.set("RUSTFLAGS", format!("-Clink-arg={}/one.o", native.display()));
    let real = Command::new("sh").args(["-c", "command -v cc"]).output()?.stdout;
    let real = String::from_utf8(real)?.trim().to_owned();
    let appear = |case: &Case| -> Result<()> {
        let script = case.outside("early").join("cc");
        let native = case.outside("native");
        let text = format!(
            "#!/bin/sh\nfor word; do shift; case $word in */one.o) word={}/two.o;; esac; set -- \"$@\" \"$word\"; done\n\
             exec {real} \"$@\"\n",
            native.display()
        );
        fs::write(&script, text)?;
        Ok(fs::set_permissions(script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?)
    };
    case.prove("1", appear, "2", "cc")
}

#[test]
fn a_changed_proc_macro() -> Result<()> {
    let case = Case::new(PRINT_MADE, &["maker"])?.with_macro("\"one\".to_owned()")?;
    case.build()?;
    assert_eq!(case.project.run_app()?, "one");
    let case = case.with_macro("\"two\".to_owned()")?;
    assert_eq!(case.build()?.compiled, ["app", "maker"]);
    assert_eq!(case.project.run_app()?, "two");
    Ok(())
}

#[test]
fn native_code_of_a_proc_macro_behind_a_facade() -> Result<()> {
    let case = Case::new("fn main() { println!(\"{}\", user::get()); }\n", &["user"])?
        .with_macro("unsafe extern \"C\" { fn answer() -> i32; } unsafe { answer() }.to_string()")?;
    archive_answer(&case.outside("native"), 41)?;
    let script = format!(
        "fn main() {{ println!(\"cargo:rustc-link-search=native={}\"); println!(\"cargo:rustc-link-lib=static=answer\"); }}\n",
        case.outside("native").display()
    );
    case.project.write("maker/build.rs", &script)?;
    case.project.package("facade", &["maker"])?;
    case.project.write("facade/src/lib.rs", "pub use maker::made;\n")?;
    case.project.package("user", &["facade"])?;
    case.project.write("user/src/lib.rs", "pub fn get() -> &'static str { facade::made!() }\n")?;
    case.build()?;
    assert_eq!(case.project.run_app()?, "41");
    assert!(case.build()?.compiled.is_empty());
    archive_answer(&case.outside("native"), 42)?;
    case.build()?;
    assert_eq!(case.project.run_app()?, "42");
    Ok(())
}

#[test]
fn a_directory_exchanged_during_the_compile() -> Result<()> {
    let app = "const fn slow() -> u64 { let (mut i, mut x) = (0, 0); while i < 6_000_000 { x ^= i; i += 1; } x }\n\
        #[allow(long_running_const_eval)]\nconst X: u64 = slow();\n\
        fn main() { println!(\"{} {}\", include_str!(\"../data/x.txt\"), X % 2); }\n";
    let case = Case::new(app, &[])?;
    case.project.write("app/a/x.txt", "aaa")?;
    case.project.write("app/b/x.txt", "bbb")?;
    let exchange = |target: &str| -> Result<()> {
        let link = case.project.root.join("app/data");
        let _ = fs::remove_file(&link);
        Ok(std::os::unix::fs::symlink(target, link)?)
    };
    exchange("a")?;
    std::thread::scope(|scope| -> Result<()> {
        let build = scope.spawn(|| case.build());
        std::thread::sleep(std::time::Duration::from_millis(900));
        exchange("b")?;
        build.join().map_err(|_| anyhow::anyhow!("the build panicked"))?.map(drop)
    })?;
    case.build()?;
    assert!(case.project.run_app()?.starts_with("bbb"), "{}", case.project.run_app()?);
    Ok(())
}

#[test]
fn what_cannot_be_observed_is_not_stored() -> Result<()> {
    let bodies = [
        ("let _ = std::net::UdpSocket::bind(\"127.0.0.1:0\"); String::new()", "network"),
        ("let _ = std::os::unix::net::UnixStream::connect(\"/nowhere\"); String::new()", "local-socket"),
        ("std::fs::write(\"left-behind\", \"\").unwrap(); String::new()", "writes-elsewhere"),
        ("std::fs::read_to_string(\"/proc/self/cwd/Cargo.toml\").unwrap()", "process-link"),
        (
            "use std::process::{Command, Stdio}; Command::new(\"sleep\").arg(\"3\").stdin(Stdio::null())\
                .stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap(); String::new()",
            "leaves-processes",
        ),
    ];
    for (body, reason) in bodies {
        let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
        case.build()?;
        let not_stored = case.machine.statistics(&case.project.root)?["not_stored"].clone();
        assert_eq!(not_stored[reason].as_u64(), Some(1), "{reason}: {not_stored}");
        assert_eq!(case.build()?.compiled, ["app"], "{reason}");
    }
    Ok(())
}

#[test]
fn clippy_settings_that_appear() -> Result<()> {
    let case = Case::new("fn many(_: u8, _: u8, _: u8) {}\nfn main() { many(1, 2, 3); }\n", &[])?;
    let clippy = || -> Result<Build> {
        case.project.wipe()?;
        let build = case.machine.cargo(&case.project.root, &["clippy"])?;
        assert!(build.success, "{}", build.stderr);
        case.machine.cachec(&case.project.root, &["flush"])?;
        Ok(build)
    };
    assert!(!clippy()?.stderr.contains("too many arguments"));
    let units = case.machine.statistics(&case.project.root)?["stored"].as_u64();
    assert_eq!(units, Some(1));
    assert!(!clippy()?.stderr.contains("too many arguments"));
    assert_eq!(case.machine.statistics(&case.project.root)?["local_hits"].as_u64(), Some(1));
    case.project.write("clippy.toml", "too-many-arguments-threshold = 2\n")?;
    assert!(clippy()?.stderr.contains("too many arguments"));
    Ok(())
}

#[test]
fn a_large_program_that_was_edited_in_place_is_linked_again() -> Result<()> {
    let app = "static DATA: [u8; 65 << 20] = [7; 65 << 20];\n\
        fn main() { println!(\"{}\", DATA[std::env::args().count() << 10]); }\n";
    let case = Case::new(app, &[])?;
    let program = case.project.root.join("target/debug/app");
    assert_eq!(case.build()?.compiled, ["app"]);
    for edits in 0..2 {
        assert!(case.build()?.compiled.is_empty());
        assert_eq!(case.project.run_app()?, "7");
        assert_eq!(fs::metadata(&program)?.nlink(), 3, "lent by the tier, after {edits} edits");
        let modified = fs::metadata(&program)?.modified()?;
        fs::write(&program, "stripped")?;
        fs::File::options().append(true).open(&program)?.set_modified(modified)?;
        assert_eq!(case.build()?.compiled, ["app"]);
        assert_eq!(case.project.run_app()?, "7");
    }
    Ok(())
}

#[test]
fn an_output_edited_in_place_is_not_restored_elsewhere() -> Result<()> {
    let case =
        Case::new("fn main() { println!(\"{} {}\", inner::get(), maker::made!()); }\n", &["inner", "maker"])?;
    let case = case.with_macro("\"macro\".to_owned()")?;
    case.project.package("inner", &[])?;
    case.project.write("inner/src/lib.rs", "pub fn get() -> &'static str { \"unchanged\" }\n")?;
    for restored in [false, true] {
        // What was compiled, and what was restored, is perhaps the very file that the tier has.
        case.build()?;
        let libraries = case.project.compiled_libraries()?;
        assert_eq!(libraries.len(), 3, "{libraries:?}");
        if !restored {
            let links = |path: &PathBuf| fs::metadata(path).map(|metadata| metadata.nlink());
            let links = libraries.iter().map(links).collect::<Result<Vec<_>, _>>()?;
            assert!(links.iter().all(|count| *count > 1), "copied, not linked, into the tier: {links:?}");
        }
        for library in libraries {
            let mut content = fs::read(&library)?;
            let modified = fs::metadata(&library)?.modified()?;
            content.iter_mut().skip(200).for_each(|byte| *byte = 0);
            fs::write(&library, content)?;
            fs::File::options().append(true).open(&library)?.set_modified(modified)?;
        }
        let app =
            format!("fn main() {{ println!(\"{{}} {{}}{restored}\", inner::get(), maker::made!()); }}\n");
        case.project.write("app/src/main.rs", &app)?;
        case.build()?;
        assert_eq!(case.project.run_app()?, format!("unchanged macro{restored}"));
    }
    Ok(())
}

#[test]
fn tests_checks_and_lints_say_the_same_cold_and_warm() -> Result<()> {
    let mut case = Case::new("fn main() { let unused = inner::get(); }\n", &["inner"])?;
    case.project.package("inner", &[])?;
    case.project.write(
        "inner/src/lib.rs",
        "pub fn get() -> u8 { let x = 1; return 2; }\n#[cfg(test)]\nmod tests {\n    #[test]\n    \
         fn passes() { assert_eq!(super::get(), 2); }\n}\n",
    )?;
    let (mut misses, mut hits) = (0, 0);
    // With the units that miss first, and that hit then; building finds the library of the tests.
    let commands: [(&[&str], u64, u64); 4] = [
        (&["test"], 3, 3),
        (&["check"], 2, 2),
        (&["clippy"], 2, 2),
        (&["build", "--message-format=json"], 1, 3),
    ];
    for (command, new_misses, new_hits) in commands {
        let run = |case: &Case| -> Result<Build> {
            case.project.wipe()?;
            let build = case.machine.cargo(&case.project.root, &[command, &["--jobs=1"]].concat())?;
            assert!(build.success, "{command:?}: {}", build.stderr);
            let _ = case.machine.cachec(&case.project.root, &["flush"]);
            Ok(build)
        };
        let cold = run(&case)?;
        let warm = run(&case)?;
        assert!(warm.compiled.is_empty(), "{command:?}: {:?}", warm.compiled);
        let statistics = case.machine.statistics(&case.project.root)?;
        misses += new_misses;
        hits += new_hits;
        assert_eq!(
            (statistics["misses"].as_u64(), statistics["local_hits"].as_u64()),
            (Some(misses), Some(hits))
        );
        case.machine.set("CACHEC_MODE", "off");
        let plain = run(&case)?;
        case.machine.set("CACHEC_MODE", "read-write");
        let text = |build: &Build| {
            let lines = [&build.diagnostics(), &build.stdout]
                .map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
            let timeless = |line: &String| !line.contains("finished in");
            let mut lines: Vec<String> = lines.concat().into_iter().filter(timeless).collect();
            lines.sort_unstable();
            lines
        };
        assert_eq!(text(&cold), text(&plain), "{command:?}, cold");
        assert_eq!(text(&warm), text(&plain), "{command:?}, warm");
    }
    Ok(())
}

#[test]
fn a_directory_link_that_leads_elsewhere() -> Result<()> {
    let cases = [
        (
            "let mut names: Vec<_> = std::fs::read_dir(\"app/data\").unwrap()\
             .map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect(); names.sort(); names.join(\" \")",
            "only.txt",
            "more.txt only.txt",
        ),
        ("std::fs::read_to_string(\"app/data/../up.txt\").unwrap()", "a", "b"),
        (
            "let output = std::process::Command::new(\"sh\").args([\"-c\", \"cd app/data && cat only.txt\"]).output();\
             String::from_utf8(output.unwrap().stdout).unwrap()",
            "a",
            "b",
        ),
    ];
    for (body, before, after) in cases {
        let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
        for (name, letter) in [("first", "a"), ("second", "b")] {
            case.project.write(&format!("app/{name}/up.txt"), letter)?;
            case.project.write(&format!("app/{name}/data/only.txt"), letter)?;
        }
        case.project.write("app/second/data/more.txt", "")?;
        let link = case.project.root.join("app/data");
        std::os::unix::fs::symlink("first/data", &link)?;
        let retarget = |case: &Case| -> Result<()> {
            let link = case.project.root.join("app/data");
            fs::remove_file(&link)?;
            Ok(std::os::unix::fs::symlink("second/data", link)?)
        };
        case.prove(before, retarget, after, "app/data")?;
    }
    Ok(())
}

#[test]
fn search_paths_of_programs_and_libraries() -> Result<()> {
    let body = "let output = std::process::Command::new(\"told\").output().unwrap(); \
        String::from_utf8(output.stdout).unwrap().trim().to_owned()";
    let mut case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
    for name in ["one", "two"] {
        let directory = case.outside(name);
        fs::create_dir(&directory)?;
        fs::write(directory.join("told"), format!("#!/bin/sh\necho {name}\n"))?;
        fs::set_permissions(directory.join("told"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    let path = std::env::var("PATH")?;
    for (first, compiled) in [("one", true), ("one", false), ("two", true), ("one", false)] {
        case.machine.set("PATH", format!("{}:{path}", case.outside(first).display()));
        assert_eq!(!case.build()?.compiled.is_empty(), compiled, "{first}");
        assert_eq!(case.project.run_app()?, first);
    }
    case.machine.set("LD_PRELOAD", "/nowhere.so");
    assert!(!case.build()?.compiled.is_empty());
    Ok(())
}

#[test]
fn a_program_that_may_no_longer_be_executed() -> Result<()> {
    let body = "match std::process::Command::new(\"./tool.sh\").output() { \
        Ok(output) => String::from_utf8(output.stdout).unwrap().trim().to_owned(), Err(_) => \"refused\".to_owned() }";
    let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
    case.project.write("tool.sh", "#!/bin/sh\necho ran\n")?;
    let mode = |project: &Project, mode: u32| -> Result<()> {
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        Ok(fs::set_permissions(project.root.join("tool.sh"), permissions)?)
    };
    mode(&case.project, 0o755)?;
    case.prove("ran", |case| mode(&case.project, 0o644), "refused", "tool.sh")
}

#[test]
fn executing_a_pipe_does_not_hang() -> Result<()> {
    let body = "std::process::Command::new(\"app/pipe\").output().is_ok().to_string()";
    let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
    assert!(Command::new("mkfifo").arg(case.project.root.join("app/pipe")).status()?.success());
    case.build()?;
    assert_eq!(case.project.run_app()?, "false");
    Ok(())
}

#[test]
fn a_file_that_could_not_be_made() -> Result<()> {
    let body = "std::fs::write(\"app/missing/file\", \"\").is_ok().to_string()";
    let case = Case::new(PRINT_MADE, &["maker"])?.with_macro(body)?;
    let make = |case: &Case| Ok(fs::create_dir(case.project.root.join("app/missing"))?);
    case.prove("false", make, "true", "app/missing")
}

#[test]
fn a_process_that_outlives_the_compile_goes_on() -> Result<()> {
    let case = Case::new(PRINT_MADE, &["maker"])?;
    let file = case.outside("alive");
    let case = case.with_macro(&format!(
        "use std::process::{{Command, Stdio}}; Command::new(\"sh\").args([\"-c\", \"sleep 2; echo > {}\"])\
         .stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap(); String::new()",
        file.display()
    ))?;
    case.build()?;
    assert!(!file.exists(), "the build has waited");
    std::thread::sleep(std::time::Duration::from_secs(4));
    assert!(file.exists(), "its calls have failed");
    Ok(())
}

#[test]
fn a_program_that_finds_its_libraries_by_rpath_runs_where_it_was_moved() -> Result<()> {
    let mut case = Case::new("fn main() { println!(\"runs\"); }\n", &[])?;
    case.machine.set("RUSTFLAGS", "-Crpath -Cprefer-dynamic");
    case.build()?;
    assert_eq!(case.project.run_app()?, "runs");
    case.project = case.project.copy_to(&case.outside("much/deeper/down/checkout"))?;
    case.build()?;
    assert_eq!(case.project.run_app()?, "runs");
    Ok(())
}

#[test]
fn a_source_that_names_a_place_means_that_place() -> Result<()> {
    let mut case = Case::new("", &[])?;
    let text = case.project.root.join("text");
    case.project.write("Cargo.toml", "[workspace]\nmembers = [\"app\"]\nresolver = \"3\"\n")?;
    let source = format!("fn main() {{ println!(\"{{}}\", include_str!(\"{}\")); }}\n", text.display());
    case.project.write("app/src/main.rs", &source)?;
    fs::write(&text, "one")?;
    case.build()?;
    assert_eq!(case.project.run_app()?, "one");
    case.project = case.project.copy_to(&case.outside("moved"))?;
    fs::write(&text, "two")?;
    case.build()?;
    assert_eq!(case.project.run_app()?, "two");
    Ok(())
}

#[test]
fn another_mount_namespace_has_another_agent() -> Result<()> {
    let case = Case::new("fn main() { println!(\"{}\", include_str!(\"text\")); }\n", &[])?;
    case.project.write("app/src/text", "one")?;
    case.build()?;
    let other = case.project.copy_to(&case.outside("other"))?;
    other.write("app/src/text", "two")?;
    let target = case.outside("target");
    let script = format!(
        "mount --bind {} {root} && cd {root} && exec {} build --quiet --target-dir {}",
        other.root.display(),
        cachec_bench::programs::cargo().display(),
        target.display(),
        root = case.project.root.display(),
    );
    let output =
        case.machine.command(Path::new("unshare")).args(["--mount", "sh", "-c", &script]).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    if error.contains("ermission") || error.contains("not permitted") {
        eprintln!("SKIPPED: no mount namespace may be made here: {error}");
        return Ok(());
    }
    assert!(output.status.success(), "{error}");
    let app = Command::new(target.join("debug/app")).output()?;
    assert_eq!(String::from_utf8(app.stdout)?.trim(), "two");
    Ok(())
}
