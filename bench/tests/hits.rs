//! When a unit is restored, and when it is compiled: outcome, compiler processes and counters.

use std::fs;

use anyhow::Result;
use cachec_bench::{Build, Machine, Project, Server};
use cachec_protocol::pack::Decompressor;

const NOTHING: [&str; 0] = [];
const EVERYTHING: [&str; 3] = ["app", "leaf", "middle"];

struct Bench {
    machine: Machine,
    project: Project,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn new(machine: Machine) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let project = Project::three_crates(&directory.path().join("checkout"))?;
        Ok(Self { machine, project, _directory: directory })
    }

    fn build(&self, arguments: &[&str]) -> Result<Build> {
        let build = self.machine.cargo(&self.project.root, &[&["build"], arguments].concat())?;
        assert!(build.success, "{}", build.stderr);
        assert_eq!(build.notices(), NOTHING, "{}", build.stderr);
        self.machine.cachec(&self.project.root, &["flush"])?;
        Ok(build)
    }

    /// Builds with a fresh target directory.
    fn rebuild(&self) -> Result<Build> {
        self.project.wipe()?;
        self.build(&[])
    }

    fn counter(&self, name: &str) -> Result<u64> {
        Ok(self.machine.statistics(&self.project.root)?[name].as_u64().unwrap_or_default())
    }
}

fn with_local_tier() -> Result<Bench> {
    Bench::new(Machine::new()?)
}

#[test]
fn a_wiped_target_directory_is_restored_from_the_local_tier() -> Result<()> {
    let bench = with_local_tier()?;
    assert_eq!(bench.build(&[])?.compiled, EVERYTHING);
    assert_eq!((bench.counter("misses")?, bench.counter("stored")?), (3, 3));
    assert_eq!(bench.rebuild()?.compiled, NOTHING);
    assert_eq!((bench.counter("local_hits")?, bench.counter("misses")?), (3, 3));
    assert_eq!(bench.project.run_app()?, "app middle one unset");
    Ok(())
}

#[test]
fn another_machine_is_served_by_the_server() -> Result<()> {
    let data = tempfile::tempdir()?;
    let server = Server::start(data.path(), &[])?;
    let first = Bench::new(Machine::with_server(&server.url)?)?;
    assert_eq!(first.build(&[])?.compiled, EVERYTHING);
    assert_eq!(first.counter("uploaded")?, 3);
    // Other checkout, target directory, CARGO_HOME and home; no local tier.
    let second = Bench::new(Machine::with_server(&server.url)?)?;
    assert_ne!(first.project.root, second.project.root);
    assert_eq!(second.build(&[])?.compiled, NOTHING);
    assert_eq!((second.counter("remote_hits")?, second.counter("misses")?), (3, 0));
    assert_eq!(second.project.run_app()?, "app middle one unset");
    Ok(())
}

#[test]
fn what_the_server_has_sent_is_kept_in_the_local_tier() -> Result<()> {
    let data = tempfile::tempdir()?;
    let server = Server::start(data.path(), &[])?;
    let first = Bench::new(Machine::with_server(&server.url)?)?;
    first.build(&[])?;
    let laptop = Bench::new(Machine::new()?.with("CACHEC_URL", &server.url))?;
    assert_eq!(laptop.build(&[])?.compiled, NOTHING);
    assert_eq!(laptop.counter("remote_hits")?, 3);
    let before = server.requests()?;
    assert_eq!(laptop.rebuild()?.compiled, NOTHING);
    assert_eq!((laptop.counter("local_hits")?, server.requests()?), (3, before));
    Ok(())
}

