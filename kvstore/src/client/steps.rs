//! The way to a store, step by step, for whoever wants to see where it ends. [`Reader`](crate::reader::Reader)s go the
//! same way by the same code.
//!
//! ```no_run
//! # use isthmus_kvstore::{client::steps, config::ClientConfig};
//! # async fn example(config: &ClientConfig) -> Result<(), Box<dyn std::error::Error>> {
//! let endpoint = &config.endpoints[0];
//! let resolved = steps::Resolver::system().resolve(endpoint, &config.addresses).await?;
//! let deadline = tokio::time::Instant::now() + steps::CONNECT_TIMEOUT;
//! let dialed = steps::dial(&resolved.addresses, deadline).await?;
//! let secured = steps::handshake(config, endpoint, dialed.stream).await?;
//! println!("{:?} is {:?}", dialed.address, secured.chain);
//! let mut client = steps::open(config, endpoint, secured).await?;
//! client.status().await?;
//! # Ok(())
//! # }
//! ```

use std::time::Duration;

pub use super::connect::Step;
pub use super::dial::{DialError, Dialed, dial};
pub use super::handshake::{Secured, handshake, own_certificate};
pub use super::open::{OpenError, open};
pub use super::problem::{TlsProblem, Why};
pub use super::resolve::{Asked, NameServers, ResolveError, Resolved, Resolver, Source};

/// How long a reader gives all steps together, for one endpoint.
pub const CONNECT_TIMEOUT: Duration = super::connect::CONNECT_TIMEOUT;
