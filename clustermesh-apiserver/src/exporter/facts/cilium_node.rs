//! Nodes of a cluster that runs Cilium.

use isthmus_crds::CiliumNode;

use super::node::{addresses, mesh_annotations, pod_cidrs, wireguard_key};
use super::{Finding, Name, NodeFact, Reason, Source, optional_address};

impl Source for CiliumNode {
    type Fact = NodeFact;

    fn fact(self, findings: &mut Vec<Finding>) -> NodeFact {
        let name = Name::of(&self);
        let spec = self.spec;
        let annotations = mesh_annotations(self.metadata.annotations);
        NodeFact {
            name,
            addresses: addresses(
                spec.addresses.iter().flatten().map(|address| (address.type_.as_str(), address.ip.as_str())),
                findings,
            ),
            pod_cidrs: pod_cidrs(
                "spec.ipam.podCIDRs",
                spec.ipam.pod_cidrs.as_deref().unwrap_or_default(),
                findings,
            ),
            health: (
                optional_address("spec.health.ipv4", &spec.health.ipv4, findings),
                optional_address("spec.health.ipv6", &spec.health.ipv6, findings),
            ),
            ingress: (
                optional_address("spec.ingress.ipv4", &spec.ingress.ipv4, findings),
                optional_address("spec.ingress.ipv6", &spec.ingress.ipv6, findings),
            ),
            encryption_key: encryption_key(spec.encryption.key, findings),
            wireguard_key: wireguard_key(&annotations, findings),
            labels: self.metadata.labels.unwrap_or_default(),
            annotations,
            boot_id: spec.bootid,
        }
    }
}

pub(super) fn encryption_key(key: i64, findings: &mut Vec<Finding>) -> u8 {
    u8::try_from(key).unwrap_or_else(|_| {
        findings.push(Finding::new(
            Reason::InvalidObject,
            format!("encryption key {key} is not between 0 and 255; 0 (none) is used"),
        ));
        0
    })
}
