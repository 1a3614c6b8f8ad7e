use chrono::{DateTime, Utc};
use isthmus_crds::{CaBundle, ClusterInfo};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};

use super::*;
use crate::mesh::certificates;
use crate::mesh::facts::{NodeFacts, Workload};
use crate::mesh::ranges::Ranges;

fn moment(text: &str) -> DateTime<Utc> {
    DateTime::parse_from_rfc3339(text).expect("a moment").to_utc()
}

/// A CA that is valid in the given years.
fn authority(name: &str, from: i32, to: i32) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_before = rcgen::date_time_ymd(from, 1, 1);
    params.not_after = rcgen::date_time_ymd(to, 1, 1);
    let key = KeyPair::generate().expect("a key");
    params.self_signed(&key).expect("a certificate").pem()
}

fn ranges(texts: &[&str]) -> Ranges {
    Ranges::new(texts.iter().map(|text| text.parse::<ipnet::IpNet>().expect("a range")))
}

fn identity(name: &str, id: u32) -> Identity {
    let pem = authority(&format!("CA of {name}"), 2020, 2040);
    Identity {
        authorities: certificates::parse(pem.as_bytes()).expect("a certificate"),
        info: ClusterInfo {
            cluster: name.parse().expect("a name"),
            id: id.try_into().expect("an id"),
            mesh: isthmus_wire::MaxConnectedClusters::C255,
            version: "0.1.0".into(),
            ca: CaBundle::parse(&pem).expect("a bundle"),
            server_name: format!("{name}.mesh.cilium.io"),
        },
    }
}

/// A cluster that nothing speaks against.
fn cluster(name: &str, id: u32) -> Facts {
    let now = moment("2030-06-01T12:00:00Z");
    Facts {
        context: format!("kind-{name}"),
        namespace: "isthmus-system".into(),
        uid: Some(format!("uid-{name}")),
        info: Published::Is(Box::new(identity(name, id))),
        apiserver: Some(Workload { kind: "Deployment", desired: 1, ready: 1 }),
        leader: None,
        service: None,
        nodes: vec![NodeFacts {
            name: format!("{name}-1"),
            internal: vec![format!("172.18.{id}.1").parse().expect("an address")],
            ready: true,
            has_range: true,
            encrypts: false,
        }],
        pods: ranges(&[&format!("10.{id}.0.0/16")]),
        services: ServiceRanges::Known(ranges(&[&format!("10.10{id}.0.0/16")])),
        clock: Some(Clock { server: now, here: now }),
        peer_secrets: Some(Default::default()),
        peers: Vec::new(),
        unread: Vec::new(),
    }
}

fn change(facts: &mut Facts, change: impl FnOnce(&mut Identity)) {
    match &mut facts.info {
        Published::Is(identity) => change(identity),
        other => panic!("the cluster has an identity, not {other:?}"),
    }
}

fn pair(change: impl FnOnce(&mut Facts, &mut Facts)) -> Vec<Finding> {
    let (mut alpha, mut beta) = (cluster("alpha", 1), cluster("beta", 2));
    change(&mut alpha, &mut beta);
    of_pair(&alpha, &beta, Allowances::default())
}

#[track_caller]
fn only(findings: &[Finding], level: Level, says: &str) {
    let [finding] = findings else { panic!("one finding that says {says:?}, not {findings:#?}") };
    assert_eq!(finding.level, level, "{finding:?}");
    assert!(finding.problem.contains(says), "{:?} says {says:?}", finding.problem);
    assert!(!finding.advice.is_empty() && !finding.contexts.is_empty(), "{finding:?}");
}

#[test]
fn nothing_speaks_against_two_clusters_that_are_set_up_well() {
    assert_eq!(of_cluster(&cluster("alpha", 1)), []);
    assert_eq!(pair(|_, _| {}), []);
}

