//! A cluster for tests of the command line: a Kubernetes API on loopback, and in place of the clustermesh-apiserver a few
//! lines that publish what it publishes and answer peers' Secrets with ClusterPeers.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clustermesh_apiserver::certificates::rotation::{FINISHING, MESSAGE_ANNOTATION, STATE_ANNOTATION};
use isthmus_crds::peer::{PEER_SECRET_TYPE, PeerSecret, Relation};
use isthmus_crds::{CaBundle, ClusterInfo, ClusterPeer, PeerSource, SecretVersion, names};
use isthmus_kube_api::{Config, KubeApi};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Secret, Service};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource, ResourceExt};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;

pub(crate) const NAMESPACE: &str = "isthmus-system";
const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// How long anything may take. Far more than it needs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// How a cluster is set up.
pub(crate) struct Setup {
    pub name: &'static str,
    pub id: u32,
    /// Its pods are in `10.<net>.0.0/16`, its Services in `10.<100 + net>.0.0/16`, its nodes in `172.18.<net>.0/24`.
    pub net: u8,
}

pub(crate) struct Cluster {
    pub client: Client,
    pub server: String,
    healthy: Arc<AtomicBool>,
    observing: Arc<AtomicBool>,
    _api: KubeApi,
    apiserver: Option<AbortHandle>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(apiserver) = &self.apiserver {
            apiserver.abort();
        }
    }
}

impl Cluster {
    /// A cluster with Isthmus.
    pub(crate) async fn start(setup: Setup) -> Self {
        let mut cluster = Self::without_isthmus(&setup).await;
        cluster.install(&setup).await;
        let answering = Answering {
            client: cluster.client.clone(),
            healthy: cluster.healthy.clone(),
            observing: cluster.observing.clone(),
            own_id: i32::try_from(setup.id).unwrap(),
        };
        cluster.apiserver = Some(tokio::spawn(answering.run()).abort_handle());
        cluster
    }

    pub(crate) async fn without_isthmus(setup: &Setup) -> Self {
        let services = format!("10.{}.0.0/16", 100 + setup.net).parse().unwrap();
        let listener = TcpListener::bind(LOOPBACK).await.unwrap();
        let config = Config { service_cidrs: vec![services], ..Config::default() };
        let api = KubeApi::serve(listener, config).unwrap();
        let server = format!("http://{}", api.addresses()[0]);
        let client = Client::try_from(kube::Config::new(server.parse().unwrap())).unwrap();
        let healthy = Arc::new(AtomicBool::new(true));
        let observing = Arc::new(AtomicBool::new(false));
        let cluster = Self { client, server, healthy, observing, _api: api, apiserver: None };
        let node = json!({
            "metadata": {"name": format!("{}-1", setup.name)},
            "spec": {"podCIDR": format!("10.{}.0.0/24", setup.net), "podCIDRs": [format!("10.{}.0.0/24", setup.net)]},
            "status": {
                "addresses": [{"type": "InternalIP", "address": format!("172.18.{}.1", setup.net)}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        let nodes: Api<Node> = Api::all(cluster.client.clone());
        nodes.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();
        cluster
    }

    async fn install(&self, setup: &Setup) {
        self.make_namespace().await;
        self.define(isthmus_crds::own_definitions()).await;
        self.publish(&info(setup.name, setup.id)).await;
        self.serve().await;
    }

    pub(crate) async fn make_namespace(&self) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let namespace = serde_json::from_value(json!({"metadata": {"name": NAMESPACE}})).unwrap();
        namespaces.create(&PostParams::default(), &namespace).await.unwrap();
    }

    pub(crate) async fn define(&self, all: Vec<CustomResourceDefinition>) {
        let definitions: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        for definition in all {
            let name = definition.name_any();
            definitions.create(&PostParams::default(), &definition).await.unwrap();
            let established = kube::runtime::wait::await_condition(
                definitions.clone(),
                &name,
                kube::runtime::conditions::is_crd_established(),
            );
            tokio::time::timeout(DEADLINE, established).await.unwrap().unwrap();
        }
    }

    async fn serve(&self) {
        let pods = json!({
            "selector": {"matchLabels": {"app": "x"}},
            "template": {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "x", "image": "x"}]}},
        });
        self.create::<Deployment>(json!({"metadata": {"name": names::APISERVER}, "spec": pods})).await;
        self.status::<Deployment>(names::APISERVER, json!({"replicas": 1, "readyReplicas": 1})).await;
        self.create::<DaemonSet>(json!({"metadata": {"name": names::NODE_AGENT}, "spec": pods})).await;
        self.status::<DaemonSet>(
            names::NODE_AGENT,
            json!({"currentNumberScheduled": 1, "desiredNumberScheduled": 1, "numberMisscheduled": 0, "numberReady": 1}),
        )
        .await;
        self.create::<Service>(json!({
            "metadata": {"name": names::APISERVER},
            "spec": {"type": "NodePort", "ports": [{"port": 2379, "nodePort": 32379}]},
        }))
        .await;
    }

