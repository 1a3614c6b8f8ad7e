use std::net::IpAddr;

use super::fact::{ClusterConfig, Endpoint, Node, NodeAddress};
use super::*;

fn mesh() -> Mesh {
    Mesh::new(Own { cluster: "alpha".into(), id: 1, node: "node-0".into(), identity_shift: 16 })
}

fn tell(mesh: &mut Mesh, event: MeshEvent) -> (Result<(), Refusal>, Changes) {
    let mut changes = Changes::default();
    let verdict = mesh.apply(event, Provenance::default(), &mut changes);
    (verdict, changes)
}

fn described(cluster: &str, id: u16) -> MeshEvent {
    MeshEvent::Cluster {
        cluster: cluster.into(),
        config: ClusterConfig { id, slices_only: false, draining: false },
    }
}

fn pod(cluster: &str, addr: &str, identity: u32, host: &str) -> MeshEvent {
    let endpoint = Endpoint {
        identity,
        host: Some(host.parse().expect("an address")),
        encryption_key: 0,
        ..Endpoint::default()
    };
    MeshEvent::Endpoint { cluster: cluster.into(), prefix: prefix(addr), endpoint: Some(endpoint) }
}

fn node(cluster: &str, id: u16, name: &str, ip: &str, range: &str) -> MeshEvent {
    let node = Node {
        cluster_id: id,
        addresses: vec![NodeAddress { ip: ip.parse().expect("an address"), internal: true }],
        pod_cidrs: vec![range.parse().expect("a range")],
        ..Node::default()
    };
    MeshEvent::Node { cluster: cluster.into(), name: name.into(), node: Some(node) }
}

fn prefix(text: &str) -> IpNet {
    text.parse().unwrap_or_else(|_| IpNet::from(text.parse::<IpAddr>().expect("an address")))
}

fn identity(mesh: &Mesh, addr: &str) -> Option<(u32, u16)> {
    mesh.resolve(prefix(addr)).map(|resolved| (resolved.identity, resolved.cluster))
}

#[test]
fn a_fact_that_comes_before_its_cluster_counts_as_soon_as_the_cluster_is_known() {
    let mut mesh = mesh();
    tell(&mut mesh, pod("beta", "10.2.0.1", 131_100, "172.18.2.1")).0.expect("kept");
    assert_eq!(identity(&mesh, "10.2.0.1"), None);
    let (_, changes) = tell(&mut mesh, described("beta", 2));
    assert!(changes.prefixes.contains(&prefix("10.2.0.1")));
    assert_eq!(identity(&mesh, "10.2.0.1"), Some((131_100, 2)));
}

#[test]
fn a_cluster_keeps_its_id_against_whoever_claims_it_later_and_lets_it_go_when_it_leaves() {
    let mut mesh = mesh();
    tell(&mut mesh, described("beta", 2)).0.expect("free");
    tell(&mut mesh, pod("beta", "10.2.0.1", 131_100, "172.18.2.1")).0.expect("its own");
    let (verdict, changes) = tell(&mut mesh, described("aaa", 2));
    assert!(matches!(verdict, Err(Refusal::IdTaken { id: 2, .. })), "{verdict:?}");
    assert!(changes.prefixes.is_empty());
    tell(&mut mesh, pod("aaa", "10.9.0.1", 131_101, "172.18.9.1")).0.expect("kept");
    assert_eq!(identity(&mesh, "10.9.0.1"), None);

    let (_, changes) = tell(&mut mesh, MeshEvent::ClusterRemoved { cluster: "beta".into() });
    assert_eq!(changes.prefixes.len(), 2);
    assert_eq!(identity(&mesh, "10.2.0.1"), None);
    assert_eq!(identity(&mesh, "10.9.0.1"), Some((131_101, 2)));
}

#[test]
fn the_own_id_is_never_a_peers() {
    let mut mesh = mesh();
    let (verdict, _) = tell(&mut mesh, described("beta", 1));
    assert!(matches!(verdict, Err(Refusal::IdTaken { id: 1, .. })), "{verdict:?}");
    let (verdict, _) = tell(&mut mesh, described("beta", 0));
    assert!(verdict.is_err());
}

#[test]
fn a_peer_has_no_identities_but_its_own_and_the_reserved_ones() {
    let mut mesh = mesh();
    tell(&mut mesh, described("beta", 2)).0.expect("free");
    let (verdict, _) = tell(&mut mesh, pod("beta", "10.2.0.1", 65_600, "172.18.2.1"));
    assert!(matches!(verdict, Err(Refusal::ForeignIdentity { identity: 65_600, .. })), "{verdict:?}");
    assert_eq!(identity(&mesh, "10.2.0.1"), None);

    tell(&mut mesh, pod("beta", "10.2.0.2", reserved::HOST, "172.18.2.1")).0.expect("reserved");
    assert_eq!(
        identity(&mesh, "10.2.0.2"),
        Some((reserved::REMOTE_NODE, 2)),
        "only this node is the host here"
    );
}