#[test]
fn a_fresh_machine_asks_once_and_later_for_what_has_changed() -> Result<()> {
    let data = tempfile::tempdir()?;
    let server = Server::start(data.path(), &[])?;
    let directory = tempfile::tempdir()?;
    let project = Project::three_crates(&directory.path().join("checkout"))?;
    let first = Machine::with_server(&server.url)?;
    // The lock file says which workspace it is, before the first question.
    assert!(first.cargo(&project.root, &["generate-lockfile"])?.success);
    let build = |machine: &Machine| -> Result<(Vec<String>, u64)> {
        project.wipe()?;
        let before = server.requests()?;
        let build = machine.cargo(&project.root, &["build"])?;
        assert!(build.success && build.notices().is_empty(), "{}", build.stderr);
        Ok((build.compiled, server.requests()? - before))
    };
    let fresh = || -> Result<Machine> {
        Ok(Machine::with_server(&server.url)?.with("RUSTC", first.path("bin/rustc").to_string_lossy()))
    };
    assert_eq!(build(&first)?.0, ["app", "leaf", "middle"]);
    assert_eq!(build(&fresh()?)?, (vec![], 1));
    // The next commit: its build is told all but what has changed, and tells the next.
    project.write("app/src/main.rs", "fn main() { println!(\"second {}\", middle::text()); }\n")?;
    let (compiled, requests) = build(&fresh()?)?;
    assert_eq!(compiled, ["app"]);
    assert!(requests <= 5, "{requests} requests");
    assert_eq!(build(&fresh()?)?, (vec![], 1));
    assert_eq!(project.run_app()?, "second middle one unset");
    // From elsewhere it is the same build.
    project.wipe()?;
    let (before, manifest) = (server.requests()?, project.root.join("Cargo.toml"));
    let arguments = ["build", "-j1", "--manifest-path", &manifest.to_string_lossy()];
    let named = fresh()?.cargo(directory.path(), &arguments)?;
    assert!(named.success && named.compiled.is_empty(), "{}", named.stderr);
    assert_eq!(server.requests()? - before, 1);
    Ok(())
}

/// Three packages with build scripts, built once, for which a server keeps a bundle. The scripts' programs are told of
/// the first machine's compiler.
fn bundled() -> Result<(Bench, Server, tempfile::TempDir)> {
    let data = tempfile::tempdir()?;
    let server = Server::start(data.path(), &["--recompress-level", "0"])?;
    let first = Bench::new(Machine::with_server(&server.url)?)?;
    for package in ["app", "leaf", "middle"] {
        first
            .project
            .write(&format!("{package}/build.rs"), &format!("fn main() {{ {package:?}.len(); }}\n"))?;
    }
    assert!(first.machine.cargo(&first.project.root, &["generate-lockfile"])?.success);
    first.build(&[])?;
    Ok((first, server, data))
}

/// Builds in a fresh container; returns what it has compiled and received.
fn build_elsewhere(first: &Bench, server: &Server) -> Result<(Vec<String>, u64)> {
    let rustc = first.machine.path("bin/rustc");
    let machine = Machine::with_server(&server.url)?.with("RUSTC", rustc.to_string_lossy());
    first.project.wipe()?;
    let build = machine.cargo(&first.project.root, &["build"])?;
    assert!(build.success && build.notices().is_empty(), "{}", build.stderr);
    let remote = &machine.statistics(&first.project.root)?["remote"];
    Ok((build.compiled, remote["received_bytes"].as_u64().unwrap_or_default()))
}

/// Files that a server keeps blobs in.
fn blob_files(data: &std::path::Path) -> Result<Vec<(std::path::PathBuf, fs::Metadata)>> {
    let mut files = Vec::new();
    for directory in fs::read_dir(data.join("blobs"))? {
        for file in fs::read_dir(directory?.path())? {
            let file = file?;
            files.push((file.path(), file.metadata()?));
        }
    }
    Ok(files)
}

#[test]
fn programs_of_build_scripts_come_in_a_bundle() -> Result<()> {
    let (first, server, data) = bundled()?;
    let stored: u64 = blob_files(data.path())?.iter().map(|(_, metadata)| metadata.len()).sum();
    let requests = server.requests()?;
    let (compiled, received) = build_elsewhere(&first, &server)?;
    assert_eq!((compiled.as_slice(), server.requests()? - requests), (&[][..], 1));
    // Each of the three has the standard library in it, and nearly nothing else; the server keeps them by themselves too.
    assert!(received * 2 < stored, "{received} of {stored} bytes");
    Ok(())
}

