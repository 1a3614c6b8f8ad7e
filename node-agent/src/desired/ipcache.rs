//! What the ipcache should say about a prefix.

use std::net::IpAddr;

use ipnet::IpNet;
use isthmus_bpf_abi::{Addr, IpcacheEntry, IpcacheKey, ipcache_flags};

use crate::mesh::{Resolved, reserved};

/// The key of a prefix; host bits are dropped, for the kernel would hold them apart.
pub fn key(prefix: IpNet) -> IpcacheKey {
    let prefix = prefix.trunc();
    IpcacheKey::new(prefix.addr(), prefix.prefix_len())
}

/// The entry for what holds about a prefix.
pub fn entry(resolved: Resolved) -> IpcacheEntry {
    let mut flags = 0;
    if resolved.host.is_some() {
        flags |= ipcache_flags::HAS_HOST;
    }
    if matches!(resolved.host, Some(IpAddr::V6(_))) {
        flags |= ipcache_flags::IPV6_HOST;
    }
    if resolved.cluster != 0 {
        flags |= ipcache_flags::REMOTE_CLUSTER;
    }
    IpcacheEntry {
        identity: resolved.identity,
        host: resolved.host.map_or(Addr::default(), Addr::from),
        cluster: resolved.cluster,
        key: resolved.encryption_key,
        flags,
    }
}

/// The range of a peer's node that an entry is about, and the peer's id; none if it is about something else.
pub fn range(key: &IpcacheKey, entry: &IpcacheEntry) -> Option<(IpNet, u16)> {
    let of_node = matches!(entry.identity, reserved::WORLD | reserved::REMOTE_NODE);
    let range = IpNet::new(key.addr.ip(), key.prefix()).ok()?;
    (of_node && entry.cluster != 0).then_some((range, entry.cluster))
}
