//! Endpoints and their policies as user space puts them in place.

use isthmus_bpf_abi::{Direction, Endpoint, PolicyEntry, PolicyKey, endpoint_flags, policy_flags};
use isthmus_node_agent::datapath::{AtFirst, Datapath, EndpointSettings, Enforcement, PolicyError};

use crate::sandbox::{SIZES, sandbox};

const POD: u32 = 7;
const BOTH: Enforcement = Enforcement { ingress: true, egress: true };

fn entry(rule: u32) -> PolicyEntry {
    PolicyEntry { rule, ..PolicyEntry::default() }
}

fn entries(from: u32, count: u32) -> Vec<(PolicyKey, PolicyEntry)> {
    (from..from + count).map(|identity| (PolicyKey::any(identity, Direction::Ingress), entry(1))).collect()
}

fn put(datapath: &Datapath, ifindex: u32) {
    let settings = EndpointSettings { identity: 1000, ..EndpointSettings::default() };
    datapath.put_endpoint(ifindex, &settings, AtFirst::Wait).expect("an endpoint");
}

fn endpoint(datapath: &Datapath, ifindex: u32) -> Endpoint {
    let endpoints = datapath.endpoints().expect("endpoints");
    endpoints.into_iter().find(|(known, _)| *known == ifindex).expect("it is known").1
}

fn sorted(mut entries: Vec<(PolicyKey, PolicyEntry)>) -> Vec<(PolicyKey, PolicyEntry)> {
    entries.sort_by_key(|(key, _)| *key);
    entries
}

#[test]
fn an_endpoint_waits_until_its_policy_is_known() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        assert_eq!(datapath.policy_epoch().expect("epoch"), 0);
        put(&datapath, POD);
        assert_eq!(endpoint(&datapath, POD).flags, endpoint_flags::WAITING);
        datapath.update_policy(POD, &entries(5, 1), &[]).expect("an update");
        assert_eq!(endpoint(&datapath, POD).flags, endpoint_flags::WAITING);
        datapath.replace_policy(POD, BOTH, &entries(1, 3)).expect("a policy");
        let both = endpoint_flags::INGRESS_ENFORCED | endpoint_flags::EGRESS_ENFORCED;
        assert_eq!(endpoint(&datapath, POD).flags, both);
        assert_eq!(sorted(datapath.policy(POD).expect("entries")), entries(1, 3));
        // Made known again, as after a restart of the agent, it does not begin to wait again.
        put(&datapath, POD);
        assert_eq!(endpoint(&datapath, POD).flags, both);
    });
}

#[test]
fn every_change_lets_flows_be_decided_anew() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut last = 0;
        let mut raised = |datapath: &Datapath| {
            let epoch = datapath.policy_epoch().expect("epoch");
            assert!(epoch > last, "{epoch} after {last}");
            last = epoch;
        };
        put(&datapath, POD);
        raised(&datapath);
        datapath.replace_policy(POD, BOTH, &entries(1, 3)).expect("a policy");
        raised(&datapath);
        datapath.update_policy(POD, &entries(4, 1), &[entries(1, 1)[0].0]).expect("an update");
        raised(&datapath);
        datapath.bump_epoch().expect("epoch");
        raised(&datapath);
        datapath.remove_endpoint(POD).expect("removed");
        raised(&datapath);
    });
}

#[test]
fn an_update_changes_only_what_it_names() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        put(&datapath, POD);
        datapath.replace_policy(POD, BOTH, &entries(1, 3)).expect("a policy");
        let deny = PolicyEntry { flags: policy_flags::DENY, ..entry(9) };
        let changed = (entries(2, 1)[0].0, deny);
        datapath
            .update_policy(POD, &[changed], &[entries(1, 1)[0].0, entries(77, 1)[0].0])
            .expect("an update");
        let expected = vec![changed, entries(3, 1)[0]];
        assert_eq!(sorted(datapath.policy(POD).expect("entries")), expected);
        // Entries for any identity and for one at once.
        datapath.update_policy(POD, &entries(0, 2), &[entries(3, 1)[0].0]).expect("an update");
        let expected = [entries(0, 2), vec![changed]].concat();
        assert_eq!(sorted(datapath.policy(POD).expect("entries")), expected);
    });
}

