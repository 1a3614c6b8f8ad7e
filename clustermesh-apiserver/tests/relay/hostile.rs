//! A peer can lie about itself and about nothing else.

use clustermesh_apiserver::status::PeerState;

use crate::fixture::{Alpha, Mesh, until};

/// First identity of cluster 2.
const BETA: u32 = 2 << 16;

#[tokio::test(flavor = "multi_thread")]
async fn good_entries_are_mirrored_byte_for_byte_and_every_lie_is_refused_by_name() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = mesh.peer("beta").await;
    beta.introduce(2);

    // What an honest peer says.
    beta.put_node("n1", 2);
    beta.put_service("echo", 2);
    let labels = "k8s:app=echo;k8s:io.cilium.k8s.policy.cluster=beta;";
    beta.put(&format!("cilium/state/identities/v1/id/{}", BETA + 7), labels);
    let address = format!(r#"{{"IP":"10.2.0.1","Mask":null,"HostIP":"10.9.0.2","ID":{}}}"#, BETA + 7);
    beta.put("cilium/state/ip/v1/default/10.2.0.1", &address);

    // What a hostile one says beside it.
    let lies: &[(&str, String, &str)] = &[
        // Another cluster's node, service, identity.
        (
            "cilium/state/nodes/v1/beta/n2",
            r#"{"Name":"n2","Cluster":"alpha","ClusterID":2}"#.into(),
            "wrong_cluster",
        ),
        (
            "cilium/state/nodes/v1/beta/n3",
            r#"{"Name":"n3","Cluster":"beta","ClusterID":1}"#.into(),
            "wrong_cluster_id",
        ),
        (
            "cilium/state/nodes/v1/beta/n4",
            r#"{"Name":"n1","Cluster":"beta","ClusterID":2}"#.into(),
            "key_mismatch",
        ),
        (
            "cilium/state/services/v1/beta/app/a",
            r#"{"cluster":"beta","namespace":"kube-system","name":"a","clusterID":2}"#.into(),
            "key_mismatch",
        ),
        (
            "cilium/state/identities/v1/id/65543",
            "k8s:io.cilium.k8s.policy.cluster=beta;".into(),
            "foreign_identity",
        ),
        (
            "cilium/state/identities/v1/id/131080",
            "k8s:io.cilium.k8s.policy.cluster=alpha;".into(),
            "cluster_label",
        ),
        ("cilium/state/identities/v1/id/131081", "k8s:app=root;".into(), "cluster_label"),
        ("cilium/state/ip/v1/default/10.2.0.2", r#"{"IP":"10.2.0.2","ID":65543}"#.into(), "foreign_identity"),
        (
            "cilium/state/ip/v1/default/10.2.0.3",
            format!(r#"{{"IP":"10.2.0.4","ID":{BETA}}}"#),
            "key_mismatch",
        ),
        // Addresses that would catch what is nobody's, or lead clients astray.
        ("cilium/state/ip/v1/default/0.0.0.0/0", format!(r#"{{"IP":"0.0.0.0","Mask":"AAAAAA==","ID":{BETA}}}"#), "broad_prefix"),
        (
            "cilium/state/services/v1/beta/app/c",
            r#"{"cluster":"beta","namespace":"app","name":"c","clusterID":2,"backends":{"169.254.169.254":{}}}"#.into(),
            "special_address",
        ),
        // Values that are none.
        ("cilium/state/nodes/v1/beta/n5", "{".repeat(100_000), "malformed_value"),
        ("cilium/state/nodes/v1/beta/n6", "\u{0}".into(), "malformed_value"),
        ("cilium/state/services/v1/beta/app/b", "[".repeat(500_000), "malformed_value"),
        ("cilium/state/identities/v1/id/131082", "k8s:a=b;".repeat(10_000), "too_large"),
        // Keys that are none.
        ("cilium/state/nodes/v1/beta/UPPER", "{}".into(), "malformed_key"),
        ("cilium/state/nodes/v1/beta/a/b", "{}".into(), "malformed_key"),
        ("cilium/state/ip/v1/default/010.2.0.1", "{}".into(), "malformed_key"),
        ("cilium/state/identities/v1/id/0131079", labels.into(), "malformed_key"),
    ];
    for (key, value, _) in lies {
        beta.put(key, value);
    }
    beta.complete();
    alpha.connect("beta", beta.address);
    let status = alpha.ready("beta").await;

    assert_eq!(alpha.value("cilium/cache/identities/v1/beta/id/131079").unwrap(), labels.as_bytes());
    assert_eq!(alpha.value("cilium/cache/ip/v1/beta/10.2.0.1").unwrap(), address.as_bytes());
    let echo = beta.store.get(b"cilium/state/services/v1/beta/app/echo").unwrap().value.to_vec();
    assert_eq!(
        alpha.value("cilium/cache/services/v1/beta/app/echo").unwrap(),
        echo,
        "unknown fields included"
    );
    let config = String::from_utf8(alpha.value("cilium/cluster-config/beta").unwrap()).unwrap();
    assert_eq!(
        config,
        r#"{"id":2,"capabilities":{"syncedCanaries":true,"cached":true,"maxConnectedClusters":255}}"#
    );

    let keys = alpha.keys_of("beta");
    let mirrored: Vec<_> = keys.iter().filter(|key| key.starts_with("cilium/cache/")).collect();
    assert_eq!(mirrored.len(), 4, "{mirrored:#?}");
    for resource in isthmus_wire::Resource::ALL {
        let canary = format!("cilium/synced/beta/cilium/cache/{resource}/v1");
        assert!(keys.contains(&canary), "{canary} is missing among {keys:#?}");
    }
    for (key, _, reason) in lies {
        let expected = lies.iter().filter(|(_, _, other)| other == reason).count() as u64;
        assert_eq!(status.rejected.get(*reason), Some(&expected), "{key}: {:#?}", status.rejected);
    }
    assert_eq!((status.counts.nodes, status.counts.services, status.counts.endpoints), (1, 1, 1));
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lie_replaces_no_truth_and_the_truth_is_followed() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = mesh.peer("beta").await;
    beta.introduce(2);
    beta.put_node("n1", 2);
    beta.complete();
    alpha.connect("beta", beta.address);
    alpha.ready("beta").await;
    let before = alpha.value("cilium/cache/nodes/v1/beta/n1").unwrap();

    beta.put("cilium/state/nodes/v1/beta/n1", r#"{"Name":"n1","Cluster":"alpha","ClusterID":1}"#);
    // Told after it, so that its arrival shows that the lie was heard.
    beta.put_node("n2", 2);
    until("n2 is mirrored", || alpha.value("cilium/cache/nodes/v1/beta/n2").ok_or_else(String::new)).await;
    assert_eq!(alpha.value("cilium/cache/nodes/v1/beta/n1").unwrap(), before);

    beta.delete("cilium/state/nodes/v1/beta/n1");
    until("n1 is gone", || match alpha.value("cilium/cache/nodes/v1/beta/n1") {
        None => Ok(()),
        Some(_) => Err("it is there".to_owned()),
    })
    .await;
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_an_id_that_is_taken_waits_until_it_is_free() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = mesh.peer("beta").await;
    let gamma = mesh.peer("gamma").await;
    beta.introduce(2);
    beta.complete();
    alpha.connect("beta", beta.address);
    alpha.ready("beta").await;

    for (id, says) in [(1, "this cluster's own"), (2, "beta"), (300, "255")] {
        gamma.introduce(id);
        gamma.complete();
        if id == 1 {
            alpha.connect("gamma", gamma.address);
        }
        until("gamma is refused", || {
            let peer = alpha.peer("gamma");
            let reason = peer
                .as_ref()
                .filter(|peer| peer.state == PeerState::Refused)
                .and_then(|peer| peer.reason.clone());
            reason.filter(|reason| reason.contains(says)).ok_or_else(|| format!("{peer:#?}"))
        })
        .await;
        assert_eq!(alpha.keys_of("gamma"), Vec::<String>::new());
    }
    gamma.introduce(3);
    alpha.ready("gamma").await;
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_nobody_vouches_for_is_not_believed() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    // Another authority: a man in the middle.
    let elsewhere = Mesh::new();
    let beta = elsewhere.peer("beta").await;
    beta.introduce(2);
    beta.put_node("n1", 2);
    beta.complete();
    alpha.connect("beta", beta.address);
    let reason = until("the connection fails", || {
        let peer = alpha.peer("beta");
        let seen = format!("{peer:#?}");
        peer.filter(|peer| peer.failures > 0).and_then(|peer| peer.last_error).ok_or(seen)
    })
    .await;
    assert!(reason.to_lowercase().contains("certificate"), "{reason}");
    assert_eq!(alpha.keys_of("beta"), Vec::<String>::new());
    alpha.stop().await;
}
