use std::time::SystemTime;

use isthmus_wireguard::config::PeerState;

use super::*;
use crate::mesh::fact::{self, NodeAddress, Provenance, WireguardKey};
use crate::mesh::{Changes, Mesh, MeshEvent, Own};

const PORT: u16 = 51871;

/// A mesh, the agent's idea of the device, and the device: it does what it is told and no more.
struct Node {
    mesh: Mesh,
    peers: Peers,
    device: Device,
    real: DeviceState,
    now: Moment,
    kernel: bool,
}

impl Node {
    fn new(kernel: bool) -> Self {
        let own = Own { cluster: "alpha".into(), id: 1, node: "a0".into(), identity_shift: 16 };
        Self {
            mesh: Mesh::new(own),
            peers: Peers::default(),
            device: Device::new(kernel, PORT),
            real: DeviceState::default(),
            now: Moment::default(),
            kernel,
        }
    }

    fn at(&self) -> Circumstances {
        Circumstances { now: self.now, published: true }
    }

    fn node(&mut self, name: &str, ip: &str, range: &str, key: Option<u8>) {
        let node = fact::Node {
            cluster_id: 1,
            addresses: vec![NodeAddress { ip: ip.parse().expect("an address"), internal: true }],
            pod_cidrs: vec![range.parse().expect("a range")],
            wireguard_key: key.map_or(WireguardKey::None, |number| WireguardKey::Key(public(number))),
            ..fact::Node::default()
        };
        self.event(MeshEvent::Node { cluster: "alpha".into(), name: name.into(), node: Some(node) });
    }

    fn event(&mut self, event: MeshEvent) {
        let mut changes = Changes::default();
        self.mesh.apply(event, Provenance::default(), &mut changes).expect("of the own cluster");
        self.peers.update(&self.mesh, &changes);
        let dirty = self.peers.take_dirty();
        let updates = self.device.changed(&dirty, &self.peers, self.at());
        self.apply(updates);
    }

    fn settle(&mut self) {
        self.peers.settle();
        let updates = self.device.all(&self.peers, self.at());
        self.apply(updates);
    }

    fn later(&mut self, by: Duration) -> usize {
        self.now.0 += by;
        let updates = self.device.progress(&self.real.clone(), &self.peers, self.at());
        let count = updates.len();
        self.apply(updates);
        count
    }

    fn handshake(&mut self, key: u8) {
        let peer = self.real.peers.iter_mut().find(|peer| peer.public_key == public(key));
        peer.expect("a peer").last_handshake = Some(SystemTime::now());
    }

    /// A new agent over the same device: it knows nothing but what the device says.
    fn restart(&mut self) {
        let mut fresh = Self::new(self.kernel);
        fresh.real = self.real.clone();
        fresh.now = self.now;
        fresh.device.adopt(&fresh.real);
        *self = fresh;
    }

    fn apply(&mut self, updates: Vec<PeerUpdate>) {
        for update in updates {
            assert!(!self.kernel || update.successor_of.is_none(), "the kernel has no successors");
            let key = update.public_key;
            if update.remove {
                self.real.peers.retain(|peer| peer.public_key != key);
                continue;
            }
            if self.real.peer(&key).is_none() {
                if update.update_only {
                    continue;
                }
                self.real.peers.push(PeerState::new(key));
            }
            for change in &update.allowed_ips {
                let (AllowedIp::Add(prefix) | AllowedIp::Remove(prefix)) = change;
                assert!(!self.kernel || matches!(change, AllowedIp::Add(_)), "older kernels cannot");
                let owner =
                    |peer: &&mut PeerState| matches!(change, AllowedIp::Add(_)) || peer.public_key == key;
                let others = self.real.peers.iter_mut().filter(owner);
                others.for_each(|peer| peer.allowed_ips.retain(|has| has != prefix));
            }
            let peer = self.real.peers.iter_mut().find(|peer| peer.public_key == key).expect("just made");
            if update.replace_allowed_ips {
                peer.allowed_ips.clear();
            }
            peer.allowed_ips.extend(update.allowed_ips.iter().filter_map(|change| match change {
                AllowedIp::Add(prefix) => Some(*prefix),
                AllowedIp::Remove(_) => None,
            }));
            peer.endpoint = update.endpoint.or(peer.endpoint);
            peer.successor_of = update.successor_of.or(peer.successor_of);
            if let Some(seconds) = update.persistent_keepalive {
                peer.persistent_keepalive = seconds.try_into().ok();
            }
        }
    }

    /// Key and prefixes of every peer of the device.
    fn shown(&self) -> BTreeMap<u8, Vec<String>> {
        let peer = |peer: &PeerState| {
            let mut allowed: Vec<String> = peer.allowed_ips.iter().map(ToString::to_string).collect();
            allowed.sort();
            (peer.public_key.as_bytes()[0], allowed)
        };
        self.real.peers.iter().map(peer).collect()
    }
}

fn public(number: u8) -> PublicKey {
    PublicKey::new([number; 32])
}

