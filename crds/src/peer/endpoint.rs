//! Where a gateway is.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use rustls_pki_types::DnsName;

use crate::names::GATEWAY_PORT;

/// The longest endpoint, in bytes: a DNS name has 253 at most.
const MAX_BYTES: usize = 300;

/// Where a gateway is: `https://HOST:PORT`. What is not encrypted is not taken.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PeerEndpoint {
    /// A DNS name in small letters, or an address; IPv6 without brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
}

impl FromStr for PeerEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_BYTES {
            return Err(format!("is {} bytes long; at most {MAX_BYTES} are taken", text.len()));
        }
        let Some(rest) = text.strip_prefix("https://") else {
            return Err("does not begin with https://; write https://HOST:PORT".to_owned());
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or("has no `]` after its IPv6 address")?;
                host.parse::<Ipv6Addr>().map_err(|_| "has no IPv6 address in its brackets")?;
                (host, port)
            }
            None => rest.split_at(rest.find(':').unwrap_or(rest.len())),
        };
        if host.parse::<IpAddr>().is_err() && !is_host_name(host) {
            return Err("names no host; write https://HOST:PORT, an IPv6 address in brackets".to_owned());
        }
        let port = match port.strip_prefix(':') {
            Some(port) => port
                .parse::<u16>()
                .ok()
                .filter(|port| *port != 0)
                .ok_or("has a port that is not a number from 1 to 65535, or a path behind it")?,
            None if port.is_empty() => GATEWAY_PORT,
            None => return Err("has something behind its host; write https://HOST:PORT alone".to_owned()),
        };
        Ok(Self { host: host.to_ascii_lowercase(), port })
    }
}

impl fmt::Display for PeerEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "https://[{}]:{}", self.host, self.port),
            false => write!(f, "https://{}:{}", self.host, self.port),
        }
    }
}

/// Whether a text can be the name of a host. What looks like an IPv4 address and is none, is not.
pub(super) fn is_host_name(text: &str) -> bool {
    let last = text.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    DnsName::try_from(text).is_ok() && !last.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_of_both_families_are_taken() {
        for (text, reads) in [
            ("https://beta.mesh.cilium.io:32379", "https://beta.mesh.cilium.io:32379"),
            ("https://Beta.Example", "https://beta.example:2379"),
            ("https://192.0.2.1:2379/", "https://192.0.2.1:2379"),
            ("https://[2001:db8::1]:2379", "https://[2001:db8::1]:2379"),
            ("https://[2001:db8::1]", "https://[2001:db8::1]:2379"),
        ] {
            assert_eq!(text.parse::<PeerEndpoint>().expect(text).to_string(), reads);
        }
    }

    #[test]
    fn everything_else_is_refused_with_what_to_write() {
        for (text, says) in [
            ("http://beta:2379", "https://"),
            ("beta:2379", "https://"),
            ("https://", "names no host"),
            ("https://:2379", "names no host"),
            ("https://2001:db8::1", "names no host"),
            ("https://192.0.2.300:2379", "names no host"),
            ("https://[2001:db8::1:2379", "no `]`"),
            ("https://[beta]:2379", "no IPv6 address"),
            ("https://[2001:db8::1]2379", "behind its host"),
            ("https://user@beta:2379", "names no host"),
            ("https://beta:0", "1 to 65535"),
            ("https://beta:", "1 to 65535"),
            ("https://beta:2379/v3", "a path"),
            ("https://beta/v3", "names no host"),
            (&format!("https://{}", "b".repeat(400)), "bytes long"),
        ] {
            let error = text.parse::<PeerEndpoint>().expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
