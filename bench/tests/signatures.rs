//! Whose results are restored, where readers trust some writers only.

use anyhow::Result;
use cachec_bench::{Machine, Project, Server};

const NOTHING: [&str; 0] = [];
const EVERYTHING: [&str; 3] = ["app", "leaf", "middle"];

/// A new machine with these settings builds a checkout of its own, as in a fresh container, with the compiler of
/// another one. What it compiled.
fn build(server: &Server, compiler: &Machine, settings: &[(&str, &str)]) -> Result<Vec<String>> {
    let directory = tempfile::tempdir()?;
    let project = Project::three_crates(&directory.path().join("checkout"))?;
    let rustc = compiler.path("bin/rustc");
    let mut machine = Machine::with_server(&server.url)?.with("RUSTC", rustc.to_string_lossy());
    for (name, value) in settings {
        machine.set(name, value);
    }
    // The lock file says which workspace it is, so that the build's record is asked for.
    assert!(machine.cargo(&project.root, &["generate-lockfile"])?.success);
    let build = machine.cargo(&project.root, &["build"])?;
    assert!(build.success && build.notices().is_empty(), "{}", build.stderr);
    machine.cachec(&project.root, &["flush"])?;
    assert_eq!(project.run_app()?, "app middle one unset");
    Ok(build.compiled)
}

#[test]
fn only_what_a_trusted_writer_has_signed_is_restored() -> Result<()> {
    let data = tempfile::tempdir()?;
    let server = Server::start(&data.path().join("data"), &[])?;
    let machine = Machine::new()?;
    let key = |name: &str| -> Result<(String, String)> {
        let file = data.path().join(name).display().to_string();
        let public = machine.cachec(data.path(), &["new-key", &file])?.trim().to_owned();
        Ok((file, public))
    };
    let ((own_file, own), (other_file, other)) = (key("own")?, key("other")?);
    assert!(own.starts_with("cachec_trust_") && own != other);

    // Nobody signs: who trusts somebody compiles all the same, and adds nothing that such a reader could use.
    assert_eq!(build(&server, &machine, &[])?, EVERYTHING);
    assert_eq!(build(&server, &machine, &[])?, NOTHING);
    assert_eq!(build(&server, &machine, &[("CACHEC_TRUSTED_KEYS", &own)])?, EVERYTHING);
    assert_eq!(build(&server, &machine, &[("CACHEC_TRUSTED_KEYS", &own)])?, EVERYTHING);
    // Somebody else signs, under the same inputs.
    let of_other = [("CACHEC_SIGN_KEY_FILE", other_file.as_str()), ("CACHEC_TRUSTED_KEYS", other.as_str())];
    assert_eq!(build(&server, &machine, &of_other)?, EVERYTHING);
    assert_eq!(build(&server, &machine, &[("CACHEC_TRUSTED_KEYS", &own)])?, EVERYTHING);
    // Then the trusted writer, whom the earlier results do not keep out.
    let of_own = [("CACHEC_SIGN_KEY_FILE", own_file.as_str()), ("CACHEC_TRUSTED_KEYS", own.as_str())];
    assert_eq!(build(&server, &machine, &of_own)?, EVERYTHING);
    assert_eq!(build(&server, &machine, &of_own)?, NOTHING);
    assert_eq!(build(&server, &machine, &[("CACHEC_TRUSTED_KEYS", &own)])?, NOTHING);
    assert_eq!(build(&server, &machine, &[("CACHEC_TRUSTED_KEYS", &format!("{other},{own}"))])?, NOTHING);
    assert_eq!(build(&server, &machine, &[("CACHEC_TRUSTED_KEYS", &own), ("CACHEC_LAZY", "1")])?, NOTHING);
    assert_eq!(build(&server, &machine, &[])?, NOTHING);
    Ok(())
}
