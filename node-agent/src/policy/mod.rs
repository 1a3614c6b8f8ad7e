//! What the pods of this node may do: policies, identities and pods in; changes of endpoints and of their policy maps out.
//! Pure, with the time passed in.
//!
//! What policies mean is `isthmus_policy`'s; here is when it is put in force:
//!
//! - **A restarted agent** leaves every endpoint of its earlier run as it is pinned until it has read what decides: the own
//!   cluster's policies, namespaces, services, identities, addresses and nodes, then the peers' identities, addresses and
//!   nodes, for at most [`Settings::sync_timeout`]. Then all endpoints change to what holds now, each at once. So long the
//!   prefixes that the earlier run gave identities to stay as they are, too, and no other gets one: its maps know no other.
//! - **A new endpoint** is held back (everything is dropped that a policy could be about) until its policy is known: at once
//!   once the agent has read what decides, and after [`Settings::endpoint_wait`] at the latest, with what is known then:
//!   policies that have not been read by then do not restrict it. That is about this endpoint alone.
//! - **A change** touches the endpoints that it is about. Their maps come before the addresses of the identities in them.
//! - **What cannot be put in force** leaves the endpoint closed, is told in the status and in Kubernetes, and is tried again.

mod endpoint;
mod op;
mod refusal;
mod status;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use isthmus_policy::{
    Changes as Resolutions, CidrIdentity, EndpointChange, EndpointId, Enforcement, Engine, Parsed,
    PolicyName, Service, Subject,
};
use isthmus_wire::{ClusterName, Labels, NumericIdentity};

pub use self::endpoint::{LocalEndpoint, subject};
pub use self::op::{Fault, PolicyOp};
pub use self::refusal::Refusal;
pub use self::status::{EndpointPolicy, EndpointState, PolicySummary, Standing};
use crate::datapath::{AtFirst, EndpointSettings, Enforcement as Directions};
use crate::mesh::fact::{Moment, ServiceName};
use crate::mesh::{Changes, Mesh, Resource};

/// How policies are put in force.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the own cluster.
    pub cluster: ClusterName,
    /// Which endpoints are restricted at all.
    pub enforcement: Enforcement,
    /// Whether peers selected without naming a cluster are those of the own one.
    pub default_local_cluster: bool,
    /// How long a new endpoint is held back at most; none: until what decides has been read.
    pub endpoint_wait: Option<Duration>,
    /// How long peers have to be read after a start, counted from when the own cluster has been read.
    pub sync_timeout: Duration,
}

impl Settings {
    /// The defaults.
    pub fn new(cluster: &ClusterName) -> Self {
        Self {
            cluster: cluster.clone(),
            enforcement: Enforcement::Default,
            default_local_cluster: true,
            endpoint_wait: Some(Duration::from_secs(10)),
            sync_timeout: Duration::from_secs(60),
        }
    }
}

/// Policies, the pods of this node, and what of both has been put in force.
#[derive(Debug)]
pub struct Policies {
    settings: Settings,
    engine: Engine,
    startup: Startup,
    /// Policies by name: UID-independent, for the status.
    known: BTreeMap<PolicyName, usize>,
    endpoints: BTreeMap<u32, Endpoint>,
    by_address: HashMap<IpAddr, BTreeSet<u32>>,
    /// Prefixes with an identity of this node's own, as they should be in the ipcache.
    cidrs: BTreeMap<IpNet, CidrIdentity>,
    changed_cidrs: BTreeSet<IpNet>,
    /// An earlier run has given prefixes their identity.
    inherited_cidrs: bool,
    /// Addresses of this very node.
    host: BTreeSet<IpAddr>,
    /// Those of them that have come or gone.
    changed_host: BTreeSet<IpAddr>,
    /// Endpoints whose pod, address or identity has changed.
    restated: BTreeSet<u32>,
    /// Interfaces that no pod has any more.
    gone: BTreeSet<u32>,
    /// Endpoints whose policy is to be put in place whole.
    whole: BTreeSet<u32>,
    /// Endpoints whose policy is not in force yet.
    undecided: BTreeSet<u32>,
    /// Endpoints with a fault that may pass.
    faulty: BTreeSet<u32>,
    /// How often a fault came or went.
    refusals: u64,
}

