//! A global service: `cilium/state/services/v1/<cluster>/<namespace>/<name>`.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{MAX_BYTES, json_value};
use crate::gojson::{ByIp, ByName, go_object};
use crate::{ClusterId, ClusterName, Namespace, ObjectName};

go_object! {
    /// One service of one cluster: where it listens there and which backends it has there. Holds only backends that are
    /// ready or still serving.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct ClusterService {
        /// Cluster the service is in.
        pub cluster: ClusterName = "cluster" required,
        /// Its namespace.
        pub namespace: Namespace = "namespace" required,
        /// Its name.
        pub name: ObjectName = "name" required,
        /// Its cluster IPs, each with its ports; empty for a headless service.
        pub frontends: BTreeMap<IpAddr, ServicePorts> = "frontends" always as ByIp,
        /// Its backends, each with its (target) ports.
        pub backends: BTreeMap<IpAddr, ServicePorts> = "backends" always as ByIp,
        /// Host names of backends, of a headless service.
        pub hostnames: BTreeMap<IpAddr, String> = "hostnames" omitempty as ByIp,
        /// Zones of backends.
        pub zones: BTreeMap<IpAddr, Zone> = "zones" omitempty as ByIp,
        /// Labels of the Service.
        pub labels: BTreeMap<String, String> = "labels" always as ByName,
        /// Selector of the Service.
        pub selector: BTreeMap<String, String> = "selector" always as ByName,
        /// It is global: backends of other clusters count as its own.
        pub include_external: bool = "includeExternal" always,
        /// Its backends may be used by other clusters.
        pub shared: bool = "shared" always,
        /// Id of the cluster.
        pub cluster_id: ClusterId = "clusterID" required,
    }
}

json_value!(ClusterService, MAX_BYTES);

impl ClusterService {
    /// A service that is global and shared, with neither frontends nor backends.
    pub fn new(cluster: ClusterName, cluster_id: ClusterId, namespace: Namespace, name: ObjectName) -> Self {
        Self {
            cluster,
            namespace,
            name,
            frontends: BTreeMap::new(),
            backends: BTreeMap::new(),
            hostnames: BTreeMap::new(),
            zones: BTreeMap::new(),
            labels: BTreeMap::new(),
            selector: BTreeMap::new(),
            include_external: true,
            shared: true,
            cluster_id,
        }
    }
}

/// Ports by name. An unnamed port has the empty name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ServicePorts(pub BTreeMap<PortName, ServicePort>);

impl FromIterator<(PortName, ServicePort)> for ServicePorts {
    fn from_iter<I: IntoIterator<Item = (PortName, ServicePort)>>(ports: I) -> Self {
        Self(ports.into_iter().collect())
    }
}

impl Serialize for ServicePorts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ServicePorts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::gojson::unique_map(deserializer).map(Self)
    }
}

/// Name of a port; empty for the unnamed one. At most 63 bytes in Kubernetes; no rule is enforced on what peers send
/// beyond the bound on the whole value, for a name is only ever compared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PortName(Arc<str>);

impl PortName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the port has no name.
    pub fn is_unnamed(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<&str> for PortName {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl Borrow<str> for PortName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

go_object! {
    /// A protocol and a port number.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct ServicePort {
        /// The protocol.
        pub protocol: Protocol = "Protocol" required,
        /// The number.
        pub port: u16 = "Port" required,
    }
}

/// Transport protocols that services know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "TCP" => Ok(Self::Tcp),
            "UDP" => Ok(Self::Udp),
            "SCTP" => Ok(Self::Sctp),
            other => Err(format!("{:?} is not one of TCP, UDP, SCTP", crate::error::bounded(other))),
        }
    }
}

go_object! {
    /// Where a backend is, and which zones it should serve.
    #[derive(Debug, Clone, PartialEq, Eq, Default)]
    pub struct Zone {
        /// The backend's zone.
        pub zone: String = "zone" always,
        /// Zones that should use it; Go's nil and empty lists are told apart.
        pub for_zones: Option<Vec<ZoneHint>> = "forZones" always,
    }
}

go_object! {
    /// A zone that should use a backend.
    #[derive(Debug, Clone, PartialEq, Eq, Default)]
    pub struct ZoneHint {
        /// The zone's name.
        pub name: String = "name" always,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_in_the_order_of_their_text() {
        let text = br#"{"cluster":"a","namespace":"n","name":"s","frontends":{},"backends":{"10.0.0.10":{},"10.0.0.9":{"":{"Protocol":"UDP","Port":53}},"fd00::1":{}},"labels":{},"selector":{},"includeExternal":true,"shared":true,"clusterID":1}"#;
        let service = ClusterService::decode(text).expect("valid");
        assert_eq!(service.encode().as_ref(), text);
    }

    #[test]
    fn absent_maps_are_empty_and_bad_ports_are_named() {
        let head = r#""cluster":"a","namespace":"n","name":"s","clusterID":1"#;
        let service =
            ClusterService::decode(format!(r#"{{{head},"backends":null}}"#).as_bytes()).expect("valid");
        assert!(service.backends.is_empty());
        assert!(!service.shared);
        for (backends, field) in [
            (r#"{"10.0.0.1":{"http":{"Protocol":"TCP","Port":65536}}}"#, "backends.10.0.0.1.http.Port"),
            (r#"{"10.0.0.1":{"http":{"Protocol":"ICMP","Port":1}}}"#, "backends.10.0.0.1.http.Protocol"),
            (r#"{"10.0.0.1":{"http":{"Port":1}}}"#, "backends.10.0.0.1.http"),
            (
                r#"{"10.0.0.1":{"a":{"Protocol":"TCP","Port":1},"a":{"Protocol":"TCP","Port":2}}}"#,
                "backends.10.0.0.1",
            ),
            (r#"{"10.0.0.1":{},"::ffff:10.0.0.1":{}}"#, "backends"),
            (r#"{"backend":{}}"#, "backends"),
            (r#"{"10.0.0.1@2":{}}"#, "backends"),
        ] {
            let error = ClusterService::decode(format!(r#"{{{head},"backends":{backends}}}"#).as_bytes())
                .expect_err(backends)
                .to_string();
            assert!(error.contains(&format!("`{field}")), "{backends}: {error}");
        }
    }
}