#[test]
fn each_thing_that_must_differ_is_found_when_it_does_not() {
    let error = |findings: Vec<Finding>, says: &str| only(&findings, Level::Error, says);
    error(pair(|a, b| b.uid = a.uid.clone()), "the same cluster");
    error(pair(|_, b| change(b, |b| b.info.id = 1.try_into().expect("an id"))), "both clusters have id 1");
    error(
        pair(|_, b| change(b, |b| b.info.cluster = "alpha".parse().expect("a name"))),
        "both clusters are called alpha",
    );
    error(pair(|a, b| b.nodes[0].internal = a.nodes[0].internal.clone()), "InternalIP 172.18.1.1");
    error(
        pair(|_, b| b.pods = ranges(&["10.1.128.0/20"])),
        "10.1.0.0/16, used for pods in kind-alpha, overlaps 10.1.128.0/20",
    );
    error(
        pair(|_, b| b.pods = ranges(&["10.101.0.0/24"])),
        "used for Services in kind-alpha, overlaps 10.101.0.0/24",
    );
    error(
        pair(|a, _| a.pods = ranges(&["10.102.0.0/16"])),
        "10.102.0.0/16 is used for pods in kind-alpha and for Services",
    );
    error(
        pair(|a, b| b.services = a.services.clone()),
        "10.101.0.0/16 is used for Services in kind-alpha and for Services in kind-beta",
    );
}

#[test]
fn each_thing_that_must_agree_is_found_when_it_does_not() {
    let c511 = isthmus_wire::MaxConnectedClusters::C511;
    let found = pair(|_, b| change(b, |b| b.info.mesh = c511));
    only(&found, Level::Error, "max-connected-clusters is 255 in alpha and 511 in beta");
    let found = pair(|_, b| change(b, |b| b.info.version = "0.3.0".into()));
    only(&found, Level::Error, "version 0.1.0 and beta version 0.3.0");
}

#[test]
fn all_that_is_wrong_is_told_at_once() {
    let found = pair(|a, b| {
        b.pods = a.pods.clone();
        b.services = a.services.clone();
        change(b, |b| b.info.id = 1.try_into().expect("an id"));
    });
    assert_eq!(found.len(), 3, "{found:#?}");
}

#[test]
fn services_may_overlap_if_the_user_says_so_and_pods_never() {
    let (alpha, mut beta) = (cluster("alpha", 1), cluster("beta", 2));
    beta.services = alpha.services.clone();
    let allowed = Allowances { overlapping_services: true };
    assert_eq!(of_pair(&alpha, &beta, allowed), []);
    beta.pods = alpha.pods.clone();
    only(&of_pair(&alpha, &beta, allowed), Level::Error, "used for pods");
}

#[test]
fn clocks_are_compared_with_each_other_and_with_certificates() {
    let found = pair(|_, b| b.clock.as_mut().expect("a clock").server += TimeDelta::minutes(3));
    only(&found, Level::Warning, "differ by 180 s");
    assert!(found[0].problem.contains("2030-06-01 12:00:00 UTC in kind-alpha"), "{}", found[0].problem);
    assert!(found[0].problem.contains("2030-06-01 12:03:00 UTC in kind-beta"), "{}", found[0].problem);

    // Read one after the other, the clocks agree.
    let found = pair(|_, b| {
        let clock = b.clock.as_mut().expect("a clock");
        clock.server += TimeDelta::minutes(3);
        clock.here += TimeDelta::minutes(3);
    });
    assert_eq!(found, []);

    let found = pair(|_, b| {
        let clock = b.clock.as_mut().expect("a clock");
        clock.server = moment("2019-12-31T23:00:00Z");
        clock.here = clock.server;
    });
    assert_eq!(found.len(), 1, "{found:#?}");
    only(
        &found,
        Level::Error,
        "is not valid yet: it is 2019-12-31 23:00:00 UTC in kind-beta, 2030-06-01 12:00:00 UTC in kind-alpha",
    );
}