    /// As the leading clustermesh-apiserver does.
    pub(crate) async fn publish(&self, info: &ClusterInfo) {
        publish_to(&self.publisher(), info).await;
    }

    /// Plays the leader of a rotation of the CA, which has come so far. The bundles that have been published, in order.
    pub(crate) async fn rotate_when_asked(
        &self,
        mut state: &'static str,
        name: &'static str,
        id: u32,
    ) -> Rotations {
        let old = info(name, id);
        let new = info(name, id);
        let both = CaBundle::parse(&format!("{}{}", old.ca.as_str(), new.ca.as_str())).unwrap();
        let both = ClusterInfo { ca: both, ..old.clone() };
        self.publish(if state == "steady" { &old } else { &both }).await;
        let annotations = json!({"isthmus.io/ca-rotation-state": state});
        self.create::<Secret>(json!({
            "metadata": {"name": names::CA_SECRET, "annotations": annotations}, "type": names::CA_SECRET_TYPE,
        }))
        .await;
        let rotations = Rotations { both: both.ca.clone(), new: new.ca.clone() };
        let (cluster, secrets) = (self.publisher(), self.namespaced::<Secret>());
        tokio::spawn(async move {
            loop {
                let secret = secrets.get(names::CA_SECRET).await.unwrap();
                let asked = secret.annotations().get("isthmus.io/ca-rotation").map(String::as_str);
                let next = match (state, asked) {
                    ("steady", Some("prepare")) => Some(("prepared", Some(&both))),
                    ("prepared", Some("activate")) => Some(("activated", None)),
                    ("activated", Some("finish")) => Some(("steady", Some(&new))),
                    _ => None,
                };
                let annotate = async |annotations: Value| {
                    let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
                    secrets.patch(names::CA_SECRET, &PatchParams::default(), &patch).await.unwrap();
                };
                if let Some((next, publish)) = next {
                    state = next;
                    if state == "steady" {
                        // The end is reached before everything has followed from it. Whoever looks now sees that.
                        annotate(json!({STATE_ANNOTATION: state, MESSAGE_ANNOTATION: FINISHING})).await;
                        tokio::time::sleep(Duration::from_secs(2)).await;
                    }
                    if let Some(info) = publish {
                        publish_to(&cluster, info).await;
                    }
                    annotate(json!({STATE_ANNOTATION: state, MESSAGE_ANNOTATION: null})).await;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        rotations
    }

    fn publisher(&self) -> Api<ConfigMap> {
        self.namespaced()
    }

    /// Whether its apiserver gets through to peers.
    pub(crate) fn set_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Ordering::SeqCst);
    }

    /// Whether its apiserver says which version of a Secret is in use. The one that it named last stays otherwise.
    pub(crate) fn set_observing(&self, observing: bool) {
        self.observing.store(observing, Ordering::SeqCst);
    }

    pub(crate) fn namespaced<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    pub(crate) async fn create<K>(&self, object: Value)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Serialize
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let object: K = serde_json::from_value(object).unwrap();
        self.namespaced::<K>().create(&PostParams::default(), &object).await.unwrap();
    }

    /// A peer that no Secret configures.
    pub(crate) async fn mirror_from_a_file(&self, peer: &str) {
        let object = serde_json::from_value(json!({
            "apiVersion": "isthmus.io/v1alpha1", "kind": "ClusterPeer", "metadata": {"name": peer},
            "spec": {"source": "Directory", "relation": "Connected"},
        }));
        let peers: Api<ClusterPeer> = Api::all(self.client.clone());
        peers.create(&PostParams::default(), &object.unwrap()).await.unwrap();
    }

    pub(crate) async fn status<K>(&self, name: &str, status: Value)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let patch = Patch::Merge(json!({"status": status}));
        self.namespaced::<K>().patch_status(name, &PatchParams::default(), &patch).await.unwrap();
    }

    pub(crate) async fn secret(&self, name: &str) -> Option<Secret> {
        self.namespaced::<Secret>().get_opt(name).await.unwrap()
    }

    pub(crate) async fn peers(&self) -> Vec<String> {
        let peers: Api<ClusterPeer> = Api::all(self.client.clone());
        peers.list(&ListParams::default()).await.unwrap().iter().map(ResourceExt::name_any).collect()
    }
}

/// The bundles of a rotation.
pub(crate) struct Rotations {
    /// Of the old CA and the new one.
    pub both: CaBundle,
    /// Of the new one.
    pub new: CaBundle,
}

