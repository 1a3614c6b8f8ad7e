//! Updates as netlink attributes, within what a message can hold, and a device out of the attributes of an answer.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU16;
use std::time::{Duration, UNIX_EPOCH};

use ipnet::IpNet;
use netlink_packet_core::Nla;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAllowedIpFlags,
    WireguardAttribute, WireguardDeviceFlags, WireguardMessage, WireguardPeer, WireguardPeerAttribute,
    WireguardPeerFlags, WireguardTimeSpec,
};

use crate::config::{
    AllowedIp, Change, DeviceState, DeviceUpdate, KEY_LENGTH, PeerState, PeerUpdate, PresharedKey,
    PrivateKey, PublicKey,
};

/// Bytes of peers in one message. An attribute's length has 16 bits, and all peers are within one attribute.
const PEERS_PER_MESSAGE: usize = 32 << 10;
/// Prefixes in one piece of a peer: at most 48 bytes each.
const PREFIXES_PER_PIECE: usize = 500;

const NO_KEY: [u8; KEY_LENGTH] = [0; KEY_LENGTH];

/// The update as the attributes of one or more messages, to be sent in this order.
///
/// What only our device has (a second private key, successors) is left out.
pub(super) fn updates(interface: &str, update: &DeviceUpdate) -> Vec<Vec<WireguardAttribute>> {
    let mut batches = vec![Vec::new()];
    let mut filled = 0;
    for piece in update.peers.iter().flat_map(pieces) {
        filled += size(&piece);
        if filled > PEERS_PER_MESSAGE {
            filled = size(&piece);
            batches.push(Vec::new());
        }
        if let Some(batch) = batches.last_mut() {
            batch.push(piece);
        }
    }
    let named = |rest: Vec<WireguardAttribute>, peers: Vec<WireguardPeer>| {
        let mut attributes = vec![WireguardAttribute::IfName(interface.to_owned())];
        attributes.extend(rest);
        if !peers.is_empty() {
            attributes.push(WireguardAttribute::Peers(peers));
        }
        attributes
    };
    let mut device = Some(device_attributes(update));
    batches.into_iter().map(|peers| named(device.take().unwrap_or_default(), peers)).collect()
}

/// The same update, without the removal of single prefixes: each peer that loses some is given all it keeps, instead of
/// what it had. `state` is what the device is before it.
pub(super) fn without_removals(update: &DeviceUpdate, state: &DeviceState) -> DeviceUpdate {
    let mut update = update.clone();
    let mut owners = Owners::default();
    if !update.replace_peers {
        for peer in &state.peers {
            peer.allowed_ips.iter().for_each(|prefix| owners.give(*prefix, peer.public_key));
        }
    }
    for peer in &mut update.peers {
        if peer.remove || peer.replace_allowed_ips {
            owners.clear(&peer.public_key);
        }
        let mut loses = false;
        for change in peer.allowed_ips.iter().filter(|_| !peer.remove) {
            match change {
                AllowedIp::Add(prefix) => owners.give(*prefix, peer.public_key),
                AllowedIp::Remove(prefix) => {
                    loses = true;
                    owners.take(prefix, &peer.public_key);
                }
            }
        }
        if loses {
            peer.replace_allowed_ips = true;
            peer.allowed_ips = owners.of(&peer.public_key).map(AllowedIp::Add).collect();
        }
    }
    update
}

/// The device that an answer, in its parts, is about. A peer with many prefixes is spread over several parts.
pub(super) fn state(parts: impl IntoIterator<Item = WireguardMessage>) -> DeviceState {
    let mut state = DeviceState::default();
    for attribute in parts.into_iter().flat_map(|part| part.attributes) {
        match attribute {
            WireguardAttribute::PrivateKey(bytes) => state.private_key = PrivateKey::from_bytes(bytes),
            WireguardAttribute::ListenPort(port) => state.listen_port = port,
            WireguardAttribute::Fwmark(mark) => state.fwmark = mark,
            WireguardAttribute::Peers(peers) => peers.into_iter().for_each(|peer| add_peer(&mut state, peer)),
            _ => {}
        }
    }
    state
}

fn device_attributes(update: &DeviceUpdate) -> Vec<WireguardAttribute> {
    let mut attributes = Vec::new();
    match &update.private_key {
        Change::Keep => {}
        Change::Clear => attributes.push(WireguardAttribute::PrivateKey(NO_KEY)),
        Change::Set(key) => attributes.push(WireguardAttribute::PrivateKey(key.secret().to_bytes())),
    }
    attributes.extend(update.listen_port.map(WireguardAttribute::ListenPort));
    attributes.extend(update.fwmark.map(WireguardAttribute::Fwmark));
    if update.replace_peers {
        attributes.push(WireguardAttribute::Flags(WireguardDeviceFlags::ReplacePeers));
    }
    attributes
}

/// A peer, in as many pieces as its prefixes need. Later pieces add to the first and never make a peer.
fn pieces(peer: &PeerUpdate) -> Vec<WireguardPeer> {
    let key = WireguardPeerAttribute::PublicKey(*peer.public_key.as_bytes());
    let prefixes: &[AllowedIp] = if peer.remove { &[] } else { &peer.allowed_ips };
    let mut chunks = prefixes.chunks(PREFIXES_PER_PIECE);
    let mut first = first_attributes(peer);
    first.extend(chunks.next().map(allowed_ips));
    let rest = chunks.map(|chunk| {
        let flags = WireguardPeerAttribute::Flags(WireguardPeerFlags::UpdateOnly);
        vec![key.clone(), flags, allowed_ips(chunk)]
    });
    std::iter::once(first).chain(rest).map(WireguardPeer).collect()
}

