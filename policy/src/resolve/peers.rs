//! Descriptions of peers, each kept once however many policies have it, and whom they fit.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use isthmus_wire::{ClusterName, Labels, NumericIdentity};

use super::class::ClassId;
use super::identities::{Identities, Identity};
use crate::labels::{Operator, Requirement, Selector, Source};
use crate::model::{Entity, Peer};

/// A description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PeerId(u32);

/// All descriptions.
#[derive(Debug, Default)]
pub(super) struct PeerTable {
    ids: HashMap<Peer, PeerId>,
    states: HashMap<PeerId, PeerState>,
    next: u32,
    anchors: Anchors,
}

#[derive(Debug)]
struct PeerState {
    peer: Peer,
    /// How often policies mention it.
    users: usize,
    /// Whom it fits.
    members: BTreeSet<NumericIdentity>,
    /// The endpoints whose rules mention it.
    classes: HashSet<ClassId>,
}

/// Where to look for descriptions that may fit an identity: each stands under one thing that it requires.
#[derive(Debug, Default)]
struct Anchors {
    by_label: HashMap<Arc<str>, HashMap<Arc<str>, Vec<PeerId>>>,
    by_key: HashMap<Arc<str>, Vec<PeerId>>,
    /// Those that are about prefixes.
    cidrs: Vec<PeerId>,
    /// Those that require nothing to be there, and the entities: looked at for every identity.
    others: Vec<PeerId>,
}

impl PeerTable {
    /// One more mention of a description. One that is new is told whom it fits; returns whether it is.
    pub(super) fn acquire(
        &mut self,
        peer: Peer,
        cluster: &ClusterName,
        identities: &mut Identities,
    ) -> (PeerId, bool) {
        if let Some(id) = self.ids.get(&peer) {
            if let Some(state) = self.states.get_mut(id) {
                state.users += 1;
            }
            return (*id, false);
        }
        let id = PeerId(self.next);
        self.next += 1;
        let members = members(&peer, cluster, identities);
        for member in &members {
            if let Some(identity) = identities.get_mut(*member) {
                // Ids only grow, so the order stays.
                identity.peers.push(id);
            }
        }
        self.anchors.insert(id, &peer);
        self.ids.insert(peer.clone(), id);
        self.states.insert(id, PeerState { peer, users: 1, members, classes: HashSet::new() });
        (id, true)
    }

    /// One mention less.
    pub(super) fn release(&mut self, id: PeerId, identities: &mut Identities) {
        let Some(state) = self.states.get_mut(&id) else { return };
        state.users -= 1;
        if state.users > 0 {
            return;
        }
        let Some(state) = self.states.remove(&id) else { return };
        self.ids.remove(&state.peer);
        self.anchors.remove(id, &state.peer);
        for member in state.members {
            if let Some(identity) = identities.get_mut(member) {
                identity.peers.retain(|peer| *peer != id);
            }
        }
    }

    /// The descriptions that fit an identity, ordered.
    pub(super) fn fitting(
        &self,
        id: NumericIdentity,
        identity: &Identity,
        cluster: &ClusterName,
    ) -> Vec<PeerId> {
        let mut found = Vec::new();
        self.anchors.candidates(identity, |candidate| {
            if self.states.get(&candidate).is_some_and(|state| fits(&state.peer, id, identity, cluster)) {
                found.push(candidate);
            }
        });
        found.sort_unstable();
        found.dedup();
        found
    }

    /// An identity fits a description, or (false) no longer does.
    pub(super) fn set_member(&mut self, peer: PeerId, id: NumericIdentity, fits: bool) {
        if let Some(state) = self.states.get_mut(&peer) {
            if fits {
                state.members.insert(id)
            } else {
                state.members.remove(&id)
            };
        }
    }

    /// Whom a description fits.
    pub(super) fn members(&self, peer: PeerId) -> impl Iterator<Item = NumericIdentity> + '_ {
        self.states.get(&peer).into_iter().flat_map(|state| state.members.iter().copied())
    }

    /// The endpoints whose rules mention a description.
    pub(super) fn classes(&self, peer: PeerId) -> impl Iterator<Item = ClassId> + '_ {
        self.states.get(&peer).into_iter().flat_map(|state| state.classes.iter().copied())
    }

    pub(super) fn add_class(&mut self, peer: PeerId, class: ClassId) {
        if let Some(state) = self.states.get_mut(&peer) {
            state.classes.insert(class);
        }
    }

    pub(super) fn remove_class(&mut self, peer: PeerId, class: ClassId) {
        if let Some(state) = self.states.get_mut(&peer) {
            state.classes.remove(&class);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.states.len()
    }
}

fn members(peer: &Peer, cluster: &ClusterName, identities: &Identities) -> BTreeSet<NumericIdentity> {
    match peer {
        Peer::Labels(selector) => identities.matching(selector),
        _ => identities
            .iter()
            .filter(|(id, identity)| fits(peer, *id, identity, cluster))
            .map(|(id, _)| id)
            .collect(),
    }
}

