//! The translation as a whole: objects in, keys out.

mod cost;
mod identities;
mod property;

use std::collections::BTreeMap;
use std::time::Duration;

use isthmus_crds::{CiliumEndpoint, CiliumIdentity, CiliumNode};
use isthmus_wire::local::LocalService;
use isthmus_wire::{ClusterService, IpIdentityPair};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::exporter::facts::Source;

/// A translation, and the store and the identity objects that it would fill.
pub(super) struct World {
    pub translator: Translator,
    pub keys: BTreeMap<String, String>,
    pub completed: Vec<Section>,
    /// What was asked of the Kubernetes API and not yet answered.
    pub asked: Vec<IdentityAction>,
    pub findings: Vec<String>,
    pub writes: usize,
}

impl World {
    pub(super) fn new(allocates: bool) -> Self {
        Self::with(Settings {
            cluster: "real-a".parse().expect("a name"),
            cluster_id: 3.try_into().expect("an id"),
            max_connected_clusters: MaxConnectedClusters::default(),
            namespaces_are_global: true,
            allocates,
        })
    }

    fn with(settings: Settings) -> Self {
        Self {
            translator: Translator::new(settings),
            keys: BTreeMap::new(),
            completed: Vec::new(),
            asked: Vec::new(),
            findings: Vec::new(),
            writes: 0,
        }
    }

    /// A world whose lists are complete, with the namespace `app`.
    fn running() -> Self {
        let mut world = Self::new(true);
        world.lists_end();
        world.namespace("app", json!({}));
        world
    }

    pub(super) fn apply(&mut self, input: Input) {
        self.translator.apply(input);
        self.drain();
    }

    pub(super) fn drain(&mut self) {
        let output = self.translator.drain();
        for write in output.writes {
            self.writes += 1;
            let key = String::from_utf8(write.key.to_vec()).expect("text");
            match write.value {
                Some(value) => {
                    self.keys.insert(key, String::from_utf8(value.to_vec()).expect("text"));
                }
                None => {
                    assert!(self.keys.remove(&key).is_some(), "deleted {key}, which is not there");
                }
            }
        }
        self.completed.extend(output.completed);
        self.asked.extend(output.identities);
        self.findings.extend(
            output
                .findings
                .into_iter()
                .map(|(kind, name, finding)| format!("{kind} {name}: {}", finding.message)),
        );
    }

    pub(super) fn lists_end(&mut self) {
        for input in [
            Input::Namespace(Event::ListEnds),
            Input::Service(Event::ListEnds),
            Input::Slice(Event::ListEnds),
            Input::Node(Event::ListEnds),
            Input::Endpoint(Event::ListEnds),
            Input::Identity(Event::ListEnds),
        ] {
            self.apply(input);
        }
        for kind in PolicyKind::ALL {
            self.apply(Input::Policy(kind, Event::ListEnds));
        }
    }

    /// Does what was asked for, as a Kubernetes API does it that nobody else uses.
    pub(super) fn answer(&mut self) {
        while let Some(action) = self.asked.pop() {
            self.apply(answer(&action));
        }
    }

    fn namespace(&mut self, name: &str, annotations: Value) {
        self.apply(Input::Namespace(Event::Applied(namespace(name, annotations))));
    }

    fn value(&self, key: &str) -> &str {
        self.keys.get(key).unwrap_or_else(|| panic!("no key {key}, only {:#?}", self.keys))
    }

    fn service(&self, name: &str) -> ClusterService {
        ClusterService::decode(self.value(&format!("cilium/state/services/v1/real-a/{name}")).as_bytes())
            .expect("a service")
    }

    fn local_service(&self, name: &str) -> LocalService {
        LocalService::decode(self.value(&format!("isthmus/services/v1/{name}")).as_bytes())
            .expect("a service")
    }

    fn address(&self, ip: &str) -> IpIdentityPair {
        IpIdentityPair::decode(self.value(&format!("cilium/state/ip/v1/default/{ip}")).as_bytes())
            .expect("an address")
    }

    fn has(&self, prefix: &str) -> bool {
        self.keys.keys().any(|key| key.starts_with(prefix))
    }
}

pub(super) fn fact<K: Source + DeserializeOwned>(object: Value) -> K::Fact {
    let object: K = serde_json::from_value(object).expect("an object of the kind");
    object.fact(&mut Vec::new())
}

