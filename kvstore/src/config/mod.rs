//! The client configuration of a peer's store: etcd's own client YAML, one file per peer (wire format, section A.8).
//!
//! ```yaml
//! endpoints:
//! - https://cluster2.mesh.cilium.io:2379
//! trusted-ca-file: /var/lib/cilium/clustermesh/common-etcd-client-ca.crt
//! key-file: /var/lib/cilium/clustermesh/common-etcd-client.key
//! cert-file: /var/lib/cilium/clustermesh/common-etcd-client.crt
//! cilium-host-aliases:
//! - hostname: cluster2.mesh.cilium.io
//!   ips: [192.0.2.10]
//! ```
//!
//! The last field is not etcd's: from 1.20 on Cilium's chart writes a peer's addresses there, before that into the hosts
//! file of its pods. Fields that are unknown here are ignored, as Go's etcd client ignores them. The certificate files are
//! only named: they are read when a connection is made, so that a renewed certificate needs no restart.

mod identity;

use std::{
    collections::BTreeMap,
    fmt,
    io::Read as _,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use http::Uri;
use serde::Deserialize;

pub(crate) use self::identity::Renewal;
pub(crate) use self::identity::certified_key;
pub use self::identity::{Identity, IdentityError, IdentityFiles, LiveIdentity};
pub use crate::pem::{MAX_PEM_BYTES, Pem, PemError};

/// The largest configuration file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 64 * 1024;
/// The most endpoints that one configuration may list.
pub const MAX_ENDPOINTS: usize = 64;
/// The longest endpoint, in bytes.
const MAX_ENDPOINT_BYTES: usize = 512;
/// The port of an endpoint that names none: etcd's client port.
const DEFAULT_PORT: u16 = 2379;

/// How to reach an etcd v3 store and whom to be towards it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientConfig {
    /// Where the store listens, in order of preference. Never empty.
    pub endpoints: Vec<Endpoint>,
    /// The authorities that the server's certificate must come from. Present if any endpoint is `https`.
    pub trusted_ca: Option<Pem>,
    /// The client's certificate and key. etcd takes the certificate's common name for the user's name.
    pub identity: Option<Identity>,
    /// User and password, where etcd's authentication is not by certificate.
    pub password: Option<PasswordUser>,
    /// The name that the server's certificate must be valid for, if it is not the endpoint's host.
    pub server_name: Option<String>,
    /// Addresses of hosts that are not to be looked up, by the host as the endpoint has it, in lower case.
    pub addresses: BTreeMap<String, Vec<IpAddr>>,
}

/// An etcd user with a password.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordUser {
    /// The user's name.
    pub name: String,
    /// The user's password. Never shown by `Debug`.
    pub password: String,
}

impl fmt::Debug for PasswordUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PasswordUser").field("name", &self.name).finish_non_exhaustive()
    }
}

/// One address of a store.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Whether the connection is encrypted (`https`) or plain text (`http`).
    pub tls: bool,
    /// A DNS name or an address; IPv6 without brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
}

impl Endpoint {
    /// `host:port`, IPv6 in brackets.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.authority())
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_ENDPOINT_BYTES {
            return Err(format!("is {} bytes long, the most is {MAX_ENDPOINT_BYTES}", text.len()));
        }
        let uri: Uri = text.parse().map_err(|error| format!("{error}; write https://HOST:PORT"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            Some(other) => {
                return Err(format!("the scheme {other:?} is not supported; write https://HOST:PORT"));
            }
            None => return Err("has no scheme; write https://HOST:PORT".into()),
        };
        if uri.path() != "/" || uri.query().is_some() {
            return Err("has a path; write https://HOST:PORT alone".into());
        }
        let authority = uri.authority().ok_or("has no host; write https://HOST:PORT")?;
        if authority.as_str().contains('@') {
            return Err("carries a user name; use the fields `username` and `password`".into());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err("has no host; write https://HOST:PORT".into());
        }
        let port = match authority.port() {
            Some(port) => port
                .as_str()
                .parse()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| format!("the port {:?} is not a number from 1 to 65535", port.as_str()))?,
            None if authority.as_str().ends_with(':') => return Err("the port is empty".into()),
            None => DEFAULT_PORT,
        };
        Ok(Self { tls, host: host.to_owned(), port })
    }
}

