//! The endpoints, one file each. A handler reads the request, calls the store, and shapes the answer.

pub mod blobs;
pub mod builds;
pub mod clients;
pub mod fetch;
pub mod lookup;
pub mod missing;
pub mod probes;
pub mod results;
pub mod token;
