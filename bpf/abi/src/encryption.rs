/// Bits of [`Encryption::flags`].
pub mod encryption_flags {
    /// What goes to an address with an encryption key leaves through the device, or not at all.
    pub const ON: u32 = 1;
    /// Nothing goes to or comes from pods of other nodes in the clear, whether they have a key or not.
    pub const STRICT: u32 = 2;
}

/// Bits of a packet's mark (`skb->mark`), the same as Cilium's. Other bits are left alone.
pub mod mark {
    /// The bits that are ours.
    pub const MASK: u32 = 0x0f00;
    /// The packet has come out of the encryption device.
    pub const DECRYPTED: u32 = 0x0d00;
    /// The packet is to be routed to the encryption device.
    pub const ENCRYPT: u32 = 0x0e00;
}

/// How traffic between nodes is encrypted: the one entry of an array.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Encryption {
    /// The WireGuard device; 0 while there is none.
    pub ifindex: u32,
    /// Largest IP packet that it takes, in bytes.
    pub mtu: u32,
    /// [`encryption_flags`].
    pub flags: u32,
    /// Zero.
    pub pad: u32,
}
