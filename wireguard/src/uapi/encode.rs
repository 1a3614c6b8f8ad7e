//! Requests and answers as text.

use std::fmt::Display;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::UNIX_EPOCH;

use super::{COUNTER_PREFIX, EXTENSIONS, Request};
use crate::config::{
    AllowedIp, Change, Counter, DeviceState, DeviceUpdate, PeerState, PeerUpdate, PublicKey,
};

const NO_KEY: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Writes a request, with its end. A device that is not `extended`, which is every one but ours, is not asked for what
/// it does not have.
///
/// # Errors
/// When `out` fails.
pub fn write_request(request: &Request, extended: bool, out: &mut impl Write) -> io::Result<()> {
    match request {
        Request::Get { extended: false } => out.write_all(b"get=1\n")?,
        Request::Get { extended: true } => writeln!(out, "get=1\n{EXTENSIONS}=1")?,
        Request::Set(update) => write_update(update, extended, out)?,
    }
    out.write_all(b"\n")
}

/// Writes what a device is as an answer to `get=1`, without its last two lines (`errno=0` and the empty one). With
/// counters it is the answer to a client that has asked for extensions.
///
/// # Errors
/// When `out` fails.
pub fn write_state(
    state: &DeviceState,
    counters: Option<&[Counter]>,
    out: &mut impl Write,
) -> io::Result<()> {
    if let Some(key) = &state.private_key {
        pair(out, "private_key", &*key.to_hex())?;
    }
    if let (Some(key), Some(_)) = (&state.next_private_key, counters) {
        pair(out, "next_private_key", &*key.to_hex())?;
    }
    if state.listen_port != 0 {
        pair(out, "listen_port", state.listen_port)?;
    }
    if state.fwmark != 0 {
        pair(out, "fwmark", state.fwmark)?;
    }
    for (name, value) in counters.unwrap_or_default() {
        writeln!(out, "{COUNTER_PREFIX}{name}={value}")?;
    }
    state.peers.iter().try_for_each(|peer| write_peer(peer, counters.is_some(), out))
}

fn write_peer(peer: &PeerState, extended: bool, out: &mut impl Write) -> io::Result<()> {
    pair(out, "public_key", peer.public_key.to_hex())?;
    if let Some(key) = &peer.preshared_key {
        pair(out, "preshared_key", &*key.to_hex())?;
    }
    pair(out, "protocol_version", 1)?;
    if let Some(address) = peer.endpoint {
        pair(out, "endpoint", endpoint(address))?;
    }
    // All zero for "never", which is also what a clock before 1970 comes to.
    let handshake =
        peer.last_handshake.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    pair(out, "last_handshake_time_sec", handshake.as_secs())?;
    pair(out, "last_handshake_time_nsec", handshake.subsec_nanos())?;
    pair(out, "tx_bytes", peer.tx_bytes)?;
    pair(out, "rx_bytes", peer.rx_bytes)?;
    pair(out, "persistent_keepalive_interval", peer.persistent_keepalive.map_or(0, u16::from))?;
    for prefix in &peer.allowed_ips {
        pair(out, "allowed_ip", prefix)?;
    }
    if extended {
        optional_key(out, "successor_of", peer.successor_of)?;
        optional_key(out, "session_key", peer.session_key)?;
    }
    Ok(())
}

fn write_update(update: &DeviceUpdate, extended: bool, out: &mut impl Write) -> io::Result<()> {
    out.write_all(b"set=1\n")?;
    match &update.private_key {
        Change::Keep => {}
        Change::Clear => pair(out, "private_key", NO_KEY)?,
        Change::Set(key) => pair(out, "private_key", &*key.to_hex())?,
    }
    match &update.next_private_key {
        Change::Set(key) if extended => pair(out, "next_private_key", &*key.to_hex())?,
        Change::Clear if extended => pair(out, "next_private_key", NO_KEY)?,
        _ => {}
    }
    if let Some(port) = update.listen_port {
        pair(out, "listen_port", port)?;
    }
    if let Some(mark) = update.fwmark {
        pair(out, "fwmark", mark)?;
    }
    if update.replace_peers {
        pair(out, "replace_peers", true)?;
    }
    update.peers.iter().try_for_each(|peer| write_peer_update(peer, extended, out))
}

fn write_peer_update(peer: &PeerUpdate, extended: bool, out: &mut impl Write) -> io::Result<()> {
    pair(out, "public_key", peer.public_key.to_hex())?;
    if peer.remove {
        return pair(out, "remove", true);
    }
    if peer.update_only {
        pair(out, "update_only", true)?;
    }
    if extended {
        optional_key(out, "successor_of", peer.successor_of)?;
    }
    match &peer.preshared_key {
        Change::Keep => {}
        Change::Clear => pair(out, "preshared_key", NO_KEY)?,
        Change::Set(key) => pair(out, "preshared_key", &*key.to_hex())?,
    }
    if let Some(address) = peer.endpoint {
        pair(out, "endpoint", endpoint(address))?;
    }
    if let Some(seconds) = peer.persistent_keepalive {
        pair(out, "persistent_keepalive_interval", seconds)?;
    }
    if peer.replace_allowed_ips {
        pair(out, "replace_allowed_ips", true)?;
    }
    for change in &peer.allowed_ips {
        match change {
            AllowedIp::Add(prefix) => pair(out, "allowed_ip", prefix)?,
            AllowedIp::Remove(prefix) => writeln!(out, "allowed_ip=-{prefix}")?,
        }
    }
    Ok(())
}

/// A dual-stack socket names IPv4 senders as IPv4-mapped; `wg` and people expect the address itself.
fn endpoint(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(v4) => SocketAddr::new(v4.into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

fn optional_key(out: &mut impl Write, key: &str, value: Option<PublicKey>) -> io::Result<()> {
    value.map_or(Ok(()), |value| pair(out, key, value.to_hex()))
}

fn pair(out: &mut impl Write, key: &str, value: impl Display) -> io::Result<()> {
    writeln!(out, "{key}={value}")
}
