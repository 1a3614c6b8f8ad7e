//! The client's side of the etcd v3 API, as reader, writer and engine need it: one connection that is never replaced
//! behind its user's back, and calls whose every answer is checked against the cluster lock.

mod connect;
mod dial;
mod handshake;
mod open;
mod problem;
mod rate;
mod resolve;
mod session;
pub mod steps;

pub use connect::ConnectError;
pub(crate) use connect::{Connected, Rounds, connect};
pub(crate) use rate::RateLimiter;
pub use rate::RateLimits;
pub use resolve::Resolver;
pub(crate) use session::{Change, Pair, Session, SessionError, Span, WatchAnswer};
