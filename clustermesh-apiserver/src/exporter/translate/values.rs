//! Facts as keys and values of the wire format.
//!
//! Keys are `None` for names that Kubernetes would never admit.

use std::collections::BTreeMap;
use std::net::IpAddr;

use bytes::Bytes;
use isthmus_wire::annotation::Affinity;
use isthmus_wire::key::ObjectKey;
use isthmus_wire::local::{LocalBackend, LocalNamespace, LocalPort, LocalService, PolicyKind};
use isthmus_wire::value::{
    NodeAddress, PodCidr, PortName, ServicePort, ServicePorts, TrafficPolicy, Zone, ZoneHint,
};
use isthmus_wire::{ClusterService, IpEntry, IpIdentityPair, Key, Node, NumericIdentity, Tree};

use super::super::facts::{
    BackendState, EndpointFact, Name, NamespaceFact, NodeFact, ServiceFact, policy_key,
};
use super::Settings;
use super::services::Merged;

pub(crate) fn node_key(settings: &Settings, name: &Name) -> Option<Bytes> {
    let name = name.name.parse().ok()?;
    Some(Key::Node { tree: Tree::State, cluster: settings.cluster.clone(), name }.to_bytes())
}

pub(crate) fn node(settings: &Settings, fact: &NodeFact) -> Option<Bytes> {
    let ranges = |ipv4: bool| {
        let mut ranges =
            fact.pod_cidrs.iter().filter(move |range| range.addr().is_ipv4() == ipv4).copied().map(PodCidr);
        (ranges.next(), ranges.collect())
    };
    let (ipv4_pod_cidr, ipv4_secondary_pod_cidrs) = ranges(true);
    let (ipv6_pod_cidr, ipv6_secondary_pod_cidrs) = ranges(false);
    let map = |map: &BTreeMap<String, String>| (!map.is_empty()).then(|| map.clone());
    let node = Node {
        addresses: fact.addresses.iter().map(|(kind, ip)| NodeAddress::new(kind.clone(), *ip)).collect(),
        ipv4_pod_cidr,
        ipv4_secondary_pod_cidrs,
        ipv6_pod_cidr,
        ipv6_secondary_pod_cidrs,
        ipv4_health_ip: fact.health.0,
        ipv6_health_ip: fact.health.1,
        ipv4_ingress_ip: fact.ingress.0,
        ipv6_ingress_ip: fact.ingress.1,
        encryption_key: fact.encryption_key,
        labels: map(&fact.labels),
        annotations: map(&fact.annotations),
        wireguard_public_key: fact.wireguard_key.clone(),
        boot_id: fact.boot_id.clone(),
        ..Node::new(settings.cluster.clone(), settings.cluster_id, fact.name.name.parse().ok()?)
    };
    Some(node.encode())
}

pub(crate) fn identity_key(name: &Name) -> Option<Bytes> {
    let id = NumericIdentity(name.name.parse().ok()?);
    Some(Key::Identity { mirror_of: None, id }.to_bytes())
}

pub(crate) fn address_key(address: IpAddr) -> Bytes {
    Key::Ip { mirror_of: None, entry: IpEntry::Host(address) }.to_bytes()
}

pub(crate) fn address(
    address: IpAddr,
    pod: &EndpointFact,
    identity: u32,
    host_ip: Option<IpAddr>,
    key: u8,
) -> Bytes {
    IpIdentityPair {
        host_ip,
        key,
        namespace: pod.name.namespace.to_string(),
        pod_name: pod.name.name.to_string(),
        service_account: pod.service_account.to_string(),
        named_ports: pod.named_ports.clone(),
        ..IpIdentityPair::new(address, NumericIdentity(identity))
    }
    .encode()
}

pub(crate) fn service_key(settings: &Settings, name: &Name) -> Option<Bytes> {
    let key = ObjectKey {
        tree: Tree::State,
        cluster: settings.cluster.clone(),
        namespace: name.namespace.parse().ok()?,
        name: name.name.parse().ok()?,
    };
    Some(Key::Service(key).to_bytes())
}

