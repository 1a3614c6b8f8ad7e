use isthmus_policy::Direction;
use isthmus_wire::local::PolicyKind;
use serde_json::{Value, json};

use super::*;
use crate::datapath::Enforcement as InKernel;
use crate::mesh::fact::{ClusterConfig, Endpoint as Address, Provenance};
use crate::mesh::{MeshEvent, Own};

const WAIT: u64 = 10;
const SYNC: u64 = 60;

/// Policies with the mesh that they are told of.
struct World {
    mesh: Mesh,
    policies: Policies,
    changes: Changes,
}

impl World {
    fn new() -> Self {
        let cluster: ClusterName = "alpha".parse().expect("a name");
        let own = Own { cluster: "alpha".into(), id: 1, node: "node-0".into(), identity_shift: 16 };
        let settings = Settings {
            endpoint_wait: Some(Duration::from_secs(WAIT)),
            sync_timeout: Duration::from_secs(SYNC),
            ..Settings::new(&cluster)
        };
        Self { mesh: Mesh::new(own), policies: Policies::new(settings), changes: Changes::default() }
    }

    /// One that has read everything of the own cluster.
    fn read() -> Self {
        let mut world = Self::new();
        world.own_is_read();
        world.plan(0);
        world
    }

    fn own_is_read(&mut self) {
        self.policies.namespace("app", Some(BTreeMap::new()));
        for resource in OWN {
            self.tell(MeshEvent::Synced { cluster: "alpha".into(), resource });
        }
    }

    fn tell(&mut self, event: MeshEvent) {
        self.mesh.apply(event, Provenance::default(), &mut self.changes).expect("it counts");
    }

    fn plan(&mut self, seconds: u64) -> Vec<PolicyOp> {
        let changes = std::mem::take(&mut self.changes);
        self.policies.plan(&self.mesh, &changes, at(seconds))
    }

    /// Plans, and has everything made.
    fn made(&mut self, seconds: u64) -> Vec<PolicyOp> {
        let ops = self.plan(seconds);
        self.policies.confirm(&ops, vec![Ok(()); ops.len()]);
        ops
    }

    fn policy(&mut self, name: &str, spec: Option<Value>) {
        let name = PolicyName {
            kind: PolicyKind::CiliumNetworkPolicy,
            namespace: Some("app".parse().expect("a name")),
            name: name.parse().expect("a name"),
        };
        let parsed = spec.map(|spec| isthmus_policy::parse::policy(&name, &[spec]));
        self.policies.policy(name, parsed);
    }

    fn pod(&mut self, interface: u32, uid: &str, inherited: bool) {
        let subject = Subject {
            namespace: "app".into(),
            labels: BTreeMap::from([("app".to_owned(), "web".to_owned())]),
            ..Subject::default()
        };
        let pod = LocalEndpoint {
            pod: "app/web".into(),
            uid: uid.into(),
            subject: subject.into(),
            addresses: vec![[10, 1, 0, 7].into()],
            inherited,
        };
        self.policies.endpoint(interface, Some(pod), at(0));
    }

    fn identity(&mut self, id: u32, labels: &str) {
        let cluster = if id >> 16 == 1 { "alpha" } else { "beta" };
        self.tell(MeshEvent::Identity { cluster: cluster.into(), id, labels: Some(labels.into()) });
    }
}

fn at(seconds: u64) -> Moment {
    Moment(Duration::from_secs(seconds))
}

/// Lets clients of beta in.
fn from_beta() -> Value {
    json!({"endpointSelector": {}, "ingress": [{"fromEndpoints": [
        {"matchLabels": {"app": "client", "io.cilium.k8s.policy.cluster": "beta"}}
    ]}]})
}

const CLIENT: &str =
    "k8s:app=client;k8s:io.cilium.k8s.policy.cluster=beta;k8s:io.kubernetes.pod.namespace=app;";

fn replaced(ops: &[PolicyOp]) -> Option<(InKernel, usize)> {
    ops.iter().find_map(|op| match op {
        PolicyOp::Replace { enforcement, entries, .. } => Some((*enforcement, entries.len())),
        _ => None,
    })
}

#[test]
fn an_endpoint_of_an_earlier_run_stays_as_it_is_until_all_that_decides_has_been_read() {
    let mut world = World::new();
    world.tell(MeshEvent::Cluster {
        cluster: "beta".into(),
        config: ClusterConfig { id: 2, slices_only: false, draining: false },
    });
    world.pod(3, "a", true);
    world.policy("allow", Some(from_beta()));
    assert_eq!(world.made(1), []);
    world.own_is_read();
    assert_eq!(world.made(2), [], "the peer's identities are missing");
    assert_eq!(world.policies.deadline(), Some(at(2 + SYNC)));

    world.identity((2 << 16) + 5, CLIENT);
    for resource in PEERS {
        world.tell(MeshEvent::Synced { cluster: "beta".into(), resource });
    }
    let ops = world.made(3);
    assert!(matches!(ops[0], PolicyOp::State { interface: 3, .. }), "{ops:?}");
    let (enforcement, entries) = replaced(&ops).expect("a whole policy");
    assert_eq!(enforcement, InKernel { ingress: true, egress: false });
    assert!(entries > 0, "beta's client is let in from the first packet on");
    assert!(world.policies.is_decided());
}

