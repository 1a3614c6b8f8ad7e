//! How a server is to be run.

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;

/// Configuration of a [`KubeApi`](crate::KubeApi).
#[derive(Debug, Clone)]
pub struct Config {
    /// Without it the server speaks plain HTTP, and listens on loopback addresses only.
    pub tls: Option<Tls>,
    /// Where the addresses of Services come from: one range, or one per family.
    pub service_cidrs: Vec<IpNet>,
    /// Where clients inside the cluster reach the server (the endpoint of Service `kubernetes`); by default
    /// where it listens first.
    pub advertise: Option<SocketAddr>,
    /// How many changes of each resource are kept for watches that resume; older revisions answer 410.
    pub history_events: usize,
    /// How often an idle watch that allows bookmarks gets one.
    pub bookmark_interval: Duration,
    /// Larger requests answer 413.
    pub max_body_bytes: usize,
}

/// The server's certificate and whom it trusts, all PEM.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Tls {
    pub cert_pem: Vec<u8>,
    pub key_pem: Vec<u8>,
    /// Clients' certificates are signed by one of these.
    pub client_ca_pem: Vec<u8>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tls: None,
            service_cidrs: vec![IpNet::V4(DEFAULT_SERVICE_CIDR)],
            advertise: None,
            history_events: 10_000,
            bookmark_interval: Duration::from_secs(60),
            max_body_bytes: 3 * 1024 * 1024,
        }
    }
}

const DEFAULT_SERVICE_CIDR: ipnet::Ipv4Net =
    ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(10, 96, 0, 0), 16);

impl Config {
    pub(crate) fn check(&self) -> Result<(), ServeError> {
        let v4 = self.service_cidrs.iter().filter(|cidr| cidr.addr().is_ipv4()).count();
        let v6 = self.service_cidrs.len() - v4;
        if self.service_cidrs.is_empty() || v4 > 1 || v6 > 1 {
            return Err(ServeError::ServiceCidrs);
        }
        Ok(())
    }
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listening socket is unusable.
    #[error("cannot listen: {0}")]
    Socket(std::io::Error),
    /// Plain HTTP beyond loopback.
    #[error("will not serve plain HTTP on {0}: give a certificate, or listen on a loopback address")]
    PlainText(SocketAddr),
    /// A PEM file has something else in it.
    #[error("cannot read the {what}: {why}")]
    Pem {
        /// Which file.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Certificate and key do not work.
    #[error("cannot use the certificates: {0}")]
    Tls(String),
    /// Not one range per family.
    #[error("service CIDRs must be one range, or one IPv4 and one IPv6 range")]
    ServiceCidrs,
}
