//! What goes through.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use isthmus_wireguard::config::{ApplyError, Configurable, DeviceUpdate, PeerUpdate};
use isthmus_wireguard::device::{Count, MessageBounds};

use crate::field::{APPLICATION, DEADLINE, Field, heard, owns, udp_packet, wait_for};
use crate::netns::{Namespace, join};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

#[test]
fn packets_of_both_families_cross_over_both_families() {
    for outside in [V4, V6] {
        let field = Field::new();
        let application = field.application();
        let mut peer = field.hand_peer(outside, &["10.9.7.0/24", "fd09:7::/48"]);
        peer.shake_hands();
        for inside in ["10.9.7.1", "fd09:7::1"] {
            let inside: IpAddr = inside.parse().unwrap();
            peer.send(&udp_packet(inside, b"ping"));
            assert_eq!(heard(&application), b"ping");
            application.send_to(b"pong", SocketAddr::new(inside, 9999)).unwrap();
            let answer = peer.receive();
            assert_eq!(&answer[answer.len() - 4..], b"pong");
        }
    }
}

#[test]
fn packets_that_come_before_there_is_a_session_wait_for_it_in_their_order() {
    const PACKETS: u8 = 100;
    let field = Field::new();
    let application = field.application();
    let mut peer = field.hand_peer(V4, &["10.9.7.0/24"]);
    let endpoint = Some(peer.socket.local_addr().unwrap());
    field.peer(PeerUpdate { endpoint, ..PeerUpdate::new(peer.public_key()) });
    for number in 0..PACKETS {
        application.send_to(&[number], "10.9.7.1:9999").unwrap();
    }
    peer.answer_handshake();
    for number in 0..PACKETS {
        assert_eq!(peer.receive().last(), Some(&number));
    }
    assert_eq!(field.count(Count::NoSession), 0);
}

#[test]
fn packets_for_a_peer_that_does_not_answer_are_dropped_when_too_many_wait() {
    let field = Field::new();
    let application = field.application();
    let peer = field.hand_peer(V4, &["10.9.7.0/24"]);
    let endpoint = Some(peer.socket.local_addr().unwrap());
    field.peer(PeerUpdate { endpoint, ..PeerUpdate::new(peer.public_key()) });
    let large = [0; 1300];
    wait_for("a full queue", || {
        application.send_to(&large, "10.9.7.1:9999").unwrap();
        (field.count(Count::NoSession) > 100).then_some(())
    });
}

#[test]
fn what_no_peer_owns_or_nobody_knows_the_place_of_is_dropped_and_counted() {
    let field = Field::new();
    let application = field.application();
    let _peer = field.hand_peer(V4, &["10.9.7.0/24"]);
    application.send_to(b"?", "10.9.8.1:9999").unwrap();
    field.wait_for_count(Count::NoPeer, 1);
    application.send_to(b"?", "10.9.7.1:9999").unwrap();
    field.wait_for_count(Count::NoEndpoint, 1);
}

#[test]
fn a_packet_is_padded_so_that_its_exact_length_does_not_show() {
    let field = Field::new();
    let application = field.application();
    let mut peer = field.hand_peer(V4, &["10.9.7.0/24"]);
    peer.shake_hands();
    field.wait_for_count(Count::Handshakes, 1);
    for length in [0, 1, 3, 4, 5, 20, 100, 1391, 1392] {
        let payload = vec![7; length];
        application.send_to(&payload, "10.9.7.1:9999").unwrap();
        let datagram = wait_for("data", || Some(peer.receive_raw()).filter(|message| message[0] == 4));
        let padded = datagram.len() - 32;
        assert_eq!(padded, (28 + length).next_multiple_of(16).min(1420), "payload of {length} bytes");
        let packet = peer.open(&datagram).expect("a packet");
        assert_eq!(packet[28..], payload[..]);
    }
}

#[test]
fn a_peer_that_moves_is_answered_where_it_is_now() {
    let field = Field::new();
    let application = field.application();
    let mut peer = field.hand_peer(V4, &["10.9.7.0/24"]);
    peer.shake_hands();
    peer.send(&udp_packet("10.9.7.1".parse().unwrap(), b"here"));
    assert_eq!(heard(&application), b"here");
    peer.socket = field.socket("127.0.0.5:0".parse().unwrap());
    peer.send(&udp_packet("10.9.7.1".parse().unwrap(), b"there"));
    assert_eq!(heard(&application), b"there");
    application.send_to(b"found", "10.9.7.1:9999").unwrap();
    assert_eq!(peer.receive().split_off(28), b"found");
    let known = field.device.state().peers[0].endpoint;
    assert_eq!(known, Some(peer.socket.local_addr().unwrap()));
}

