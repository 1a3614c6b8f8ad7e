//! What the lab's tests share.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::time::Duration;

use isthmus_lab::Lab;
use isthmus_lab::cleanup;
use isthmus_lab::names::{Families, LabName};
use isthmus_lab::spec::{ClusterSpec, Encryption, LabSpec, Peering, Store};
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

/// Two clusters without a mesh. What an earlier, killed test left is removed first.
pub async fn plain_lab(name: &str, families: Families, nodes: usize) -> Lab {
    let name: LabName = name.parse().unwrap();
    cleanup::down(&name).await.unwrap();
    let cluster = |name: &str, id| ClusterSpec {
        name: name.into(),
        id,
        nodes: (1..=nodes).map(|n| format!("{name}-node{n}")).collect(),
        replicas: 1,
        peers: Vec::new(),
    };
    let spec = LabSpec {
        name,
        scenario: "test".into(),
        families,
        store: Store::Memory,
        max_connected_clusters: 255,
        encryption: Encryption::default(),
        peering: Peering::default(),
        connected: true,
        drain_grace: None,
        mesh: false,
        clusters: vec![cluster("alpha", 1), cluster("beta", 2)],
    };
    Lab::up(spec, &mut |_| {}).await.unwrap()
}

/// Waits for `condition`. Only a failing test waits to the end.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(90);
    loop {
        match condition().await {
            Ok(value) => return value,
            Err(last) if tokio::time::Instant::now() > deadline => panic!("{what}: {last}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// A shell command.
pub fn sh(command: &str) -> Vec<String> {
    ["sh", "-c", command].map(str::to_owned).to_vec()
}

/// A Service `web` with two pods behind it.
pub async fn apply_web(client: &Client) {
    apply::<k8s_openapi::api::core::v1::Service>(client, "web", json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }))
    .await;
    apply::<k8s_openapi::api::apps::v1::Deployment>(
        client,
        "web",
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"terminationGracePeriodSeconds": 1, "containers": [{
                    "name": "echo", "image": "isthmus.io/echo",
                    "ports": [{"name": "http", "containerPort": 8080}],
                    "readinessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 1},
                }]},
            }},
        }),
    )
    .await;
}

async fn apply<K>(client: &Client, name: &str, object: Value)
where
    K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), "default");
    api.patch(name, &PatchParams::apply("test").force(), &Patch::Apply(object)).await.unwrap();
}