/// Why a client configuration cannot be used. The message names the field and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is missing or unreadable.
    #[error("cannot read the client configuration {path}: {source}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is longer than [`MAX_FILE_BYTES`].
    #[error("the client configuration is longer than {MAX_FILE_BYTES} bytes; it should hold a few lines")]
    TooLong,
    /// Not YAML, or a field of the wrong type.
    #[error("the client configuration is not valid YAML: {0}")]
    Syntax(#[from] serde_norway::Error),
    /// A field is missing, or two fields do not go together.
    #[error("the client configuration: {0}")]
    Field(&'static str),
    /// An entry of `endpoints` cannot be used.
    #[error("the client configuration: endpoints[{index}] ({endpoint:?}) {reason}")]
    Endpoint {
        /// Its place in the list, from 0.
        index: usize,
        /// The entry, shortened if it is long.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Any of the above, in a file.
    #[error("{path}: {source}", path = path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<ConfigError>,
    },
}

impl ClientConfig {
    /// Reads the file at `path`, of which at most [`MAX_FILE_BYTES`] are looked at.
    ///
    /// # Errors
    /// As [`ClientConfig::parse`], and when the file cannot be read. The error names the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
        let mut text = String::new();
        std::fs::File::open(path)
            .map_err(unreadable)?
            .take(MAX_FILE_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(unreadable)?;
        Self::parse(&text)
            .map_err(|source| ConfigError::InFile { path: path.to_owned(), source: Box::new(source) })
    }

    /// Parses the text of a configuration file.
    ///
    /// # Errors
    /// When the text is too long or not YAML, `endpoints` is missing or holds an unusable entry, an endpoint is `https`
    /// and `trusted-ca-file` is missing, only one of `cert-file` and `key-file` is given, or the server's certificate
    /// is not to be verified.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(ConfigError::TooLong);
        }
        let file: File = serde_norway::from_str(text)?;
        if file.endpoints.is_empty() {
            return Err(ConfigError::Field(
                "`endpoints` is missing or empty; list at least one https://HOST:PORT",
            ));
        }
        if file.endpoints.len() > MAX_ENDPOINTS {
            return Err(ConfigError::Field("`endpoints` lists more than 64 entries"));
        }
        let endpoints = file
            .endpoints
            .iter()
            .enumerate()
            .map(|(index, text)| {
                // etcd's client takes HOST:PORT for TLS where certificates are configured.
                let with_scheme = if text.contains("://") {
                    text.clone()
                } else if file.insecure_transport {
                    format!("http://{text}")
                } else {
                    format!("https://{text}")
                };
                with_scheme.parse().map_err(|reason| ConfigError::Endpoint {
                    index,
                    endpoint: text.chars().take(80).collect(),
                    reason,
                })
            })
            .collect::<Result<Vec<Endpoint>, _>>()?;
        if file.insecure_skip_tls_verify {
            return Err(ConfigError::Field(
                "`insecure-skip-tls-verify` is not supported: anybody could pose as this store; \
                 name the server's authority in `trusted-ca-file`",
            ));
        }
        if file.trusted_ca_file.is_none() && endpoints.iter().any(|endpoint| endpoint.tls) {
            return Err(ConfigError::Field("`trusted-ca-file` is missing; an https endpoint needs it"));
        }
        let identity = match (file.cert_file, file.key_file) {
            (Some(cert_file), Some(key_file)) => Some(Identity::Files(IdentityFiles { cert_file, key_file })),
            (None, None) => None,
            (Some(_), None) => return Err(ConfigError::Field("`cert-file` is given without `key-file`")),
            (None, Some(_)) => return Err(ConfigError::Field("`key-file` is given without `cert-file`")),
        };
        let password = match (file.username, file.password) {
            (Some(name), Some(password)) => Some(PasswordUser { name, password }),
            (None, None) => None,
            _ => {
                return Err(ConfigError::Field(
                    "`username` and `password` go together; one of them is missing",
                ));
            }
        };
        Ok(Self {
            endpoints,
            trusted_ca: file.trusted_ca_file.map(Pem::File),
            identity,
            password,
            server_name: None,
            addresses: addresses(file.host_aliases.unwrap_or_default())?,
        })
    }
}

