//! What the engine is told.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use isthmus_wire::ClusterName;
use serde::Serialize;

use crate::model::Transport;

/// How the engine understands policies.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the own cluster.
    pub cluster: ClusterName,
    /// Which endpoints' traffic is restricted at all.
    pub enforcement: Enforcement,
    /// Peers that a policy selects by labels without saying of which cluster are those of the own cluster; otherwise of all.
    pub policy_default_local_cluster: bool,
}

impl Settings {
    /// The defaults of both Cilium and Isthmus.
    pub fn new(cluster: ClusterName) -> Self {
        Self { cluster, enforcement: Enforcement::Default, policy_default_local_cluster: true }
    }
}

/// Which endpoints' traffic is restricted.
///
/// See <https://docs.cilium.io/en/stable/security/policy/intro/#policy-enforcement-modes>.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Enforcement {
    /// Of those that a policy selects, in the directions that it is about.
    #[default]
    Default,
    /// Of all, in both directions.
    Always,
    /// Of none, whatever policies there are.
    Never,
}

impl fmt::Display for Enforcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Default => "default",
            Self::Always => "always",
            Self::Never => "never",
        })
    }
}

impl FromStr for Enforcement {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "default" => Ok(Self::Default),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            other => Err(format!("{other:?} is not one of default, always, never")),
        }
    }
}

/// Which endpoint of this node; whatever number the caller gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct EndpointId(pub u64);

/// An endpoint of this node, as its Pod object describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject {
    /// Its namespace. While the namespace's labels are not known, it has none of them.
    pub namespace: Arc<str>,
    /// The pod's own labels, as they are; those that do not count are left out by the engine.
    pub labels: BTreeMap<String, String>,
    /// Its service account; empty if it has none.
    pub service_account: Arc<str>,
    /// The ports of its containers that have names.
    pub named_ports: NamedPorts,
}

/// Ports with names. The same name may stand for several ports, of different protocols or of different pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPorts(BTreeSet<NamedPort>);

/// A port with a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    /// The name, in lower case.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Transport,
    /// Its number, not 0.
    pub port: u16,
}

impl NamedPorts {
    /// No ports.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a port; one without name or number has no effect.
    pub fn insert(&mut self, name: &str, protocol: Transport, port: u16) {
        if !name.is_empty() && port != 0 {
            self.0.insert(NamedPort { name: name.to_ascii_lowercase().into(), protocol, port });
        }
    }

    /// All of them, ordered.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &NamedPort> {
        self.0.iter()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ports of that name, of one protocol or of any.
    pub fn called<'a>(
        &'a self,
        name: &'a str,
        protocol: Option<Transport>,
    ) -> impl Iterator<Item = (Transport, u16)> + 'a {
        self.0
            .iter()
            .filter(move |port| {
                *port.name == *name && protocol.is_none_or(|protocol| protocol == port.protocol)
            })
            .map(|port| (port.protocol, port.port))
    }
}

/// Namespace and name of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl ServiceName {
    /// The service `namespace`/`name`.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A Service of the own cluster, as far as policies can be about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Its own labels.
    pub labels: BTreeMap<String, String>,
    /// The pods behind it; empty for a service without selector.
    pub selector: BTreeMap<String, String>,
    /// Addresses behind it. They count only where there is no selector.
    pub backends: BTreeSet<IpAddr>,
}
