//! Peers that Secrets configure: a Kubernetes API on loopback, clusters with an authority of their own each, and the relay with
//! what it tells the API.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_apiserver::peering;
use clustermesh_apiserver::pki::{Authority, Client as Subject, DEFAULT_VALIDITY};
use clustermesh_apiserver::relay::{
    Metrics, OwnCluster, Relay, RelayConfig, SecretSource, Sources, SourcesConfig, Timing,
};
use clustermesh_apiserver::status::{PeerState, PeerStatus};
use clustermesh_apiserver::tasks::Tasks;
use isthmus_crds::peer::{CONNECT_ANNOTATION, PeerSecret, Relation};
use isthmus_crds::{CaBundle, ClusterPeer, READY, SecretVersion};
use isthmus_kube_api::{Config, KubeApi};
use isthmus_kvstore::config::LiveIdentity;
use isthmus_kvstore::gateway::{Grants, LiveTls, Trust, TrustedAuthority, Vouches};
use isthmus_kvstore::memory::{Limits, MemoryStore, StoreId};
use isthmus_kvstore::writer::Writer;
use isthmus_wire::MaxConnectedClusters;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::fixture::{Peer, until, until_async};

pub(crate) const NAMESPACE: &str = "isthmus-system";

/// A Kubernetes API with our namespace and definitions.
pub(crate) struct Kubernetes {
    pub(crate) api: KubeApi,
    pub(crate) client: Client,
}

impl Kubernetes {
    pub(crate) async fn start() -> Self {
        Self::start_with(isthmus_crds::own_definitions()).await
    }

    /// With these definitions.
    pub(crate) async fn start_with(own: Vec<CustomResourceDefinition>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = KubeApi::serve(listener, Config::default()).unwrap();
        let url = format!("http://{}", api.addresses()[0]).parse().unwrap();
        let client = Client::try_from(kube::Config::new(url)).unwrap();
        let kubernetes = Self { api, client };
        let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": NAMESPACE}})).unwrap();
        Api::all(kubernetes.client.clone()).create(&PostParams::default(), &namespace).await.unwrap();
        let definitions: Api<CustomResourceDefinition> = Api::all(kubernetes.client.clone());
        for definition in own {
            definitions.create(&PostParams::default(), &definition).await.unwrap();
            let established = kube::runtime::conditions::is_crd_established();
            kube::runtime::wait::await_condition(definitions.clone(), &definition.name_any(), established)
                .await
                .unwrap();
        }
        kubernetes
    }

    pub(crate) fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    pub(crate) fn peers(&self) -> Api<ClusterPeer> {
        Api::all(self.client.clone())
    }

    /// Creates a Secret that describes a peer, under its usual name or another.
    pub(crate) async fn configure(&self, peer: &PeerSecret, name: Option<&str>) {
        let mut secret = peer.to_secret(NAMESPACE);
        if let Some(name) = name {
            secret.metadata.name = Some(name.to_owned());
        }
        self.secrets().create(&PostParams::default(), &secret).await.unwrap();
    }

    /// The version of a Secret that is there now.
    pub(crate) async fn version(&self, secret: &str) -> SecretVersion {
        SecretVersion::of(&self.secrets().get(secret).await.unwrap().metadata).unwrap()
    }

    /// Sets the annotation that connects.
    pub(crate) async fn annotate(&self, secret: &str, value: &str) {
        self.patch(secret, json!({"metadata": {"annotations": {CONNECT_ANNOTATION: value}}})).await;
    }

    pub(crate) async fn edit(&self, secret: &str, key: &str, value: &str) {
        self.patch(secret, json!({"stringData": {key: value}})).await;
    }

