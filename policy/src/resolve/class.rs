//! Endpoints whose pods are alike: same labels, same named ports, so the same rules.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use isthmus_wire::{Labels, NumericIdentity};

use super::identities::Identities;
use super::l4::Prefixes;
use super::layer::{Layer, Statements, longest_covering};
use super::peers::{PeerId, PeerTable};
use super::policies::CompiledRule;
use super::{Decision, EndpointId, Enforcement, L4Prefix, NamedPorts, PolicyKey, Resolved, RuleId};
use crate::model::{Direction, Effect, PolicyName};

/// Most different sets of descriptions whose layers are kept for the next identity that fits the same.
const MAX_SHARED_LAYERS: usize = 4096;
/// "Any identity" in a key.
const ANY: NumericIdentity = NumericIdentity(0);

/// A class of endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ClassId(pub(super) u32);

/// What makes endpoints alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Likeness {
    pub(super) labels: Labels,
    pub(super) named_ports: NamedPorts,
}

/// Endpoints that are alike, and what they may do.
#[derive(Debug)]
pub(super) struct Class {
    pub(super) likeness: Arc<Likeness>,
    pub(super) endpoints: BTreeSet<EndpointId>,
    /// Endpoints that have not been told anything yet.
    pub(super) fresh: BTreeSet<EndpointId>,
    /// The rules that select them: policy and position in it.
    pub(super) rules: BTreeSet<(PolicyName, usize)>,
    pub(super) table: Table,
    /// Its rules have changed.
    pub(super) stale: bool,
    /// Otherwise, the identities that have changed.
    pub(super) stale_ids: BTreeSet<NumericIdentity>,
}

impl Class {
    pub(super) fn new(likeness: Arc<Likeness>) -> Self {
        Self {
            likeness,
            endpoints: BTreeSet::new(),
            fresh: BTreeSet::new(),
            rules: BTreeSet::new(),
            table: Table::default(),
            stale: true,
            stale_ids: BTreeSet::new(),
        }
    }
}

/// What endpoints of a class may do, by identity.
#[derive(Debug, Default)]
pub(super) struct Table {
    ingress: Side,
    egress: Side,
}

/// One direction of it.
#[derive(Debug, Default)]
struct Side {
    enforced: bool,
    /// What is said of everybody.
    any: Layer,
    /// What is said of those that a description fits.
    by_peer: HashMap<PeerId, Vec<Said>>,
    /// What is said of everybody's ports of some name (egress).
    by_name: Vec<Said>,
    /// Whether layers depend on the named ports of who is on the other side.
    names: bool,
    /// What is said of an identity; empty ones are left out.
    layers: HashMap<NumericIdentity, Layer>,
    /// Layers by the descriptions that fit.
    shared: HashMap<Vec<PeerId>, Layer>,
}

/// One clause's part in it.
#[derive(Clone, Debug)]
struct Said {
    ports: Prefixes,
    effect: Effect,
    order: u32,
    rule: RuleId,
}

/// What a table is made of.
pub(super) struct Ingredients<'a> {
    pub(super) enforcement: Enforcement,
    pub(super) likeness: &'a Likeness,
    pub(super) identities: &'a Identities,
    pub(super) peers: &'a PeerTable,
    /// The identities that have named ports.
    pub(super) with_names: &'a BTreeSet<NumericIdentity>,
}

impl Table {
    /// The table of these rules, which are in the order of their policies' names.
    pub(super) fn build<'a>(
        rules: impl Iterator<Item = &'a CompiledRule> + Clone,
        with: &Ingredients<'_>,
    ) -> Self {
        Self {
            ingress: Side::build(Direction::Ingress, rules.clone(), with),
            egress: Side::build(Direction::Egress, rules, with),
        }
    }

    fn sides(&self) -> [(Direction, &Side); 2] {
        [(Direction::Ingress, &self.ingress), (Direction::Egress, &self.egress)]
    }

    fn side(&self, direction: Direction) -> &Side {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// The descriptions it depends on.
    pub(super) fn peers(&self) -> BTreeSet<PeerId> {
        self.sides().into_iter().flat_map(|(_, side)| side.by_peer.keys().copied()).collect()
    }

    /// Whether it has rules about everybody's ports of some name.
    pub(super) fn depends_on_names(&self) -> bool {
        !self.egress.by_name.is_empty()
    }

    pub(super) fn is_enforced(&self, direction: Direction) -> bool {
        self.side(direction).enforced
    }

    /// Whether both say the same.
    pub(super) fn equals(&self, other: &Self) -> bool {
        let same = |a: &Side, b: &Side| a.enforced == b.enforced && a.any == b.any && a.layers == b.layers;
        same(&self.ingress, &other.ingress) && same(&self.egress, &other.egress)
    }

    /// The whole map.
    pub(super) fn resolved(&self) -> Resolved {
        let mut entries = BTreeMap::new();
        for (direction, side) in self.sides() {
            let layers = side.layers.iter().map(|(id, layer)| (*id, layer));
            for (identity, layer) in layers.chain([(ANY, &side.any)]) {
                entries.extend(
                    layer
                        .iter()
                        .map(|(l4, decision)| (PolicyKey { identity, direction, l4: *l4 }, *decision)),
                );
            }
        }
        Resolved { ingress_enforced: self.ingress.enforced, egress_enforced: self.egress.enforced, entries }
    }

    /// What the map says about a packet.
    pub(super) fn verdict(
        &self,
        direction: Direction,
        peer: NumericIdentity,
        protocol: u8,
        port: u16,
    ) -> Decision {
        let side = self.side(direction);
        let packet = L4Prefix::port(protocol, port);
        let own = || longest_covering(side.layers.get(&peer)?, &packet);
        crate::lookup::decide(side.enforced, direction, peer, own, || longest_covering(&side.any, &packet))
    }

    /// An identity has come, changed or gone: adjusts what is said of it and notes the difference.
    pub(super) fn update(
        &mut self,
        identity: NumericIdentity,
        with: &Ingredients<'_>,
        put: &mut Vec<(PolicyKey, Decision)>,
        delete: &mut Vec<PolicyKey>,
    ) {
        for (direction, side) in
            [(Direction::Ingress, &mut self.ingress), (Direction::Egress, &mut self.egress)]
        {
            let new = side.layer(direction, identity, with);
            let old = match new.is_empty() {
                true => side.layers.remove(&identity),
                false => side.layers.insert(identity, Arc::clone(&new)),
            };
            let old = old.unwrap_or_default();
            if Arc::ptr_eq(&old, &new) {
                continue;
            }
            let key = |l4: &L4Prefix| PolicyKey { identity, direction, l4: *l4 };
            let find = |layer: &Layer, l4: &L4Prefix| {
                layer.binary_search_by(|(known, _)| known.cmp(l4)).ok().map(|at| layer[at].1)
            };
            let changed = new.iter().filter(|(l4, decision)| find(&old, l4) != Some(*decision));
            put.extend(changed.map(|(l4, decision)| (key(l4), *decision)));
            delete.extend(old.iter().filter(|(l4, _)| find(&new, l4).is_none()).map(|(l4, _)| key(l4)));
        }
    }
}

