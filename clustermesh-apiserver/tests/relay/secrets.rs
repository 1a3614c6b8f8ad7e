//! Peers that Secrets in the Kubernetes API connect and disconnect, and what the API is told of them.

use clustermesh_apiserver::status::{PeerState, PeerStatus};
use isthmus_crds::peer::Relation;
use isthmus_crds::{
    ADMITTED, CONNECTED, ClusterPeer, PeerRelation, PeerSource, READY, SYNCED, SecretVersion,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use crate::fixture::until;
use crate::kubernetes::{Alpha, Cluster, Kept, Kubernetes, NAMESPACE};

const CONFIG: &str = "cilium/cluster-config/beta";
const NODE: &str = "cilium/cache/nodes/v1/beta/n1";

#[tokio::test(flavor = "multi_thread")]
async fn an_annotation_connects_and_disconnects_and_what_comes_back_meanwhile_waits_for_the_draining() {
    let kubernetes = Kubernetes::start().await;
    let alpha = Alpha::start(&kubernetes).await;
    let beta = Cluster::start(&alpha, "beta", 2).await;
    let mut secret = beta.secret();
    secret.relation = Relation::Apart;
    kubernetes.configure(&secret, None).await;
    until("the Secrets have been read", || alpha.relay.waiting_for().map_or(Ok(()), Err)).await;
    assert!(alpha.relay.peers().is_empty(), "nothing asks for the connection");

    kubernetes.annotate("peer-beta", "true").await;
    let peer = kubernetes.ready("beta").await;
    assert!(alpha.has(NODE));
    assert!(peer.is(CONNECTED) && peer.is(SYNCED));
    assert_eq!(peer.spec.source, PeerSource::Secret);
    let named = peer.spec.secret.clone().unwrap();
    assert_eq!((named.namespace.as_str(), named.name.as_str()), (NAMESPACE, "peer-beta"));
    let status = peer.status.clone().unwrap();
    assert_eq!(status.cluster_id, Some(2));
    assert_eq!(status.endpoint, Some(format!("https://{}", beta.peer.address)));
    assert_eq!((status.counts.nodes, status.counts.services), (1, 1));
    assert!(status.confirmed.is_some() && status.data_age_seconds.is_some() && status.revision.is_some());
    assert_eq!(peer.condition(READY).unwrap().observed_generation, peer.metadata.generation);
    assert!(
        kubernetes.event("ClusterPeer", "beta", "Connected").await.contains(&beta.peer.address.to_string())
    );
    kubernetes.event("ClusterPeer", "beta", "Ready").await;
    let trusted = alpha.sources.authorities().borrow().clone();
    assert_eq!(trusted, [("beta".parse().unwrap(), beta.authority.certificate().into())]);

    kubernetes.annotate("peer-beta", "false").await;
    until("the configuration is gone", || if alpha.has(CONFIG) { Err(String::new()) } else { Ok(()) }).await;
    assert!(alpha.has(NODE), "agents have not let go of it yet");
    assert!(alpha.sources.authorities().borrow().is_empty(), "whom nobody connects nobody vouches for");

    // Connected again meanwhile: it drains to its end first, and says so.
    kubernetes.annotate("peer-beta", "true").await;
    until("it is told that it comes back", || match alpha.relay.peers().first() {
        Some(PeerStatus { state: PeerState::Draining, reason: Some(reason), .. })
            if reason.contains("connected again") =>
        {
            Ok(())
        }
        other => Err(format!("{other:?}")),
    })
    .await;
    let draining = kubernetes.reason("beta", "Draining").await;
    assert!(!draining.is(CONNECTED));
    kubernetes.event("ClusterPeer", "beta", "Disconnected").await;
    let before = alpha.store.revision();
    kubernetes.ready("beta").await;
    assert!(alpha.has(CONFIG) && alpha.has(NODE));
    assert!(alpha.store.revision() > before, "it was drained in between");

    kubernetes.delete("peer-beta").await;
    kubernetes.no_peer("beta").await;
    assert!(!alpha.has(NODE), "it goes when everything that was mirrored is gone");
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_only_read_is_vouched_for_and_told_of_and_not_read_from() {
    let kubernetes = Kubernetes::start().await;
    let alpha = Alpha::start(&kubernetes).await;
    let beta = Cluster::start(&alpha, "beta", 2).await;
    let mut secret = beta.secret();
    secret.relation = Relation::Admitted;
    kubernetes.configure(&secret, None).await;
    let is_admitted = |peer: &ClusterPeer| peer.is(ADMITTED) && peer.condition(READY).is_none();
    let peer = kubernetes.peer("beta is admitted", "beta", is_admitted).await;
    assert_eq!((peer.spec.source, peer.spec.relation), (PeerSource::Secret, PeerRelation::Admitted));
    let version = kubernetes.version("peer-beta").await;
    assert_eq!(peer.status.unwrap().observed_secret, Some(version));
    let note = kubernetes.event("ClusterPeer", "beta", "Admitted").await;
    assert!(note.contains("nothing is read from it"), "{note}");
    let vouched = [("beta".parse().unwrap(), beta.authority.certificate().into())];
    let authorities = alpha.sources.authorities();
    assert_eq!(*authorities.borrow(), vouched);
    assert!(alpha.relay.peers().is_empty() && !alpha.has(CONFIG));
    assert_eq!(alpha.relay.admitted().len(), 1);

    // Connected as well, and no longer: it is let in all the time.
    kubernetes.annotate("peer-beta", "true").await;
    let peer = kubernetes.ready("beta").await;
    assert_eq!(peer.spec.relation, PeerRelation::Connected);
    assert!(peer.condition(ADMITTED).is_none() && alpha.has(NODE));
    kubernetes.annotate("peer-beta", "false").await;
    kubernetes.reason("beta", "Draining").await;
    assert_eq!(*authorities.borrow(), vouched);
    kubernetes.peer("beta is admitted again", "beta", is_admitted).await;
    assert!(!alpha.has(NODE) && !alpha.has(CONFIG), "nothing is left of what was read");
    assert_eq!(*authorities.borrow(), vouched);

    // A bad edit is told of, and shuts nobody out.
    kubernetes.edit("peer-beta", "ca.crt", "nothing").await;
    let note = kubernetes.event("Secret", "peer-beta", "InvalidSecret").await;
    assert!(note.contains("`ca.crt`") && note.contains("stays admitted"), "{note}");
    kubernetes
        .peer("the warning", "beta", |peer| {
            is_admitted(peer) && peer.condition(ADMITTED).unwrap().message.contains("`ca.crt`")
        })
        .await;
    assert_eq!(*authorities.borrow(), vouched);

    kubernetes.delete("peer-beta").await;
    kubernetes.no_peer("beta").await;
    assert!(authorities.borrow().is_empty());
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_cannot_be_used_is_told_and_everybody_else_goes_on() {
    let kubernetes = Kubernetes::start().await;
    let alpha = Alpha::start(&kubernetes).await;
    let beta = Cluster::start(&alpha, "beta", 2).await;
    kubernetes.configure(&beta.secret(), None).await;
    kubernetes.ready("beta").await;

    // One that never could be used.
    let gamma = Cluster::start(&alpha, "gamma", 3).await;
    kubernetes.configure(&gamma.secret(), None).await;
    kubernetes.ready("gamma").await;
    let mut broken = gamma.secret();
    broken.cluster = "delta".parse().unwrap();
    broken.relation = Relation::Apart;
    kubernetes.configure(&broken, None).await;
    kubernetes.edit("peer-delta", "ca.crt", "nothing").await;
    kubernetes.annotate("peer-delta", "true").await;
    let note = kubernetes.event("Secret", "peer-delta", "InvalidSecret").await;
    assert!(note.contains("`ca.crt`"), "{note}");
    let delta = kubernetes.reason("delta", "InvalidSecret").await;
    let message = &delta.condition(READY).unwrap().message;
    assert!(message.contains("peer-delta") && message.contains("`ca.crt`"), "{message}");

    // A bad edit of one that is connected.
    kubernetes.edit("peer-beta", "endpoints", "http://nowhere").await;
    let note = kubernetes.event("Secret", "peer-beta", "InvalidSecret").await;
    assert!(note.contains("`endpoints`") && note.contains("stays connected"), "{note}");
    assert!(alpha.relay.refused_secrets()[&format!("{NAMESPACE}/peer-beta")].contains("`endpoints`"));
    beta.peer.put_node("n2", 2);
    until("what is new comes", || {
        if alpha.has("cilium/cache/nodes/v1/beta/n2") {
            Ok(())
        } else {
            Err(format!("{:#?}", alpha.peer("beta")))
        }
    })
    .await;
    kubernetes
        .peer("the warning", "beta", |peer| {
            peer.is(READY) && peer.condition(READY).unwrap().message.contains("`endpoints`")
        })
        .await;

    kubernetes.delete("peer-delta").await;
    kubernetes.no_peer("delta").await;
    assert_eq!(alpha.peer("gamma").unwrap().failures, 0);
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_version_of_a_secret_is_told_at_once_when_the_connection_is_made_by_it() {
    let kubernetes = Kubernetes::start().await;
    let alpha = Alpha::start(&kubernetes).await;
    let beta = Cluster::start(&alpha, "beta", 2).await;
    kubernetes.configure(&beta.secret(), None).await;
    let first = kubernetes.version("peer-beta").await;
    let observes = |version: &SecretVersion| {
        let version = version.clone();
        move |peer: &ClusterPeer| {
            let status = peer.status.as_ref();
            peer.is(READY) && status.is_some_and(|status| status.observed_secret.as_ref() == Some(&version))
        }
    };
    kubernetes.peer("it is connected by the first", "beta", observes(&first)).await;

    // What says the same needs no other connection, and is told long before the status would be written anyway.
    let begun = std::time::Instant::now();
    kubernetes.edit("peer-beta", "note", "nothing that matters").await;
    let second = kubernetes.version("peer-beta").await;
    assert!(second.includes(&first) && !first.includes(&second));
    kubernetes.peer("it is connected by the second", "beta", observes(&second)).await;
    // Another authority beside the present one: another connection, of which nothing else is seen.
    let both = format!("{}{}", beta.authority.certificate(), alpha.authority.certificate());
    kubernetes.edit("peer-beta", "ca.crt", &both).await;
    let third = kubernetes.version("peer-beta").await;
    kubernetes.peer("it is connected by the third", "beta", observes(&third)).await;
    assert!(begun.elapsed() < std::time::Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(alpha.peer("beta").unwrap().failures, 0);

    // What cannot be used is not told as used, and neither is what does not connect.
    kubernetes.edit("peer-beta", "ca.crt", "nothing").await;
    let warned = |peer: &ClusterPeer| peer.condition(READY).unwrap().message.contains("`ca.crt`");
    let warned = kubernetes.peer("the warning", "beta", warned).await;
    assert!(observes(&third)(&warned), "{warned:#?}");
    kubernetes.edit("peer-beta", "ca.crt", alpha.authority.certificate()).await;
    let untrusted = kubernetes.reason("beta", "CertificateNotTrusted").await;
    assert_eq!(untrusted.status.unwrap().observed_secret, Some(third));
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_secrets_for_one_cluster_the_older_one_counts_and_a_secret_before_a_file() {
    let kubernetes = Kubernetes::start().await;
    let alpha = Alpha::start(&kubernetes).await;
    let beta = Cluster::start(&alpha, "beta", 2).await;
    kubernetes.configure(&beta.secret(), Some("a-first")).await;
    kubernetes.ready("beta").await;
    // In the same second it is the name that decides.
    kubernetes.configure(&beta.secret(), Some("b-second")).await;
    let note = kubernetes.event("Secret", "b-second", "InvalidSecret").await;
    assert!(note.contains("a-first") && note.contains("older"), "{note}");
    let text = format!("endpoints: ['http://{}']\n", beta.peer.address);
    std::fs::write(alpha.peers_dir.join("beta"), text).unwrap();
    let reason = until("the file is refused", || {
        alpha.relay.refused_files().get("beta").cloned().ok_or_else(String::new)
    })
    .await;
    assert!(reason.contains("a-first") && reason.contains("file beta"), "{reason}");

    kubernetes.delete("a-first").await;
    let takes_over = |peer: &ClusterPeer| {
        peer.is(READY) && peer.spec.secret.as_ref().is_some_and(|secret| secret.name == "b-second")
    };
    kubernetes.peer("the second takes over", "beta", takes_over).await;
    assert!(alpha.has(CONFIG), "nothing was drained");
    assert!(alpha.relay.refused_secrets().is_empty());
    assert_eq!(alpha.peer("beta").unwrap().failures, 0);
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_that_expires_watches_or_is_gone_removes_nobody() {
    let kubernetes = Kubernetes::start().await;
    let alpha = Alpha::start(&kubernetes).await;
    let beta = Cluster::start(&alpha, "beta", 2).await;
    let gamma = Cluster::start(&alpha, "gamma", 3).await;
    kubernetes.configure(&beta.secret(), None).await;
    kubernetes.ready("beta").await;
    let written = alpha.store.get(CONFIG.as_bytes()).unwrap().mod_revision;

    kubernetes.api.compact();
    kubernetes.api.disconnect_watches();
    kubernetes.configure(&gamma.secret(), None).await;
    kubernetes.ready("gamma").await;
    kubernetes.api.compact();
    kubernetes.api.disconnect_watches();
    kubernetes.delete("peer-gamma").await;
    kubernetes.no_peer("gamma").await;

    kubernetes.api.stop().await;
    until("the loss is told", || {
        alpha.relay.secrets_unread().map(drop).ok_or_else(|| "it is not".to_owned())
    })
    .await;
    beta.peer.put_node("n2", 2);
    until("beta is still followed", || {
        if alpha.has("cilium/cache/nodes/v1/beta/n2") {
            Ok(())
        } else {
            Err(format!("{:#?}", alpha.peer("beta")))
        }
    })
    .await;
    assert_eq!(alpha.store.get(CONFIG.as_bytes()).unwrap().mod_revision, written, "it was never taken away");
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_reason_why_a_peer_is_not_ready_has_its_name() {
    let kubernetes = Kubernetes::start().await;
    let alpha = Alpha::start(&kubernetes).await;
    let beta = Cluster::start(&alpha, "beta", 2).await;
    // Where a name leads, the Secret may say itself.
    let mut named = beta.secret();
    named.endpoints = vec![format!("https://gateway.example:{}", beta.peer.address.port()).parse().unwrap()];
    named.addresses.insert("gateway.example".to_owned(), vec![beta.peer.address.ip()]);
    kubernetes.configure(&named, None).await;
    let ready = kubernetes.ready("beta").await;
    assert_eq!(alpha.peer("beta").unwrap().address, Some(beta.peer.address));

    // Out of reach: told, and nothing is taken away.
    let place = beta.stop().await;
    let lost = kubernetes.peer("beta is lost", "beta", |peer| !peer.is(CONNECTED) && !peer.is(READY)).await;
    let message = &lost.condition(READY).unwrap().message;
    assert!(message.contains("What was mirrored stays"), "{message}");
    assert!(alpha.has(NODE) && alpha.has(CONFIG));
    kubernetes.event("ClusterPeer", "beta", "ConnectionLost").await;
    kubernetes.reason("beta", "Unreachable").await;
    let beta = Cluster::back(place, "beta", 2).await;
    let again = kubernetes.ready("beta").await;
    assert!(again.status.as_ref().unwrap().failures > ready.status.as_ref().unwrap().failures);
    assert!(again.status.as_ref().unwrap().last_error.is_some(), "the last failure is kept");

    // Another authority has signed what the gateway shows.
    let mut wrong = beta.secret();
    wrong.cluster = "gamma".parse().unwrap();
    wrong.ca = isthmus_crds::CaBundle::parse(alpha.authority.certificate()).unwrap();
    kubernetes.configure(&wrong, None).await;
    kubernetes.reason("gamma", "CertificateNotTrusted").await;
    kubernetes.event("ClusterPeer", "gamma", "CertificateNotTrusted").await;
    // The gateway's certificate is for another name.
    kubernetes.edit("peer-gamma", "ca.crt", beta.authority.certificate()).await;
    kubernetes.edit("peer-gamma", "server-name", "gateway.example").await;
    kubernetes.reason("gamma", "WrongName").await;
    // It is beta's gateway, which knows nothing of a cluster gamma and lets nobody ask.
    kubernetes.edit("peer-gamma", "server-name", "").await;
    let refused = kubernetes.peer("gamma gets no further", "gamma", |peer| peer.is(CONNECTED)).await;
    assert!(!refused.is(READY));
    // A name that nobody knows.
    kubernetes.edit("peer-gamma", "endpoints", "https://gateway.invalid:2379").await;
    kubernetes.reason("gamma", "NameNotResolved").await;
    // One that has the id of another.
    let delta = Cluster::start(&alpha, "delta", 2).await;
    kubernetes.configure(&delta.secret(), None).await;
    let conflict = kubernetes.reason("delta", "IdConflict").await;
    assert!(conflict.condition(READY).unwrap().message.contains("beta"), "{conflict:#?}");
    kubernetes.event("ClusterPeer", "delta", "IdConflict").await;
    assert!(kubernetes.peers().get("beta").await.unwrap().is(READY));
    alpha.stop().await;
}

/// The definition of before a cluster could be admitted alone.
fn before_relations() -> Vec<CustomResourceDefinition> {
    let mut definitions = json!(isthmus_crds::own_definitions());
    for definition in definitions.as_array_mut().unwrap() {
        let version = &mut definition["spec"]["versions"][0];
        let spec = &mut version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
        assert!(spec.as_object_mut().unwrap().remove("relation").is_some());
    }
    serde_json::from_value(definitions).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_definition_of_cluster_peers_is_written_as_far_as_it_goes_and_told_of() {
    let kubernetes = Kubernetes::start_with(before_relations()).await;
    let alpha = Alpha::start(&kubernetes).await;
    let beta = Cluster::start(&alpha, "beta", 2).await;
    let gamma = Cluster::start(&alpha, "gamma", 3).await;
    let mut secret = beta.secret();
    secret.relation = Relation::Admitted;
    kubernetes.configure(&secret, None).await;
    kubernetes.configure(&gamma.secret(), None).await;
    kubernetes.ready("gamma").await;
    let peer = kubernetes.peer("beta is admitted", "beta", |peer| peer.is(ADMITTED)).await;
    assert_eq!(peer.spec.relation, PeerRelation::Connected, "all that the API can have");
    let note = kubernetes.event("ClusterPeer", "beta", "DefinitionOutdated").await;
    assert!(note.contains("apply crds/yaml/clusterpeers.isthmus.io.yaml"), "{note}");

    let definitions: Api<CustomResourceDefinition> = Api::all(kubernetes.client.clone());
    for definition in isthmus_crds::own_definitions() {
        let (name, spec) = (definition.name_any(), json!({"spec": definition.spec}));
        definitions.patch(&name, &PatchParams::default(), &Patch::Merge(spec)).await.unwrap();
    }
    // What is written anyway brings it along.
    kubernetes.edit("peer-beta", "endpoints", "https://192.0.2.1:2379").await;
    kubernetes
        .peer("the relation is there", "beta", |peer| peer.spec.relation == PeerRelation::Admitted)
        .await;
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_leader_writes_and_it_takes_over_what_there_is() {
    let kubernetes = Kubernetes::start().await;
    let ours = |name: &str| {
        let spec = isthmus_crds::ClusterPeerSpec {
            source: PeerSource::Directory,
            secret: None,
            relation: PeerRelation::Connected,
        };
        ClusterPeer::new(name, spec)
    };
    kubernetes.peers().create(&PostParams::default(), &ours("long-gone")).await.unwrap();
    let alpha = Alpha::start_with(&kubernetes, Kept::nothing(), false).await;
    let beta = Cluster::start(&alpha, "beta", 2).await;
    let gamma = Cluster::start(&alpha, "gamma", 3).await;
    kubernetes.configure(&beta.secret(), None).await;
    kubernetes.configure(&gamma.secret(), None).await;
    alpha.mirrors("beta").await;
    assert!(kubernetes.peers().get_opt("beta").await.unwrap().is_none(), "it does not lead");
    assert!(kubernetes.peers().get_opt("long-gone").await.unwrap().is_some());

    alpha.lead(true);
    let first = kubernetes.ready("beta").await;
    kubernetes.no_peer("long-gone").await;

    // The next process takes over: what held holds on, and who was removed meanwhile is drained.
    kubernetes.ready("gamma").await;
    let kept = alpha.stop().await;
    kubernetes.delete("peer-gamma").await;
    kubernetes.peers().create(&PostParams::default(), &ours("another")).await.unwrap();
    let alpha = Alpha::start_with(&kubernetes, kept, true).await;
    kubernetes.reason("gamma", "Draining").await;
    kubernetes.no_peer("gamma").await;
    kubernetes.no_peer("another").await;
    alpha.mirrors("beta").await;
    let second = kubernetes.ready("beta").await;
    assert_eq!(second.metadata.uid, first.metadata.uid);
    assert_eq!(
        second.condition(READY).unwrap().last_transition_time,
        first.condition(READY).unwrap().last_transition_time
    );
    assert!(!alpha.has("cilium/cache/nodes/v1/gamma/n1") && alpha.has(NODE));

    // Deleted by hand: made again when there is something to tell.
    kubernetes.peers().delete("beta", &DeleteParams::default()).await.unwrap();
    beta.stop().await;
    kubernetes.peer("beta is lost", "beta", |peer| !peer.is(READY)).await;
    alpha.stop().await;
}