fn first_attributes(peer: &PeerUpdate) -> Vec<WireguardPeerAttribute> {
    let mut flags = WireguardPeerFlags::empty();
    flags.set(WireguardPeerFlags::RemoveMe, peer.remove);
    flags.set(WireguardPeerFlags::UpdateOnly, peer.update_only && !peer.remove);
    flags.set(WireguardPeerFlags::ReplaceAllowedIps, peer.replace_allowed_ips && !peer.remove);
    let mut attributes = vec![WireguardPeerAttribute::PublicKey(*peer.public_key.as_bytes())];
    if !flags.is_empty() {
        attributes.push(WireguardPeerAttribute::Flags(flags));
    }
    if peer.remove {
        return attributes;
    }
    match &peer.preshared_key {
        Change::Keep => {}
        Change::Clear => attributes.push(WireguardPeerAttribute::PresharedKey(NO_KEY)),
        Change::Set(key) => attributes.push(WireguardPeerAttribute::PresharedKey(*key.as_bytes())),
    }
    attributes.extend(peer.endpoint.map(WireguardPeerAttribute::Endpoint));
    attributes.extend(peer.persistent_keepalive.map(WireguardPeerAttribute::PersistentKeepalive));
    attributes
}

fn allowed_ips(changes: &[AllowedIp]) -> WireguardPeerAttribute {
    WireguardPeerAttribute::AllowedIps(changes.iter().map(allowed_ip).collect())
}

fn allowed_ip(change: &AllowedIp) -> WireguardAllowedIp {
    let (prefix, flags) = match change {
        AllowedIp::Add(prefix) => (prefix, None),
        AllowedIp::Remove(prefix) => {
            (prefix, Some(WireguardAllowedIpAttr::Flags(WireguardAllowedIpFlags::RemoveMe)))
        }
    };
    let family = match prefix {
        IpNet::V4(_) => WireguardAddressFamily::Ipv4,
        IpNet::V6(_) => WireguardAddressFamily::Ipv6,
    };
    let mut attributes = vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(prefix.addr()),
        WireguardAllowedIpAttr::Cidr(prefix.prefix_len()),
    ];
    attributes.extend(flags);
    WireguardAllowedIp(attributes)
}

fn add_peer(state: &mut DeviceState, WireguardPeer(attributes): WireguardPeer) {
    let key = attributes.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(bytes) => Some(PublicKey::new(*bytes)),
        _ => None,
    });
    let Some(key) = key else { return };
    if state.peers.last().is_none_or(|last| last.public_key != key) {
        state.peers.push(PeerState::new(key));
    }
    let Some(peer) = state.peers.last_mut() else { return };
    for attribute in attributes {
        match attribute {
            WireguardPeerAttribute::PresharedKey(bytes) => {
                peer.preshared_key = PresharedKey::from_bytes(bytes)
            }
            WireguardPeerAttribute::Endpoint(endpoint) => peer.endpoint = Some(endpoint),
            WireguardPeerAttribute::PersistentKeepalive(seconds) => {
                peer.persistent_keepalive = NonZeroU16::new(seconds);
            }
            WireguardPeerAttribute::LastHandshake(time) => peer.last_handshake = system_time(time),
            WireguardPeerAttribute::RxBytes(bytes) => peer.rx_bytes = bytes,
            WireguardPeerAttribute::TxBytes(bytes) => peer.tx_bytes = bytes,
            WireguardPeerAttribute::AllowedIps(prefixes) => {
                peer.allowed_ips.extend(prefixes.into_iter().filter_map(prefix));
            }
            _ => {}
        }
    }
}

fn prefix(WireguardAllowedIp(attributes): WireguardAllowedIp) -> Option<IpNet> {
    let (mut address, mut bits) = (None, None);
    for attribute in attributes {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(ip) => address = Some(ip),
            WireguardAllowedIpAttr::Cidr(cidr) => bits = Some(cidr),
            _ => {}
        }
    }
    IpNet::new(address?, bits?).ok()
}

/// All zero: never.
fn system_time(time: WireguardTimeSpec) -> Option<std::time::SystemTime> {
    let since = Duration::new(time.seconds.try_into().ok()?, time.nano_seconds.try_into().ok()?);
    if since.is_zero() { None } else { UNIX_EPOCH.checked_add(since) }
}

/// Bytes that a piece takes within its message: a header of 4, and all of it aligned to 4.
fn size(piece: &WireguardPeer) -> usize {
    4 + piece.value_len().next_multiple_of(4)
}

/// Who owns which prefix: one peer each.
#[derive(Default)]
struct Owners {
    owner: HashMap<IpNet, PublicKey>,
    owned: HashMap<PublicKey, HashSet<IpNet>>,
}

impl Owners {
    fn give(&mut self, prefix: IpNet, peer: PublicKey) {
        if let Some(before) = self.owner.insert(prefix, peer) {
            self.owned.entry(before).or_default().remove(&prefix);
        }
        self.owned.entry(peer).or_default().insert(prefix);
    }

    fn take(&mut self, prefix: &IpNet, peer: &PublicKey) {
        if self.owned.get_mut(peer).is_some_and(|owned| owned.remove(prefix)) {
            self.owner.remove(prefix);
        }
    }

    fn clear(&mut self, peer: &PublicKey) {
        for prefix in self.owned.remove(peer).unwrap_or_default() {
            self.owner.remove(&prefix);
        }
    }

    fn of(&self, peer: &PublicKey) -> impl Iterator<Item = IpNet> {
        let mut prefixes: Vec<IpNet> = self.owned.get(peer).into_iter().flatten().copied().collect();
        prefixes.sort();
        prefixes.into_iter()
    }
}

#[cfg(test)]
mod tests;