fn of(peers: &[(u8, &[&str])]) -> BTreeMap<u8, Vec<String>> {
    peers.iter().map(|(key, allowed)| (*key, allowed.iter().map(ToString::to_string).collect())).collect()
}

const B: [&str; 2] = ["10.1.1.0/24", "172.18.1.2/32"];
const C: [&str; 2] = ["10.1.2.0/24", "172.18.1.3/32"];

fn two(node: &mut Node) {
    node.node("b", "172.18.1.2", "10.1.1.0/24", Some(1));
    node.node("c", "172.18.1.3", "10.1.2.0/24", Some(2));
}

#[test]
fn every_node_with_a_key_is_a_peer_and_one_that_leaves_is_none() {
    for kernel in [false, true] {
        let mut node = Node::new(kernel);
        two(&mut node);
        node.node("d", "172.18.1.4", "10.1.3.0/24", None);
        node.settle();
        assert_eq!(node.shown(), of(&[(1, &B), (2, &C)]));
        assert_eq!(node.real.peers[0].endpoint.expect("told").port(), PORT);
        node.node("c", "172.18.1.3", "10.1.9.0/24", Some(2));
        assert_eq!(node.shown()[&2], ["10.1.9.0/24", "172.18.1.3/32"]);
        node.event(MeshEvent::Node { cluster: "alpha".into(), name: "b".into(), node: None });
        assert_eq!(node.shown().keys().collect::<Vec<_>>(), [&2]);
    }
}

#[test]
fn a_restarted_agent_changes_nothing_in_the_device_and_takes_nothing_away_until_it_has_read_the_mesh() {
    for kernel in [false, true] {
        let mut node = Node::new(kernel);
        two(&mut node);
        node.settle();
        node.later(GREETING);
        let before = node.real.clone();

        node.restart();
        node.node("b", "172.18.1.2", "10.1.1.0/24", Some(1));
        assert_eq!(node.real, before, "c has not been read yet");
        node.node("c", "172.18.1.3", "10.1.2.0/24", Some(2));
        node.settle();
        assert_eq!(node.real, before);

        node.restart();
        node.node("b", "172.18.1.2", "10.1.1.0/24", Some(1));
        node.settle();
        assert_eq!(node.shown(), of(&[(1, &B)]), "c is gone for good");
    }
}

#[test]
fn a_device_that_lost_everything_is_told_everything_again() {
    let mut node = Node::new(false);
    two(&mut node);
    node.settle();
    node.real = DeviceState::default();
    node.device.adopt(&node.real);
    let updates = node.device.all(&node.peers, node.at());
    node.apply(updates);
    assert_eq!(node.shown(), of(&[(1, &B), (2, &C)]));
    assert!(node.device.all(&node.peers, node.at()).is_empty());
}

#[test]
fn a_new_key_takes_over_after_its_first_handshake_and_the_former_goes_when_it_can_no_longer_be_in_use() {
    let mut node = Node::new(false);
    two(&mut node);
    node.settle();
    node.later(GREETING);
    assert!(node.device.is_calm());

    node.node("b", "172.18.1.2", "10.1.1.0/24", Some(11));
    assert_eq!(node.shown(), of(&[(1, &B), (2, &C), (11, &[])]), "the former one still has everything");
    let new = node.real.peer(&public(11)).expect("made");
    assert_eq!((new.successor_of, new.persistent_keepalive.map(u16::from)), (Some(public(1)), Some(1)));
    node.later(Duration::from_secs(5));
    assert_eq!(node.shown()[&1], B, "no handshake yet");

    node.handshake(11);
    node.later(Duration::from_secs(1));
    assert_eq!(node.shown(), of(&[(1, &[]), (2, &C), (11, &B)]));
    assert_eq!(node.real.peer(&public(11)).expect("there").persistent_keepalive, None);
    // What changes meanwhile goes to the new one.
    node.node("b", "172.18.1.2", "10.1.8.0/24", Some(11));
    assert_eq!(node.shown()[&11], ["10.1.8.0/24", "172.18.1.2/32"]);
    node.later(REJECT_AFTER);
    assert_eq!(node.shown().keys().collect::<Vec<_>>(), [&2, &11]);
    assert!(node.device.is_calm());
}

#[test]
fn a_new_key_that_never_answers_takes_over_in_the_end() {
    let mut node = Node::new(false);
    two(&mut node);
    node.settle();
    node.node("b", "172.18.1.2", "10.1.1.0/24", Some(11));
    node.later(REJECT_AFTER);
    assert_eq!(node.shown()[&11], B);
}

#[test]
fn a_change_of_mind_returns_to_the_former_key() {
    let mut node = Node::new(false);
    two(&mut node);
    node.settle();
    node.node("b", "172.18.1.2", "10.1.1.0/24", Some(11));
    node.node("b", "172.18.1.2", "10.1.1.0/24", Some(1));
    assert_eq!(node.shown(), of(&[(1, &B), (2, &C)]));
}

