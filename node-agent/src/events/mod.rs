//! What became of packets, told as it happens: from the programs' ring buffer to whoever listens on the API socket.
//!
//! ```text
//! ring buffer ──▶ reader ──▶ decorate (labels, names, rules) ──▶ hub ──filter──▶ listener
//!                                                                   ├──filter──▶ listener
//! ```
//!
//! Nothing waits for a listener. Every queue is bounded, and what is left out is counted and told as a line of its own.

pub mod decorate;
pub mod filter;
pub mod flow;
mod hub;
pub mod reader;

pub use self::decorate::{Directory, PodName, decorate};
pub use self::filter::{Filter, FilterError};
pub use self::flow::{Flow, Line};
pub use self::hub::Hub;