impl Side {
    fn build<'a>(
        direction: Direction,
        rules: impl Iterator<Item = &'a CompiledRule> + Clone,
        with: &Ingredients<'_>,
    ) -> Self {
        let mut side = Self::default();
        let denied = match with.enforcement {
            Enforcement::Never => return side,
            Enforcement::Always => true,
            Enforcement::Default => rules.clone().any(|rule| rule.denies_by_default(direction)),
        };
        let mut any = Statements::default();
        let mut forbids = false;
        let clauses = rules.flat_map(|rule| &rule.clauses).filter(|clause| clause.direction == direction);
        for (order, clause) in clauses.enumerate() {
            forbids |= clause.effect == Effect::Deny;
            let said = Said {
                ports: clause.ports.clone(),
                effect: clause.effect,
                // A policy map ends long before this does.
                order: u32::try_from(order).unwrap_or(u32::MAX),
                rule: clause.rule,
            };
            match &clause.peers {
                Some(peers) => {
                    side.names |= direction == Direction::Egress && said.ports.has_names();
                    for peer in peers {
                        side.by_peer.entry(*peer).or_default().push(said.clone());
                    }
                }
                None => {
                    let own = match direction {
                        Direction::Ingress => &with.likeness.named_ports,
                        Direction::Egress => &NamedPorts::new(),
                    };
                    said.say(own, &mut any);
                    if direction == Direction::Egress && said.ports.has_names() {
                        side.names = true;
                        side.by_name.push(said);
                    }
                }
            }
        }
        side.enforced = denied || forbids;
        if !side.enforced {
            return Self::default();
        }
        if !denied {
            any.add(L4Prefix::ANY, Effect::Allow, u32::MAX, RuleId::NOT_RESTRICTED);
        }
        side.any = any.resolve(&[]);
        let mut ids: BTreeSet<NumericIdentity> =
            side.by_peer.keys().flat_map(|peer| with.peers.members(*peer)).collect();
        if !side.by_name.is_empty() {
            ids.extend(with.with_names);
        }
        for id in ids {
            let layer = side.layer(direction, id, with);
            if !layer.is_empty() {
                side.layers.insert(id, layer);
            }
        }
        side
    }

    /// What is said of an identity.
    fn layer(&mut self, direction: Direction, id: NumericIdentity, with: &Ingredients<'_>) -> Layer {
        // A node always reaches its pods, which needs no entry.
        let needless = !self.enforced || (direction == Direction::Ingress && id == NumericIdentity::HOST);
        let Some(identity) = with.identities.get(id).filter(|_| !needless) else { return Layer::default() };
        let fitting: Vec<PeerId> =
            identity.peers.iter().copied().filter(|peer| self.by_peer.contains_key(peer)).collect();
        if fitting.is_empty() && self.by_name.is_empty() {
            return Layer::default();
        }
        let names = match direction {
            Direction::Ingress => &with.likeness.named_ports,
            Direction::Egress => &identity.named_ports,
        };
        let shareable = !self.names || names.is_empty();
        if shareable && let Some(layer) = self.shared.get(&fitting) {
            return Arc::clone(layer);
        }
        let mut statements = Statements::default();
        let by_peer = fitting.iter().filter_map(|peer| self.by_peer.get(peer)).flatten();
        for said in by_peer.chain(&self.by_name) {
            said.say(names, &mut statements);
        }
        let layer = statements.resolve(&self.any);
        if shareable {
            if self.shared.len() >= MAX_SHARED_LAYERS {
                self.shared.clear();
            }
            self.shared.insert(fitting, Arc::clone(&layer));
        }
        layer
    }
}

impl Said {
    fn say(&self, names: &NamedPorts, statements: &mut Statements) {
        for l4 in self.ports.with(names) {
            statements.add(l4, self.effect, self.order, self.rule);
        }
    }
}