#[test]
fn a_peer_cannot_speak_about_the_pods_and_nodes_of_the_own_cluster() {
    let mut mesh = mesh();
    tell(&mut mesh, described("beta", 2)).0.expect("free");
    tell(&mut mesh, pod("beta", "10.1.0.7", 131_100, "172.18.2.1"))
        .0
        .expect("nothing known of that range yet");
    assert_eq!(identity(&mesh, "10.1.0.7"), Some((131_100, 2)));

    let (_, changes) = tell(&mut mesh, node("alpha", 1, "node-1", "172.18.1.2", "10.1.0.0/24"));
    assert!(changes.prefixes.contains(&prefix("10.1.0.7")));
    assert_eq!(identity(&mesh, "10.1.0.7"), None);
    let (verdict, _) = tell(&mut mesh, pod("beta", "10.1.0.8", 131_100, "172.18.2.1"));
    assert!(matches!(verdict, Err(Refusal::ForeignPrefix { .. })), "{verdict:?}");

    let (verdict, _) = tell(&mut mesh, pod("beta", "172.18.1.2", 131_100, "172.18.2.1"));
    assert!(matches!(verdict, Err(Refusal::ForeignPrefix { .. })), "{verdict:?}");
    assert_eq!(identity(&mesh, "172.18.1.2"), Some((reserved::REMOTE_NODE, 0)));
    tell(&mut mesh, MeshEvent::Node { cluster: "alpha".into(), name: "node-1".into(), node: None })
        .0
        .expect("gone");
    assert_eq!(identity(&mesh, "10.1.0.7"), Some((131_100, 2)));
}

#[test]
fn what_is_around_a_part_of_a_nodes_range_is_the_range() {
    let mut mesh = mesh();
    tell(&mut mesh, described("beta", 2)).0.expect("free");
    tell(&mut mesh, node("beta", 2, "node-1", "172.18.2.1", "10.2.0.0/24")).0.expect("its own");
    let around = mesh.around(prefix("10.2.0.128/25")).expect("the range");
    assert_eq!(
        (around.identity, around.host),
        (reserved::WORLD, mesh.resolve(prefix("10.2.0.0/24")).expect("it").host)
    );
    assert_eq!(mesh.around(prefix("10.2.0.0/24")), None, "a range is not around itself");
    assert_eq!(mesh.around(prefix("10.0.0.0/8")), None);
}

/// A hostile peer, whose id is lower than its victim's.
fn hostile(name: &str, ip: &str, range: &str) -> MeshEvent {
    node("evil", 2, name, ip, range)
}

fn mesh_with_a_victim_and_a_hostile_peer() -> Mesh {
    let mut mesh = mesh();
    tell(&mut mesh, described("victim", 3)).0.expect("free");
    tell(&mut mesh, node("victim", 3, "v1", "172.18.3.1", "10.3.0.0/24")).0.expect("its own");
    tell(&mut mesh, pod("victim", "10.3.0.7", 3 << 16 | 7, "172.18.3.1")).0.expect("its own");
    mesh.settle();
    tell(&mut mesh, described("evil", 2)).0.expect("free");
    tell(&mut mesh, hostile("e1", "172.18.2.1", "10.2.0.0/24")).0.expect("its own");
    mesh
}

#[test]
fn a_hostile_peer_takes_no_address_of_a_third_cluster_however_it_claims_it() {
    let claims: [(&str, MeshEvent); 6] = [
        ("a pod", pod("evil", "10.3.0.7", 2 << 16 | 9, "172.18.2.1")),
        ("an unused address", pod("evil", "10.3.0.200", 2 << 16 | 9, "172.18.2.1")),
        ("a node's address as a pod", pod("evil", "172.18.3.1", 2 << 16 | 9, "172.18.2.1")),
        ("the range itself", hostile("e2", "172.18.2.2", "10.3.0.0/24")),
        ("half of the range", hostile("e2", "172.18.2.2", "10.3.0.0/25")),
        ("a node's address", hostile("e2", "172.18.3.1", "10.2.1.0/24")),
    ];
    for (what, claim) in claims {
        let mut mesh = mesh_with_a_victim_and_a_hostile_peer();
        let (verdict, _) = tell(&mut mesh, claim);
        let Err(Refusal::ForeignPrefix { holder, .. }) = verdict else { panic!("{what}: {verdict:?}") };
        assert_eq!(&*holder, "victim", "{what}");
        assert_eq!(identity(&mesh, "10.3.0.7"), Some((3 << 16 | 7, 3)), "{what}");
        assert_eq!(identity(&mesh, "10.3.0.200"), None, "{what}");
        assert_eq!(identity(&mesh, "10.3.0.0/24"), Some((reserved::WORLD, 3)), "{what}");
        assert_eq!(identity(&mesh, "10.3.0.0/25"), None, "{what}");
        assert_eq!(identity(&mesh, "172.18.3.1"), Some((reserved::REMOTE_NODE, 3)), "{what}");
        assert_eq!(mesh.place(prefix("10.3.0.7")).and_then(node_of).as_deref(), Some("v1"), "{what}");
    }
}

