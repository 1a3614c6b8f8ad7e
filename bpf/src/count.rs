use isthmus_bpf_abi::Counter;

use crate::maps::{CLUSTER_FLOWS, COUNTERS};

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a value of this CPU's own copy of the map; programs are not migrated while they run.
        unsafe { *value += 1 };
    }
}

/// One more flow to a backend in `cluster`.
#[inline(always)]
pub fn count_flow(cluster: u16) {
    if let Some(value) = CLUSTER_FLOWS.get_ptr_mut(cluster as u32) {
        // SAFETY: as above.
        unsafe { *value += 1 };
    }
}