#[test]
fn without_their_bundle_programs_come_one_by_one_and_a_later_build_has_one_again() -> Result<()> {
    let (first, server, data) = bundled()?;
    let content_bytes = |path: &std::path::PathBuf| -> Option<u64> {
        Some(Decompressor::new(fs::File::open(path).ok()?, 1 << 30).ok()?.finish().ok()?.1)
    };
    let files = blob_files(data.path())?;
    // A program alone has 4.3 MB.
    for (path, _) in files.iter().filter(|(path, _)| content_bytes(path) > Some(6_000_000)) {
        fs::remove_file(path)?;
    }
    // On a busy machine a build may not get round to leaving a record.
    let mut requests = Vec::new();
    for _ in 0..4 {
        let before = server.requests()?;
        assert_eq!(build_elsewhere(&first, &server)?.0, NOTHING);
        requests.push(server.requests()? - before);
    }
    assert!(requests[0] > 1 && requests.contains(&1), "{requests:?}");
    Ok(())
}

#[test]
fn a_moved_checkout_is_restored() -> Result<()> {
    let mut bench = with_local_tier()?;
    bench.build(&[])?;
    let elsewhere = tempfile::tempdir()?;
    bench.project = bench.project.copy_to(&elsewhere.path().join("another/place"))?;
    let out = elsewhere.path().join("out");
    let build = bench.build(&["--target-dir", &out.to_string_lossy()])?;
    assert_eq!(build.compiled, NOTHING);
    let dep_info = fs::read_dir(out.join("debug/deps"))?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with("leaf-"))
        .map(|entry| fs::read_to_string(entry.path()));
    let dep_info = dep_info.unwrap_or_else(|| Ok(String::new()))?;
    assert!(dep_info.contains(&*out.to_string_lossy()), "dep-info names this target directory: {dep_info}");
    // The next build compiles nothing, so cargo is content with what was restored.
    assert_eq!(bench.build(&["--target-dir", &out.to_string_lossy()])?.compiled, NOTHING);
    Ok(())
}

#[test]
fn after_a_restored_build_cargo_finds_everything_fresh() -> Result<()> {
    let bench = with_local_tier()?;
    bench.build(&[])?;
    bench.rebuild()?;
    let again = bench.build(&["-v"])?;
    assert_eq!(again.compiled, NOTHING);
    assert_eq!(again.stderr.matches("Fresh ").count(), 3, "{}", again.stderr);
    Ok(())
}

#[test]
fn a_restored_checkout_stays_fresh_while_another_is_restored() -> Result<()> {
    let mut bench = with_local_tier()?;
    bench.build(&[])?;
    let elsewhere = tempfile::tempdir()?;
    let another = bench.project.copy_to(&elsewhere.path().join("checkout"))?;
    // Its libraries are the tier's own files.
    assert_eq!(bench.rebuild()?.compiled, NOTHING);
    let first = std::mem::replace(&mut bench.project, another);
    assert_eq!(bench.rebuild()?.compiled, NOTHING);
    let second = std::mem::replace(&mut bench.project, first);
    for checkout in [None, Some(second)] {
        bench.project = checkout.unwrap_or(bench.project);
        let again = bench.build(&["-v"])?;
        assert_eq!(again.compiled, NOTHING);
        assert_eq!(again.stderr.matches("Fresh ").count(), 3, "{}", again.stderr);
    }
    Ok(())
}

#[test]
fn restoring_over_what_was_restored_leaves_nothing_else() -> Result<()> {
    let bench = with_local_tier()?;
    bench.project.write("leaf/build.rs", "fn main() {}\n")?;
    bench.build(&[])?;
    bench.rebuild()?;
    // The script's program is linked to the very file that it is.
    let source = bench.project.root.join("leaf/build.rs");
    fs::File::options().append(true).open(source)?.set_modified(std::time::SystemTime::now())?;
    let again = bench.build(&["-v"])?;
    assert_eq!(again.compiled, NOTHING);
    assert_eq!(again.stderr.matches("Fresh ").count(), 0, "{}", again.stderr);
    let built = bench.project.root.join("target/debug/build");
    for directory in fs::read_dir(built)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()? {
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            assert!(!name.starts_with(".cachec-"), "{name}");
        }
    }
    Ok(())
}

