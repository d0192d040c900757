//! The build comes first: whatever happens to cachec, cargo's result is that of a build without it, one
//! line says why, and the delay is bounded.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use cachec_bench::line::{BadLine, Fault};
use cachec_bench::tier::files_below;
use cachec_bench::{Build, Machine, Project, Server};

/// Far over what any of these builds takes, and far under any hang.
const LONGEST_BUILD: Duration = Duration::from_secs(90);

/// Builds the small workspace from nothing; it must succeed, print what it should and not take for ever.
fn build_survives(machine: &Machine) -> Result<Build> {
    let directory = tempfile::tempdir()?;
    let project = Project::three_crates(&directory.path().join("checkout"))?;
    let build = machine.cargo(&project.root, &["build"])?;
    assert!(build.success, "{}", build.stderr);
    assert_eq!(build.compiled, ["app", "leaf", "middle"]);
    assert_eq!(project.run_app()?, "app middle one unset");
    assert!(build.elapsed < LONGEST_BUILD, "{:?}", build.elapsed);
    Ok(build)
}

/// As [`build_survives`], with exactly one line that contains `reason`.
fn build_survives_saying(machine: &Machine, reason: &str) -> Result<()> {
    let build = build_survives(machine)?;
    assert_eq!(build.notices().len(), 1, "{:?}", build.notices());
    assert!(build.notices()[0].contains(reason), "{:?}", build.notices());
    Ok(())
}

fn survives_line(fault: Fault) -> Result<()> {
    let line = BadLine::open(fault)?;
    let machine = Machine::with_server(&line.url)?;
    let build = build_survives(&machine)?;
    assert!(line.connections() > 0, "nobody asked");
    let notices = build.notices();
    assert!(notices.len() == 1 && notices[0].contains("no help from the server"), "{notices:?}");
    Ok(())
}

#[test]
fn an_unreachable_server() -> Result<()> {
    let machine = Machine::with_server("http://127.0.0.1:1")?;
    build_survives_saying(&machine, "refused")
}

#[test]
fn a_server_that_hangs() -> Result<()> {
    survives_line(Fault::Hang)
}

#[test]
fn a_server_that_resets_connections() -> Result<()> {
    survives_line(Fault::Reset)
}

#[test]
fn a_server_that_answers_garbage() -> Result<()> {
    survives_line(Fault::Garbage)
}

#[test]
fn a_foreign_server() -> Result<()> {
    survives_line(Fault::ForeignServer)
}

#[test]
fn a_server_of_another_version() -> Result<()> {
    survives_line(Fault::OtherVersion)
}

#[test]
fn a_server_that_fails() -> Result<()> {
    survives_line(Fault::ServerError)
}

#[test]
fn a_server_whose_answers_are_cut_off() -> Result<()> {
    survives_line(Fault::Truncated)
}

#[test]
fn a_wrong_token() -> Result<()> {
    let data = tempfile::tempdir()?;
    let server = Server::start(data.path(), &[])?;
    let good = server.create_token("read,write")?;
    let machine = Machine::with_server(&server.url)?.with("CACHEC_TOKEN", "canary-not-a-token");
    let build = build_survives(&machine)?;
    assert!(!build.notices().is_empty());
    assert!(build.notices().iter().all(|notice| notice.contains("token")), "{:?}", build.notices());
    let log = fs::read_to_string(machine.path("run/agent.log"))?;
    assert!(!build.stderr.contains("canary") && !log.contains("canary"), "the token is printed");
    let machine = Machine::with_server(&server.url)?.with("CACHEC_TOKEN", &good);
    assert!(build_survives(&machine)?.notices().is_empty());
    Ok(())
}

#[test]
fn malformed_configuration() -> Result<()> {
    build_survives_saying(&Machine::new()?.with("CACHEC_MODE", "sideways"), "CACHEC_MODE=sideways")?;
    build_survives_saying(&Machine::new()?.with("CACHEC_URL", "not a url"), "CACHEC_URL")?;
    build_survives_saying(
        &Machine::new()?.with("CACHEC_TOKEN_FILE", "/nowhere").with("CACHEC_URL", "http://127.0.0.1:1"),
        "/nowhere",
    )?;
    let machine = Machine::new()?;
    fs::create_dir_all(machine.path("home/.config/cachec"))?;
    fs::write(machine.path("home/.config/cachec/cachec.toml"), "ulr = \"http://127.0.0.1:1\"\n")?;
    build_survives_saying(&machine, "ulr")
}

#[test]
fn a_local_tier_that_cannot_be_written() -> Result<()> {
    build_survives_saying(
        &Machine::new()?.with("CACHEC_DIR", "/proc/cachec"),
        "no local tier in /proc/cachec",
    )
}

