//! Marks the types as plain old data for aya. All are `repr(C)`, `Copy`, without padding and valid for any bytes.

use aya::Pod;

use crate::*;

macro_rules! plain_old_data {
    ($($type:ty),* $(,)?) => {
        $(
            // SAFETY: `repr(C)` integers and arrays of them without padding; see the sizes asserted beside each type.
            unsafe impl Pod for $type {}
        )*
    };
}

plain_old_data!(
    Addr,
    ServiceKey,
    Service,
    SlotKey,
    Slot,
    Backend,
    Encryption,
    Endpoint,
    LocalPod,
    PolicyKey,
    PolicyEntry,
    PolicyCtKey,
    PolicyCtEntry,
    PolicyEvent,
    IpcacheKey,
    IpcacheEntry,
    CtKey,
    CtEntry,
    ReplyKey,
    ReplyEntry,
    AffinityKey,
    AffinityEntry,
    SocketKey,
    SocketEntry,
    FragmentKey,
    FragmentEntry,
);
