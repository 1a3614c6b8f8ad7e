//! Longest-prefix match over all peers at once: which peer owns an address.
//!
//! One table answers both questions of cryptokey routing: where a packet for an address goes, and whether a packet
//! from an address may come from the peer that sent it. Since the longest prefix among all peers decides, a peer with
//! a wide prefix cannot speak for an address inside it that another peer owns.

use std::net::IpAddr;

use ipnet::IpNet;

/// Values by prefix, IPv4 and IPv6 apart. Looking up, inserting and removing take at most as many steps as an address
/// has bits, and about log2 of the number of prefixes when they are spread.
#[derive(Debug, Clone)]
pub struct PrefixTable<T> {
    v4: Trie<T>,
    v6: Trie<T>,
}

impl<T> Default for PrefixTable<T> {
    fn default() -> Self {
        Self { v4: Trie::default(), v6: Trie::default() }
    }
}

impl<T> PrefixTable<T> {
    /// The value of the longest prefix that contains `address`.
    pub fn lookup(&self, address: IpAddr) -> Option<&T> {
        match address {
            IpAddr::V4(_) => self.v4.lookup(bits(address)),
            IpAddr::V6(_) => self.v6.lookup(bits(address)),
        }
    }

    /// Gives `prefix` this value. Returns the one it had.
    pub fn insert(&mut self, prefix: IpNet, value: T) -> Option<T> {
        self.trie_mut(prefix).insert(bits(prefix.network()), prefix.prefix_len(), value)
    }

    /// Takes `prefix` itself away, not those inside it. Returns its value.
    pub fn remove(&mut self, prefix: IpNet) -> Option<T> {
        self.trie_mut(prefix).remove(bits(prefix.network()), prefix.prefix_len())
    }

    /// The value of exactly this prefix.
    pub fn exact(&self, prefix: IpNet) -> Option<&T> {
        let trie = if prefix.addr().is_ipv4() { &self.v4 } else { &self.v6 };
        trie.exact(bits(prefix.network()), prefix.prefix_len())
    }

    /// How many prefixes there are.
    pub fn len(&self) -> usize {
        self.v4.values + self.v6.values
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn trie_mut(&mut self, prefix: IpNet) -> &mut Trie<T> {
        if prefix.addr().is_ipv4() { &mut self.v4 } else { &mut self.v6 }
    }
}

/// The address in the upper bits.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => address.to_bits(),
    }
}

const NONE: u32 = u32::MAX;

/// A binary trie without one-way branches: a node is a prefix that has a value or where two subtrees part. Nodes live
/// in one vector, so that a walk stays in few cache lines.
#[derive(Debug, Clone)]
struct Trie<T> {
    nodes: Vec<Node<T>>,
    free: Vec<u32>,
    root: u32,
    values: usize,
}

impl<T> Default for Trie<T> {
    fn default() -> Self {
        Self { nodes: Vec::new(), free: Vec::new(), root: NONE, values: 0 }
    }
}

#[derive(Debug, Clone)]
struct Node<T> {
    bits: u128,
    length: u8,
    children: [u32; 2],
    value: Option<T>,
}

impl<T> Node<T> {
    fn contains(&self, bits: u128) -> bool {
        common(self.bits, bits) >= self.length
    }
}

/// How many leading bits two addresses share.
fn common(a: u128, b: u128) -> u8 {
    (a ^ b).leading_zeros() as u8
}

/// The bit behind a prefix of this length, which chooses the child.
fn branch(bits: u128, length: u8) -> usize {
    if length >= 128 { 0 } else { (bits >> (127 - length)) as usize & 1 }
}

fn masked(bits: u128, length: u8) -> u128 {
    if length == 0 { 0 } else { bits & (u128::MAX << (128 - length)) }
}

impl<T> Trie<T> {
    fn lookup(&self, bits: u128) -> Option<&T> {
        let mut best = None;
        let mut at = self.root;
        while let Some(node) = self.nodes.get(at as usize) {
            if !node.contains(bits) {
                break;
            }
            best = node.value.as_ref().or(best);
            if node.length == 128 {
                break;
            }
            at = node.children[branch(bits, node.length)];
        }
        best
    }

    fn exact(&self, bits: u128, length: u8) -> Option<&T> {
        let mut at = self.root;
        while let Some(node) = self.nodes.get(at as usize) {
            if node.length > length || !node.contains(bits) {
                return None;
            }
            if node.length == length {
                return node.value.as_ref();
            }
            at = node.children[branch(bits, node.length)];
        }
        None
    }

    fn insert(&mut self, bits: u128, length: u8, value: T) -> Option<T> {
        let mut parent = None;
        let mut at = self.root;
        while at != NONE {
            let node = &mut self.nodes[at as usize];
            let shared = common(node.bits, bits).min(node.length).min(length);
            if shared == node.length && shared == length {
                let before = node.value.replace(value);
                self.values += usize::from(before.is_none());
                return before;
            }
            if shared < node.length {
                // They part inside this node's prefix: a new one comes above it.
                self.values += 1;
                let (node_bits, leaf) = (node.bits, shared < length);
                let above = if leaf {
                    let leaf = self.add(bits, length, Some(value));
                    let above = self.add(masked(bits, shared), shared, None);
                    self.nodes[above as usize].children[branch(bits, shared)] = leaf;
                    above
                } else {
                    self.add(bits, length, Some(value))
                };
                self.nodes[above as usize].children[branch(node_bits, shared)] = at;
                self.hang(parent, above);
                return None;
            }
            let side = branch(bits, node.length);
            parent = Some((at, side));
            at = node.children[side];
        }
        self.values += 1;
        let leaf = self.add(bits, length, Some(value));
        self.hang(parent, leaf);
        None
    }