#[test]
fn a_changed_input_compiles_what_depends_on_it() -> Result<()> {
    let bench = with_local_tier()?;
    bench.build(&[])?;
    bench.project.write("leaf/src/text.txt", "two")?;
    assert_eq!(bench.rebuild()?.compiled, EVERYTHING, "an included file, and with it the dependencies");
    assert_eq!(bench.project.run_app()?, "app middle two unset");
    bench
        .project
        .write("middle/src/lib.rs", "pub fn text() -> String { format!(\"MIDDLE {}\", leaf::text()) }\n")?;
    assert_eq!(bench.rebuild()?.compiled, ["app", "middle"], "a source file");
    assert_eq!(bench.project.run_app()?, "app MIDDLE two unset");
    bench.project.write("leaf/src/text.txt", "one")?;
    assert_eq!(bench.rebuild()?.compiled, ["app", "middle"], "leaf as it was is known");
    assert_eq!(bench.project.run_app()?, "app MIDDLE one unset");
    Ok(())
}

#[test]
fn a_module_file_that_appears_beside_another_is_noticed() -> Result<()> {
    let bench = with_local_tier()?;
    bench.project.write("leaf/src/lib.rs", "mod inner;\npub fn text() -> String { inner::text() }\n")?;
    bench.project.write("leaf/src/inner.rs", "pub fn text() -> String { \"inner\".to_owned() }\n")?;
    bench.build(&[])?;
    bench.project.write("leaf/src/inner/mod.rs", "pub fn text() -> String { \"other\".to_owned() }\n")?;
    bench.project.wipe()?;
    let build = bench.machine.cargo(&bench.project.root, &["build"])?;
    assert!(!build.success && build.stderr.contains("found at both"), "{}", build.stderr);
    Ok(())
}

#[test]
fn a_source_that_changes_during_the_compile_is_not_stored() -> Result<()> {
    let bench = with_local_tier()?;
    // This compiler takes its time to end after it has compiled leaf.
    let script = bench.machine.path("bin/rustc");
    let text = fs::read_to_string(&script)?.replace("exec ", "real() { ");
    let slow = "case \" $* \" in *\" --crate-name leaf \"*) sleep 2;; esac";
    fs::write(&script, format!("{text}}}\nreal \"$@\"\ncode=$?\n{slow}\nexit $code\n"))?;
    let machine = &bench.machine;
    let deps = bench.project.root.join("target/debug/deps");
    let compiled = || {
        fs::read_dir(&deps).is_ok_and(|mut list| {
            list.any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().ends_with(".rlib")))
        })
    };
    let build = std::thread::scope(|scope| -> Result<Build> {
        let build = scope.spawn(|| machine.cargo(&bench.project.root, &["build"]));
        while !compiled() && !build.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        // The file changes, and has an old mtime afterwards.
        bench.project.write("leaf/src/text.txt", "two")?;
        let text = fs::File::options().append(true).open(bench.project.root.join("leaf/src/text.txt"))?;
        text.set_modified(std::time::UNIX_EPOCH)?;
        build.join().map_err(|_| anyhow::anyhow!("the build panicked"))?
    })?;
    assert!(build.success, "{}", build.stderr);
    assert_eq!(bench.project.run_app()?, "app middle one unset");
    machine.cachec(&bench.project.root, &["flush"])?;
    let not_stored = machine.statistics(&bench.project.root)?["not_stored"].clone();
    assert_eq!(not_stored["input-changed"].as_u64(), Some(1), "{not_stored}");
    bench.project.wipe()?;
    machine.cargo(&bench.project.root, &["build"])?;
    assert_eq!(bench.project.run_app()?, "app middle two unset");
    Ok(())
}

#[test]
fn a_changed_variable_of_env_is_compiled_and_each_value_known_afterwards() -> Result<()> {
    let mut bench = with_local_tier()?;
    for (setting, compiled) in [("a", &EVERYTHING[..]), ("b", &EVERYTHING[..]), ("a", &NOTHING[..])] {
        bench.machine = bench.machine.with("LEAF_SETTING", setting);
        assert_eq!(bench.rebuild()?.compiled, compiled, "{setting}");
        assert_eq!(bench.project.run_app()?, format!("app middle one {setting}"));
    }
    bench.machine = bench.machine.without("LEAF_SETTING");
    assert_eq!(bench.rebuild()?.compiled, EVERYTHING);
    assert_eq!(bench.project.run_app()?, "app middle one unset");
    Ok(())
}

#[test]
fn a_changed_flag_is_compiled() -> Result<()> {
    let mut bench = with_local_tier()?;
    bench.build(&[])?;
    bench.machine = bench.machine.with("RUSTFLAGS", "-Coverflow-checks=no");
    assert_eq!(bench.rebuild()?.compiled, EVERYTHING);
    bench.machine = bench.machine.with("RUSTC_BOOTSTRAP", "1");
    assert_eq!(bench.rebuild()?.compiled, EVERYTHING);
    Ok(())
}