pub(super) fn answer(action: &IdentityAction) -> Input {
    match action {
        IdentityAction::Create { id, labels } => Input::Identity(Event::Applied(identity(*id, labels))),
        IdentityAction::Delete { id, uid, .. } => {
            Input::Identity(Event::Deleted { name: Name::new("", &id.to_string()), uid: uid.clone() })
        }
    }
}

pub(super) fn identity(id: u32, labels: &Labels) -> IdentityFact {
    let labels: BTreeMap<String, String> =
        labels.iter().map(|(key, label)| (format!("{}:{key}", label.source), label.value.clone())).collect();
    CiliumIdentity::new(id, None, labels).fact(&mut Vec::new())
}

pub(super) fn namespace(name: &str, annotations: Value) -> NamespaceFact {
    fact::<Namespace>(json!({"metadata": {
        "name": name, "annotations": annotations, "labels": {"kubernetes.io/metadata.name": name},
    }}))
}

pub(super) fn pod(name: &str, app: &str, ips: &[&str], created: &str) -> EndpointFact {
    fact::<Pod>(json!({
        "metadata": {"namespace": "app", "name": name, "labels": {"app": app}, "creationTimestamp": created},
        "spec": {"containers": [], "nodeName": "node-1", "serviceAccountName": "default"},
        "status": {
            "phase": "Running", "podIPs": ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>(),
            "hostIPs": [{"ip": "172.18.0.2"}],
        },
    }))
}

