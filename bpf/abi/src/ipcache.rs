use core::net::IpAddr;

use crate::Addr;

/// Bits of [`IpcacheEntry::flags`].
pub mod ipcache_flags {
    /// Reach it without a tunnel although it lives on another node.
    pub const SKIP_TUNNEL: u8 = 1;
    /// [`super::IpcacheEntry::host`] is set.
    pub const HAS_HOST: u8 = 2;
    /// [`super::IpcacheEntry::host`] is an IPv6 address.
    pub const IPV6_HOST: u8 = 4;
    /// The address lives in another cluster.
    pub const REMOTE_CLUSTER: u8 = 8;
    /// Pods live here and nothing is known of them: in strict mode, nothing goes to or comes from such an address.
    pub const STRICT_RANGE: u8 = 16;
}

/// An address or a prefix. Longest prefix wins.
///
/// The layout is Cilium's `cilium_ipcache_v2`, except that IPv4 stands in its v4-mapped form.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct IpcacheKey {
    /// Significant bits after this field: 32 for what comes before the address, plus 128 at most.
    pub prefix_len: u32,
    /// Zero: clusters with overlapping pod ranges are not supported.
    pub cluster: u16,
    /// Zero.
    pub pad: u8,
    /// 1 is IPv4, 2 is IPv6.
    pub family: u8,
    /// First address of the prefix.
    pub addr: Addr,
}

impl IpcacheKey {
    /// `addr`/`prefix` with `prefix` in the family's own count (0..=32 or 0..=128; more is taken as the whole
    /// address). Host bits must be zero, or the kernel holds two keys for one prefix.
    pub fn new(addr: IpAddr, prefix: u8) -> Self {
        let (family, bits) = match addr {
            IpAddr::V4(_) => (1, 96 + u32::from(prefix.min(32))),
            IpAddr::V6(_) => (2, u32::from(prefix.min(128))),
        };
        Self { prefix_len: 32 + bits, cluster: 0, pad: 0, family, addr: addr.into() }
    }

    /// The key of one address.
    pub fn host(addr: IpAddr) -> Self {
        Self::new(addr, 128)
    }

    /// Prefix length in the family's own count.
    pub const fn prefix(&self) -> u8 {
        let before = if self.family == 1 { 32 + 96 } else { 32 };
        self.prefix_len.saturating_sub(before) as u8
    }
}

/// What is known of an address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct IpcacheEntry {
    /// Numeric security identity.
    pub identity: u32,
    /// Address of the node that it runs on (the tunnel's endpoint); all zero when it is local or unknown.
    pub host: Addr,
    /// Cluster that it runs in; 0 is the own one.
    pub cluster: u16,
    /// Encryption key index: 0 plain, 255 WireGuard.
    pub key: u8,
    /// [`ipcache_flags`].
    pub flags: u8,
}
