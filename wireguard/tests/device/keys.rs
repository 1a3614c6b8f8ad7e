//! Keys that are exchanged while packets flow.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use isthmus_wireguard::config::{Change, Configurable, DeviceUpdate, PeerUpdate, PresharedKey, PrivateKey};
use isthmus_wireguard::device::{Count, MessageBounds};

use crate::field::{APPLICATION, Field, HandPeer, owns, udp_packet, wait_for};
use crate::netns::{Namespace, join};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Two nodes with a device each, and numbered datagrams that flow both ways all the time.
struct Stream {
    nodes: [Field; 2],
    stop: Arc<AtomicBool>,
    senders: [JoinHandle<u32>; 2],
    receivers: [JoinHandle<Vec<u32>>; 2],
}

/// How long a stream is listened to after it was last heard: longer than anything is under way, on however busy a machine.
const SILENCE: Duration = Duration::from_secs(5);

impl Stream {
    fn begin() -> Self {
        Self::begin_with(MessageBounds::PAPER)
    }

    fn begin_with(bounds: MessageBounds) -> Self {
        let namespaces = [Namespace::new(), Namespace::new()];
        join((&namespaces[0], &["192.0.2.1/24"]), (&namespaces[1], &["192.0.2.2/24"]));
        let [one, other] = namespaces;
        let nodes = [Field::in_namespace(one, 1, bounds), Field::in_namespace(other, 2, bounds)];
        for (node, peer, host) in [(&nodes[0], &nodes[1], 2), (&nodes[1], &nodes[0], 1)] {
            node.peer(PeerUpdate {
                endpoint: Some(([192, 0, 2, host], peer.device.state().listen_port).into()),
                allowed_ips: owns(&[&format!("10.9.0.{host}/32")]),
                ..PeerUpdate::new(peer.key.public_key())
            });
        }
        let stop = Arc::new(AtomicBool::new(false));
        let heard: [Arc<AtomicU32>; 2] = Default::default();
        let receivers = [0, 1].map(|node| {
            let (socket, stop, heard) =
                (nodes[node].application(), Arc::clone(&stop), Arc::clone(&heard[node]));
            std::thread::spawn(move || listen(&socket, &stop, &heard))
        });
        let senders = [0, 1].map(|node| {
            let own = Ipv4Addr::new(10, 9, 0, node as u8 + 1);
            let other = (Ipv4Addr::new(10, 9, 0, 2 - node as u8), APPLICATION).into();
            let socket = nodes[node].socket((own, 0).into());
            let (stop, heard) = (Arc::clone(&stop), Arc::clone(&heard[1 - node]));
            std::thread::spawn(move || talk(&socket, other, &stop, &heard))
        });
        Self { nodes, stop, senders, receivers }
    }

    fn wait_for_packets(&self, more: u64) {
        for node in &self.nodes {
            node.wait_for_count(Count::ReceivedPackets, node.count(Count::ReceivedPackets) + more);
        }
    }

    /// Asserts that every number has arrived, once and in order.
    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.senders.map(|sender| sender.join().expect("no panic"));
        let heard = self.receivers.map(|receiver| receiver.join().expect("no panic"));
        for (sent, heard) in sent.into_iter().zip(heard.into_iter().rev()) {
            assert!(sent > 100, "only {sent} datagrams were sent");
            let wrong = (0..sent).zip(&heard).find(|(expected, heard)| expected != *heard);
            assert_eq!(wrong, None, "of {sent}, {} were heard", heard.len());
            assert_eq!(heard.len(), sent as usize);
        }
    }
}

/// Sends numbers until told to stop, and says how many. No more are under way than fit into every buffer on their path,
/// however slow the machine is.
fn talk(socket: &UdpSocket, to: SocketAddr, stop: &AtomicBool, heard: &AtomicU32) -> u32 {
    const UNDER_WAY: u32 = 128;
    let mut number = 0u32;
    while !stop.load(Ordering::Relaxed) {
        if number - heard.load(Ordering::Relaxed) < UNDER_WAY {
            socket.send_to(&number.to_be_bytes(), to).expect("a route into the tunnel");
            number += 1;
        }
        std::thread::park_timeout(Duration::from_micros(300));
    }
    number
}

/// The numbers heard until the sender has stopped and nothing comes any more.
fn listen(socket: &UdpSocket, stop: &AtomicBool, heard: &AtomicU32) -> Vec<u32> {
    socket.set_read_timeout(Some(SILENCE)).expect("a timeout");
    let mut numbers = Vec::new();
    let mut buffer = [0; 4];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok(_) => {
                numbers.push(u32::from_be_bytes(buffer));
                heard.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) if stop.load(Ordering::Relaxed) => return numbers,
            Err(_) => {}
        }
    }
}

