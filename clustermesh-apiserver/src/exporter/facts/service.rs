//! Services and the annotations that make them global.

use std::collections::BTreeMap;
use std::net::IpAddr;

use isthmus_wire::annotation::{Affinity, ServiceAnnotations};
use isthmus_wire::value::{PortName, ServicePort};
use k8s_openapi::api::core::v1::{Service, ServiceSpec};

use super::{Fact, Finding, Name, Source, address, annotation, port};

/// Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const SESSION_AFFINITY_SECONDS: u32 = 10_800;

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ServiceFact {
    pub name: Name,
    pub kind: ServiceKind,
    pub cluster_ips: Vec<IpAddr>,
    pub ports: Vec<(PortName, ServicePort)>,
    pub global: bool,
    /// Whether its backends may be used by other clusters. Meaningless unless global.
    pub shared: bool,
    /// [`Affinity::None`] unless global.
    pub affinity: Affinity,
    pub labels: BTreeMap<String, String>,
    pub selector: BTreeMap<String, String>,
    /// Seconds for which a client keeps its backend.
    pub session_affinity: Option<u32>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ServiceKind {
    /// Has a cluster address, or will.
    ClusterIp,
    /// `clusterIP: None`.
    Headless,
    /// A name only, never exported.
    ExternalName,
}

impl Fact for ServiceFact {
    fn name(&self) -> &Name {
        &self.name
    }
}

impl Source for Service {
    type Fact = ServiceFact;

    fn fact(self, findings: &mut Vec<Finding>) -> ServiceFact {
        let name = Name::of(&self);
        let (ServiceAnnotations { global, shared, affinity, .. }, errors) =
            self.metadata.annotations.as_ref().map(ServiceAnnotations::parse).unwrap_or_default();
        findings.extend(errors.iter().map(annotation));
        let spec = self.spec.unwrap_or_default();
        let kind = kind(&spec);
        ServiceFact {
            name,
            kind,
            cluster_ips: if kind == ServiceKind::ClusterIp {
                cluster_ips(&spec, findings)
            } else {
                Vec::new()
            },
            ports: ports(&spec, findings),
            global,
            shared,
            affinity,
            labels: self.metadata.labels.unwrap_or_default(),
            session_affinity: session_affinity(&spec),
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            selector: spec.selector.unwrap_or_default(),
        }
    }
}

fn kind(spec: &ServiceSpec) -> ServiceKind {
    if spec.type_.as_deref() == Some("ExternalName") {
        return ServiceKind::ExternalName;
    }
    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    if spec.cluster_ip.as_deref() == Some("None") || listed.iter().any(|ip| ip == "None") {
        return ServiceKind::Headless;
    }
    ServiceKind::ClusterIp
}

fn cluster_ips(spec: &ServiceSpec, findings: &mut Vec<Finding>) -> Vec<IpAddr> {
    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    let texts = if listed.is_empty() { spec.cluster_ip.as_slice() } else { listed };
    let mut found: Vec<IpAddr> = Vec::with_capacity(texts.len());
    for text in texts.iter().filter(|text| !text.is_empty()) {
        if let Some(ip) = address("spec.clusterIPs", text, findings)
            && !found.contains(&ip)
        {
            found.push(ip);
        }
    }
    found
}

fn ports(spec: &ServiceSpec, findings: &mut Vec<Finding>) -> Vec<(PortName, ServicePort)> {
    let mut ports = Vec::new();
    for listed in spec.ports.as_deref().unwrap_or_default() {
        let name = listed.name.as_deref().unwrap_or_default();
        match port(listed.protocol.as_deref(), listed.port) {
            Ok(port) => ports.push((PortName::from(name), port)),
            Err(finding) => findings.push(finding.within(&format!("spec.ports {name:?}"))),
        }
    }
    ports
}

fn session_affinity(spec: &ServiceSpec) -> Option<u32> {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return None;
    }
    let seconds = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref())
        .and_then(|client_ip| client_ip.timeout_seconds);
    Some(seconds.and_then(|seconds| u32::try_from(seconds).ok()).unwrap_or(SESSION_AFFINITY_SECONDS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(object: serde_json::Value) -> (ServiceFact, Vec<Finding>) {
        let mut findings = Vec::new();
        let service: Service = serde_json::from_value(object).expect("a Service");
        (service.fact(&mut findings), findings)
    }

    fn annotated(annotations: serde_json::Value) -> (ServiceFact, Vec<Finding>) {
        fact(serde_json::json!({
            "metadata": {"namespace": "app", "name": "echo", "annotations": annotations},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
        }))
    }

    #[test]
    fn annotations_are_read_and_a_misspelt_value_is_named() {
        let (service, findings) = annotated(serde_json::json!({
            "io.cilium/global-service": "True", "service.cilium.io/shared": "false",
            "service.cilium.io/affinity": "nearest",
        }));
        assert!(service.global && !service.shared);
        assert_eq!(service.affinity, Affinity::None);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].message.contains("service.cilium.io/affinity"), "{findings:?}");
    }

    #[test]
    fn bad_ports_and_addresses_are_left_out_and_the_rest_is_kept() {
        let (service, findings) = fact(serde_json::json!({
            "metadata": {"namespace": "app", "name": "echo"},
            "spec": {"clusterIPs": ["10.96.0.1", "fd00::1", "10.96.0.1", "10.96.0.256"], "ports": [
                {"name": "http", "port": 80}, {"name": "far", "port": 70000},
                {"name": "odd", "port": 81, "protocol": "ICMP"}, {"name": "dns", "port": 53, "protocol": "UDP"},
            ]},
        }));
        assert_eq!(service.cluster_ips.len(), 2);
        assert_eq!(service.ports.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["http", "dns"]);
        assert_eq!(findings.len(), 3, "{findings:?}");
    }

    #[test]
    fn the_kind_follows_type_and_cluster_ip() {
        let kind_of =
            |spec: serde_json::Value| fact(serde_json::json!({"metadata": {}, "spec": spec})).0.kind;
        assert_eq!(kind_of(serde_json::json!({"clusterIP": "None"})), ServiceKind::Headless);
        assert_eq!(kind_of(serde_json::json!({"clusterIPs": ["None"]})), ServiceKind::Headless);
        assert_eq!(kind_of(serde_json::json!({"type": "ExternalName"})), ServiceKind::ExternalName);
        assert_eq!(kind_of(serde_json::json!({"type": "NodePort"})), ServiceKind::ClusterIp);
    }

    #[test]
    fn session_affinity_has_kubernetes_default_timeout() {
        let of = |spec: serde_json::Value| {
            fact(serde_json::json!({"metadata": {}, "spec": spec})).0.session_affinity
        };
        assert_eq!(of(serde_json::json!({"sessionAffinity": "ClientIP"})), Some(10_800));
        assert_eq!(
            of(serde_json::json!({
                "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            })),
            Some(60)
        );
        assert_eq!(of(serde_json::json!({"sessionAffinity": "None"})), None);
    }
}
