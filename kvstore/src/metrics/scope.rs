//! Which part of the key space a key belongs to: the label `scope` of Cilium's metrics.

use isthmus_wire::Resource;
use isthmus_wire::key::{CLUSTER_CONFIGS, HEARTBEAT, SYNCED};
use isthmus_wire::local;

/// A part of the key space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// What clusters share, whether a cluster's own or mirrored.
    Shared(Resource),
    /// Services for the cluster's own agents.
    LocalServices,
    /// Network policies for the cluster's own agents.
    LocalPolicies,
    /// Namespaces for the cluster's own agents.
    LocalNamespaces,
    /// Which peers refuse the cluster, for its own agents.
    Refusing,
    /// The heartbeat.
    Heartbeat,
    /// Cluster configurations.
    ClusterConfigs,
    /// Canaries.
    Canaries,
    /// All keys there are, in one range.
    Everything,
    /// Keys of nobody's format.
    Other,
}

impl Scope {
    /// That of a key, or of all keys that begin so.
    pub fn of(key: &[u8]) -> Self {
        let begins = |prefix: &str| key.starts_with(prefix.as_bytes());
        if key.is_empty() {
            return Self::Everything;
        }
        if let Some(rest) = shared(key) {
            let resource = rest.split(|byte| *byte == b'/').next().unwrap_or_default();
            let named = |resource: &Resource| resource.as_str().as_bytes();
            return Resource::ALL
                .into_iter()
                .find(|known| named(known) == resource)
                .map_or(Self::Other, Self::Shared);
        }
        let others = [
            (local::SERVICES, Self::LocalServices),
            (local::POLICIES, Self::LocalPolicies),
            (local::NAMESPACES, Self::LocalNamespaces),
            (local::REFUSING, Self::Refusing),
            (HEARTBEAT, Self::Heartbeat),
            (CLUSTER_CONFIGS, Self::ClusterConfigs),
            (SYNCED, Self::Canaries),
        ];
        others.into_iter().find(|(prefix, _)| begins(prefix)).map_or(Self::Other, |(_, scope)| scope)
    }

    /// As in the label. Where Cilium has the same keys it is what Cilium calls them: the resource and its version, and for
    /// short keys their first twelve letters.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shared(Resource::Nodes) => "nodes/v1",
            Self::Shared(Resource::Identities) => "identities/v1",
            Self::Shared(Resource::Ip) => "ip/v1",
            Self::Shared(Resource::Services) => "services/v1",
            Self::Shared(Resource::EndpointSlices) => "endpointslices/v1",
            Self::Shared(Resource::ServiceExports) => "serviceexports/v1",
            Self::LocalServices => local::SERVICES,
            Self::LocalPolicies => local::POLICIES,
            Self::LocalNamespaces => local::NAMESPACES,
            Self::Refusing => local::REFUSING,
            Self::Heartbeat => "cilium/.hear",
            Self::ClusterConfigs => "cilium/clust",
            // Cilium's begins with the cluster's name.
            Self::Canaries => "cilium/synce",
            Self::Everything => "all",
            Self::Other => "other",
        }
    }
}

/// What follows the tree in a key that clusters share.
fn shared(key: &[u8]) -> Option<&[u8]> {
    key.strip_prefix(b"cilium/state/").or_else(|| key.strip_prefix(b"cilium/cache/"))
}

/// The cluster that a key names as the one that it is about; none for what a cluster says of itself, and for all clusters.
pub fn cluster_of(key: &[u8]) -> Option<&[u8]> {
    let element = |rest: &'static str, number: usize| {
        key.strip_prefix(rest.as_bytes())?.split(|byte| *byte == b'/').nth(number)
    };
    let cluster =
        element("cilium/cache/", 2).or_else(|| element(SYNCED, 0)).or_else(|| element(CLUSTER_CONFIGS, 0));
    cluster.filter(|cluster| !cluster.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_of_its_resource_wherever_it_is_kept() {
        for (key, scope, cluster) in [
            ("cilium/state/nodes/v1/alpha/n1", "nodes/v1", None),
            ("cilium/cache/nodes/v1/beta/n1", "nodes/v1", Some("beta")),
            ("cilium/state/identities/v1/id/65537", "identities/v1", None),
            ("cilium/cache/identities/v1/beta/id/131073", "identities/v1", Some("beta")),
            ("cilium/cache/ip/v1/beta/10.2.0.1", "ip/v1", Some("beta")),
            ("cilium/state/endpointslices/v1/alpha/", "endpointslices/v1", None),
            ("isthmus/services/v1/app/echo", "isthmus/services/v1", None),
            ("isthmus/refusing/v1/beta", "isthmus/refusing/v1", None),
            ("cilium/.heartbeat", "cilium/.hear", None),
            ("cilium/cluster-config/beta", "cilium/clust", Some("beta")),
            ("cilium/cluster-config/", "cilium/clust", None),
            ("cilium/synced/beta/cilium/cache/ip/v1", "cilium/synce", Some("beta")),
            ("cilium/state/surprises/v1/alpha/x", "other", None),
            ("\u{0}", "other", None),
            ("", "all", None),
        ] {
            assert_eq!(Scope::of(key.as_bytes()).as_str(), scope, "{key}");
            assert_eq!(cluster_of(key.as_bytes()), cluster.map(str::as_bytes), "{key}");
        }
    }
}