#[test]
fn a_restart_amid_a_succession_goes_on_with_it() {
    let mut node = Node::new(false);
    two(&mut node);
    node.settle();
    node.node("b", "172.18.1.2", "10.1.1.0/24", Some(11));
    node.restart();
    node.node("b", "172.18.1.2", "10.1.1.0/24", Some(11));
    node.node("c", "172.18.1.3", "10.1.2.0/24", Some(2));
    node.settle();
    assert_eq!(node.shown(), of(&[(1, &B), (2, &C), (11, &[])]));
    node.handshake(11);
    node.later(Duration::from_secs(1));
    assert_eq!(node.shown(), of(&[(1, &[]), (2, &C), (11, &B)]));
}

#[test]
fn a_key_that_changed_while_no_agent_ran_is_succeeded_too() {
    let mut node = Node::new(false);
    two(&mut node);
    node.settle();
    node.restart();
    node.node("b", "172.18.1.2", "10.1.1.0/24", Some(11));
    assert_eq!(node.shown(), of(&[(1, &B), (2, &C), (11, &[])]));
}

#[test]
fn the_kernels_device_switches_at_once() {
    let mut node = Node::new(true);
    two(&mut node);
    node.settle();
    node.node("b", "172.18.1.2", "10.1.1.0/24", Some(11));
    assert_eq!(node.shown(), of(&[(2, &C), (11, &B)]));
}

#[test]
fn a_key_that_passes_from_node_to_node_stays_a_peer() {
    let mut node = Node::new(false);
    two(&mut node);
    node.settle();
    // The node was renamed: the old name goes while the new one is there already.
    node.node("bb", "172.18.1.2", "10.1.1.0/24", Some(1));
    node.event(MeshEvent::Node { cluster: "alpha".into(), name: "b".into(), node: None });
    assert_eq!(node.shown(), of(&[(1, &B), (2, &C)]));
}

#[test]
fn nobody_is_greeted_before_the_own_key_is_known_to_others() {
    let mut node = Node::new(false);
    node.node("b", "172.18.1.2", "10.1.1.0/24", None);
    let mut changes = Changes::default();
    changes.nodes.extend(node.mesh.nodes());
    let dirty = changes.nodes.iter().cloned().collect();
    node.node("b", "172.18.1.2", "10.1.1.0/24", Some(1));
    assert!(node.real.peers[0].persistent_keepalive.is_some());
    node.real = DeviceState::default();
    node.device.adopt(&node.real);
    let quiet = Circumstances { now: node.now, published: false };
    let updates = node.device.changed(&dirty, &node.peers, quiet);
    assert!(updates.iter().all(|update| update.persistent_keepalive.is_none()), "{updates:?}");
}

#[tokio::test]
async fn who_asks_whom_this_node_reaches_has_those_without_a_session_greeted_and_no_others() {
    use crate::encryption::reach::{Pending, Prober, Reach};
    let (status, seen) = tokio::sync::watch::channel(crate::encryption::EncryptionStatus::default());
    status.send_modify(|status| status.ready = true);
    let (prober, mut questions) = Prober::new("alpha", "a0", seen);
    let mut node = Node::new(false);
    two(&mut node);
    node.node("d", "172.18.1.4", "10.1.3.0/24", Some(3));
    node.node("e", "172.18.1.5", "10.1.4.0/24", None);
    node.settle();
    node.later(GREETING);
    // b has a session; c had one long ago; d never had one.
    node.handshake(1);
    let long_ago = SystemTime::now() - Duration::from_secs(600);
    node.real.peers.iter_mut().find(|peer| peer.public_key == public(2)).expect("c").last_handshake =
        Some(long_ago);

    let asked = tokio::spawn({
        let prober = prober.clone();
        async move { prober.ask(None).await }
    });
    let question = questions.recv().await.expect("asked");
    prober.ask(None).await.expect_err("one at a time");
    let state = node.real.clone();
    let at = node.at();
    let (pending, updates) = Pending::begin(question, &state, &mut node.device, &node.peers, at);
    node.apply(updates);
    let greeted = |node: &Node, key| node.real.peer(&public(key)).expect("a peer").persistent_keepalive;
    let all = |node: &Node| [1, 2, 3].map(|key| greeted(node, key).is_some());
    assert_eq!(all(&node), [false, true, true]);

    node.handshake(2);
    node.later(Duration::from_secs(1));
    assert_eq!(all(&node), [false, false, true], "c has answered");
    let pending = pending.proceed(&node.real, node.now).expect("d is waited for");
    node.later(Duration::from_secs(6));
    assert_eq!(all(&node), [false, false, false], "everything is as it was");
    assert!(pending.proceed(&node.real, node.now).is_none());
    let report = asked.await.expect("no panic").expect("an answer");
    let reach: Vec<_> = report.nodes.iter().map(|node| (node.node.as_str(), node.reach)).collect();
    let expected =
        [("b", Reach::Session), ("c", Reach::Answered), ("d", Reach::Silent), ("e", Reach::KeyMissing)];
    assert_eq!(reach, expected);
    assert_eq!((report.cluster.as_str(), report.node.as_str()), ("alpha", "a0"));
}
