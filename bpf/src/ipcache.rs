//! What is known of an address.

use aya_ebpf::maps::lpm_trie::Key;
use isthmus_bpf_abi::{Addr, IpcacheEntry, ipcache_flags};

use crate::maps::{IPCACHE, IpcacheRest};

/// Bits of a whole address, with what stands before it in the key.
const WHOLE: u32 = 32 + 128;

/// The entry with the longest prefix that holds `addr`.
#[inline(always)]
pub fn lookup<const V4: bool>(addr: &Addr) -> Option<&'static IpcacheEntry> {
    // Cluster, padding, family, address: as the key has them after its length.
    let family = u32::from_ne_bytes([0, 0, 0, if V4 { 1 } else { 2 }]);
    let [a, b, c, d] = addr.0;
    let rest: IpcacheRest = [family, a, b, c, d];
    IPCACHE.get(Key::new(WHOLE, rest))
}

/// Whether the address is known to live on another node: that of a pod, or the range of a node's pods.
#[inline(always)]
pub fn is_elsewhere(entry: &IpcacheEntry) -> bool {
    entry.flags & ipcache_flags::HAS_HOST != 0
}
