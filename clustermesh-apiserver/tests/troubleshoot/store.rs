//! What a store holds, or does not, and how the relay keeps up with it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use clustermesh_apiserver::relay::{Metrics, OwnCluster, Relay, RelayConfig, Sources, SourcesConfig, Timing};
use clustermesh_apiserver::status::PeerState;
use clustermesh_apiserver::tasks::Tasks;
use clustermesh_apiserver::troubleshoot::{Outcome, PeerReport, Step};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use isthmus_kvstore::client::steps::Resolver;
use isthmus_kvstore::gateway::Grants;
use isthmus_kvstore::memory::{KeyRange, Limits, MemoryStore, StoreId};
use isthmus_kvstore::writer::Writer;
use isthmus_wire::MaxConnectedClusters;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::fixture::{self, GATEWAY, NOW, Peer, World, ends, found, own, tls_client, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_we_may_not_read() {
    let world = World::new();
    let grants = Grants::none().allow(
        "remote-alpha",
        [
            KeyRange::prefix("cilium/.heartbeat"),
            KeyRange::prefix("cilium/state/nodes/"),
            KeyRange::prefix("cilium/state/services/"),
            KeyRange::prefix("cilium/state/endpointslices/"),
            KeyRange::prefix("cilium/state/serviceexports/"),
            KeyRange::prefix("cilium/state/ip/"),
            KeyRange::key("cilium/cluster-config/beta"),
            KeyRange::prefix("cilium/synced/beta/"),
        ],
    );
    let beta = world.serve(&world.ca.server(GATEWAY, NOW), grants).await;
    beta.tell("beta", 2);
    let report = world.probe(beta.address).await;
    let problem = ends(&report, Step::Permissions, "permission-denied");
    assert_eq!(problem, "CN=remote-alpha may not read: cilium/state/identities/v1/id/*");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_whom_the_peer_does_not_know() {
    let world = World::new();
    let beta = world.beta().await;
    world.ca.client("nobody", NOW).write(world.folder.path(), "remote");
    let problem = ends(&world.probe(beta.address).await, Step::Permissions, "permission-denied");
    assert!(problem.starts_with("CN=nobody may not read: cilium/.heartbeat*"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_another_clusters() {
    let world = World::new();
    let gamma = world.serve(&world.ca.server(GATEWAY, NOW), Grants::cluster_mesh("gamma")).await;
    gamma.tell("gamma", 3);
    let problem = ends(&world.probe(gamma.address).await, Step::Permissions, "other-cluster");
    assert_eq!(problem, "the gateway is that of gamma, not of beta");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_has_not_written_its_configuration() {
    let world = World::new();
    let beta = world.beta().await;
    beta.delete("cilium/cluster-config/beta");
    let report = world.probe(beta.address).await;
    found(&report, Step::ClusterConfig, "cluster-config-missing");
    assert_eq!(report.step(Step::Canaries).unwrap().outcome, Outcome::Skipped);
    assert_eq!(report.step(Step::Heartbeat).unwrap().outcome, Outcome::Passed, "asked all the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_whose_configuration_does_not_fit() {
    let world = World::new();
    let beta = world.beta().await;
    beta.config("beta", 1, 255);
    let problem = found(&world.probe(beta.address).await, Step::ClusterConfig, "id-conflict");
    assert!(problem.contains("1, which is ours"), "{problem}");

    beta.config("beta", 300, 511);
    found(&world.probe(beta.address).await, Step::ClusterConfig, "cluster-config-incompatible");

    beta.put("cilium/cluster-config/beta", "{}");
    found(&world.probe(beta.address).await, Step::ClusterConfig, "cluster-config-malformed");

    // A mesh of 511 wants the same of everybody.
    beta.config("beta", 2, 255);
    let large = OwnCluster { mesh: MaxConnectedClusters::C511, ..own() };
    let target = world.at(beta.address);
    let of_511 = fixture::troubleshooter_of(large, target, Resolver::system(), fixture::PATIENT);
    let problem = found(&fixture::only(of_511).await, Step::ClusterConfig, "max-connected-clusters-differ");
    assert!(problem.contains("for 255") && problem.contains("we for 511"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_has_the_id_of_another() {
    let world = World::new();
    let (beta, gamma) = (world.beta().await, gamma(&world).await);
    let relay = Following::start(&world);
    relay.connect(&world, "gamma", gamma.address);
    relay.ready("gamma").await;
    relay.connect(&world, "beta", beta.address);
    relay.is("beta", PeerState::Refused).await;
    let report = relay.probe(&world, beta.address).await;
    let problem = found(&report, Step::ClusterConfig, "id-conflict");
    assert!(problem.contains("2, which is that of the peer gamma"), "{problem}");
    assert_eq!(report.step(Step::Relay).unwrap().outcome, Outcome::Skipped, "it follows from the above");
}

/// Another cluster, set up with beta's id.
async fn gamma(world: &World) -> Peer {
    let gamma = world.serve(&world.ca.server(GATEWAY, NOW), Grants::cluster_mesh("gamma")).await;
    gamma.tell("gamma", 2);
    gamma
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_that_is_not_said_to_be_complete() {
    let world = World::new();
    let beta = world.beta().await;
    beta.delete("cilium/synced/beta/cilium/state/identities/v1");
    let report = world.probe(beta.address).await;
    let problem = found(&report, Step::Canaries, "canary-missing");
    assert!(problem.ends_with(": cilium/state/identities/v1"), "that one alone: {problem}");
    // Those that are there are told with their age.
    let seen = &report.step(Step::Canaries).unwrap().seen;
    assert!(seen.iter().any(|line| line.starts_with("cilium/state/nodes/v1: complete")), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_that_is_missing_old_or_ahead() {
    let world = World::new();
    let beta = world.beta().await;
    let at = |minutes| (Utc::now() + TimeDelta::minutes(minutes)).to_rfc3339();
    beta.delete("cilium/.heartbeat");
    let report = world.probe(beta.address).await;
    found(&report, Step::Heartbeat, "heartbeat-missing");
    assert_eq!(report.outcome(), Outcome::Warning, "its exporter has only just written its canaries");

    for prefix in ["nodes", "services", "identities", "ip", "serviceexports"] {
        beta.put(&format!("cilium/synced/beta/cilium/state/{prefix}/v1"), at(-60));
    }
    let report = world.probe(beta.address).await;
    found(&report, Step::Heartbeat, "heartbeat-missing");
    assert_eq!(report.outcome(), Outcome::Failed, "its exporter has run for an hour");

    beta.put("cilium/.heartbeat", at(-3));
    let problem = found(&world.probe(beta.address).await, Step::Heartbeat, "heartbeat-old");
    assert!(problem.contains("180s ago") || problem.contains("181s ago"), "{problem}");

    beta.put("cilium/.heartbeat", at(10));
    let report = world.probe(beta.address).await;
    found(&report, Step::Heartbeat, "clocks-differ");
    assert_eq!(report.outcome(), Outcome::Warning);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_exchanged_in_the_midst() {
    let world = World::new();
    let (first, second) = (world.beta().await, world.beta().await);
    // As a load balancer does that hands out single requests.
    let (first, second) = (upstream(&world, &first).await, upstream(&world, &second).await);
    let balancer = balancer([first, second], 6).await;
    let target = world.target(&[format!("http://{balancer}")]);
    let report = fixture::probe(target, Resolver::system()).await;
    let problem = found(&report, Step::Store, "store-exchanged");
    assert!(problem.contains("on one connection"), "{problem}");
}

/// A connection to a gateway, for who speaks HTTP/2 over it.
async fn upstream(world: &World, peer: &Peer) -> SendRequest<hyper::body::Incoming> {
    let stream = TcpStream::connect(peer.address).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from(GATEWAY).unwrap();
    let stream = tokio_rustls::TlsConnector::from(tls_client(world)).connect(name, stream).await.unwrap();
    let (send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    send
}

/// Passes `calls` requests on to the first, and all later ones to the second.
async fn balancer(stores: [SendRequest<hyper::body::Incoming>; 2], calls: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (stores, count) = (stores.clone(), count.clone());
            let service = hyper::service::service_fn(move |request| {
                let call = count.fetch_add(1, Ordering::SeqCst);
                let mut store = stores[usize::from(call >= calls)].clone();
                async move { store.send_request(request).await }
            });
            tokio::spawn(
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_keeps_up_and_one_that_does_not() {
    let world = World::new();
    let beta = world.beta().await;
    let relay = Following::start(&world);
    relay.connect(&world, "beta", beta.address);
    relay.ready("beta").await;
    let report = relay.probe(&world, beta.address).await;
    assert_eq!(report.step(Step::Relay).unwrap().outcome, Outcome::Passed, "{report:?}");

    // What changes outside of the mirrored ranges tells the relay nothing, until it asks after half a minute.
    let before = relay.peer("beta").unwrap().revision;
    beta.put("cilium/.heartbeat", Utc::now().to_rfc3339());
    until("what the relay knows is older than allowed", || {
        relay.peer("beta").unwrap().data_age_seconds.filter(|age| *age > 0.6)
    })
    .await;
    let young = Duration::from_millis(500);
    let report = relay.probe_with(&world, beta.address, young).await;
    let problem = found(&report, Step::Relay, "relay-lags");
    assert!(problem.contains(&format!("up to revision {before} of {}", before + 1)), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_has_no_connection_although_one_can_be_made() {
    let world = World::new();
    let beta = world.beta().await;
    let relay = Following::start(&world);
    let report = relay.probe(&world, beta.address).await;
    found(&report, Step::Relay, "relay-unaware");

    // Its own file says another place.
    relay.connect(&world, "beta", crate::reach::unused());
    until("it has tried", || relay.peer("beta").filter(|peer| peer.failures > 0)).await;
    let report = relay.probe(&world, beta.address).await;
    let problem = found(&report, Step::Relay, "relay-not-ready");
    assert!(problem.contains("connecting"), "{problem}");
}

/// Alpha's relay.
pub(crate) struct Following {
    pub(crate) relay: Relay,
    directory: std::path::PathBuf,
    shutdown: CancellationToken,
}

impl Following {
    pub(crate) fn start(world: &World) -> Self {
        let directory = world.folder.path().join("peers");
        std::fs::create_dir_all(&directory).unwrap();
        let store = MemoryStore::new(StoreId::random(), Limits::default());
        let shutdown = CancellationToken::new();
        let sources = SourcesConfig { own: own().name, directory: Some(directory.clone()), secrets: None };
        let sources = Sources::follow(sources, &Tasks::until(shutdown.clone()));
        let config = RelayConfig { own: own(), sources, timing: Timing::default() };
        let metrics = Arc::new(Metrics::default());
        let (relay, _) = Relay::spawn(config, Writer::memory(store), metrics, shutdown.clone());
        Self { relay, directory, shutdown }
    }

    /// Configures a peer.
    pub(crate) fn connect(&self, world: &World, name: &str, address: SocketAddr) {
        let text = format!(
            "endpoints:\n- https://{address}\ntrusted-ca-file: {}\nkey-file: {}\ncert-file: {}\n",
            world.path("ca.crt"),
            world.path("remote.key"),
            world.path("remote.crt"),
        );
        // As a whole, so that nobody sees half of it.
        let temporary = world.folder.path().join("new-peer");
        std::fs::write(&temporary, text).unwrap();
        std::fs::rename(temporary, self.directory.join(name)).unwrap();
    }

    fn peer(&self, name: &str) -> Option<clustermesh_apiserver::status::PeerStatus> {
        self.relay.peers().into_iter().find(|peer| peer.name == name)
    }

    async fn is(&self, name: &str, state: PeerState) {
        until(&format!("{name} is {state}"), || self.peer(name).filter(|peer| peer.state == state)).await;
    }

    pub(crate) async fn ready(&self, name: &str) {
        self.is(name, PeerState::Ready).await;
    }

    async fn probe(&self, world: &World, address: SocketAddr) -> PeerReport {
        self.probe_with(world, address, fixture::PATIENT).await
    }

    async fn probe_with(&self, world: &World, address: SocketAddr, data_age: Duration) -> PeerReport {
        let relay = self.relay.clone();
        fixture::probe_beside(world.at(address), data_age, move || relay.peers()).await
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}
