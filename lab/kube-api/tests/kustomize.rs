//! What `kustomize/` renders is taken by the Kubernetes API, field by field: one that it does not know is refused. On the real
//! kube-apiserver where `KUBEBUILDER_ASSETS` names one, on the stand-in with the same schemas elsewhere.

mod cluster;

use std::path::{Path, PathBuf};
use std::process::Command;

use cluster::{Cluster, within};
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Client, ResourceExt, discovery};
use serde::Deserialize;
use serde_json::Value;

/// Of others, what the installation may be put together with.
const FOREIGN: [&str; 2] =
    [include_str!("foreign/cert-manager.yaml"), include_str!("foreign/prometheus-operator.yaml")];

#[tokio::test]
async fn every_composition_can_be_installed_and_be_exchanged_for_the_next() {
    let cluster = Cluster::start().await;
    let client = cluster.admin().await;
    install(&client, FOREIGN.iter().flat_map(|yaml| parse(yaml)).collect()).await;
    let compositions = compositions();
    assert!(compositions.len() > 5, "{compositions:?}");
    for composition in compositions {
        println!("{composition}");
        install(&client, render(&composition)).await;
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_field_that_nobody_knows_is_refused() {
    let cluster = Cluster::start().await;
    let client = cluster.admin().await;
    let mut objects = render("kustomize/base");
    let deployment = objects.iter_mut().find(|o| kind(o) == "Deployment").expect("one is rendered");
    deployment.data["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = serde_json::json!({});
    let deployment = deployment.clone();
    install(&client, objects.into_iter().filter(|o| kind(o) == "Namespace").collect()).await;
    let error = apply(&client, &deployment).await.expect_err("it has such a field").to_string();
    assert!(error.contains("readynessProbe"), "{error}");
    cluster.stop().await;
}

/// Namespaces and definitions first, as kubectl does, and waits until definitions are served.
async fn install(client: &Client, mut objects: Vec<DynamicObject>) {
    assert!(!objects.is_empty());
    objects.sort_by_key(|object| match kind(object) {
        "Namespace" => 0,
        "CustomResourceDefinition" => 1,
        _ => 2,
    });
    for object in objects {
        let what = format!("{} {}", kind(&object), object.name_any());
        within(&what, async {
            // A definition is served a moment after it was taken.
            while !is_served(client, &object).await {
                tokio::task::yield_now().await;
            }
        })
        .await;
        apply(client, &object).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

async fn is_served(client: &Client, object: &DynamicObject) -> bool {
    discovery::pinned_kind(client, &gvk(object)).await.is_ok()
}

async fn apply(client: &Client, object: &DynamicObject) -> Result<DynamicObject, kube::Error> {
    let (resource, capabilities) = discovery::pinned_kind(client, &gvk(object)).await?;
    let api: Api<DynamicObject> = match capabilities.scope {
        discovery::Scope::Cluster => Api::all_with(client.clone(), &resource),
        discovery::Scope::Namespaced => {
            let namespace = object.namespace().expect("a namespaced object says which namespace");
            Api::namespaced_with(client.clone(), &namespace, &resource)
        }
    };
    let params = PatchParams::apply("kustomize-test").force().validation_strict();
    api.patch(&object.name_any(), &params, &Patch::Apply(object)).await
}

fn gvk(object: &DynamicObject) -> GroupVersionKind {
    GroupVersionKind::try_from(object.types.clone().expect("a type")).expect("group and version")
}

fn kind(object: &DynamicObject) -> &str {
    object.types.as_ref().map(|types| types.kind.as_str()).unwrap_or_default()
}

/// The base, the overlays and the examples. What is a component cannot stand alone.
fn compositions() -> Vec<String> {
    let mut compositions = vec!["kustomize/base".to_owned()];
    for folder in ["kustomize/overlays", "kustomize/examples"] {
        let mut names: Vec<String> = std::fs::read_dir(workspace().join(folder))
            .expect("a folder")
            .map(|entry| format!("{folder}/{}", entry.expect("an entry").file_name().to_string_lossy()))
            .filter(|path| {
                let file = workspace().join(path).join("kustomization.yaml");
                !std::fs::read_to_string(file).expect("a kustomization").contains("kind: Component")
            })
            .collect();
        names.sort();
        compositions.append(&mut names);
    }
    compositions
}

fn render(composition: &str) -> Vec<DynamicObject> {
    let kubectl = std::env::var("KUBECTL").unwrap_or_else(|_| "kubectl".into());
    let output = Command::new(&kubectl)
        .args(["kustomize", composition])
        .current_dir(workspace())
        .output()
        .unwrap_or_else(|e| panic!("{kubectl}: {e}; run xtask/setup.sh test, or set KUBECTL"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kubectl kustomize {composition}: {errors}");
    parse(&String::from_utf8(output.stdout).expect("text"))
}

fn parse(yaml: &str) -> Vec<DynamicObject> {
    serde_norway::Deserializer::from_str(yaml)
        .map(|document| Value::deserialize(document).expect("YAML"))
        .map(|object| serde_json::from_value(object).expect("an object"))
        .collect()
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
