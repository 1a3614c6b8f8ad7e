use std::collections::BTreeMap;
use std::time::Duration;

use isthmus_policy::Subject;
use isthmus_wire::local::PolicyKind;
use serde_json::json;

use super::*;
use crate::mesh::fact::{Moment, Provenance};
use crate::mesh::{MeshEvent, Own, Resource};
use crate::plan::Dump;
use crate::pods::ClosedPod;
use crate::policy::{Fault, LocalEndpoint, PolicyOp};
use crate::reconcile::{Policy, Reconciler};

const POD: [u8; 4] = [10, 1, 0, 7];

/// An agent with a policy that lets only clients into the pod `app/web`, at 10.1.0.7.
fn agent(inherited: bool) -> Reconciler {
    let own = Own { cluster: "alpha".into(), id: 1, node: "node-0".into(), identity_shift: 16 };
    let policy =
        Policy { all_services: false, sync_timeout: Duration::from_secs(60), backend_capacity: 1 << 10 };
    let mut agent = Reconciler::new(own, policy, &Dump::default());
    let name = PolicyName {
        kind: PolicyKind::CiliumNetworkPolicy,
        namespace: Some("app".parse().expect("a name")),
        name: "clients".parse().expect("a name"),
    };
    let spec = json!({"endpointSelector": {}, "ingress": [{"fromEndpoints": [{"matchLabels": {"a": "b"}}]}]});
    let policy = Some(isthmus_policy::parse::policy(&name, &[spec]));
    tell(&mut agent, MeshEvent::Policy { name, policy });
    tell(&mut agent, MeshEvent::Namespace { name: "app".into(), labels: Some(BTreeMap::new()) });
    let subject = Subject { namespace: "app".into(), ..Subject::default() };
    let pod = LocalEndpoint {
        pod: "app/web".into(),
        uid: "a".into(),
        subject: subject.into(),
        addresses: vec![POD.into()],
        inherited,
    };
    tell(&mut agent, MeshEvent::LocalEndpoint { interface: 3, pod: Some(pod) });
    agent
}

fn tell(agent: &mut Reconciler, event: MeshEvent) {
    agent.event(event, Provenance::default()).expect("it counts");
}

fn read_all(agent: &mut Reconciler) {
    for resource in [
        Resource::Policies,
        Resource::Namespaces,
        Resource::Services,
        Resource::Identities,
        Resource::Endpoints,
        Resource::Nodes,
        Resource::ClusterConfigs,
    ] {
        tell(agent, MeshEvent::Synced { cluster: "alpha".into(), resource });
    }
}

/// Plans, and has all made but for whole policies if there is a fault.
fn make(agent: &mut Reconciler, fault: Option<Fault>) {
    let ops = agent.plan_policies(Moment::default(), true);
    let results = ops.iter().map(|op| match (op, &fault) {
        (PolicyOp::Replace { .. }, Some(fault)) => Err(fault.clone()),
        _ => Ok(()),
    });
    let results = results.collect();
    agent.confirm_policies(&ops, results);
}

fn asked(source: &str, destination: &str) -> Asked {
    let target = |text: &str| text.parse().expect("a target");
    Asked { source: target(source), destination: target(destination), port: "80".parse().expect("a port") }
}

fn egress(known: &Known<'_>) -> Side {
    explain("alpha/node-0", &asked("alpha/app/web", "192.0.2.1"), known).egress.expect("its own pod")
}

fn ingress(known: &Known<'_>, source: &str) -> Side {
    explain("alpha/node-0", &asked(source, "10.1.0.7"), known).ingress.expect("its own pod")
}

#[test]
fn a_pod_that_waits_for_its_rules_is_denied_all_but_what_its_node_sends() {
    let mut agent = agent(false);
    make(&mut agent, None);
    let known = Known::new(&agent);
    for side in [egress(&known), ingress(&known, "192.0.2.1")] {
        assert_eq!((side.allowed, side.state), (false, EndpointState::Waiting), "{side:?}");
        assert!(side.reason.contains("held back"), "{side:?}");
    }
    assert!(ingress(&known, "identity:1").allowed);
    read_all(&mut agent);
    make(&mut agent, None);
    let side = egress(&Known::new(&agent));
    assert_eq!((side.allowed, side.state), (true, EndpointState::InForce), "{side:?}");
}

#[test]
fn of_a_pod_of_an_earlier_run_it_is_said_what_will_be_in_force() {
    let mut agent = agent(true);
    make(&mut agent, None);
    let side = egress(&Known::new(&agent));
    assert_eq!((side.allowed, side.state), (true, EndpointState::AsPinned), "{side:?}");
    assert!(side.notes[0].contains("the rules of an earlier run"), "{side:?}");
    assert!(!ingress(&Known::new(&agent), "192.0.2.1").allowed);
}

#[test]
fn a_pod_whose_policy_does_not_fit_is_denied_what_its_policy_is_about_and_why_is_told() {
    let mut agent = agent(false);
    read_all(&mut agent);
    make(&mut agent, Some(Fault::Lasting("too many entries".to_owned())));
    let known = Known::new(&agent);
    let side = ingress(&known, "192.0.2.1");
    assert_eq!((side.allowed, side.state), (false, EndpointState::Closed), "{side:?}");
    assert_eq!(side.reason, "the pod is closed: too many entries");
    assert!(egress(&known).allowed, "the policy says nothing of what it sends");
    assert!(ingress(&known, "identity:1").allowed, "the node reaches it");
}

#[test]
fn a_pod_for_which_there_is_no_room_is_known_and_denied_everything() {
    let mut agent = agent(false);
    tell(&mut agent, MeshEvent::LocalEndpoint { interface: 3, pod: None });
    let closed =
        [ClosedPod { pod: "app/web".into(), addresses: vec![POD.into()], reason: "no room".to_owned() }];
    let known = Known::new(&agent).beside(&closed);
    for side in [egress(&known), ingress(&known, "192.0.2.1")] {
        assert_eq!((side.allowed, side.state), (false, EndpointState::Closed), "{side:?}");
        assert_eq!(side.reason, "the pod is closed: no room");
    }
}

#[test]
fn a_policy_that_denies_by_default_and_is_not_enforced_as_written_is_named() {
    let mut agent = agent(false);
    read_all(&mut agent);
    make(&mut agent, None);
    assert_eq!(ingress(&Known::new(&agent), "192.0.2.1").notes, Vec::<String>::new());
    let name = PolicyName {
        kind: PolicyKind::CiliumNetworkPolicy,
        namespace: Some("app".parse().expect("a name")),
        name: "clients".parse().expect("a name"),
    };
    let spec = json!({"endpointSelector": {}, "ingress": [{"fromCIDR": ["no address"]}]});
    let policy = isthmus_policy::parse::policy(&name, &[spec]);
    assert!(!policy.problems.is_empty());
    tell(&mut agent, MeshEvent::Policy { name, policy: Some(policy) });
    make(&mut agent, None);
    let side = ingress(&Known::new(&agent), "192.0.2.1");
    assert!(!side.allowed);
    assert!(side.notes[0].contains("app/clients is not enforced as written"), "{side:?}");
}