async fn publish_to(maps: &Api<ConfigMap>, info: &ClusterInfo) {
    let mut map = serde_json::to_value(info.to_config_map(NAMESPACE)).unwrap();
    map["apiVersion"] = json!("v1");
    map["kind"] = json!("ConfigMap");
    let params = PatchParams::apply(names::FIELD_MANAGER).force();
    maps.patch(names::CLUSTER_INFO, &params, &Patch::Apply(map)).await.unwrap();
}

/// What a cluster with a new CA publishes.
pub(crate) fn info(name: &str, id: u32) -> ClusterInfo {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, format!("CA of {name}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    ClusterInfo {
        cluster: name.parse().unwrap(),
        id: id.try_into().unwrap(),
        mesh: isthmus_wire::MaxConnectedClusters::C255,
        version: "0.1.0".into(),
        ca: CaBundle::parse(&params.self_signed(&key).unwrap().pem()).unwrap(),
        server_name: format!("{name}.mesh.cilium.io"),
    }
}

/// What the clustermesh-apiserver makes of Secrets, without any connection.
struct Answering {
    client: Client,
    healthy: Arc<AtomicBool>,
    observing: Arc<AtomicBool>,
    own_id: i32,
}

impl Answering {
    async fn run(self) {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), NAMESPACE);
        let peers: Api<ClusterPeer> = Api::all(self.client.clone());
        let of_type = ListParams::default().fields(&format!("type={PEER_SECRET_TYPE}"));
        loop {
            let found = secrets.list(&of_type).await.unwrap();
            let read = |secret: &Secret| {
                let version = SecretVersion::of(&secret.metadata).unwrap();
                let peer = PeerSecret::parse(secret).ok().filter(|peer| peer.relation > Relation::Apart);
                peer.map(|peer| (peer, version))
            };
            let wanted: Vec<(PeerSecret, SecretVersion)> = found.iter().filter_map(read).collect();
            for peer in peers.list(&ListParams::default()).await.unwrap() {
                let name = peer.name_any();
                let by_secret = peer.spec.source == PeerSource::Secret;
                if by_secret && !wanted.iter().any(|(wanted, _)| wanted.cluster.as_str() == name) {
                    let _ = peers.delete(&name, &DeleteParams::default()).await.unwrap();
                }
            }
            for (wanted, version) in &wanted {
                self.answer(&peers, wanted, version).await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn answer(&self, peers: &Api<ClusterPeer>, wanted: &PeerSecret, version: &SecretVersion) {
        let name = wanted.cluster.to_string();
        let (relation, mut status) = match wanted.relation {
            Relation::Connected => {
                ("Connected", status(wanted, self.healthy.load(Ordering::SeqCst), self.own_id))
            }
            Relation::Admitted | Relation::Apart => ("Admitted", admitted()),
        };
        let peer = json!({
            "apiVersion": "isthmus.io/v1alpha1", "kind": "ClusterPeer", "metadata": {"name": name},
            "spec": {
                "source": "Secret", "secret": {"namespace": NAMESPACE, "name": format!("peer-{name}")},
                "relation": relation,
            },
        });
        let params = PatchParams::apply(names::FIELD_MANAGER).force();
        peers.patch(&name, &params, &Patch::Apply(peer)).await.unwrap();
        if self.observing.load(Ordering::SeqCst) {
            status["observedSecret"] = json!(version);
        }
        let patch = Patch::Merge(json!({"status": status}));
        peers.patch_status(&name, &PatchParams::default(), &patch).await.unwrap();
    }
}

fn admitted() -> Value {
    json!({
        "conditions": [{"type": "Admitted", "status": "True", "reason": "MayRead", "message": "it may read",
                        "lastTransitionTime": "2030-01-01T00:00:00Z"}],
        "updated": chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
    })
}

fn status(wanted: &PeerSecret, healthy: bool, own_id: i32) -> Value {
    let state = if healthy { "True" } else { "False" };
    let message = if healthy { "" } else { "connection refused; is a firewall in between?" };
    let reason = if healthy { "Followed" } else { "Unreachable" };
    let condition = |kind: &str| {
        json!({"type": kind, "status": state, "reason": reason, "message": message,
               "lastTransitionTime": "2030-01-01T00:00:00Z"})
    };
    json!({
        // Two clusters in a test have ids 1 and 2.
        "clusterID": 3 - own_id,
        "endpoint": wanted.endpoints[0].to_string(),
        "conditions": [condition("Connected"), condition("Synced"), condition("Ready")],
        "confirmed": chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
        "revisionLag": 0,
        "counts": {"nodes": 2, "identities": 3, "endpoints": 4, "services": 1},
        "failures": 0,
    })
}