    async fn patch(&self, secret: &str, patch: Value) {
        self.secrets().patch(secret, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    }

    pub(crate) async fn delete(&self, secret: &str) {
        let _ = self.secrets().delete(secret, &DeleteParams::default()).await.unwrap();
    }

    /// Waits for a ClusterPeer of which something holds.
    pub(crate) async fn peer(
        &self,
        what: &str,
        name: &str,
        holds: impl Fn(&ClusterPeer) -> bool,
    ) -> ClusterPeer {
        until_async(what, || async {
            let peer = self.peers().get_opt(name).await.unwrap();
            match peer {
                Some(peer) if holds(&peer) => Ok(peer),
                peer => Err(format!("{peer:#?}")),
            }
        })
        .await
    }

    pub(crate) async fn ready(&self, name: &str) -> ClusterPeer {
        self.peer(&format!("{name} is ready"), name, |peer| peer.is(READY)).await
    }

    /// Waits for a ClusterPeer whose condition Ready has this reason.
    pub(crate) async fn reason(&self, name: &str, reason: &str) -> ClusterPeer {
        let has = |peer: &ClusterPeer| peer.condition(READY).is_some_and(|ready| ready.reason == reason);
        self.peer(&format!("{name}: {reason}"), name, has).await
    }

    pub(crate) async fn no_peer(&self, name: &str) {
        until_async(&format!("there is no ClusterPeer {name}"), || async {
            match self.peers().get_opt(name).await.unwrap() {
                None => Ok(()),
                peer => Err(format!("{peer:#?}")),
            }
        })
        .await;
    }

    /// Waits for an Event about an object, and gives its text.
    pub(crate) async fn event(&self, kind: &str, name: &str, reason: &str) -> String {
        let events: Api<Event> = Api::all(self.client.clone());
        until_async(&format!("Event {reason} about {kind} {name}"), || async {
            let all = events.list(&ListParams::default()).await.unwrap().items;
            let seen = format!(
                "{:#?}",
                all.iter().map(|event| (&event.regarding, &event.reason)).collect::<Vec<_>>()
            );
            let wanted = all.into_iter().find(|event| {
                let about = event.regarding.clone().unwrap_or_default();
                about.kind.as_deref() == Some(kind)
                    && about.name.as_deref() == Some(name)
                    && event.reason.as_deref() == Some(reason)
            });
            wanted.and_then(|event| event.note).ok_or(seen)
        })
        .await
    }
}

/// A cluster other than the own one: its authority, and its gateway.
pub(crate) struct Cluster {
    pub(crate) peer: Peer,
    pub(crate) authority: Authority,
    tls: LiveTls,
}

impl Cluster {
    /// A gateway that takes the relay of `alpha` for what its authority says it is.
    pub(crate) async fn start(alpha: &Alpha, name: &'static str, id: u32) -> Self {
        let authority = Authority::generate(name, DEFAULT_VALIDITY).unwrap();
        let identity = authority.gateway("kube-system", &[], DEFAULT_VALIDITY).unwrap();
        let identity = LiveIdentity::new(&identity.certificate, &identity.key).unwrap();
        let tls = LiveTls::new(identity, trust(&alpha.authority)).unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let peer = Peer::serve(name, address, tls.clone(), Grants::cluster_mesh(name)).await;
        tell(&peer, id);
        Self { peer, authority, tls }
    }

    /// Ends it, and says where it was.
    pub(crate) async fn stop(self) -> (SocketAddr, Authority, LiveTls) {
        let address = self.peer.address;
        self.peer.stop().await;
        (address, self.authority, self.tls)
    }

    /// The same again, where it was, with an empty store that is filled anew.
    pub(crate) async fn back(
        (address, authority, tls): (SocketAddr, Authority, LiveTls),
        name: &'static str,
        id: u32,
    ) -> Self {
        let peer = Peer::serve(name, address, tls.clone(), Grants::cluster_mesh(name)).await;
        tell(&peer, id);
        Self { peer, authority, tls }
    }

