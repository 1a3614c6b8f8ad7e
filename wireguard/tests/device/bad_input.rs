//! What must not get through, cost much, or do harm to others.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use isthmus_wireguard::config::{ApplyError, Configurable, DeviceUpdate, PeerUpdate, PrivateKey, PublicKey};
use isthmus_wireguard::device::Count;

use crate::field::{Field, HandPeer, heard, owns, udp_packet, wait_for};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn inside(host: &str) -> IpAddr {
    host.parse().expect("an address")
}

/// A peer with a session and 10.9.7.0/24.
fn field_with_peer() -> (Field, HandPeer) {
    let field = Field::new();
    let mut peer = field.hand_peer(LOCALHOST, &["10.9.7.0/24"]);
    peer.shake_hands();
    field.wait_for_count(Count::Handshakes, 1);
    (field, peer)
}

#[test]
fn a_peer_cannot_speak_for_an_address_that_a_longer_prefix_gives_to_another() {
    let (field, mut narrow) = field_with_peer();
    let application = field.application();
    let mut wide = field.hand_peer(LOCALHOST, &["10.9.0.0/16"]);
    wide.shake_hands();
    wide.send(&udp_packet(inside("10.9.7.1"), b"forged"));
    wide.send(&udp_packet(inside("192.0.2.1"), b"owned by none"));
    wide.send(&udp_packet(inside("fd09::5"), b"owned by none"));
    wide.send(&udp_packet(inside("10.9.8.1"), b"own"));
    assert_eq!(heard(&application), b"own");
    assert_eq!(field.count(Count::ForgedSource), 3);
    narrow.send(&udp_packet(inside("10.9.7.1"), b"the owner"));
    assert_eq!(heard(&application), b"the owner");
}

#[test]
fn a_datagram_counts_once_however_often_it_comes() {
    let (field, mut peer) = field_with_peer();
    let application = field.application();
    let datagram = peer.seal(&udp_packet(inside("10.9.7.1"), b"once"));
    for _ in 0..50 {
        peer.send_raw(&datagram);
    }
    field.wait_for_count(Count::Replayed, 49);
    peer.send(&udp_packet(inside("10.9.7.1"), b"next"));
    assert_eq!(heard(&application), b"once");
    assert_eq!(heard(&application), b"next");
    assert_eq!(field.count(Count::Replayed), 49);
}

#[test]
fn datagrams_that_come_late_are_taken_within_the_window() {
    let (field, mut peer) = field_with_peer();
    let application = field.application();
    let late = peer.seal(&udp_packet(inside("10.9.7.1"), b"late"));
    let too_late = late.clone();
    for _ in 0..1000 {
        peer.seal(&[]);
    }
    peer.send(&udp_packet(inside("10.9.7.1"), b"early"));
    peer.send_raw(&late);
    assert_eq!((heard(&application), heard(&application)), (b"early".to_vec(), b"late".to_vec()));
    peer.send_raw(&too_late);
    field.wait_for_count(Count::Replayed, 1);
}

#[test]
fn a_datagram_that_was_changed_on_its_way_is_not_taken_and_does_not_use_up_its_number() {
    let (field, mut peer) = field_with_peer();
    let application = field.application();
    let good = peer.seal(&udp_packet(inside("10.9.7.1"), b"good"));
    for place in 16..good.len() {
        let mut bad = good.clone();
        bad[place] ^= 1;
        peer.send_raw(&bad);
    }
    field.wait_for_count(Count::NotAuthentic, good.len() as u64 - 16);
    peer.send_raw(&good);
    assert_eq!(heard(&application), b"good");
}

#[test]
fn garbage_and_pieces_of_messages_are_counted_and_change_nothing() {
    let (field, mut peer) = field_with_peer();
    let application = field.application();
    let stranger = field.socket("127.0.0.1:0".parse().unwrap());
    let whole = peer.seal(&udp_packet(inside("10.9.7.1"), b"whole"));
    let initiation = peer.initiation();
    let mut sent = 0;
    for message in [&whole, &initiation] {
        for length in 1..32 {
            stranger.send_to(&message[..length], peer.device).unwrap();
            sent += 1;
        }
    }
    for kind in 0..=255u8 {
        let mut garbage = [0xa5; 200];
        garbage[0] = kind;
        stranger.send_to(&garbage, peer.device).unwrap();
        sent += 1;
    }
    field.wait_for_count(Count::Malformed, sent);
    let mut unknown = whole.clone();
    unknown[4..8].copy_from_slice(&0xdead_beef_u32.to_le_bytes());
    stranger.send_to(&unknown, peer.device).unwrap();
    // The lane exists, the session does not.
    let mut unknown = whole.clone();
    unknown[4] ^= 7;
    stranger.send_to(&unknown, peer.device).unwrap();
    field.wait_for_count(Count::UnknownSession, 2);
    peer.send_raw(&whole);
    assert_eq!(heard(&application), b"whole");
    // None of it made the device believe that the peer is where the stranger is.
    let endpoint = field.device.state().peers[0].endpoint;
    assert_eq!(endpoint, Some(peer.socket.local_addr().unwrap()));
}

#[test]
fn what_is_encrypted_but_no_ip_packet_is_counted() {
    let (field, mut peer) = field_with_peer();
    for packet in [&[0xff; 40][..], &[0x45, 0, 0xff, 0xff, 1], &[0x60; 39], &[1]] {
        peer.send(packet);
    }
    field.wait_for_count(Count::BadPacket, 4);
}

