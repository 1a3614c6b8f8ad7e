//! A Kubernetes API on loopback, and exporters that run against it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use clustermesh_apiserver::election::Leadership;
use clustermesh_apiserver::exporter::{Exporter, ExporterConfig, ExporterHandle, ExporterMetrics};
use isthmus_kube_api::{Config, KubeApi};
use isthmus_kvstore::memory::{KeyRange, Limits, MemoryStore, RangeRequest, StoreId};
use isthmus_kvstore::writer::Writer;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::core::{ClusterResourceScope, NamespaceResourceScope};
use kube::{Api, Client, Resource};
use prometheus_client::registry::Registry;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Any free port.
pub(crate) const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// How long anything may take. Far more than it needs.
const DEADLINE: Duration = Duration::from_secs(60);

/// A Kubernetes API with namespace `app`, node `node-1` and our custom resources.
pub(crate) struct Cluster {
    pub api: KubeApi,
    pub client: Client,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_at(LOOPBACK).await
    }

    pub(crate) async fn start_at(address: SocketAddr) -> Self {
        let cluster = Self::without_definitions(address).await;
        for definition in isthmus_crds::definitions() {
            cluster.define(serde_json::to_value(definition).expect("JSON")).await;
        }
        cluster
    }

    pub(crate) async fn without_definitions(address: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.expect("a socket");
        let api = KubeApi::serve(listener, Config::default()).expect("a Kubernetes API");
        let url = format!("http://{}", api.addresses()[0]).parse().expect("a URL");
        let client = Client::try_from(kube::Config::new(url)).expect("a client");
        let cluster = Self { api, client };
        cluster.create_global::<Namespace>(json!({"metadata": {"name": "app"}})).await;
        cluster
            .create_global::<Node>(
                json!({"metadata": {"name": "node-1"}, "spec": {"podCIDR": "10.244.0.0/24"}}),
            )
            .await;
        let addresses = json!({"status": {"addresses": [{"type": "InternalIP", "address": "172.18.0.2"}]}});
        let nodes: Api<Node> = Api::all(cluster.client.clone());
        nodes
            .patch_status("node-1", &PatchParams::default(), &Patch::Merge(addresses))
            .await
            .expect("a status");
        cluster
    }

    /// Installs a custom resource and waits until it is served.
    pub(crate) async fn define(&self, definition: Value) {
        let definition: CustomResourceDefinition = serde_json::from_value(definition).expect("a definition");
        let definitions: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let name = definition.metadata.name.clone().expect("a name");
        definitions.create(&PostParams::default(), &definition).await.expect("a definition");
        let established = kube::runtime::wait::await_condition(
            definitions,
            &name,
            kube::runtime::conditions::is_crd_established(),
        );
        tokio::time::timeout(DEADLINE, established).await.expect("in time").expect("established");
    }

    pub(crate) fn namespaced<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), "app")
    }

    pub(crate) async fn create<K>(&self, object: Value)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Serialize
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let object: K = serde_json::from_value(object).expect("an object");
        self.namespaced::<K>().create(&PostParams::default(), &object).await.expect("created");
    }

    pub(crate) async fn create_global<K>(&self, object: Value)
    where
        K: Resource<Scope = ClusterResourceScope, DynamicType = ()>
            + Clone
            + Serialize
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let object: K = serde_json::from_value(object).expect("an object");
        Api::<K>::all(self.client.clone()).create(&PostParams::default(), &object).await.expect("created");
    }

    pub(crate) async fn merge<K>(&self, name: &str, patch: Value)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let patch = Patch::Merge(patch);
        self.namespaced::<K>().patch(name, &PatchParams::default(), &patch).await.expect("patched");
    }

    pub(crate) async fn delete<K>(&self, name: &str)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        // Without a kubelet nobody would confirm that a pod has ended.
        let params = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        let _ = self.namespaced::<K>().delete(name, &params).await.expect("deleted");
    }

    /// A running pod.
    pub(crate) async fn run_pod(&self, name: &str, app: &str, ip: &str) {
        self.create::<Pod>(json!({
            "metadata": {"name": name, "labels": {"app": app, "pod-template-hash": name}},
            "spec": {"nodeName": "node-1", "containers": [{"name": "main", "image": "none"}]},
        }))
        .await;
        let status = json!({"status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "172.18.0.2",
        }});
        let pods = self.namespaced::<Pod>();
        pods.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.expect("a status");
    }

    /// Service `echo` with one backend.
    pub(crate) async fn serve_echo(&self, annotations: Value) {
        self.create::<Service>(json!({
            "metadata": {"name": "echo", "annotations": annotations},
            "spec": {"selector": {"app": "echo"}, "ports": [{"name": "http", "port": 80}]},
        }))
        .await;
        self.create::<EndpointSlice>(json!({
            "metadata": {"name": "echo-1", "labels": {"kubernetes.io/service-name": "echo"}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.244.0.7"], "conditions": {"ready": true}}],
        }))
        .await;
    }

    pub(crate) fn export(&self, config: ExporterConfig) -> Export {
        let store = MemoryStore::new(StoreId::random(), Limits::default());
        self.export_into(store, config)
    }

    pub(crate) fn export_into(&self, store: MemoryStore, config: ExporterConfig) -> Export {
        self.export_led_by(Leadership::alone(), store, config)
    }

    /// An exporter of a replica that may stand by.
    pub(crate) fn export_led_by(
        &self,
        leadership: Leadership,
        store: MemoryStore,
        config: ExporterConfig,
    ) -> Export {
        let mut registry = Registry::default();
        let metrics = ExporterMetrics::new(&mut registry);
        let (exporter, handle) =
            Exporter::new(self.client.clone(), config, Writer::memory(store.clone()), metrics)
                .expect("an exporter");
        let shutdown = CancellationToken::new();
        let task = AbortOnDropHandle::new(tokio::spawn(exporter.led_by(leadership).run(shutdown.clone())));
        Export { store, handle, registry, shutdown, task }
    }
}