#[test]
fn another_compiler_compiles() -> Result<()> {
    let bench = with_local_tier()?;
    bench.build(&[])?;
    bench.machine.change_compiler()?;
    assert_eq!(bench.rebuild()?.compiled, EVERYTHING);
    assert_eq!(bench.rebuild()?.compiled, NOTHING);
    Ok(())
}

#[test]
fn warnings_are_replayed_byte_for_byte() -> Result<()> {
    let mut bench = with_local_tier()?;
    let cold = bench.build(&[])?;
    let warm = bench.rebuild()?;
    assert_eq!(warm.compiled, NOTHING);
    bench.machine = bench.machine.with("CACHEC_MODE", "off");
    bench.project.wipe()?;
    let plain = bench.machine.cargo(&bench.project.root, &["build"])?;
    assert!(plain.diagnostics().contains("unused variable"), "{}", plain.stderr);
    assert_eq!(cold.diagnostics(), plain.diagnostics());
    assert_eq!(warm.diagnostics(), plain.diagnostics());
    Ok(())
}

#[test]
fn checking_is_cached_beside_building() -> Result<()> {
    let bench = with_local_tier()?;
    let check = || -> Result<Build> {
        bench.project.wipe()?;
        let build = bench.machine.cargo(&bench.project.root, &["check"])?;
        bench.machine.cachec(&bench.project.root, &["flush"])?;
        Ok(build)
    };
    bench.build(&[])?;
    assert_eq!(check()?.compiled, EVERYTHING);
    assert_eq!(check()?.compiled, NOTHING);
    Ok(())
}

#[test]
fn two_builds_at_once_compile_each_library_once() -> Result<()> {
    let bench = with_local_tier()?;
    let other = bench.project.copy_to(&bench.machine.path("other"))?;
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| bench.machine.cargo(&bench.project.root, &["build"]));
        let second = bench.machine.cargo(&other.root, &["build"]);
        (first.join(), second)
    });
    let first = first.map_err(|_| anyhow::anyhow!("the first build panicked"))??;
    assert!(first.success && second?.success, "{}", first.stderr);
    assert_eq!(bench.counter("units")?, 6);
    assert_eq!((bench.counter("misses")?, bench.counter("local_hits")?), (3, 3));
    assert_eq!(bench.project.run_app()?, "app middle one unset");
    assert_eq!(other.run_app()?, "app middle one unset");
    Ok(())
}

#[test]
fn incremental_units_are_left_alone_and_cached_in_ci() -> Result<()> {
    let mut bench = with_local_tier()?;
    bench.machine = bench.machine.with("CARGO_INCREMENTAL", "1");
    bench.build(&[])?;
    assert_eq!(bench.counter("stored")?, 0);
    let refused = bench.machine.statistics(&bench.project.root)?["refused"]["incremental"].clone();
    assert_eq!((refused["leaf"].as_u64(), refused["middle"].as_u64()), (Some(1), Some(1)));
    assert!(bench.project.root.join("target/debug/incremental").read_dir()?.next().is_some());
    // Nobody asked for it, and this is CI: the flag is dropped, which is said once.
    bench.machine = bench.machine.with("CI", "true").without("CARGO_INCREMENTAL");
    bench.project.wipe()?;
    let build = bench.machine.cargo(&bench.project.root, &["build"])?;
    assert!(build.success && build.notices().len() == 1, "{}", build.stderr);
    assert!(build.notices()[0].contains("incremental compilation is off"), "{:?}", build.notices());
    bench.machine.cachec(&bench.project.root, &["flush"])?;
    bench.project.wipe()?;
    assert_eq!(bench.machine.cargo(&bench.project.root, &["build"])?.compiled, NOTHING);
    Ok(())
}

#[test]
fn read_only_restores_and_stores_nothing() -> Result<()> {
    let mut bench = with_local_tier()?;
    bench.build(&[])?;
    bench.machine = bench.machine.with("CACHEC_MODE", "read-only");
    assert_eq!(bench.rebuild()?.compiled, NOTHING);
    bench.project.write("leaf/src/text.txt", "two")?;
    assert_eq!(bench.rebuild()?.compiled, EVERYTHING);
    assert_eq!(bench.rebuild()?.compiled, EVERYTHING);
    Ok(())
}

