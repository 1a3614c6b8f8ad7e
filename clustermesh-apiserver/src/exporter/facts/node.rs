//! Nodes: their addresses, pod ranges and keys.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use isthmus_wire::value::AddressKind;
use k8s_openapi::api::core::v1::Node;

use super::{Fact, Finding, Name, Reason, Source, address, prefix};

/// The annotation under which a node publishes its WireGuard key.
const WIREGUARD_KEY: &str = "network.cilium.io/wg-pub-key";
/// The encryption key index that means WireGuard.
const WIREGUARD: u8 = 255;

/// A node, whether it is known from the Node itself or from Cilium's node object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NodeFact {
    pub name: Name,
    /// In the node's order.
    pub addresses: Vec<(AddressKind, IpAddr)>,
    /// The first of each family is the primary one.
    pub pod_cidrs: Vec<IpNet>,
    /// Of the health endpoint, IPv4 and IPv6.
    pub health: (Option<IpAddr>, Option<IpAddr>),
    /// Of the ingress listener, IPv4 and IPv6.
    pub ingress: (Option<IpAddr>, Option<IpAddr>),
    /// 0 none, 1 to 15 IPsec, 255 WireGuard.
    pub encryption_key: u8,
    /// Base64 text, empty if there is none.
    pub wireguard_key: String,
    pub labels: BTreeMap<String, String>,
    /// Only those that concern the mesh.
    pub annotations: BTreeMap<String, String>,
    pub boot_id: String,
}

impl Fact for NodeFact {
    fn name(&self) -> &Name {
        &self.name
    }
}

impl NodeFact {
    /// The address under which other nodes reach the node's pods of `like`'s family; the node's first address if it has
    /// none of that family.
    pub(crate) fn host_address(&self, like: IpAddr) -> Option<IpAddr> {
        let internal = || {
            self.addresses
                .iter()
                .filter(|(kind, _)| *kind == AddressKind::InternalIp)
                .map(|(_, address)| *address)
        };
        internal().find(|address| address.is_ipv4() == like.is_ipv4()).or_else(|| internal().next())
    }
}

impl Source for Node {
    type Fact = NodeFact;

    fn fact(self, findings: &mut Vec<Finding>) -> NodeFact {
        let name = Name::of(&self);
        let spec = self.spec.unwrap_or_default();
        let status = self.status.unwrap_or_default();
        let listed = spec.pod_cidrs.as_deref().unwrap_or_default();
        let ranges = if listed.is_empty() { spec.pod_cidr.as_slice() } else { listed };
        let annotations = mesh_annotations(self.metadata.annotations);
        let wireguard_key = wireguard_key(&annotations, findings);
        NodeFact {
            name,
            addresses: addresses(
                status
                    .addresses
                    .iter()
                    .flatten()
                    .map(|address| (address.type_.as_str(), address.address.as_str())),
                findings,
            ),
            pod_cidrs: pod_cidrs("spec.podCIDRs", ranges, findings),
            health: (None, None),
            ingress: (None, None),
            encryption_key: if wireguard_key.is_empty() { 0 } else { WIREGUARD },
            wireguard_key,
            labels: self.metadata.labels.unwrap_or_default(),
            annotations,
            boot_id: status.node_info.map(|info| info.boot_id).unwrap_or_default(),
        }
    }
}

/// Kinds that hold names are left out: other clusters' agents read addresses only, and refuse a node that has others.
pub(super) fn addresses<'a>(
    listed: impl Iterator<Item = (&'a str, &'a str)>,
    findings: &mut Vec<Finding>,
) -> Vec<(AddressKind, IpAddr)> {
    let mut found: Vec<(AddressKind, IpAddr)> = Vec::new();
    for (kind, text) in listed.filter(|(_, text)| !text.is_empty()) {
        let kind = match AddressKind::from(kind) {
            kind @ (AddressKind::InternalIp | AddressKind::ExternalIp | AddressKind::CiliumInternalIp) => {
                kind
            }
            _ => continue,
        };
        if let Some(ip) = address("the node's address", text, findings).map(|ip| (kind, ip))
            && !found.contains(&ip)
        {
            found.push(ip);
        }
    }
    found
}

pub(super) fn pod_cidrs(what: &str, listed: &[String], findings: &mut Vec<Finding>) -> Vec<IpNet> {
    listed.iter().filter(|text| !text.is_empty()).filter_map(|text| prefix(what, text, findings)).collect()
}

/// Annotations of any `cilium.io` domain; the rest is the cluster's own business.
pub(super) fn mesh_annotations(all: Option<BTreeMap<String, String>>) -> BTreeMap<String, String> {
    let mut annotations = all.unwrap_or_default();
    annotations.retain(|key, _| {
        key.split_once('/').is_some_and(|(domain, _)| domain == "cilium.io" || domain.ends_with(".cilium.io"))
    });
    annotations
}

/// The node's WireGuard key, or empty text.
pub(super) fn wireguard_key(annotations: &BTreeMap<String, String>, findings: &mut Vec<Finding>) -> String {
    let Some(key) = annotations.get(WIREGUARD_KEY) else { return String::new() };
    let is_key = key.len() == 44
        && key.ends_with('=')
        && key[..43].bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/');
    if !is_key {
        findings.push(Finding::new(
            Reason::InvalidAnnotation,
            format!(
                "annotation {WIREGUARD_KEY} is not a WireGuard public key (32 bytes in base64); \
                 traffic to this node is not encrypted until it is"
            ),
        ));
        return String::new();
    }
    key.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(object: serde_json::Value) -> (NodeFact, Vec<Finding>) {
        let mut findings = Vec::new();
        let node: Node = serde_json::from_value(object).expect("a Node");
        (node.fact(&mut findings), findings)
    }

    #[test]
    fn addresses_ranges_and_the_key_are_read_and_host_names_are_not() {
        let (node, findings) = fact(serde_json::json!({
            "metadata": {"name": "n1", "annotations": {
                "network.cilium.io/wg-pub-key": "VRksOB6ZNds4oXWIGfSVpvc0gBhcOWFmzvTDcyvULlI=",
                "volumes.kubernetes.io/controller-managed-attach-detach": "true",
            }},
            "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00:1::/64"]},
            "status": {"addresses": [
                {"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "172.18.0.2"},
                {"type": "InternalIP", "address": "fd00::2"}, {"type": "ExternalIP", "address": "203.0.113.1"},
            ]},
        }));
        assert!(findings.is_empty(), "{findings:?}");
        assert_eq!(node.addresses.len(), 3);
        assert_eq!(node.pod_cidrs.len(), 2);
        assert_eq!(node.encryption_key, 255);
        assert_eq!(node.annotations.len(), 1);
        let like = |text: &str| node.host_address(text.parse().expect("an address")).map(|ip| ip.to_string());
        assert_eq!(like("10.1.0.7").as_deref(), Some("172.18.0.2"));
        assert_eq!(like("fd00:1::7").as_deref(), Some("fd00::2"));
    }

    #[test]
    fn what_cannot_be_used_is_reported_and_the_rest_is_kept() {
        let (node, findings) = fact(serde_json::json!({
            "metadata": {"name": "n1", "annotations": {"network.cilium.io/wg-pub-key": "oops"}},
            "spec": {"podCIDRs": ["10.1.0.0/24", "10.2.0.0"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "172.18.0"}, {"type": "InternalIP", "address": "172.18.0.2"}]},
        }));
        assert_eq!(findings.len(), 3, "{findings:?}");
        assert_eq!((node.addresses.len(), node.pod_cidrs.len(), node.encryption_key), (1, 1, 0));
    }
}
