//! `cachec doctor`: tries each thing that a build needs of cachec, and says what is wrong.

use std::process::Command;

use crate::config::{Config, Mode, Surroundings};
use crate::connect::{Address, Program};
use crate::local::LocalTier;
use crate::remote::Remote;
use crate::tracer::{Places, Trace, Tracer};

/// One thing that was tried: what it is, and how it went.
struct Finding {
    what: &'static str,
    outcome: Result<String, String>,
}

/// Tries everything and prints a line each; says whether all is well.
pub(crate) fn run() -> bool {
    let findings = examine();
    for Finding { what, outcome } in &findings {
        match outcome {
            Ok(text) => println!("ok    {what}: {text}"),
            Err(text) => println!("FAIL  {what}: {text}"),
        }
    }
    findings.iter().all(|finding| finding.outcome.is_ok())
}

fn examine() -> Vec<Finding> {
    let config = match Config::load(&Surroundings::of_this_process(None)) {
        Ok(config) => config,
        Err(error) => return vec![Finding { what: "configuration", outcome: Err(error.to_string()) }],
    };
    let mut findings = vec![Finding { what: "configuration", outcome: Ok(describe(&config)) }];
    if config.mode == Mode::Off {
        return findings;
    }
    findings.push(Finding { what: "agent", outcome: try_agent(&config) });
    if let Some(url) = &config.url {
        findings.push(Finding { what: "server", outcome: try_server(&config, url) });
    }
    if let Some(directory) = &config.directory {
        let opened = LocalTier::open(directory, config.directory_bytes).map_err(|error| error.to_string());
        let outcome = opened.map(|_| format!("{} can be written", directory.display()));
        findings.push(Finding { what: "local tier", outcome });
    }
    findings.push(Finding { what: "tracer", outcome: try_tracer() });
    findings
}

fn describe(config: &Config) -> String {
    let url = config.url.as_deref().unwrap_or("no server");
    let token = if config.token.is_some() { "with a token" } else { "without a token" };
    format!(
        "{url}, namespace {}, {token}, mode {:?}, paths {:?}",
        config.namespace, config.mode, config.path_mode
    )
}

fn try_agent(config: &Config) -> Result<String, String> {
    let own = Program::own().map_err(|error| error.to_string())?;
    let address = Address::of(config, &own);
    address.connect_or_start(config).map_err(|error| error.to_string())?;
    Ok(format!("listens at {}", address.socket.display()))
}

fn try_server(config: &Config, url: &str) -> Result<String, String> {
    // A breaker that this opens must not be respected by the next doctor.
    let breaker = format!("doctor-{}", std::process::id());
    let remote = Remote::new(config, url, &breaker)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let started = std::time::Instant::now();
    let outcome = runtime.block_on(remote.lookup(Vec::new()));
    for direction in ["reads", "writes"] {
        let _ = std::fs::remove_file(config.runtime_directory.join(format!("{breaker}.{direction}")));
    }
    outcome.map_err(|error| error.to_string())?;
    Ok(format!("answered within {} ms", started.elapsed().as_millis()))
}

fn try_tracer() -> Result<String, String> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("--version").stdout(std::process::Stdio::null());
    let mut tracer = Tracer::prepare(&mut command, Places::default()).map_err(|error| error.to_string())?;
    let status = command.status();
    tracer.started();
    let trace = tracer.finish();
    match (status, trace) {
        (Ok(_), Some(Trace { obstacle: Some(obstacle), .. })) => {
            Err(format!("it cannot observe here: {obstacle}"))
        }
        (Ok(status), Some(trace)) if status.success() => {
            Ok(format!("works; {} calls observed in a test", trace.notifications))
        }
        (Ok(status), None) if status.success() => {
            Err("not allowed here (an outer tracer, or a sandbox without seccomp): only libraries are cached"
                .into())
        }
        (Ok(status), _) => Err(format!("the test ended with {status}")),
        (Err(error), _) => Err(error.to_string()),
    }
}
