//! The command line: raw options in, checked values out. Nothing else reads arguments or environment.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::app::Limits;
use crate::connection::Deadlines;
use crate::namespace::Namespace;
use crate::server::ServerOptions;
use crate::store::embedded::EmbeddedOptions;
use crate::tokens::Verbs;

/// Below this, RocksDB's own files would be most of the store.
const MIN_SIZE_BYTES: u64 = 8 << 20;

/// The cachec server: keeps compile outputs by content.
#[derive(Debug, Parser)]
#[command(name = "cachec-server", version)]
pub struct Cli {
    /// What to do; without it, `serve`.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the server (also without this word)
    Serve(ServeArguments),
    /// Create, list and revoke tokens; works while the server runs
    #[command(subcommand)]
    Token(TokenCommand),
}

/// How to run the server.
#[derive(Debug, Args)]
pub struct ServeArguments {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, env = "CACHEC_SERVER_LISTEN", default_value = "127.0.0.1:7373")]
    listen: SocketAddr,
    /// The data directory
    #[arg(long, env = "CACHEC_SERVER_DATA")]
    data: PathBuf,
    /// Most bytes that the data directory takes, for example 50GiB
    #[arg(long, env = "CACHEC_SERVER_MAX_SIZE", default_value = "50GiB", value_parser = parse_size)]
    max_size: u64,
    /// Most bytes of one blob's content
    #[arg(long, env = "CACHEC_SERVER_MAX_BLOB_SIZE", default_value = "4GiB", value_parser = parse_size)]
    max_blob_size: u64,
    /// Uploads at a time; each takes up to 33 MiB of memory
    #[arg(long, env = "CACHEC_SERVER_MAX_UPLOADS", default_value_t = 16,
          value_parser = clap::value_parser!(u16).range(1..=256))]
    max_uploads: u16,
    /// Level at which blobs are compressed again in the background, at the lowest priority; 0 for never. 19 takes
    /// some 100 MiB of memory meanwhile
    #[arg(long, env = "CACHEC_SERVER_RECOMPRESS_LEVEL", default_value_t = 19,
          value_parser = clap::value_parser!(i32).range(0..=19))]
    recompress_level: i32,
    /// Listen beyond loopback without any token
    #[arg(long, env = "CACHEC_SERVER_OPEN")]
    open: bool,
    /// What to log, for example info or cachec_server=debug
    #[arg(long, env = "CACHEC_SERVER_LOG", default_value = "info")]
    pub log: String,
}

impl ServeArguments {
    /// The checked options.
    ///
    /// # Errors
    /// A sentence about the value that cannot be.
    pub fn options(&self) -> anyhow::Result<ServerOptions> {
        anyhow::ensure!(self.max_size >= MIN_SIZE_BYTES, "--max-size must be at least 8MiB");
        Ok(ServerOptions {
            listen: self.listen,
            store: EmbeddedOptions {
                directory: self.data.clone(),
                max_size_bytes: self.max_size,
                max_blob_bytes: self.max_blob_size,
            },
            recompress_level: (self.recompress_level > 0).then_some(self.recompress_level),
            open: self.open,
            limits: Limits { uploads: usize::from(self.max_uploads), ..Limits::default() },
            deadlines: Deadlines::default(),
        })
    }
}

/// What can be done with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Create a token and print it, this once
    Create {
        /// The data directory
        #[arg(long, env = "CACHEC_SERVER_DATA")]
        data: PathBuf,
        /// The only namespace it is good for
        #[arg(long)]
        namespace: Namespace,
        /// What it allows there: read, write, or both with a comma
        #[arg(long)]
        allow: Verbs,
        /// After which time it ends, for example 90d or 12h; without it, never
        #[arg(long, value_parser = parse_duration)]
        expires: Option<Duration>,
    },
    /// List all tokens by id
    List {
        /// The data directory
        #[arg(long, env = "CACHEC_SERVER_DATA")]
        data: PathBuf,
    },
    /// Revoke a token, at once and for good
    Revoke {
        /// The data directory
        #[arg(long, env = "CACHEC_SERVER_DATA")]
        data: PathBuf,
        /// Its id, as `token list` shows it
        id: String,
    },
}

/// Splits `50GiB` into number and unit.
fn split_unit(text: &str) -> Result<(u64, &str), String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number =
        text[..digits].parse().map_err(|_| format!("{text:?} does not start with a whole number"))?;
    Ok((number, text[digits..].trim()))
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split_unit(text)?;
    let factor: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "KB" | "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(format!("{unit:?} is no unit; take KiB, MiB, GiB or TiB")),
    };
    number.checked_mul(factor).ok_or_else(|| format!("{text} is too much"))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text)?;
    let factor: u64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        "w" => 7 * 24 * 60 * 60,
        _ => return Err(format!("{unit:?} is no unit; take s, m, h, d or w")),
    };
    number.checked_mul(factor).map(Duration::from_secs).ok_or_else(|| format!("{text} is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_have_units() {
        assert_eq!(parse_size("50GiB"), Ok(50 << 30));
        assert_eq!(parse_size("1048576"), Ok(1 << 20));
        assert_eq!(parse_size("5 MB"), Ok(5_000_000));
        assert_eq!(parse_duration("90d"), Ok(Duration::from_secs(90 * 86_400)));
        for wrong in ["", "GiB", "-1GiB", "1.5GiB", "1 gib", "99999999999TiB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        assert!(parse_duration("90").is_err());
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
