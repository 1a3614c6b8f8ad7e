//! The agent without its hands: events in, map operations out, results back in. Pure, with the time passed in.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use isthmus_bpf_abi::{IpcacheEntry, IpcacheKey, ServiceKey};

use crate::datapath::{MapOp, OpError};
use crate::desired::{Delta, Frontends, Rules, ipcache};
use crate::encryption::SharedPeers;
use crate::mesh::fact::{Moment, Provenance};
use crate::mesh::{Changes, Mesh, MeshEvent, Own, Refusal, Resource};
use crate::plan::{Dump, Failures, Planner, Retention};
use crate::policy::{self, Fault, Policies, PolicyOp};

/// How the reconciler decides.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Balance every service, not only the global ones.
    pub all_services: bool,
    /// After a start, entries of a peer of which not everything has been read stay for so long, counted from when
    /// the own cluster's services and addresses have been read.
    pub sync_timeout: Duration,
    /// Backend ids are below this: the size of the map of backends.
    pub backend_capacity: u32,
}

/// State of the mesh, and of the maps.
#[derive(Debug)]
pub struct Reconciler {
    mesh: Mesh,
    policies: Policies,
    frontends: Frontends,
    planner: Planner,
    policy: Policy,
    changes: Changes,
    again: Again,
    startup: Startup,
    peers: Option<Arc<SharedPeers>>,
    /// Whether what decides about policies had been read by the last plan.
    decided: bool,
}

/// What failed and is to be tried again.
#[derive(Debug, Default)]
struct Again {
    frontends: BTreeSet<ServiceKey>,
    ipcache: BTreeSet<IpcacheKey>,
}

/// Whether what an earlier run left in the maps is still kept although nothing asks for it yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Startup {
    /// The own cluster has not been read whole.
    ReadingOwn,
    /// It has, since then; some peers have not.
    ReadingPeers(Moment),
    /// Everything that is still not there is gone.
    Done,
}

/// How the start went, reported once when it is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Started {
    /// All clusters have been read whole.
    Synced,
    /// These have not within the time; what an earlier run knew of them is no longer used.
    TimedOut(Vec<Arc<str>>),
}

impl Reconciler {
    /// Starts from what is in the maps, with the default settings for network policies.
    pub fn new(own: Own, policy: Policy, dump: &Dump) -> Self {
        let cluster = own.cluster.parse().expect("a cluster's name, which was parsed at the edge");
        let settings = policy::Settings::new(&cluster);
        let mut mesh = Mesh::new(own);
        for (range, cluster) in dump.ipcache.iter().filter_map(|(key, entry)| ipcache::range(key, entry)) {
            mesh.remember(range, cluster);
        }
        Self {
            mesh,
            policies: Policies::new(settings)
                .inheriting(dump.ipcache.iter().any(|(_, entry)| ipcache::is_of_policies(entry))),
            frontends: Frontends::default(),
            planner: Planner::adopt(dump, policy.backend_capacity),
            policy,
            changes: Changes::default(),
            again: Again::default(),
            startup: Startup::ReadingOwn,
            peers: None,
            decided: false,
        }
    }

    /// The same with other settings for network policies. Before the first event.
    pub fn with_policies(self, settings: policy::Settings) -> Self {
        let policies = Policies::new(settings).inheriting(self.policies.inherits_cidrs());
        Self { policies, ..self }
    }

    /// Keeps these peers as the mesh asks, from the first event on.
    pub fn keep_peers(&mut self, peers: Arc<SharedPeers>) {
        self.peers = Some(peers);
    }

    /// Says, before the first event, in which ranges pods live: what is not known of an address there is told to the
    /// programs as such.
    pub fn set_strict_ranges(&mut self, ranges: &[IpNet]) {
        self.changes.prefixes.extend(ranges.iter().map(IpNet::trunc));
        self.mesh.set_strict_ranges(ranges);
    }

    /// Takes in an event.
    ///
    /// # Errors
    /// Why it does not count (for now).
    pub fn event(&mut self, event: MeshEvent, at: Provenance) -> Result<(), Refusal> {
        match event {
            MeshEvent::Policy { name, policy } => self.policies.policy(name, policy),
            MeshEvent::Namespace { name, labels } => self.policies.namespace(&name, labels),
            MeshEvent::HostAddresses { addresses } => self.policies.host(addresses),
            MeshEvent::LocalEndpoint { interface, pod } => self.policies.endpoint(interface, pod, at.arrived),
            event => return self.mesh.apply(event, at, &mut self.changes),
        }
        Ok(())
    }

