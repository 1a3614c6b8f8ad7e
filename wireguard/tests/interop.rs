//! Our device and wireguard-go, which shares no code with it, across network namespaces; both configured and read by stock
//! `wg`. As root, with Debian's `wireguard-go` and `wireguard-tools`.
//!
//! No test waits for a timer of the protocol to run out: what happens after two minutes is brought about, not waited for.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[expect(dead_code, reason = "shared with the benchmark, which uses the rest")]
mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{SystemTime, UNIX_EPOCH};

use support::device::{Device, Make, PORT};
use support::netns::{Namespace, add_address, join};
use support::{DEADLINE, wait_for};

/// The outer addresses of both ends, and one more that the first may move to.
const OUTER_V4: [&str; 3] = ["192.0.2.1", "192.0.2.2", "192.0.2.11"];
const OUTER_V6: [&str; 3] = ["2001:db8::1", "2001:db8::2", "2001:db8::11"];
const INNER_V4: [&str; 2] = ["10.200.0.1", "10.200.0.2"];
const INNER_V6: [&str; 2] = ["fd00:200::1", "fd00:200::2"];

/// Both ends of a tunnel: ours first.
struct Tunnel {
    ends: [Device; 2],
}

impl Tunnel {
    /// Both devices, each knowing the other as a peer without an address.
    fn new() -> Self {
        let namespaces = [Namespace::new(), Namespace::new()];
        let outer: Vec<[String; 2]> =
            (0..2).map(|i| [format!("{}/24", OUTER_V4[i]), format!("{}/64", OUTER_V6[i])]).collect();
        let side = |i: usize| (&namespaces[i], [outer[i][0].as_str(), outer[i][1].as_str()]);
        let (one, other) = (side(0), side(1));
        join((one.0, &one.1), (other.0, &other.1));
        let start = |make, i: usize| {
            let inner = [format!("{}/24", INNER_V4[i]), format!("{}/64", INNER_V6[i])];
            Device::start(make, &namespaces[i], &[&inner[0], &inner[1]])
        };
        let tunnel = Self { ends: [start(Make::Ours, 0), start(Make::WireguardGo, 1)] };
        (0..2).for_each(|i| tunnel.meet(i, ""));
        tunnel
    }

    /// The end `i` knows the other as a peer, with these words of `wg set` more.
    fn meet(&self, i: usize, words: &str) {
        let far = 1 - i;
        let words = format!("allowed-ips {}/32,{}/128 {words}", INNER_V4[far], INNER_V6[far]);
        self.ends[i].peer(self.ends[far].key(), &words);
    }

    /// The end `i` knows where the other is.
    fn find(&self, i: usize, outer: [&str; 3]) {
        self.meet(i, &format!("endpoint {}", socket(outer[1 - i])));
    }

    /// What the end `i` shows about the other.
    fn shown(&self, i: usize) -> support::device::Shown {
        self.ends[i].shown(self.ends[1 - i].key())
    }

    /// A TCP connection from the end `i` to this inner address of the other.
    fn talk(&self, i: usize, inner: [&str; 2]) -> Conversation {
        let address = SocketAddr::new(inner[1 - i].parse().unwrap(), 7);
        Conversation::begin(&self.ends[i].namespace, &self.ends[1 - i].namespace, address)
    }
}

fn socket(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse::<IpAddr>().unwrap(), PORT)
}

/// A TCP connection whose far end says everything back.
struct Conversation(TcpStream);

impl Conversation {
    fn begin(from: &Namespace, to: &Namespace, address: SocketAddr) -> Self {
        let listener = to.enter(move || TcpListener::bind(address)).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            // Ends with the test, whichever way that ends.
            let _ = std::io::copy(&mut &stream, &mut &stream);
        });
        let stream = from.enter(move || TcpStream::connect_timeout(&address, DEADLINE)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Self(stream)
    }

    /// Says so many bytes, and hears them.
    fn echo(&mut self, length: usize) {
        let said: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
        let mut heard = vec![0; length];
        let mut writer = self.0.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| writer.write_all(&said).unwrap());
            self.0.read_exact(&mut heard).unwrap();
        });
        assert!(said == heard, "{length} bytes came back as others");
    }
}

