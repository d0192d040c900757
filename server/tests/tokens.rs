//! Tokens, through the real program and over HTTP.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::path::Path;

use cachec_protocol::Digest;
use harness::{Blob, Program, error_of, program, run};

fn create(data: &Path, namespace: &str, allow: &str, more: &[&str]) -> String {
    let arguments = [&["token", "create", "--namespace", namespace, "--allow", allow], more].concat();
    let output = run(&arguments, data);
    assert!(output.status.success(), "{output:?}");
    let token = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    assert!(token.starts_with("cachec_") && token.len() == 71, "{token}");
    token
}

/// Status and code of a request for a blob; an empty code where it succeeded.
async fn ask(url: &str, namespace: &str, token: Option<&str>, blob: Option<&Blob>) -> (u16, String) {
    let client = harness::http_client();
    let digest = blob.map_or(Digest::of(b"absent"), |blob| blob.digest);
    let url = format!("{url}/v1/{namespace}/blobs/{digest}");
    let request = match blob {
        Some(blob) => client.put(url).body(blob.frames.clone()),
        None => client.get(url),
    };
    let request = match token {
        Some(token) => request.bearer_auth(token),
        None => request,
    };
    let response = request.send().await.unwrap();
    if response.status().is_success() {
        return (response.status().as_u16(), String::new());
    }
    error_of(response).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_open_their_namespace_and_nothing_else() {
    let data = tempfile::tempdir().unwrap();
    let server = Program::start(data.path(), &[]);
    let url = server.url.as_str();
    let blob = Blob::noise(1, 1000);
    let denied = |status: u16, code: &str| (status, code.to_owned());
    // Without any token, everybody may.
    assert_eq!(ask(url, "team", None, Some(&blob)).await.0, 201);

    // The first one closes the server, while it runs.
    let team = create(data.path(), "team", "read,write", &[]);
    let reader = create(data.path(), "team", "read", &[]);
    let other = create(data.path(), "other", "read,write", &["--expires", "90d"]);
    let expired = create(data.path(), "team", "read,write", &["--expires", "0s"]);
    assert_eq!(ask(url, "team", Some(&team), Some(&blob)).await.0, 200);
    assert_eq!(ask(url, "team", Some(&team), None).await, denied(404, "blob_not_found"));
    assert_eq!(ask(url, "team", Some(&reader), Some(&blob)).await, denied(403, "forbidden"));
    let wrong = format!("cachec_{}", "0".repeat(64));
    for token in [None, Some(other.as_str()), Some(expired.as_str()), Some(wrong.as_str()), Some("x")] {
        // A namespace with entries, and one that never was.
        for namespace in ["team", "never"] {
            if (token, namespace) != (Some(other.as_str()), "other") {
                assert_eq!(ask(url, namespace, token, None).await, denied(401, "unauthorized"));
                assert_eq!(ask(url, namespace, token, Some(&blob)).await, denied(401, "unauthorized"));
            }
        }
    }
    // Another tenant's blob is absent here.
    let same = ask(url, "other", Some(&other), Some(&blob)).await;
    assert_eq!(same.0, 201);

    let listed = String::from_utf8(run(&["token", "list"], data.path()).stdout).unwrap();
    assert_eq!(listed.lines().count(), 4);
    assert!(listed.contains("other\tread,write\tactive for 2159 hours"), "{listed}");
    assert!(listed.contains("expired"), "{listed}");
    for token in [&team, &reader, &other, &expired] {
        assert!(!listed.contains(&token[7..]));
    }
    for line in listed.lines() {
        let id = line.split('\t').next().unwrap();
        assert!(run(&["token", "revoke", id], data.path()).status.success());
    }
    // All are revoked, at once, and the server is not open again.
    for token in [None, Some(team.as_str()), Some(other.as_str())] {
        assert_eq!(ask(url, "team", token, None).await, denied(401, "unauthorized"));
    }
    assert!(!run(&["token", "revoke", "0123456789abcdef"], data.path()).status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_gets_into_a_log_or_the_data_directory() {
    let data = tempfile::tempdir().unwrap();
    let token = create(data.path(), "team", "read,write", &[]);
    let log = data.path().join("log");
    let mut child = program()
        .args(["--listen", "127.0.0.1:0", "--log", "trace", "--data"])
        .arg(data.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line)
        .unwrap();
    let url = line.trim().strip_prefix("listening on ").unwrap();
    let blob = Blob::noise(1, 100_000);
    let put = ask(url, "team", Some(&token), Some(&blob)).await;
    let refused = ask(url, "nobody", Some(&token), None).await;
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((put.0, refused.0), (201, 401));
    assert!(std::fs::read_to_string(&log).unwrap().contains("cachec_server::app"), "the log is empty");
    let (needle, digest) = (&token[7..], blake3::hash(token.as_bytes()).to_string());
    for file in harness::files(data.path()) {
        let bytes = std::fs::read(&file).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.contains(needle), "{} contains the token", file.display());
        let is_token = file.parent().unwrap().ends_with("tokens");
        assert!(is_token || !text.contains(&digest), "{} contains its digest", file.display());
    }
}

#[test]
fn beyond_loopback_a_server_needs_tokens_or_open() {
    let data = tempfile::tempdir().unwrap();
    let refused = run(&["--listen", "0.0.0.0:0"], data.path());
    assert!(!refused.status.success());
    let message = String::from_utf8(refused.stderr).unwrap();
    assert!(message.contains("token create") && message.contains("--open"), "{message}");
    drop(Program::start(data.path(), &["--listen", "0.0.0.0:0", "--open"]));
    create(data.path(), "team", "read", &[]);
    drop(Program::start(data.path(), &["--listen", "0.0.0.0:0"]));
}

#[test]
fn wrong_options_are_explained() {
    let data = tempfile::tempdir().unwrap();
    for (arguments, hint) in [
        (&["--max-size", "1KiB"][..], "max-size must be"),
        (&["--max-size", "ten"], "into a ByteSize"),
        (&["--listen", "localhost"], "--listen"),
        (&["token", "create", "--namespace", "../x", "--allow", "read"], "a namespace is"),
        (&["token", "create", "--namespace", "x", "--allow", "all"], "read and write"),
        (&["token", "list"], "has no tokens"),
        (&["token", "revoke", "0123456789abcdef"], "has no tokens"),
        (&["--unknown"], "--unknown"),
    ] {
        let output = run(arguments, data.path());
        assert!(!output.status.success(), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(hint), "{arguments:?}: {output:?}");
    }
    let version = program().arg("--version").output().unwrap();
    assert!(String::from_utf8_lossy(&version.stdout).starts_with("cachec-server 0."));
}
