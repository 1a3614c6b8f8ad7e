//! Peers that a Secret configures: probed with what the Secret says and the identity that the relay has at that moment.

use std::sync::Arc;

use clustermesh_apiserver::relay::{
    Metrics, Relay, RelayConfig, SecretSource, Sources, SourcesConfig, Timing,
};
use clustermesh_apiserver::tasks::Tasks;
use clustermesh_apiserver::troubleshoot::{self, Outcome, Report, Step};
use isthmus_kube_api::{Config, KubeApi};
use isthmus_kvstore::config::LiveIdentity;
use isthmus_kvstore::memory::{Limits, MemoryStore, StoreId};
use isthmus_kvstore::writer::Writer;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{Api, PostParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::fixture::{Ca, NOW, World, found, own, until};
use crate::get;

const NAMESPACE: &str = "isthmus-system";

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_in_a_secret_is_probed_as_the_secret_says_and_its_faults_lead_back_to_it() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let world = World::new();
    let beta = world.beta_with(&world.ca.server("beta.mesh.cilium.io", NOW)).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let api = KubeApi::serve(listener, Config::default()).unwrap();
    let client =
        kube::Client::try_from(kube::Config::new(format!("http://{}", api.addresses()[0]).parse().unwrap()))
            .unwrap();
    let namespace: Namespace = serde_json::from_value(json!({ "metadata": { "name": NAMESPACE } })).unwrap();
    Api::all(client.clone()).create(&PostParams::default(), &namespace).await.unwrap();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let secret = |name: &str, data: serde_json::Value| -> Secret {
        serde_json::from_value(json!({
            "metadata": { "name": name, "annotations": { "isthmus.io/connect": "true" } },
            "type": "isthmus.io/peer",
            "stringData": data,
        }))
        .unwrap()
    };
    let connect = json!({
        "cluster-name": "beta",
        "endpoints": format!("https://beta.mesh.cilium.io:{}", beta.address.port()),
        "addresses": "beta.mesh.cilium.io 127.0.0.1",
        "ca.crt": world.ca.certificate,
    });
    secrets.create(&PostParams::default(), &secret("peer-beta", connect)).await.unwrap();
    let mut admitted =
        secret("peer-delta", json!({ "cluster-name": "delta", "ca.crt": world.ca.certificate }));
    admitted.metadata.annotations = Some([("isthmus.io/admit".to_owned(), "true".to_owned())].into());
    secrets.create(&PostParams::default(), &admitted).await.unwrap();
    let nowhere = json!({ "cluster-name": "gamma", "ca.crt": world.ca.certificate });
    secrets.create(&PostParams::default(), &secret("peer-gamma", nowhere)).await.unwrap();

    let leaf = world.ca.client("remote-alpha", NOW);
    let identity = LiveIdentity::new(&leaf.certificate, &leaf.key).unwrap();
    let source = SecretSource { client, namespace: NAMESPACE.to_owned(), identity: identity.clone() };
    let shutdown = CancellationToken::new();
    let _ends_with_the_test = shutdown.clone().drop_guard();
    let sources = SourcesConfig { own: own().name, directory: None, secrets: Some(source) };
    let config = RelayConfig {
        own: own(),
        sources: Sources::follow(sources, &Tasks::until(shutdown.clone())),
        timing: Timing::default(),
    };
    let store = MemoryStore::new(StoreId::random(), Limits::default());
    let (relay, _) =
        Relay::spawn(config, Writer::memory(store), Arc::new(Metrics::default()), shutdown.clone());
    until("beta is mirrored", || {
        relay.peers().into_iter().find(|peer| peer.state == clustermesh_apiserver::status::PeerState::Ready)
    })
    .await;
    until("gamma's Secret is refused", || (!relay.refused_secrets().is_empty()).then_some(())).await;
    until("delta is admitted", || (!relay.admitted().is_empty()).then_some(())).await;

    let routes = troubleshoot::of_daemon(own(), NAMESPACE, None, move || Some(relay.clone()));
    let probe = async |peer: &str| -> Report {
        let (status, body) = get(routes.clone(), &format!("/v1/troubleshoot?peer={peer}")).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    };
    let well = probe("beta").await;
    assert_eq!(well.outcome(), Outcome::Passed, "{well:#?}");
    assert_eq!(well.peers[0].source, "Secret isthmus-system/peer-beta");
    let seen = &well.peers[0].step(Step::Tls).unwrap().seen;
    assert!(seen[0].ends_with("verified as beta.mesh.cilium.io"), "{seen:?}");

    let refused = probe("gamma").await;
    let problem = found(&refused.peers[0], Step::Configuration, "configuration-unusable");
    assert!(problem.contains("peer-gamma") && problem.contains("endpoints"), "{problem}");
    let next = &refused.peers[0].findings().next().unwrap().next;
    assert_eq!(next.command, "kubectl -n isthmus-system edit secret peer-gamma");

    let admitted = probe("delta").await;
    assert_eq!(admitted.peers[0].findings().count(), 0, "nothing is wrong with that: {admitted:#?}");
    let [configuration, rest @ ..] = admitted.peers[0].steps.as_slice() else { panic!("{admitted:#?}") };
    assert!(configuration.seen[0].contains("delta may read from this cluster"), "{configuration:?}");
    assert!(rest.iter().all(|step| step.outcome == Outcome::Skipped), "{rest:#?}");

    // The identity was exchanged for one that beta does not know: the relay's old connection holds, and the next will not.
    let other = Ca::new().client("remote-alpha", NOW);
    identity.replace(&other.certificate, &other.key).unwrap();
    let doomed = probe("beta").await;
    found(&doomed.peers[0], Step::Tls, "our-certificate-refused");
    let finding = doomed.peers[0].findings().next().unwrap();
    assert!(finding.cause.contains("does not admit us"), "{finding:?}");
    let command = "isthmus connect --context '<context of alpha>' --destination-context '<context of beta>' \
                   --connection-mode unicast";
    assert_eq!(finding.next.command, command);
    assert_eq!(doomed.peers[0].step(Step::Relay).unwrap().outcome, Outcome::Passed, "{doomed:#?}");
}
