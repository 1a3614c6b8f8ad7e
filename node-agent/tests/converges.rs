//! Whatever the order of events, whatever is repeated, lost and read again, whatever the kernel refuses for a while, and
//! whenever the agent restarts: the maps end up the same. And at no moment does a reader meet a dead slot: the model
//! of the maps panics if one could.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use isthmus_bpf_abi::Protocol;
use isthmus_node_agent::datapath::OpError;
use isthmus_node_agent::mesh::fact::{
    Affinity, Backend, ClusterConfig, Condition, Endpoint, LocalService, Moment, Node, NodeAddress, Port,
    Provenance, RemoteService, RemoteSlice, ServiceName, WireguardKey,
};
use isthmus_node_agent::mesh::{MeshEvent, Own, Resource};
use isthmus_node_agent::plan::model::{MapModel, Visible};
use isthmus_node_agent::reconcile::{Policy, Reconciler};
use proptest::prelude::*;

const CAPACITY: u32 = 4096;
const PEERS: [(&str, [u16; 2]); 2] = [("beta", [2, 12]), ("gamma", [3, 13])];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn any_order_repetition_and_loss_ends_in_the_maps_of_the_rebuilt_state(
        steps in prop::collection::vec(step(), 1..60),
        order in any::<prop::sample::Index>(),
        kube_proxy_replacement in any::<bool>(),
    ) {
        let mut run = Run::new(kube_proxy_replacement);
        for step in steps {
            run.step(step);
        }
        run.heal();
        let mut rebuilt = Run::new(kube_proxy_replacement);
        rebuilt.truth = run.truth.clone();
        rebuilt.report_everything(order.index(usize::MAX));
        rebuilt.heal();
        prop_assert_eq!(run.maps.visible(), rebuilt.maps.visible());
    }

    #[test]
    fn a_restarted_agent_changes_nothing(steps in prop::collection::vec(step(), 1..40), order in any::<prop::sample::Index>()) {
        let mut run = Run::new(true);
        for step in steps {
            run.step(step);
        }
        run.heal();
        let before = run.maps.clone();
        run.restart(order.index(usize::MAX));
        prop_assert_eq!(&before, &run.maps);
        run.heal();
        prop_assert_eq!(&before, &run.maps);
    }
}

/// What an agent is told, and what it must end up with.
struct Run {
    truth: BTreeMap<Key, Value>,
    agent: Reconciler,
    maps: MapModel,
    all_services: bool,
    revision: u64,
    now: Moment,
}

#[derive(Clone, Debug)]
enum Step {
    /// The store changes; the agent hears of it, or does not.
    Change { key: Key, value: Option<Value>, heard: bool, times: u8 },
    /// The agent works off what it has heard; the kernel refuses operations where the pattern has a bit.
    Plan { refused: u64 },
    /// The agent reads everything again.
    Resync(prop::sample::Index),
    /// The agent is replaced by a new one, which finds the maps as they are.
    Restart(prop::sample::Index),
    /// The agent compares the maps with what it wants.
    Compare,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Config(usize),
    Local(u8),
    Remote(usize, u8),
    Slice(usize, u8),
    Node(usize, u8),
    Endpoint(usize, u8),
}

#[derive(Clone, Debug)]
enum Value {
    Config(ClusterConfig),
    Local(LocalService),
    Remote(RemoteService),
    Slice(RemoteSlice),
    Node(Node),
    Endpoint(Endpoint),
}