#[test]
fn a_node_exchanges_its_key_and_no_packet_is_lost() {
    let stream = Stream::begin();
    let [turning, other] = &stream.nodes;
    stream.wait_for_packets(200);
    let (old, new) = (turning.key.public_key(), PrivateKey::generate());

    turning.apply(DeviceUpdate { next_private_key: Change::Set(new.clone()), ..DeviceUpdate::default() });
    stream.wait_for_packets(200);

    // The other node learns the new key, and shakes hands under it before anything moves there.
    let endpoint = other.device.state().peers[0].endpoint;
    let successor_of = Some(old);
    other.peer(PeerUpdate { endpoint, successor_of, ..PeerUpdate::new(new.public_key()) });
    wait_for("the turning node to send under its next key", || {
        let state = turning.device.state();
        (state.peers[0].session_key == Some(new.public_key())).then_some(())
    });
    stream.wait_for_packets(200);

    let moved = PeerUpdate { allowed_ips: owns(&["10.9.0.1/32"]), ..PeerUpdate::new(new.public_key()) };
    other.peer(moved);
    stream.wait_for_packets(200);
    other.peer(PeerUpdate::removal(old));
    stream.wait_for_packets(200);

    let promoted = DeviceUpdate {
        private_key: Change::Set(new.clone()),
        next_private_key: Change::Clear,
        ..DeviceUpdate::default()
    };
    turning.apply(promoted);
    stream.wait_for_packets(200);
    let state = turning.device.state();
    assert_eq!((state.private_key, state.next_private_key), (Some(new), None));
    let state = other.device.state();
    assert_eq!(state.peers.len(), 1);
    assert_eq!(state.peers[0].successor_of, None);
    for node in &stream.nodes {
        assert_eq!(node.count(Count::ForgedSource), 0);
    }
    stream.end();
}

#[test]
fn prefixes_may_move_to_the_new_key_before_there_is_a_session_under_it() {
    let stream = Stream::begin();
    let [turning, other] = &stream.nodes;
    stream.wait_for_packets(200);
    let (old, new) = (turning.key.public_key(), PrivateKey::generate());
    turning.apply(DeviceUpdate { next_private_key: Change::Set(new.clone()), ..DeviceUpdate::default() });
    other.peer(PeerUpdate {
        endpoint: other.device.state().peers[0].endpoint,
        successor_of: Some(old),
        allowed_ips: owns(&["10.9.0.1/32"]),
        ..PeerUpdate::new(new.public_key())
    });
    stream.wait_for_packets(400);
    stream.end();
}

#[test]
fn a_preshared_key_that_changes_on_one_side_and_then_the_other_costs_no_packet() {
    let stream = Stream::begin();
    stream.wait_for_packets(200);
    let key = PresharedKey::from_bytes([3; 32]).unwrap();
    let keys = stream.nodes.each_ref().map(|node| node.key.public_key());
    for (node, peer) in [(&stream.nodes[0], keys[1]), (&stream.nodes[1], keys[0])] {
        node.peer(PeerUpdate { preshared_key: Change::Set(key.clone()), ..PeerUpdate::new(peer) });
        stream.wait_for_packets(200);
    }
    stream.end();
}

#[test]
fn sessions_that_follow_each_other_under_load_lose_no_packet() {
    // The paper's bound is 2^60 messages; here a session is old after 2,000, which is still longer than what Tunn's
    // clock tells apart: of two sessions of one tick it may go back to the earlier.
    let stream = Stream::begin_with(MessageBounds { rekey: 2000, ..MessageBounds::PAPER });
    for node in &stream.nodes {
        node.wait_for_count(Count::Handshakes, 6);
    }
    stream.end();
}

#[test]
fn a_private_key_that_is_replaced_at_once_is_not_used_any_more() {
    let field = Field::new();
    let mut peer = field.hand_peer(LOCALHOST, &["10.9.7.0/24"]);
    peer.shake_hands();
    field.wait_for_count(Count::Handshakes, 1);
    let private_key = Change::Set(PrivateKey::generate());
    field.apply(DeviceUpdate { private_key, ..DeviceUpdate::default() });
    peer.send(&udp_packet("10.9.7.1".parse().unwrap(), b"?"));
    field.wait_for_count(Count::UnknownSession, 1);
    let message = peer.initiation();
    peer.send_raw(&message);
    field.wait_for_count(Count::BadMac, 1);
}

#[test]
fn a_handshake_counts_when_the_peer_has_shown_that_it_has_the_session() {
    let field = Field::new();
    let application = field.application();
    let mut peer = field.hand_peer(LOCALHOST, &["10.9.7.0/24"]);
    let initiation = peer.initiation();
    let before = SystemTime::now();
    peer.send_raw(&initiation);
    let response = peer.receive_raw();
    assert_eq!(response[0], 2);
    assert_eq!(field.device.state().peers[0].last_handshake, None);
    // Nothing goes out on it yet, either.
    application.send_to(b"waits", "10.9.7.1:9999").unwrap();
    let keepalive = peer.take(&response).unwrap();
    peer.send_raw(&keepalive);
    assert_eq!(peer.receive().split_off(28), b"waits");
    let shown = field.device.state().peers[0].last_handshake.expect("a handshake");
    assert!(before <= shown && shown <= SystemTime::now());
}

#[test]
fn a_removed_peer_is_a_stranger() {
    let field = Field::new();
    let mut peer = field.hand_peer(LOCALHOST, &["10.9.7.0/24"]);
    peer.shake_hands();
    field.wait_for_count(Count::Handshakes, 1);
    field.peer(PeerUpdate::removal(peer.public_key()));
    peer.send(&udp_packet("10.9.7.1".parse().unwrap(), b"?"));
    field.wait_for_count(Count::UnknownSession, 1);
    let mut again = HandPeer::new(&field, peer.key.clone(), field.key.public_key(), LOCALHOST);
    let initiation = again.initiation();
    again.send_raw(&initiation);
    field.wait_for_count(Count::UnknownKey, 1);
}
