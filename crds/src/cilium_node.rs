//! `CiliumNode`: what Cilium's agent knows about its node.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::ClusterResourceScope;
use serde::Deserialize;

use crate::resource::cilium_resource;

/// A node as Cilium's agent publishes it. Read only.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct CiliumNode {
    /// The name is the node's; labels and annotations travel to other clusters.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// Everything else.
    #[serde(default)]
    pub spec: CiliumNodeSpec,
}

cilium_resource!(CiliumNode, ClusterResourceScope, kind: "CiliumNode", plural: "ciliumnodes");

/// The part of `spec` that travels to other clusters.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct CiliumNodeSpec {
    /// Addresses, in the node's own order.
    pub addresses: Option<Vec<NodeAddress>>,
    /// UUID of the running kernel.
    pub bootid: String,
    /// Encryption of traffic to this node.
    pub encryption: crate::EncryptionSpec,
    /// Addresses of the node's health endpoint.
    pub health: HealthSpec,
    /// Addresses of the node's ingress listener.
    pub ingress: IngressSpec,
    /// Address management.
    pub ipam: IpamSpec,
}

/// One address of a node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `CiliumInternalIP`, ...
    #[serde(rename = "type")]
    pub type_: String,
    /// The address as text.
    pub ip: String,
}

/// Addresses of the node's health endpoint, empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct HealthSpec {
    /// IPv4 address as text.
    pub ipv4: String,
    /// IPv6 address as text.
    pub ipv6: String,
}

/// Addresses of the node's ingress listener, empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct IngressSpec {
    /// IPv4 address as text.
    pub ipv4: String,
    /// IPv6 address as text.
    pub ipv6: String,
}

/// Address management of the node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct IpamSpec {
    /// Ranges the node's pods get their addresses from: the first of each family is the primary one.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Option<Vec<String>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_written_by_cilium_is_read() {
        let node: CiliumNode = serde_json::from_value(serde_json::json!({
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNode",
            "metadata": {"name": "node-1"},
            "spec": {
                "addresses": [{"ip": "172.18.0.2", "type": "InternalIP"}],
                "bootid": "f1a0b8e4-1111-2222-3333-444455556666",
                "encryption": {"key": 255},
                "health": {"ipv4": "10.244.0.134"},
                "eni": {},
                "ipam": {"podCIDRs": ["10.244.0.0/24"], "pools": {}},
            },
            "status": {"ipam": {}},
        }))
        .expect("parse");
        assert_eq!(node.spec.addresses.as_deref().map(<[_]>::len), Some(1));
        assert_eq!(node.spec.encryption.key, 255);
        assert_eq!(node.spec.health.ipv4, "10.244.0.134");
        assert_eq!(node.spec.ipam.pod_cidrs, Some(vec!["10.244.0.0/24".to_owned()]));
    }
}