/// An endpoint of this node: a pod's interface.
#[derive(Debug)]
struct Endpoint {
    pod: LocalEndpoint,
    phase: Phase,
    fault: Option<Fault>,
    /// The directions in which nothing passes while there is a fault.
    closed: Directions,
}

/// How far an endpoint's policy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// As an earlier run of the agent left it, or without any policy as before: until what decides has been read.
    AsPinned,
    /// New, and held back until then, or (none) until what decides has been read.
    Waiting(Option<Moment>),
    /// What holds is in force.
    InForce,
}

/// How far reading what decides is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Startup {
    ReadingOwn,
    ReadingPeers(Moment),
    Done,
}

/// What of the own cluster decides.
const OWN: [Resource; 7] = [
    Resource::Policies,
    Resource::Namespaces,
    Resource::Services,
    Resource::Identities,
    Resource::Endpoints,
    Resource::Nodes,
    Resource::ClusterConfigs,
];
/// What of peers does.
const PEERS: [Resource; 3] = [Resource::Identities, Resource::Endpoints, Resource::Nodes];

impl Policies {
    /// Without policies and pods.
    pub fn new(settings: Settings) -> Self {
        let engine = Engine::new(isthmus_policy::Settings {
            enforcement: settings.enforcement,
            policy_default_local_cluster: settings.default_local_cluster,
            ..isthmus_policy::Settings::new(settings.cluster.clone())
        });
        Self {
            settings,
            engine,
            startup: Startup::ReadingOwn,
            known: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            by_address: HashMap::new(),
            cidrs: BTreeMap::new(),
            changed_cidrs: BTreeSet::new(),
            inherited_cidrs: false,
            host: BTreeSet::new(),
            changed_host: BTreeSet::new(),
            restated: BTreeSet::new(),
            gone: BTreeSet::new(),
            whole: BTreeSet::new(),
            undecided: BTreeSet::new(),
            faulty: BTreeSet::new(),
            refusals: 0,
        }
    }

    /// The same where an earlier run has given (or not) prefixes their identity, which its policy maps are about.
    pub fn inheriting(self, cidrs: bool) -> Self {
        Self { inherited_cidrs: cidrs, ..self }
    }

    /// Whether an earlier run has given prefixes their identity.
    pub fn inherits_cidrs(&self) -> bool {
        self.inherited_cidrs
    }

    /// A policy is new or has changed, or (none) is gone.
    pub fn policy(&mut self, name: PolicyName, policy: Option<Parsed>) {
        match &policy {
            Some(policy) => drop(self.known.insert(name.clone(), policy.problems.len())),
            None => drop(self.known.remove(&name)),
        }
        self.engine.set_policy(name, policy);
    }

    /// The labels of a namespace, or (none) that it is gone.
    pub fn namespace(&mut self, name: &str, labels: Option<BTreeMap<String, String>>) {
        self.engine.set_namespace(name, labels);
    }

    /// All addresses of this very node.
    pub fn host(&mut self, addresses: BTreeSet<IpAddr>) {
        self.changed_host.extend(self.host.symmetric_difference(&addresses));
        self.host = addresses;
    }

    /// The pod at an interface of this node, or (none) that there is none any more.
    pub fn endpoint(&mut self, interface: u32, pod: Option<LocalEndpoint>, now: Moment) {
        let Some(pod) = pod else {
            if let Some(endpoint) = self.endpoints.remove(&interface) {
                self.refusals += u64::from(endpoint.fault.is_some());
                self.forget_addresses(interface, &endpoint.pod);
                self.engine.set_endpoint(id(interface), None);
            }
            for set in [&mut self.restated, &mut self.whole, &mut self.undecided, &mut self.faulty] {
                set.remove(&interface);
            }
            self.gone.insert(interface);
            return;
        };
        for address in &pod.addresses {
            self.by_address.entry(*address).or_default().insert(interface);
        }
        self.gone.remove(&interface);
        self.restated.insert(interface);
        let subject = pod.subject.clone();
        match self.endpoints.remove(&interface) {
            Some(known) if known.pod.uid == pod.uid => {
                let left = known.pod.addresses.to_vec();
                for address in left.into_iter().filter(|address| !pod.addresses.contains(address)) {
                    self.forget_address(interface, address);
                }
                let changed = known.pod.subject != pod.subject;
                self.endpoints.insert(interface, Endpoint { pod, ..known });
                if !changed {
                    return;
                }
            }
            former => {
                if let Some(former) = former {
                    self.refusals += u64::from(former.fault.is_some());
                    let stay = pod.addresses.clone();
                    for address in former.pod.addresses.iter().filter(|address| !stay.contains(address)) {
                        self.forget_address(interface, *address);
                    }
                    self.gone.insert(interface);
                }
                let phase = match self.startup {
                    Startup::Done => {
                        self.whole.insert(interface);
                        Phase::InForce
                    }
                    _ if pod.inherited => Phase::AsPinned,
                    _ => Phase::Waiting(self.settings.endpoint_wait.map(|wait| Moment(now.0 + wait))),
                };
                if phase != Phase::InForce {
                    self.undecided.insert(interface);
                }
                self.faulty.remove(&interface);
                self.endpoints
                    .insert(interface, Endpoint { pod, phase, fault: None, closed: Directions::default() });
            }
        }
        self.engine.set_endpoint(id(interface), Some((*subject).clone()));
    }