    /// What a Secret in `alpha` says of it.
    pub(crate) fn secret(&self) -> PeerSecret {
        PeerSecret {
            cluster: self.peer.name.parse().unwrap(),
            endpoints: vec![format!("https://{}", self.peer.address).parse().unwrap()],
            ca: CaBundle::parse(self.authority.certificate()).unwrap(),
            server_name: None,
            addresses: Default::default(),
            identity: None,
            relation: Relation::Connected,
        }
    }
}

fn tell(peer: &Peer, id: u32) {
    peer.introduce(id);
    peer.put_node("n1", id);
    peer.put_service("echo", id);
    peer.complete();
}

fn trust(authority: &Authority) -> Trust {
    let alpha = TrustedAuthority {
        pem: authority.certificate().into(),
        vouches: Vouches::Peer("alpha".parse().unwrap()),
    };
    Trust { authorities: vec![alpha] }
}

/// The own cluster, `alpha` with id 1, whose peers Secrets and files configure.
pub(crate) struct Alpha {
    pub(crate) store: MemoryStore,
    pub(crate) relay: Relay,
    pub(crate) sources: Sources,
    pub(crate) authority: Authority,
    pub(crate) peers_dir: PathBuf,
    leader: watch::Sender<bool>,
    shutdown: CancellationToken,
    tasks: Vec<AbortOnDropHandle<()>>,
    _folder: Arc<TempDir>,
}

impl Alpha {
    /// Starts the relay with a short grace period, leading.
    pub(crate) async fn start(kubernetes: &Kubernetes) -> Self {
        Self::start_with(kubernetes, Kept::nothing(), true).await
    }

    /// Starts it with what an earlier run has left.
    pub(crate) async fn start_with(kubernetes: &Kubernetes, kept: Kept, leads: bool) -> Self {
        let Kept { store, authority } = kept;
        let remote = authority.client(Subject::Remote("alpha"), DEFAULT_VALIDITY).unwrap();
        let identity = LiveIdentity::new(&remote.certificate, &remote.key).unwrap();
        let own = OwnCluster {
            name: "alpha".parse().unwrap(),
            id: 1.try_into().unwrap(),
            mesh: MaxConnectedClusters::C255,
        };
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let peers_dir = folder.path().to_owned();
        let shutdown = CancellationToken::new();
        let sources = SourcesConfig {
            own: own.name.clone(),
            directory: Some(peers_dir.clone()),
            secrets: Some(SecretSource {
                client: kubernetes.client.clone(),
                namespace: NAMESPACE.to_owned(),
                identity,
            }),
        };
        let sources = Sources::follow(sources, &Tasks::until(shutdown.clone()));
        let timing = Timing { drain_grace: Duration::from_secs(2), ..Timing::default() };
        let config = RelayConfig { own, sources: sources.clone(), timing };
        let writer = Writer::memory(store.clone());
        let (relay, relaying) = Relay::spawn(config, writer, Arc::new(Metrics::default()), shutdown.clone());
        let (leader, leads) = watch::channel(leads);
        let keeping =
            tokio::spawn(peering::keep(kubernetes.client.clone(), relay.clone(), leads, shutdown.clone()));
        let tasks = [relaying, keeping].map(AbortOnDropHandle::new).into();
        Self { store, relay, sources, authority, peers_dir, leader, shutdown, tasks, _folder: folder }
    }

    pub(crate) fn lead(&self, leads: bool) {
        self.leader.send_replace(leads);
    }

    pub(crate) fn peer(&self, name: &str) -> Option<PeerStatus> {
        self.relay.peers().into_iter().find(|peer| peer.name == name)
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.store.get(key.as_bytes()).is_some()
    }

    pub(crate) async fn mirrors(&self, name: &str) -> PeerStatus {
        until(&format!("{name} is mirrored"), || {
            let peer = self.peer(name);
            let seen = format!("{peer:#?}");
            peer.filter(|peer| peer.state == PeerState::Ready).ok_or(seen)
        })
        .await
    }

    pub(crate) async fn stop(self) -> Kept {
        self.shutdown.cancel();
        for task in self.tasks {
            tokio::time::timeout(crate::fixture::DEADLINE, task).await.expect("it ends in time").unwrap();
        }
        Kept { store: self.store, authority: self.authority }
    }
}

/// What outlives the process where the store is an etcd.
pub(crate) struct Kept {
    store: MemoryStore,
    authority: Authority,
}

impl Kept {
    pub(crate) fn nothing() -> Self {
        Self {
            store: MemoryStore::new(StoreId::random(), Limits::default()),
            authority: Authority::generate("alpha", DEFAULT_VALIDITY).unwrap(),
        }
    }
}