#[test]
fn a_failed_compile_is_not_stored_and_fails_alike() -> Result<()> {
    let bench = with_local_tier()?;
    bench.project.write("leaf/src/lib.rs", "pub fn text() -> String { 1 }\n")?;
    for _ in 0..2 {
        let build = bench.machine.cargo(&bench.project.root, &["build"])?;
        assert!(!build.success);
        assert!(build.stderr.contains("mismatched types"), "{}", build.stderr);
        // Once under remapped paths, and once as cargo asked.
        assert_eq!(build.compiled, ["leaf", "leaf"]);
    }
    assert_eq!(bench.counter("stored")?, 0);
    Ok(())
}

#[test]
fn a_result_that_contains_a_path_is_bound_to_it() -> Result<()> {
    let mut bench = with_local_tier()?;
    bench
        .project
        .write("leaf/src/lib.rs", "pub fn text() -> String { env!(\"CARGO_MANIFEST_DIR\").to_owned() }\n")?;
    bench.build(&[])?;
    assert!(bench.counter("bound")? >= 1);
    assert_eq!(bench.rebuild()?.compiled, NOTHING, "at the same path it is restored");
    let elsewhere = tempfile::tempdir()?;
    bench.project = bench.project.copy_to(&elsewhere.path().join("moved"))?;
    bench.rebuild()?;
    assert_eq!(bench.project.run_app()?, format!("app middle {}", bench.project.root.join("leaf").display()));
    // Not the path itself is in the output, but something made of it.
    bench.project.write(
        "leaf/src/lib.rs",
        "const N: usize = env!(\"CARGO_MANIFEST_DIR\").len();\npub fn text() -> String { N.to_string() }\n",
    )?;
    bench.rebuild()?;
    let again = tempfile::tempdir()?;
    bench.project = bench.project.copy_to(&again.path().join("moved/deeper"))?;
    bench.rebuild()?;
    let length = bench.project.root.join("leaf").as_os_str().len();
    assert_eq!(bench.project.run_app()?, format!("app middle {length}"));
    Ok(())
}

#[test]
fn a_length_made_of_a_path_is_bound_even_beside_an_inclusion() -> Result<()> {
    let mut bench = with_local_tier()?;
    bench.machine = bench.machine.with("CARGO_PROFILE_DEV_OPT_LEVEL", "3");
    bench.project.write("leaf/d.txt", "d")?;
    bench.project.write(
        "leaf/src/lib.rs",
        "const D: &str = include_str!(concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/d.txt\"));\n\
         pub fn text() -> String { length().to_string() + D }\n\
         #[inline(never)] fn length() -> usize { env!(\"CARGO_MANIFEST_DIR\").len() }\n",
    )?;
    bench.build(&[])?;
    let elsewhere = tempfile::tempdir()?;
    bench.project = bench.project.copy_to(&elsewhere.path().join("longer/than/before"))?;
    bench.rebuild()?;
    let length = bench.project.root.join("leaf").as_os_str().len();
    assert_eq!(bench.project.run_app()?, format!("app middle {length}d"));
    Ok(())
}

#[test]
fn an_inclusion_below_a_path_variable_stays_portable() -> Result<()> {
    let mut bench = with_local_tier()?;
    bench.project.write("leaf/d.txt", "d")?;
    bench.project.write(
        "leaf/src/lib.rs",
        "pub fn text() -> &'static str { include_str!(concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/d.txt\")) }\n",
    )?;
    bench.build(&[])?;
    assert_eq!(bench.counter("bound")?, 0);
    let elsewhere = tempfile::tempdir()?;
    bench.project = bench.project.copy_to(&elsewhere.path().join("moved"))?;
    assert_eq!(bench.rebuild()?.compiled, NOTHING);
    Ok(())
}

