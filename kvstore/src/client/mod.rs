//! The client's side of the etcd v3 API, as reader, writer and engine need it: one connection that is never replaced
//! behind its user's back, and calls whose every answer is checked against the cluster lock.

mod connect;
mod rate;
mod session;

pub use connect::ConnectError;
pub(crate) use connect::connect;
pub(crate) use rate::RateLimiter;
pub use rate::RateLimits;
pub(crate) use session::{Change, Pair, Session, SessionError, Span, WatchAnswer};
