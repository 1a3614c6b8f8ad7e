//! Constants that the loader sets. They live in a frozen map, so the verifier knows their values and drops the
//! branches that they close.

use aya_ebpf::Global;

/// Jiffies per second.
#[unsafe(no_mangle)]
static JIFFIES_PER_SECOND: Global<u32> = Global::new(1000);

/// Non-zero where `bpf_set_retval` exists (5.18).
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: Global<u32> = Global::new(0);

/// Non-zero where `bpf_l4_csum_replace` knows `BPF_F_IPV6` (6.16).
#[unsafe(no_mangle)]
static HAS_CSUM_IPV6: Global<u32> = Global::new(0);

/// How many events of each kind (packets dropped, flows forwarded) a CPU may send per second.
#[unsafe(no_mangle)]
static EVENTS_PER_SECOND: Global<u32> = Global::new(0);

#[inline(always)]
pub fn events_per_second() -> u32 {
    EVENTS_PER_SECOND.load()
}

#[inline(always)]
pub fn jiffies_per_second() -> u32 {
    JIFFIES_PER_SECOND.load()
}

#[inline(always)]
pub fn has_set_retval() -> bool {
    HAS_SET_RETVAL.load() != 0
}

#[inline(always)]
pub fn has_csum_ipv6() -> bool {
    HAS_CSUM_IPV6.load() != 0
}

/// The low half of the kernel's jiffies: a load, where a clock would be a call.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: takes nothing and returns a number.
    unsafe { aya_ebpf::helpers::generated::bpf_jiffies64() as u32 }
}
