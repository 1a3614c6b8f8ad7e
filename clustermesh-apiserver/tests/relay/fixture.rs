//! A mesh on loopback: the own store with the relay writing to it, and peers as real gateways over stores of their own.

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clustermesh_apiserver::pki::{Authority, Client, DEFAULT_VALIDITY};
use clustermesh_apiserver::relay::{Metrics, OwnCluster, Relay, RelayConfig, Sources, SourcesConfig, Timing};
use clustermesh_apiserver::status::{PeerState, PeerStatus};
use clustermesh_apiserver::tasks::Tasks;
use isthmus_kvstore::gateway::{Gateway, GatewayOptions, Grants, ServerTls, TlsFiles};
use isthmus_kvstore::memory::{KeyRange, Limits, MemoryStore, RangeRequest, StoreId};
use isthmus_kvstore::writer::Writer;
use isthmus_wire::{MaxConnectedClusters, Prefix, Resource};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long anything may take. Only a failing test waits for it.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The own cluster, `alpha`, with id 1, and its relay.
pub(crate) struct Alpha {
    pub(crate) store: MemoryStore,
    pub(crate) relay: Relay,
    peers_dir: PathBuf,
    folder: Arc<TempDir>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Alpha {
    /// Starts the relay with short times.
    pub(crate) fn start(mesh: &Mesh) -> Self {
        Self::start_with(mesh, MemoryStore::new(StoreId::random(), Limits::default()), quick())
    }

    /// Starts the relay over `store`.
    pub(crate) fn start_with(mesh: &Mesh, store: MemoryStore, timing: Timing) -> Self {
        let own = OwnCluster {
            name: "alpha".parse().unwrap(),
            id: 1.try_into().unwrap(),
            mesh: MaxConnectedClusters::C255,
        };
        let peers_dir = mesh.folder.path().join("peers");
        std::fs::create_dir_all(&peers_dir).unwrap();
        let shutdown = CancellationToken::new();
        let sources =
            SourcesConfig { own: own.name.clone(), directory: Some(peers_dir.clone()), secrets: None };
        let config =
            RelayConfig { own, sources: Sources::follow(sources, &Tasks::until(shutdown.clone())), timing };
        let writer = Writer::memory(store.clone());
        let (relay, task) = Relay::spawn(config, writer, Arc::new(Metrics::default()), shutdown.clone());
        Self { store, relay, peers_dir, folder: Arc::clone(&mesh.folder), shutdown, task }
    }

    /// Configures a peer by its file.
    pub(crate) fn connect(&self, name: &str, address: SocketAddr) {
        let at = |file: &str| self.folder.path().join(file).display().to_string();
        let text = format!(
            "endpoints:\n- https://{address}\ntrusted-ca-file: {}\nkey-file: {}\ncert-file: {}\n",
            at("ca.crt"),
            at("remote.key"),
            at("remote.crt"),
        );
        // As a whole, so that the relay never sees half of it.
        let path = self.peers_dir.join(name);
        let temporary = self.folder.path().join("new-peer");
        std::fs::write(&temporary, text).unwrap();
        std::fs::rename(temporary, path).unwrap();
    }

    pub(crate) fn disconnect(&self, name: &str) {
        std::fs::remove_file(self.peers_dir.join(name)).unwrap();
    }

    pub(crate) fn peer(&self, name: &str) -> Option<PeerStatus> {
        self.relay.peers().into_iter().find(|peer| peer.name == name)
    }

    pub(crate) fn value(&self, key: &str) -> Option<Vec<u8>> {
        self.store.get(key.as_bytes()).map(|kv| kv.value.to_vec())
    }

    /// All keys that name `cluster`.
    pub(crate) fn keys_of(&self, cluster: &str) -> Vec<String> {
        let all = self.store.range(&RangeRequest::new(KeyRange::all())).unwrap();
        let keys = all.kvs.iter().map(|kv| String::from_utf8(kv.key.to_vec()).unwrap());
        keys.filter(|key| key.split('/').any(|element| element == cluster)).collect()
    }

    pub(crate) async fn ready(&self, name: &str) -> PeerStatus {
        until(&format!("{name} is mirrored"), || {
            self.peer(name)
                .filter(|peer| peer.state == PeerState::Ready)
                .ok_or_else(|| format!("{:#?}", self.peer(name)))
        })
        .await
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(DEADLINE, self.task).await.expect("the relay ends in time").unwrap();
    }
}

/// Times that let a test see the end of them.
pub(crate) fn quick() -> Timing {
    Timing { drain_grace: Duration::from_millis(300), ..Timing::default() }
}

/// What all clusters share: an authority, and the folder for files.
pub(crate) struct Mesh {
    folder: Arc<TempDir>,
    authority: Authority,
}

impl Mesh {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::generate("Cilium CA", DEFAULT_VALIDITY).unwrap();
        std::fs::write(folder.path().join("ca.crt"), authority.certificate()).unwrap();
        let relay = authority.client(Client::Remote("alpha"), DEFAULT_VALIDITY).unwrap();
        relay.write(folder.path(), "remote").unwrap();
        Self { folder: Arc::new(folder), authority }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A peer's gateway over an empty store, on a port that stays its own when it is started again.
    pub(crate) async fn peer(&self, name: &'static str) -> Peer {
        self.peer_at(name, isthmus_kube_api::ports::reserve().unwrap()).await
    }