pub(super) fn slice(name: &str, addresses: &[&str]) -> SliceFact {
    fact::<EndpointSlice>(json!({
        "metadata": {"namespace": "app", "name": name, "labels": {"kubernetes.io/service-name": "echo"}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": addresses.iter().map(|ip| json!({"addresses": [ip], "nodeName": "node-1"})).collect::<Vec<_>>(),
    }))
}

pub(super) fn service(annotations: Value) -> ServiceFact {
    fact::<Service>(json!({
        "metadata": {"namespace": "app", "name": "echo", "annotations": annotations},
        "spec": {
            "clusterIPs": ["10.96.50.104", "fd00:96::1"], "selector": {"app": "echo"},
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
        },
    }))
}

pub(super) fn node(address: &str) -> NodeFact {
    fact::<Node>(json!({
        "metadata": {"name": "node-1", "labels": {"kubernetes.io/hostname": "node-1"}},
        "spec": {"podCIDRs": ["10.244.0.0/24", "fd00:244::/64", "10.245.0.0/24"]},
        "status": {"addresses": [
            {"type": "InternalIP", "address": address}, {"type": "InternalIP", "address": "fd00:18::2"},
            {"type": "Hostname", "address": "node-1"},
        ]},
    }))
}

const OLD: &str = "2026-01-01T00:00:00Z";
const YOUNG: &str = "2026-01-02T00:00:00Z";
const GLOBAL: &str = "service.cilium.io/global";
const SHARED: &str = "service.cilium.io/shared";

/// What an unmodified Cilium exported for one node, one pod and one global service.
const SAMPLE: &str = include_str!("../../../../../wire/tests/data/cilium-export.jsonl");

#[test]
fn ciliums_own_objects_give_the_bytes_that_cilium_exports() {
    let mut world = World::new(false);
    world.namespace("app", json!({}));
    world.apply(Input::Identity(Event::Listed(fact::<CiliumIdentity>(json!({
        "metadata": {"name": "196915", "uid": "u", "labels": {"io.kubernetes.pod.namespace": "app"}},
        "security-labels": {
            "k8s:app": "echo", "k8s:io.cilium.k8s.policy.cluster": "real-a", "k8s:io.kubernetes.pod.namespace": "app",
        },
    })))));
    world.apply(Input::Node(Event::Listed(fact::<CiliumNode>(json!({
        "metadata": {
            "name": "node-1", "labels": {"kubernetes.io/hostname": "node-1"},
            "annotations": {"network.cilium.io/wg-pub-key": "VRksOB6ZNds4oXWIGfSVpvc0gBhcOWFmzvTDcyvULlI="},
        },
        "spec": {
            "addresses": [{"type": "InternalIP", "ip": "172.18.0.2"}, {"type": "CiliumInternalIP", "ip": "10.244.0.10"}],
            "encryption": {"key": 255}, "health": {"ipv4": "10.244.0.134"}, "ipam": {"podCIDRs": ["10.244.0.0/24"]},
        },
    })))));
    world.apply(Input::Endpoint(Event::Listed(fact::<CiliumEndpoint>(json!({
        "metadata": {"namespace": "app", "name": "echo-1"},
        "status": {
            "identity": {"id": 196915}, "encryption": {"key": 255}, "service-account": "default",
            "networking": {"addressing": [{"ipv4": "10.244.0.77"}], "node": "172.18.0.2"},
        },
    })))));
    world.apply(Input::Service(Event::Listed(fact::<Service>(json!({
        "metadata": {"namespace": "app", "name": "echo", "annotations": {GLOBAL: "true"}},
        "spec": {
            "clusterIP": "10.96.50.104", "clusterIPs": ["10.96.50.104"], "selector": {"app": "echo"},
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
        },
    })))));
    world.apply(Input::Slice(Event::Listed(fact::<EndpointSlice>(json!({
        "metadata": {"namespace": "app", "name": "echo-abc", "labels": {"kubernetes.io/service-name": "echo"}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.244.0.77"], "conditions": {"ready": true}, "zone": "z1"}],
    })))));
    world.lists_end();
    let rows: Vec<Value> = SAMPLE.lines().map(|line| serde_json::from_str(line).expect("a row")).collect();
    let mut compared = 0;
    for row in rows {
        let (key, value) = (row["key"].as_str().expect("a key"), row["value"].as_str().expect("a value"));
        if key.starts_with("cilium/state/") && !key.contains("/serviceexports/") {
            assert_eq!(world.value(key), value, "{key}");
            compared += 1;
        }
    }
    assert_eq!(compared, 4);
    assert!(world.asked.is_empty(), "nothing is allocated where Cilium does it");
    assert_eq!(world.completed.len(), Section::ALL.len());
}

#[test]
fn a_service_is_exported_while_it_is_global_and_shared_in_a_global_namespace() {
    let key = "cilium/state/services/v1/real-a/app/echo";
    for (global, shared, namespace, exported) in [
        (None, None, None, false),
        (Some("true"), None, None, true),
        (Some("TRUE"), Some("true"), Some("true"), true),
        (Some("true"), Some("false"), None, false),
        (Some("true"), None, Some("false"), false),
        (Some("false"), Some("true"), None, false),
        (Some("yes"), None, None, false),
    ] {
        let mut annotations = serde_json::Map::new();
        annotations.extend(global.map(|value| (GLOBAL.to_owned(), json!(value))));
        annotations.extend(shared.map(|value| (SHARED.to_owned(), json!(value))));
        let on_namespace =
            namespace.map_or(json!({}), |value| json!({"clustermesh.cilium.io/global": value}));
        let case = format!("global {global:?} shared {shared:?} namespace {namespace:?}");
        // Whichever comes last.
        let mut world = World::running();
        world.apply(Input::Service(Event::Applied(service(annotations.clone().into()))));
        world.namespace("app", on_namespace.clone());
        assert_eq!(world.keys.contains_key(key), exported, "{case}");
        let mut world = World::running();
        world.namespace("app", on_namespace);
        world.apply(Input::Service(Event::Applied(service(annotations.into()))));
        assert_eq!(world.keys.contains_key(key), exported, "{case}");
        assert!(world.keys.contains_key("isthmus/services/v1/app/echo"), "agents see every service: {case}");
        // And back again.
        world.namespace("app", json!({}));
        world.apply(Input::Service(Event::Applied(service(json!({GLOBAL: "true", SHARED: "false"})))));
        assert!(!world.keys.contains_key(key), "unsharing retracts: {case}");
        world.apply(Input::Service(Event::Deleted { name: Name::new("app", "echo"), uid: String::new() }));
        assert!(!world.keys.contains_key("isthmus/services/v1/app/echo"), "{case}");
    }
}

#[test]
fn a_service_lists_its_addresses_of_both_families_and_the_backends_of_all_its_slices() {
    let mut world = World::running();
    world.apply(Input::Slice(Event::Applied(slice("echo-a", &["10.244.0.1", "10.244.0.2"]))));
    world.apply(Input::Service(Event::Applied(service(json!({GLOBAL: "true"})))));
    world.apply(Input::Slice(Event::Applied(slice("echo-b", &["10.244.0.2", "10.244.0.3"]))));
    let service = world.service("app/echo");
    assert_eq!(service.frontends.len(), 2);
    assert_eq!(service.backends.len(), 3, "a backend in two slices is one backend");
    assert!(service.hostnames.is_empty() && service.zones.is_empty());
    world.apply(Input::Slice(Event::Deleted { name: Name::new("app", "echo-a"), uid: String::new() }));
    assert_eq!(world.service("app/echo").backends.len(), 2);
    assert_eq!(world.local_service("app/echo").backends.len(), 2);
}

#[test]
fn a_terminating_backend_travels_while_it_serves_and_agents_know_that_it_is_on_its_way_out() {
    let mut world = World::running();
    world.apply(Input::Service(Event::Applied(service(json!({GLOBAL: "true"})))));
    world.apply(Input::Slice(Event::Applied(fact::<EndpointSlice>(json!({
        "metadata": {"namespace": "app", "name": "echo-a", "labels": {"kubernetes.io/service-name": "echo"}},
        "addressType": "IPv4", "ports": [{"port": 8080}],
        "endpoints": [
            {"addresses": ["10.244.0.1"], "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.244.0.2"], "conditions": {"ready": false, "serving": false, "terminating": true}},
            {"addresses": ["10.244.0.3"], "conditions": {"ready": true}, "hostname": "echo-3", "zone": "z1",
             "hints": {"forZones": [{"name": "z2"}]}},
        ],
    })))));
    let service = world.service("app/echo");
    assert_eq!(service.backends.len(), 2);
    assert_eq!(service.hostnames.values().collect::<Vec<_>>(), ["echo-3"]);
    assert_eq!(
        serde_json::to_value(
            &service.zones["10.244.0.3".parse::<std::net::IpAddr>().as_ref().expect("an address")]
        )
        .expect("JSON"),
        json!({"zone": "z1", "forZones": [{"name": "z2"}]})
    );
    let local = world.local_service("app/echo");
    let states: Vec<bool> = local.backends.values().map(|backend| backend.terminating).collect();
    assert_eq!(states, [true, false]);
}

#[test]
fn headless_services_travel_without_frontends_and_external_names_not_at_all() {
    for (spec, exported) in [
        (json!({"clusterIP": "None", "ports": [{"name": "http", "port": 80}]}), true),
        (json!({"type": "ExternalName", "externalName": "example.org"}), false),
    ] {
        let mut world = World::running();
        world.apply(Input::Slice(Event::Applied(slice("echo-a", &["10.244.0.1"]))));
        world.apply(Input::Service(Event::Applied(fact::<Service>(json!({
            "metadata": {"namespace": "app", "name": "echo", "annotations": {GLOBAL: "true"}}, "spec": spec,
        })))));
        assert_eq!(world.has("cilium/state/services/"), exported);
        assert!(!world.has("isthmus/services/"), "agents balance neither");
        if exported {
            let service = world.service("app/echo");
            assert!(service.frontends.is_empty());
            assert_eq!(service.backends.len(), 1);
        }
    }
}

#[test]
fn a_pod_has_one_key_per_address_with_the_address_of_its_node() {
    let mut world = World::running();
    world.apply(Input::Node(Event::Applied(node("172.18.0.2"))));
    world.apply(Input::Endpoint(Event::Applied(pod("echo-1", "echo", &["10.244.0.7", "fd00:244::7"], OLD))));
    assert!(!world.has("cilium/state/ip/"), "an address waits for its identity");
    world.answer();
    let (v4, v6) = (world.address("10.244.0.7"), world.address("fd00:244::7"));
    assert_eq!(v4.id, v6.id);
    assert_eq!(v4.host_ip.expect("a host").to_string(), "172.18.0.2");
    assert_eq!(v6.host_ip.expect("a host").to_string(), "fd00:18::2");
    assert_eq!((v4.key, v4.pod_name.as_str(), v4.service_account.as_str()), (0, "echo-1", "default"));
    assert_eq!(
        world.value(&format!("cilium/state/identities/v1/id/{}", v4.id)),
        "k8s:app=echo;k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=app;\
         k8s:io.cilium.k8s.policy.cluster=real-a;k8s:io.cilium.k8s.policy.serviceaccount=default;\
         k8s:io.kubernetes.pod.namespace=app;"
    );
    world.apply(Input::Node(Event::Applied(node("172.18.0.9"))));
    assert_eq!(
        world.address("10.244.0.7").host_ip.expect("a host").to_string(),
        "172.18.0.9",
        "the node moved"
    );
    world.apply(Input::Endpoint(Event::Deleted { name: Name::new("app", "echo-1"), uid: String::new() }));
    assert!(!world.has("cilium/state/ip/"));
}

#[test]
fn pods_are_marked_as_encrypted_as_soon_as_their_node_publishes_a_key_and_no_longer_than_that() {
    const KEY: &str = "VRksOB6ZNds4oXWIGfSVpvc0gBhcOWFmzvTDcyvULlI=";
    let mut world = World::running();
    world.apply(Input::Node(Event::Applied(node("172.18.0.2"))));
    world.apply(Input::Endpoint(Event::Applied(pod("echo-1", "echo", &["10.244.0.7", "fd00:244::7"], OLD))));
    world.answer();
    let shown = |world: &World| {
        let node = isthmus_wire::Node::decode(world.value("cilium/state/nodes/v1/real-a/node-1").as_bytes());
        let node = node.expect("a node");
        let pods = ["10.244.0.7", "fd00:244::7"].map(|address| world.address(address).key);
        (node.encryption_key, node.wireguard_public_key, pods)
    };
    let plain = (0, String::new(), [0, 0]);
    assert_eq!(shown(&world), plain);
    let published = |role: &str| {
        let labels = BTreeMap::from([(role.to_owned(), String::new())]);
        let (wireguard_key, encryption_key) = (KEY.to_owned(), 255);
        NodeFact { wireguard_key, encryption_key, labels, ..node("172.18.0.2") }
    };
    // That label keeps the node's own traffic unencrypted where Cilium encrypts nodes, not that of its pods.
    for role in ["kubernetes.io/os", "node-role.kubernetes.io/control-plane"] {
        world.apply(Input::Node(Event::Applied(published(role))));
        assert_eq!(shown(&world), (255, KEY.to_owned(), [255, 255]), "{role}");
    }
    world.apply(Input::Node(Event::Applied(node("172.18.0.2"))));
    assert_eq!(shown(&world), plain, "the key is withdrawn");
}

#[test]
fn an_address_that_passes_to_another_pod_is_the_younger_ones_in_any_order_of_events() {
    let old = || Input::Endpoint(Event::Applied(pod("a-old", "echo", &["10.244.0.7"], OLD)));
    let young = || Input::Endpoint(Event::Applied(pod("b-young", "other", &["10.244.0.7"], YOUNG)));
    let gone = || Input::Endpoint(Event::Deleted { name: Name::new("app", "a-old"), uid: String::new() });
    for order in [vec![old(), gone(), young()], vec![old(), young(), gone()], vec![young(), old(), gone()]] {
        let mut world = World::running();
        for input in order {
            world.apply(input);
            world.answer();
        }
        assert_eq!(world.address("10.244.0.7").pod_name, "b-young");
    }
}

#[test]
fn a_namespace_that_leaves_the_mesh_takes_everything_of_it_along_and_brings_it_back() {
    let mut world = World::running();
    world.apply(Input::Endpoint(Event::Applied(pod("echo-1", "echo", &["10.244.0.7"], OLD))));
    world.apply(Input::Service(Event::Applied(service(json!({GLOBAL: "true"})))));
    world.answer();
    let full = world.keys.clone();
    world.namespace("app", json!({"clustermesh.cilium.io/global": "false"}));
    assert!(!world.has("cilium/state/ip/") && !world.has("cilium/state/identities/"), "{:?}", world.keys);
    assert!(!world.has("cilium/state/services/"));
    assert!(!world.local_service("app/echo").global, "agents treat it as local");
    world.namespace("app", json!({}));
    world.answer();
    assert_eq!(world.keys, full);
}

#[test]
fn a_node_exports_its_addresses_and_ranges_of_both_families() {
    let mut world = World::running();
    world.apply(Input::Node(Event::Applied(node("172.18.0.2"))));
    let node = isthmus_wire::Node::decode(world.value("cilium/state/nodes/v1/real-a/node-1").as_bytes())
        .expect("a node");
    assert_eq!(node.addresses.len(), 2);
    assert_eq!(node.ipv4_pod_cidr.expect("a range").to_string(), "10.244.0.0/24");
    assert_eq!(node.ipv4_secondary_pod_cidrs.len(), 1);
    assert_eq!(node.ipv6_pod_cidr.expect("a range").to_string(), "fd00:244::/64");
    assert_eq!(node.source, "custom-resource");
}
