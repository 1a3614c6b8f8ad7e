//! The other side of a connection, as a policy describes it.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::labels::Selector;

/// Whom a clause is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Everybody, known or not: the clause does not restrict it, or the entity `all` is among them.
    All,
    /// Whoever one of these describes; nobody if there is none.
    OneOf(Vec<Peer>),
}

/// A description of peers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Identities by their labels.
    Labels(Arc<Selector>),
    /// Addresses outside of the mesh.
    Cidr(CidrSelector),
    /// A well-known group.
    Entity(Entity),
    /// The backends of services.
    Service(ServiceRef),
}

/// Addresses of a prefix without those of some prefixes in it. Selects what has no identity of its own in the mesh: pods and
/// nodes are never selected by their addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CidrSelector {
    /// The prefix, without host bits.
    pub net: IpNet,
    /// What is left out, ordered, each within `net`.
    pub except: Vec<IpNet>,
}

impl CidrSelector {
    /// Whether all of `net` is meant. Right for prefixes that do not lie across a border of this selector.
    pub fn contains(&self, net: &IpNet) -> bool {
        self.net.contains(net) && !self.except.iter().any(|except| except.contains(net))
    }
}

/// Services of the own cluster, for `toServices`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ServiceRef {
    /// By its name.
    Named {
        /// Its namespace; none for any.
        namespace: Option<Arc<str>>,
        /// Its name.
        name: Arc<str>,
    },
    /// All whose labels match, of one namespace or (none) of all.
    Labelled {
        /// The namespace.
        namespace: Option<Arc<str>>,
        /// On the Service's own labels.
        selector: Arc<Selector>,
    },
}

impl ServiceRef {
    /// Whether it means this service.
    pub fn matches(&self, namespace: &str, name: &str, labels: &BTreeMap<String, String>) -> bool {
        let (Self::Named { namespace: wanted, .. } | Self::Labelled { namespace: wanted, .. }) = self;
        wanted.as_deref().is_none_or(|wanted| wanted == namespace)
            && match self {
                Self::Named { name: called, .. } => **called == *name,
                Self::Labelled { selector, .. } => selector.matches_plain(labels),
            }
    }
}

/// A well-known group of peers.
///
/// See <https://docs.cilium.io/en/stable/security/policy/language/#entities-based>.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entity {
    /// Everybody.
    All,
    /// Everything outside of the mesh.
    World,
    /// The same, over IPv4.
    WorldIpv4,
    /// The same, over IPv6.
    WorldIpv6,
    /// Every endpoint of the own cluster, and the nodes of all clusters.
    Cluster,
    /// The node the endpoint runs on.
    Host,
    /// Every other node, of all clusters.
    RemoteNode,
    /// The Kubernetes API.
    KubeApiserver,
    /// Health probes.
    Health,
    /// The ingress of a node.
    Ingress,
    /// Endpoints without an identity yet.
    Init,
    /// Endpoints that nobody manages.
    Unmanaged,
    /// Nobody.
    None,
}

impl Entity {
    /// Every entity.
    pub const ALL: [Self; 13] = [
        Self::All,
        Self::World,
        Self::WorldIpv4,
        Self::WorldIpv6,
        Self::Cluster,
        Self::Host,
        Self::RemoteNode,
        Self::KubeApiserver,
        Self::Health,
        Self::Ingress,
        Self::Init,
        Self::Unmanaged,
        Self::None,
    ];

    /// As policies spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::World => "world",
            Self::WorldIpv4 => "world-ipv4",
            Self::WorldIpv6 => "world-ipv6",
            Self::Cluster => "cluster",
            Self::Host => "host",
            Self::RemoteNode => "remote-node",
            Self::KubeApiserver => "kube-apiserver",
            Self::Health => "health",
            Self::Ingress => "ingress",
            Self::Init => "init",
            Self::Unmanaged => "unmanaged",
            Self::None => "none",
        }
    }
}

impl fmt::Display for Entity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Entity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|entity| entity.as_str() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::as_str).join(", ");
            format!("{:?} is not one of {known}", text.chars().take(64).collect::<String>())
        })
    }
}
