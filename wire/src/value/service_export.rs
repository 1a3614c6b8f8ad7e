//! A service exported through the Multi-Cluster Services API:
//! `cilium/state/serviceexports/v1/<cluster>/<namespace>/<name>`.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::{MAX_OBJECT_BYTES, Protocol, Timestamp};
use crate::gojson::{ByName, go_object};
use crate::{ClusterName, Namespace, ObjectName};

go_object! {
    /// What a cluster wants the mesh-wide service to look like.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct McsApiServiceSpec {
        /// Cluster the export is in.
        pub cluster: ClusterName = "cluster" required,
        /// Name of the service.
        pub name: ObjectName = "name" required,
        /// Its namespace.
        pub namespace: Namespace = "namespace" required,
        /// Annotations to carry over.
        pub annotations: BTreeMap<String, String> = "annotations" omitempty as ByName,
        /// Labels to carry over.
        pub labels: BTreeMap<String, String> = "labels" omitempty as ByName,
        /// When the export was made: where exports differ, the oldest wins.
        pub export_creation_timestamp: Timestamp = "exportCreationTimestamp" required,
        /// The service's ports.
        pub ports: Vec<ExportedPort> = "ports" always,
        /// With or without an address of its own.
        pub kind: ExportType = "type" required,
        /// Whether a client stays with a backend.
        pub session_affinity: SessionAffinity = "sessionAffinity" always,
        /// For how long.
        pub session_affinity_config: Option<SessionAffinityConfig> = "sessionAffinityConfig" omitempty,
        /// Address families.
        pub ip_families: Vec<IpFamily> = "ipFamilies" omitempty,
        /// Whether traffic from within the cluster stays on its node.
        pub internal_traffic_policy: Option<TrafficPolicy> = "internalTrafficPolicy" omitempty,
        /// `PreferClose`, `PreferSameZone` or `PreferSameNode`; text, for Kubernetes goes on adding values.
        pub traffic_distribution: Option<String> = "trafficDistribution" omitempty,
        legacy_annotations: BTreeMap<String, String> = "Annotations" omitempty as ByName,
        legacy_labels: BTreeMap<String, String> = "Labels" omitempty as ByName,
    }
}

impl McsApiServiceSpec {
    /// An export with the properties that every export has.
    pub fn new(
        cluster: ClusterName,
        namespace: Namespace,
        name: ObjectName,
        created: Timestamp,
        kind: ExportType,
    ) -> Self {
        Self {
            cluster,
            name,
            namespace,
            annotations: BTreeMap::new(),
            labels: BTreeMap::new(),
            export_creation_timestamp: created,
            ports: Vec::new(),
            kind,
            session_affinity: SessionAffinity::None,
            session_affinity_config: None,
            ip_families: Vec::new(),
            internal_traffic_policy: None,
            traffic_distribution: None,
            legacy_annotations: BTreeMap::new(),
            legacy_labels: BTreeMap::new(),
        }
    }

    /// Reads the value. Cilium up to 1.19 also writes, and up to some version only writes, `Annotations` and `Labels`:
    /// they stand in where the newer names are absent.
    ///
    /// # Errors
    /// Too long, not JSON, or a field that does not hold what it should; names the field.
    pub fn decode(bytes: &[u8]) -> Result<Self, crate::ValueError> {
        let mut spec: Self = crate::gojson::decode(bytes, MAX_OBJECT_BYTES)?;
        for (current, legacy) in [
            (&mut spec.annotations, std::mem::take(&mut spec.legacy_annotations)),
            (&mut spec.labels, std::mem::take(&mut spec.legacy_labels)),
        ] {
            if current.is_empty() {
                *current = legacy;
            }
        }
        Ok(spec)
    }

    /// The value as Cilium 1.20 writes it. Older readers match field names regardless of case and need no more.
    pub fn encode(&self) -> bytes::Bytes {
        crate::gojson::encode(self)
    }
}

go_object! {
    /// A port of an exported service. The port of the service, not of its backends.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct ExportedPort {
        /// Its name; empty if it is the only one.
        pub name: String = "name" always,
        /// Its protocol.
        pub protocol: Protocol = "protocol" required,
        /// What is spoken over it, if declared.
        pub app_protocol: Option<String> = "appProtocol" omitempty,
        /// Its number.
        pub port: u16 = "port" required,
    }
}

/// With or without an address of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExportType {
    /// One address for the whole mesh.
    ClusterSetIP,
    /// Backends' addresses by DNS alone.
    Headless,
}

/// Whether a client stays with a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum SessionAffinity {
    /// Each connection is balanced anew.
    #[default]
    None,
    /// A client's connections go to one backend.
    ClientIP,
}

impl<'de> Deserialize<'de> for SessionAffinity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "" | "None" => Ok(Self::None),
            "ClientIP" => Ok(Self::ClientIP),
            other => {
                Err(serde::de::Error::unknown_variant(&crate::error::bounded(other), &["None", "ClientIP"]))
            }
        }
    }
}

go_object! {
    /// For how long a client stays with a backend.
    #[derive(Debug, Clone, PartialEq, Eq, Default)]
    pub struct SessionAffinityConfig {
        /// Settings of `ClientIP`.
        pub client_ip: Option<ClientIpConfig> = "clientIP" omitempty,
    }
}

go_object! {
    /// Settings of `ClientIP`.
    #[derive(Debug, Clone, PartialEq, Eq, Default)]
    pub struct ClientIpConfig {
        /// Seconds since the last connection after which a client is balanced anew.
        pub timeout_seconds: Option<i32> = "timeoutSeconds" omitempty,
    }
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum IpFamily {
    /// IPv4
    IPv4,
    /// IPv6
    IPv6,
}

/// Where traffic from within the cluster may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// Anywhere.
    #[default]
    Cluster,
    /// To backends on the client's own node alone.
    Local,
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#""cluster":"a","name":"s","namespace":"n","exportCreationTimestamp":"2026-11-20T12:38:19Z","ports":[],"type":"Headless""#;

    #[test]
    fn the_older_spelling_stands_in_for_the_newer_and_does_not_clash_with_it() {
        let read =
            |more: &str| McsApiServiceSpec::decode(format!("{{{BASE}{more}}}").as_bytes()).expect(more);
        let both = read(
            r#","annotations":{"a":"new"},"labels":{"l":"new"},"Annotations":{"a":"old"},"Labels":{"l":"old"}"#,
        );
        assert_eq!(both.annotations["a"], "new");
        assert_eq!(both.labels["l"], "new");
        let old = read(r#","Annotations":{"a":"old"},"Labels":{"l":"old"}"#);
        assert_eq!(old.annotations["a"], "old");
        assert_eq!(old.labels["l"], "old");
        assert!(!String::from_utf8_lossy(&old.encode()).contains("Annotations"));
    }

    #[test]
    fn an_empty_session_affinity_is_read_as_none_and_never_written() {
        let spec = McsApiServiceSpec::decode(format!(r#"{{{BASE},"sessionAffinity":""}}"#).as_bytes())
            .expect("valid");
        assert!(String::from_utf8_lossy(&spec.encode()).contains(r#""sessionAffinity":"None""#));
    }

    #[test]
    fn a_creation_time_is_mandatory() {
        let text = br#"{"cluster":"a","name":"s","namespace":"n","type":"Headless"}"#;
        let error = McsApiServiceSpec::decode(text).expect_err("no time").to_string();
        assert!(error.contains("exportCreationTimestamp"), "{error}");
    }
}
