//! What a policy map says about a packet: the same steps as the eBPF programs take.
//!
//! Two lookups, each for the longest prefix: one for the identity of the other side, one for any (identity 0). The packet is
//! dropped if either finds a deny, else let through if either finds an allow, else dropped. The map is made for that: within
//! an identity no allow lies within a deny.
//!
//! Before that, and without any lookup: a direction that is not enforced lets everything through, and so does a pod for what
//! its own node sends. ("Traffic to and from the node where a Pod is running is always allowed",
//! <https://kubernetes.io/docs/concepts/services-networking/network-policies/>; Cilium's `--allow-localhost`.)

use std::collections::BTreeMap;

use isthmus_wire::NumericIdentity;

use crate::model::{Direction, Effect};
use crate::resolve::{Decision, L4Prefix, PolicyKey, Resolved, RuleId};

/// Identity 0: any.
const ANY: NumericIdentity = NumericIdentity(0);

impl Resolved {
    /// What happens to a packet. `port` is the destination port in host order, or the ICMP type, or 0.
    pub fn verdict(&self, direction: Direction, peer: NumericIdentity, protocol: u8, port: u16) -> Decision {
        let find = |identity| longest(&self.entries, identity, direction, protocol, port);
        decide(self.is_enforced(direction), direction, peer, || find(peer), || find(ANY))
    }
}

/// The verdict from what the two lookups find.
pub(crate) fn decide(
    enforced: bool,
    direction: Direction,
    peer: NumericIdentity,
    own: impl FnOnce() -> Option<Decision>,
    any: impl FnOnce() -> Option<Decision>,
) -> Decision {
    if !enforced {
        return Decision { effect: Effect::Allow, rule: RuleId::NOT_RESTRICTED };
    }
    if direction == Direction::Ingress && peer == NumericIdentity::HOST {
        return Decision { effect: Effect::Allow, rule: RuleId::HOST };
    }
    match (own(), any()) {
        (Some(own), Some(any)) if any.precedence() > own.precedence() => any,
        (Some(own), _) => own,
        (None, Some(any)) => any,
        (None, None) => Decision { effect: Effect::Deny, rule: RuleId::DEFAULT_DENY },
    }
}

/// The entry with the longest prefix that covers the packet.
pub fn longest(
    entries: &BTreeMap<PolicyKey, Decision>,
    identity: NumericIdentity,
    direction: Direction,
    protocol: u8,
    port: u16,
) -> Option<Decision> {
    let found = |l4| entries.get(&PolicyKey { identity, direction, l4 }).copied();
    (0..=16).rev().map(|bits| L4Prefix::ports(protocol, port, bits)).chain([L4Prefix::ANY]).find_map(found)
}
