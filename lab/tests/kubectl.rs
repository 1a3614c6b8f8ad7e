//! Steps by `kubectl`, as they are taken on kind, against the clusters of a lab: the same words, the same outcome. What the
//! stand-in for Kubernetes does not have (`kubectl exec` and `logs`) is not tried here. As root.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use isthmus_lab::kubectl::{Kubectl, Metadata};
use isthmus_lab::names::Families;
use isthmus_lab::{LabError, programs};
use support::{eventually, plain_lab};

const MANIFESTS: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: first}
data: {a: b}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: echo, image: isthmus.io/echo}]
";

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_applied_changed_scaled_read_and_deleted_by_kubectl() {
    let lab = plain_lab("t-kubectl", Families::V4, 1).await;
    let program = programs::on_path("kubectl").expect("kubectl is installed by `make test`");
    let kubectl = Kubectl::new(program, lab.state().kubeconfig("alpha"), "alpha");

    kubectl.apply(MANIFESTS).await.unwrap();
    kubectl.apply(MANIFESTS).await.expect("a second time changes nothing");
    let set = |value: Option<&str>| BTreeMap::from([("example.org/x".to_owned(), value.map(str::to_owned))]);
    let first = async || kubectl.get("configmap/first", "default").await.unwrap().unwrap();
    kubectl.set(Metadata::Annotations, "configmap/first", "default", &set(Some("true"))).await.unwrap();
    assert_eq!(first().await["metadata"]["annotations"]["example.org/x"], "true");
    kubectl.set(Metadata::Annotations, "configmap/first", "default", &set(None)).await.unwrap();
    assert!(first().await.pointer("/metadata/annotations/example.org~1x").is_none());
    kubectl.set(Metadata::Labels, "configmap/first", "default", &set(Some("y"))).await.unwrap();
    let found = kubectl.list("configmaps", "default", "--selector=example.org/x=y").await.unwrap();
    assert_eq!(found.len(), 1, "{found:?}");

    kubectl.scale("web", "default", 2).await.unwrap();
    eventually("two pods to be ready", async || {
        let deployment = kubectl.get("deployment/web", "default").await.map_err(|e| e.to_string())?;
        let deployment = deployment.ok_or("it is gone")?;
        if deployment["status"]["readyReplicas"] == 2 {
            Ok(())
        } else {
            Err(deployment["status"].to_string())
        }
    })
    .await;

    kubectl.delete("configmap/first", "default").await.unwrap();
    assert!(kubectl.get("configmap/first", "default").await.unwrap().is_none());
    let refused = kubectl.delete("configmap/first", "default").await.unwrap_err();
    assert!(matches!(&refused, LabError::Invalid(said) if said.contains("not found")), "{refused}");
    lab.down().await.unwrap();
}
