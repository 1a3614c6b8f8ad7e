//! EndpointSlices from Services with a selector: one address family and one list of ports in each slice.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::core::v1::{Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource, ResourceExt};

use super::deployment::ready;
use super::{World, echo};
use crate::error::{Doing, Result};
use crate::rbac::FIELD_MANAGER;

/// Says whose slices these are, so that others leave them alone and we leave others' alone.
const MANAGED_BY: (&str, &str) =
    ("endpointslice.kubernetes.io/managed-by", "endpointslice-controller.lab.isthmus.io");
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// As many as the API takes.
const PER_SLICE: usize = 1000;

impl World {
    /// Brings every Service's slices in line, and removes those of Services that are gone.
    pub(super) async fn endpoint_slices(&self) -> Result<()> {
        let mut wanted: BTreeMap<(String, String), EndpointSlice> = BTreeMap::new();
        for service in self.services.state() {
            if service.metadata.deletion_timestamp.is_none() {
                let pods = self.pods_behind(&service);
                let slices = slices(&service, &pods);
                wanted.extend(
                    slices.into_iter().map(|s| ((s.namespace().unwrap_or_default(), s.name_any()), s)),
                );
            }
        }
        for old in self.slices.state() {
            if old.labels().get(MANAGED_BY.0).map(String::as_str) != Some(MANAGED_BY.1) {
                continue;
            }
            let key = (old.namespace().unwrap_or_default(), old.name_any());
            match wanted.get(&key) {
                Some(new) if same(&old, new) => drop(wanted.remove(&key)),
                Some(_) => {}
                None => self.delete_slice(&old).await?,
            }
        }
        for slice in wanted.into_values() {
            self.apply_slice(&slice).await?;
        }
        Ok(())
    }

    fn pods_behind(&self, service: &Service) -> Vec<Pod> {
        let selector = service.spec.as_ref().and_then(|s| s.selector.clone()).unwrap_or_default();
        if selector.is_empty() {
            return Vec::new();
        }
        let namespace = service.namespace();
        let mut pods: Vec<Pod> = self
            .pods
            .state()
            .iter()
            .filter(|pod| pod.namespace() == namespace)
            .filter(|pod| selector.iter().all(|(key, value)| pod.labels().get(key) == Some(value)))
            .map(|pod| Pod::clone(pod))
            .collect();
        pods.sort_by_key(|pod| pod.name_any());
        pods
    }

    async fn apply_slice(&self, slice: &EndpointSlice) -> Result<()> {
        let (name, namespace) = (slice.name_any(), slice.namespace().unwrap_or_default());
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &namespace);
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let doing = || format!("writing EndpointSlice {namespace}/{name}");
        slices.patch(&name, &params, &Patch::Apply(slice)).await.doing(doing)?;
        echo(&self.slices, &ObjectRef::from(slice), |now| now.is_some_and(|now| same(now, slice))).await
    }

    async fn delete_slice(&self, slice: &EndpointSlice) -> Result<()> {
        let (name, namespace) = (slice.name_any(), slice.namespace().unwrap_or_default());
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &namespace);
        match slices.delete(&name, &DeleteParams::default()).await {
            Err(kube::Error::Api(e)) if e.code == 404 => {}
            deleted => drop(deleted.doing(|| format!("deleting EndpointSlice {namespace}/{name}"))?),
        }
        echo(&self.slices, &ObjectRef::from(slice), |now| now.is_none()).await
    }
}

/// Whether a slice says already what another would.
fn same(now: &EndpointSlice, wanted: &EndpointSlice) -> bool {
    // A real API server answers an empty list of ports with none.
    let ports = |slice: &EndpointSlice| slice.ports.clone().unwrap_or_default();
    now.endpoints == wanted.endpoints
        && ports(now) == ports(wanted)
        && now.address_type == wanted.address_type
        && wanted.labels().iter().all(|(key, value)| now.labels().get(key) == Some(value))
}

/// The slices of a Service, given the pods that its selector finds.
fn slices(service: &Service, pods: &[Pod]) -> Vec<EndpointSlice> {
    let Some(spec) = &service.spec else { return Vec::new() };
    if spec.selector.as_ref().is_none_or(BTreeMap::is_empty) || spec.type_.as_deref() == Some("ExternalName")
    {
        return Vec::new();
    }
    let mut all = Vec::new();
    for family in spec.ip_families.clone().unwrap_or_else(|| vec!["IPv4".into()]) {
        // Pods may give a named port different numbers, hence different lists.
        let mut groups: BTreeMap<Vec<(String, String, i32)>, Vec<Endpoint>> = BTreeMap::new();
        for pod in pods {
            if let Some(endpoint) = endpoint(pod, &family, spec.publish_not_ready_addresses == Some(true)) {
                groups
                    .entry(ports(spec.ports.as_deref().unwrap_or_default(), pod))
                    .or_default()
                    .push(endpoint);
            }
        }
        if groups.is_empty() {
            groups.insert(Vec::new(), Vec::new());
        }
        let parts = groups.into_iter().flat_map(|(ports, endpoints)| {
            if endpoints.is_empty() {
                return vec![(ports, endpoints)];
            }
            endpoints.chunks(PER_SLICE).map(|part| (ports.clone(), part.to_vec())).collect()
        });
        let parts: Vec<_> = parts.collect();
        for (number, (ports, endpoints)) in parts.into_iter().enumerate() {
            all.push(slice(
                service,
                spec.ports.as_deref().unwrap_or_default(),
                &family,
                number,
                ports,
                endpoints,
            ));
        }
    }
    all
}

