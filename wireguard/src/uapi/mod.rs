//! WireGuard's cross-platform configuration protocol (UAPI): lines of `key=value` over a unix socket, which stock `wg`
//! speaks to every device in user space. Source of the format: "Cross-platform Userspace Implementation",
//! <https://www.wireguard.com/xplatform/>, and what `wg` and wireguard-go do where that says nothing.
//!
//! ```text
//! get=1                        set=1
//!                              private_key=<64 hexadecimal digits>
//!                              public_key=<...>           begins a peer
//!                              allowed_ip=10.1.0.0/16     of that peer
//!
//! private_key=<...>            errno=0
//! ...
//! errno=0
//! ```
//!
//! A request ends with an empty line, and so does its answer. A connection carries any number of them.
//!
//! A set request is read whole, within bounds, before any of it is applied: one with a mistake in it changes nothing.
//!
//! What our device has beyond that, and only a client that knows of it asks for:
//! - `next_private_key=` (set; empty or all zero: none): a second key that handshakes are answered under;
//! - `successor_of=<public key>` (set, of a peer): see [`PeerUpdate::successor_of`](crate::config::PeerUpdate);
//! - `isthmus_extensions=1` after `get=1`: the answer then also has the two above, `session_key=` of each peer, and the
//!   device's counters as `isthmus_<name>=<number>`.

mod encode;
mod lines;
mod outgoing;
mod request;
mod server;
mod state;

pub use encode::{write_request, write_state};
pub use lines::{LineError, Lines};
pub use request::{Request, RequestError, read_request};
pub use server::{Server, ServerError};
pub use state::{Answer, AnswerError, read_answer};

/// Bytes in the longest line that is read, without its end.
pub const MAX_LINE: usize = 1024;
/// Bytes in the largest request or answer that is read.
pub const MAX_MESSAGE: u64 = 128 << 20;
/// Peers in one request or answer.
pub const MAX_PEERS: usize = 1 << 16;
/// Prefixes of all peers in one request or answer.
pub const MAX_PREFIXES: usize = 1 << 20;

/// Begins the names of counters.
const COUNTER_PREFIX: &str = "isthmus_";
/// Asks for what other devices do not have.
const EXTENSIONS: &str = "isthmus_extensions";
