//! From a configuration to a connection: resolve, dial, secure, open, at one endpoint after the other.

use std::{fmt, net::SocketAddr, time::Duration};

use chrono::Utc;
use etcd_client::Client;
use tokio::time::{Instant, timeout_at};

use super::{
    dial::{DialError, dial},
    handshake::{handshake, own_certificate},
    open::{OpenError, open},
    problem::TlsProblem,
    resolve::{ResolveError, Resolver},
};
use crate::{
    certificate::Validity,
    config::{ClientConfig, Endpoint},
};

/// How long all of it may take for one endpoint.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why no endpoint could be connected to.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The endpoint's host has no address, or none can be found out.
    #[error("{endpoint}: {source}")]
    Resolve {
        /// The endpoint.
        endpoint: Endpoint,
        /// Why.
        source: ResolveError,
    },
    /// Nothing answers at any address of the endpoint.
    #[error("{endpoint}: {source}")]
    Unreachable {
        /// The endpoint.
        endpoint: Endpoint,
        /// What became of each address.
        source: DialError,
    },
    /// TLS failed, or one side refuses the other's certificate.
    #[error("{endpoint} ({address}): TLS: {problem}")]
    Tls {
        /// The endpoint.
        endpoint: Endpoint,
        /// The address that answered.
        address: SocketAddr,
        /// What is wrong.
        problem: TlsProblem,
    },
    /// HTTP/2 or the login failed on an established connection.
    #[error("{endpoint} ({address}): {reason}")]
    Protocol {
        /// The endpoint.
        endpoint: Endpoint,
        /// The address that answered.
        address: SocketAddr,
        /// What is wrong.
        reason: String,
    },
    /// Something answered, and then said nothing more in time.
    #[error(
        "{endpoint}: no connection within {}s, it got as far as {step}; are packets to it dropped on the way, or is it \
         overloaded?", CONNECT_TIMEOUT.as_secs()
    )]
    TimedOut {
        /// The endpoint.
        endpoint: Endpoint,
        /// What was not finished.
        step: Step,
    },
}

/// The steps to a connection, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The addresses of the host.
    Resolve,
    /// TCP.
    Dial,
    /// TLS.
    Handshake,
    /// HTTP/2, and the login if there is one.
    Open,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Resolve => "the name's addresses",
            Self::Dial => "TCP",
            Self::Handshake => "the TLS handshake",
            Self::Open => "the first answer of the gateway",
        })
    }
}

/// Where the next attempt begins: each one elsewhere than the last, so that what has just failed is tried last.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    /// The place of the endpoint to begin with.
    next: usize,
    /// Counts attempts; each begins with another address of a name.
    attempts: usize,
    /// The connection that there was, or the address that was of no use.
    left: Option<SocketAddr>,
    /// The host of the connection that there was. Its addresses may have changed.
    died: Option<String>,
}

/// A connection, and where it leads.
pub(crate) struct Connected {
    pub(crate) client: Client,
    pub(crate) endpoint: Endpoint,
    pub(crate) address: SocketAddr,
}

/// Connects to the first endpoint that answers. Called again, because the attempt failed or the connection died, it
/// begins with the next endpoint, looks up anew the name of the one that died, and tries its address last.
///
/// Authorities, certificate and key are taken as they are now.
///
/// # Errors
/// The error of the last endpoint that was tried.
pub(crate) async fn connect(
    resolver: &Resolver,
    config: &ClientConfig,
    rounds: &mut Rounds,
) -> Result<Connected, ConnectError> {
    if let Some(host) = rounds.died.take() {
        resolver.forget(&host);
    }
    warn_of_own_certificate(config);
    let count = config.endpoints.len();
    let first = rounds.next;
    let mut last = None;
    for index in 0..count {
        let place = (first + index) % count;
        let endpoint = &config.endpoints[place];
        match connect_to(resolver, config, endpoint, rounds).await {
            Ok((client, address)) => {
                rounds.next = place + 1;
                rounds.attempts += 1;
                rounds.left = Some(address);
                rounds.died = Some(endpoint.host.clone());
                return Ok(Connected { client, endpoint: endpoint.clone(), address });
            }
            Err(error) => {
                tracing::debug!(%endpoint, %error, "endpoint is not usable");
                last = Some(error);
            }
        }
    }
    rounds.next = first + 1;
    rounds.attempts += 1;
    Err(last.expect("a client configuration lists at least one endpoint"))
}

async fn connect_to(
    resolver: &Resolver,
    config: &ClientConfig,
    endpoint: &Endpoint,
    rounds: &mut Rounds,
) -> Result<(Client, SocketAddr), ConnectError> {
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    let at = || endpoint.clone();
    let late = |step| move |_| ConnectError::TimedOut { endpoint: at(), step };
    let resolved = timeout_at(deadline, resolver.resolve(endpoint, &config.addresses))
        .await
        .map_err(late(Step::Resolve))?
        .map_err(|source| ConnectError::Resolve { endpoint: at(), source })?;
    let addresses = rounds.order(resolved.addresses);
    let dialed = dial(&addresses, deadline)
        .await
        .map_err(|source| ConnectError::Unreachable { endpoint: at(), source })?;
    let address = dialed.address;
    let talk = async {
        let secured = timeout_at(deadline, handshake(config, endpoint, dialed.stream))
            .await
            .map_err(late(Step::Handshake))?
            .map_err(|problem| ConnectError::Tls { endpoint: at(), address, problem })?;
        let opened = timeout_at(deadline, open(config, endpoint, secured)).await.map_err(late(Step::Open))?;
        opened.map_err(|error| match error {
            OpenError::Tls(problem) => ConnectError::Tls { endpoint: at(), address, problem },
            OpenError::Protocol(reason) => ConnectError::Protocol { endpoint: at(), address, reason },
        })
    };
    match talk.await {
        Ok(client) => Ok((client, address)),
        Err(error) => {
            rounds.left = Some(address);
            Err(error)
        }
    }
}

impl Rounds {
    /// The addresses in the order in which to try them: in turn, the one that was of no use last.
    fn order(&self, mut addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
        let turn = self.attempts % addresses.len().max(1);
        addresses.rotate_left(turn);
        // A stable order: all others keep their places.
        addresses.sort_by_key(|address| Some(*address) == self.left);
        addresses
    }
}

/// Tells in time that the other side is about to refuse this one. Whether it does is up to its clock.
fn warn_of_own_certificate(config: &ClientConfig) {
    let now = Utc::now();
    // What cannot be read is told by the handshake.
    let Ok(Some((certificate, validity))) = own_certificate(config, now) else { return };
    let problem = match validity {
        Validity::Valid => return,
        Validity::Expired => "has expired",
        Validity::NotYet => "is not valid yet",
    };
    tracing::warn!(
        %certificate, clock = %crate::certificate::clock(now),
        "this side's own certificate {problem}; have it renewed, or correct the clock if it is wrong"
    );
}