fn slice(
    service: &Service,
    declared: &[ServicePort],
    family: &str,
    number: usize,
    ports: Vec<(String, String, i32)>,
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    let name = service.name_any();
    let mut labels: BTreeMap<String, String> = service.labels().clone();
    labels.insert(SERVICE_NAME.into(), name.clone());
    labels.insert(MANAGED_BY.0.into(), MANAGED_BY.1.into());
    let app_protocol =
        |port: &str| declared.iter().find(|p| p.name.as_deref().unwrap_or("") == port)?.app_protocol.clone();
    let ports = ports.into_iter().map(|(name, protocol, port)| EndpointPort {
        app_protocol: app_protocol(&name),
        name: Some(name),
        port: Some(port),
        protocol: Some(protocol),
    });
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some(format!("{name}-{}-{number}", family.to_lowercase())),
            namespace: service.namespace(),
            labels: Some(labels),
            owner_references: service.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        address_type: family.to_owned(),
        endpoints,
        ports: Some(ports.collect()),
    }
}

/// A pod as an endpoint, if it has an address of the family and has not ended.
fn endpoint(pod: &Pod, family: &str, publish_not_ready: bool) -> Option<Endpoint> {
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let is_v6 = family == "IPv6";
    let mut addresses = status.pod_ips.iter().flatten().map(|ip| ip.ip.clone());
    let address = addresses.find(|ip| ip.contains(':') == is_v6)?;
    let serving = ready(pod) || publish_not_ready;
    let terminating = pod.metadata.deletion_timestamp.is_some();
    Some(Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some((serving && !terminating) || publish_not_ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        node_name: pod.spec.as_ref().and_then(|s| s.node_name.clone()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            name: pod.metadata.name.clone(),
            namespace: pod.namespace(),
            uid: pod.uid(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    })
}

/// Name, protocol and number of each port, as this pod has them.
fn ports(declared: &[ServicePort], pod: &Pod) -> Vec<(String, String, i32)> {
    let containers = pod.spec.iter().flat_map(|s| &s.containers);
    let named: Vec<_> = containers.flat_map(|c| c.ports.iter().flatten()).collect();
    let number = |port: &ServicePort| match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let found = named.iter().find(|p| {
                p.name.as_ref() == Some(name) && p.protocol.as_deref().unwrap_or("TCP") == protocol
            });
            found.map(|p| p.container_port)
        }
    };
    let resolved = declared.iter().filter_map(|port| {
        let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
        Some((port.name.clone().unwrap_or_default(), protocol, number(port)?))
    });
    resolved.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service() -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "default", "uid": "s", "labels": {"app": "web"}},
            "spec": {"selector": {"app": "web"}, "ipFamilies": ["IPv4", "IPv6"],
                     "ports": [{"name": "http", "port": 80, "targetPort": "http"}, {"port": 53, "protocol": "UDP"}]},
        }))
        .unwrap()
    }

    fn pod(name: &str, port: i32, ready: &str, ending: bool) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "default", "uid": name,
                         "deletionTimestamp": ending.then_some("2026-01-01T00:00:00Z")},
            "spec": {"nodeName": "node1", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": port}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.10"}, {"ip": "fd00::a"}],
                       "conditions": [{"type": "Ready", "status": ready}]},
        }))
        .unwrap()
    }

    #[test]
    fn each_family_and_each_number_of_a_named_port_has_a_slice() {
        let slices = slices(&service(), &[pod("a", 8080, "True", false), pod("b", 9090, "True", false)]);
        let names: Vec<String> = slices.iter().map(|s| s.name_any()).collect();
        assert_eq!(names, ["web-ipv4-0", "web-ipv4-1", "web-ipv6-0", "web-ipv6-1"]);
        let numbers: Vec<_> = slices[1].ports.iter().flatten().filter_map(|p| p.port).collect();
        assert_eq!(numbers, [9090, 53]);
        assert_eq!(slices[2].endpoints[0].addresses, ["fd00::a"]);
    }

    #[test]
    fn a_pod_that_ends_serves_but_is_not_ready() {
        let slices = slices(&service(), &[pod("a", 8080, "True", true), pod("b", 8080, "False", false)]);
        let conditions: Vec<_> = slices[0].endpoints.iter().filter_map(|e| e.conditions.clone()).collect();
        let as_tuple = |c: &EndpointConditions| (c.ready, c.serving, c.terminating);
        assert_eq!(as_tuple(&conditions[0]), (Some(false), Some(true), Some(true)));
        assert_eq!(as_tuple(&conditions[1]), (Some(false), Some(false), Some(false)));
    }

    #[test]
    fn a_slice_without_ports_is_the_same_with_an_empty_list_and_with_none() {
        let wanted = &slices(&service(), &[])[0];
        let mut answered = wanted.clone();
        answered.ports = None;
        assert!(same(&answered, wanted));
        answered.ports = Some(vec![EndpointPort { port: Some(1), ..EndpointPort::default() }]);
        assert!(!same(&answered, wanted));
    }

    #[test]
    fn a_service_without_pods_has_an_empty_slice_and_one_without_selector_none() {
        assert_eq!(slices(&service(), &[]).len(), 2);
        let mut without = service();
        without.spec.as_mut().unwrap().selector = None;
        assert!(slices(&without, &[]).is_empty());
    }
}
