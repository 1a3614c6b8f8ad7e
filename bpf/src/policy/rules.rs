//! What an endpoint's rules say.

use aya_ebpf::btf_maps::lpm_trie::Key;
use isthmus_bpf_abi::endpoint_flags::{EGRESS_ENFORCED, INGRESS_ENFORCED, WAITING};
use isthmus_bpf_abi::policy_flags::DENY;
use isthmus_bpf_abi::{
    Addr, DropReason, Endpoint, PolicyEntry, PolicyKey, reserved_identity, reserved_rule,
};

use crate::ipcache;
use crate::maps::{POLICIES, Policy, PolicyRest};

use super::direction;

/// What they say, and why.
#[derive(Clone, Copy)]
pub struct Decision {
    /// [`DropReason::None`]: it is allowed.
    pub reason: DropReason,
    pub rule: u32,
}

impl Decision {
    pub const NOT_ENFORCED: Self = Self { reason: DropReason::None, rule: reserved_rule::NOT_ENFORCED };
    pub const HOST: Self = Self { reason: DropReason::None, rule: reserved_rule::HOST };
    pub const WAITING: Self = Self { reason: DropReason::Waiting, rule: reserved_rule::NONE };
    pub const NO_RULE: Self = Self { reason: DropReason::NoRule, rule: reserved_rule::NONE };

    #[inline(always)]
    pub fn is_allowed(self) -> bool {
        self.reason as u8 == DropReason::None as u8
    }
}

/// Who has this address.
#[inline(always)]
pub fn identity_of(addr: &Addr) -> u32 {
    let known =
        if addr.is_v4() { ipcache::lookup::<true>(addr) } else { ipcache::lookup::<false>(addr) };
    match known.map(|known| known.identity) {
        None | Some(0) => reserved_identity::WORLD,
        Some(identity) => identity,
    }
}

/// Whether a flow may begin in this direction.
#[inline(always)]
pub fn decide(endpoint: &Endpoint, egress: bool, identity: u32, protocol: u8, port_be: u16) -> Decision {
    if !egress && identity == reserved_identity::HOST {
        return Decision::HOST;
    }
    if endpoint.flags & WAITING != 0 {
        return Decision::WAITING;
    }
    let enforced = if egress { EGRESS_ENFORCED } else { INGRESS_ENFORCED };
    if endpoint.flags & enforced == 0 {
        return Decision::NOT_ENFORCED;
    }
    let Some(policy) = POLICIES.get(endpoint.policy) else { return Decision::NO_RULE };
    let mut key = PolicyKey {
        prefix_len: PolicyKey::ONE_PORT,
        identity,
        direction: direction(egress) as u8,
        protocol,
        port_be,
    };
    let own = lookup(policy, &key);
    key.identity = 0;
    let any = lookup(policy, &key);
    match (own, any) {
        (Some(own), Some(any)) if own.flags & DENY == 0 && any.flags & DENY != 0 => of_entry(any),
        (Some(own), _) => of_entry(own),
        (None, Some(any)) => of_entry(any),
        (None, None) => Decision::NO_RULE,
    }
}

#[inline(always)]
fn of_entry(entry: &PolicyEntry) -> Decision {
    let reason = if entry.flags & DENY != 0 { DropReason::Denied } else { DropReason::None };
    Decision { reason, rule: entry.rule }
}

/// The entry with the longest prefix that holds all of `key`.
#[inline(always)]
fn lookup<'a>(policy: &'a Policy, key: &PolicyKey) -> Option<&'a PolicyEntry> {
    // SAFETY: both are the length and what follows it, without padding; the other type asks for less alignment.
    policy.get(unsafe { &*core::ptr::from_ref(key).cast::<Key<PolicyRest>>() })
}