#[test]
fn traffic_of_both_families_crosses_over_both_families_whoever_begins() {
    for outer in [OUTER_V4, OUTER_V6] {
        for who in [0, 1] {
            let tunnel = Tunnel::new();
            tunnel.find(who, outer);
            for inner in [INNER_V4, INNER_V6] {
                tunnel.talk(who, inner).echo(1 << 20);
                tunnel.talk(1 - who, inner).echo(1 << 20);
            }
            // The one that was not told has learnt it.
            assert_eq!(tunnel.shown(1 - who).endpoint, socket(outer[who]).to_string());
        }
    }
}

#[test]
fn packets_of_every_size_come_back_as_they_went() {
    let tunnel = Tunnel::new();
    tunnel.find(0, OUTER_V4);
    for (inner, headers) in [(INNER_V4, 28), (INNER_V6, 48)] {
        let addresses = inner.map(|address| SocketAddr::new(address.parse().unwrap(), 7));
        let open = |i: usize| {
            let socket = tunnel.ends[i].namespace.enter(move || UdpSocket::bind(addresses[i])).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            socket
        };
        let (near, far) = (open(0), open(1));
        tunnel.talk(0, inner).echo(1); // So that no packet is lost to a handshake that has yet to happen.
        let largest = 1420 - headers;
        for size in (0..=96).chain(largest - 32..=largest) {
            let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            let mut buffer = [0; 2048];
            near.send_to(&sent, addresses[1]).unwrap();
            let (length, from) = far.recv_from(&mut buffer).unwrap();
            assert!(buffer[..length] == sent && from == addresses[0], "{size} bytes to wireguard-go");
            far.send_to(&sent, addresses[0]).unwrap();
            let (length, from) = near.recv_from(&mut buffer).unwrap();
            assert!(buffer[..length] == sent && from == addresses[1], "{size} bytes from wireguard-go");
        }
    }
}

#[test]
fn a_new_session_from_either_side_does_not_end_a_connection() {
    let tunnel = Tunnel::new();
    (0..2).for_each(|i| tunnel.find(i, OUTER_V4));
    let mut conversation = tunnel.talk(0, INNER_V4);
    conversation.echo(1 << 16);
    for who in [0, 1, 0, 1] {
        let sent_before = tunnel.shown(1 - who).sent;
        // A peer that is removed takes its sessions with it, so the next packet of this side begins a handshake, while
        // the other side still has the old session.
        tunnel.ends[who].peer(tunnel.ends[1 - who].key(), "remove");
        tunnel.find(who, OUTER_V4);
        tunnel.talk(who, INNER_V6).echo(1000);
        conversation.echo(1 << 16);
        assert_ne!(tunnel.shown(who).handshake, 0);
        assert!(tunnel.shown(1 - who).sent > sent_before);
    }
}

#[test]
fn a_side_that_starts_anew_is_met_again() {
    let mut tunnel = Tunnel::new();
    tunnel.find(0, OUTER_V4);
    tunnel.talk(0, INNER_V4).echo(1000);
    // Ours is restarted; the other still holds a session with what was there before, and the new one has a new key.
    let namespace = tunnel.ends[0].namespace.clone();
    let old = tunnel.ends[0].key();
    tunnel.ends[1].peer(old, "remove");
    let inner = [format!("{}/24", INNER_V4[0]), format!("{}/64", INNER_V6[0])];
    tunnel.ends[0].process.end();
    tunnel.ends[0] = Device::start(Make::Ours, &namespace, &[&inner[0], &inner[1]]);
    (0..2).for_each(|i| tunnel.meet(i, ""));
    tunnel.find(0, OUTER_V4);
    tunnel.talk(0, INNER_V4).echo(1 << 16);
    tunnel.talk(1, INNER_V6).echo(1 << 16);
}

