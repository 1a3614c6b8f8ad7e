//! What the ipcache should say about a prefix.

use std::net::IpAddr;

use ipnet::IpNet;
use isthmus_bpf_abi::{Addr, IpcacheEntry, IpcacheKey, ipcache_flags};
use isthmus_wire::NumericIdentity;

use crate::mesh::{Mesh, Resolved, reserved};
use crate::policy::Policies;

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

/// What is wanted of a prefix: if it is an address of this node, that it is the host's; else what the mesh says, else the identity that this node's policies give it, else that pods live
/// there of which nothing is known. The Kubernetes API has an identity of its own also where a node serves it.
pub fn wanted(mesh: &Mesh, policies: &Policies, prefix: IpNet) -> Option<IpcacheEntry> {
    let cidr = policies.cidr(prefix);
    if policies.is_host(prefix) {
        return Some(IpcacheEntry { identity: reserved::HOST, ..IpcacheEntry::default() });
    }
    match mesh.resolve(prefix) {
        Some(resolved) => {
            let mut entry = entry(resolved);
            if entry.identity == reserved::REMOTE_NODE && cidr.is_some_and(|cidr| cidr.kube_apiserver) {
                entry.identity = NumericIdentity::KUBE_APISERVER.0;
            }
            Some(entry)
        }
        None => {
            // A policy that knows the outside by address takes no part of a strict range out of it.
            let flags = if mesh.is_in_strict_range(prefix) { ipcache_flags::STRICT_RANGE } else { 0 };
            let identity = cidr.map(|cidr| cidr.identity.0);
            let identity = identity.or_else(|| mesh.is_strict_range(prefix).then_some(reserved::WORLD))?;
            let mut entry = IpcacheEntry { identity, flags, ..IpcacheEntry::default() };
            // Nor does it take a part of the range of a node's pods out of what is encrypted.
            if let Some(around) = mesh.around(prefix).map(self::entry) {
                const HOST: u8 = ipcache_flags::HAS_HOST | ipcache_flags::IPV6_HOST;
                (entry.host, entry.key) = (around.host, around.key);
                entry.flags |= around.flags & HOST;
            }
            Some(entry)
        }
    }
}

/// Whether an entry is there, or says what it says, for the sake of this node's policies alone.
pub fn is_of_policies(entry: &IpcacheEntry) -> bool {
    const FIRST_CIDR: u32 = 1 << 24;
    const LAST_CIDR: u32 = (2 << 24) - 1;
    let fixed = [reserved::WORLD_IPV4, reserved::WORLD_IPV6, NumericIdentity::KUBE_APISERVER.0];
    (FIRST_CIDR..=LAST_CIDR).contains(&entry.identity) || fixed.contains(&entry.identity)
}

/// The range of a peer's node that an entry is about, and the peer's id; none if it is about something else.
pub fn range(key: &IpcacheKey, entry: &IpcacheEntry) -> Option<(IpNet, u16)> {
    let of_node = matches!(entry.identity, reserved::WORLD | reserved::REMOTE_NODE);
    let range = IpNet::new(key.addr.ip(), key.prefix()).ok()?;
    (of_node && entry.cluster != 0).then_some((range, entry.cluster))
}
