//! What `deploy` has for this server: its configuration file, dashboard and alerts.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, as it should"
)]

mod harness;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use harness::{Blob, TestServer, program, result};

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
        "namespace     pr-*: at most 5.0 GiB, 14d unused, reads main\n",
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
    let server = TestServer::start_with(64 << 20, |options| options.metrics_listen = Some(port)).await;
    let status = async |url: String| server.client.get(url).send().await.unwrap().status().as_u16();
    assert_eq!(status(server.url("/metrics")).await, 404);
    assert_eq!(status(server.url("/healthz")).await, 200);
    assert_eq!(status(format!("http://{port}/metrics")).await, 200);
    assert_eq!(status(format!("http://{port}/readyz")).await, 200);
    assert_eq!(status(format!("http://{port}/v1/default/blobs/00")).await, 404);
    // Beyond loopback they are nowhere, unless told where.
    let public = TestServer::start_with(64 << 20, |options| {
        options.listen.set_ip([0, 0, 0, 0].into());
        options.open = true;
    })
    .await;
    let url = public.url("/metrics").replace("0.0.0.0", "127.0.0.1");
    assert_eq!(status(url).await, 404);
}
