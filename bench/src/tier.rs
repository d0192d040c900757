//! Forging a local tier: what would a cache do that did not know of an input?
//!
//! The negative control of every test that a changed input is noticed: with the input taken out of the
//! stored result, the stale output must really appear.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use cachec_protocol::message::PublishRequest;
use cachec_protocol::{Input, InputSet, StoredResult, decode, encode};

/// Takes the inputs that `forget` names out of every stored result; returns how many there were.
///
/// # Errors
/// Where the tier cannot be read or written.
pub fn forget_inputs(tier: &Path, forget: impl Fn(&Input) -> bool) -> anyhow::Result<usize> {
    let mut forgotten = 0;
    for file in files_below(&tier.join("v1/results"))? {
        let mut publish: PublishRequest = decode(&fs::read(&file)?)?;
        let inputs = publish.result.input_set.inputs().to_vec();
        let kept: Vec<Input> = inputs.iter().filter(|input| !forget(input)).cloned().collect();
        if kept.len() < inputs.len() {
            forgotten += inputs.len() - kept.len();
            fs::remove_file(&file)?;
            publish.result = StoredResult { input_set: InputSet::new(kept), ..publish.result };
            let directory = file.parent().context("a result lies in a directory")?;
            fs::write(directory.join(publish.result.result_key().to_string()), encode(&publish))?;
        }
    }
    Ok(forgotten)
}

/// All files below a directory.
///
/// # Errors
/// Where it cannot be read.
pub fn files_below(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else {
            files.push(entry.path());
        }
    }
    Ok(files)
}

/// Stores every result of `tier` also under the action that made the same outputs in `changed`: what a cache
/// would have whose keys did not tell the two apart. Returns how many there were.
///
/// # Errors
/// Where a tier cannot be read or written.
pub fn confuse_actions(tier: &Path, changed: &Path) -> anyhow::Result<usize> {
    let results = |tier: &Path| -> anyhow::Result<Vec<PublishRequest>> {
        files_below(&tier.join("v1/results"))?.iter().map(|file| Ok(decode(&fs::read(file)?)?)).collect()
    };
    let names = |publish: &PublishRequest| -> Vec<String> {
        publish.result.outputs.iter().map(|output| output.name.clone()).collect()
    };
    let mut confused = 0;
    let known = results(tier)?;
    for other in results(changed)? {
        // Answers to cargo's questions leave nothing that would tell them apart.
        if other.result.outputs.is_empty() {
            continue;
        }
        let key = other.result.action_key;
        for publish in
            known.iter().filter(|known| names(known) == names(&other) && known.result.action_key != key)
        {
            let mut publish = publish.clone();
            publish.result.action_key = key;
            let name = key.to_string();
            let directory = tier.join("v1/results").join(&name[..2]).join(&name);
            fs::create_dir_all(&directory)?;
            fs::write(directory.join(publish.result.result_key().to_string()), encode(&publish))?;
            confused += 1;
        }
    }
    Ok(confused)
}
