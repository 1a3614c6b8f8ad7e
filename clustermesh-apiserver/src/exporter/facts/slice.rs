//! EndpointSlices: the backends of services.

use std::net::IpAddr;

use isthmus_wire::value::{PortName, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointSlice};

use super::{Fact, Finding, Name, Source, address, port};

const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Slices of this manager hold other clusters' backends: exporting them would send a cluster its own backends back.
const MESH_CONTROLLER: &str = "endpointslice-mesh-controller.cilium.io";

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SliceFact {
    pub name: Name,
    /// The service it belongs to; `None` if it is not ours to export.
    pub service: Option<Name>,
    /// Ready or serving ones only.
    pub backends: Vec<Backend>,
    /// Target ports by the name of the service's port, the same for all backends.
    pub ports: Vec<(PortName, ServicePort)>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Backend {
    pub address: IpAddr,
    pub state: BackendState,
    pub hostname: Option<String>,
    pub zone: Option<String>,
    /// Zones that topology hints assign it to.
    pub for_zones: Vec<String>,
    pub node: Option<String>,
}

/// Better states first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum BackendState {
    Active,
    /// Shutting down, but still answering.
    Terminating,
}

impl Fact for SliceFact {
    fn name(&self) -> &Name {
        &self.name
    }
}

impl Source for EndpointSlice {
    type Fact = SliceFact;

    fn fact(self, findings: &mut Vec<Finding>) -> SliceFact {
        let name = Name::of(&self);
        let labels = self.metadata.labels.unwrap_or_default();
        let foreign = labels.get(MANAGED_BY).is_some_and(|manager| manager == MESH_CONTROLLER);
        let service = labels
            .get(SERVICE_NAME)
            .filter(|service| !service.is_empty() && !foreign && self.address_type != "FQDN")
            .map(|service| Name::new(&name.namespace, service));
        if service.is_none() {
            return SliceFact { name, service, backends: Vec::new(), ports: Vec::new() };
        }
        let mut ports = Vec::new();
        for listed in self.ports.unwrap_or_default() {
            // Without a number the slice stands for every port, which no key can say.
            let Some(number) = listed.port else { continue };
            let port_name = listed.name.unwrap_or_default();
            match port(listed.protocol.as_deref(), number) {
                Ok(port) => ports.push((PortName::from(port_name.as_str()), port)),
                Err(finding) => findings.push(finding.within(&format!("ports {port_name:?}"))),
            }
        }
        let backends = self.endpoints.into_iter().flat_map(|endpoint| backends(endpoint, findings)).collect();
        SliceFact { name, service, backends, ports }
    }
}

fn backends(endpoint: Endpoint, findings: &mut Vec<Finding>) -> Vec<Backend> {
    let Some(state) = state(endpoint.conditions.as_ref()) else { return Vec::new() };
    let for_zones: Vec<String> = endpoint
        .hints
        .and_then(|hints| hints.for_zones)
        .unwrap_or_default()
        .into_iter()
        .map(|zone| zone.name)
        .collect();
    endpoint
        .addresses
        .iter()
        .filter_map(|text| address("endpoints.addresses", text, findings))
        .map(|address| Backend {
            address,
            state,
            hostname: endpoint.hostname.clone().filter(|hostname| !hostname.is_empty()),
            zone: endpoint.zone.clone().filter(|zone| !zone.is_empty()),
            for_zones: for_zones.clone(),
            node: endpoint.node_name.clone(),
        })
        .collect()
}

/// Whether and how an endpoint takes traffic. What is not said counts as ready, and as serving if ready.
fn state(conditions: Option<&EndpointConditions>) -> Option<BackendState> {
    let Some(conditions) = conditions else { return Some(BackendState::Active) };
    let terminating = conditions.terminating.unwrap_or(false);
    if conditions.ready.unwrap_or(!terminating) {
        Some(BackendState::Active)
    } else if conditions.serving.or(conditions.ready).unwrap_or(true) {
        Some(BackendState::Terminating)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use isthmus_wire::value::Protocol;

    use super::*;

    fn fact(object: serde_json::Value) -> (SliceFact, Vec<Finding>) {
        let mut findings = Vec::new();
        let slice: EndpointSlice = serde_json::from_value(object).expect("an EndpointSlice");
        (slice.fact(&mut findings), findings)
    }

    #[test]
    fn only_ready_or_serving_endpoints_are_backends() {
        let (slice, _) = fact(serde_json::json!({
            "metadata": {"namespace": "app", "name": "echo-1", "labels": {"kubernetes.io/service-name": "echo"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [
                {"addresses": ["10.0.0.1"]},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": true}},
                {"addresses": ["10.0.0.3"], "conditions": {"ready": false}},
                {"addresses": ["10.0.0.4"], "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["10.0.0.5"], "conditions": {"ready": false, "serving": false, "terminating": true}},
                {"addresses": ["10.0.0.6"], "conditions": {"terminating": true}},
            ],
        }));
        let states: Vec<_> =
            slice.backends.iter().map(|backend| (backend.address.to_string(), backend.state)).collect();
        assert_eq!(
            states,
            [
                ("10.0.0.1".to_owned(), BackendState::Active),
                ("10.0.0.2".to_owned(), BackendState::Active),
                ("10.0.0.4".to_owned(), BackendState::Terminating),
                ("10.0.0.6".to_owned(), BackendState::Terminating),
            ]
        );
    }

    #[test]
    fn slices_of_other_clusters_backends_and_of_no_service_are_ignored() {
        for labels in [
            serde_json::json!({
                "kubernetes.io/service-name": "echo",
                "endpointslice.kubernetes.io/managed-by": "endpointslice-mesh-controller.cilium.io",
            }),
            serde_json::json!({}),
        ] {
            let (slice, _) = fact(serde_json::json!({
                "metadata": {"namespace": "app", "name": "echo-1", "labels": labels},
                "addressType": "IPv4",
                "endpoints": [{"addresses": ["10.0.0.1"]}],
            }));
            assert_eq!(slice.service, None);
            assert!(slice.backends.is_empty());
        }
    }

    #[test]
    fn a_bad_address_is_reported_and_the_others_are_kept() {
        let (slice, findings) = fact(serde_json::json!({
            "metadata": {"namespace": "app", "name": "echo-1", "labels": {"kubernetes.io/service-name": "echo"}},
            "addressType": "IPv4",
            "ports": [{"port": 8080}, {"name": "bad", "port": 0}],
            "endpoints": [{"addresses": ["10.0.0.1", "10.0.0.999"]}],
        }));
        assert_eq!(slice.backends.len(), 1);
        assert_eq!(slice.ports, [(PortName::from(""), ServicePort { protocol: Protocol::Tcp, port: 8080 })]);
        assert_eq!(findings.len(), 2, "{findings:?}");
    }
}