    /// The changes of endpoints and of their policies that the events so far ask for, to be made before those of
    /// [`Reconciler::plan`]: an address gets a new identity only when policies know it. What failed before is part of it
    /// if `retry` says so.
    pub fn plan_policies(&mut self, now: Moment, retry: bool) -> Vec<PolicyOp> {
        if retry {
            self.policies.retry();
        }
        self.policies.plan(&self.mesh, &self.changes, now)
    }

    /// Takes in what became of changes of endpoints and policies. Says how many failed.
    pub fn confirm_policies(&mut self, ops: &[PolicyOp], results: Vec<Result<(), Fault>>) -> usize {
        self.policies.confirm(ops, results)
    }

    /// The operations that bring the maps to what the events so far ask for, and, once, how the start went. What failed
    /// before is part of it if `retry` says so.
    pub fn plan(&mut self, now: Moment, retry: bool) -> (Vec<MapOp>, Option<Started>) {
        let changes = std::mem::take(&mut self.changes);
        let started = self.advance_startup(now);
        if let Some(peers) = &self.peers {
            peers.update(&self.mesh, &changes, started.is_some());
        }
        let decided = self.policies.is_decided();
        let decided_now = decided && !std::mem::replace(&mut self.decided, decided);
        let mut delta =
            if started.is_some() || decided_now || (changes.synced && self.startup != Startup::Done) {
                self.everything()
            } else {
                self.frontends.delta(&self.mesh, rules(&self.mesh, self.policy), &changes)
            };
        for prefix in self.policies.take_cidrs() {
            delta.ipcache.insert(ipcache::key(prefix), ipcache::wanted(&self.mesh, &self.policies, prefix));
        }
        self.with_cidrs(&mut delta, &changes.prefixes);
        if retry {
            self.add_again(&mut delta);
        }
        (self.plan_delta(&delta), started)
    }

    /// The operations that bring the maps from what `dump` shows, whoever made it so, to what they should be.
    pub fn compare(&mut self, dump: &Dump) -> Vec<MapOp> {
        self.planner.readopt(dump, self.policy.backend_capacity);
        let everything = self.everything();
        self.again = Again::default();
        self.plan_delta(&everything)
    }

    /// Takes in what became of the operations. What failed is part of the next plan again.
    pub fn confirm(&mut self, ops: &[MapOp], results: &[Result<(), OpError>]) -> Failures {
        let failures = self.planner.confirm(ops, results);
        self.again.frontends.extend(failures.frontends.iter().copied());
        self.again.ipcache.extend(failures.ipcache.iter().copied());
        failures
    }

    /// Whether the next plan has something to do even if nothing happens.
    pub fn has_to_retry(&self) -> bool {
        !self.again.frontends.is_empty()
            || !self.again.ipcache.is_empty()
            || !self.planner.short().is_empty()
            || self.policies.has_to_retry()
    }

    /// Whether events have come since the last plan that it is about.
    pub fn is_dirty(&self) -> bool {
        !self.changes.is_empty()
    }

    /// When the next plan has something to do even if nothing happens: the end of the start.
    pub fn deadline(&self) -> Option<Moment> {
        let start = match self.startup {
            Startup::ReadingPeers(since) => Some(Moment(since.0 + self.policy.sync_timeout)),
            Startup::ReadingOwn | Startup::Done => None,
        };
        start.into_iter().chain(self.policies.deadline()).min()
    }

    /// Policies and the endpoints of this node.
    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    /// Whether the start is over: the maps hold what the mesh asks for, and nothing else.
    pub fn is_started(&self) -> bool {
        self.startup == Startup::Done
    }

    /// Whether all of the own cluster has been read, and planned for.
    pub fn has_read_own(&self) -> bool {
        self.startup != Startup::ReadingOwn
    }

    /// The state of the mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// The state of the maps.
    pub fn planner(&self) -> &Planner {
        &self.planner
    }

    /// Who claims which frontend.
    pub fn frontends(&self) -> &Frontends {
        &self.frontends
    }

