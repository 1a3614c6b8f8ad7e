//! A pod of this node as policies see it.

use std::net::IpAddr;
use std::sync::Arc;

use isthmus_policy::NamedPorts;
use isthmus_policy::model::Transport;
use k8s_openapi::api::core::v1::Pod;

use super::Subject;
use crate::datapath::EndpointSettings;

/// A pod at an interface of this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LocalEndpoint {
    /// `namespace/name`.
    pub pod: Arc<str>,
    /// Tells it from another pod of the same name.
    pub uid: Arc<str>,
    /// What policies select it by.
    pub subject: Arc<Subject>,
    /// Its addresses, as far as they are known.
    pub addresses: Vec<IpAddr>,
    /// An earlier run of the agent had programs on the interface: what they do goes on until it is decided anew.
    pub inherited: bool,
}

impl LocalEndpoint {
    /// Who it is, for the programs: with its numeric identity, 0 while that is not known.
    pub fn settings(&self, identity: u32) -> EndpointSettings {
        let v4 = |address: &IpAddr| if let IpAddr::V4(address) = address { Some(*address) } else { None };
        let v6 = |address: &IpAddr| if let IpAddr::V6(address) = address { Some(*address) } else { None };
        EndpointSettings {
            identity,
            ipv4: self.addresses.iter().find_map(v4),
            ipv6: self.addresses.iter().find_map(v6),
        }
    }
}

/// What policies see of a Pod.
pub fn subject(pod: &Pod) -> Subject {
    let spec = pod.spec.as_ref();
    let mut named_ports = NamedPorts::new();
    let sidecars = spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    for container in spec.iter().flat_map(|spec| &spec.containers).chain(sidecars) {
        for port in container.ports.iter().flatten() {
            let protocol = match port.protocol.as_deref() {
                None | Some("" | "TCP") => Transport::Tcp,
                Some("UDP") => Transport::Udp,
                Some("SCTP") => Transport::Sctp,
                Some(_) => continue,
            };
            if let (Some(name), Ok(number)) = (&port.name, u16::try_from(port.container_port)) {
                named_ports.insert(name, protocol, number);
            }
        }
    }
    Subject {
        namespace: pod.metadata.namespace.as_deref().unwrap_or_default().into(),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        service_account: spec
            .and_then(|spec| spec.service_account_name.as_deref())
            .unwrap_or_default()
            .into(),
        named_ports,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_with_names_are_those_of_all_containers() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": "app", "labels": {"app": "echo"}},
            "spec": {"serviceAccountName": "echo", "containers": [
                {"name": "a", "ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 9}]},
                {"name": "b", "ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
            ]},
        }))
        .expect("a Pod");
        let subject = subject(&pod);
        assert_eq!((&*subject.namespace, &*subject.service_account), ("app", "echo"));
        let ports: Vec<_> = subject.named_ports.iter().map(|port| (&*port.name, port.port)).collect();
        assert_eq!(ports, [("dns", 53), ("http", 8080)]);
    }
}
