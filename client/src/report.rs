//! The text form of `cachec stats`.

use std::fmt::Write;

use bytesize::ByteSize;
use serde_json::Value;

/// Renders the agent's JSON report for people.
///
/// # Errors
/// Where the report is not JSON, as one of a foreign version may be.
pub(crate) fn to_text(json: &str) -> serde_json::Result<String> {
    let report: Value = serde_json::from_str(json)?;
    let number = |name: &str| report[name].as_u64().unwrap_or_default();
    let hits = number("local_hits") + number("remote_hits");
    let looked_up = hits + number("misses");
    let percent = if looked_up == 0 { 0.0 } else { hits as f64 * 100.0 / looked_up as f64 };
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<18} {value}");
    };
    row("units", number("units").to_string());
    row("hits", format!("{hits} of {looked_up} ({percent:.1} %)"));
    row("  local / server", format!("{} / {}", number("local_hits"), number("remote_hits")));
    let probes = |name: &str| report["probes"][name].as_u64().unwrap_or_default();
    let answered = probes("local_hits") + probes("remote_hits");
    row("probes answered", format!("{answered} of {}", probes("units")));
    row("compile time saved", format!("{:.1} s", number("saved_ms") as f64 / 1000.0));
    row("results stored", format!("{} ({} uploaded)", number("stored"), number("uploaded")));
    row("compiles observed", format!("{} of {}", number("traced"), number("misses")));
    for (reason, count) in sums(&report["not_stored"]) {
        row("  not stored", format!("{count} {reason}"));
    }
    for (reason, count) in sums(&report["refused"]) {
        row("not cached", format!("{count} {reason}"));
    }
    if number("verified") > 0 {
        row("as stored", number("verified").to_string());
    }
    for (name, parts) in report["differences"].as_object().into_iter().flatten() {
        let parts = parts.as_array().into_iter().flatten().filter_map(Value::as_str);
        row("differs", format!("{name}: {}", parts.collect::<Vec<_>>().join(", ")));
    }
    if let Some(latency) = report["hit_latency"].as_object() {
        let ms = |name: &str| latency.get(name).and_then(Value::as_f64).unwrap_or_default() / 1000.0;
        row("time of a hit", format!("{:.1} ms median, {:.1} ms p99", ms("median_us"), ms("p99_us")));
    }
    if let Some(local) = report["local"].as_object() {
        let bytes = |name: &str| ByteSize::b(local.get(name).and_then(Value::as_u64).unwrap_or_default());
        row("local tier", format!("{} of {}", bytes("stored_bytes"), bytes("limit_bytes")));
    }
    if let Some(remote) = report["remote"].as_object() {
        let bytes = |name: &str| ByteSize::b(remote.get(name).and_then(Value::as_u64).unwrap_or_default());
        row("received / sent", format!("{} / {}", bytes("received_bytes"), bytes("sent_bytes")));
        for name in ["reads_stopped", "writes_stopped"] {
            if let Some(reason) = remote.get(name).and_then(Value::as_str) {
                row(&name.replace('_', " "), reason.to_owned());
            }
        }
    }
    Ok(text)
}

/// Counts by reason; nested counts (by crate) are added up.
fn sums(counts: &Value) -> Vec<(String, u64)> {
    let sum = |value: &Value| match value.as_object() {
        Some(nested) => nested.values().filter_map(Value::as_u64).sum(),
        None => value.as_u64().unwrap_or_default(),
    };
    let entries = counts.as_object().into_iter().flatten();
    entries.map(|(reason, value)| (reason.clone(), sum(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_readable() {
        let json = r#"{"units": 5, "local_hits": 2, "remote_hits": 1, "misses": 1, "saved_ms": 1500, "stored": 1,
            "refused": {"crate-type": {"a": 1, "b": 2}}, "hit_latency": {"median_us": 1500, "p99_us": 2500}}"#;
        let text = to_text(json).unwrap();
        assert!(text.contains("3 of 4 (75.0 %)"), "{text}");
        assert!(text.contains("3 crate-type"), "{text}");
        assert!(text.contains("1.5 ms median, 2.5 ms p99"), "{text}");
    }
}
