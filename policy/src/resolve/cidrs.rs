//! Identities of prefixes: known to this node alone, and one for each prefix that a policy mentions.
//!
//! A prefix's number follows from the prefix (its hash, then the next free number), so that a restarted agent comes to the
//! same numbers, whatever order the policies come in, unless two prefixes meet on one number.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use isthmus_wire::{Labels, NumericIdentity};

use super::CidrIdentity;
use super::identities::Identity;

/// Where numbers known to one node alone begin; there are 2^24 of them.
const FIRST: u32 = 1 << 24;
const COUNT: u32 = 1 << 24;

/// World over IPv4, and over IPv6.
pub(super) const WORLD_IPV4: NumericIdentity = NumericIdentity(9);
pub(super) const WORLD_IPV6: NumericIdentity = NumericIdentity(10);

/// Everything, in one of the families.
pub(super) fn everything(ipv4: bool) -> IpNet {
    if ipv4 {
        IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0))
    } else {
        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0))
    }
}

/// All prefixes with an identity.
#[derive(Debug)]
pub(super) struct Cidrs {
    used: BTreeMap<IpNet, Used>,
    taken: HashMap<u32, IpNet>,
    /// Numbers that go back at the end of the round, so that none changes hands within one.
    freed: Vec<u32>,
    /// Prefixes of which something may have to be told.
    touched: BTreeSet<IpNet>,
    told: BTreeMap<IpNet, CidrIdentity>,
}

#[derive(Debug)]
struct Used {
    id: NumericIdentity,
    /// How often policies mention it.
    users: usize,
    kube_apiserver: bool,
}

impl Cidrs {
    /// The two prefixes that cover everything are there from the start.
    pub(super) fn new() -> Self {
        let mut cidrs = Self {
            used: BTreeMap::new(),
            taken: HashMap::new(),
            freed: Vec::new(),
            touched: BTreeSet::new(),
            told: BTreeMap::new(),
        };
        for (net, id) in [(everything(true), WORLD_IPV4), (everything(false), WORLD_IPV6)] {
            cidrs.used.insert(net, Used { id, users: 1, kube_apiserver: false });
            cidrs.touched.insert(net);
        }
        cidrs
    }

    /// One more mention of a prefix. Returns its identity if it is new.
    pub(super) fn acquire(&mut self, net: IpNet) -> Option<NumericIdentity> {
        if let Some(used) = self.used.get_mut(&net) {
            used.users += 1;
            return None;
        }
        let start = hash(net);
        let id = (0..COUNT)
            .map(|step| FIRST + (start + step) % COUNT)
            .find(|id| self.taken.get(id).is_none_or(|known| *known == net))
            // Sixteen million prefixes do not fit into any policy map: the rest counts as world.
            .map_or(if net.addr().is_ipv4() { WORLD_IPV4 } else { WORLD_IPV6 }, NumericIdentity);
        self.taken.insert(id.0, net);
        self.used.insert(net, Used { id, users: 1, kube_apiserver: false });
        self.touched.insert(net);
        Some(id)
    }

    /// One mention less. Returns the identity that is to be forgotten.
    pub(super) fn release(&mut self, net: IpNet) -> Option<NumericIdentity> {
        let used = self.used.get_mut(&net)?;
        used.users -= 1;
        if used.users > 0 {
            return None;
        }
        let id = self.used.remove(&net)?.id;
        self.freed.push(id.0);
        self.touched.insert(net);
        Some(id)
    }

    /// Whether the Kubernetes API is served at this prefix. Returns its identity if that is news.
    pub(super) fn set_kube_apiserver(&mut self, net: IpNet, is: bool) -> Option<NumericIdentity> {
        let used = self.used.get_mut(&net).filter(|used| used.kube_apiserver != is)?;
        used.kube_apiserver = is;
        self.touched.insert(net);
        Some(used.id)
    }

    /// The identity of a prefix.
    pub(super) fn identity(&self, net: IpNet) -> Option<Identity> {
        let used = self.used.get(&net)?;
        let mut labels = Labels::new();
        let family = if net.addr().is_ipv4() { "world-ipv4" } else { "world-ipv6" };
        for name in ["world", family].into_iter().chain(used.kube_apiserver.then_some("kube-apiserver")) {
            // None of them holds a character that the text form could not carry.
            drop(labels.insert("reserved", name, ""));
        }
        Some(Identity::new(Arc::new(labels), Some(net)))
    }

    /// What is new since the last call.
    pub(super) fn take_changes(&mut self) -> Vec<(IpNet, Option<CidrIdentity>)> {
        let mut changes = Vec::new();
        for net in std::mem::take(&mut self.touched) {
            let now = self
                .used
                .get(&net)
                .map(|used| CidrIdentity { identity: used.id, kube_apiserver: used.kube_apiserver });
            let before = match now {
                Some(now) => self.told.insert(net, now),
                None => self.told.remove(&net),
            };
            if now != before {
                changes.push((net, now));
            }
        }
        for id in std::mem::take(&mut self.freed) {
            // Unless the prefix has come back under the same number meanwhile.
            if self.taken.get(&id).is_some_and(|net| self.used.get(net).is_none_or(|used| used.id.0 != id)) {
                self.taken.remove(&id);
            }
        }
        changes
    }
}

/// FNV-1a over the prefix: the same on every machine and in every version.
fn hash(net: IpNet) -> u32 {
    let mut hash = 0x811c_9dc5_u32;
    let mut feed = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    };
    match net.addr() {
        IpAddr::V4(addr) => feed(&addr.octets()),
        IpAddr::V6(addr) => feed(&addr.octets()),
    }
    feed(&[net.prefix_len()]);
    (hash ^ (hash >> 24)) % COUNT
}