pub(crate) fn service(
    settings: &Settings,
    fact: &ServiceFact,
    backends: &BTreeMap<IpAddr, Merged<'_>>,
) -> Option<Bytes> {
    let listens: ServicePorts = fact.ports.iter().cloned().collect();
    let zone = |merged: &Merged<'_>| {
        let backend = merged.backend;
        (backend.zone.is_some() || !backend.for_zones.is_empty()).then(|| Zone {
            zone: backend.zone.clone().unwrap_or_default(),
            for_zones: Some(backend.for_zones.iter().map(|name| ZoneHint { name: name.clone() }).collect()),
        })
    };
    let service = ClusterService {
        frontends: fact.cluster_ips.iter().map(|ip| (*ip, listens.clone())).collect(),
        backends: backends.iter().map(|(ip, merged)| (*ip, ServicePorts(merged.ports.clone()))).collect(),
        hostnames: backends
            .iter()
            .filter_map(|(ip, merged)| Some((*ip, merged.backend.hostname.clone()?)))
            .collect(),
        zones: backends.iter().filter_map(|(ip, merged)| Some((*ip, zone(merged)?))).collect(),
        labels: fact.labels.clone(),
        selector: fact.selector.clone(),
        include_external: fact.global,
        shared: fact.shared,
        ..ClusterService::new(
            settings.cluster.clone(),
            settings.cluster_id,
            fact.name.namespace.parse().ok()?,
            fact.name.name.parse().ok()?,
        )
    };
    Some(service.encode())
}

pub(crate) fn local_service_key(name: &Name) -> Option<Bytes> {
    let key = Key::LocalService { namespace: name.namespace.parse().ok()?, name: name.name.parse().ok()? };
    Some(key.to_bytes())
}

/// `in_mesh`: whether the namespace takes part. If not, the service is as good as not global.
pub(crate) fn local_service(
    fact: &ServiceFact,
    backends: &BTreeMap<IpAddr, Merged<'_>>,
    in_mesh: bool,
) -> Option<Bytes> {
    let backend = |merged: &Merged<'_>| LocalBackend {
        ports: ServicePorts(merged.ports.clone()),
        terminating: merged.state == BackendState::Terminating,
        node: merged.backend.node.clone(),
        zone: merged.backend.zone.clone(),
        for_zones: merged.backend.for_zones.clone(),
    };
    let port = |(name, port): &(PortName, ServicePort)| LocalPort {
        name: name.clone(),
        protocol: port.protocol,
        port: port.port,
    };
    let service = LocalService {
        cluster_ips: fact.cluster_ips.clone(),
        ports: fact.ports.iter().map(port).collect(),
        backends: backends.iter().map(|(ip, merged)| (*ip, backend(merged))).collect(),
        global: fact.global && in_mesh,
        shared: fact.shared && in_mesh,
        affinity: if in_mesh { fact.affinity } else { Affinity::None },
        session_affinity: fact.session_affinity,
        internal_traffic_policy: if fact.internal_local {
            TrafficPolicy::Local
        } else {
            TrafficPolicy::Cluster
        },
        labels: fact.labels.clone(),
        selector: fact.selector.clone(),
        ..LocalService::new(fact.name.namespace.parse().ok()?, fact.name.name.parse().ok()?)
    };
    Some(service.encode())
}

pub(crate) fn local_policy_key(kind: PolicyKind, name: &Name) -> Option<Bytes> {
    Some(Key::LocalPolicy(policy_key(kind, name)?).to_bytes())
}

pub(crate) fn local_namespace_key(name: &Name) -> Option<Bytes> {
    Some(Key::LocalNamespace(name.name.parse().ok()?).to_bytes())
}

pub(crate) fn local_namespace(fact: &NamespaceFact) -> Bytes {
    LocalNamespace { labels: fact.labels.clone() }.encode()
}