    /// What the agent takes into its hands.
    pub fn rules(&self) -> Rules<'_> {
        rules(&self.mesh, self.policy)
    }

    fn everything(&mut self) -> Delta {
        let mut everything = self.frontends.everything(&self.mesh, rules(&self.mesh, self.policy));
        for prefix in self.policies.cidrs().chain(self.mesh.strict_ranges()) {
            everything
                .ipcache
                .insert(ipcache::key(prefix), ipcache::wanted(&self.mesh, &self.policies, prefix));
        }
        self.planner.complete(&mut everything);
        everything
    }

    /// Prefixes about which not the mesh alone has something to say.
    fn with_cidrs(&self, delta: &mut Delta, prefixes: &HashSet<IpNet>) {
        let more = |prefix: IpNet| self.policies.has_a_say(prefix) || self.mesh.is_strict_range(prefix);
        // What a policy says of a part of a range depends on the range.
        let parts = prefixes.iter().flat_map(|range| self.policies.cidrs_within(*range));
        for prefix in prefixes.iter().copied().filter(|prefix| more(*prefix)).chain(parts) {
            delta.ipcache.insert(ipcache::key(prefix), ipcache::wanted(&self.mesh, &self.policies, prefix));
        }
    }

    fn plan_delta(&mut self, delta: &Delta) -> Vec<MapOp> {
        let (started, decided) = (self.startup == Startup::Done, self.policies.is_decided());
        if started && decided {
            return self.planner.plan(delta, &Retention::NONE);
        }
        let mesh = &self.mesh;
        let own_read = self.startup != Startup::ReadingOwn;
        let services = |cluster| !started && (!own_read || !mesh.synced(cluster, Resource::Services));
        let ipcache = |entry: &IpcacheEntry| {
            let cluster = entry.cluster;
            let unread = || {
                !own_read
                    || !mesh.synced(cluster, Resource::Endpoints)
                    || !mesh.synced(cluster, Resource::Nodes)
            };
            // The policy maps of an earlier run are in force, and about the identities that it gave.
            (!decided && ipcache::is_of_policies(entry)) || (!started && unread())
        };
        self.planner.plan(delta, &Retention { services: &services, ipcache: &ipcache })
    }

    fn add_again(&mut self, delta: &mut Delta) {
        let again = std::mem::take(&mut self.again);
        let short = self.planner.short().keys().copied();
        for key in again.frontends.into_iter().chain(short) {
            delta
                .frontends
                .entry(key)
                .or_insert_with(|| self.frontends.frontend(&self.mesh, rules(&self.mesh, self.policy), &key));
        }
        for key in again.ipcache {
            delta.ipcache.entry(key).or_insert_with(|| {
                let prefix = IpNet::new(key.addr.ip(), key.prefix()).ok()?;
                ipcache::wanted(&self.mesh, &self.policies, prefix)
            });
        }
    }

    fn advance_startup(&mut self, now: Moment) -> Option<Started> {
        const OWN_RESOURCES: [Resource; 4] =
            [Resource::Services, Resource::Nodes, Resource::Endpoints, Resource::ClusterConfigs];
        if self.startup == Startup::ReadingOwn
            && OWN_RESOURCES.iter().all(|resource| self.mesh.own_synced(*resource))
        {
            self.startup = Startup::ReadingPeers(now);
            self.changes.synced = true;
        }
        let Startup::ReadingPeers(since) = self.startup else { return None };
        let kinds = [Resource::Services, Resource::Nodes, Resource::Endpoints];
        let unsynced: BTreeSet<Arc<str>> =
            kinds.iter().flat_map(|resource| self.mesh.unsynced_peers(*resource)).collect();
        // A cluster that left entries behind but has not described itself yet is not among the unsynced ones.
        let waits = !unsynced.is_empty() || self.planner.knows_of_other_clusters(&self.mesh);
        if waits && now.0 < since.0 + self.policy.sync_timeout {
            return None;
        }
        self.startup = Startup::Done;
        self.mesh.settle();
        Some(if waits { Started::TimedOut(unsynced.into_iter().collect()) } else { Started::Synced })
    }
}

fn rules(mesh: &Mesh, policy: Policy) -> Rules<'_> {
    Rules { all_services: policy.all_services, node: &mesh.own().node }
}

#[cfg(test)]
mod tests {
    use isthmus_policy::{PolicyName, Subject};
    use isthmus_wire::local::PolicyKind;
    use isthmus_wire::{ClusterName, NumericIdentity};
    use serde_json::json;

