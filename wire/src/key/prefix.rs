//! Prefixes of the synchronised resources, and the canaries that stand for them.

use std::fmt;

use crate::ClusterName;

/// What is synchronised between clusters, each under a prefix of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// Nodes: addresses, pod ranges, keys.
    Nodes,
    /// Security identities: number to labels.
    Identities,
    /// Pod addresses: address to identity and host.
    Ip,
    /// Global services in their older form: one object each.
    Services,
    /// Backends of global services in their newer form (Cilium 1.20).
    EndpointSlices,
    /// Services exported through the Multi-Cluster Services API.
    ServiceExports,
}

impl Resource {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Nodes, Self::Identities, Self::Ip, Self::Services, Self::EndpointSlices, Self::ServiceExports];

    /// As in keys.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nodes => "nodes",
            Self::Identities => "identities",
            Self::Ip => "ip",
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::ServiceExports => "serviceexports",
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|resource| resource.as_str() == text)
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Where in the key space something lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tree {
    /// `cilium/state/`: what a cluster exports of itself.
    State,
    /// `cilium/cache/`: what a relay mirrors of a peer.
    Cache,
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::State => "state",
            Self::Cache => "cache",
        })
    }
}

/// What a sync canary stands for. Displays without a trailing slash: `cilium/state/nodes/v1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Prefix {
    /// `cilium/state/<resource>/v1`
    State(Resource),
    /// `cilium/cache/<resource>/v1`
    Cache(Resource),
    /// `isthmus/services/v1`: Services for the cluster's own agents.
    LocalServices,
    /// `isthmus/policies/v1`: network policies for the cluster's own agents.
    LocalPolicies,
    /// `isthmus/namespaces/v1`: namespaces for the cluster's own agents.
    LocalNamespaces,
}

impl Prefix {
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            crate::local::SERVICES => return Some(Self::LocalServices),
            crate::local::POLICIES => return Some(Self::LocalPolicies),
            crate::local::NAMESPACES => return Some(Self::LocalNamespaces),
            _ => {}
        }
        let (tree, rest) = text.strip_prefix("cilium/")?.split_once('/')?;
        let resource = Resource::parse(rest.strip_suffix("/v1")?)?;
        match tree {
            "state" => Some(Self::State(resource)),
            "cache" => Some(Self::Cache(resource)),
            _ => None,
        }
    }

    /// The prefix to list and watch for the data of `cluster`, with its trailing slash, so that no other cluster's name
    /// that starts alike is caught: `cilium/state/identities/v1/id/`, `cilium/cache/ip/v1/beta/`.
    pub fn range(self, cluster: &ClusterName) -> String {
        match self {
            Self::State(Resource::Identities) => "cilium/state/identities/v1/id/".to_owned(),
            Self::State(Resource::Ip) => "cilium/state/ip/v1/default/".to_owned(),
            Self::Cache(Resource::Identities) => format!("cilium/cache/identities/v1/{cluster}/id/"),
            Self::State(_) | Self::Cache(_) => format!("{self}/{cluster}/"),
            Self::LocalServices | Self::LocalPolicies | Self::LocalNamespaces => format!("{self}/"),
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State(resource) => write!(f, "cilium/state/{resource}/v1"),
            Self::Cache(resource) => write!(f, "cilium/cache/{resource}/v1"),
            Self::LocalServices => f.write_str(crate::local::SERVICES),
            Self::LocalPolicies => f.write_str(crate::local::POLICIES),
            Self::LocalNamespaces => f.write_str(crate::local::NAMESPACES),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_in_a_slash_and_name_the_cluster_where_the_format_does() {
        let beta: ClusterName = "beta".parse().expect("valid");
        for (prefix, range) in [
            (Prefix::State(Resource::Nodes), "cilium/state/nodes/v1/beta/"),
            (Prefix::Cache(Resource::Nodes), "cilium/cache/nodes/v1/beta/"),
            (Prefix::State(Resource::Identities), "cilium/state/identities/v1/id/"),
            (Prefix::Cache(Resource::Identities), "cilium/cache/identities/v1/beta/id/"),
            (Prefix::State(Resource::Ip), "cilium/state/ip/v1/default/"),
            (Prefix::Cache(Resource::Ip), "cilium/cache/ip/v1/beta/"),
            (Prefix::LocalServices, "isthmus/services/v1/"),
            (Prefix::LocalPolicies, "isthmus/policies/v1/"),
            (Prefix::LocalNamespaces, "isthmus/namespaces/v1/"),
        ] {
            assert_eq!(prefix.range(&beta), range);
            assert_eq!(Prefix::parse(&prefix.to_string()), Some(prefix));
        }
    }
}
