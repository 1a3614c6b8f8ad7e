//! A peer, as a Secret describes it: where its gateways are, and which authorities vouch for them.
//!
//! ```yaml
//! apiVersion: v1
//! kind: Secret
//! type: isthmus.io/peer
//! metadata:
//!   name: peer-beta
//!   namespace: isthmus-system
//!   annotations: {isthmus.io/connect: "true"}
//! stringData:
//!   cluster-name: beta
//!   endpoints: https://192.0.2.1:2379, https://192.0.2.2:2379
//!   ca.crt: |
//!     -----BEGIN CERTIFICATE-----
//! ```
//!
//! What is asked for is in the annotations alone, see [`Relation`]: with `isthmus.io/admit` in place of `isthmus.io/connect` the
//! peer may read from this cluster, nothing is read from it, and `endpoints` may be left out.

mod endpoint;
mod error;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use isthmus_wire::ClusterName;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

pub use self::endpoint::PeerEndpoint;
pub use self::error::PeerSecretError;
use crate::bundle::{CaBundle, MAX_BUNDLE_BYTES, brief};
use crate::names;

/// Type of a Secret that describes a peer. A Secret's type cannot be changed once it is there.
pub const PEER_SECRET_TYPE: &str = "isthmus.io/peer";
/// The annotation that connects: `"true"`. With any other value, and without it, nothing is read from the peer.
pub const CONNECT_ANNOTATION: &str = "isthmus.io/connect";
/// The annotation that lets a peer read from this cluster of which nothing is read: `"true"`. [`CONNECT_ANNOTATION`] implies it.
pub const ADMIT_ANNOTATION: &str = "isthmus.io/admit";
/// Key: the peer's cluster name.
pub const CLUSTER_NAME: &str = names::CLUSTER_NAME_KEY;
/// Key: where the peer's gateways are, `https://HOST:PORT`, one per line or with commas between them. Needed to connect.
pub const ENDPOINTS: &str = "endpoints";
/// Key: the authorities that vouch for the peer, a PEM bundle.
pub const CA_BUNDLE: &str = names::CA_BUNDLE_KEY;
/// Key, optional: the name that the gateways' certificate is verified under.
pub const SERVER_NAME: &str = names::SERVER_NAME_KEY;
/// Key, optional: addresses of hosts that are not to be looked up, lines of `HOST IP[,IP...]`.
pub const ADDRESSES: &str = "addresses";
/// Key, optional: the client certificate that the peer issued for us; with [`PRIVATE_KEY`].
pub const CERTIFICATE: &str = names::CERTIFICATE_KEY;
/// Key, optional: the private key of [`CERTIFICATE`].
pub const PRIVATE_KEY: &str = names::PRIVATE_KEY_KEY;

/// The most endpoints of one peer.
pub const MAX_ENDPOINTS: usize = 16;
/// The most hosts in [`ADDRESSES`].
pub const MAX_HOSTS: usize = 16;
/// The most addresses of one host in [`ADDRESSES`].
pub const MAX_ADDRESSES: usize = 16;
/// The longest value of every other key, in bytes.
const MAX_TEXT_BYTES: usize = 16 * 1024;

/// The conventional name of the Secret that describes `cluster`.
pub fn secret_name(cluster: &ClusterName) -> String {
    format!("peer-{cluster}")
}

/// What a Secret asks for. Each asks for what those before it do, and for more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Relation {
    /// Nothing: what is known of the peer is only kept.
    Apart,
    /// The peer may read from this cluster: its authorities are believed about it.
    Admitted,
    /// This cluster reads from the peer, too.
    Connected,
}

impl Relation {
    /// What a Secret's annotations say, whatever else is in it.
    pub fn of(secret: &Secret) -> Self {
        let annotations = secret.metadata.annotations.as_ref();
        let says = |name| annotations.and_then(|all| all.get(name)).is_some_and(|value| value == "true");
        if says(CONNECT_ANNOTATION) {
            Self::Connected
        } else if says(ADMIT_ANNOTATION) {
            Self::Admitted
        } else {
            Self::Apart
        }
    }

    /// The annotations that say so. One that is not among them is not needed, and may be missing.
    pub fn annotations(self) -> BTreeMap<String, String> {
        let mut all =
            BTreeMap::from([(CONNECT_ANNOTATION.to_owned(), (self == Self::Connected).to_string())]);
        if self == Self::Admitted {
            all.insert(ADMIT_ANNOTATION.to_owned(), true.to_string());
        }
        all
    }
}

impl fmt::Display for Relation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Apart => "apart",
            Self::Admitted => "admitted",
            Self::Connected => "connected",
        })
    }
}

