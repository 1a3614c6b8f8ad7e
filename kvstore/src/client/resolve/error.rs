//! Why a name leads nowhere, told apart by what is to be done.

use std::{fmt, net::SocketAddr, time::Duration};

/// Why there are no addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The host of an endpoint cannot be a DNS name.
    #[error("{host:?} is neither an address nor a DNS name ({reason}); correct the endpoint")]
    NotAName {
        /// The host.
        host: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It is not known which name servers to ask.
    #[error(
        "{host} cannot be looked up: {reason}; the pod's or node's /etc/resolv.conf must list a nameserver"
    )]
    Unconfigured {
        /// The name.
        host: String,
        /// What is wrong.
        reason: String,
    },
    /// The name servers say that there is no such name.
    #[error(
        "the name {host} does not exist ({asked}); is it spelled right in the endpoint? Without a record in DNS, the \
         peer's `addresses` can say where it is"
    )]
    NoSuchName {
        /// The name.
        host: String,
        /// Who was asked what.
        asked: Asked,
        /// For how long the answer counts.
        ttl: Duration,
    },
    /// The name exists but has no address.
    #[error(
        "the name {host} exists but has neither an IPv4 nor an IPv6 address ({asked}); has its load balancer been given \
         one, does its Service have ready endpoints?"
    )]
    NoAddress {
        /// The name.
        host: String,
        /// Who was asked what.
        asked: Asked,
        /// For how long the answer counts.
        ttl: Duration,
    },
    /// The name servers cannot or will not answer.
    #[error(
        "the name servers cannot answer for {host}: {reason} ({asked}); is DNS working here (kubectl -n kube-system \
         get pods -l k8s-app=kube-dns)?"
    )]
    ServerFailed {
        /// The name.
        host: String,
        /// What they said.
        reason: String,
        /// Who was asked what.
        asked: Asked,
    },
    /// No name server answers.
    #[error(
        "no name server answers for {host} ({asked}); is DNS running, and may this pod reach it (UDP and TCP port 53)?"
    )]
    TimedOut {
        /// The name.
        host: String,
        /// Who was asked what.
        asked: Asked,
    },
}

impl ResolveError {
    /// Whether nobody could say anything about the name.
    pub(super) fn is_outage(&self) -> bool {
        match self {
            Self::NotAName { .. } | Self::NoSuchName { .. } | Self::NoAddress { .. } => false,
            Self::Unconfigured { .. } | Self::ServerFailed { .. } | Self::TimedOut { .. } => true,
        }
    }

    pub(super) fn ttl(&self) -> Duration {
        match self {
            Self::NoSuchName { ttl, .. } | Self::NoAddress { ttl, .. } => *ttl,
            Self::NotAName { .. } => Duration::MAX,
            Self::Unconfigured { .. } | Self::ServerFailed { .. } | Self::TimedOut { .. } => Duration::ZERO,
        }
    }
}

/// What was asked, and of whom.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// The names, in order: the host in each of the search domains and as it is.
    pub names: Vec<String>,
    /// The name servers.
    pub servers: Vec<SocketAddr>,
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<_> = self.servers.iter().map(ToString::to_string).collect();
        write!(f, "asked for {} at {}", self.names.join(", "), servers.join(", "))
    }
}
