//! `CACHEC_LAZY=1`: what only compilers read is not downloaded, until one runs; and every way out of that.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cachec_bench::programs::programs;
use cachec_bench::{Build, Machine, Project, Server};

const NOTHING: [&str; 0] = [];

/// A program over a library with a build script, a proc macro and another library, all stored on a server. Every crate
/// has content that does not compress, so that its pack is a file of the server's.
struct Bench {
    server: Option<Server>,
    data: tempfile::TempDir,
    first: Machine,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Result<Self> {
        let data = tempfile::tempdir()?;
        let server = Server::start(data.path(), &["--recompress-level", "0"])?;
        let bench = Self {
            first: Machine::with_server(&server.url)?,
            server: Some(server),
            data,
            directory: tempfile::tempdir()?,
        };
        let project = bench.project("first")?;
        cargo(&bench.first, &project, &["build", "-p", "app"])?;
        bench.first.cachec(&project.root, &["flush"])?;
        assert_eq!(bench.first.statistics(&project.root)?["not_stored"], serde_json::json!({}));
        Ok(bench)
    }

    /// A fresh checkout.
    fn project(&self, name: &str) -> Result<Project> {
        let project = Project { root: self.directory.path().join(name) };
        project.write(
            "Cargo.toml",
            "[workspace]\nmembers = [\"app\", \"middle\", \"leaf\", \"macros\"]\nresolver = \"3\"\n",
        )?;
        project.package("leaf", &[])?;
        project.package("middle", &["leaf", "macros"])?;
        project.package("app", &["middle"])?;
        project.package("macros", &[])?;
        let manifest = fs::read_to_string(project.root.join("macros/Cargo.toml"))?;
        project.write("macros/Cargo.toml", &format!("{manifest}[lib]\nproc-macro = true\n"))?;
        project.write(
            "leaf/build.rs",
            // Not made to be run twice over the same directory.
            "fn main() {\n    let out = std::env::var(\"OUT_DIR\").unwrap();\n    \
             println!(\"cargo:rerun-if-changed=noise\\ncargo:rustc-link-search=native={out}\");\n    \
             std::fs::create_dir(format!(\"{out}/made\")).unwrap();\n    \
             std::fs::copy(\"noise\", format!(\"{out}/made/noise\")).unwrap();\n    \
             std::fs::write(format!(\"{out}/place.txt\"), &out).unwrap();\n    \
             std::fs::write(format!(\"{out}/word.rs\"), \"pub const WORD: &str = \\\"generated\\\";\\n\").unwrap();\n}\n",
        )?;
        project.write(
            "leaf/src/lib.rs",
            "include!(concat!(env!(\"OUT_DIR\"), \"/word.rs\"));\n\
             pub static NOISE: &[u8] = include_bytes!(concat!(env!(\"OUT_DIR\"), \"/made/noise\"));\n",
        )?;
        project.write(
            "macros/src/lib.rs",
            "use proc_macro::TokenStream;\n#[proc_macro]\npub fn number(_: TokenStream) -> TokenStream { \
             \"7\".parse().unwrap() }\n",
        )?;
        project.write(
            "middle/src/lib.rs",
            "pub static NOISE: &[u8] = include_bytes!(\"noise\");\npub fn text() -> String {\n    \
             format!(\"{} {} {}\", leaf::WORD, macros::number!(), leaf::NOISE.len() + NOISE.len())\n}\n",
        )?;
        project.write("app/src/main.rs", "fn main() { println!(\"app {}\", middle::text()); }\n")?;
        let mut state = 1_u32;
        let noise: Vec<u8> = (0..200_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_le_bytes()[3]
            })
            .collect();
        for name in ["leaf/noise", "middle/src/noise"] {
            fs::write(project.root.join(name), &noise)?;
        }
        Ok(project)
    }

    /// A fresh container that defers, with the first machine's compiler, which scripts are told of.
    fn container(&self) -> Result<Machine> {
        let url = &self.server.as_ref().context("the server is there")?.url;
        let machine =
            Machine::with_server(url)?.with("CACHEC_LAZY", "1").with("SECRET", "never to be written");
        Ok(machine.with("RUSTC", self.first.path("bin/rustc").to_string_lossy()))
    }

    /// Removes all that the server keeps in files, which is every pack.
    fn lose_packs(&self) -> Result<()> {
        for directory in fs::read_dir(self.data.path().join("blobs"))? {
            for file in fs::read_dir(directory?.path())? {
                fs::remove_file(file?.path())?;
            }
        }
        Ok(())
    }
}

