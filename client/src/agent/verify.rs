//! `CACHEC_MODE=verify`: every unit is compiled, and what the cache has for it is compared with what has come out.
//!
//! Compared is what would have been restored: outputs with their names, modes and contents, and both streams, roots
//! written as variables. Nothing is restored, and nothing is stored.

use cachec_protocol::StoredResult;

use super::Agent;
use crate::unit::Unit;

/// Counts a comparison, and tells the user of a difference.
pub(super) fn compare(agent: &Agent, unit: &Unit, stored: &StoredResult, made: &StoredResult) {
    let differences = differences(stored, made);
    if differences.is_empty() {
        agent.statistics_of(unit).verified += 1;
        return;
    }
    let name = unit.name().to_owned();
    agent
        .notify(format!("{name}: what is stored differs from what was compiled: {}", differences.join(", ")));
    agent.statistics_of(unit).differences.entry(name).or_default().extend(differences);
}

/// Names of the outputs and streams that are not the same.
fn differences(stored: &StoredResult, made: &StoredResult) -> Vec<String> {
    let (old, new) = (&stored.outputs, &made.outputs);
    let lost = old.iter().filter(|output| !new.iter().any(|other| other.name == output.name));
    let changed = new.iter().filter(|output| !old.contains(output));
    let outputs = lost.chain(changed).map(|output| output.name.clone());
    let streams =
        [("standard output", stored.stdout == made.stdout), ("standard error", stored.stderr == made.stderr)];
    let streams = streams.into_iter().filter(|(_, is_same)| !is_same).map(|(name, _)| name.to_owned());
    outputs.chain(streams).collect()
}

#[cfg(test)]
mod tests {
    use cachec_protocol::{ActionKey, Digest, InputSet, Output, OutputKind};

    use super::*;

    fn result(outputs: &[(&str, &[u8])], stderr: &[u8]) -> StoredResult {
        let output = |(name, content): &(&str, &[u8])| Output {
            name: (*name).to_owned(),
            kind: OutputKind::Binary,
            executable: false,
            digest: Digest::of(content),
            size_bytes: content.len() as u64,
            permissions: None,
            inline: None,
        };
        StoredResult {
            action_key: ActionKey::from_bytes([1; 32]),
            input_set: InputSet::default(),
            outputs: outputs.iter().map(output).collect(),
            stdout: vec![],
            stderr: stderr.to_vec(),
            compile_ms: 1,
            pack: None,
            signature: None,
        }
    }

    #[test]
    fn every_part_is_compared() {
        let stored = result(&[("a", b"1"), ("b", b"2")], b"warning");
        assert_eq!(differences(&stored, &result(&[("b", b"2"), ("a", b"1")], b"warning")), [""; 0]);
        assert_eq!(differences(&stored, &result(&[("a", b"1"), ("b", b"3")], b"warning")), ["b"]);
        assert_eq!(
            differences(&stored, &result(&[("a", b"1"), ("c", b"2")], b"")),
            ["b", "c", "standard error"]
        );
        let mut executable = stored.clone();
        executable.outputs[0].executable = true;
        assert_eq!(differences(&stored, &executable), ["a"]);
    }
}
