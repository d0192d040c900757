//! The client's program, handed out and installed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics fails, as it should")]

mod harness;

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use harness::{MIB, TestServer, error_of};

const SCRIPT: &str = "#!/bin/sh\necho cachec 1.2.3\n";

async fn server() -> (TestServer, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("secret"), "another file").unwrap();
    let clients = directory.path().join("clients");
    std::fs::create_dir(&clients).unwrap();
    std::fs::write(clients.join(format!("{}-linux", std::env::consts::ARCH)), SCRIPT).unwrap();
    std::fs::create_dir(clients.join("directory")).unwrap();
    (TestServer::start_with(64 * MIB, |options| options.clients = Some(clients)).await, directory)
}

/// Runs what the server sends as its script, with what is on the path.
async fn install(server: &TestServer, url: &str, path: &str, into: &str) -> Output {
    let script = server.client.get(server.url("/install.sh")).send().await.unwrap().text().await.unwrap();
    let (url, path, into) = (url.to_owned(), path.to_owned(), into.to_owned());
    let run = move || {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]).env_clear().env("PATH", path);
        if !url.is_empty() {
            command.env("CACHEC_URL", url);
        }
        command.env("CACHEC_INSTALL_DIR", into).output().unwrap()
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_script_installs_the_program() {
    let (server, directory) = server().await;
    let into = directory.path().join("new/bin");
    let into = into.to_str().unwrap();
    let installed = install(&server, &server.running.url, "/usr/bin:/bin", into).await;
    assert!(installed.status.success(), "{installed:?}");
    assert_eq!(String::from_utf8_lossy(&installed.stdout), "cachec 1.2.3\n");
    let program = std::path::Path::new(into).join("cachec");
    assert_eq!(std::fs::read_to_string(&program).unwrap(), SCRIPT);
    assert_eq!(program.metadata().unwrap().permissions().mode() & 0o777, 0o755);

    // What fails says so, and leaves what was there.
    for (url, path) in
        [("", "/usr/bin:/bin"), ("http://127.0.0.1:1", "/usr/bin:/bin"), (&*server.running.url, "/none")]
    {
        let failed = install(&server, url, path, into).await;
        assert!(!failed.status.success() && !failed.stderr.is_empty(), "{failed:?}");
        assert_eq!(std::fs::read_dir(into).unwrap().count(), 1);
        assert_eq!(std::fs::read_to_string(&program).unwrap(), SCRIPT);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_else_is_handed_out() {
    let (server, _directory) = server().await;
    for name in ["sparc-linux", "directory", "..%2Fsecret", ".", "%2e%2e", "x86_64-linux%00", "x%2Fy"] {
        let response = server.client.get(server.url(&format!("/client/{name}"))).send().await.unwrap();
        let status = response.status().as_u16();
        assert!(status == 404, "{name}: {status}");
        let text = response.text().await.unwrap();
        assert!(!text.contains("another file"), "{name}");
    }
    let bare = TestServer::start().await;
    let response = bare.client.get(bare.url("/client/x86_64-linux")).send().await.unwrap();
    assert_eq!(error_of(response).await, (404, "client_not_found".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_health_check_needs_no_other_program() {
    let (server, _directory) = server().await;
    let check = async |url: &str| {
        let url = url.to_owned();
        let run = move || harness::program().args(["health", "--url", &url]).output().unwrap();
        tokio::task::spawn_blocking(run).await.unwrap()
    };
    assert!(check(&server.running.url).await.status.success());
    let failed = check("http://127.0.0.1:1").await;
    assert!(!failed.status.success());
    assert!(String::from_utf8_lossy(&failed.stderr).contains("127.0.0.1:1/readyz"), "{failed:?}");
}
