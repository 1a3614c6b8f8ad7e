//! Ports as prefixes, which is what the kernel's trie can look up.

use std::sync::Arc;

use super::{L4Prefix, NamedPorts};
use crate::model::{PortMatch, PortSet, Ports, Transport};

/// What a clause says about ports, ready to be put into a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Prefixes {
    /// What is known from the policy alone.
    fixed: Arc<[L4Prefix]>,
    /// Ports that somebody else has to say the numbers of.
    named: Arc<[(Arc<str>, Option<Transport>)]>,
}

impl Prefixes {
    pub(super) fn of(ports: &Ports) -> Self {
        let mut fixed = Vec::new();
        let mut named = Vec::new();
        match ports {
            Ports::All => fixed.push(L4Prefix::ANY),
            Ports::OneOf(matches) => {
                for port in matches {
                    match port {
                        PortMatch::Icmp { family, kind } => {
                            fixed.push(L4Prefix::port(family.number(), (*kind).into()));
                        }
                        PortMatch::Transport { protocol, ports: PortSet::Named(name) } => {
                            named.push((Arc::clone(name), *protocol));
                        }
                        PortMatch::Transport { protocol, ports } => {
                            for protocol in
                                protocol.as_ref().map_or(&Transport::ALL[..], std::slice::from_ref)
                            {
                                numbered(protocol.number(), ports, &mut fixed);
                            }
                        }
                    }
                }
            }
        }
        fixed.sort_unstable();
        fixed.dedup();
        named.sort_unstable();
        named.dedup();
        Self { fixed: fixed.into(), named: named.into() }
    }

    /// Whether the numbers of some ports depend on who is asked.
    pub(super) fn has_names(&self) -> bool {
        !self.named.is_empty()
    }

    /// All of them, where the receiving pod calls its ports so.
    pub(super) fn with<'a>(&'a self, names: &'a NamedPorts) -> impl Iterator<Item = L4Prefix> + 'a {
        let named = self
            .named
            .iter()
            .flat_map(|(name, protocol)| names.called(name, *protocol))
            .map(|(protocol, port)| L4Prefix::port(protocol.number(), port));
        self.fixed.iter().copied().chain(named)
    }

    /// Whether a packet is meant.
    pub(super) fn matches(&self, names: &NamedPorts, protocol: u8, port: u16) -> bool {
        let packet = L4Prefix::port(protocol, port);
        self.with(names).any(|prefix| prefix.covers(&packet))
    }
}

fn numbered(protocol: u8, ports: &PortSet, into: &mut Vec<L4Prefix>) {
    match ports {
        PortSet::All => into.push(L4Prefix::protocol_only(protocol)),
        PortSet::Range(first, last) => range(protocol, *first, *last, into),
        PortSet::Named(_) => {}
    }
}

/// The fewest prefixes that make up `first..=last`: at most 30.
fn range(protocol: u8, first: u16, last: u16, into: &mut Vec<L4Prefix>) {
    let (mut next, last) = (u32::from(first), u32::from(last));
    while next <= last {
        // As large as the alignment of its start and the end of the range let it be.
        let aligned = if next == 0 { 16 } else { next.trailing_zeros().min(16) };
        let fitting = (last - next + 1).ilog2();
        let bits = aligned.min(fitting);
        into.push(L4Prefix::ports(protocol, next as u16, (16 - bits) as u8));
        next += 1 << bits;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefixes(first: u16, last: u16) -> Vec<L4Prefix> {
        let mut found = Vec::new();
        range(6, first, last, &mut found);
        found
    }

    #[test]
    fn ranges_are_as_few_prefixes_as_can_be() {
        assert_eq!(prefixes(80, 80), [L4Prefix::port(6, 80)]);
        assert_eq!(prefixes(1, u16::MAX).len(), 16);
        assert_eq!(prefixes(0, u16::MAX), [L4Prefix::protocol_only(6)]);
        assert_eq!(prefixes(8080, 8083), [L4Prefix::ports(6, 8080, 14)]);
        assert_eq!(prefixes(1, 65534).len(), 30);
    }

    proptest! {
        #[test]
        fn the_prefixes_of_a_range_cover_it_and_nothing_else(first in 1..=u16::MAX, length: u16, probe: u16) {
            let last = first.saturating_add(length);
            let found = prefixes(first, last);
            let packet = L4Prefix::port(6, probe);
            let covering = found.iter().filter(|prefix| prefix.covers(&packet)).count();
            prop_assert_eq!(covering, usize::from((first..=last).contains(&probe)));
            prop_assert!(found.len() <= 30);
        }
    }
}
