//! What `deploy` has for this server: its configuration file, dashboard and alerts.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use harness::{Blob, TestServer, program, result};
use tokio::io::AsyncReadExt;

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

#[test]
fn the_documented_configuration_is_right_and_complete() {
    let data = tempfile::tempdir().unwrap();
    let run = |file: &Path| {
        let mut command = program();
        command.arg("check-config").arg("--config").arg(file).arg("--data").arg(data.path());
        command.output().unwrap()
    };
    let output = run(&deploy("server.toml"));
    assert!(output.status.success(), "{output:?}");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("identity"), "{output:?}");
    // With its example.
    let example = data.path().join("example.toml");
    let text = std::fs::read_to_string(deploy("server.toml")).unwrap();
    std::fs::write(&example, text.replace("\n#~ ", "\n")).unwrap();
    let output = run(&example);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    for line in [
        "listens on    127.0.0.1:7373\n",
        "keeps         50.0 GiB in",
        "access        by token\n",
        "namespace     pr-*: at most 5.0 GiB, 15.0 GiB together, 14d unused, reads main\n",
        "identity      https://gitlab.com: main may read,write\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
    // Every flag of the server is a key of the file, or has a line there that says so.
    let help = program().args(["serve", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let flags = help.split_whitespace().filter_map(|word| word.strip_prefix("--"));
    let flags: BTreeSet<String> = flags
        .map(|flag| flag.trim_end_matches(|end: char| !end.is_ascii_alphanumeric()).replace('-', "_"))
        .map(|flag| flag.split(['[', '=']).next().unwrap().to_owned())
        .filter(|flag| !["help", "config"].contains(&flag.as_str()))
        .collect();
    let file = std::fs::read_to_string(deploy("server.toml")).unwrap();
    let keys: BTreeSet<&str> = file
        .lines()
        .filter_map(|line| line.trim_start_matches("# ").split_once(" = "))
        .map(|(key, _)| key)
        .collect();
    for flag in &flags {
        assert!(keys.contains(flag.as_str()), "--{flag} is not in server.toml");
    }
    assert!(flags.len() > 12, "{flags:?}");
    // A mistyped key is refused, with its line.
    let wrong = data.path().join("wrong.toml");
    std::fs::write(&wrong, file.replace("max_uploads", "max_upload")).unwrap();
    let output = run(&wrong);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && message.contains("unknown field `max_upload`"), "{message}");
    assert!(!data.path().join("db").exists(), "checking starts nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn dashboard_and_alerts_use_metrics_that_exist() {
    let server = TestServer::start().await;
    let blob = Blob::noise(1, 100);
    server.put(&blob).await;
    server.get(&blob.digest).await;
    server.get(&Blob::noise(2, 100).digest).await;
    server.publish(&result(1, 1, Some(blob.digest))).await;
    server.publish(&result(1, 2, Some(Blob::noise(3, 100).digest))).await;
    server.lookup(1).await;
    server.lookup(2).await;
    let metrics = server.client.get(server.url("/metrics")).send().await.unwrap().text().await.unwrap();
    let mut used = 0;
    for file in ["grafana/cachec.json", "prometheus/cachec.rules.yml"] {
        let text = std::fs::read_to_string(deploy(file)).unwrap();
        for word in text.split(|end: char| !(end.is_ascii_lowercase() || end.is_ascii_digit() || end == '_'))
        {
            if word.starts_with("cachec_") || word.starts_with("process_") {
                used += 1;
                let found = metrics
                    .lines()
                    .any(|line| line.strip_prefix(word).is_some_and(|rest| rest.starts_with(['{', ' '])));
                assert!(found, "{file} uses {word}, which is not in /metrics");
            }
        }
    }
    assert!(used > 30, "{used}");
    let dashboard: serde_json::Value =
        serde_json::from_slice(&std::fs::read(deploy("grafana/cachec.json")).unwrap()).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() > 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_a_place_of_their_own() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let server = TestServer::start_with(64 << 20, |options| {
        options.metrics_listen = Some(port);
        options.deadlines.first_request = Duration::from_millis(500);
    })
    .await;
    let status = async |url: String| server.client.get(url).send().await.unwrap().status().as_u16();
    assert_eq!(status(server.url("/metrics")).await, 404);
    assert_eq!(status(server.url("/healthz")).await, 200);
    assert_eq!(status(format!("http://{port}/metrics")).await, 200);
    assert_eq!(status(format!("http://{port}/readyz")).await, 200);
    assert_eq!(status(format!("http://{port}/v1/default/blobs/00")).await, 404);
    let mut silent = tokio::net::TcpStream::connect(port).await.unwrap();
    let closed = tokio::time::timeout(Duration::from_secs(20), async { silent.read(&mut [0; 16]).await });
    assert_eq!(closed.await.expect("it goes on waiting").unwrap_or(0), 0);
    // Beyond loopback they are nowhere, unless told where.
    let public = TestServer::start_with(64 << 20, |options| {
        options.listen.set_ip([0, 0, 0, 0].into());
        options.open = true;
    })
    .await;
    let url = public.url("/metrics").replace("0.0.0.0", "127.0.0.1");
    assert_eq!(status(url).await, 404);
}

#[test]
fn the_log_is_json_where_that_is_asked_for() {
    let data = tempfile::tempdir().unwrap();
    let mut child = harness::program()
        .args(["serve", "--listen", "127.0.0.1:0", "--log-format", "json", "--data"])
        .arg(data.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(!log.is_empty());
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        assert!(["timestamp", "level", "target"].iter().all(|key| line[key].is_string()), "{line}");
    }
}
