use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::mesh::fact::{self, ClusterConfig, Endpoint, NodeAddress, Provenance};
use crate::mesh::{MeshEvent, Own};

/// A mesh and its peers, kept up to date event by event.
struct Kept {
    mesh: Mesh,
    peers: Peers,
}

impl Kept {
    fn new() -> Self {
        let own = Own { cluster: "alpha".into(), id: 1, node: "a0".into(), identity_shift: 16 };
        Self { mesh: Mesh::new(own), peers: Peers::default() }
    }

    fn two_clusters() -> Self {
        let mut kept = Self::new();
        kept.tell(described("beta", 2));
        kept.tell(described("gamma", 3));
        kept.tell(node("alpha", 1, "a0", "172.18.1.1", "10.1.0.0/24", key(100)));
        kept
    }

    fn tell(&mut self, event: MeshEvent) {
        let mut changes = Changes::default();
        // A refusal is an outcome like any other.
        let _ = self.mesh.apply(event, Provenance::default(), &mut changes);
        self.peers.update(&self.mesh, &changes);
    }

    fn peer(&self, name: &str) -> Option<(PublicKey, IpAddr, Vec<String>)> {
        let (_, peer) = self.peers.all().find(|(id, _)| &*id.name == name)?;
        Some((peer.key, peer.address, peer.allowed.iter().map(ToString::to_string).collect()))
    }

    fn allowed(&self, name: &str) -> Vec<String> {
        self.peer(name).map(|(.., allowed)| allowed).unwrap_or_default()
    }
}

fn key(number: u8) -> WireguardKey {
    WireguardKey::Key(PublicKey::new([number; 32]))
}

fn described(cluster: &str, id: u16) -> MeshEvent {
    MeshEvent::Cluster {
        cluster: cluster.into(),
        config: ClusterConfig { id, slices_only: false, draining: false },
    }
}

fn node(cluster: &str, id: u16, name: &str, ip: &str, range: &str, key: WireguardKey) -> MeshEvent {
    let node = fact::Node {
        cluster_id: id,
        addresses: vec![NodeAddress { ip: ip.parse().expect("an address"), internal: true }],
        pod_cidrs: vec![range.parse().expect("a range")],
        wireguard_key: key,
        encryption_key: 255,
        ..fact::Node::default()
    };
    MeshEvent::Node { cluster: cluster.into(), name: name.into(), node: Some(node) }
}

fn pod(cluster: &str, id: u16, ip: &str, host: &str) -> MeshEvent {
    let prefix = IpNet::from(ip.parse::<IpAddr>().expect("an address"));
    let host = Some(host.parse().expect("an address"));
    let endpoint =
        Endpoint { identity: u32::from(id) << 16 | 7, host, encryption_key: 255, ..Endpoint::default() };
    MeshEvent::Endpoint { cluster: cluster.into(), prefix, endpoint: Some(endpoint) }
}

#[test]
fn a_peer_has_its_nodes_addresses_and_ranges_and_the_pods_that_these_do_not_cover() {
    let mut kept = Kept::two_clusters();
    // The pods come first, as they may.
    kept.tell(pod("beta", 2, "10.2.0.7", "172.18.2.1"));
    kept.tell(pod("beta", 2, "10.77.0.7", "172.18.2.1"));
    assert_eq!(kept.peer("b1"), None);
    kept.tell(node("beta", 2, "b1", "172.18.2.1", "10.2.0.0/24", key(1)));
    assert_eq!(
        kept.peer("b1"),
        Some((
            PublicKey::new([1; 32]),
            "172.18.2.1".parse().expect("an address"),
            vec!["10.2.0.0/24".into(), "10.77.0.7/32".into(), "172.18.2.1/32".into()]
        ))
    );
    assert_eq!(kept.peer("a0"), None, "this node is no peer of its own");
}