/// The file as it is written; unknown fields are left alone.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    endpoints: Vec<String>,
    #[serde(default, deserialize_with = "unless_empty")]
    trusted_ca_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "unless_empty")]
    cert_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "unless_empty")]
    key_file: Option<PathBuf>,
    #[serde(default)]
    insecure_transport: bool,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default, rename = "cilium-host-aliases")]
    host_aliases: Option<Vec<HostAlias>>,
}

/// A name that is not to be looked up.
#[derive(Deserialize)]
struct HostAlias {
    hostname: String,
    ips: Vec<IpAddr>,
}

/// The addresses by name. What is refused is what Cilium's own reader refuses.
fn addresses(aliases: Vec<HostAlias>) -> Result<BTreeMap<String, Vec<IpAddr>>, ConfigError> {
    let mut addresses = BTreeMap::new();
    for HostAlias { hostname, ips } in aliases {
        if hostname.is_empty() || ips.is_empty() {
            return Err(ConfigError::Field(
                "an entry of `cilium-host-aliases` has no hostname or no ips; give both, or leave it out",
            ));
        }
        if addresses.insert(hostname.to_ascii_lowercase(), ips).is_some() {
            return Err(ConfigError::Field(
                "`cilium-host-aliases` has two entries for one hostname; put all of its ips in one",
            ));
        }
    }
    Ok(addresses)
}

