//! The command line: what can be asked of the program, and the arguments of each command.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::age::Age;
use crate::config::{Settings, data_directory};
use crate::namespace::Pattern;
use crate::tokens::Verbs;

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
    /// Check the configuration and say what it comes to; starts nothing
    CheckConfig(ServeArguments),
    /// Copy everything to a new directory, from which a server can be started; works while the server runs
    Backup {
        /// What is copied.
        #[command(flatten)]
        data: DataArguments,
        /// The new directory; on the same file system it takes little room
        to: PathBuf,
    },
    /// Read and check everything now; needs the server to be stopped, which otherwise does this by itself
    Scrub {
        /// What is checked.
        #[command(flatten)]
        data: DataArguments,
    },
    /// Ask a running server whether it can serve; for health checks in images that have no other client
    Health {
        /// Its URL
        #[arg(long, default_value = "http://127.0.0.1:7373")]
        url: String,
    },
    /// Create, list and revoke tokens; works while the server runs
    #[command(subcommand)]
    Token(TokenCommand),
}

/// How to run the server.
#[derive(Debug, Args)]
pub struct ServeArguments {
    /// Configuration file; environment and flags win over it
    #[arg(long, env = "CACHEC_SERVER_CONFIG")]
    pub config: Option<PathBuf>,
    /// What the environment and flags say.
    #[command(flatten)]
    pub settings: Settings,
}

/// Which data directory a command works on.
#[derive(Debug, Args)]
pub struct DataArguments {
    /// The data directory
    #[arg(long, env = "CACHEC_SERVER_DATA")]
    data: Option<PathBuf>,
    /// The configuration file that names it
    #[arg(long, env = "CACHEC_SERVER_CONFIG")]
    config: Option<PathBuf>,
}

impl DataArguments {
    /// The data directory.
    ///
    /// # Errors
    /// Neither argument says it, or the file cannot be used.
    pub fn directory(&self) -> anyhow::Result<PathBuf> {
        data_directory(self.data.clone(), self.config.as_deref())
    }
}

/// What can be done with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Create a token and print it, this once
    Create {
        /// Where tokens are kept.
        #[command(flatten)]
        data: DataArguments,
        /// The only namespace it is good for; with a `*` at the end, all whose names begin so
        #[arg(long)]
        namespace: Pattern,
        /// What it allows there: read, write, or both with a comma
        #[arg(long)]
        allow: Verbs,
        /// After which time it ends, for example 90d or 12h; without it, never
        #[arg(long)]
        expires: Option<Age>,
    },
    /// List all tokens by id
    List {
        /// Where tokens are kept.
        #[command(flatten)]
        data: DataArguments,
    },
    /// Revoke a token, at once and for good
    Revoke {
        /// Where tokens are kept.
        #[command(flatten)]
        data: DataArguments,
        /// Its id, as `token list` shows it
        id: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
