//! The expected bytes are written down here attribute by attribute, as `include/uapi/linux/wireguard.h` has them.

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, ParseableParametrized};
use netlink_packet_generic::{GenlHeader, GenlMessage};
use netlink_packet_wireguard::WireguardCmd;

use super::*;

const NESTED: u16 = 1 << 15;

/// One attribute: length of header and payload, kind, payload, padding to 4 bytes.
fn nla(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((4 + payload.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn key(number: u32) -> PublicKey {
    let mut bytes = [0x11; KEY_LENGTH];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    PublicKey::new(bytes)
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// `count` different prefixes.
fn prefixes(count: u32) -> Vec<IpNet> {
    (0..count).map(|i| IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + i).into(), 32).unwrap()).collect()
}

/// The whole datagram that goes to the kernel, with family id 0x1c.
fn datagram(cmd: WireguardCmd, attributes: Vec<WireguardAttribute>, flags: u16) -> Vec<u8> {
    let mut message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
    message.set_resolved_family_id(0x1c);
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn only_message(update: &DeviceUpdate) -> Vec<u8> {
    let mut messages = updates("isthmus_wg0", update);
    assert_eq!(messages.len(), 1);
    datagram(WireguardCmd::SetDevice, messages.remove(0), NLM_F_ACK)
}

/// Netlink header, generic netlink header with command 1 and version 1, interface name, then this.
fn set_device(rest: &[u8]) -> Vec<u8> {
    let name = nla(2, b"isthmus_wg0\0");
    let length = 16 + 4 + name.len() + rest.len();
    [
        &(length as u32).to_ne_bytes()[..],
        &0x1cu16.to_ne_bytes(),
        &0x05u16.to_ne_bytes(), // NLM_F_REQUEST | NLM_F_ACK
        &[0; 8],
        &[1, 1, 0, 0],
        &name,
        rest,
    ]
    .concat()
}

#[test]
fn an_update_is_byte_for_byte_what_the_kernel_documents() {
    let private = PrivateKey::generate();
    let update = DeviceUpdate {
        private_key: Change::Set(private.clone()),
        next_private_key: Change::Set(PrivateKey::generate()),
        listen_port: Some(51871),
        fwmark: Some(0xe00),
        replace_peers: true,
        peers: vec![PeerUpdate {
            preshared_key: Change::Set(PresharedKey::from_bytes([0x22; 32]).unwrap()),
            endpoint: Some("192.0.2.1:51871".parse().unwrap()),
            persistent_keepalive: Some(25),
            replace_allowed_ips: true,
            allowed_ips: vec![
                AllowedIp::Add(net("10.1.0.0/16")),
                AllowedIp::Add(net("2001:db8::/64")),
                AllowedIp::Remove(net("10.2.0.0/16")),
            ],
            successor_of: Some(key(2)),
            ..PeerUpdate::new(key(1))
        }],
    };
    let v6 = "2001:db8::".parse::<std::net::Ipv6Addr>().unwrap().octets();
    let allowed = [
        nla(NESTED, &[nla(1, &2u16.to_ne_bytes()), nla(2, &[10, 1, 0, 0]), nla(3, &[16])].concat()),
        nla(NESTED, &[nla(1, &10u16.to_ne_bytes()), nla(2, &v6), nla(3, &[64])].concat()),
        nla(
            NESTED,
            &[
                nla(1, &2u16.to_ne_bytes()),
                nla(2, &[10, 2, 0, 0]),
                nla(3, &[16]),
                nla(4, &1u32.to_ne_bytes()), // WGALLOWEDIP_F_REMOVE_ME
            ]
            .concat(),
        ),
    ]
    .concat();
    // struct sockaddr_in: family, port and address in network order, 8 bytes of nothing.
    let endpoint = [&2u16.to_ne_bytes()[..], &51871u16.to_be_bytes(), &[192, 0, 2, 1], &[0; 8]].concat();
    let peer = [
        nla(1, key(1).as_bytes()),
        nla(3, &2u32.to_ne_bytes()), // WGPEER_F_REPLACE_ALLOWEDIPS
        nla(2, &[0x22; 32]),
        nla(4, &endpoint),
        nla(5, &25u16.to_ne_bytes()),
        nla(9 | NESTED, &allowed),
    ]
    .concat();
    let expected = [
        nla(3, &private.secret().to_bytes()),
        nla(6, &51871u16.to_ne_bytes()),
        nla(7, &0xe00u32.to_ne_bytes()),
        nla(5, &1u32.to_ne_bytes()), // WGDEVICE_F_REPLACE_PEERS
        nla(8 | NESTED, &nla(NESTED, &peer)),
    ]
    .concat();
    assert_eq!(only_message(&update), set_device(&expected));
}

#[test]
fn an_ipv6_endpoint_is_a_sockaddr_in6() {
    let update = DeviceUpdate {
        peers: vec![PeerUpdate {
            endpoint: Some("[2001:db8::1]:51871".parse().unwrap()),
            update_only: true,
            ..PeerUpdate::new(key(1))
        }],
        ..DeviceUpdate::default()
    };
    let address = "2001:db8::1".parse::<std::net::Ipv6Addr>().unwrap().octets();
    // struct sockaddr_in6: family, port, flow, address, scope.
    let endpoint = [&10u16.to_ne_bytes()[..], &51871u16.to_be_bytes(), &[0; 4], &address, &[0; 4]].concat();
    let peer = [nla(1, key(1).as_bytes()), nla(3, &4u32.to_ne_bytes()), nla(4, &endpoint)].concat();
    assert_eq!(only_message(&update), set_device(&nla(8 | NESTED, &nla(NESTED, &peer))));
}

#[test]
fn a_removed_peer_is_its_key_and_a_flag() {
    let mut removal = PeerUpdate::removal(key(1));
    removal.allowed_ips = vec![AllowedIp::Add(net("10.0.0.0/8"))];
    removal.replace_allowed_ips = true;
    removal.update_only = true;
    let update = DeviceUpdate { peers: vec![removal], ..DeviceUpdate::default() };
    let peer = [nla(1, key(1).as_bytes()), nla(3, &1u32.to_ne_bytes())].concat();
    assert_eq!(only_message(&update), set_device(&nla(8 | NESTED, &nla(NESTED, &peer))));
}

#[test]
fn keys_are_taken_away_by_zeros() {
    let update = DeviceUpdate {
        private_key: Change::Clear,
        peers: vec![PeerUpdate { preshared_key: Change::Clear, ..PeerUpdate::new(key(1)) }],
        ..DeviceUpdate::default()
    };
    let peer = [nla(1, key(1).as_bytes()), nla(2, &[0; 32])].concat();
    let expected = [nla(3, &[0; 32]), nla(8 | NESTED, &nla(NESTED, &peer))].concat();
    assert_eq!(only_message(&update), set_device(&expected));
}

#[test]
fn five_thousand_peers_are_several_messages_and_each_peer_is_in_one() {
    let peers = (0..5000).map(|i| PeerUpdate {
        endpoint: Some("192.0.2.1:51871".parse().unwrap()),
        allowed_ips: vec![AllowedIp::Add(prefixes(i + 1)[i as usize])],
        ..PeerUpdate::new(key(i))
    });
    let update = DeviceUpdate {
        replace_peers: true,
        fwmark: Some(1),
        peers: peers.collect(),
        ..DeviceUpdate::default()
    };
    let messages = updates("isthmus_wg0", &update);
    assert!(messages.len() > 5, "{}", messages.len());
    for (number, message) in messages.iter().enumerate() {
        // Replacing peers in a later message would remove those of the earlier ones.
        let flags = WireguardAttribute::Flags(WireguardDeviceFlags::ReplacePeers);
        assert_eq!(message.contains(&flags), number == 0);
        let size = datagram(WireguardCmd::SetDevice, message.clone(), NLM_F_ACK).len();
        assert!(size <= PEERS_PER_MESSAGE + 256, "message {number} has {size} bytes");
    }
    let keys: Vec<_> = peers_of(&messages).map(|(key, _, _)| key).collect();
    assert_eq!(keys, (0..5000).map(key).collect::<Vec<_>>());
}

#[test]
fn a_peer_with_many_prefixes_goes_on_in_later_messages_without_losing_the_first() {
    let all = prefixes(20_000);
    let peer = PeerUpdate {
        replace_allowed_ips: true,
        allowed_ips: all.iter().copied().map(AllowedIp::Add).collect(),
        ..PeerUpdate::new(key(1))
    };
    let update = DeviceUpdate { peers: vec![peer, PeerUpdate::new(key(2))], ..DeviceUpdate::default() };
    let messages = updates("isthmus_wg0", &update);
    let pieces: Vec<_> = peers_of(&messages).collect();
    assert_eq!(pieces[0].1, WireguardPeerFlags::ReplaceAllowedIps);
    let (last, rest) = pieces[1..].split_last().unwrap();
    assert!(rest.iter().all(|(_, flags, _)| *flags == WireguardPeerFlags::UpdateOnly));
    assert_eq!((last.0, last.1), (key(2), WireguardPeerFlags::empty()));
    let sent: Vec<IpNet> = pieces.into_iter().flat_map(|(_, _, prefixes)| prefixes).collect();
    assert_eq!(sent, all);
    for message in messages {
        assert!(datagram(WireguardCmd::SetDevice, message, NLM_F_ACK).len() <= PEERS_PER_MESSAGE + 256);
    }
}

/// Key, flags and prefixes of each peer of all messages.
fn peers_of(
    messages: &[Vec<WireguardAttribute>],
) -> impl Iterator<Item = (PublicKey, WireguardPeerFlags, Vec<IpNet>)> {
    let peers = messages.iter().flatten().filter_map(|attribute| match attribute {
        WireguardAttribute::Peers(peers) => Some(peers.clone()),
        _ => None,
    });
    peers.flatten().map(|peer| {
        let flags = peer.iter().find_map(|attribute| match attribute {
            WireguardPeerAttribute::Flags(flags) => Some(*flags),
            _ => None,
        });
        let mut read = DeviceState::default();
        add_peer(&mut read, peer);
        let peer = read.peers.remove(0);
        (peer.public_key, flags.unwrap_or(WireguardPeerFlags::empty()), peer.allowed_ips)
    })
}

#[test]
fn a_device_is_read_from_the_bytes_that_the_kernel_sends() {
    // struct __kernel_timespec: seconds and nanoseconds, 64 bits each.
    let handshake = [1_700_000_000i64.to_ne_bytes(), 42i64.to_ne_bytes()].concat();
    let allowed = |address: &[u8; 4]| {
        nla(NESTED, &[nla(3, &[32]), nla(1, &2u16.to_ne_bytes()), nla(2, address)].concat())
    };
    let first = [
        nla(1, key(1).as_bytes()),
        nla(2, &[0; 32]),
        nla(6, &handshake),
        nla(5, &25u16.to_ne_bytes()),
        nla(8, &5u64.to_ne_bytes()),
        nla(7, &7u64.to_ne_bytes()),
        nla(10, &1u32.to_ne_bytes()),
        nla(9 | NESTED, &allowed(&[10, 0, 0, 1])),
    ]
    .concat();
    let device =
        [nla(6, &51871u16.to_ne_bytes()), nla(7, &0u32.to_ne_bytes()), nla(1, &7u32.to_ne_bytes())].concat();
    let continued = [nla(1, key(1).as_bytes()), nla(9 | NESTED, &allowed(&[10, 0, 0, 2]))].concat();
    let silent = [nla(1, key(2).as_bytes()), nla(6, &[0; 16])].concat();
    let parts = [
        [device, nla(8 | NESTED, &nla(NESTED, &first))].concat(),
        nla(8 | NESTED, &[nla(NESTED, &continued), nla(NESTED, &silent)].concat()),
    ];
    let parts = parts
        .map(|bytes| WireguardMessage::parse_with_param(&bytes, GenlHeader { cmd: 0, version: 1 }).unwrap());
    let expected = PeerState {
        last_handshake: Some(UNIX_EPOCH + Duration::new(1_700_000_000, 42)),
        rx_bytes: 7,
        tx_bytes: 5,
        persistent_keepalive: NonZeroU16::new(25),
        allowed_ips: vec![net("10.0.0.1/32"), net("10.0.0.2/32")],
        ..PeerState::new(key(1))
    };
    assert_eq!(
        state(parts),
        DeviceState {
            listen_port: 51871,
            peers: vec![expected, PeerState::new(key(2))],
            ..DeviceState::default()
        }
    );
}

#[test]
fn for_older_kernels_a_lost_prefix_is_said_by_what_is_kept() {
    let with = |number, prefixes: &[&str]| PeerState {
        allowed_ips: prefixes.iter().map(|prefix| net(prefix)).collect(),
        ..PeerState::new(key(number))
    };
    let state = DeviceState {
        peers: vec![with(1, &["10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16"]), with(2, &["10.4.0.0/16"])],
        ..DeviceState::default()
    };
    let change = |number, changes: &[AllowedIp]| PeerUpdate {
        allowed_ips: changes.to_vec(),
        ..PeerUpdate::new(key(number))
    };
    let update = DeviceUpdate {
        peers: vec![
            change(2, &[AllowedIp::Add(net("10.3.0.0/16"))]),
            change(1, &[AllowedIp::Remove(net("10.1.0.0/16")), AllowedIp::Remove(net("10.4.0.0/16"))]),
        ],
        ..DeviceUpdate::default()
    };
    let rewritten = without_removals(&update, &state);
    assert_eq!(rewritten.peers[0], update.peers[0]);
    // Neither what it loses, nor what the other has just taken, nor what was never its own.
    assert!(rewritten.peers[1].replace_allowed_ips);
    assert_eq!(rewritten.peers[1].allowed_ips, [AllowedIp::Add(net("10.2.0.0/16"))]);
}
