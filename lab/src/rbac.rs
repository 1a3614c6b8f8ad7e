//! What the daemons may do in the Kubernetes API: exactly what the installation of `kustomize/` gives them, so that a right that
//! is missing there is missed here. With client certificates their users are the common names, and roles are bound to those.

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::api::{Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Doing, LabError, Result};

/// The clustermesh-apiserver's user.
pub(crate) const APISERVER_USER: &str = "isthmus:clustermesh-apiserver";
/// The node-agents' user.
pub(crate) const AGENT_USER: &str = "isthmus:node-agent";
/// Who writes what the lab applies.
pub(crate) const FIELD_MANAGER: &str = "isthmus-lab";

/// Where an installation is.
const NAMESPACE: &str = "isthmus-system";
const APISERVER: Installed = Installed {
    file: "kustomize/base/clustermesh-apiserver/rbac.yaml",
    text: include_str!("../../kustomize/base/clustermesh-apiserver/rbac.yaml"),
    user: APISERVER_USER,
};
const AGENT: Installed = Installed {
    file: "kustomize/base/node-agent/rbac.yaml",
    text: include_str!("../../kustomize/base/node-agent/rbac.yaml"),
    user: AGENT_USER,
};

/// One daemon's file, and its user here.
struct Installed {
    file: &'static str,
    text: &'static str,
    user: &'static str,
}

/// An object of such a file.
enum Object {
    /// Nobody's here: users come with certificates.
    ServiceAccount,
    ClusterRole(ClusterRole),
    ClusterRoleBinding(ClusterRoleBinding),
    Role(Role),
    RoleBinding(RoleBinding),
}

/// Creates the namespace of an installation and the daemons' roles, and binds them.
///
/// # Errors
/// When the API refuses.
pub(crate) async fn install(client: &Client) -> Result<()> {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    apply(&Api::<Namespace>::all(client.clone()), NAMESPACE, &namespace).await?;
    for daemon in [APISERVER, AGENT] {
        for object in daemon.objects()? {
            daemon.install(client, object).await?;
        }
    }
    Ok(())
}

impl Installed {
    fn objects(&self) -> Result<Vec<Object>> {
        serde_norway::Deserializer::from_str(self.text).map(|document| self.object(document)).collect()
    }

    fn object(&self, document: serde_norway::Deserializer<'_>) -> Result<Object> {
        let object = Value::deserialize(document).map_err(|error| self.unusable(&error))?;
        Ok(match object["kind"].as_str() {
            Some("ServiceAccount") => Object::ServiceAccount,
            Some("ClusterRole") => Object::ClusterRole(self.typed(object)?),
            Some("ClusterRoleBinding") => Object::ClusterRoleBinding(self.typed(object)?),
            Some("Role") => Object::Role(self.typed(object)?),
            Some("RoleBinding") => Object::RoleBinding(self.typed(object)?),
            _ => return Err(self.unusable(&format!("{} has no place in it", object["kind"]))),
        })
    }

    fn typed<T: DeserializeOwned>(&self, object: Value) -> Result<T> {
        serde_json::from_value(object).map_err(|error| self.unusable(&error))
    }

    fn unusable(&self, problem: &dyn std::fmt::Display) -> LabError {
        LabError::invalid(format!("{}: {problem}", self.file))
    }

    async fn install(&self, client: &Client, object: Object) -> Result<()> {
        let user = json!([{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": self.user}]);
        match object {
            Object::ServiceAccount => Ok(()),
            Object::ClusterRole(role) => anywhere(client, &role).await,
            Object::Role(role) => inside(client, &role).await,
            Object::ClusterRoleBinding(mut binding) => {
                binding.subjects = self.typed(user)?;
                anywhere(client, &binding).await
            }
            Object::RoleBinding(mut binding) => {
                binding.subjects = self.typed(user)?;
                inside(client, &binding).await
            }
        }
    }
}

async fn anywhere<K>(client: &Client, object: &K) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
{
    apply(&Api::<K>::all(client.clone()), &name(object), object).await
}

async fn inside<K>(client: &Client, object: &K) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Serialize
        + DeserializeOwned
        + std::fmt::Debug,
{
    apply(&Api::<K>::namespaced(client.clone(), NAMESPACE), &name(object), object).await
}

fn name<K: Resource>(object: &K) -> String {
    object.meta().name.clone().unwrap_or_default()
}

async fn apply<K, P>(api: &Api<K>, name: &str, object: &P) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    P: Serialize + std::fmt::Debug,
{
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let applied = api.patch(name, &params, &Patch::Apply(object)).await;
    applied.map(drop).doing(|| format!("creating {} {name}", K::kind(&())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a role's file can hold is little enough to be told apart here.
    #[test]
    fn each_daemon_has_a_cluster_role_and_its_binding() {
        for daemon in [APISERVER, AGENT] {
            let objects = daemon.objects().expect("the file is understood");
            let roles = objects.iter().filter(|o| matches!(o, Object::ClusterRole(_))).count();
            let bindings = objects.iter().filter(|o| matches!(o, Object::ClusterRoleBinding(_))).count();
            assert_eq!((roles, bindings), (1, 1), "{}", daemon.file);
        }
    }
}