#[test]
fn a_pod_inside_another_nodes_range_is_named_and_goes_with_its_node() {
    let mut kept = Kept::two_clusters();
    kept.tell(node("beta", 2, "b1", "172.18.2.1", "10.2.0.0/24", key(1)));
    kept.tell(node("beta", 2, "b2", "172.18.2.2", "10.2.1.0/24", key(2)));
    kept.tell(pod("beta", 2, "10.2.0.9", "172.18.2.2"));
    assert_eq!(kept.allowed("b2"), ["10.2.0.9/32", "10.2.1.0/24", "172.18.2.2/32"]);
    // The pod moves: one look at the pod is enough.
    kept.tell(pod("beta", 2, "10.2.0.9", "172.18.2.1"));
    assert_eq!(kept.allowed("b1"), ["10.2.0.0/24", "172.18.2.1/32"]);
    assert_eq!(kept.allowed("b2"), ["10.2.1.0/24", "172.18.2.2/32"]);
    // The node changes its address; the pod's host is nobody for a while.
    kept.tell(node("beta", 2, "b1", "172.18.2.9", "10.2.0.0/24", key(1)));
    assert_eq!(kept.allowed("b1"), ["10.2.0.0/24", "172.18.2.9/32"]);
    kept.tell(MeshEvent::Node { cluster: "beta".into(), name: "b1".into(), node: None });
    assert_eq!(kept.peer("b1"), None);
}

#[test]
fn a_change_concerns_the_node_that_it_is_about() {
    let mut kept = Kept::two_clusters();
    for number in 0..200_u8 {
        let (ip, range) = (format!("172.18.2.{number}"), format!("10.2.{number}.0/24"));
        kept.tell(node("beta", 2, &format!("b{number}"), &ip, &range, key(number)));
    }
    kept.peers.take_dirty();
    kept.tell(pod("beta", 2, "10.2.5.7", "172.18.2.5"));
    assert_eq!(kept.peers.take_dirty().len(), 0, "the node's range covers the pod");
    kept.tell(pod("beta", 2, "10.88.5.7", "172.18.2.5"));
    let dirty: Vec<_> = kept.peers.take_dirty().into_iter().map(|id| id.name).collect();
    assert_eq!(dirty, ["b5".into()]);
}

#[test]
fn of_two_nodes_with_one_key_the_first_keeps_it_and_the_other_is_named_with_it() {
    let mut kept = Kept::two_clusters();
    kept.tell(node("gamma", 3, "g1", "172.18.3.1", "10.3.0.0/24", key(1)));
    kept.peers.settle();
    kept.tell(node("beta", 2, "b1", "172.18.2.1", "10.2.0.0/24", key(1)));
    assert!(kept.peer("g1").is_some());
    assert_eq!(kept.peer("b1"), None);
    let news = kept.peers.take_news();
    assert_eq!(news.len(), 1);
    assert_eq!((&*news[0].node, &*news[0].cluster), ("b1", "beta"));
    assert_eq!(
        news[0].reason,
        KeyProblem::Duplicate { node: "g1".into(), cluster: "gamma".into() },
        "both are named"
    );
    // The first lets it go, and the second has it at once.
    kept.tell(node("gamma", 3, "g1", "172.18.3.1", "10.3.0.0/24", key(9)));
    assert!(kept.peer("g1").is_some() && kept.peer("b1").is_some());
    assert_eq!(kept.peers.refused(), []);
}

#[test]
fn what_was_a_peer_before_the_agent_started_keeps_its_key() {
    let mut kept = Kept::two_clusters();
    kept.peers.remember(PublicKey::new([1; 32]), "172.18.3.1".parse().expect("an address"));
    kept.tell(node("beta", 2, "b1", "172.18.2.1", "10.2.0.0/24", key(1)));
    kept.tell(node("gamma", 3, "g1", "172.18.3.1", "10.3.0.0/24", key(1)));
    assert!(kept.peer("g1").is_some() && kept.peer("b1").is_none());
}