#[test]
fn a_hostile_peer_that_claims_the_world_gets_what_nobody_else_has() {
    let mut mesh = mesh_with_a_victim_and_a_hostile_peer();
    tell(&mut mesh, hostile("e2", "172.18.2.2", "10.0.0.0/8")).0.expect("nobody has all of that");
    assert_eq!(identity(&mesh, "10.3.0.0/24"), Some((reserved::WORLD, 3)));
    let (verdict, _) = tell(&mut mesh, pod("evil", "10.3.0.8", 2 << 16 | 9, "172.18.2.1"));
    assert!(verdict.is_err());
    tell(&mut mesh, pod("evil", "10.77.0.8", 2 << 16 | 9, "172.18.2.1")).0.expect("nobody's");
}

#[test]
fn a_pod_that_names_another_clusters_node_is_on_none() {
    let mut mesh = mesh_with_a_victim_and_a_hostile_peer();
    tell(&mut mesh, pod("evil", "10.2.0.9", 2 << 16 | 9, "172.18.3.1")).0.expect("its own address");
    let place = mesh.place(prefix("10.2.0.9")).expect("known");
    assert!(matches!(place, Place::Pod { node: None, .. }), "{place:?}");
}

#[test]
fn ranges_that_overlap_from_the_start_are_the_lower_ids_whoever_is_read_first() {
    let mut answers = Vec::new();
    for order in [[0, 1], [1, 0]] {
        let mut mesh = mesh();
        tell(&mut mesh, described("beta", 2)).0.expect("free");
        tell(&mut mesh, described("gamma", 3)).0.expect("free");
        let nodes = [
            node("beta", 2, "b1", "172.18.2.1", "10.9.0.0/24"),
            node("gamma", 3, "g1", "172.18.3.1", "10.9.0.0/24"),
        ];
        for number in order {
            // Whoever loses is told when it comes second.
            let _ = tell(&mut mesh, nodes[number].clone());
        }
        answers.push(mesh.place(prefix("10.9.0.0/24")).and_then(node_of));
    }
    assert_eq!(answers, [Some("b1".into()), Some("b1".into())]);
}

#[test]
fn an_agent_that_starts_again_remembers_who_held_a_range() {
    let mut mesh = mesh();
    mesh.remember(prefix("10.3.0.0/24"), 3);
    tell(&mut mesh, described("evil", 2)).0.expect("free");
    tell(&mut mesh, described("victim", 3)).0.expect("free");
    tell(&mut mesh, hostile("e1", "172.18.2.1", "10.3.0.0/24")).0.expect("nobody else is there yet");
    tell(&mut mesh, node("victim", 3, "v1", "172.18.3.1", "10.3.0.0/24")).0.expect("its own");
    assert_eq!(mesh.place(prefix("10.3.0.0/24")).and_then(node_of).as_deref(), Some("v1"));
}

#[test]
fn a_range_whose_holder_has_left_is_anybodys() {
    let mut mesh = mesh_with_a_victim_and_a_hostile_peer();
    assert!(tell(&mut mesh, pod("evil", "10.3.0.8", 2 << 16 | 9, "172.18.2.1")).0.is_err());
    let (_, changes) = tell(&mut mesh, MeshEvent::ClusterRemoved { cluster: "victim".into() });
    assert!(changes.prefixes.contains(&prefix("10.3.0.8")));
    assert_eq!(identity(&mesh, "10.3.0.8"), Some((2 << 16 | 9, 2)));
}

fn node_of(place: Place) -> Option<Arc<str>> {
    match place {
        Place::Node(node, _) => Some(node.name),
        Place::Pod { node, .. } => node.map(|node| node.name),
    }
}