/// Go reads an empty string as "not given".
fn unless_empty<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    Ok(Option::<PathBuf>::deserialize(deserializer)?.filter(|path| !path.as_os_str().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: &str = "\
endpoints:
- https://cluster2.mesh.cilium.io:2379
trusted-ca-file: /var/lib/cilium/clustermesh/common-etcd-client-ca.crt
key-file: /var/lib/cilium/clustermesh/common-etcd-client.key
cert-file: /var/lib/cilium/clustermesh/common-etcd-client.crt
";

    fn error(text: &str) -> String {
        ClientConfig::parse(text).expect_err("must be refused").to_string()
    }

    #[test]
    fn the_file_that_cilium_writes_is_understood() {
        let config = ClientConfig::parse(PEER).unwrap();
        assert_eq!(config.endpoints[0].to_string(), "https://cluster2.mesh.cilium.io:2379");
        let directory = Path::new("/var/lib/cilium/clustermesh");
        assert_eq!(
            config.identity,
            Some(Identity::Files(IdentityFiles {
                cert_file: directory.join("common-etcd-client.crt"),
                key_file: directory.join("common-etcd-client.key"),
            }))
        );
        assert_eq!(config.trusted_ca, Some(Pem::File(directory.join("common-etcd-client-ca.crt"))));
        assert!(config.addresses.is_empty());
    }

    #[test]
    fn addresses_that_cilium_writes_into_the_file_are_used_instead_of_dns() {
        let aliases = "\
cilium-host-aliases:
- hostname: Cluster2.mesh.cilium.io
  ips: [192.0.2.10, \"2001:db8::1\"]
";
        let wanted = ["192.0.2.10", "2001:db8::1"].map(|ip| ip.parse().unwrap()).to_vec();
        let config = ClientConfig::parse(&format!("{PEER}{aliases}")).unwrap();
        assert_eq!(config.addresses, BTreeMap::from([(config.endpoints[0].host.clone(), wanted)]));
        assert!(ClientConfig::parse(&format!("{PEER}cilium-host-aliases:\n")).unwrap().addresses.is_empty());
        for bad in
            ["- {hostname: a, ips: []}", "- {hostname: '', ips: [192.0.2.1]}", "- {hostname: a, ips: [b]}"]
        {
            let text = error(&format!("{PEER}cilium-host-aliases:\n{bad}\n"));
            assert!(text.contains("cilium-host-aliases") || text.contains("IP address"), "{text}");
        }
        let one = "- {hostname: a, ips: [192.0.2.1]}\n";
        assert!(error(&format!("{PEER}cilium-host-aliases:\n{one}{one}")).contains("two entries"));
    }

    #[test]
    fn unknown_fields_are_ignored_as_etcd_ignores_them() {
        let config = ClientConfig::parse(&format!("{PEER}dial-timeout: 5s\nfuture: {{a: [1]}}\n")).unwrap();
        assert_eq!(config.endpoints.len(), 1);
    }

    #[test]
    fn addresses_of_both_families_and_the_usual_port_are_taken() {
        let parse = |text: &str| text.parse::<Endpoint>().unwrap();
        assert_eq!(parse("https://[fd00::1]:2380").authority(), "[fd00::1]:2380");
        assert_eq!(parse("https://10.0.0.1").authority(), "10.0.0.1:2379");
        assert!(!parse("http://127.0.0.1:1").tls);
    }

    #[test]
    fn an_endpoint_without_a_scheme_is_encrypted_unless_told_otherwise() {
        let text = "endpoints: ['127.0.0.1:2379']\ntrusted-ca-file: ca\n";
        assert!(ClientConfig::parse(text).unwrap().endpoints[0].tls);
        let text = "endpoints: ['127.0.0.1:2379']\ninsecure-transport: true\n";
        assert!(!ClientConfig::parse(text).unwrap().endpoints[0].tls);
    }

    #[test]
    fn every_error_names_the_field_and_the_way_out() {
        assert!(error("{}").contains("`endpoints` is missing"));
        assert!(error("endpoints: [unix:///tmp/x]").contains("endpoints[0]"));
        assert!(error("endpoints: ['http://a:0']").contains("1 to 65535"));
        assert!(error("endpoints: ['http://a/b']").contains("has a path"));
        assert!(error("endpoints: ['https://a']").contains("`trusted-ca-file` is missing"));
        assert!(error("endpoints: ['http://a']\ncert-file: x").contains("without `key-file`"));
        assert!(error("endpoints: ['http://a']\nkey-file: x").contains("without `cert-file`"));
        assert!(error("endpoints: ['http://a']\nusername: x").contains("`password`"));
        assert!(error(&format!("{PEER}insecure-skip-tls-verify: true\n")).contains("`trusted-ca-file`"));
        assert!(error("endpoints: 3").contains("not valid YAML"));
        assert!(error(&" ".repeat(70_000)).contains("longer than"));
        assert!(error(&format!("endpoints: [{}]", "'http://a',".repeat(65))).contains("more than 64"));
    }

    #[test]
    fn an_error_in_a_file_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("beta");
        std::fs::write(&path, "endpoints: []").unwrap();
        let error = ClientConfig::load(&path).unwrap_err().to_string();
        assert!(error.contains("beta") && error.contains("`endpoints`"), "{error}");
        assert!(ClientConfig::load(&directory.path().join("gone")).unwrap_err().to_string().contains("gone"));
    }

    #[test]
    fn a_password_is_not_printed() {
        let config = ClientConfig::parse("endpoints: ['http://a']\nusername: u\npassword: secret").unwrap();
        assert!(!format!("{config:?}").contains("secret"));
    }
}