fn fits(peer: &Peer, id: NumericIdentity, identity: &Identity, cluster: &ClusterName) -> bool {
    match peer {
        Peer::Labels(selector) => selector.matches(&identity.labels),
        Peer::Cidr(cidr) => identity.prefix.is_some_and(|prefix| cidr.contains(&prefix)),
        Peer::Entity(entity) => fits_entity(*entity, id, identity, cluster),
        // Replaced by what is behind the service before it comes here.
        Peer::Service(_) => false,
    }
}

fn fits_entity(entity: Entity, id: NumericIdentity, identity: &Identity, cluster: &ClusterName) -> bool {
    let has = |name: &str| identity.labels.get(name).is_some_and(|label| label.source == "reserved");
    match entity {
        Entity::All => true,
        Entity::None => false,
        // The nodes of all clusters have the same identity, so they are all in it.
        Entity::Cluster => {
            identity.labels.k8s(Labels::CLUSTER) == Some(cluster.as_str())
                || (id.is_reserved() && !has("world"))
                || has("kube-apiserver")
        }
        Entity::World
        | Entity::WorldIpv4
        | Entity::WorldIpv6
        | Entity::Host
        | Entity::RemoteNode
        | Entity::KubeApiserver
        | Entity::Health
        | Entity::Ingress
        | Entity::Init
        | Entity::Unmanaged => has(entity.as_str()),
    }
}

impl Anchors {
    fn insert(&mut self, id: PeerId, peer: &Peer) {
        match peer {
            Peer::Labels(selector) => match self.best(selector) {
                Some(Requirement { key, operator: Operator::In(values), .. }) => {
                    let by_value = self.by_label.entry(Arc::clone(key)).or_default();
                    for value in values {
                        by_value.entry(Arc::clone(value)).or_default().push(id);
                    }
                }
                Some(Requirement { key, .. }) => self.by_key.entry(Arc::clone(key)).or_default().push(id),
                None => self.others.push(id),
            },
            Peer::Cidr(_) => self.cidrs.push(id),
            Peer::Entity(_) | Peer::Service(_) => self.others.push(id),
        }
    }

    /// The requirement that says most: of those that demand a value, one that the fewest descriptions stand under.
    fn best<'a>(&self, selector: &'a Selector) -> Option<&'a Requirement> {
        let crowd = |requirement: &Requirement| match &requirement.operator {
            Operator::In(values) => {
                let by_value = self.by_label.get(&requirement.key);
                let under = |value| by_value.and_then(|by_value| by_value.get(value)).map_or(0, Vec::len);
                // What every selector has says least of all.
                let everybodys = matches!(&*requirement.key, Labels::CLUSTER | Labels::NAMESPACE);
                Some((usize::from(everybodys), values.iter().map(under).sum::<usize>()))
            }
            Operator::Exists => Some((2, 0)),
            Operator::NotIn(_) | Operator::DoesNotExist => None,
        };
        selector
            .requirements()
            .iter()
            .filter_map(|requirement| Some((crowd(requirement)?, requirement)))
            .min_by_key(|(crowd, _)| *crowd)
            .map(|(_, requirement)| requirement)
    }

    /// Under which requirement it stands is not kept: it is rare enough that a description goes.
    fn remove(&mut self, id: PeerId, peer: &Peer) {
        let leave = |list: &mut Vec<PeerId>| list.retain(|known| *known != id);
        let Peer::Labels(selector) = peer else {
            leave(&mut self.cidrs);
            leave(&mut self.others);
            return;
        };
        for Requirement { key, operator, .. } in selector.requirements() {
            if let Operator::In(values) = operator
                && let Some(by_value) = self.by_label.get_mut(key)
            {
                for value in values {
                    if let Some(list) = by_value.get_mut(value) {
                        leave(list);
                        if list.is_empty() {
                            by_value.remove(value);
                        }
                    }
                }
                if by_value.is_empty() {
                    self.by_label.remove(key);
                }
            }
            if let Some(list) = self.by_key.get_mut(key) {
                leave(list);
                if list.is_empty() {
                    self.by_key.remove(key);
                }
            }
        }
        leave(&mut self.others);
    }

    fn candidates(&self, identity: &Identity, mut visit: impl FnMut(PeerId)) {
        for (key, label) in identity.labels.iter() {
            let by_value = self.by_label.get(key).and_then(|by_value| by_value.get(label.value.as_str()));
            by_value.into_iter().flatten().copied().for_each(&mut visit);
            self.by_key.get(key).into_iter().flatten().copied().for_each(&mut visit);
        }
        if identity.prefix.is_some() {
            self.cidrs.iter().copied().for_each(&mut visit);
        }
        self.others.iter().copied().for_each(&mut visit);
    }
}

/// A selector that says of which cluster its endpoints are: the own one, unless it says something of clusters itself. The
/// fixed identities are of no cluster.
pub(super) fn of_own_cluster(selector: &Arc<Selector>, cluster: &ClusterName) -> Arc<Selector> {
    let requirements = selector.requirements();
    let settled = requirements.iter().any(|requirement| {
        requirement.source == Source::reserved()
            || (*requirement.key == *Labels::CLUSTER
                && (requirement.source == Source::Any || requirement.source == Source::k8s()))
    });
    if settled {
        return Arc::clone(selector);
    }
    let mut requirements = requirements.to_vec();
    requirements.push(Requirement::equals(Source::k8s(), Labels::CLUSTER, cluster.as_str()));
    Arc::new(Selector::new(requirements))
}
