//! What the daemons may do in the Kubernetes API. With client certificates their users are the common names.

use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::error::{Doing, Result};

/// The clustermesh-apiserver's user.
pub(crate) const APISERVER_USER: &str = "isthmus:clustermesh-apiserver";
/// The node-agents' user.
pub(crate) const AGENT_USER: &str = "isthmus:node-agent";
/// Who writes what the lab applies.
pub(crate) const FIELD_MANAGER: &str = "isthmus-lab";

/// Creates the roles and binds them.
///
/// # Errors
/// When the API refuses.
pub(crate) async fn install(client: &Client) -> Result<()> {
    let read = json!(["get", "list", "watch"]);
    let apiserver = json!([
        {"apiGroups": [""], "resources": ["services", "namespaces", "pods", "nodes"], "verbs": read},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read},
        {"apiGroups": ["cilium.io"], "resources": ["ciliumnodes", "ciliumendpoints"], "verbs": read},
        {"apiGroups": ["cilium.io"], "resources": ["ciliumidentities"],
         "verbs": ["get", "list", "watch", "create", "update", "patch", "delete"]},
        {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": read},
        {"apiGroups": ["cilium.io"], "resources": ["ciliumnetworkpolicies", "ciliumclusterwidenetworkpolicies"],
         "verbs": read},
        {"apiGroups": ["cilium.io"],
         "resources": ["ciliumnetworkpolicies/status", "ciliumclusterwidenetworkpolicies/status"],
         "verbs": ["patch"]},
        {"apiGroups": ["apiextensions.k8s.io"], "resources": ["customresourcedefinitions"],
         "resourceNames": ["ciliumnetworkpolicies.cilium.io", "ciliumclusterwidenetworkpolicies.cilium.io"],
         "verbs": ["get"]},
        {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"]},
    ]);
    let agent = json!([
        {"apiGroups": [""], "resources": ["pods"], "verbs": read},
        // Each publishes its node's WireGuard key.
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch", "patch"]},
        // Each tells of its pods whose policy could not be put in force.
        {"apiGroups": ["cilium.io"], "resources": ["ciliumnetworkpolicies", "ciliumclusterwidenetworkpolicies"],
         "verbs": ["get", "list"]},
        {"apiGroups": ["cilium.io"],
         "resources": ["ciliumnetworkpolicies/status", "ciliumclusterwidenetworkpolicies/status"],
         "verbs": ["patch"]},
        {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"]},
    ]);
    grant(client, "isthmus-clustermesh-apiserver", APISERVER_USER, apiserver).await?;
    grant(client, "isthmus-node-agent", AGENT_USER, agent).await
}

async fn grant(client: &Client, name: &str, user: &str, rules: Value) -> Result<()> {
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let group = "rbac.authorization.k8s.io";
    let role = json!({
        "apiVersion": format!("{group}/v1"), "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules,
    });
    let roles: Api<ClusterRole> = Api::all(client.clone());
    roles.patch(name, &params, &Patch::Apply(role)).await.doing(|| format!("creating ClusterRole {name}"))?;
    let binding = json!({
        "apiVersion": format!("{group}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    });
    let bindings: Api<ClusterRoleBinding> = Api::all(client.clone());
    bindings
        .patch(name, &params, &Patch::Apply(binding))
        .await
        .doing(|| format!("creating ClusterRoleBinding {name}"))?;
    Ok(())
}
