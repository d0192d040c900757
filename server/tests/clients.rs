//! The client's program, handed out and installed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics fails, as it should")]

mod harness;

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use harness::{MIB, TestServer, error_of};

/// A program, as the script looks at the first bytes: this system's `true`, which says nothing.
const PROGRAM: &str = "/bin/true";

async fn server() -> (TestServer, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("secret"), "another file").unwrap();
    let clients = directory.path().join("clients");
    std::fs::create_dir(&clients).unwrap();
    std::fs::copy(PROGRAM, clients.join(format!("{}-linux", std::env::consts::ARCH))).unwrap();
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
    let program = std::path::Path::new(into).join("cachec");
    let is_whole = || std::fs::read(&program).unwrap() == std::fs::read(PROGRAM).unwrap();
    assert!(is_whole());
    assert_eq!(program.metadata().unwrap().permissions().mode() & 0o777, 0o755);

    // What fails says so, and leaves what was there.
    let (other, usual) = (answering().await, "/usr/bin:/bin");
    let (empty, text) = (format!("{other}/empty"), format!("{other}/text"));
    for (url, path) in [
        ("", usual),
        ("http://127.0.0.1:1", usual),
        (&*empty, usual),
        (&*text, usual),
        (&*server.running.url, "/none"),
    ] {
        let failed = install(&server, url, path, into).await;
        assert!(!failed.status.success() && !failed.stderr.is_empty(), "{url}: {failed:?}");
        assert_eq!(std::fs::read_dir(into).unwrap().count(), 1);
        assert!(is_whole());
    }
    // A proxy may send the client elsewhere.
    let redirected =
        install(&server, &format!("{other}/elsewhere?{}", server.running.url), usual, into).await;
    assert!(redirected.status.success() && is_whole(), "{redirected:?}");
}

/// A server that answers nothing, or something else than a program, or another address.
async fn answering() -> String {
    use axum::extract::RawQuery;
    use axum::response::Redirect;
    use axum::routing::get;
    let machine = format!("{}-linux", std::env::consts::ARCH);
    // The path that is asked for is behind the question mark, too.
    let elsewhere =
        move |RawQuery(query): RawQuery| async move { Redirect::permanent(&query.unwrap_or_default()) };
    let routes = axum::Router::new()
        .route(&format!("/empty/client/{machine}"), get(|| async {}))
        .route(&format!("/text/client/{machine}"), get(|| async { "echo this is run\n" }))
        .route("/elsewhere", get(elsewhere));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_else_is_handed_out() {
    let (server, _directory) = server().await;
    for name in ["sparc-linux", "directory", "..%2Fsecret", ".", "%2e%2e", "x86_64-linux%00", "x%2Fy"] {
        let response = server.client.get(server.url(&format!("/client/{name}"))).send().await.unwrap();
        let status = response.status().as_u16();
        assert!(status == 404, "{name}: {status}");
        assert!(!response.text().await.unwrap().contains("another file"), "{name}");
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