impl Run {
    fn new(all_services: bool) -> Self {
        let maps = MapModel::default();
        let agent = agent(all_services, &maps);
        Self { truth: BTreeMap::new(), agent, maps, all_services, revision: 0, now: Moment::default() }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Change { key, value, heard, times } => {
                let value = value.filter(|value| fits(&key, value));
                let event = event(&key, value.clone());
                match value {
                    Some(value) => {
                        self.truth.insert(key, value);
                    }
                    None => {
                        self.truth.remove(&key);
                        if let Key::Config(peer) = key {
                            self.truth.retain(|key, _| key.cluster() != Some(peer));
                        }
                    }
                }
                for _ in 0..if heard { times } else { 0 } {
                    self.tell(event.clone());
                }
            }
            Step::Plan { refused } => self.plan(refused),
            Step::Resync(order) => self.report_everything(order.index(usize::MAX)),
            Step::Restart(order) => self.restart(order.index(usize::MAX)),
            Step::Compare => {
                let ops = self.agent.compare(&self.maps.dump());
                let results = self.maps.apply(&ops, |_| None);
                assert!(self.agent.confirm(&ops, &results).is_empty());
            }
        }
    }

    fn restart(&mut self, order: usize) {
        self.agent = agent(self.all_services, &self.maps);
        let mut events = self.all_events();
        shuffle(&mut events, order);
        for (number, event) in events.into_iter().enumerate() {
            self.tell(event);
            if number % 3 == 0 {
                self.plan(0);
            }
        }
        self.tell_synced();
        self.plan(0);
        self.plan(0);
    }

    fn report_everything(&mut self, order: usize) {
        for peer in 0..PEERS.len() {
            if !self.truth.contains_key(&Key::Config(peer)) {
                self.tell(event(&Key::Config(peer), None));
            }
        }
        let mut events = self.all_events();
        shuffle(&mut events, order);
        for event in events {
            self.tell(event);
        }
        for key in all_keys() {
            if !self.truth.contains_key(&key) && !matches!(key, Key::Config(_)) {
                self.tell(event(&key, None));
            }
        }
        self.tell_synced();
    }

    /// Everything arrives in the end, and the kernel takes everything.
    fn heal(&mut self) {
        self.report_everything(0);
        // The time for peers to be read is counted from when the own cluster has been.
        self.plan(0);
        self.now = Moment(self.now.0 + Duration::from_secs(3600));
        for _ in 0..4 {
            self.plan(0);
        }
        assert!(!self.agent.has_to_retry());
        assert!(self.agent.is_started());
    }

    fn plan(&mut self, refused: u64) {
        let (ops, _) = self.agent.plan(self.now, true);
        let mut number = 0;
        let results = self.maps.apply(&ops, |_| {
            number += 1;
            (refused >> (number % 64) & 1 == 1).then_some(OpError::Refused { map: "services", errno: 12 })
        });
        self.agent.confirm(&ops, &results);
    }

    fn tell(&mut self, event: MeshEvent) {
        self.revision += 1;
        // A refusal is a matter of the log; the state is compared in the end.
        let _ = self.agent.event(event, Provenance { revision: self.revision, arrived: self.now });
    }

    fn tell_synced(&mut self) {
        let resources = [
            Resource::ClusterConfigs,
            Resource::Nodes,
            Resource::Endpoints,
            Resource::Services,
            Resource::Slices,
        ];
        for resource in resources {
            self.tell(MeshEvent::Synced { cluster: "alpha".into(), resource });
            for (peer, (name, _)) in PEERS.iter().enumerate() {
                if self.truth.contains_key(&Key::Config(peer)) {
                    self.tell(MeshEvent::Synced { cluster: (*name).into(), resource });
                }
            }
        }
    }

    fn all_events(&self) -> Vec<MeshEvent> {
        self.truth.iter().map(|(key, value)| event(key, Some(value.clone()))).collect()
    }
}

fn agent(all_services: bool, maps: &MapModel) -> Reconciler {
    let own = Own { cluster: "alpha".into(), id: 1, node: "node-0".into(), identity_shift: 16 };
    let policy = Policy { all_services, sync_timeout: Duration::from_secs(60), backend_capacity: CAPACITY };
    Reconciler::new(own, policy, &maps.dump())
}

impl Key {
    fn cluster(&self) -> Option<usize> {
        match self {
            Self::Config(peer) | Self::Remote(peer, _) | Self::Slice(peer, _) => Some(*peer),
            Self::Node(cluster, _) | Self::Endpoint(cluster, _) => cluster.checked_sub(1),
            Self::Local(_) => None,
        }
    }
}

fn all_keys() -> Vec<Key> {
    let mut keys: Vec<_> = (0..SERVICES).map(Key::Local).collect();
    for peer in 0..PEERS.len() {
        keys.push(Key::Config(peer));
        keys.extend((0..SERVICES).map(|service| Key::Remote(peer, service)));
        keys.extend((0..SLICES).map(|slice| Key::Slice(peer, slice)));
    }
    for cluster in 0..=PEERS.len() {
        keys.extend((0..NODES).map(|node| Key::Node(cluster, node)));
        keys.extend((0..PODS).map(|pod| Key::Endpoint(cluster, pod)));
    }
    keys
}

const SERVICES: u8 = 3;
const SLICES: u8 = 3;
const NODES: u8 = 2;
const PODS: u8 = 6;