/// Runs cargo, which succeeds.
fn cargo(machine: &Machine, project: &Project, arguments: &[&str]) -> Result<Build> {
    let build = machine.cargo(&project.root, arguments)?;
    assert!(build.success, "{}", build.stderr);
    Ok(build)
}

fn change_app(project: &Project) -> Result<()> {
    project.write("app/src/main.rs", "fn main() { println!(\"changed {}\", middle::text()); }\n")
}

fn counter(machine: &Machine, project: &Project, name: &str) -> Result<u64> {
    Ok(machine.statistics(&project.root)?[name].as_u64().unwrap_or_default())
}

fn received_bytes(machine: &Machine, project: &Project) -> Result<u64> {
    Ok(machine.statistics(&project.root)?["remote"]["received_bytes"].as_u64().unwrap_or_default())
}

#[test]
fn a_build_of_hits_brings_the_program_alone() -> Result<()> {
    let bench = Bench::new()?;
    let project = bench.project("second")?;
    let machine = bench.container()?;
    let build = cargo(&machine, &project, &["build", "-p", "app"])?;
    assert_eq!((build.compiled, build.stderr.contains("cachec:")), (Vec::new(), false));
    assert_eq!(project.run_app()?, "app generated 7 400000");
    assert_eq!(project.compiled_libraries()?, Vec::<PathBuf>::new());
    // Two libraries, a proc macro and a script's output.
    assert_eq!((counter(&machine, &project, "deferred")?, counter(&machine, &project, "misses")?), (4, 0));
    // What is noted for the case that it is needed has nothing of what cargo itself was started with.
    let mut notes = fs::read_dir(project.root.join("target"))?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".cachec-deferred-"));
    let note = fs::read(notes.next().context("notes")?.path())?;
    let note = String::from_utf8_lossy(&note);
    assert!(note.contains("CARGO_PKG_NAME") && !note.contains("never to be written"));
    let whole = bench.container()?.without("CACHEC_LAZY");
    let other = bench.project("whole")?;
    assert_eq!(cargo(&whole, &other, &["build", "-p", "app"])?.compiled, NOTHING);
    assert_eq!(other.compiled_libraries()?.len(), 5);
    let (lazy, whole) = (received_bytes(&machine, &project)?, received_bytes(&whole, &other)?);
    assert!(lazy + 600_000 < whole, "{lazy} of {whole} bytes");
    Ok(())
}

#[test]
fn a_later_command_makes_do_with_what_is_there() -> Result<()> {
    let bench = Bench::new()?;
    let project = bench.project("second")?;
    let machine = bench.container()?;
    cargo(&machine, &project, &["build", "-p", "app"])?;
    // The same again: asked for and found again.
    let again = cargo(&machine, &project, &["build", "-p", "app"])?;
    assert_eq!(again.compiled, NOTHING);
    // rustdoc is not run through cachec, and loads the proc macro. `leaf` is merely checked for it, the first time.
    assert_eq!(cargo(&machine, &project, &["doc", "-p", "middle"])?.compiled, ["leaf"]);
    cargo(&machine, &project, &["build", "-p", "app"])?;
    let tested = cargo(&machine, &project, &["test", "-p", "app"])?;
    assert_eq!(tested.compiled, ["app"]);
    // What cargo runs may look at anything.
    let other = bench.project("other")?;
    assert_eq!(cargo(&bench.container()?, &other, &["run", "-p", "app"])?.compiled, NOTHING);
    assert_eq!(other.compiled_libraries()?.len(), 5);
    Ok(())
}

#[test]
fn without_cachec_everything_is_compiled_that_is_not_there() -> Result<()> {
    let bench = Bench::new()?;
    let project = bench.project("second")?;
    cargo(&bench.container()?, &project, &["build", "-p", "app"])?;
    project.write("leaf/noise", "shorter")?;
    let plain = bench.container()?.with("RUSTC_WRAPPER", "");
    let build = cargo(&plain, &project, &["build", "-p", "app"])?;
    assert!(
        ["app", "leaf", "macros", "middle"].iter().all(|name| build.compiled.contains(&(*name).to_owned()))
    );
    assert_eq!(project.run_app()?, "app generated 7 200007");
    Ok(())
}

