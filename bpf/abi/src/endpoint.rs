//! The pods of this node, as the programs know them.

use crate::Addr;

/// Bits of [`Endpoint::flags`].
pub mod endpoint_flags {
    /// What comes to the pod is looked up in its policy map; what is not found there is dropped.
    pub const INGRESS_ENFORCED: u32 = 1;
    /// The same for what the pod sends.
    pub const EGRESS_ENFORCED: u32 = 2;
    /// Its rules are not known yet: everything is dropped that its policy could be about.
    pub const WAITING: u32 = 4;
    /// Its policy could not be put in place: nothing is allowed where it is enforced, until the whole of it is. A note of
    /// user space to itself.
    pub const CLOSED: u32 = 8;
    /// Either direction: its flows are remembered.
    pub const ENFORCED: u32 = INGRESS_ENFORCED | EGRESS_ENFORCED | WAITING;
}

/// The pod behind an interface of the node, by the interface's index.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Endpoint {
    /// Its numeric security identity; 0 while it is not known.
    pub identity: u32,
    /// Index of its policy map in the array of policy maps, or [`Endpoint::NO_POLICY`].
    pub policy: u32,
    /// [`endpoint_flags`].
    pub flags: u32,
    /// Zero.
    pub pad: u32,
    /// Its IPv4 address; all zero if it has none, or none is known.
    pub ipv4: Addr,
    /// Its IPv6 address; the same.
    pub ipv6: Addr,
}

impl Endpoint {
    /// No map: what is enforced is dropped.
    pub const NO_POLICY: u32 = u32::MAX;
    /// In place of an interface's index: the pods for which there was no room. No interface has this index.
    pub const OTHERS: u32 = 0;
}

/// How to hand a packet to the pod with this address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct LocalPod {
    /// The host's side of its veth.
    pub ifindex: u32,
    /// Hardware address of the pod's side.
    pub pod_mac: [u8; 6],
    /// Hardware address of the host's side.
    pub host_mac: [u8; 6],
}

/// The key of [`LocalPod`]: an address of the pod.
pub type LocalPodKey = Addr;

#[cfg(test)]
mod tests {
    use core::mem::size_of;

    use super::*;

    #[test]
    fn what_a_pod_costs_in_bytes_does_not_creep() {
        assert_eq!(size_of::<Endpoint>(), 16 + 2 * 16);
        assert_eq!(size_of::<LocalPodKey>() + size_of::<LocalPod>(), 16 + 16);
    }
}