#[test]
fn a_peer_that_cannot_be_read_is_waited_for_only_so_long() {
    let mut world = World::new();
    world.tell(MeshEvent::Cluster {
        cluster: "beta".into(),
        config: ClusterConfig { id: 2, slices_only: false, draining: false },
    });
    world.pod(3, "a", true);
    world.policy("allow", Some(from_beta()));
    world.own_is_read();
    assert_eq!(world.made(2), []);
    let ops = world.made(2 + SYNC);
    assert_eq!(replaced(&ops), Some((InKernel { ingress: true, egress: false }, 0)), "nobody is known");
}

#[test]
fn a_new_endpoint_is_held_back_and_gets_what_is_known_after_the_wait() {
    let mut world = World::new();
    world.pod(3, "a", false);
    world.policy("allow", Some(from_beta()));
    let ops = world.made(1);
    assert!(matches!(ops[..], [PolicyOp::State { at_first: AtFirst::Wait, .. }]), "{ops:?}");
    assert_eq!(world.policies.summary().waiting, ["app/web"]);
    assert_eq!(world.policies.deadline(), Some(at(WAIT)));
    let ops = world.made(WAIT);
    assert_eq!(replaced(&ops), Some((InKernel { ingress: true, egress: false }, 0)));
    assert!(world.policies.summary().waiting.is_empty());
}

#[test]
fn without_a_limit_a_new_endpoint_is_held_back_for_as_long_as_it_takes() {
    let mut world = World::new();
    world.policies.settings.endpoint_wait = None;
    world.pod(3, "a", false);
    world.policy("allow", Some(from_beta()));
    world.made(1);
    assert_eq!(world.policies.deadline(), None);
    assert_eq!(world.made(1_000_000), []);
    assert_eq!(world.policies.summary().waiting, ["app/web"]);
    world.own_is_read();
    assert!(replaced(&world.made(1_000_001)).is_some());
}

#[test]
fn once_all_is_read_a_new_endpoint_gets_its_policy_at_once() {
    let mut world = World::read();
    world.policy("allow", Some(from_beta()));
    world.pod(3, "a", false);
    let ops = world.made(1);
    assert!(matches!(ops[0], PolicyOp::State { at_first: AtFirst::Wait, .. }), "{ops:?}");
    assert!(replaced(&ops).is_some());
}

#[test]
fn a_new_identity_is_an_update_of_the_endpoints_that_select_it_and_of_no_other() {
    let mut world = World::read();
    world.tell(MeshEvent::Cluster {
        cluster: "beta".into(),
        config: ClusterConfig { id: 2, slices_only: false, draining: false },
    });
    world.policy("allow", Some(from_beta()));
    world.pod(3, "a", false);
    world.made(1);
    world.identity((2 << 16) + 5, CLIENT);
    let ops = world.made(2);
    let [PolicyOp::Update { interface: 3, put, delete }] = &ops[..] else { panic!("{ops:?}") };
    assert!(delete.is_empty() && put.iter().all(|(key, _)| key.identity == (2 << 16) + 5), "{ops:?}");
    world.identity((2 << 16) + 6, "k8s:app=other;k8s:io.cilium.k8s.policy.cluster=beta;");
    assert_eq!(world.made(3), []);
}

#[test]
fn an_identity_that_its_cluster_may_not_speak_of_is_none() {
    let mut world = World::read();
    world.tell(MeshEvent::Cluster {
        cluster: "beta".into(),
        config: ClusterConfig { id: 2, slices_only: false, draining: false },
    });
    world.policy("allow", Some(from_beta()));
    world.pod(3, "a", false);
    world.made(1);
    // A peer says that an identity of the own cluster is one of its clients.
    let lie = MeshEvent::Identity { cluster: "beta".into(), id: (1 << 16) + 5, labels: Some(CLIENT.into()) };
    assert!(world.mesh.apply(lie, Provenance::default(), &mut world.changes).is_err());
    assert_eq!(world.made(2), []);
}