#[test]
fn a_compiler_finds_what_was_deferred() -> Result<()> {
    let bench = Bench::new()?;
    let project = bench.project("second")?;
    change_app(&project)?;
    let machine = bench.container()?;
    let build = cargo(&machine, &project, &["build", "-p", "app"])?;
    assert_eq!(
        (build.compiled.as_slice(), build.stderr.contains("cachec:")),
        (&["app".to_owned()][..], false)
    );
    assert_eq!(project.run_app()?, "changed generated 7 400000");
    assert_eq!(project.compiled_libraries()?.len(), 5);
    assert!(cargo(&machine, &project, &["build", "-p", "app"])?.compiled.is_empty());
    // All is there as if nothing had been deferred, and the script is not run again.
    let plain = machine.with("RUSTC_WRAPPER", "");
    assert!(cargo(&plain, &project, &["build", "-p", "app"])?.compiled.is_empty());
    Ok(())
}

#[test]
fn what_the_server_has_lost_is_made_again() -> Result<()> {
    let bench = Bench::new()?;
    let project = bench.project("second")?;
    change_app(&project)?;
    bench.lose_packs()?;
    let machine = bench.container()?;
    let build = cargo(&machine, &project, &["build", "-p", "app"])?;
    // The script's program was never deferred, so that it was compiled for being lost.
    assert_eq!(build.compiled, ["app", "build_script_build", "leaf", "macros", "middle"]);
    assert_eq!(project.run_app()?, "changed generated 7 400000");
    let plain = machine.with("RUSTC_WRAPPER", "");
    assert!(cargo(&plain, &project, &["build", "-p", "app"])?.compiled.is_empty());
    Ok(())
}

#[test]
fn what_an_earlier_build_has_left_is_not_taken_for_what_is_deferred() -> Result<()> {
    let bench = Bench::new()?;
    let project = bench.project("second")?;
    let machine = bench.container()?;
    project.write("leaf/noise", "other")?;
    let plain = bench.container()?.with("RUSTC_WRAPPER", "");
    cargo(&plain, &project, &["build", "-p", "app"])?;
    assert_eq!(project.compiled_libraries()?.len(), 5);
    // Back to what is stored: only the proc macro is what it was, and fresh.
    fs::copy(bench.directory.path().join("first/leaf/noise"), project.root.join("leaf/noise"))?;
    fs::remove_dir_all(project.root.join("target/debug/.fingerprint"))?;
    fs::remove_dir_all(project.root.join("target/debug/build"))?;
    assert_eq!(cargo(&machine, &project, &["build", "-p", "app"])?.compiled, NOTHING);
    assert_eq!(project.run_app()?, "app generated 7 400000");
    assert_eq!(project.compiled_libraries()?, Vec::<PathBuf>::new());
    Ok(())
}

#[test]
fn what_debuggers_read_is_not_deferred_and_is_found_where_it_is() -> Result<()> {
    let bench = Bench::new()?;
    let project = bench.project("first")?;
    // Such a build keeps its own paths, those of the machine among them.
    let mut machine = bench.container()?.with("CARGO_PROFILE_DEV_SPLIT_DEBUGINFO", "unpacked");
    machine.set("CACHEC_LAZY", "0");
    cargo(&machine, &project, &["build", "-p", "middle"])?;
    machine.cachec(&project.root, &["flush"])?;
    machine.reset()?;
    machine.set("CACHEC_LAZY", "1");
    project.wipe()?;
    assert_eq!(cargo(&machine, &project, &["build", "-p", "middle"])?.compiled, NOTHING);
    let names = fs::read_dir(project.root.join("target/debug/deps"))?.flatten();
    let dwo = names.filter(|entry| entry.file_name().to_string_lossy().ends_with(".dwo"));
    assert!(dwo.filter(|entry| entry.file_name().to_string_lossy().starts_with("leaf-")).count() > 0);
    for library in project.compiled_libraries()? {
        let content = fs::read(library)?;
        assert!(!String::from_utf8_lossy(&content).contains("/cachec/target/debug/deps/"));
    }
    Ok(())
}