/// A running exporter and its store. Ends when dropped.
pub(crate) struct Export {
    pub store: MemoryStore,
    pub handle: ExporterHandle,
    pub registry: Registry,
    shutdown: CancellationToken,
    task: AbortOnDropHandle<Result<(), clustermesh_apiserver::exporter::ExporterError>>,
}

impl Export {
    pub(crate) async fn ready(&mut self) {
        let ready = self.handle.ready.wait_for(|ready| *ready);
        tokio::time::timeout(DEADLINE, ready).await.expect("ready in time").expect("running");
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .expect("in time")
            .expect("no panic")
            .expect("a clean end");
    }

    /// All keys below a prefix, and their values.
    pub(crate) fn keys(&self, prefix: &str) -> BTreeMap<String, String> {
        let request = RangeRequest::new(KeyRange::prefix(prefix.to_owned()));
        let response = self.store.range(&request).expect("the present state");
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        response.kvs.iter().map(|kv| (text(&kv.key), text(&kv.value))).collect()
    }

    pub(crate) fn get(&self, key: &str) -> Option<String> {
        self.store.get(key.as_bytes()).map(|kv| String::from_utf8(kv.value.to_vec()).expect("text"))
    }

    /// Waits until the key's value is as wanted.
    pub(crate) async fn until(&self, key: &str, wanted: impl Fn(Option<&str>) -> bool) {
        eventually(&format!("the wanted value of {key}"), || {
            let value = self.get(key);
            if wanted(value.as_deref()) { Ok(()) } else { Err(value) }
        })
        .await;
    }
}

/// Waits until something holds; fails with what there was instead.
pub(crate) async fn eventually<T, E: std::fmt::Debug>(what: &str, attempt: impl Fn() -> Result<T, E>) -> T {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(instead) if tokio::time::Instant::now() > deadline => {
                panic!("waited for {what}, but: {instead:?}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

pub(crate) fn config() -> ExporterConfig {
    ExporterConfig::new("alpha".parse().expect("a name"), 1.try_into().expect("an id"))
}
