//! Changes of Kubernetes objects, as `kubectl` makes them.

use std::path::Path;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, TypeMeta};
use kube::discovery::{Scope, pinned_kind};
use kube::{Api, Client, ResourceExt};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Doing, LabError, Result};
use crate::kubectl::Metadata;
use crate::rbac::FIELD_MANAGER;
use crate::scenario::{ObjectCondition, Until};

/// The kinds that steps may name.
const KINDS: &[(&str, &str, &str, &str)] = &[
    ("service", "", "v1", "Service"),
    ("pod", "", "v1", "Pod"),
    ("namespace", "", "v1", "Namespace"),
    ("node", "", "v1", "Node"),
    ("configmap", "", "v1", "ConfigMap"),
    ("secret", "", "v1", "Secret"),
    ("deployment", "apps", "v1", "Deployment"),
    ("endpointslice", "discovery.k8s.io", "v1", "EndpointSlice"),
    ("ciliumidentity", "cilium.io", "v2", "CiliumIdentity"),
    ("networkpolicy", "networking.k8s.io", "v1", "NetworkPolicy"),
    ("ciliumnetworkpolicy", "cilium.io", "v2", "CiliumNetworkPolicy"),
    ("clusterpeer", "isthmus.io", "v1alpha1", "ClusterPeer"),
    ("ciliumclusterwidenetworkpolicy", "cilium.io", "v2", "CiliumClusterwideNetworkPolicy"),
];

/// A kind by the name that steps use.
pub(crate) fn kind(name: &str) -> Result<GroupVersionKind, String> {
    let found = KINDS.iter().find(|k| k.0 == name);
    found.map(|k| GroupVersionKind::gvk(k.1, k.2, k.3)).ok_or_else(|| {
        let all: Vec<&str> = KINDS.iter().map(|k| k.0).collect();
        format!("object: there is no kind {name:?}, only {}", all.join(", "))
    })
}

/// One object of one cluster.
pub(crate) struct Object {
    api: Api<DynamicObject>,
    client: Client,
    kind: String,
    name: String,
    namespace: String,
}

impl Object {
    /// `kind/name`.
    pub(crate) async fn find(client: Client, object: &str, namespace: &str) -> Result<Self> {
        let (kind_name, name) = object.split_once('/').unwrap_or((object, ""));
        let gvk = kind(kind_name).map_err(LabError::Invalid)?;
        let (resource, namespaced) = resource(&client, &gvk).await?;
        Ok(Self {
            api: api(client.clone(), &resource, namespaced, namespace),
            client,
            kind: kind_name.to_owned(),
            name: name.to_owned(),
            namespace: namespace.to_owned(),
        })
    }

    /// Merges into it.
    pub(crate) async fn merge(&self, patch: &Value) -> Result<()> {
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        let patched = self.api.patch(&self.name, &params, &Patch::Merge(patch)).await;
        patched.map(drop).doing(|| format!("changing {}/{}", self.kind, self.name))
    }

    /// Deletes it.
    pub(crate) async fn delete(&self) -> Result<()> {
        let deleted = self.api.delete(&self.name, &DeleteParams::default()).await;
        deleted.map(drop).doing(|| format!("deleting {}/{}", self.kind, self.name))
    }

    /// Whether it is as wished; else how it is.
    pub(crate) async fn is(&self, until: &Until) -> Result<(), String> {
        let found = self.api.get_opt(&self.name).await.map_err(|e| e.to_string())?;
        let found = found.map(serde_json::to_value).transpose().map_err(|e| e.to_string())?;
        let is = is(&self.kind, found.as_ref(), until);
        match (is, found) {
            (Err(how), Some(found)) if self.kind == "deployment" => {
                Err(format!("{how} ({})", self.pods_of(&found).await?))
            }
            (is, _) => is,
        }
    }

    /// How the pods of a Deployment are.
    async fn pods_of(&self, deployment: &Value) -> Result<String, String> {
        let deployment: Deployment = read(deployment)?;
        let selector = deployment.spec.and_then(|s| s.selector.match_labels).unwrap_or_default();
        let labels: Vec<String> = selector.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let pods = pods.list(&kube::api::ListParams::default().labels(&labels.join(","))).await;
        let pods = pods.map_err(|e| e.to_string())?;
        let reasons: Vec<String> = pods
            .items
            .iter()
            .map(|p| format!("{}: {}", p.name_any(), why_not_ready(&p.status.clone().unwrap_or_default())))
            .collect();
        Ok(reasons.join("; "))
    }
}

/// Whether an object (`kind` or `kind/name`), as the API returned it, is as wished; else how it is.
pub(crate) fn is(object: &str, found: Option<&Value>, until: &Until) -> Result<(), String> {
    let found = match (found, until) {
        (None, Until::Gone) => return Ok(()),
        (None, _) => return Err("it does not exist".into()),
        (Some(_), Until::Gone) => return Err("it is still there".into()),
        (Some(found), Until::Condition(wanted)) => return has_condition(found, wanted),
        (Some(found), Until::Ready) => found,
    };
    match object.split('/').next().unwrap_or_default() {
        "deployment" => deployment_is_ready(&read(found)?),
        "pod" => {
            let status = read::<Pod>(found)?.status.unwrap_or_default();
            let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
            if ready { Ok(()) } else { Err(why_not_ready(&status)) }
        }
        _ => Ok(()),
    }
}