/// A wrapper that waits, where the program is to be compiled, for the test to have done something.
fn with_pause(machine: Machine) -> Result<Machine> {
    let wrapper = machine.path("bin/pausing");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *\"--crate-name app \"*)\n: > {0}.reached\nwhile [ ! -e {0}.on ]; do sleep 0.02; \
         done;; esac\nexec {1} \"$@\"\n",
        wrapper.display(),
        programs().client.display()
    );
    fs::write(&wrapper, script)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let wrapper = wrapper.to_string_lossy().into_owned();
    Ok(machine.with("RUSTC_WRAPPER", wrapper))
}

/// Builds, and does something when all but the program is there.
fn build_with(
    machine: &Machine,
    project: &Project,
    arguments: &[&str],
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<Build> {
    let mark = |name: &str| machine.path(&format!("bin/pausing.{name}"));
    std::thread::scope(|scope| {
        let building = scope.spawn(|| cargo(machine, project, arguments));
        let started = Instant::now();
        while !mark("reached").exists() {
            anyhow::ensure!(started.elapsed() < Duration::from_secs(60), "the build has not come so far");
            std::thread::sleep(Duration::from_millis(20));
        }
        let done = meanwhile();
        fs::write(mark("on"), "")?;
        done?;
        building.join().map_err(|_| anyhow::anyhow!("the build panicked"))?
    })
}

#[test]
fn a_server_that_goes_away_leaves_it_to_the_compiler() -> Result<()> {
    let mut bench = Bench::new()?;
    let project = bench.project("second")?;
    change_app(&project)?;
    let machine = with_pause(bench.container()?)?;
    let server = bench.server.take();
    let build = build_with(&machine, &project, &["build", "-p", "app"], || {
        drop(server);
        Ok(())
    })?;
    assert_eq!(build.compiled, ["app", "leaf", "macros", "middle"]);
    // A launcher steps aside under a wrapper that is not cachec itself: the script was run.
    assert!(build.stderr.contains("made 3 deferred units again"), "{}", build.stderr);
    assert_eq!(project.run_app()?, "changed generated 7 400000");
    Ok(())
}

#[test]
fn an_agent_that_is_killed_leaves_it_to_the_wrapper() -> Result<()> {
    let bench = Bench::new()?;
    let project = bench.project("second")?;
    let machine = with_pause(bench.container()?)?;
    let build = build_with(&machine, &project, &["build", "-p", "app"], || {
        machine.signal_agents("KILL");
        Ok(())
    })?;
    // The new agent knows nothing of what the old one has promised.
    assert_eq!(build.compiled, ["app", "leaf", "macros", "middle"]);
    assert_eq!(project.run_app()?, "app generated 7 400000");
    Ok(())
}

#[test]
fn what_is_made_again_and_differs_takes_its_dependents_along() -> Result<()> {
    let bench = Bench::new()?;
    // A crate whose every compile makes another one: what was compiled against the first does not fit the second.
    let unsteady = |project: &Project| {
        project.package("leaf", &["macros"])?;
        project.write(
            "macros/src/lib.rs",
            "use proc_macro::TokenStream;\n#[proc_macro]\npub fn number(_: TokenStream) -> TokenStream { \
             std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos().to_string().parse().unwrap() }\n",
        )?;
        project.write("leaf/build.rs", "fn main() { println!(\"cargo:rerun-if-changed=noise\"); }\n")?;
        project.write(
            "leaf/src/lib.rs",
            "pub const WORD: u128 = macros::number!();\npub static NOISE: &[u8] = include_bytes!(\"../noise\");\n",
        )?;
        project.write(
            "middle/src/lib.rs",
            "pub fn text() -> String { format!(\"{} {}\", leaf::WORD, leaf::NOISE.len()) }\n",
        )
    };
    let arguments = ["build", "-p", "app", "-p", "middle"];
    let first = bench.project("unsteady")?;
    unsteady(&first)?;
    cargo(&bench.first, &first, &arguments)?;
    bench.first.cachec(&first.root, &["flush"])?;
    let project = bench.project("second")?;
    unsteady(&project)?;
    change_app(&project)?;
    let machine = with_pause(bench.container()?)?;
    let build = build_with(&machine, &project, &arguments, || bench.lose_packs())?;
    assert_eq!(build.compiled, ["app", "leaf", "macros", "middle"], "{}", build.stderr);
    assert!(project.run_app()?.ends_with(" 200000"));
    Ok(())
}