/// A peer as a Secret describes it: whatever is in here can be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerSecret {
    /// The peer's cluster name.
    pub cluster: ClusterName,
    /// Where its gateways are, in order of preference. Never empty if it is to be connected.
    pub endpoints: Vec<PeerEndpoint>,
    /// The authorities that vouch for it, and for nobody else.
    pub ca: CaBundle,
    /// The name that the gateways' certificate is verified under, if it is not
    /// [the usual one](names::default_server_name).
    pub server_name: Option<String>,
    /// Addresses of hosts that are not to be looked up.
    pub addresses: BTreeMap<String, Vec<IpAddr>>,
    /// Who to be towards it; none to be who we are towards every peer.
    pub identity: Option<PeerIdentity>,
    /// What is asked for.
    pub relation: Relation,
}

/// The client certificate that a peer issued, and its key. `Debug` shows neither.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The certificate and those between it and the authority, PEM.
    pub certificate: Arc<str>,
    /// The private key, PEM.
    pub key: Arc<str>,
}

impl fmt::Debug for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerIdentity").finish_non_exhaustive()
    }
}

impl PeerSecret {
    /// Reads a Secret.
    ///
    /// # Errors
    /// A [`PeerSecretError`] that names the key and what to do. The Secret itself is for the caller to name.
    pub fn parse(secret: &Secret) -> Result<Self, PeerSecretError> {
        let type_ = secret.type_.as_deref().unwrap_or("Opaque");
        if type_ != PEER_SECRET_TYPE {
            return Err(PeerSecretError::Type(brief(type_)));
        }
        let data = Data(secret.data.as_ref());
        let cluster = data.required(CLUSTER_NAME)?.parse::<ClusterName>();
        let cluster = cluster.map_err(|error| invalid(CLUSTER_NAME, error.to_string()))?;
        let ca = data.text(CA_BUNDLE, MAX_BUNDLE_BYTES)?.ok_or(PeerSecretError::Missing(CA_BUNDLE))?;
        let server_name = data.optional(SERVER_NAME)?.map(server_name).transpose();
        let relation = Relation::of(secret);
        let endpoints = endpoints(data.optional(ENDPOINTS)?.unwrap_or_default())?;
        if endpoints.is_empty() && relation == Relation::Connected {
            return Err(PeerSecretError::Missing(ENDPOINTS));
        }
        Ok(Self {
            endpoints,
            ca: CaBundle::parse(ca)?,
            server_name: server_name
                .map_err(|problem| invalid(SERVER_NAME, problem))?
                .filter(|name| *name != names::default_server_name(&cluster)),
            addresses: addresses(data.optional(ADDRESSES)?.unwrap_or_default())?,
            identity: identity(&data)?,
            relation,
            cluster,
        })
    }

    /// The name that the gateways' certificate is verified under.
    pub fn server_name(&self) -> String {
        self.server_name.clone().unwrap_or_else(|| names::default_server_name(&self.cluster))
    }

    /// The Secret that describes this peer, with the [conventional name](secret_name).
    pub fn to_secret(&self, namespace: &str) -> Secret {
        let lines = |lines: Vec<String>| lines.join("\n");
        let mut data =
            vec![(CLUSTER_NAME, self.cluster.to_string()), (CA_BUNDLE, self.ca.as_str().to_owned())];
        if !self.endpoints.is_empty() {
            data.push((ENDPOINTS, lines(self.endpoints.iter().map(ToString::to_string).collect())));
        }
        if let Some(name) = &self.server_name {
            data.push((SERVER_NAME, name.clone()));
        }
        if !self.addresses.is_empty() {
            let line = |(host, ips): (&String, &Vec<IpAddr>)| {
                format!("{host} {}", ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
            };
            data.push((ADDRESSES, lines(self.addresses.iter().map(line).collect())));
        }
        if let Some(identity) = &self.identity {
            data.push((CERTIFICATE, identity.certificate.to_string()));
            data.push((PRIVATE_KEY, identity.key.to_string()));
        }
        Secret {
            metadata: ObjectMeta {
                name: Some(secret_name(&self.cluster)),
                namespace: Some(namespace.to_owned()),
                labels: Some(BTreeMap::from([(names::PART_OF_LABEL.to_owned(), names::PART_OF.to_owned())])),
                annotations: Some(self.relation.annotations()),
                ..ObjectMeta::default()
            },
            type_: Some(PEER_SECRET_TYPE.to_owned()),
            data: Some(
                data.into_iter()
                    .map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes())))
                    .collect(),
            ),
            ..Secret::default()
        }
    }
}

/// The data of a Secret, read key by key.
struct Data<'a>(Option<&'a BTreeMap<String, ByteString>>);

