//! A Service as its cluster's agents read it: every ClusterIP Service, global or not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::annotation::Affinity;
use crate::gojson::{ByIp, ByName, NullIfEmpty, go_object};
use crate::value::{Protocol, ServicePorts, TrafficPolicy, json_value};
use crate::{Namespace, ObjectName};

/// Prefix of the keys, without its trailing slash; the canary is `cilium/synced/<own cluster>/` followed by it.
pub const SERVICES: &str = "isthmus/services/v1";

go_object! {
    /// A Service of the own cluster, with its own backends.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct LocalService {
        /// Its namespace.
        pub namespace: Namespace = "namespace" required,
        /// Its name.
        pub name: ObjectName = "name" required,
        /// Its cluster addresses, at most one per family.
        pub cluster_ips: Vec<IpAddr> = "clusterIPs" always,
        /// Where it listens.
        pub ports: Vec<LocalPort> = "ports" always,
        /// Backends that are ready or still serving, each with its (target) ports.
        pub backends: BTreeMap<IpAddr, LocalBackend> = "backends" always as ByIp,
        /// Whether backends of other clusters count as its own.
        pub global: bool = "global" always,
        /// Whether its backends may be used by other clusters.
        pub shared: bool = "shared" always,
        /// Which backends come first.
        pub affinity: Affinity = "affinity" always,
        /// For how many seconds a client stays with a backend; none if each connection is balanced anew.
        pub session_affinity: Option<u32> = "sessionAffinity" always,
        /// Whether a client's traffic stays on its node.
        pub internal_traffic_policy: TrafficPolicy = "internalTrafficPolicy" always,
        /// Labels of the Service, by which policies select it.
        pub labels: BTreeMap<String, String> = "labels" omitempty as ByName,
        /// Its selector: the pods that policies mean by it. Empty if its backends are not chosen by labels.
        pub selector: BTreeMap<String, String> = "selector" omitempty as ByName,
    }
}

json_value!(LocalService, crate::value::MAX_BYTES);

go_object! {
    /// A port on which a Service listens.
    #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
    pub struct LocalPort {
        /// Its name; empty if it is the only one.
        pub name: crate::value::PortName = "name" always,
        /// Its protocol.
        pub protocol: Protocol = "protocol" required,
        /// Its number.
        pub port: u16 = "port" required,
    }
}

go_object! {
    /// A backend of a Service.
    #[derive(Debug, Clone, PartialEq, Eq, Default)]
    pub struct LocalBackend {
        /// Its (target) ports by name.
        pub ports: ServicePorts = "ports" always,
        /// It is on its way out and still serving: it gets no new connections while another one is active.
        pub terminating: bool = "terminating" omitempty,
        /// The node it runs on, if known.
        pub node: Option<String> = "node" omitempty,
        /// Its zone, if known.
        pub zone: Option<String> = "zone" omitempty,
        /// Zones that should use it; empty without hints.
        pub for_zones: Vec<String> = "forZones" always as NullIfEmpty,
    }
}

impl LocalService {
    /// A Service that is neither global nor shared, with neither addresses nor backends.
    pub fn new(namespace: Namespace, name: ObjectName) -> Self {
        Self {
            namespace,
            name,
            cluster_ips: Vec::new(),
            ports: Vec::new(),
            backends: BTreeMap::new(),
            global: false,
            shared: false,
            affinity: Affinity::None,
            session_affinity: None,
            internal_traffic_policy: TrafficPolicy::Cluster,
            labels: BTreeMap::new(),
            selector: BTreeMap::new(),
        }
    }

    /// Names of the nodes its backends run on.
    pub fn backend_nodes(&self) -> BTreeSet<&str> {
        self.backends.values().filter_map(|backend| backend.node.as_deref()).collect()
    }
}

impl Serialize for Affinity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Affinity {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::value::ServicePort;

    #[test]
    fn a_service_survives_the_wire() {
        let mut service = LocalService::new("app".parse().expect("valid"), "echo".parse().expect("valid"));
        service.cluster_ips = vec![[10, 96, 0, 1].into()];
        service.ports = vec![LocalPort { name: "http".into(), protocol: Protocol::Tcp, port: 80 }];
        service.backends.insert(
            [10, 244, 0, 7].into(),
            LocalBackend {
                ports: [("http".into(), ServicePort { protocol: Protocol::Tcp, port: 8080 })]
                    .into_iter()
                    .collect(),
                terminating: true,
                node: Some("node-1".to_owned()),
                ..LocalBackend::default()
            },
        );
        service.affinity = Affinity::Local;
        service.session_affinity = Some(10_800);
        service.labels.insert("team".to_owned(), "a".to_owned());
        service.selector.insert("app".to_owned(), "echo".to_owned());
        assert_eq!(LocalService::decode(&service.encode()).expect("valid"), service);
        assert_eq!(service.backend_nodes(), BTreeSet::from(["node-1"]));
    }
}