/// A workspace whose program uses a package outside of it, so that cargo names its sources absolutely.
fn with_outside_package(source: &str) -> Result<(Bench, tempfile::TempDir)> {
    let bench = with_local_tier()?;
    let outside = tempfile::tempdir()?;
    let package = Project { root: outside.path().to_owned() };
    package.package("far", &[])?;
    package.write("far/src/lib.rs", source)?;
    package.write("far/src/lib.rs.txt", "far")?;
    let manifest = fs::read_to_string(bench.project.root.join("app/Cargo.toml"))?;
    let dependency = format!("far = {{ path = \"{}\" }}\n", outside.path().join("far").display());
    bench.project.write("app/Cargo.toml", &(manifest + &dependency))?;
    bench.project.write("app/src/main.rs", "fn main() { println!(\"{}\", far::text()); }\n")?;
    Ok((bench, outside))
}

#[test]
fn a_source_that_includes_beside_its_own_file_compiles() -> Result<()> {
    let source = "pub fn text() -> &'static str { include_str!(concat!(file!(), \".txt\")) }\n";
    let (bench, _outside) = with_outside_package(source)?;
    bench.build(&[])?;
    assert_eq!(bench.project.run_app()?, "far");
    let not_stored = bench.machine.statistics(&bench.project.root)?["not_stored"].clone();
    assert_eq!(not_stored["needs-real-paths"].as_u64(), Some(1), "{not_stored}");
    Ok(())
}

#[test]
fn diagnostics_name_real_paths_with_and_without_colour() -> Result<()> {
    for colour in ["never", "always"] {
        for source in ["pub fn text() -> u8 { let x = 1; 2 }\n", "pub fn text() -> u8 { \"\" }\n"] {
            let (mut bench, outside) = with_outside_package(source)?;
            bench.machine = bench.machine.with("CARGO_TERM_COLOR", colour);
            let cold = bench.machine.cargo(&bench.project.root, &["build"])?;
            bench.project.wipe()?;
            bench.machine.cachec(&bench.project.root, &["flush"])?;
            let warm = bench.machine.cargo(&bench.project.root, &["build"])?;
            bench.project.wipe()?;
            bench.machine.set("CACHEC_MODE", "off");
            let plain = bench.machine.cargo(&bench.project.root, &["build"])?;
            assert!(plain.stderr.contains(&*outside.path().to_string_lossy()), "{}", plain.stderr);
            let about_far = |build: &Build| -> Vec<String> {
                let lines = build.stderr.lines().skip_while(|line| {
                    !line.contains("unused variable: `x`") && !line.contains("mismatched")
                });
                lines.take(5).map(str::to_owned).collect()
            };
            assert_eq!(about_far(&cold), about_far(&plain), "{colour}, cold");
            assert_eq!(about_far(&warm), about_far(&plain), "{colour}, warm");
        }
    }
    Ok(())
}

#[test]
fn restored_files_have_the_modes_of_this_build() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let bench = with_local_tier()?;
    bench.build(&[])?;
    for (umask, library, program) in [("077", 0o600, 0o700), ("002", 0o664, 0o775), ("022", 0o644, 0o755)] {
        bench.project.wipe()?;
        let cargo = cachec_bench::programs::cargo();
        let status = bench
            .machine
            .command(std::path::Path::new("sh"))
            .args(["-c", &format!("umask {umask} && exec \"$0\" build --quiet")])
            .arg(cargo)
            .current_dir(&bench.project.root)
            .stderr(std::process::Stdio::null())
            .status()?;
        assert!(status.success());
        for entry in fs::read_dir(bench.project.root.join("target/debug/deps"))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let expected = if name.contains('.') { library } else { program };
            assert_eq!(entry.metadata()?.permissions().mode() & 0o777, expected, "{umask} {name}");
        }
    }
    Ok(())
}

#[test]
fn a_compiler_that_is_killed_is_reported_as_killed() -> Result<()> {
    let bench = with_local_tier()?;
    let script = bench.machine.path("bin/rustc");
    let text = fs::read_to_string(&script)?;
    for (signal, name) in [("SEGV", "signal: 11"), ("KILL", "signal: 9"), ("PIPE", "signal: 13")] {
        let die = format!("case \" $* \" in *\" --crate-name leaf \"*) kill -{signal} $$;; esac\nexec ");
        fs::write(&script, text.replace("exec ", &die))?;
        bench.project.wipe()?;
        let build = bench.machine.cargo(&bench.project.root, &["build"])?;
        assert!(!build.success && build.stderr.contains(name), "{signal}: {}", build.stderr);
        assert_eq!(build.compiled, ["leaf"], "{signal}: started again");
    }
    Ok(())
}
