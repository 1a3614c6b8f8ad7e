//! One hostile entry per rule, and the good one beside it.

use super::*;

fn beta() -> RemoteCluster {
    RemoteCluster {
        name: "beta".parse().expect("valid"),
        id: 2.try_into().expect("valid"),
        max_connected_clusters: MaxConnectedClusters::C255,
    }
}

fn verdict(key: &str, value: &str) -> Result<(), &'static str> {
    let key = Key::parse(key.as_bytes()).expect(key);
    entry(&key, value.as_bytes(), &beta()).map_err(|rejection| rejection.reason())
}

#[test]
fn nodes_are_their_clusters_own() {
    let key = "cilium/state/nodes/v1/beta/n1";
    assert_eq!(verdict(key, r#"{"Name":"n1","Cluster":"beta","ClusterID":2}"#), Ok(()));
    assert_eq!(verdict(key, r#"{"Name":"n2","Cluster":"beta","ClusterID":2}"#), Err("key_mismatch"));
    assert_eq!(verdict(key, r#"{"Name":"n1","Cluster":"alpha","ClusterID":2}"#), Err("wrong_cluster"));
    assert_eq!(verdict(key, r#"{"Name":"n1","Cluster":"beta","ClusterID":1}"#), Err("wrong_cluster_id"));
    let foreign = "cilium/state/nodes/v1/alpha/n1";
    assert_eq!(verdict(foreign, r#"{"Name":"n1","Cluster":"beta","ClusterID":2}"#), Err("wrong_cluster"));
    assert_eq!(verdict(key, r#"{"Name":"n1"}"#), Err("malformed_value"));
}

#[test]
fn identities_are_in_range_and_labelled() {
    let own = format!("cilium/state/identities/v1/id/{}", (2 << 16) + 5);
    let foreign = format!("cilium/state/identities/v1/id/{}", (1 << 16) + 5);
    assert_eq!(verdict(&own, "k8s:io.cilium.k8s.policy.cluster=beta;"), Ok(()));
    assert_eq!(verdict(&foreign, "k8s:io.cilium.k8s.policy.cluster=beta;"), Err("foreign_identity"));
    assert_eq!(verdict(&own, "k8s:io.cilium.k8s.policy.cluster=alpha;"), Err("cluster_label"));
    assert_eq!(verdict(&own, "any:io.cilium.k8s.policy.cluster=beta;"), Err("cluster_label"));
    assert_eq!(verdict(&own, "k8s:app=a;"), Err("cluster_label"));
    let reserved = "cilium/state/identities/v1/id/1";
    assert_eq!(verdict(reserved, "k8s:io.cilium.k8s.policy.cluster=beta;"), Err("foreign_identity"));
    let elsewhere = format!("cilium/cache/identities/v1/alpha/id/{}", (2 << 16) + 5);
    assert_eq!(verdict(&elsewhere, "k8s:io.cilium.k8s.policy.cluster=beta;"), Err("wrong_cluster"));
}

#[test]
fn addresses_carry_own_or_reserved_identities() {
    let key = "cilium/state/ip/v1/default/10.0.0.1";
    let pair = |ip: &str, id: u32| format!(r#"{{"IP":"{ip}","ID":{id}}}"#);
    assert_eq!(verdict(key, &pair("10.0.0.1", (2 << 16) + 5)), Ok(()));
    assert_eq!(verdict(key, &pair("10.0.0.1", 4)), Ok(()));
    assert_eq!(verdict(key, &pair("10.0.0.1", (1 << 16) + 5)), Err("foreign_identity"));
    assert_eq!(verdict(key, &pair("10.0.0.1", 0)), Err("foreign_identity"));
    assert_eq!(verdict(key, &pair("10.0.0.1", 0x0200_0000)), Err("foreign_identity"));
    assert_eq!(verdict(key, &pair("10.0.0.2", (2 << 16) + 5)), Err("key_mismatch"));
    assert_eq!(effective_identity(NumericIdentity::HOST), NumericIdentity::REMOTE_NODE);
}

#[test]
fn services_and_exports_match_their_keys() {
    let key = "cilium/state/services/v1/beta/app/echo";
    let service = |cluster: &str, namespace: &str, name: &str, id: u16| {
        format!(r#"{{"cluster":"{cluster}","namespace":"{namespace}","name":"{name}","clusterID":{id}}}"#)
    };
    assert_eq!(verdict(key, &service("beta", "app", "echo", 2)), Ok(()));
    assert_eq!(verdict(key, &service("alpha", "app", "echo", 2)), Err("wrong_cluster"));
    assert_eq!(verdict(key, &service("beta", "kube-system", "echo", 2)), Err("key_mismatch"));
    assert_eq!(verdict(key, &service("beta", "app", "other", 2)), Err("key_mismatch"));
    assert_eq!(verdict(key, &service("beta", "app", "echo", 3)), Err("wrong_cluster_id"));
    let key = "cilium/state/serviceexports/v1/beta/app/echo";
    let export = |cluster: &str| {
        format!(
            r#"{{"cluster":"{cluster}","namespace":"app","name":"echo","type":"Headless","exportCreationTimestamp":"2026-11-20T12:38:19Z"}}"#
        )
    };
    assert_eq!(verdict(key, &export("beta")), Ok(()));
    assert_eq!(verdict(key, &export("alpha")), Err("wrong_cluster"));
    assert_eq!(verdict("cilium/cluster-config/beta", "{}"), Err("not_exported"));
}

#[test]
fn a_peer_needs_a_free_id_and_the_same_size_of_mesh() {
    use MaxConnectedClusters::{C255, C511};
    let own = ClusterId::try_from(1).expect("valid");
    let check = |name: &str, config: &str, ours| {
        let config = ClusterConfig::decode(config.as_bytes()).expect(config);
        cluster_config(&name.parse().expect(name), &config, own, ours)
    };
    assert!(check("beta", r#"{"id":2}"#, C255).is_ok());
    assert_eq!(check("beta", r#"{"id":1}"#, C255), Err(Incompatible::OwnId(own)));
    assert!(matches!(check("beta", r#"{"id":300}"#, C255), Err(Incompatible::Id(_))));
    assert!(check("beta", r#"{"id":2,"capabilities":{"maxConnectedClusters":511}}"#, C255).is_ok());
    assert!(matches!(check("beta", r#"{"id":2}"#, C511), Err(Incompatible::MeshSize { .. })));
    assert!(check("beta", r#"{"id":300,"capabilities":{"maxConnectedClusters":511}}"#, C511).is_ok());
    assert_eq!(check("default", r#"{"id":2}"#, C255), Err(Incompatible::DefaultName));
}

#[test]
fn addresses_that_no_pod_has_are_refused_wherever_they_stand() {
    for (address, verdict_is) in [
        ("10.0.0.1", Ok(())),
        ("fd00::1", Ok(())),
        ("192.0.2.1", Ok(())),
        ("127.0.0.1", Err("special_address")),
        ("0.0.0.0", Err("special_address")),
        ("169.254.169.254", Err("special_address")),
        ("224.0.0.1", Err("special_address")),
        ("255.255.255.255", Err("special_address")),
        ("::1", Err("special_address")),
        ("::", Err("special_address")),
        ("fe80::1", Err("special_address")),
        ("ff02::1", Err("special_address")),
    ] {
        let key = format!("cilium/state/ip/v1/default/{address}");
        assert_eq!(verdict(&key, &format!(r#"{{"IP":"{address}","ID":131077}}"#)), verdict_is, "{key}");
        let service = format!(
            r#"{{"cluster":"beta","namespace":"app","name":"echo","clusterID":2,"backends":{{"{address}":{{}}}}}}"#
        );
        assert_eq!(verdict("cilium/state/services/v1/beta/app/echo", &service), verdict_is, "{service}");
        let node = format!(
            r#"{{"Name":"n1","Cluster":"beta","ClusterID":2,"IPAddresses":[{{"Type":"InternalIP","IP":"{address}"}}]}}"#
        );
        assert_eq!(verdict("cilium/state/nodes/v1/beta/n1", &node), verdict_is, "{node}");
    }
}

#[test]
fn a_node_may_have_a_link_local_address_on_ciliums_device() {
    let node = |kind: &str, address: &str| {
        let node = format!(
            r#"{{"Name":"n1","Cluster":"beta","ClusterID":2,"IPAddresses":[{{"Type":"InternalIP","IP":"10.0.0.1"}},{{"Type":"{kind}","IP":"{address}"}}]}}"#
        );
        let read = Node::decode(node.as_bytes()).expect(&node);
        (verdict("cilium/state/nodes/v1/beta/n1", &node), read.addresses[1].ip())
    };
    for address in ["169.254.23.0", "fe80::1"] {
        assert_eq!(node("CiliumInternalIP", address), (Ok(()), None), "known to its node alone");
        assert_eq!(node("ExternalIP", address).0, Err("special_address"));
    }
    assert_eq!(node("CiliumInternalIP", "127.0.0.1").0, Err("special_address"));
}

#[test]
fn nobody_owns_half_of_the_internet() {
    let entry = |prefix: &str, ip: &str, mask: &str| {
        let key = format!("cilium/state/ip/v1/default/{prefix}");
        verdict(&key, &format!(r#"{{"IP":"{ip}","Mask":"{mask}","ID":131077}}"#))
    };
    assert_eq!(entry("0.0.0.0/0", "0.0.0.0", "AAAAAA=="), Err("broad_prefix"));
    assert_eq!(entry("8.0.0.0/7", "8.0.0.0", "/gAAAA=="), Err("broad_prefix"));
    assert_eq!(entry("10.0.0.0/8", "10.0.0.0", "/wAAAA=="), Ok(()));
    assert_eq!(entry("::/0", "::", "AAAAAAAAAAAAAAAAAAAAAA=="), Err("broad_prefix"));
    let node =
        r#"{"Name":"n1","Cluster":"beta","ClusterID":2,"IPv4AllocCIDR":{"IP":"0.0.0.0","Mask":"AAAAAA=="}}"#;
    assert_eq!(verdict("cilium/state/nodes/v1/beta/n1", node), Err("broad_prefix"));
}