impl<'a> Data<'a> {
    /// The text of a key as it is; none if it is missing or blank.
    fn text(&self, key: &'static str, max: usize) -> Result<Option<&'a str>, PeerSecretError> {
        let Some(ByteString(bytes)) = self.0.and_then(|data| data.get(key)) else { return Ok(None) };
        if bytes.len() > max {
            return Err(PeerSecretError::TooLong { key, length: bytes.len(), max });
        }
        let text = std::str::from_utf8(bytes).map_err(|_| PeerSecretError::NotText(key))?;
        Ok(Some(text).filter(|text| !text.trim().is_empty()))
    }

    fn optional(&self, key: &'static str) -> Result<Option<&'a str>, PeerSecretError> {
        Ok(self.text(key, MAX_TEXT_BYTES)?.map(str::trim))
    }

    fn required(&self, key: &'static str) -> Result<&'a str, PeerSecretError> {
        self.optional(key)?.ok_or(PeerSecretError::Missing(key))
    }
}

fn invalid(key: &'static str, problem: String) -> PeerSecretError {
    PeerSecretError::Invalid { key, problem }
}

fn endpoints(text: &str) -> Result<Vec<PeerEndpoint>, PeerSecretError> {
    let mut endpoints: Vec<PeerEndpoint> = Vec::new();
    for entry in text.split(['\n', ',']).map(str::trim).filter(|entry| !entry.is_empty()) {
        let endpoint = entry.parse().map_err(|problem| {
            invalid(ENDPOINTS, format!("has the entry {:?}, which {problem}", brief(entry)))
        })?;
        if endpoints.contains(&endpoint) {
            continue;
        }
        if endpoints.len() == MAX_ENDPOINTS {
            return Err(invalid(
                ENDPOINTS,
                format!("lists more than {MAX_ENDPOINTS}; keep the nearest ones"),
            ));
        }
        endpoints.push(endpoint);
    }
    Ok(endpoints)
}

fn addresses(text: &str) -> Result<BTreeMap<String, Vec<IpAddr>>, PeerSecretError> {
    let wrong = |line: &str, problem: &str| {
        invalid(ADDRESSES, format!("has the line {:?}, {problem}; write HOST IP[,IP...]", brief(line)))
    };
    let mut hosts: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let Some((host, list)) = line.split_once(char::is_whitespace) else {
            return Err(wrong(line, "which has no address"));
        };
        if !endpoint::is_host_name(host) {
            return Err(wrong(line, "whose host is not a DNS name"));
        }
        let ips = hosts.entry(host.to_ascii_lowercase()).or_default();
        for ip in list.split([',', ' ', '\t']).filter(|ip| !ip.is_empty()) {
            let ip = ip.parse().map_err(|_| wrong(line, "which has something else than an IP address"))?;
            if !ips.contains(&ip) {
                ips.push(ip);
            }
        }
        if ips.len() > MAX_ADDRESSES {
            return Err(wrong(line, "which gives a host more than 16 addresses"));
        }
        if hosts.len() > MAX_HOSTS {
            return Err(invalid(
                ADDRESSES,
                format!("has more than {MAX_HOSTS} hosts; name those in `endpoints`"),
            ));
        }
    }
    Ok(hosts)
}

/// A name that a certificate can be verified under.
pub(crate) fn server_name(text: &str) -> Result<String, String> {
    match ServerName::try_from(text) {
        Ok(_) if !text.contains('*') => Ok(text.to_owned()),
        _ => Err(format!("is {:?}, which is neither a DNS name nor an IP address", brief(text))),
    }
}

fn identity(data: &Data<'_>) -> Result<Option<PeerIdentity>, PeerSecretError> {
    let (certificate, key) =
        match (data.text(CERTIFICATE, MAX_BUNDLE_BYTES)?, data.text(PRIVATE_KEY, MAX_TEXT_BYTES)?) {
            (None, None) => return Ok(None),
            (Some(certificate), Some(key)) => (certificate, key),
            (Some(_), None) => {
                return Err(PeerSecretError::Unpaired { given: CERTIFICATE, missing: PRIVATE_KEY });
            }
            (None, Some(_)) => {
                return Err(PeerSecretError::Unpaired { given: PRIVATE_KEY, missing: CERTIFICATE });
            }
        };
    match CertificateDer::pem_slice_iter(certificate.as_bytes()).next() {
        Some(Ok(_)) => {}
        _ => return Err(invalid(CERTIFICATE, "holds no certificate; put PEM text there".to_owned())),
    }
    // What is in it is told to nobody.
    PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| {
        invalid(PRIVATE_KEY, "holds no private key; put PEM text there, not encrypted".to_owned())
    })?;
    Ok(Some(PeerIdentity { certificate: certificate.into(), key: key.into() }))
}

#[cfg(test)]
mod tests;
