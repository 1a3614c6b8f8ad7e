//! Which cluster an address belongs to: the trust boundary of identities and of cryptokey routing alike.
//!
//! A cluster's ranges are the pod ranges and the addresses of its nodes. What another cluster says about an address inside
//! of them does not count, whatever it says and however precisely. Of several clusters whose ranges cover an address,
//! the first of these holds it:
//!
//! 1. the own cluster;
//! 2. the one that held the range before this agent was started, as the pinned maps tell;
//! 3. while the mesh is read for the first time: the one with the lowest cluster id, in whatever order they are read;
//! 4. from then on: the one that was there first, for as long as it states the range.
//!
//! So a peer that begins to claim ranges of another gains nothing, neither at once nor when agents start again. Rule 3
//! is for nodes that have no memory: it makes them agree, no more.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::OWN;

/// Ranges of all clusters.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    ranges: HashMap<IpNet, BTreeMap<Holder, Held>>,
    /// Lengths in use per family: a handful, so that a lookup is a handful of hash lookups.
    lengths: BTreeMap<(bool, u8), usize>,
    /// Ranges and the ids of the clusters that held them before this agent was started.
    remembered: HashMap<IpNet, u16>,
    /// Whether the mesh has been read for the first time.
    settled: bool,
    arrivals: u64,
}

/// A cluster under the id that its nodes state.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Holder {
    id: u16,
    cluster: u16,
}

#[derive(Debug)]
struct Held {
    /// Statements: several nodes may state one range.
    users: usize,
    since: Since,
}

/// The order of precedence among peers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Since {
    Earlier,
    Start,
    Later(u64),
}

impl Ranges {
    /// Notes that a cluster held a range before this agent was started.
    pub(super) fn remember(&mut self, range: IpNet, id: u16) {
        self.remembered.insert(range.trunc(), id);
    }

    /// Ends the first reading: from now on who was there first comes first.
    pub(super) fn settle(&mut self) {
        self.settled = true;
        self.remembered = HashMap::new();
    }

    /// The number of the cluster that holds the address or prefix, if one does. `counts` says whether a cluster, by
    /// number, holds the id under which it states a range.
    pub(super) fn holder(&self, prefix: IpNet, counts: impl Fn(u16, u16) -> bool) -> Option<u16> {
        let ipv4 = prefix.addr().is_ipv4();
        self.lengths
            .range((ipv4, 0)..=(ipv4, prefix.prefix_len()))
            .filter_map(|((_, length), _)| IpNet::new(prefix.addr(), *length).ok())
            .filter_map(|covering| self.ranges.get(&covering.trunc()))
            .flatten()
            .filter(|(holder, _)| counts(holder.cluster, holder.id))
            .min_by_key(|(holder, held)| (holder.cluster != OWN, held.since, holder.id))
            .map(|(holder, _)| holder.cluster)
    }

    /// Exchanges what one of a cluster's nodes states, each with the id that it states; returns the ranges that the
    /// cluster thereby gains or loses.
    pub(super) fn exchange(
        &mut self,
        cluster: u16,
        old: Option<(u16, Vec<IpNet>)>,
        new: Option<(u16, Vec<IpNet>)>,
    ) -> Vec<IpNet> {
        let mut changed = Vec::new();
        // First what comes, so that what stays keeps its place.
        for (id, range) in each(new) {
            if self.state(range, Holder { id, cluster }) {
                changed.push(range);
            }
        }
        for (id, range) in each(old) {
            if self.withdraw(range, Holder { id, cluster }) {
                changed.push(range);
            }
        }
        changed
    }

    fn state(&mut self, range: IpNet, holder: Holder) -> bool {
        let since = if self.remembered.get(&range) == Some(&holder.id) {
            Since::Earlier
        } else if self.settled {
            Since::Later(self.arrivals)
        } else {
            Since::Start
        };
        self.arrivals += 1;
        let holders = self.ranges.entry(range).or_default();
        if holders.is_empty() {
            *self.lengths.entry(length(range)).or_default() += 1;
        }
        let held = holders.entry(holder).or_insert(Held { users: 0, since });
        held.users += 1;
        held.users == 1
    }

    fn withdraw(&mut self, range: IpNet, holder: Holder) -> bool {
        let Some(holders) = self.ranges.get_mut(&range) else { return false };
        let Some(held) = holders.get_mut(&holder) else { return false };
        held.users -= 1;
        if held.users > 0 {
            return false;
        }
        holders.remove(&holder);
        if holders.is_empty() {
            self.ranges.remove(&range);
            if let Some(users) = self.lengths.get_mut(&length(range)) {
                *users -= 1;
                if *users == 0 {
                    self.lengths.remove(&length(range));
                }
            }
        }
        true
    }
}

/// The ranges of a node, whole addresses of its own among them.
pub(super) fn of_node(pod_cidrs: &[IpNet], addresses: impl Iterator<Item = IpAddr>) -> Vec<IpNet> {
    pod_cidrs.iter().map(IpNet::trunc).chain(addresses.map(IpNet::from)).collect()
}

fn each(stated: Option<(u16, Vec<IpNet>)>) -> impl Iterator<Item = (u16, IpNet)> {
    stated.into_iter().flat_map(|(id, ranges)| ranges.into_iter().map(move |range| (id, range)))
}

fn length(range: IpNet) -> (bool, u8) {
    (range.addr().is_ipv4(), range.prefix_len())
}