#[test]
fn a_policy_that_does_not_fit_closes_the_endpoint_until_one_does() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        put(&datapath, POD);
        let ingress = Enforcement { ingress: true, egress: false };
        let closed = endpoint_flags::INGRESS_ENFORCED | endpoint_flags::CLOSED;
        let room = SIZES.policy_entries;
        datapath.replace_policy(POD, ingress, &entries(1, room)).expect("it just fits");
        let error = datapath.update_policy(POD, &entries(room + 1, 1), &[]).expect_err("it is full");
        assert!(error.to_string().contains("--policy-map-max"), "{error}");
        assert!(matches!(error, PolicyError::TooManyEntries { needed, .. } if needed == room as usize + 1));
        assert_eq!(endpoint(&datapath, POD).flags, closed);
        assert_eq!(datapath.policy(POD).expect("entries"), []);
        // Some of it would be less than nothing: what denies might be missing.
        let error = datapath.update_policy(POD, &entries(1, 1), &[]).expect_err("the rest is not known");
        assert!(matches!(error, PolicyError::Closed { ifindex: POD }), "{error}");
        datapath.replace_policy(POD, ingress, &entries(1, room + 1)).expect_err("too many at once");
        assert_eq!(endpoint(&datapath, POD).flags, closed);
        datapath.replace_policy(POD, ingress, &entries(1, 2)).expect("it fits");
        assert_eq!(endpoint(&datapath, POD).flags, endpoint_flags::INGRESS_ENFORCED);
        // One out, one in: it never needs more room than there is.
        datapath.replace_policy(POD, ingress, &entries(1, room)).expect("it just fits");
        datapath.update_policy(POD, &entries(room + 1, 1), &[entries(1, 1)[0].0]).expect("it fits again");
        assert_eq!(sorted(datapath.policy(POD).expect("entries")), entries(2, room));
    });
}

#[test]
fn policies_come_and_go_without_end_and_without_leaving_maps_behind() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        for round in 0..3 {
            for pod in 1..=SIZES.endpoints {
                put(&datapath, pod);
                datapath.replace_policy(pod, BOTH, &entries(1, 1 + round)).expect("a policy");
            }
            put_fails(&datapath, SIZES.endpoints + 1);
            for pod in 1..=SIZES.endpoints {
                let egress = Enforcement { ingress: false, egress: true };
                datapath.replace_policy(pod, egress, &entries(2, 2)).expect("another");
                datapath.replace_policy(pod, Enforcement::default(), &[]).expect("none");
                assert_eq!(endpoint(&datapath, pod).policy, Endpoint::NO_POLICY);
                datapath.remove_endpoint(pod).expect("removed");
                datapath.remove_endpoint(pod).expect("removed already");
            }
        }
        assert_eq!(datapath.endpoints().expect("endpoints"), []);
        let error = datapath.replace_policy(POD, BOTH, &[]).expect_err("nobody knows it");
        assert!(matches!(error, PolicyError::UnknownEndpoint { ifindex: POD }), "{error}");
    });
}

fn put_fails(datapath: &Datapath, ifindex: u32) {
    let error = datapath.put_endpoint(ifindex, &EndpointSettings::default(), AtFirst::Pass);
    let error = error.expect_err("there is no room");
    assert!(matches!(error, PolicyError::TooManyEndpoints { .. }), "{error}");
}

#[test]
fn a_restarted_agent_finds_endpoints_and_policies_as_they_were() {
    sandbox(|sandbox| {
        {
            let datapath = sandbox.datapath();
            put(&datapath, POD);
            datapath.replace_policy(POD, BOTH, &entries(1, 3)).expect("a policy");
        }
        let datapath = sandbox.datapath();
        assert_eq!(sorted(datapath.policy(POD).expect("entries")), entries(1, 3));
        put(&datapath, POD + 1);
        datapath.replace_policy(POD + 1, BOTH, &entries(9, 1)).expect("a policy");
        assert_ne!(endpoint(&datapath, POD).policy, endpoint(&datapath, POD + 1).policy);
        assert_eq!(sorted(datapath.policy(POD).expect("entries")), entries(1, 3));
    });
}