    /// What has become necessary: changes of endpoints and policy maps, to be made before [`Policies::take_cidrs`] is asked
    /// for. `changes` is what has changed of the mesh.
    pub fn plan(&mut self, mesh: &Mesh, changes: &Changes, now: Moment) -> Vec<PolicyOp> {
        for number in &changes.identities {
            let labels = mesh.identity(*number).and_then(|text| Labels::decode(text.as_bytes()).ok());
            self.engine.set_identity(NumericIdentity(*number), labels.map(Arc::new));
            self.engine.set_named_ports(NumericIdentity(*number), mesh.named_ports(*number));
        }
        for name in &changes.services {
            self.engine.set_service(service_name(name), mesh.local_service(name).map(service));
        }
        for prefix in changes.prefixes.iter().filter(|prefix| prefix.prefix_len() == prefix.max_prefix_len())
        {
            self.restated.extend(self.by_address.get(&prefix.addr()).into_iter().flatten());
        }
        let decided = self.advance(mesh, now);
        let resolutions = self.engine.take_changes();
        self.note_cidrs(&resolutions);

        let due: Vec<u32> = self
            .undecided
            .extract_if(.., |interface| match self.endpoints.get(interface).map(|endpoint| endpoint.phase) {
                Some(Phase::AsPinned) => decided,
                Some(Phase::Waiting(until)) => decided || until.is_some_and(|until| until <= now),
                Some(Phase::InForce) | None => true,
            })
            .collect();
        // Who an endpoint of an earlier run is has not been stated by this one.
        self.restated.extend(due.iter().copied());
        self.whole.extend(due.iter().copied());

        let mut ops: Vec<PolicyOp> = std::mem::take(&mut self.gone)
            .into_iter()
            .map(|interface| PolicyOp::Forget { interface })
            .collect();
        for interface in std::mem::take(&mut self.restated) {
            let Some(endpoint) = self.endpoints.get(&interface) else { continue };
            if endpoint.phase != Phase::AsPinned || self.whole.contains(&interface) {
                let at_first = if self.holds(endpoint) { AtFirst::Wait } else { AtFirst::Pass };
                ops.push(PolicyOp::State { interface, settings: who(&endpoint.pod, mesh), at_first });
            }
        }
        for interface in due {
            if let Some(endpoint) = self.endpoints.get_mut(&interface) {
                endpoint.phase = Phase::InForce;
            }
        }
        for (EndpointId(number), change) in resolutions.endpoints {
            let Some((interface, endpoint)) = u32::try_from(number)
                .ok()
                .and_then(|interface| Some((interface, self.endpoints.get(&interface)?)))
            else {
                continue;
            };
            if endpoint.phase != Phase::InForce || self.whole.contains(&interface) {
                continue;
            }
            match change {
                // What failed is put in place whole.
                _ if endpoint.fault.is_some() => drop(self.whole.insert(interface)),
                EndpointChange::Replace(resolved) => ops.push(op::replace(interface, &resolved)),
                EndpointChange::Update { put, delete } => ops.push(op::update(interface, &put, &delete)),
                EndpointChange::Remove => {}
            }
        }
        for interface in std::mem::take(&mut self.whole) {
            if let Some(resolved) = self.engine.resolved(id(interface)) {
                ops.push(op::replace(interface, &resolved));
            }
        }
        ops
    }