#[test]
fn a_pod_s_identity_is_stated_once_its_address_has_one() {
    let mut world = World::read();
    world.pod(3, "a", false);
    world.made(1);
    let address = Address { identity: (1 << 16) + 9, host: None, ..Address::default() };
    let prefix = "10.1.0.7/32".parse().expect("a prefix");
    world.tell(MeshEvent::Endpoint { cluster: "alpha".into(), prefix, endpoint: Some(address) });
    let ops = world.made(2);
    let [PolicyOp::State { interface: 3, settings, .. }] = &ops[..] else { panic!("{ops:?}") };
    assert_eq!(settings.identity, (1 << 16) + 9);
}

#[test]
fn another_pod_at_the_interface_does_not_inherit_the_policy() {
    let mut world = World::read();
    world.pod(3, "a", false);
    world.made(1);
    world.pod(3, "b", false);
    let ops = world.made(2);
    assert!(matches!(ops[0], PolicyOp::Forget { interface: 3 }), "{ops:?}");
    assert!(matches!(ops[1], PolicyOp::State { interface: 3, .. }), "{ops:?}");
    world.policies.endpoint(3, None, at(3));
    assert_eq!(world.made(3), [PolicyOp::Forget { interface: 3 }]);
    assert_eq!(world.policies.summary().endpoints, 0);
}

#[test]
fn what_failed_is_told_and_made_whole_and_what_does_not_fit_is_not_tried_in_vain() {
    let mut world = World::read();
    world.policy("allow", Some(from_beta()));
    world.pod(3, "a", false);
    let ops = world.plan(1);
    let fail = |fault: Fault| {
        move |op: &PolicyOp| match op {
            PolicyOp::Replace { .. } => Err(fault.clone()),
            _ => Ok(()),
        }
    };
    let results = ops.iter().map(fail(Fault::Passing("busy".to_owned()))).collect();
    assert_eq!(world.policies.confirm(&ops, results), 1);
    assert_eq!(world.policies.summary().closed["app/web"], "busy");
    assert!(world.policies.has_to_retry());
    assert_eq!(world.plan(2), [], "not before its time");
    world.policies.retry();
    let ops = world.plan(3);
    assert!(replaced(&ops).is_some());

    let results = ops.iter().map(fail(Fault::Lasting("too many".to_owned()))).collect();
    world.policies.confirm(&ops, results);
    assert!(!world.policies.has_to_retry());
    // A change may make it fit.
    world.policy("allow", None);
    let ops = world.made(4);
    assert!(replaced(&ops).is_some(), "{ops:?}");
    assert!(world.policies.summary().closed.is_empty());
}

#[test]
fn prefixes_get_their_identity_only_when_policies_are_in_force() {
    let mut world = World::new();
    world.pod(3, "a", true);
    world.policy("world", Some(json!({"endpointSelector": {}, "egress": [{"toCIDR": ["192.0.2.0/24"]}]})));
    world.made(1);
    let prefix = "192.0.2.0/24".parse().expect("a prefix");
    assert_eq!(world.policies.take_cidrs(), BTreeSet::new());
    assert_eq!(world.policies.cidr(prefix), None);
    world.own_is_read();
    let ops = world.made(2);
    let identity = world.policies.cidr(prefix).expect("an identity").identity.0;
    assert!(world.policies.take_cidrs().contains(&prefix));
    let PolicyOp::Replace { entries, .. } = &ops[1] else { panic!("{ops:?}") };
    let egress = isthmus_bpf_abi::Direction::Egress as u8;
    assert!(entries.iter().any(|(key, _)| key.identity == identity && key.direction == egress), "{ops:?}");
    assert!(world.policies.engine().resolved(id(3)).expect("known").is_enforced(Direction::Egress));
}

#[test]
fn every_address_of_the_node_is_the_host_whatever_a_cluster_says_of_it() {
    let mut world = World::new();
    let gateway: IpNet = "10.1.0.1/32".parse().expect("a prefix");
    world.policies.host(BTreeSet::from([gateway.addr()]));
    assert_eq!(world.policies.take_cidrs(), BTreeSet::from([gateway]), "at once");
    let address =
        Address { identity: (1 << 16) + 9, host: None, encryption_key: 0, named_ports: Default::default() };
    world.tell(MeshEvent::Endpoint { cluster: "alpha".into(), prefix: gateway, endpoint: Some(address) });
    let entry = crate::desired::ipcache::wanted(&world.mesh, &world.policies, gateway);
    assert_eq!(entry.map(|entry| entry.identity), Some(crate::mesh::reserved::HOST));
    world.policies.host(BTreeSet::new());
    assert_eq!(world.policies.take_cidrs(), BTreeSet::from([gateway]));
    let entry = crate::desired::ipcache::wanted(&world.mesh, &world.policies, gateway);
    assert_eq!(entry.map(|entry| entry.identity), Some((1 << 16) + 9));
}