    /// A peer whose gateway lets relays read its cache too.
    pub(crate) async fn mirror(&self, name: &'static str) -> Peer {
        let grants = Grants::none().allow_prefixed("remote-", [KeyRange::all()]);
        self.serve(name, "127.0.0.1:0".parse().unwrap(), grants).await
    }

    /// A peer, at a known address, that takes nobody's certificate: its gateway trusts an authority that signs for nobody here.
    pub(crate) async fn peer_that_refuses(&self, name: &'static str, address: SocketAddr) -> Peer {
        let other = Authority::generate("Cilium CA", DEFAULT_VALIDITY).unwrap();
        let client_ca = self.path().join("other-ca.crt");
        std::fs::write(&client_ca, other.certificate()).unwrap();
        let identity = self.authority.gateway("kube-system", &[], DEFAULT_VALIDITY).unwrap();
        let files = identity.write(self.path(), &format!("{name}-gateway")).unwrap();
        let tls = TlsFiles { certificate: files.certificate, key: files.key, client_ca };
        Peer::serve(name, address, tls, Grants::cluster_mesh(name)).await
    }

    /// As [`Mesh::peer`], at a known address: a restarted one. The address may still be in use for a moment.
    pub(crate) async fn peer_at(&self, name: &'static str, address: SocketAddr) -> Peer {
        self.serve(name, address, Grants::cluster_mesh(name)).await
    }

    async fn serve(&self, name: &'static str, address: SocketAddr, grants: Grants) -> Peer {
        let identity = self.authority.gateway("kube-system", &[], DEFAULT_VALIDITY).unwrap();
        let files = identity.write(self.path(), &format!("{name}-gateway")).unwrap();
        let tls = TlsFiles {
            certificate: files.certificate,
            key: files.key,
            client_ca: self.path().join("ca.crt"),
        };
        Peer::serve(name, address, tls, grants).await
    }
}

/// A peer that says whatever a test wants it to.
pub(crate) struct Peer {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    pub(crate) store: MemoryStore,
    gateway: Gateway,
}

impl Peer {
    /// A gateway over an empty store. The address may still be in use for a moment.
    pub(crate) async fn serve(
        name: &'static str,
        address: SocketAddr,
        tls: impl Into<ServerTls>,
        grants: Grants,
    ) -> Self {
        let store = MemoryStore::new(StoreId::random(), Limits::default());
        let tls = tls.into();
        let begun = std::time::Instant::now();
        let gateway = loop {
            let options = GatewayOptions::default();
            match Gateway::serve_with(address, tls.clone(), store.clone(), grants.clone(), options).await {
                Ok(gateway) => break gateway,
                Err(error) if begun.elapsed() > DEADLINE => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        store.put("cilium/.heartbeat", "2026-11-20T12:38:19Z");
        Self { name, address: gateway.local_addr(), store, gateway }
    }

    pub(crate) fn put(&self, key: &str, value: impl AsRef<[u8]>) {
        self.store.put(key.to_owned(), value.as_ref().to_vec());
    }

    pub(crate) fn delete(&self, key: &str) {
        self.store.delete(key.to_owned());
    }

    /// Says that it is `id`, with canaries.
    pub(crate) fn introduce(&self, id: u32) {
        let config =
            format!(r#"{{"id":{id},"capabilities":{{"syncedCanaries":true,"maxConnectedClusters":255}}}}"#);
        self.put(&format!("cilium/cluster-config/{}", self.name), config);
    }

    /// Says that everything has been told.
    pub(crate) fn complete(&self) {
        for resource in Resource::ALL {
            let canary = format!("cilium/synced/{}/{}", self.name, Prefix::State(resource));
            self.put(&canary, "2026-11-20T12:38:19Z");
        }
    }

    pub(crate) fn put_node(&self, node: &str, id: u32) {
        let value = format!(r#"{{"Name":"{node}","Cluster":"{}","ClusterID":{id}}}"#, self.name);
        self.put(&format!("cilium/state/nodes/v1/{}/{node}", self.name), value);
    }

    pub(crate) fn put_service(&self, service: &str, id: u32) {
        let name = self.name;
        let value = format!(
            r#"{{"cluster":"{name}","namespace":"app","name":"{service}","shared":true,"clusterID":{id},"new":"field"}}"#
        );
        self.put(&format!("cilium/state/services/v1/{name}/app/{service}"), value);
    }

    pub(crate) async fn stop(self) {
        self.gateway.shutdown().await;
    }
}

/// Waits until `probe` has an answer; its error tells what it saw last when the deadline has passed.
pub(crate) async fn until<T>(what: &str, mut probe: impl FnMut() -> Result<T, String>) -> T {
    until_async(what, || std::future::ready(probe())).await
}

pub(crate) async fn until_async<T, F: Future<Output = Result<T, String>>>(
    what: &str,
    mut probe: impl FnMut() -> F,
) -> T {
    let begun = std::time::Instant::now();
    loop {
        match probe().await {
            Ok(answer) => return answer,
            Err(seen) if begun.elapsed() > DEADLINE => {
                panic!("not within {DEADLINE:?}: {what}\nlast seen: {seen}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
