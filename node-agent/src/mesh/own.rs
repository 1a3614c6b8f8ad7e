//! The own cluster's pod ranges and the own node's addresses: what no peer may speak about.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

/// Ranges of the own cluster.
#[derive(Debug, Default)]
pub(super) struct OwnRanges {
    ranges: HashMap<IpNet, usize>,
    /// Lengths in use per family: a handful, so that a lookup is a handful of hash lookups.
    lengths: BTreeMap<(bool, u8), usize>,
    node_addresses: BTreeSet<IpAddr>,
}

impl OwnRanges {
    /// Whether the prefix lies inside a pod range of the own cluster.
    pub(super) fn covers(&self, prefix: IpNet) -> bool {
        let ipv4 = prefix.addr().is_ipv4();
        self.lengths
            .range((ipv4, 0)..=(ipv4, prefix.prefix_len()))
            .filter_map(|((_, length), _)| IpNet::new(prefix.addr(), *length).ok())
            .any(|covering| self.ranges.contains_key(&covering.trunc()))
    }

    /// Takes a node's old ranges away and adds its new ones; returns those that came or went.
    pub(super) fn exchange(&mut self, old: &[IpNet], new: &[IpNet]) -> Vec<IpNet> {
        let mut changed = Vec::new();
        for range in new {
            let users = self.ranges.entry(range.trunc()).or_default();
            *users += 1;
            if *users == 1 {
                *self.lengths.entry((range.addr().is_ipv4(), range.prefix_len())).or_default() += 1;
                changed.push(range.trunc());
            }
        }
        for range in old {
            let Some(users) = self.ranges.get_mut(&range.trunc()) else { continue };
            *users -= 1;
            if *users > 0 {
                continue;
            }
            self.ranges.remove(&range.trunc());
            let length = (range.addr().is_ipv4(), range.prefix_len());
            if let Some(users) = self.lengths.get_mut(&length) {
                *users -= 1;
                if *users == 0 {
                    self.lengths.remove(&length);
                }
            }
            changed.push(range.trunc());
        }
        changed
    }

    /// Sets the own node's addresses; says whether they are others than before.
    pub(super) fn set_node_addresses(&mut self, addresses: BTreeSet<IpAddr>) -> bool {
        let changed = self.node_addresses != addresses;
        self.node_addresses = addresses;
        changed
    }

    pub(super) fn is_node_address(&self, ip: IpAddr) -> bool {
        self.node_addresses.contains(&ip)
    }
}
