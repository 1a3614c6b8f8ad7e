//! Pods: their addresses, their labels and the node they run on.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use isthmus_wire::pod_labels::is_identity_relevant;
use isthmus_wire::value::{NamedPort, ServicePort};
use k8s_openapi::api::core::v1::{Pod, PodSpec, PodStatus};

use super::{Fact, Finding, Name, Source, address, canonical};

/// A pod, whether it is known from the Pod itself or from Cilium's endpoint object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EndpointFact {
    pub name: Name,
    /// Addresses that belong to this pod alone: none on the host's network, before it has any, or when it has ended. A pod
    /// that is still pending may have one, for its init containers talk to others too.
    pub addresses: Vec<IpAddr>,
    pub identity: Assigned,
    pub host: Host,
    pub service_account: Arc<str>,
    /// Ports with a name: what policies of other endpoints mean by the name. Without duplicates, ordered.
    pub named_ports: Vec<NamedPort>,
    /// Unix seconds. Of two pods that claim one address, the younger has it.
    pub created: i64,
}

/// Where a pod's identity comes from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Assigned {
    /// Nothing to identify: on the host's network, ended, or not set up yet.
    Nothing,
    /// To be found or allocated by its labels (those that count).
    ByLabels(Arc<BTreeMap<String, String>>),
    /// Cilium has allocated it.
    Numeric(u32),
}

/// The node a pod runs on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Host {
    /// Known by its name; the addresses are what the pod's status says, for as long as the node is not known.
    Node { name: Arc<str>, addresses: Vec<IpAddr> },
    /// Known by its address and encryption key.
    Address { address: Option<IpAddr>, encryption_key: u8 },
}

impl Fact for EndpointFact {
    fn name(&self) -> &Name {
        &self.name
    }
}

impl Source for Pod {
    type Fact = EndpointFact;

    fn fact(self, findings: &mut Vec<Finding>) -> EndpointFact {
        let name = Name::of(&self);
        let spec = self.spec.unwrap_or_default();
        let named_ports = named_ports(&spec);
        let status = self.status.unwrap_or_default();
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let alive = !ended && !spec.host_network.unwrap_or(false);
        EndpointFact {
            name,
            addresses: if alive { addresses(&status, findings) } else { Vec::new() },
            identity: if alive {
                let mut labels = self.metadata.labels.unwrap_or_default();
                labels.retain(|key, _| is_identity_relevant(key));
                Assigned::ByLabels(Arc::new(labels))
            } else {
                Assigned::Nothing
            },
            host: Host::Node {
                name: spec.node_name.unwrap_or_default().into(),
                addresses: host_addresses(&status),
            },
            service_account: spec.service_account_name.unwrap_or_default().into(),
            named_ports,
            created: self.metadata.creation_timestamp.map_or(0, |time| time.0.as_second()),
        }
    }
}

/// Of all its containers, those that run beside the others after having been started first included. Kubernetes admits no
/// other protocols; one that comes regardless is passed over.
fn named_ports(spec: &PodSpec) -> Vec<NamedPort> {
    let beside = spec.init_containers.iter().flatten();
    let ports = spec.containers.iter().chain(beside).flat_map(|container| container.ports.iter().flatten());
    let mut named: Vec<NamedPort> = ports
        .filter_map(|port| {
            let name = port.name.clone().filter(|name| !name.is_empty())?;
            let ServicePort { protocol, port } =
                super::port(port.protocol.as_deref(), port.container_port).ok()?;
            Some(NamedPort { name, port, protocol })
        })
        .collect();
    named.sort_by(|a, b| (&a.name, a.protocol, a.port).cmp(&(&b.name, b.protocol, b.port)));
    named.dedup();
    named
}

fn addresses(status: &PodStatus, findings: &mut Vec<Finding>) -> Vec<IpAddr> {
    let listed = status.pod_ips.as_deref().unwrap_or_default();
    let texts: Vec<&str> = if listed.is_empty() {
        status.pod_ip.as_deref().into_iter().collect()
    } else {
        listed.iter().map(|entry| entry.ip.as_str()).collect()
    };
    let mut found: Vec<IpAddr> = Vec::with_capacity(texts.len());
    for text in texts.into_iter().filter(|text| !text.is_empty()) {
        if let Some(ip) = address("status.podIPs", text, findings)
            && !found.contains(&ip)
        {
            found.push(ip);
        }
    }
    found
}

/// Only a stand-in for the node's own addresses, so a bad one is passed over in silence.
fn host_addresses(status: &PodStatus) -> Vec<IpAddr> {
    let listed = status.host_ips.as_deref().unwrap_or_default();
    let texts: Vec<&str> = if listed.is_empty() {
        status.host_ip.as_deref().into_iter().collect()
    } else {
        listed.iter().map(|entry| entry.ip.as_str()).collect()
    };
    texts.into_iter().filter_map(|text| text.parse().ok()).map(canonical).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(object: serde_json::Value) -> EndpointFact {
        let pod: Pod = serde_json::from_value(object).expect("a Pod");
        pod.fact(&mut Vec::new())
    }

    fn pod(spec: serde_json::Value, status: serde_json::Value) -> EndpointFact {
        fact(serde_json::json!({
            "metadata": {"namespace": "app", "name": "echo-1", "labels": {"app": "echo", "pod-template-hash": "abc"}},
            "spec": spec, "status": status,
        }))
    }

    #[test]
    fn a_running_pod_has_its_addresses_of_both_families() {
        let fact = pod(
            serde_json::json!({"containers": [], "nodeName": "n1", "serviceAccountName": "default"}),
            serde_json::json!({"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}),
        );
        assert_eq!(fact.addresses.len(), 2);
        let Assigned::ByLabels(labels) = fact.identity else { panic!("{fact:?}") };
        assert_eq!(labels.keys().collect::<Vec<_>>(), ["app"]);
    }

    #[test]
    fn ports_with_a_name_are_known_by_it() {
        let fact = pod(
            serde_json::json!({
                "containers": [
                    {"name": "a", "ports": [{"containerPort": 8080, "name": "http"}, {"containerPort": 1}]},
                    {"name": "b", "ports": [{"containerPort": 53, "name": "dns", "protocol": "UDP"}]},
                ],
                "initContainers": [{"name": "c", "ports": [{"containerPort": 8080, "name": "http"}]}],
            }),
            serde_json::json!({"phase": "Running"}),
        );
        let named: Vec<_> = fact.named_ports.iter().map(|port| (port.name.as_str(), port.port)).collect();
        assert_eq!(named, [("dns", 53), ("http", 8080)]);
    }

    #[test]
    fn pods_on_the_hosts_network_and_ended_ones_have_neither_address_nor_identity() {
        let ips = serde_json::json!([{"ip": "10.0.0.1"}]);
        for (spec, phase) in [
            (serde_json::json!({"containers": [], "hostNetwork": true}), "Running"),
            (serde_json::json!({"containers": []}), "Succeeded"),
            (serde_json::json!({"containers": []}), "Failed"),
        ] {
            let fact = pod(spec, serde_json::json!({"phase": phase, "podIPs": ips}));
            assert!(fact.addresses.is_empty());
            assert_eq!(fact.identity, Assigned::Nothing);
        }
    }
}