#[test]
fn this_nodes_own_key_and_what_is_no_key_are_nobodys() {
    let mut kept = Kept::two_clusters();
    kept.tell(node("beta", 2, "b1", "172.18.2.1", "10.2.0.0/24", key(100)));
    kept.tell(node("beta", 2, "b2", "172.18.2.2", "10.2.1.0/24", WireguardKey::Invalid));
    kept.tell(node("beta", 2, "b3", "172.18.2.3", "10.2.2.0/24", WireguardKey::None));
    kept.peers.set_own_keys(BTreeSet::from([PublicKey::new([100; 32])]));
    let mut refused: Vec<_> =
        kept.peers.refused().into_iter().map(|refused| (refused.node.to_string(), refused.reason)).collect();
    refused.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(refused, [("b1".into(), KeyProblem::Own), ("b2".into(), KeyProblem::Invalid)]);
    assert_eq!(kept.peers.all().count(), 0);
    kept.peers.set_own_keys(BTreeSet::from([PublicKey::new([101; 32])]));
    assert!(kept.peer("b1").is_some(), "the key is this node's no longer");
}

#[test]
fn a_hostile_peer_gets_no_prefix_of_a_third_cluster() {
    let mut kept = Kept::two_clusters();
    kept.tell(node("gamma", 3, "g1", "172.18.3.1", "10.3.0.0/24", key(3)));
    kept.tell(pod("gamma", 3, "10.3.0.7", "172.18.3.1"));
    kept.mesh.settle();
    kept.peers.settle();
    // It claims gamma's pod for its own node, and gamma's range, node and half of the range for more nodes.
    kept.tell(node("beta", 2, "evil", "172.18.2.1", "10.2.0.0/24", key(1)));
    kept.tell(pod("beta", 2, "10.3.0.7", "172.18.2.1"));
    kept.tell(pod("beta", 2, "10.2.0.8", "172.18.3.1"));
    kept.tell(node("beta", 2, "evil2", "172.18.2.2", "10.3.0.0/24", key(2)));
    kept.tell(node("beta", 2, "evil3", "172.18.3.1", "10.3.0.0/25", key(4)));
    assert_eq!(kept.allowed("g1"), ["10.3.0.0/24", "172.18.3.1/32"]);
    assert_eq!(kept.allowed("evil"), ["10.2.0.0/24", "172.18.2.1/32"]);
    assert_eq!(kept.allowed("evil2"), ["172.18.2.2/32"]);
    assert_eq!(kept.allowed("evil3"), ["10.2.0.8/32"], "its own pod may be wherever it says");
}

#[derive(Clone, Debug)]
enum Fact {
    Cluster(usize, bool),
    Node(usize, u8, Option<fact::Node>),
    Pod(usize, u8, Option<(u8, u8)>),
}

const CLUSTERS: [&str; 3] = ["alpha", "beta", "gamma"];

fn address(cluster: u8, number: u8) -> IpAddr {
    Ipv4Addr::new(172, 18, cluster, number).into()
}

fn facts() -> impl Strategy<Value = Fact> {
    let node =
        (0..4_u8, 0..3_u8, 22..27_u8, 0..6_u8, any::<bool>()).prop_map(|(ip, range, length, key_of, v6)| {
            let range = IpNet::new(Ipv4Addr::new(10, 0, range, 64).into(), length).expect("a length").trunc();
            let mut addresses = vec![NodeAddress { ip: address(0, ip), internal: true }];
            if v6 {
                addresses
                    .insert(0, NodeAddress { ip: "fd00::1".parse().expect("an address"), internal: true });
            }
            let wireguard_key = match key_of {
                0 => WireguardKey::None,
                1 => WireguardKey::Invalid,
                number => key(number),
            };
            fact::Node { addresses, pod_cidrs: vec![range], wireguard_key, ..fact::Node::default() }
        });
    let some_node = prop::option::weighted(0.8, node);
    prop_oneof![
        1 => (1..3_usize, prop::bool::weighted(0.9)).prop_map(|(cluster, there)| Fact::Cluster(cluster, there)),
        5 => (0..3_usize, 0..4_u8, some_node).prop_map(|(cluster, name, node)| Fact::Node(cluster, name, node)),
        6 => (0..3_usize, 0..16_u8, prop::option::weighted(0.8, (0..3_u8, 0..4_u8)))
            .prop_map(|(cluster, pod, host)| Fact::Pod(cluster, pod, host)),
    ]
}

