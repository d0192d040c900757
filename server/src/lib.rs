//! The cachec server: keeps compile outputs by content, for every build of a team.
//!
//! A request's way: [`connection`] (accepting, TLS, deadlines) → [`app`] (routes, overload, counting) →
//! [`access`] (namespace, token) → [`endpoints`] (one file each) → [`store`] (a trait; metered; layered; embedded).
//!
//! Invariants:
//! - Memory is bounded whatever clients do: bodies stream, or are counted against a common budget.
//! - Every error response is one of [`error`]'s, without internals; a token never gets into a log or an error.
//! - Nothing is acknowledged before a killed process would keep it (see [`store::embedded`]).
//!
//! The library exists for the program and for tests that run a server in their own process.

pub mod access;
mod addresses;
pub mod age;
pub mod app;
pub mod body;
pub mod cli;
pub mod config;
pub mod connection;
pub mod control;
pub mod endpoints;
pub mod error;
pub mod identity;
pub mod metrics;
pub mod namespace;
pub mod outbound;
pub mod policy;
pub mod server;
pub mod sessions;
pub mod store;
pub mod tls;
pub mod tokens;
pub mod turns;