    /// Prefixes of which something else is to be in the ipcache than before. None, if an earlier run has left some, before
    /// what decides has been read: until then its identities stay, which its policy maps are about. None either before the
    /// first endpoint's policy is in force.
    pub fn take_cidrs(&mut self) -> BTreeSet<IpNet> {
        let mut changed = match self.in_force() {
            true => std::mem::take(&mut self.changed_cidrs),
            false => BTreeSet::new(),
        };
        changed.extend(std::mem::take(&mut self.changed_host).into_iter().map(IpNet::from));
        changed
    }

    /// Whether a prefix is an address of this very node, whatever others say of it.
    pub fn is_host(&self, prefix: IpNet) -> bool {
        prefix.prefix_len() == prefix.max_prefix_len() && self.host.contains(&prefix.addr())
    }

    /// Whether something is known here about a prefix.
    pub fn has_a_say(&self, prefix: IpNet) -> bool {
        self.is_host(prefix) || self.cidr(prefix).is_some()
    }

    /// The identity that policies give to a prefix.
    pub fn cidr(&self, prefix: IpNet) -> Option<CidrIdentity> {
        self.cidrs.get(&prefix).copied().filter(|_| self.in_force())
    }

    /// All prefixes about which something is known here.
    pub fn cidrs(&self) -> impl Iterator<Item = IpNet> {
        let cidrs = self.cidrs.keys().copied().filter(|_| self.in_force());
        cidrs.chain(self.host.iter().copied().map(IpNet::from))
    }

    /// Those inside a range.
    pub fn cidrs_within(&self, range: IpNet) -> impl Iterator<Item = IpNet> + '_ {
        let first = IpNet::new(range.network(), 0).unwrap_or(range);
        self.cidrs
            .range(first..)
            .map(|(prefix, _)| *prefix)
            .take_while(move |prefix| prefix.addr() <= range.broadcast())
            .filter(move |prefix| range.contains(prefix) && self.in_force())
    }

    /// Takes in what became of the operations. What failed is part of the next plan after [`Policies::retry`].
    pub fn confirm(&mut self, ops: &[PolicyOp], results: Vec<Result<(), Fault>>) -> usize {
        let mut failed = 0;
        for (op, result) in ops.iter().zip(results) {
            failed += usize::from(result.is_err());
            let interface = op.interface();
            let Some(endpoint) = self.endpoints.get_mut(&interface) else {
                if result.is_err() {
                    self.gone.insert(interface);
                }
                continue;
            };
            match (op, result) {
                (op, Err(fault)) => {
                    endpoint.closed = closed(op, endpoint.closed);
                    if fault.is_lasting() {
                        self.faulty.remove(&interface);
                    } else {
                        self.faulty.insert(interface);
                    }
                    endpoint.fault = Some(fault);
                    self.refusals += 1;
                }
                // Who the pod is has been stated; that says nothing about an earlier failure of its policy.
                (PolicyOp::State { .. } | PolicyOp::Forget { .. }, Ok(())) => {}
                (op @ (PolicyOp::Replace { .. } | PolicyOp::Update { .. }), Ok(())) => {
                    if let PolicyOp::Replace { enforcement, .. } = op {
                        endpoint.closed = *enforcement;
                    }
                    self.refusals += u64::from(endpoint.fault.take().is_some());
                    self.faulty.remove(&interface);
                }
            }
        }
        failed
    }

    /// Has what failed, and may not fail again, made anew by the next plan.
    pub fn retry(&mut self) {
        self.restated.extend(self.faulty.iter().copied());
        self.whole
            .extend(self.faulty.iter().copied().filter(|interface| !self.undecided.contains(interface)));
    }

    /// Whether [`Policies::retry`] has something to do.
    pub fn has_to_retry(&self) -> bool {
        !self.gone.is_empty() || !self.faulty.is_empty()
    }

    /// When the next plan has something to do even if nothing happens.
    pub fn deadline(&self) -> Option<Moment> {
        let start = match self.startup {
            Startup::ReadingPeers(since) => Some(Moment(since.0 + self.settings.sync_timeout)),
            Startup::ReadingOwn | Startup::Done => None,
        };
        let phases = self.undecided.iter().filter_map(|interface| self.endpoints.get(interface));
        let waiting = phases.filter_map(|endpoint| match endpoint.phase {
            Phase::Waiting(until) => until,
            _ => None,
        });
        waiting.chain(start).min()
    }

    /// Whether what decides has been read.
    pub fn is_decided(&self) -> bool {
        self.startup == Startup::Done
    }

    /// The engine, for explanations.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The pods of this node, by what the engine calls them.
    pub fn local_endpoints(&self) -> impl Iterator<Item = (EndpointId, &LocalEndpoint)> {
        self.endpoints.iter().map(|(interface, endpoint)| (id(*interface), &endpoint.pod))
    }

    /// The pod of this node with an address.
    pub fn endpoint_at(&self, address: IpAddr) -> Option<(EndpointId, &LocalEndpoint)> {
        let interface = self.by_address.get(&address)?.first()?;
        Some((id(*interface), &self.endpoints.get(interface)?.pod))
    }

    /// Whether prefixes get the identities that policies give them. A part of a prefix that a pinned policy map denies would
    /// otherwise become one that the map does not know; whose map it is need not have been told yet.
    fn in_force(&self) -> bool {
        self.is_decided() || (!self.inherited_cidrs && self.undecided.len() < self.endpoints.len())
    }

    fn holds(&self, endpoint: &Endpoint) -> bool {
        self.settings.enforcement != Enforcement::Never && endpoint.phase != Phase::AsPinned
    }

    /// Says whether what decides has been read, or waited for long enough.
    fn advance(&mut self, mesh: &Mesh, now: Moment) -> bool {
        if self.startup == Startup::ReadingOwn && OWN.iter().all(|resource| mesh.own_synced(*resource)) {
            self.startup = Startup::ReadingPeers(now);
        }
        if let Startup::ReadingPeers(since) = self.startup {
            let read = PEERS.iter().all(|resource| mesh.unsynced_peers(*resource).is_empty());
            if read || now.0 >= since.0 + self.settings.sync_timeout {
                self.startup = Startup::Done;
                self.changed_cidrs.extend(self.cidrs.keys());
            }
        }
        self.is_decided()
    }

    fn note_cidrs(&mut self, resolutions: &Resolutions) {
        for (prefix, identity) in &resolutions.cidrs {
            match identity {
                Some(identity) => drop(self.cidrs.insert(*prefix, *identity)),
                None => drop(self.cidrs.remove(prefix)),
            }
            self.changed_cidrs.insert(*prefix);
        }
    }

    fn forget_addresses(&mut self, interface: u32, pod: &LocalEndpoint) {
        for address in &pod.addresses {
            self.forget_address(interface, *address);
        }
    }

    fn forget_address(&mut self, interface: u32, address: IpAddr) {
        if let Some(interfaces) = self.by_address.get_mut(&address) {
            interfaces.remove(&interface);
            if interfaces.is_empty() {
                self.by_address.remove(&address);
            }
        }
    }
}