#[test]
fn a_ca_is_judged_by_its_own_clusters_clock_and_one_that_is_valid_is_enough() {
    let at = |clock: &str| {
        let mut alpha = cluster("alpha", 1);
        alpha.clock = Some(Clock { server: moment(clock), here: moment(clock) });
        alpha
    };
    only(&of_cluster(&at("2041-01-01T00:00:00Z")), Level::Error, "has expired");
    only(&of_cluster(&at("2019-01-01T00:00:00Z")), Level::Error, "is not valid yet");
    only(&of_cluster(&at("2039-12-20T00:00:00Z")), Level::Warning, "ends on 2040-01-01");
    let mut rotating = at("2041-01-01T00:00:00Z");
    change(&mut rotating, |identity| {
        let next = authority("next", 2039, 2050);
        identity.authorities.extend(certificates::parse(next.as_bytes()).expect("a certificate"));
    });
    assert_eq!(of_cluster(&rotating), []);
}

#[test]
fn a_cluster_is_told_what_it_lacks() {
    let with = |change: fn(&mut Facts)| {
        let mut facts = cluster("alpha", 1);
        change(&mut facts);
        of_cluster(&facts)
    };
    let error = |found: Vec<Finding>, says: &str| only(&found, Level::Error, says);
    let warning = |found: Vec<Finding>, says: &str| only(&found, Level::Warning, says);
    error(
        with(|facts| {
            facts.info = Published::Missing;
            facts.apiserver = None;
        }),
        "Isthmus is not installed",
    );
    error(with(|facts| facts.info = Published::Missing), "isthmus-system/isthmus-cluster-info is not there");
    error(with(|facts| facts.info = Published::Broken("`cluster-id` is 0".into())), "`cluster-id` is 0");
    error(
        with(|facts| facts.apiserver = Some(Workload { kind: "StatefulSet", desired: 3, ready: 0 })),
        "StatefulSet isthmus-system/clustermesh-apiserver: none of 3 replicas is ready",
    );
    error(
        with(|facts| change(facts, |identity| identity.info.id = 300.try_into().expect("an id"))),
        "cluster id 300 is above 255",
    );
    warning(with(|facts| facts.apiserver = None), "no Deployment or StatefulSet");
    warning(with(|facts| facts.nodes[0].has_range = false), "1 of 1 Nodes have no spec.podCIDR");
    warning(
        with(|facts| facts.services = ServiceRanges::InUse(ranges(&["10.0.0.1/32"]))),
        "does not tell the range",
    );
}

#[test]
fn an_id_that_another_peer_has_is_not_given_twice() {
    let mut alpha = cluster("alpha", 1);
    let gamma = serde_json::json!({
        "apiVersion": "isthmus.io/v1alpha1", "kind": "ClusterPeer", "metadata": {"name": "gamma"},
        "spec": {"source": "Secret"}, "status": {"clusterID": 2},
    });
    alpha.peers.push(serde_json::from_value(gamma).expect("a ClusterPeer"));
    only(
        &of_known_peers(&alpha, &identity("beta", 2)),
        Level::Error,
        "connected to cluster gamma, which has id 2",
    );
    assert_eq!(of_known_peers(&alpha, &identity("gamma", 2)), [], "it is the same cluster");
    assert_eq!(of_known_peers(&alpha, &identity("beta", 3)), []);
}

#[test]
fn one_way_there_is_no_encryption() {
    let (alpha, mut beta) = (cluster("alpha", 1), cluster("beta", 2));
    assert_eq!(of_one_way(&alpha, &beta), None);
    beta.nodes[0].encrypts = true;
    only(
        of_one_way(&alpha, &beta).as_slice(),
        Level::Warning,
        "1 of 1 nodes in kind-beta encrypt, and do not get to know the keys of the nodes in kind-alpha",
    );
    assert_eq!(of_one_way(&beta, &alpha), None, "what beta's nodes do not know is of no matter in alpha");
}