#[test]
fn handshakes_for_other_keys_of_strangers_or_repeated_are_counted_by_reason() {
    let (field, _peer) = field_with_peer();
    let elsewhere = PrivateKey::generate().public_key();
    let mut lost = HandPeer::new(&field, PrivateKey::generate(), elsewhere, LOCALHOST);
    let message = lost.initiation();
    lost.send_raw(&message);
    field.wait_for_count(Count::BadMac, 1);
    let mut stranger = HandPeer::new(&field, PrivateKey::generate(), field.key.public_key(), LOCALHOST);
    let message = stranger.initiation();
    stranger.send_raw(&message);
    field.wait_for_count(Count::UnknownKey, 1);
    let mut known = field.hand_peer(LOCALHOST, &[]);
    known.shake_hands();
    field.wait_for_count(Count::Handshakes, 2);
    // Of initiations that follow closely on another none is answered: until one is.
    known.socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let old = wait_for("an answer", || {
        let message = known.initiation();
        known.send_raw(&message);
        known.try_receive_raw().is_ok_and(|answer| answer[0] == 2).then_some(message)
    });
    wait_for("the repeated message to be refused", || {
        known.send_raw(&old);
        (field.count(Count::BadHandshake) > 0).then_some(())
    });
}

#[test]
fn who_knows_a_peers_public_key_cannot_keep_the_peer_from_being_answered() {
    let field = Field::new();
    let application = field.application();
    let mut peer = field.hand_peer(LOCALHOST, &["10.9.7.0/24"]);
    // Names the peer, as anybody could: what only the peer can make, the sealed time, is spoilt.
    let mut forged = peer.initiation();
    forged[100] ^= 1;
    sign(&mut forged, field.key.public_key());
    let stranger = field.socket("127.0.0.1:0".parse().unwrap());
    stranger.send_to(&forged, peer.device).unwrap();
    field.wait_for_count(Count::BadHandshake, 1);
    let initiation = peer.initiation();
    // One comes right before each of the peer's own; the handshake thread takes both at once.
    stranger.send_to(&forged, peer.device).unwrap();
    peer.send_raw(&initiation);
    let response = peer.receive_raw();
    let keepalive = peer.take(&response).expect("a keepalive to send");
    peer.send_raw(&keepalive);
    peer.send(&udp_packet(inside("10.9.7.1"), b"myself"));
    assert_eq!(heard(&application), b"myself");
    field.wait_for_count(Count::BadHandshake, 2);
    assert_eq!(field.count(Count::RateLimited), 0);
}

/// Puts the MAC at the end of an initiation right, which needs the receiver's public key alone.
fn sign(initiation: &mut [u8], receiver: PublicKey) {
    let mut hash = Blake2s256::new();
    Digest::update(&mut hash, b"mac1----");
    Digest::update(&mut hash, receiver.as_bytes());
    let mut mac = Blake2sMac::<U16>::new_from_slice(&hash.finalize()).expect("a key of 32 bytes");
    Update::update(&mut mac, &initiation[..116]);
    initiation[116..132].copy_from_slice(&mac.finalize_fixed());
}

#[test]
fn keys_that_agree_on_the_same_secret_with_everyone_cannot_be_peers() {
    let field = Field::new();
    let one = std::array::from_fn(|index| u8::from(index == 0));
    for key in [[0; 32], one] {
        let peer = PeerUpdate { allowed_ips: owns(&["10.9.7.0/24"]), ..PeerUpdate::new(PublicKey::new(key)) };
        let update = DeviceUpdate { peers: vec![peer], ..DeviceUpdate::default() };
        let refused = field.device.apply(update).expect_err("a weak key");
        assert!(matches!(refused, ApplyError::BadPeerKey { .. }), "{refused}");
    }
    let own = PeerUpdate::new(field.key.public_key());
    let refused = field.device.apply(DeviceUpdate { peers: vec![own], ..DeviceUpdate::default() });
    assert!(matches!(refused, Err(ApplyError::BadPeerKey { .. })));
    assert_eq!(field.device.state().peers, []);
}

#[test]
fn a_flood_of_handshakes_is_met_with_cookies_and_others_do_not_notice() {
    let (field, mut peer) = field_with_peer();
    let application = field.application();
    // Messages that know the device's key, from someone who does not read the answers.
    let mut flooder = HandPeer::new(&field, PrivateKey::generate(), field.key.public_key(), LOCALHOST);
    let messages: Vec<_> = (0..64).map(|_| flooder.initiation()).collect();
    let mut number = 0u64;
    wait_for("cookies", || {
        for message in &messages {
            flooder.send_raw(message);
        }
        number += 1;
        peer.send(&udp_packet(inside("10.9.7.1"), &number.to_be_bytes()));
        assert_eq!(heard(&application), number.to_be_bytes());
        (field.count(Count::CookiesSent) > 500).then_some(())
    });
    assert!(field.count(Count::NoCookie) > 500);
    // An honest newcomer proves with the cookie where it is, and is let in while the flood goes on.
    let mut newcomer = field.hand_peer(LOCALHOST, &["10.9.8.0/24"]);
    wait_for("the newcomer to be let in", || {
        for message in &messages {
            flooder.send_raw(message);
        }
        let initiation = newcomer.initiation();
        newcomer.send_raw(&initiation);
        let answer = newcomer.receive_raw();
        if let Some(keepalive) = newcomer.take(&answer) {
            newcomer.send_raw(&keepalive);
            return Some(());
        }
        None
    });
    newcomer.send(&udp_packet(inside("10.9.8.1"), b"hello"));
    assert_eq!(heard(&application), b"hello");
}