fn fits(key: &Key, value: &Value) -> bool {
    matches!(
        (key, value),
        (Key::Config(_), Value::Config(_))
            | (Key::Local(_), Value::Local(_))
            | (Key::Remote(..), Value::Remote(_))
            | (Key::Slice(..), Value::Slice(_))
            | (Key::Node(..), Value::Node(_))
            | (Key::Endpoint(..), Value::Endpoint(_))
    )
}

fn event(key: &Key, value: Option<Value>) -> MeshEvent {
    let peer = |peer: &usize| -> Arc<str> { PEERS[*peer].0.into() };
    let cluster =
        |cluster: &usize| -> Arc<str> { cluster.checked_sub(1).map_or("alpha", |peer| PEERS[peer].0).into() };
    match key {
        Key::Config(number) => match value {
            Some(Value::Config(config)) => MeshEvent::Cluster { cluster: peer(number), config },
            _ => MeshEvent::ClusterRemoved { cluster: peer(number) },
        },
        Key::Local(number) => MeshEvent::LocalService {
            name: service(*number),
            service: value.and_then(|value| if let Value::Local(local) = value { Some(local) } else { None }),
        },
        Key::Remote(number, name) => MeshEvent::RemoteService {
            cluster: peer(number),
            name: service(*name),
            service: value
                .and_then(|value| if let Value::Remote(remote) = value { Some(remote) } else { None }),
        },
        Key::Slice(number, name) => MeshEvent::RemoteSlice {
            cluster: peer(number),
            name: ServiceName::new("default", &format!("slice-{name}")),
            slice: value.and_then(|value| if let Value::Slice(slice) = value { Some(slice) } else { None }),
        },
        Key::Node(number, name) => MeshEvent::Node {
            cluster: cluster(number),
            name: format!("node-{name}").into(),
            node: value.and_then(|value| if let Value::Node(node) = value { Some(node) } else { None }),
        },
        Key::Endpoint(number, pod) => MeshEvent::Endpoint {
            cluster: cluster(number),
            prefix: IpNet::from(pod_ip(*pod)),
            endpoint: value
                .and_then(|value| if let Value::Endpoint(endpoint) = value { Some(endpoint) } else { None }),
        },
    }
}

fn service(number: u8) -> ServiceName {
    ServiceName::new("default", &format!("service-{number}"))
}

fn pod_ip(number: u8) -> IpAddr {
    // In the ranges of all clusters in turn.
    Ipv4Addr::new(10, number % 3, number % 2, number).into()
}

/// Ranges of different peers do not overlap: which of two holds them depends on who was there first, on purpose.
/// Everything else may say anything about any address.
fn in_ranges_of(cluster: usize, value: Value) -> Value {
    let Value::Node(mut node) = value else { return value };
    let within = |ip: IpAddr| {
        let IpAddr::V4(ip) = ip else { return ip };
        let [first, _, rest @ ..] = ip.octets();
        Ipv4Addr::new(first, cluster as u8, rest[0], rest[1]).into()
    };
    node.addresses.iter_mut().for_each(|address| address.ip = within(address.ip));
    node.pod_cidrs
        .iter_mut()
        .for_each(|range| *range = IpNet::new(within(range.addr()), 24).expect("a length"));
    Value::Node(node)
}

fn shuffle<T>(items: &mut [T], seed: usize) {
    let mut state = seed as u64 | 1;
    for last in (1..items.len()).rev() {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        items.swap(last, (state >> 33) as usize % (last + 1));
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (change(), prop::bool::weighted(0.8), 1..3_u8)
            .prop_map(|((key, value), heard, times)| Step::Change { key, value, heard, times }),
        4 => prop_oneof![Just(0), any::<u64>()].prop_map(|refused| Step::Plan { refused }),
        1 => any::<prop::sample::Index>().prop_map(Step::Resync),
        1 => any::<prop::sample::Index>().prop_map(Step::Restart),
        1 => Just(Step::Compare),
    ]
}