fn id(interface: u32) -> EndpointId {
    EndpointId(u64::from(interface))
}

/// The directions that are closed once an operation has failed, of an endpoint that was enforced in `former`.
fn closed(op: &PolicyOp, former: Directions) -> Directions {
    match op {
        PolicyOp::Replace { enforcement, .. } => Directions {
            ingress: former.ingress || enforcement.ingress,
            egress: former.egress || enforcement.egress,
        },
        PolicyOp::Update { .. } => former,
        // The programs do not know the pod: then nothing passes.
        PolicyOp::State { .. } | PolicyOp::Forget { .. } => Directions { ingress: true, egress: true },
    }
}

/// Who a pod is, as far as the mesh knows.
fn who(pod: &LocalEndpoint, mesh: &Mesh) -> EndpointSettings {
    let identity = pod
        .addresses
        .iter()
        .filter_map(|address| mesh.resolve(IpNet::from(*address)))
        .find(|resolved| resolved.cluster == 0)
        .map_or(0, |resolved| resolved.identity);
    pod.settings(identity)
}

fn service_name(name: &ServiceName) -> isthmus_policy::ServiceName {
    isthmus_policy::ServiceName::new(&name.namespace, &name.name)
}

fn service(service: &crate::mesh::fact::LocalService) -> Service {
    Service {
        labels: service.labels.clone(),
        selector: service.selector.clone(),
        // They count only without a selector, and a large service changes often.
        backends: match service.selector.is_empty() {
            true => service.backends.iter().map(|backend| backend.addr).collect(),
            false => BTreeSet::new(),
        },
    }
}

#[cfg(test)]
mod tests;
