//! What is asked, as people write it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use isthmus_policy::model::Transport;

/// Longest text of one part of a question.
const LONGEST: usize = 4096;

/// A packet to ask about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Asked {
    /// Who would send it.
    pub source: Target,
    /// Who would receive it.
    pub destination: Target,
    /// To which port.
    pub port: Port,
}

/// One end of a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// `CLUSTER/[NAMESPACE/]POD`
    Pod {
        /// Its cluster.
        cluster: String,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// An address.
    Address(IpAddr),
    /// `KEY=VALUE[,KEY=VALUE...]`
    Labels(Vec<(String, String)>),
    /// `identity:NUMBER`
    Identity(u32),
}

/// What a packet is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Port {
    /// A number.
    Number {
        /// IP protocol number.
        protocol: u8,
        /// Port, or type of the ICMP message.
        port: u16,
    },
    /// The name of a port of the destination.
    Named {
        /// The name.
        name: String,
        /// Its protocol, if it matters.
        protocol: Option<Transport>,
    },
}

/// Why a question is none.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AskedError {
    /// Not a target.
    #[error(
        "`{0}` is neither CLUSTER/[NAMESPACE/]POD, nor an address, nor KEY=VALUE,..., nor identity:NUMBER"
    )]
    Target(String),
    /// Not a port.
    #[error("`{0}` is no port: write 80, 80/udp, the name of a port, icmp/8 or icmpv6/128")]
    Port(String),
    /// A part is missing.
    #[error("`{0}` is missing; the question is source=...&destination=...&port=...")]
    Missing(&'static str),
}

impl Asked {
    /// Reads the query of a URL: `source=...&destination=...&port=...`.
    ///
    /// # Errors
    /// A part is missing, or is not what it should be.
    pub fn from_query(query: &str) -> Result<Self, AskedError> {
        let part = |name: &'static str| {
            form_urlencoded::parse(query.as_bytes())
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.into_owned())
                .ok_or(AskedError::Missing(name))
        };
        Ok(Self {
            source: part("source")?.parse()?,
            destination: part("destination")?.parse()?,
            port: part("port")?.parse()?,
        })
    }

    /// The query that asks this.
    pub fn to_query(&self) -> String {
        form_urlencoded::Serializer::new(String::new())
            .append_pair("source", &self.source.to_string())
            .append_pair("destination", &self.destination.to_string())
            .append_pair("port", &self.port.to_string())
            .finish()
    }
}

impl FromStr for Target {
    type Err = AskedError;

    fn from_str(text: &str) -> Result<Self, AskedError> {
        let wrong = || AskedError::Target(short(text));
        if text.len() > LONGEST {
            return Err(wrong());
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Address(address.to_canonical()));
        }
        if let Some(number) = text.strip_prefix("identity:") {
            return number.parse().map(Self::Identity).map_err(|_| wrong());
        }
        if text.contains('=') {
            let pairs = text.split(',').map(|pair| pair.split_once('=').filter(|(key, _)| !key.is_empty()));
            let pairs: Option<Vec<_>> =
                pairs.map(|pair| pair.map(|(key, value)| (key.to_owned(), value.to_owned()))).collect();
            return pairs.map(Self::Labels).ok_or_else(wrong);
        }
        let (cluster, namespace, name) = match text.split('/').collect::<Vec<_>>().as_slice() {
            [cluster, name] => (*cluster, "default", *name),
            [cluster, namespace, name] => (*cluster, *namespace, *name),
            _ => return Err(wrong()),
        };
        if [cluster, namespace, name].iter().any(|part| part.is_empty()) {
            return Err(wrong());
        }
        Ok(Self::Pod { cluster: cluster.into(), namespace: namespace.into(), name: name.into() })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { cluster, namespace, name } => write!(f, "{cluster}/{namespace}/{name}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Identity(identity) => write!(f, "identity:{identity}"),
            Self::Labels(labels) => {
                let pairs: Vec<_> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
                f.write_str(&pairs.join(","))
            }
        }
    }
}