    use super::*;
    use crate::mesh::reserved;
    use crate::policy::{LocalEndpoint, Settings};

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }

    fn prefix(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    /// An agent that finds these identities in the ipcache.
    fn restarted(ipcache: &[(&str, u32)]) -> Reconciler {
        let entry = |identity| IpcacheEntry { identity, ..IpcacheEntry::default() };
        let ipcache = ipcache.iter().map(|(net, id)| (ipcache::key(prefix(net)), entry(*id))).collect();
        let own = Own { cluster: "alpha".into(), id: 1, node: "node-0".into(), identity_shift: 16 };
        let policy =
            Policy { all_services: false, sync_timeout: Duration::from_secs(60), backend_capacity: 16 };
        let cluster: ClusterName = "alpha".parse().expect("a name");
        Reconciler::new(own, policy, &Dump { ipcache, ..Dump::default() })
            .with_policies(Settings::new(&cluster))
    }

    fn tell(agent: &mut Reconciler, event: MeshEvent) {
        agent.event(event, Provenance::default()).expect("it counts");
    }

    fn pod(agent: &mut Reconciler, interface: u32, name: &str, inherited: bool) {
        let subject = Subject { namespace: "app".into(), ..Subject::default() };
        let pod = LocalEndpoint {
            pod: format!("app/{name}").into(),
            uid: name.into(),
            subject: subject.into(),
            addresses: Vec::new(),
            inherited,
        };
        tell(agent, MeshEvent::LocalEndpoint { interface, pod: Some(pod) });
    }

    /// Tells of a policy that denies a prefix and allows the rest of the world.
    fn denying(agent: &mut Reconciler, net: &str) {
        let name = PolicyName {
            kind: PolicyKind::CiliumNetworkPolicy,
            namespace: Some("app".parse().expect("a name")),
            name: "deny".parse().expect("a name"),
        };
        let spec = json!({
            "endpointSelector": {}, "egress": [{"toEntities": ["world"]}], "egressDeny": [{"toCIDR": [net]}],
        });
        let policy = Some(isthmus_policy::parse::policy(&name, &[spec]));
        tell(agent, MeshEvent::Policy { name, policy });
    }

    /// Plans, and has everything made.
    fn made(agent: &mut Reconciler, seconds: u64) -> (Vec<PolicyOp>, Vec<MapOp>) {
        let policies = agent.plan_policies(at(seconds), false);
        agent.confirm_policies(&policies, vec![Ok(()); policies.len()]);
        let (ops, _) = agent.plan(at(seconds), false);
        agent.confirm(&ops, &vec![Ok(()); ops.len()]);
        (policies, ops)
    }

    fn own_is_read(agent: &mut Reconciler) {
        use Resource::*;
        tell(agent, MeshEvent::Namespace { name: "app".into(), labels: Some([].into()) });
        for resource in [Policies, Namespaces, Services, Identities, Endpoints, Nodes, ClusterConfigs] {
            tell(agent, MeshEvent::Synced { cluster: "alpha".into(), resource });
        }
    }

    fn touches(ops: &[MapOp], net: &str) -> bool {
        let key = ipcache::key(prefix(net));
        ops.iter().any(|op| {
            matches!(op, MapOp::PutIpcache { key: put, .. } | MapOp::DeleteIpcache { key: put } if *put == key)
        })
    }

    #[test]
    fn the_wait_of_a_new_pod_changes_no_prefix_that_an_earlier_run_s_policies_are_about() {
        const DENIED: u32 = (1 << 24) + 7;
        let kube_apiserver = NumericIdentity::KUBE_APISERVER.0;
        let mut agent = restarted(&[
            ("0.0.0.0/0", reserved::WORLD_IPV4),
            ("192.0.2.0/24", DENIED),
            ("198.51.100.1/32", kube_apiserver),
        ]);
        pod(&mut agent, 3, "old", true);
        pod(&mut agent, 4, "new", false);
        // One policy has come before the gateway went away; it is about a part of what the old pod is denied.
        denying(&mut agent, "192.0.2.128/25");
        made(&mut agent, 1);
        let (policies, ops) = made(&mut agent, 10);
        assert!(
            policies.iter().any(|op| matches!(op, PolicyOp::Replace { interface: 4, .. })),
            "{policies:?}"
        );
        assert!(policies.iter().all(|op| op.interface() == 4), "{policies:?}");
        assert_eq!(ops, [], "the old pod's policy knows the whole range alone");
        for resource in [Resource::Services, Resource::Nodes, Resource::Endpoints, Resource::ClusterConfigs] {
            tell(&mut agent, MeshEvent::Synced { cluster: "alpha".into(), resource });
        }
        assert_eq!(made(&mut agent, 1000), (vec![], vec![]), "all but policies is read");
        assert!(agent.is_started());

        own_is_read(&mut agent);
        let (policies, ops) = made(&mut agent, 1001);
        assert!(
            policies.iter().any(|op| matches!(op, PolicyOp::Replace { interface: 3, .. })),
            "{policies:?}"
        );
        for net in ["192.0.2.128/25", "192.0.2.0/24", "198.51.100.1/32"] {
            assert!(touches(&ops, net), "{net}: {ops:?}");
        }
    }

    #[test]
    fn where_no_earlier_run_has_left_any_a_new_pod_s_prefixes_come_with_its_policy() {
        let mut agent = restarted(&[]);
        pod(&mut agent, 4, "new", false);
        denying(&mut agent, "192.0.2.0/24");
        assert!(!touches(&made(&mut agent, 1).1, "192.0.2.0/24"));
        assert!(touches(&made(&mut agent, 10).1, "192.0.2.0/24"));
    }
}
