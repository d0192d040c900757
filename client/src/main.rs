//! The cachec client: `RUSTC_WRAPPER=cachec`.
//!
//! A unit's way: [`invocation`] (what is asked for) → [`unit`] (roots and action key) → [`agent`]'s lookup
//! and restore → [`streams`] (replay), or run and record → [`agent`]'s upload. The [`wrapper`] is the
//! process that cargo starts, and traces the compiler ([`tracer`]); the [`agent`] does the work and
//! outlives it. A build script's run goes the same way, from the [`launcher`] in its program's place.
//!
//! Invariant: nothing here may break, hang or change a build. When unsure, the compiler runs.

mod agent;
mod batch;
mod breaker;
mod cli;
mod config;
mod connect;
mod debug_paths;
mod deferred;
mod dep_info;
mod doctor;
mod elf;
mod inputs;
mod invocation;
mod ipc;
mod launcher;
mod local;
mod memo;
mod notice;
mod places;
mod process;
mod remote;
mod report;
mod script;
mod signature;
mod streams;
mod tls;
mod toolchain;
mod tracer;
mod unit;
mod wrapper;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(program) = launcher::launched(&words) {
        return launcher::run(started, &program, &words);
    }
    match words.split_first() {
        Some((compiler, arguments)) if !cli::is_command(compiler) => {
            wrapper::run_compiler(started, compiler, arguments)
        }
        _ => cli::run(),
    }
}