/// The event, and under what it is the last word.
fn event(fact: &Fact) -> (String, MeshEvent) {
    let cluster = |number: usize| -> Arc<str> { CLUSTERS[number].into() };
    match fact {
        Fact::Cluster(number, true) => {
            (format!("c{number}"), described(CLUSTERS[*number], *number as u16 + 1))
        }
        Fact::Cluster(number, false) => {
            (format!("c{number}"), MeshEvent::ClusterRemoved { cluster: cluster(*number) })
        }
        Fact::Node(number, name, node) => {
            let node = node.clone().map(|node| fact::Node { cluster_id: *number as u16 + 1, ..node });
            let name = format!("{}{name}", &CLUSTERS[*number][..1]);
            (format!("n{name}"), MeshEvent::Node { cluster: cluster(*number), name: name.into(), node })
        }
        Fact::Pod(number, pod, host) => {
            let prefix = IpNet::from(IpAddr::from(Ipv4Addr::new(10, 0, pod % 3, 56 + pod)));
            let endpoint = host.map(|(of, host)| Endpoint {
                identity: (*number as u32 + 1) << 16 | 1,
                host: Some(address(of % 2, host)),
                ..Endpoint::default()
            });
            (format!("p{number}-{pod}"), MeshEvent::Endpoint { cluster: cluster(*number), prefix, endpoint })
        }
    }
}

type Outcome = (BTreeMap<NodeId, (PublicKey, IpAddr, BTreeSet<IpNet>)>, BTreeSet<String>);

fn outcome(peers: &Peers) -> Outcome {
    let all = peers.all().map(|(id, peer)| (id.clone(), (peer.key, peer.address, peer.allowed.clone())));
    (all.collect(), peers.refused().iter().map(|refused| format!("{refused:?}")).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(600) })]

    #[test]
    fn any_order_of_events_ends_in_the_peers_of_the_rebuilt_state(
        facts in prop::collection::vec(facts(), 1..60),
        order in any::<u64>(),
    ) {
        let mut kept = Kept::new();
        // Numbers of clusters are handed out in order of appearance; here in the same order everywhere.
        let begin = |kept: &mut Kept| (1..3).for_each(|number| kept.tell(event(&Fact::Cluster(number, true)).1));
        begin(&mut kept);
        let mut last: BTreeMap<String, Fact> = BTreeMap::new();
        for fact in &facts {
            let (name, event) = event(fact);
            if let Fact::Cluster(number, false) = fact {
                // Everything of it goes; what comes after counts again.
                last.retain(|_, of| !matches!(of, Fact::Node(of, ..) | Fact::Pod(of, ..) if of == number));
            }
            last.insert(name, fact.clone());
            kept.tell(event);
        }
        let mut rest: Vec<&Fact> = last.values().collect();
        let mut state = order | 1;
        for end in (1..rest.len()).rev() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            rest.swap(end, (state >> 33) as usize % (end + 1));
        }
        let mut rebuilt = Kept::new();
        begin(&mut rebuilt);
        let gone = |fact: &&&Fact| matches!(fact, Fact::Cluster(_, false));
        for fact in rest.iter().filter(gone).chain(rest.iter().filter(|fact| !gone(fact))) {
            rebuilt.tell(event(fact).1);
        }
        prop_assert_eq!(outcome(&kept.peers), outcome(&rebuilt.peers));
        let mut anew = Peers::default();
        anew.update_all(&kept.mesh);
        prop_assert_eq!(outcome(&kept.peers), outcome(&anew));
    }
}
