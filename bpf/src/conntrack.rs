//! How long a flow lives, and what its packets tell of its state.

use isthmus_bpf_abi::ct_flags::{ESTABLISHED, FIN_FORWARD, FIN_REPLY, RESET};

use crate::config::jiffies_per_second;
use crate::packet::{FIN, RST, SYN, TCP};

/// Seconds after its last packet that an established TCP connection is kept.
const TCP_ESTABLISHED: u32 = 21_600;
/// TCP before the handshake is done, and UDP.
const SHORT: u32 = 60;
/// TCP after a reset or a FIN from both sides.
const TCP_CLOSING: u32 = 10;

/// Jiffies since `then`. Another CPU may have written a time that is later than this one's `now`: that is no time at all,
/// and not nearly for ever.
#[inline(always)]
pub fn idle(now: u32, then: u32) -> u32 {
    let idle = now.wrapping_sub(then);
    if idle > u32::MAX / 2 { 0 } else { idle }
}

/// The map entries are written to when they are this old and not with every packet: a cache line that every packet
/// writes to is fetched by every CPU.
#[inline(always)]
pub fn is_stale(idle: u32) -> bool {
    idle >= jiffies_per_second()
}

/// Whether a flow has been idle for too long. Most flows are not stale, let alone expired.
#[inline(always)]
pub fn is_expired(idle: u32, protocol: u8, flags: u32) -> bool {
    is_stale(idle) && idle > lifetime(protocol, flags) * jiffies_per_second()
}

#[inline(always)]
fn lifetime(protocol: u8, flags: u32) -> u32 {
    if protocol != TCP || flags & ESTABLISHED == 0 {
        SHORT
    } else if is_closed(flags) {
        TCP_CLOSING
    } else {
        TCP_ESTABLISHED
    }
}

#[inline(always)]
pub fn is_closed(flags: u32) -> bool {
    flags & RESET != 0 || flags & (FIN_FORWARD | FIN_REPLY) == FIN_FORWARD | FIN_REPLY
}

/// Whether a packet begins a new connection although a flow of the same ports is known: the client uses a port again
/// whose last connection has ended.
#[inline(always)]
pub fn is_reused(flags: u32, tcp_flags: u8) -> bool {
    tcp_flags & SYN != 0 && flags & (RESET | FIN_FORWARD | FIN_REPLY) != 0
}

/// The state after a packet from the client.
#[inline(always)]
pub fn after_forward(flags: u32, protocol: u8, tcp_flags: u8) -> u32 {
    if protocol != TCP {
        return flags;
    }
    let mut flags = flags;
    if tcp_flags & SYN == 0 {
        flags |= ESTABLISHED;
    }
    if tcp_flags & FIN != 0 {
        flags |= FIN_FORWARD;
    }
    if tcp_flags & RST != 0 {
        flags |= RESET;
    }
    flags
}

/// The state that an answer adds.
#[inline(always)]
pub fn from_reply(tcp_flags: u8) -> u32 {
    let mut flags = 0;
    if tcp_flags & FIN != 0 {
        flags |= FIN_REPLY;
    }
    if tcp_flags & RST != 0 {
        flags |= RESET;
    }
    flags
}
