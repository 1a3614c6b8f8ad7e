//! `CiliumEndpoint`: a pod's addresses and identity, as Cilium's agent publishes them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::NamespaceResourceScope;
use serde::Deserialize;

use crate::resource::cilium_resource;

/// A pod's endpoint. Read only. Namespace and name are the pod's.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct CiliumEndpoint {
    /// Namespace and name are the pod's.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// There is no `spec`. Empty until the agent has set the endpoint up.
    #[serde(default)]
    pub status: CiliumEndpointStatus,
}

cilium_resource!(CiliumEndpoint, NamespaceResourceScope, kind: "CiliumEndpoint", plural: "ciliumendpoints");

/// The part of `status` that travels to other clusters.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct CiliumEndpointStatus {
    /// Absent until allocated.
    pub identity: Option<EndpointIdentity>,
    /// Absent until the pod has addresses.
    pub networking: Option<EndpointNetworking>,
    /// Encryption of traffic to the endpoint.
    pub encryption: EncryptionSpec,
    /// Name of the pod's service account, empty if unknown (before Cilium 1.17).
    #[serde(rename = "service-account")]
    pub service_account: String,
    /// The pod's ports that have names.
    #[serde(rename = "named-ports")]
    pub named_ports: Option<Vec<EndpointPort>>,
}

/// A port with a name.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct EndpointPort {
    /// The name.
    pub name: String,
    /// The number.
    pub port: i32,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
}

/// The endpoint's security identity.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct EndpointIdentity {
    /// The numeric identity.
    pub id: i64,
}

/// Where the endpoint is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct EndpointNetworking {
    /// The pod's addresses.
    pub addressing: Option<Vec<AddressPair>>,
    /// The address under which other nodes reach the endpoint's node.
    pub node: String,
}

/// Up to one address of each family, as text, empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct AddressPair {
    /// IPv4 address.
    pub ipv4: String,
    /// IPv6 address.
    pub ipv6: String,
}

/// Encryption of traffic to a node or endpoint.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct EncryptionSpec {
    /// 0: none; 1 to 15: IPsec key; 255: WireGuard.
    pub key: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_written_by_cilium_is_read() {
        let endpoint: CiliumEndpoint = serde_json::from_value(serde_json::json!({
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumEndpoint",
            "metadata": {"name": "echo-1", "namespace": "app"},
            "status": {
                "encryption": {},
                "id": 1234,
                "identity": {"id": 196915, "labels": ["k8s:app=echo"]},
                "networking": {"addressing": [{"ipv4": "10.244.0.77"}], "node": "172.18.0.2"},
                "service-account": "default",
                "state": "ready",
            },
        }))
        .expect("parse");
        assert_eq!(endpoint.status.identity, Some(EndpointIdentity { id: 196_915 }));
        assert_eq!(endpoint.status.service_account, "default");
        assert_eq!(endpoint.status.encryption.key, 0);
    }

    #[test]
    fn an_endpoint_that_is_not_set_up_yet_is_read() {
        let endpoint: CiliumEndpoint =
            serde_json::from_value(serde_json::json!({"metadata": {"name": "echo-1", "namespace": "app"}}))
                .expect("parse");
        assert_eq!(endpoint.status, CiliumEndpointStatus::default());
    }
}