fn change() -> impl Strategy<Value = (Key, Option<Value>)> {
    let some = |value: BoxedStrategy<Value>| prop::option::weighted(0.8, value);
    let peer = 0..PEERS.len();
    let cluster = 0..PEERS.len() + 1;
    prop_oneof![
        (peer.clone(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.9))
            .prop_map(|(peer, second, slices_only, draining, there)| {
                let id = PEERS[peer].1[usize::from(second)];
                let config = Value::Config(ClusterConfig { id, slices_only, draining });
                (Key::Config(peer), there.then_some(config))
            }),
        (0..SERVICES, some(local().boxed())).prop_map(|(name, value)| (Key::Local(name), value)),
        (peer.clone(), 0..SERVICES, some(remote().boxed()))
            .prop_map(|(peer, name, value)| (Key::Remote(peer, name), value)),
        (peer, 0..SLICES, some(slice().boxed()))
            .prop_map(|(peer, name, value)| (Key::Slice(peer, name), value)),
        (cluster.clone(), 0..NODES, some(node().boxed())).prop_map(|(cluster, name, value)| {
            (Key::Node(cluster, name), value.map(|value| in_ranges_of(cluster, value)))
        }),
        (cluster, 0..PODS, some(endpoint().boxed()))
            .prop_map(|(cluster, pod, value)| (Key::Endpoint(cluster, pod), value)),
    ]
}

fn cluster_id() -> impl Strategy<Value = u16> {
    prop::sample::select(vec![1_u16, 2, 2, 3, 3, 12, 13])
}

fn port() -> impl Strategy<Value = Port> {
    (prop::sample::select(vec!["", "http", "dns"]), any::<bool>(), 80..82_u16).prop_map(
        |(name, udp, number)| Port::new(name, if udp { Protocol::Udp } else { Protocol::Tcp }, number),
    )
}

fn backends() -> impl Strategy<Value = Vec<Backend>> {
    let backend = (0..PODS, prop::collection::vec(port(), 0..3), any::<bool>(), prop::option::of(0..NODES))
        .prop_map(|(pod, ports, terminating, node)| Backend {
            addr: pod_ip(pod),
            ports: ports.into(),
            condition: if terminating { Condition::Terminating } else { Condition::Active },
            node: node.map(|node| format!("node-{node}").into()),
        });
    prop::collection::vec(backend, 0..5)
}

fn local() -> impl Strategy<Value = Value> {
    let affinity = prop::sample::select(vec![Affinity::None, Affinity::Local, Affinity::Remote]);
    let flags = (prop::bool::weighted(0.8), prop::bool::weighted(0.1));
    // Two services may hold one address for a moment.
    let ip = (0..3_u8).prop_map(|ip| IpAddr::from(Ipv4Addr::new(10, 96, 0, ip)));
    (ip, prop::collection::vec(port(), 0..3), backends(), affinity, flags, prop::option::of(1..100_u32))
        .prop_map(|(ip, ports, backends, affinity, (global, node_local), session_affinity_seconds)| {
            Value::Local(LocalService {
                cluster_ips: vec![ip],
                ports,
                backends,
                global,
                affinity,
                session_affinity_seconds,
                node_local,
                ..LocalService::default()
            })
        })
}

fn remote() -> impl Strategy<Value = Value> {
    (cluster_id(), prop::bool::weighted(0.8), prop::bool::weighted(0.8), backends()).prop_map(
        |(cluster_id, shared, global, backends)| {
            Value::Remote(RemoteService { cluster_id, shared, global, backends })
        },
    )
}

fn slice() -> impl Strategy<Value = Value> {
    (cluster_id(), 0..SERVICES, backends()).prop_map(|(cluster_id, name, backends)| {
        Value::Slice(RemoteSlice { cluster_id, service: service(name), backends })
    })
}

fn node() -> impl Strategy<Value = Value> {
    (cluster_id(), 0..PODS, 0..PODS, 0..3_u8).prop_map(|(cluster_id, ip, health, range)| {
        Value::Node(Node {
            cluster_id,
            addresses: vec![NodeAddress { ip: pod_ip(ip), internal: true }],
            pod_cidrs: vec![IpNet::new(Ipv4Addr::new(10, 0, range, 0).into(), 24).expect("a valid prefix")],
            health: vec![pod_ip(health)],
            ingress: Vec::new(),
            encryption_key: 0,
            wireguard_key: WireguardKey::None,
        })
    })
}

fn endpoint() -> impl Strategy<Value = Value> {
    (prop::sample::select(vec![1_u32, 6, 65_600, 131_100, 196_700, 786_500]), 0..PODS).prop_map(
        |(identity, host)| {
            Value::Endpoint(Endpoint {
                identity,
                host: Some(pod_ip(host)),
                encryption_key: 0,
                ..Endpoint::default()
            })
        },
    )
}

#[test]
fn the_model_of_the_maps_starts_empty() {
    assert_eq!(MapModel::default().visible(), Visible::default());
}