#[test]
fn a_full_local_tier() -> Result<()> {
    let machine = Machine::new()?.with("CACHEC_DIR_SIZE", "1KB");
    assert!(build_survives(&machine)?.notices().is_empty());
    machine.cachec(&machine.path("home"), &["flush"])?;
    let output = Command::new("du").args(["-sb"]).arg(machine.path("tier/v1/objects")).output()?;
    let text = String::from_utf8(output.stdout)?;
    let size_bytes: u64 = text.split_whitespace().next().unwrap_or_default().parse()?;
    assert!(size_bytes < 100_000, "objects over the limit stay: {text}");
    Ok(())
}

#[test]
fn a_runtime_directory_that_cannot_be_used() -> Result<()> {
    build_survives_saying(&Machine::new()?.with("CACHEC_RUNTIME_DIR", "/proc/cachec"), "/proc/cachec")?;
    // Somebody else could put a socket there.
    let open = Machine::new()?;
    fs::create_dir(open.path("run"))?;
    fs::set_permissions(open.path("run"), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    build_survives_saying(&open, "others may write there")
}

/// Changes the content of every object, and not its size.
fn corrupt_objects(machine: &Machine) -> Result<usize> {
    let files = files_below(&machine.path("tier/v1/objects"))?;
    for file in &files {
        let mut content = fs::read(file)?;
        let middle = content.len() / 2;
        content[middle] ^= 0x40;
        fs::write(file, content)?;
    }
    Ok(files.len())
}

#[test]
fn corrupt_objects_in_the_local_tier() -> Result<()> {
    let machine = Machine::new()?;
    build_survives(&machine)?;
    machine.cachec(&machine.path("home"), &["stop"])?;
    assert!(corrupt_objects(&machine)? >= 4);
    build_survives(&machine)?;
    Ok(())
}

#[test]
fn an_agent_that_is_killed_at_any_moment() -> Result<()> {
    let machine = Machine::new()?;
    for round in 0..12 {
        let directory = tempfile::tempdir()?;
        let project = Project::three_crates(&directory.path().join("checkout"))?;
        // Each round has other sources: all phases of a miss.
        project.write("leaf/src/text.txt", &format!("round {round}"))?;
        let (build, killed) = std::thread::scope(|scope| {
            let build = scope.spawn(|| machine.cargo(&project.root, &["build"]));
            let mut killed = 0;
            while !build.is_finished() {
                std::thread::sleep(Duration::from_millis(40 + 37 * round));
                killed += machine.agents().len();
                machine.signal_agents("KILL");
            }
            (build.join(), killed)
        });
        let build = build.map_err(|_| anyhow::anyhow!("the build panicked"))??;
        assert!(build.success, "round {round}: {}", build.stderr);
        assert!(killed > 0, "round {round}: no agent was there");
        assert_eq!(project.run_app()?, format!("app middle round {round} unset"));
        assert!(build.notices().len() <= 2, "{:?}", build.notices());
    }
    Ok(())
}

#[test]
fn an_agent_that_is_killed_while_it_restores() -> Result<()> {
    let machine = Machine::new()?;
    let directory = tempfile::tempdir()?;
    let project = Project::three_crates(&directory.path().join("checkout"))?;
    assert!(machine.cargo(&project.root, &["build"])?.success);
    machine.cachec(&project.root, &["flush"])?;
    for round in 0..12 {
        project.wipe()?;
        let build = std::thread::scope(|scope| {
            let build = scope.spawn(|| machine.cargo(&project.root, &["build"]));
            while !build.is_finished() {
                std::thread::sleep(Duration::from_millis(5 + 9 * round));
                machine.signal_agents("KILL");
            }
            build.join()
        });
        let build = build.map_err(|_| anyhow::anyhow!("the build panicked"))??;
        assert!(build.success, "round {round}: {}", build.stderr);
        assert_eq!(project.run_app()?, "app middle one unset");
        let again = machine.cargo(&project.root, &["build"])?;
        assert!(again.success && again.compiled.is_empty(), "round {round}: {:?}", again.compiled);
    }
    Ok(())
}

#[test]
fn an_agent_that_is_stopped() -> Result<()> {
    let machine = Machine::new()?;
    build_survives(&machine)?;
    assert_eq!(machine.agents().len(), 1);
    machine.signal_agents("STOP");
    let directory = tempfile::tempdir()?;
    let project = Project::three_crates(&directory.path().join("checkout"))?;
    let build = machine.cargo(&project.root, &["build"])?;
    assert!(build.success, "{}", build.stderr);
    assert_eq!(project.run_app()?, "app middle one unset");
    // Who has waited in vain leaves the place to another agent.
    assert_eq!(machine.agents().len(), 2);
    Ok(())
}

#[test]
fn a_server_that_is_killed_during_a_build() -> Result<()> {
    for delay_ms in [50, 200, 350, 500] {
        let data = tempfile::tempdir()?;
        let mut server = Server::start(data.path(), &[])?;
        let machine = Machine::with_server(&server.url)?;
        let directory = tempfile::tempdir()?;
        let project = Project::three_crates(&directory.path().join("checkout"))?;
        let build = std::thread::scope(|scope| {
            let build = scope.spawn(|| machine.cargo(&project.root, &["build"]));
            std::thread::sleep(Duration::from_millis(delay_ms));
            server.kill();
            build.join()
        });
        let build = build.map_err(|_| anyhow::anyhow!("the build panicked"))??;
        assert!(build.success, "after {delay_ms} ms: {}", build.stderr);
        assert_eq!(project.run_app()?, "app middle one unset");
    }
    Ok(())
}

#[test]
fn corrupt_blobs_on_the_server() -> Result<()> {
    let data = tempfile::tempdir()?;
    let server = Server::start(data.path(), &[])?;
    build_survives(&Machine::with_server(&server.url)?)?;
    let mut corrupted = 0;
    for file in files_below(&data.path().join("blobs"))? {
        let mut content = fs::read(&file)?;
        let middle = content.len() / 2;
        content[middle] ^= 0x40;
        fs::write(&file, content)?;
        corrupted += 1;
    }
    assert!(corrupted > 0, "no blob lies in a file");
    let directory = tempfile::tempdir()?;
    let project = Project::three_crates(&directory.path().join("checkout"))?;
    let build = Machine::with_server(&server.url)?.cargo(&project.root, &["build"])?;
    assert!(build.success, "{}", build.stderr);
    assert!(build.compiled.contains(&"leaf".to_owned()), "restored from a corrupt blob");
    assert_eq!(project.run_app()?, "app middle one unset");
    assert!(build.notices().len() <= 1, "{:?}", build.notices());
    Ok(())
}

#[test]
fn where_no_tracer_may_run_libraries_are_cached_all_the_same() -> Result<()> {
    let machine = Machine::new()?;
    let directory = tempfile::tempdir()?;
    let project = Project::three_crates(&directory.path().join("checkout"))?;
    let mut said = Vec::new();
    let mut build = |machine: &Machine| -> Result<serde_json::Value> {
        project.wipe()?;
        let mut command = machine.command(&cachec_bench::programs::cargo());
        command.args(["build", "--quiet"]).current_dir(&project.root);
        cachec_bench::sandbox::forbid_seccomp(&mut command);
        let output = command.output()?;
        assert!(output.status.success());
        said.push(String::from_utf8(output.stderr)?);
        machine.cachec(&project.root, &["flush"])?;
        assert_eq!(project.run_app()?, "app middle one unset");
        machine.statistics(&project.root)
    };
    // The compiler is a script in these tests: what it reads is not known without a tracer.
    let script = build(&machine)?;
    assert_eq!(script["not_stored"]["untraced"], script["units"], "{script}");
    let machine = machine.with("RUSTC", cachec_bench::machine::real_compiler()?.to_string_lossy());
    let cold = build(&machine)?;
    assert_eq!(cold["stored"].as_u64(), Some(2), "{cold}");
    let warm = build(&machine)?;
    assert_eq!((warm["local_hits"].as_u64(), warm["traced"].as_u64()), (Some(2), Some(0)), "{warm}");
    assert_eq!(said[0].matches("cannot be observed here").count(), 1, "{}", said[0]);
    Ok(())
}

#[test]
fn the_doctor_says_what_is_wrong() -> Result<()> {
    let machine = Machine::new()?;
    let text = machine.cachec(&machine.path("home"), &["doctor"])?;
    assert_eq!(text.matches("ok  ").count(), 4, "{text}");
    let machine = machine.with("CACHEC_URL", "http://127.0.0.1:1");
    let output = machine.command(&cachec_bench::programs::programs().client).arg("doctor").output()?;
    let text = String::from_utf8(output.stdout)?;
    assert!(!output.status.success() && text.contains("FAIL  server: Connection refused"), "{text}");
    Ok(())
}

#[test]
fn a_summary_of_nothing_fails_no_build() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let machine = Machine::new()?;
    machine.cachec(directory.path(), &["stats"])?;
    assert!(machine.statistics(directory.path()).is_err());
    let machine = machine.with("CACHEC_MODE", "nonsense");
    machine.cachec(directory.path(), &["stats"])?;
    Ok(())
}