#[test]
fn this_node_is_the_host_and_its_pods_need_no_tunnel() {
    let mut mesh = mesh();
    tell(&mut mesh, pod("alpha", "10.1.0.1", 65_600, "172.18.1.1")).0.expect("its own");
    tell(&mut mesh, pod("alpha", "10.1.1.1", 65_600, "172.18.1.2")).0.expect("its own");
    let (_, changes) = tell(&mut mesh, node("alpha", 1, "node-0", "172.18.1.1", "10.1.0.0/24"));
    assert!(changes.prefixes.contains(&prefix("10.1.0.1")), "its tunnel endpoint turned out to be here");
    tell(&mut mesh, node("alpha", 1, "node-1", "172.18.1.2", "10.1.1.0/24")).0.expect("its own");

    assert_eq!(identity(&mesh, "172.18.1.1"), Some((reserved::HOST, 0)));
    assert_eq!(identity(&mesh, "172.18.1.2"), Some((reserved::REMOTE_NODE, 0)));
    let host = |addr| mesh.resolve(prefix(addr)).expect("known").host;
    assert_eq!(host("10.1.0.1"), None);
    assert_eq!(host("10.1.0.0/24"), None);
    assert_eq!(host("10.1.1.1"), Some("172.18.1.2".parse().expect("an address")));
    assert_eq!(identity(&mesh, "10.1.1.0/24"), Some((reserved::WORLD, 0)), "until a pod's entry arrives");
}

#[test]
fn of_two_peers_that_name_one_address_the_lower_id_counts_whoever_came_first() {
    for order in [["beta", "gamma"], ["gamma", "beta"]] {
        let mut mesh = mesh();
        for cluster in order {
            let id = if cluster == "beta" { 2 } else { 3 };
            tell(&mut mesh, described(cluster, id)).0.expect("free");
            tell(&mut mesh, pod(cluster, "10.9.0.1", u32::from(id) << 16 | 7, "172.18.9.1"))
                .0
                .expect("its own");
        }
        assert_eq!(identity(&mesh, "10.9.0.1"), Some((2 << 16 | 7, 2)));
    }
}

#[test]
fn an_event_touches_what_it_is_about_and_nothing_else() {
    let mut mesh = mesh();
    tell(&mut mesh, described("beta", 2)).0.expect("free");
    for number in 0..1000_u32 {
        let addr = IpAddr::from((0x0a02_0000 + number).to_be_bytes()).to_string();
        tell(&mut mesh, pod("beta", &addr, 131_100, "172.18.2.1")).0.expect("its own");
    }
    let (_, changes) = tell(&mut mesh, pod("beta", "10.2.0.5", 131_101, "172.18.2.1"));
    assert_eq!(changes.prefixes, HashSet::from([prefix("10.2.0.5")]));
    assert!(changes.services.is_empty() && !changes.synced);
}

#[test]
fn what_an_address_costs_in_memory_does_not_creep() {
    assert!(size_of::<(IpNet, Claimant)>() + size_of::<Claim>() <= 120);
}

#[test]
fn a_cluster_names_the_ports_of_its_own_identities_and_of_no_others() {
    let named = |cluster: &str, addr: &str, identity: u32, port: u16| {
        let mut ports = NamedPorts::new();
        ports.insert("http", isthmus_policy::model::Transport::Tcp, port);
        let endpoint = Endpoint { identity, named_ports: Some(Arc::new(ports)), ..Endpoint::default() };
        MeshEvent::Endpoint { cluster: cluster.into(), prefix: prefix(addr), endpoint: Some(endpoint) }
    };
    let numbers =
        |mesh: &Mesh, id: u32| mesh.named_ports(id).iter().map(|port| port.port).collect::<Vec<u16>>();
    let mut mesh = mesh();
    let (_, changes) = tell(&mut mesh, named("alpha", "10.1.0.1", 65_537, 80));
    assert!(changes.identities.contains(&65_537));
    tell(&mut mesh, described("beta", 2)).0.expect("a cluster");
    tell(&mut mesh, named("beta", "10.2.0.1", 131_073, 8080)).0.expect("its own");
    tell(&mut mesh, named("beta", "10.2.0.2", 65_537, 22)).0.expect_err("another's");
    tell(&mut mesh, named("beta", "10.2.0.3", 6, 22)).0.expect("reserved ones belong to all");
    assert_eq!((numbers(&mesh, 65_537), numbers(&mesh, 131_073)), (vec![80], vec![8080]));
    assert!(numbers(&mesh, 6).is_empty());
    let (_, changes) = tell(&mut mesh, MeshEvent::ClusterRemoved { cluster: "beta".into() });
    assert!(changes.identities.contains(&131_073) && numbers(&mesh, 131_073).is_empty());
}