    fn remove(&mut self, bits: u128, length: u8) -> Option<T> {
        let (mut grandparent, mut parent) = (None, None);
        let mut at = self.root;
        loop {
            let node = self.nodes.get(at as usize)?;
            if node.length > length || !node.contains(bits) {
                return None;
            }
            if node.length == length {
                break;
            }
            let side = branch(bits, node.length);
            grandparent = parent;
            parent = Some((at, side));
            at = node.children[side];
        }
        let value = self.nodes[at as usize].value.take()?;
        self.values -= 1;
        match self.nodes[at as usize].children {
            [NONE, NONE] => {
                self.hang(parent, NONE);
                self.free.push(at);
                if let Some((above, _)) = parent {
                    self.shorten(grandparent, above);
                }
            }
            _ => self.shorten(parent, at),
        }
        Some(value)
    }

    /// Takes out a node that has no value and fewer than two children.
    fn shorten(&mut self, parent: Option<(u32, usize)>, at: u32) {
        let node = &self.nodes[at as usize];
        let child = match (node.value.is_some(), node.children) {
            (false, [child, NONE] | [NONE, child]) => child,
            _ => return,
        };
        self.hang(parent, child);
        self.free.push(at);
    }

    fn hang(&mut self, parent: Option<(u32, usize)>, child: u32) {
        match parent {
            Some((parent, side)) => self.nodes[parent as usize].children[side] = child,
            None => self.root = child,
        }
    }

    fn add(&mut self, bits: u128, length: u8, value: Option<T>) -> u32 {
        let node = Node { bits, length, children: [NONE; 2], value };
        match self.free.pop() {
            Some(at) => {
                self.nodes[at as usize] = node;
                at
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as u32
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    /// Prefixes and addresses close to each other, so that they meet.
    fn prefix() -> impl Strategy<Value = IpNet> {
        (any::<bool>(), any::<u16>(), 0u8..=32).prop_map(|(v4, bits, length)| {
            let net = if v4 {
                IpNet::new(std::net::Ipv4Addr::from_bits(u32::from(bits) * 0x0001_0001).into(), length)
            } else {
                let bits = u128::from(bits) << 112 | u128::from(bits);
                IpNet::new(std::net::Ipv6Addr::from_bits(bits).into(), length * 4)
            };
            net.unwrap().trunc()
        })
    }

    fn naive(model: &BTreeMap<IpNet, u32>, address: IpAddr) -> Option<u32> {
        model
            .iter()
            .filter(|(prefix, _)| prefix.contains(&address))
            .max_by_key(|(prefix, _)| prefix.prefix_len())
            .map(|(_, value)| *value)
    }

    proptest! {
        #[test]
        fn any_history_answers_as_a_list_that_is_searched_whole(
            steps in proptest::collection::vec((any::<bool>(), prefix()), 1..200),
            asked in proptest::collection::vec(prefix(), 50),
        ) {
            let mut table = PrefixTable::default();
            let mut model = BTreeMap::new();
            for (number, (insert, prefix)) in steps.into_iter().enumerate() {
                if insert {
                    prop_assert_eq!(table.insert(prefix, number as u32), model.insert(prefix, number as u32));
                } else {
                    // Removes one that is there as often as one that may not be.
                    let prefix = model.keys().nth(number % 7).copied().unwrap_or(prefix);
                    prop_assert_eq!(table.remove(prefix), model.remove(&prefix));
                }
                prop_assert_eq!(table.len(), model.len());
            }
            for prefix in asked.iter().chain(model.keys()) {
                prop_assert_eq!(table.exact(*prefix).copied(), model.get(prefix).copied());
                for address in [prefix.network(), prefix.broadcast()] {
                    prop_assert_eq!(table.lookup(address).copied(), naive(&model, address));
                }
            }
            // Emptied, it holds on to no node.
            for prefix in model.keys() {
                table.remove(*prefix);
            }
            for trie in [&table.v4, &table.v6] {
                prop_assert_eq!(trie.root, NONE);
                prop_assert_eq!(trie.free.len(), trie.nodes.len());
            }
        }
    }

    #[test]
    fn the_longest_prefix_decides_whoever_owns_the_shorter() {
        let mut table = PrefixTable::default();
        table.insert(net("10.0.0.0/8"), "wide");
        table.insert(net("10.1.0.0/16"), "narrow");
        table.insert(net("10.1.2.3/32"), "host");
        table.insert(net("0.0.0.0/0"), "default");
        table.insert(net("::/0"), "default6");
        let ask = |address: &str| *table.lookup(address.parse().unwrap()).unwrap();
        assert_eq!(ask("10.2.0.1"), "wide");
        assert_eq!(ask("10.1.0.1"), "narrow");
        assert_eq!(ask("10.1.2.3"), "host");
        assert_eq!(ask("11.0.0.1"), "default");
        assert_eq!(ask("fd00::1"), "default6");
    }

    #[test]
    fn addresses_of_the_two_families_do_not_meet() {
        let mut table = PrefixTable::default();
        table.insert(net("0.0.0.0/0"), 4);
        assert_eq!(table.lookup("::".parse().unwrap()), None);
        assert_eq!(table.lookup("::ffff:1.2.3.4".parse().unwrap()), None);
    }

    #[test]
    fn a_node_of_the_table_stays_small() {
        assert!(size_of::<Node<u32>>() <= 48);
    }
}
