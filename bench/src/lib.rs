//! Running cachec as its users do, and looking at it from outside: real cargo, real rustc, real processes.
//!
//! [`programs`] builds and names the two programs, [`server`] runs a server, [`machine`] is a build machine
//! with its own home, caches and agent, [`tier`] forges its local tier, [`project`] writes small workspaces,
//! [`case`] proves that one of them is never restored wrongly, [`line`] stands between client and server and
//! misbehaves, [`slow_line`] is merely far.

pub mod case;
pub mod compare;
pub mod crates;
pub mod demo;
pub mod differential;
pub mod line;
pub mod load;
pub mod machine;
pub mod programs;
pub mod project;
pub mod sandbox;
pub mod server;
pub mod slow_line;
pub mod tier;

pub use case::Case;
pub use machine::{Build, Machine};
pub use project::Project;
pub use server::Server;