#[test]
fn a_side_that_moves_takes_its_connections_along() {
    for (outer, length) in [(OUTER_V4, 24), (OUTER_V6, 64)] {
        for mover in [0, 1] {
            let tunnel = Tunnel::new();
            (0..2).for_each(|i| tunnel.find(i, outer));
            let mut conversation = tunnel.talk(0, INNER_V4);
            conversation.echo(1 << 16);
            let (old, new) = (format!("{}/{length}", outer[mover]), format!("{}/{length}", outer[2]));
            let delete = format!("address del {old} dev eth0");
            tunnel.ends[mover].namespace.ip_batch(&[delete, add_address("eth0", &new)]);
            // It speaks first: the other cannot know yet.
            tunnel.talk(mover, INNER_V6).echo(1000);
            conversation.echo(1 << 16);
            assert_eq!(tunnel.shown(1 - mover).endpoint, socket(outer[2]).to_string());
        }
    }
}

#[test]
fn a_preshared_key_must_be_the_same_on_both_sides() {
    let tunnel = Tunnel::new();
    let [right, wrong] = ["right", "wrong"].map(|name| {
        let path = tunnel.ends[0].uapi_dir().join(name);
        std::fs::write(&path, tunnel.ends[0].wg(&["genpsk"])).unwrap();
        path
    });
    let share = |i: usize, key: &std::path::Path| {
        tunnel.ends[i].peer(tunnel.ends[1 - i].key(), &format!("preshared-key {}", key.display()));
    };
    share(0, &wrong);
    share(1, &right);
    tunnel.find(0, OUTER_V4);
    // Something to begin a handshake with, every second until there is one.
    tunnel.meet(0, "persistent-keepalive 1");
    let sent = tunnel.shown(1).sent;
    wait_for("an answer to a handshake that cannot be finished", || {
        (tunnel.shown(1).sent > sent).then_some(())
    });
    assert_eq!(tunnel.shown(0).handshake, 0);
    share(0, &right);
    tunnel.talk(0, INNER_V4).echo(1 << 16);
    assert_ne!(tunnel.shown(0).handshake, 0);
}

#[test]
fn keepalives_hold_a_session_on_which_nothing_is_said() {
    let tunnel = Tunnel::new();
    tunnel.find(0, OUTER_V4);
    tunnel.meet(0, "persistent-keepalive 1");
    let first = wait_for("a handshake that no packet asked for", || {
        let shown = tunnel.shown(1);
        (shown.handshake != 0).then_some(shown)
    });
    // 32 bytes each.
    wait_for("three more keepalives", || (tunnel.shown(1).received >= first.received + 3 * 32).then_some(()));
    assert_eq!(tunnel.shown(1).handshake, first.handshake, "one session was enough");
}

#[test]
fn what_wg_shows_of_ours_is_what_it_shows_of_the_other() {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let begun = now();
    let tunnel = Tunnel::new();
    tunnel.find(0, OUTER_V4);
    assert_eq!((tunnel.shown(0).handshake, tunnel.shown(0).received), (0, 0));
    tunnel.talk(0, INNER_V4).echo(1 << 20);
    // Acknowledgements may still be on their way. The other leaves padding out of what it says it has received.
    wait_for("both sides to agree on what was sent and received", || {
        let (ours, other) = (tunnel.shown(0), tunnel.shown(1));
        (ours.received == other.sent && ours.sent >= other.received).then_some(())
    });
    let shown = tunnel.shown(0);
    assert!(shown.sent > 1 << 20 && shown.received > 1 << 20, "{shown:?}");
    assert!((begun..=now()).contains(&shown.handshake), "{shown:?}");
    assert_eq!(shown.endpoint, socket(OUTER_V4[1]).to_string());
    let text = tunnel.ends[0].wg(&["show", "wg0"]);
    assert!(text.contains("latest handshake:") && text.contains("listening port: 51871"), "{text}");
}