impl FromStr for Port {
    type Err = AskedError;

    fn from_str(text: &str) -> Result<Self, AskedError> {
        let wrong = || AskedError::Port(short(text));
        let (first, second) =
            text.split_once('/').map_or((text, None), |(first, second)| (first, Some(second)));
        let icmp = match first.to_ascii_lowercase().as_str() {
            "icmp" | "icmpv4" => Some((1, 8)),
            "icmpv6" | "icmp6" => Some((58, 128)),
            _ => None,
        };
        if let Some((protocol, echo)) = icmp {
            let kind = second.map_or(Ok(echo), str::parse::<u8>).map_err(|_| wrong())?;
            return Ok(Self::Number { protocol, port: kind.into() });
        }
        let protocol = match second.map(str::to_ascii_lowercase).as_deref() {
            None => None,
            Some("tcp") => Some(Transport::Tcp),
            Some("udp") => Some(Transport::Udp),
            Some("sctp") => Some(Transport::Sctp),
            Some(_) => return Err(wrong()),
        };
        match first.parse::<u16>() {
            Ok(0) => Err(wrong()),
            Ok(port) => Ok(Self::Number { protocol: protocol.unwrap_or(Transport::Tcp).number(), port }),
            Err(_) if is_port_name(first) => Ok(Self::Named { name: first.to_ascii_lowercase(), protocol }),
            Err(_) => Err(wrong()),
        }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number { protocol: 1, port } => write!(f, "icmp/{port}"),
            Self::Number { protocol: 58, port } => write!(f, "icmpv6/{port}"),
            Self::Number { protocol, port } => {
                let name = match protocol {
                    17 => "udp",
                    132 => "sctp",
                    _ => "tcp",
                };
                write!(f, "{port}/{name}")
            }
            Self::Named { name, protocol: None } => f.write_str(name),
            Self::Named { name, protocol: Some(protocol) } => {
                write!(f, "{name}/{}", protocol.as_str().to_ascii_lowercase())
            }
        }
    }
}

/// As Kubernetes has them: letters, digits and hyphens, with a letter among them.
fn is_port_name(text: &str) -> bool {
    text.len() <= 63
        && text.chars().any(|c| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_survives_the_way_to_the_agent() {
        for (source, destination, port) in [
            ("alpha/default/client", "10.0.0.1", "80/tcp"),
            ("beta/client", "fd00::1", "80"),
            ("app=web,tier=front", "identity:65793", "53/UDP"),
            ("k8s:app=web", "::ffff:10.0.0.1", "icmp/8"),
            ("a=", "a/b/c", "http"),
            ("a/b", "a/b/c", "http/tcp"),
            ("a/b", "a/b/c", "icmpv6"),
        ] {
            let asked = Asked {
                source: source.parse().expect("a target"),
                destination: destination.parse().expect("a target"),
                port: port.parse().expect("a port"),
            };
            assert_eq!(Asked::from_query(&asked.to_query()), Ok(asked));
        }
        assert_eq!("beta/client".parse::<Target>().map(|t| t.to_string()), Ok("beta/default/client".into()));
        assert_eq!("80".parse::<Port>().map(|p| p.to_string()), Ok("80/tcp".into()));
    }

    #[test]
    fn what_is_no_question_is_said_so() {
        for text in ["", "client", "a//b", "a/b/c/d", "=x", "identity:x", "a=b,c"] {
            assert!(matches!(text.parse::<Target>(), Err(AskedError::Target(_))), "{text}");
        }
        for text in ["", "0", "65536", "80/quic", "icmp/256", "a_b", "-", "80/", "/tcp"] {
            assert!(matches!(text.parse::<Port>(), Err(AskedError::Port(_))), "{text}");
        }
        assert_eq!(Asked::from_query("source=a/b&port=1"), Err(AskedError::Missing("destination")));
    }
}
