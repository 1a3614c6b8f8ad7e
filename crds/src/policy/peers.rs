//! Elements of a policy's four lists, and the other side of a connection in them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Unknown;
use super::ports::{IcmpRule, PortRule};

macro_rules! ingress {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            /// Endpoints by their labels, of this cluster unless the label io.cilium.k8s.policy.cluster is mentioned, and in a
            /// namespaced policy of its namespace unless one is. An empty list is nobody.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub from_endpoints: Option<Vec<LabelSelector>>,
            /// Well-known groups.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub from_entities: Option<Vec<Entity>>,
            /// Prefixes, or addresses, outside of the clusters. They never match pods or nodes.
            #[serde(rename = "fromCIDR", default, skip_serializing_if = "Option::is_none")]
            pub from_cidr: Option<Vec<String>>,
            /// Prefixes with exceptions, outside of the clusters.
            #[serde(rename = "fromCIDRSet", default, skip_serializing_if = "Option::is_none")]
            pub from_cidr_set: Option<Vec<CidrRule>>,
            /// Destination ports. Without any, and without icmps, it is about all protocols.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub to_ports: Option<Vec<PortRule>>,
            /// Types of ICMP messages. They exclude toPorts.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub icmps: Option<Vec<IcmpRule>>,
            /// What this version does not know.
            #[serde(flatten)]
            pub unknown: Unknown,
        }
    };
}

macro_rules! egress {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            /// Endpoints by their labels, of this cluster unless the label io.cilium.k8s.policy.cluster is mentioned, and in a
            /// namespaced policy of its namespace unless one is. An empty list is nobody.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub to_endpoints: Option<Vec<LabelSelector>>,
            /// Well-known groups.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub to_entities: Option<Vec<Entity>>,
            /// Prefixes, or addresses, outside of the clusters. They never match pods or nodes.
            #[serde(rename = "toCIDR", default, skip_serializing_if = "Option::is_none")]
            pub to_cidr: Option<Vec<String>>,
            /// Prefixes with exceptions, outside of the clusters.
            #[serde(rename = "toCIDRSet", default, skip_serializing_if = "Option::is_none")]
            pub to_cidr_set: Option<Vec<CidrRule>>,
            /// The pods, or addresses, behind services of this cluster.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub to_services: Option<Vec<Service>>,
            /// Destination ports. Without any, and without icmps, it is about all protocols.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub to_ports: Option<Vec<PortRule>>,
            /// Types of ICMP messages. They exclude toPorts.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub icmps: Option<Vec<IcmpRule>>,
            /// What this version does not know.
            #[serde(flatten)]
            pub unknown: Unknown,
        }
    };
}

ingress!(
    /// What endpoints may receive: from these peers, on these ports. At most one list of peers may be there; without any it is
    /// everybody.
    IngressRule
);
ingress!(
    /// What endpoints may not receive: from these peers, on these ports. At most one list of peers may be there; without any it
    /// is everybody.
    IngressDenyRule
);
egress!(
    /// What endpoints may send: to these peers, on these ports. At most one list of peers may be there; without any it is
    /// everybody.
    EgressRule
);
egress!(
    /// What endpoints may not send: to these peers, on these ports. At most one list of peers may be there; without any it is
    /// everybody.
    EgressDenyRule
);

/// Matches labels; all of it must hold. A key may have a source in front: "k8s:app" is given by Kubernetes, "reserved:host" is of
/// a well-known group, "any:app" is the same as "app".
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LabelSelector {
    /// Labels and the values they must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub match_labels: Option<BTreeMap<String, LabelValue>>,
    /// Further requirements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub match_expressions: Option<Vec<LabelSelectorRequirement>>,
}

/// The value of a label.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct LabelValue(
    #[schemars(length(max = 63), regex(pattern = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"))]
    pub  String,
);

/// A requirement on a label.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LabelSelectorRequirement {
    /// The label's key.
    pub key: String,
    /// How key and values belong together.
    pub operator: LabelSelectorOperator,
    /// Values for In and NotIn; none for the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Vec<String>>,
}

/// How key and values of a requirement belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LabelSelectorOperator {
    /// The label has one of the values.
    In,
    /// The label is not there or has none of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
}

/// A well-known group of peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Entity {
    /// Everybody.
    All,
    /// Everything outside of the mesh.
    World,
    /// The same over IPv4.
    #[serde(rename = "world-ipv4")]
    WorldIpv4,
    /// The same over IPv6.
    #[serde(rename = "world-ipv6")]
    WorldIpv6,
    /// Every endpoint of this cluster, and the nodes of all clusters.
    Cluster,
    /// The endpoint's own node.
    Host,
    /// The other nodes, of all clusters.
    RemoteNode,
    /// The Kubernetes API.
    KubeApiserver,
    /// Health probes.
    Health,
    /// Nodes' ingress.
    Ingress,
    /// Endpoints without an identity yet.
    Init,
    /// Endpoints that nobody manages.
    Unmanaged,
    /// Nobody.
    None,
}

/// A prefix without some prefixes in it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CidrRule {
    /// The prefix, such as 10.0.0.0/8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cidr: Option<String>,
    /// What is left out, each within the prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub except: Option<Vec<String>>,
    /// What this version does not know.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Services, by name or by labels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// One by its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k8s_service: Option<ServiceByName>,
    /// Those whose labels match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k8s_service_selector: Option<ServiceByLabels>,
    /// What this version does not know.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A service by its name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceByName {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_name: Option<String>,
    /// Its namespace; that of the policy if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

/// Services by their labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ServiceByLabels {
    /// On the labels of the Service.
    pub selector: LabelSelector,
    /// Their namespace; that of the policy if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}