#[test]
fn an_answer_comes_from_the_address_that_was_asked() {
    let field = Field::new();
    let application = field.application();
    let mut peer = field.hand_peer(V4, &["10.9.7.0/24"]);
    // A second address of the same machine; `receive_raw` compares it.
    peer.device.set_ip("127.0.0.9".parse().unwrap());
    peer.shake_hands();
    field.wait_for_count(Count::Handshakes, 1);
    application.send_to(b"from .9", "10.9.7.1:9999").unwrap();
    assert_eq!(peer.receive().split_off(28), b"from .9");
}

#[test]
fn the_port_can_change_while_packets_flow() {
    let field = Field::new();
    let application = field.application();
    let mut peer = field.hand_peer(V4, &["10.9.7.0/24"]);
    peer.shake_hands();
    field.apply(DeviceUpdate { listen_port: Some(51999), ..DeviceUpdate::default() });
    assert_eq!(field.device.state().listen_port, 51999);
    peer.device.set_port(51999);
    peer.send(&udp_packet("10.9.7.1".parse().unwrap(), b"new port"));
    assert_eq!(heard(&application), b"new port");
}

#[test]
fn a_large_datagram_of_an_application_is_cut_by_nobody_but_ip() {
    let field = Field::new();
    let application = field.application();
    let mut peer = field.hand_peer(V6, &["10.9.7.0/24"]);
    peer.shake_hands();
    field.wait_for_count(Count::Handshakes, 1);
    application.send_to(&[5; 9000], SocketAddr::from(([10, 9, 7, 1], APPLICATION))).unwrap();
    let mut received = 0;
    while received < 9008 {
        received += peer.receive().len() - 20;
    }
    assert_eq!(received, 9008);
}

#[test]
fn a_port_that_is_taken_is_refused_and_the_old_one_stays() {
    let field = Field::new();
    let application = field.application();
    let mut peer = field.hand_peer(V4, &["10.9.7.0/24"]);
    peer.shake_hands();
    let taken = field.socket("0.0.0.0:51998".parse().unwrap());
    let update = DeviceUpdate { listen_port: Some(51998), ..DeviceUpdate::default() };
    let device = Arc::clone(&field.device);
    let refused = field.namespace.enter(move || Ok(device.apply(update))).unwrap();
    assert!(matches!(refused, Err(ApplyError::Listen { port: 51998, .. })), "{refused:?}");
    drop(taken);
    peer.send(&udp_packet("10.9.7.1".parse().unwrap(), b"as before"));
    assert_eq!(heard(&application), b"as before");
}

#[test]
fn a_path_that_is_narrower_than_the_mtu_says_still_carries_everything() {
    const BYTES: usize = 1 << 20;
    let namespaces = [Namespace::new(), Namespace::new()];
    join((&namespaces[0], &["192.0.2.1/24"]), (&namespaces[1], &["192.0.2.2/24"]));
    for namespace in &namespaces {
        namespace.ip("link set eth0 mtu 1300");
    }
    let [one, other] = namespaces;
    let nodes = [
        Field::in_namespace(one, 1, MessageBounds::PAPER),
        Field::in_namespace(other, 2, MessageBounds::PAPER),
    ];
    for (node, peer, host) in [(&nodes[0], &nodes[1], 2), (&nodes[1], &nodes[0], 1)] {
        node.peer(PeerUpdate {
            endpoint: Some(([192, 0, 2, host], peer.device.state().listen_port).into()),
            allowed_ips: owns(&[&format!("10.9.0.{host}/32")]),
            ..PeerUpdate::new(peer.key.public_key())
        });
    }
    let listener = nodes[1].namespace.enter(|| TcpListener::bind("10.9.0.2:7001")).unwrap();
    let mut client = nodes[0].namespace.enter(|| TcpStream::connect("10.9.0.2:7001")).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let sender = std::thread::spawn(move || client.write_all(&vec![3; BYTES]));
    let mut received = Vec::new();
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    server.read_to_end(&mut received).unwrap();
    sender.join().unwrap().unwrap();
    assert_eq!(received.len(), BYTES);
    assert_eq!(nodes[0].count(Count::SendFailed), 0);
}
