//! `CiliumNetworkPolicy` and `CiliumClusterwideNetworkPolicy`: who may talk to whom.
//!
//! `kube`'s derive of custom resources insists on one `spec`; these have `spec`, or `specs`, or both. So the derive makes the
//! schema of a [`Rule`] from the types in this folder, and [`definition`] puts the resource around it.
//!
//! The types have what Isthmus enforces. What Cilium has beyond it (layer 7, DNS names, hosts, ...) and whatever a later version
//! adds is kept in `unknown`: the API server stores it, and a policy that has it says in its status that it is not enforced.

mod definition;
mod peers;
mod ports;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};
use kube::core::TypeMeta;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use definition::{clusterwide, namespaced};
pub use peers::{
    CidrRule, EgressDenyRule, EgressRule, Entity, IngressDenyRule, IngressRule, LabelSelector,
    LabelSelectorOperator, LabelSelectorRequirement, Service, ServiceByLabels, ServiceByName,
};
pub use ports::{IcmpFamily, IcmpField, IcmpRule, IcmpType, PortProtocol, PortRule, Protocol};

use crate::resource::cilium_resource;

/// Fields that these types do not have.
pub type Unknown = BTreeMap<String, Value>;

/// A policy about the endpoints of its namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CiliumNetworkPolicy {
    /// `apiVersion` and `kind`; absent on the items of some lists.
    #[serde(flatten, default)]
    pub types: Option<TypeMeta>,
    /// Name and namespace.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<Rule>,
    /// What it says, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub specs: Option<Vec<Rule>>,
    /// What became of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<PolicyStatus>,
}

cilium_resource!(
    CiliumNetworkPolicy,
    NamespaceResourceScope,
    kind: "CiliumNetworkPolicy",
    plural: "ciliumnetworkpolicies"
);

/// A policy about the endpoints of all namespaces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CiliumClusterwideNetworkPolicy {
    /// `apiVersion` and `kind`; absent on the items of some lists.
    #[serde(flatten, default)]
    pub types: Option<TypeMeta>,
    /// Its name.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<Rule>,
    /// What it says, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub specs: Option<Vec<Rule>>,
    /// What became of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<PolicyStatus>,
}

cilium_resource!(
    CiliumClusterwideNetworkPolicy,
    ClusterResourceScope,
    kind: "CiliumClusterwideNetworkPolicy",
    plural: "ciliumclusterwidenetworkpolicies"
);

/// Selects endpoints, and says what they may receive and send.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    /// The endpoints that this is about: those whose labels match. In a namespaced policy only those of its namespace. An empty
    /// selector matches all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint_selector: Option<LabelSelector>,
    /// The nodes that this is about. Not supported yet: nodes' own traffic is not filtered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// What the endpoints may receive. Once there is an element, everything else is denied, unless enableDefaultDeny says
    /// otherwise. An empty element allows nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Vec<IngressRule>>,
    /// What the endpoints may not receive, whatever is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress_deny: Option<Vec<IngressDenyRule>>,
    /// What the endpoints may send. Once there is an element, everything else is denied, unless enableDefaultDeny says
    /// otherwise. An empty element allows nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<EgressRule>>,
    /// What the endpoints may not send, whatever is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_deny: Option<Vec<EgressDenyRule>>,
    /// Whether what is not allowed is denied. If another policy says so, it is denied all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enable_default_deny: Option<DefaultDeny>,
    /// Free text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// What this version does not know.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Whether what is not allowed is denied; by default in each direction that has rules.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DefaultDeny {
    /// What the endpoints receive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<bool>,
    /// What the endpoints send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<bool>,
}

/// What became of a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyStatus {
    /// `Valid` is true if all of it is enforced as written; otherwise it names what is not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// What others write.
    #[serde(flatten)]
    pub unknown: Unknown,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_policy_is_written_back_as_it_was_read_with_what_these_types_do_not_know() {
        let written = json!({
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": {"namespace": "shop", "name": "cart"},
            "spec": {
                "endpointSelector": {"matchLabels": {"app": "cart"}},
                "ingress": [{
                    "fromEntities": ["kube-apiserver", "world-ipv6"],
                    "toPorts": [{"ports": [{"port": "80", "endPort": 90, "protocol": "TCP"}], "rules": {"http": [{}]}}],
                }],
                "egress": [
                    {"toFQDNs": [{"matchName": "example.org"}]},
                    {"toCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}]},
                    {"icmps": [{"fields": [{"family": "IPv6", "type": 128}, {"type": "EchoReply"}]}]},
                ],
                "enableDefaultDeny": {"egress": false},
                "labels": [{"key": "team", "value": "shop"}],
            },
            "status": {"conditions": [], "derivativePolicies": {}},
        });
        let policy: CiliumNetworkPolicy = serde_json::from_value(written.clone()).expect("a policy");
        let rule = policy.spec.as_ref().expect("a spec");
        assert!(rule.egress.as_ref().expect("egress")[0].unknown.contains_key("toFQDNs"));
        assert!(rule.unknown.contains_key("labels"));
        let mut expected = written;
        expected["status"].as_object_mut().expect("status").remove("conditions");
        assert_eq!(serde_json::to_value(&policy).expect("JSON"), expected);
    }
}