fn deployment_is_ready(deployment: &Deployment) -> Result<(), String> {
    let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    let status = deployment.status.clone().unwrap_or_default();
    let (ready, all) = (status.ready_replicas.unwrap_or(0), status.replicas.unwrap_or(0));
    if status.observed_generation == deployment.metadata.generation && ready == wanted && all == wanted {
        return Ok(());
    }
    Err(format!("{ready} of {wanted} pods are ready, {all} are there"))
}

fn has_condition(found: &Value, wanted: &ObjectCondition) -> Result<(), String> {
    let conditions = found["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let Some(condition) = conditions.iter().find(|c| c["type"] == wanted.condition.as_str()) else {
        return Err(format!("it has no condition {}", wanted.condition));
    };
    let reason = wanted.reason.as_deref().is_none_or(|reason| condition["reason"] == reason);
    match reason && condition["status"] == wanted.is.as_str() {
        true => Ok(()),
        false => {
            let said = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
            Err(format!(
                "{} is {} ({}: {})",
                wanted.condition,
                said("status"),
                said("reason"),
                said("message")
            ))
        }
    }
}

fn read<T: serde::de::DeserializeOwned>(found: &Value) -> Result<T, String> {
    T::deserialize(found).map_err(|e| format!("it cannot be read: {e}"))
}

/// Scales a Deployment.
pub(crate) async fn scale(client: Client, name: &str, namespace: &str, replicas: u16) -> Result<()> {
    let api: Api<Deployment> = Api::namespaced(client, namespace);
    let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
    let scaled = api.patch_scale(name, &PatchParams::default(), &patch).await;
    scaled.map(drop).doing(|| format!("scaling deployment {name}"))
}

/// The objects of a file, in order.
pub(crate) fn documents(file: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(file).doing(|| format!("reading {}", file.display()))?;
    let documents = serde_norway::Deserializer::from_str(&text).map(Value::deserialize);
    let documents: Result<Vec<Value>, _> = documents.filter(|d| !matches!(d, Ok(Value::Null))).collect();
    documents.map_err(|e| LabError::invalid(format!("{}: {e}", file.display())))
}

/// Applies every object of a file, in order.
pub(crate) async fn apply(client: &Client, file: &Path) -> Result<()> {
    for value in documents(file)? {
        let bad = |e: &dyn std::fmt::Display| LabError::invalid(format!("{}: {e}", file.display()));
        let types: TypeMeta = serde_json::from_value(value.clone()).map_err(|e| bad(&e))?;
        let gvk = GroupVersionKind::try_from(&types).map_err(|e| bad(&e))?;
        let name =
            value["metadata"]["name"].as_str().ok_or_else(|| bad(&"an object has no metadata.name"))?;
        let namespace = value["metadata"]["namespace"].as_str().unwrap_or("default");
        let (resource, namespaced) = resource(client, &gvk).await?;
        let api = api(client.clone(), &resource, namespaced, namespace);
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let applied = api.patch(name, &params, &Patch::Apply(&value)).await;
        applied.doing(|| format!("applying {} {name} of {}", gvk.kind, file.display()))?;
    }
    Ok(())
}

/// A patch of metadata.
pub(crate) fn metadata(what: Metadata, set: &std::collections::BTreeMap<String, Option<String>>) -> Value {
    let field = match what {
        Metadata::Annotations => "annotations",
        Metadata::Labels => "labels",
    };
    json!({"metadata": {field: set}})
}

async fn resource(client: &Client, gvk: &GroupVersionKind) -> Result<(ApiResource, bool)> {
    let (resource, capabilities) = pinned_kind(client, gvk)
        .await
        .doing(|| format!("asking the API for {} {}", gvk.api_version(), gvk.kind))?;
    Ok((resource, capabilities.scope == Scope::Namespaced))
}

fn api(client: Client, resource: &ApiResource, namespaced: bool, namespace: &str) -> Api<DynamicObject> {
    match namespaced {
        true => Api::namespaced_with(client, namespace, resource),
        false => Api::all_with(client, resource),
    }
}

fn why_not_ready(status: &k8s_openapi::api::core::v1::PodStatus) -> String {
    let waiting =
        status.container_statuses.iter().flatten().filter_map(|c| c.state.as_ref()?.waiting.as_ref());
    let reasons: Vec<String> = waiting
        .map(|w| {
            format!(
                "{} {}",
                w.reason.as_deref().unwrap_or_default(),
                w.message.as_deref().unwrap_or_default()
            )
        })
        .collect();
    match (reasons.is_empty(), status.phase.as_deref()) {
        (false, _) => reasons.join(", "),
        (true, Some(phase)) => phase.to_owned(),
        (true, None) => "not started".to_owned(),
    }
}
