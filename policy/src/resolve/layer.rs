//! What a map holds about one identity.
//!
//! The kernel finds the longest prefix only, so overlaps are resolved here: within a layer no entry lies within a deny, and no
//! allow within an allow. What is left is looked up beside the layer of "any identity", so nothing is kept that this one says
//! already.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Decision, L4Prefix, RuleId};
use crate::model::Effect;

/// Entries of one identity and direction, ordered.
pub(super) type Layer = Arc<[(L4Prefix, Decision)]>;

/// Statements about one identity and direction, to become a layer.
#[derive(Debug, Default)]
pub(super) struct Statements(BTreeMap<L4Prefix, (Effect, u32, RuleId)>);

impl Statements {
    /// A rule says something. Of two that say the same, the one with the lower `order` is named.
    pub(super) fn add(&mut self, l4: L4Prefix, effect: Effect, order: u32, rule: RuleId) {
        let said = (effect, order, rule);
        let stronger = |old: &(Effect, u32, RuleId)| match (effect, old.0) {
            (Effect::Deny, Effect::Allow) => true,
            (Effect::Allow, Effect::Deny) => false,
            _ => order < old.1,
        };
        self.0
            .entry(l4)
            .and_modify(|old| {
                if stronger(old) {
                    *old = said
                }
            })
            .or_insert(said);
    }

    /// The entries that decide, beside those for any identity.
    pub(super) fn resolve(self, any: &[(L4Prefix, Decision)]) -> Layer {
        let mut kept = Vec::with_capacity(self.0.len());
        // What covers the place that has been reached, and is kept. In this order a prefix comes before what it covers.
        let mut within: Vec<(L4Prefix, Effect)> = Vec::new();
        for (l4, (effect, _, rule)) in self.0 {
            while within.last().is_some_and(|(outer, _)| !outer.covers(&l4)) {
                within.pop();
            }
            match (within.last(), effect) {
                (Some((_, Effect::Deny)), _) | (Some((_, Effect::Allow)), Effect::Allow) => continue,
                (Some((_, Effect::Allow)), Effect::Deny) | (None, _) => {}
            }
            within.push((l4, effect));
            // A deny for any identity denies whatever stands here; an allow makes another one superfluous.
            let superfluous = match longest_covering(any, &l4).map(|decision| decision.effect) {
                Some(Effect::Deny) => true,
                Some(Effect::Allow) => effect == Effect::Allow,
                None => false,
            };
            if !superfluous {
                kept.push((l4, Decision { effect, rule }));
            }
        }
        kept.into()
    }
}

/// The entry with the longest prefix that covers all of `l4`.
pub(super) fn longest_covering(entries: &[(L4Prefix, Decision)], l4: &L4Prefix) -> Option<Decision> {
    let find = |prefix: L4Prefix| {
        entries.binary_search_by(|(known, _)| known.cmp(&prefix)).ok().map(|at| entries[at].1)
    };
    if entries.is_empty() {
        return None;
    }
    let specific = l4.protocol().and_then(|protocol| {
        (0..=l4.port_bits()).rev().find_map(|bits| find(L4Prefix::ports(protocol, l4.first_port(), bits)))
    });
    specific.or_else(|| find(L4Prefix::ANY))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn layer(said: &[(L4Prefix, Effect)], any: &[(L4Prefix, Decision)]) -> Layer {
        let mut statements = Statements::default();
        for (order, (l4, effect)) in said.iter().enumerate() {
            statements.add(*l4, *effect, order as u32, RuleId(order as u32));
        }
        statements.resolve(any)
    }

    fn keys(layer: &Layer) -> Vec<(L4Prefix, Effect)> {
        layer.iter().map(|(l4, decision)| (*l4, decision.effect)).collect()
    }

    const TCP: L4Prefix = L4Prefix::protocol_only(6);
    const WEB: L4Prefix = L4Prefix::port(6, 80);

    #[test]
    fn a_broad_deny_removes_what_is_allowed_within_it_and_a_narrow_one_stays() {
        let found = layer(&[(TCP, Effect::Deny), (WEB, Effect::Allow)], &[]);
        assert_eq!(keys(&found), [(TCP, Effect::Deny)]);
        let found = layer(&[(TCP, Effect::Allow), (WEB, Effect::Deny)], &[]);
        assert_eq!(keys(&found), [(TCP, Effect::Allow), (WEB, Effect::Deny)]);
        let found = layer(&[(TCP, Effect::Allow), (WEB, Effect::Allow), (L4Prefix::ANY, Effect::Allow)], &[]);
        assert_eq!(keys(&found), [(L4Prefix::ANY, Effect::Allow)]);
    }

    #[test]
    fn what_is_said_of_any_identity_is_not_said_again() {
        let any = layer(&[(TCP, Effect::Allow), (WEB, Effect::Deny)], &[]);
        assert!(layer(&[(L4Prefix::port(6, 443), Effect::Allow), (WEB, Effect::Deny)], &any).is_empty());
        let found =
            layer(&[(L4Prefix::port(6, 443), Effect::Deny), (L4Prefix::port(17, 53), Effect::Allow)], &any);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn the_first_rule_that_says_it_is_named() {
        let found = layer(&[(WEB, Effect::Allow), (WEB, Effect::Deny), (WEB, Effect::Deny)], &[]);
        assert_eq!(found[..], [(WEB, Decision { effect: Effect::Deny, rule: RuleId(1) })]);
    }

    fn statement() -> impl Strategy<Value = (L4Prefix, Effect)> {
        let l4 = prop_oneof![
            Just(L4Prefix::ANY),
            Just(L4Prefix::protocol_only(6)),
            (0..64u16, 10..=16u8).prop_map(|(port, bits)| L4Prefix::ports(6, port, bits)),
            (0..4u16).prop_map(|port| L4Prefix::port(17, port)),
        ];
        (l4, prop_oneof![Just(Effect::Allow), Just(Effect::Deny)])
    }

    fn said(said: &[(L4Prefix, Effect)], packet: &L4Prefix, effect: Effect) -> bool {
        said.iter().any(|(l4, said)| *said == effect && l4.covers(packet))
    }

    proptest! {
        #[test]
        fn two_lookups_say_what_the_union_of_all_statements_says(
            own in vec(statement(), 0..8),
            any in vec(statement(), 0..8),
            (protocol, port) in (prop_oneof![Just(6u8), Just(17), Just(1)], 0..64u16),
        ) {
            let any_layer = layer(&any, &[]);
            let own_layer = layer(&own, &any_layer);
            let packet = L4Prefix::port(protocol, port);
            let found: Vec<Effect> = [&own_layer, &any_layer]
                .iter()
                .filter_map(|layer| longest_covering(layer, &packet))
                .map(|decision| decision.effect)
                .collect();
            let all = [own, any].concat();
            let expected = !said(&all, &packet, Effect::Deny) && said(&all, &packet, Effect::Allow);
            let allowed = !found.contains(&Effect::Deny) && found.contains(&Effect::Allow);
            prop_assert_eq!(allowed, expected);
        }
    }
}
