//! Authorization by the stored Roles and bindings, as `--authorization-mode=RBAC` does it.

use http::Method;
use serde_json::Value;

use crate::auth::{MASTERS, User};
use crate::status::{ApiError, ApiResult};
use crate::store::{Collection, Key, Store};

/// What a user wants to do.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct Attributes<'a> {
    pub verb: &'a str,
    pub group: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    /// Empty: all namespaces, or a resource of the cluster.
    pub namespace: &'a str,
    pub name: &'a str,
}

impl Attributes<'_> {
    /// Why not, in the words of the real server.
    pub fn refusal(&self, user: &User) -> String {
        let resource = match self.subresource {
            "" => self.resource.to_owned(),
            sub => format!("{}/{sub}", self.resource),
        };
        let scope = match self.namespace {
            "" => "at the cluster scope".to_owned(),
            namespace => format!("in the namespace {namespace:?}"),
        };
        format!(
            "User {:?} cannot {} resource {resource:?} in API group {:?} {scope}",
            user.name, self.verb, self.group
        )
    }

    fn granted_by(&self, rule: &Value) -> bool {
        let resource = match self.subresource {
            "" => self.resource.to_owned(),
            sub => format!("{}/{sub}", self.resource),
        };
        let any_resource = format!("*/{}", self.subresource);
        has(rule, "verbs", &[self.verb, "*"])
            && has(rule, "apiGroups", &[self.group, "*"])
            && (has(rule, "resources", &[&resource, "*"])
                || (!self.subresource.is_empty() && has(rule, "resources", &[&any_resource])))
            && (list(rule, "resourceNames").next().is_none()
                || (!self.name.is_empty() && has(rule, "resourceNames", &[self.name])))
    }
}

/// Whether the user may.
pub fn allows(store: &Store, user: &User, attributes: &Attributes<'_>) -> bool {
    user.is_in(MASTERS) || rules(store, user, attributes.namespace).any(|rule| attributes.granted_by(rule))
}

/// Whether the user may ask for a path that is no resource (`/version`, `/apis`, ...).
pub fn authorize_path(store: &Store, user: &User, method: &Method, path: &str) -> ApiResult<()> {
    let verb = method.as_str().to_lowercase();
    let granted = |rule: &Value| {
        has(rule, "verbs", &[&verb, "*"])
            && list(rule, "nonResourceURLs").any(|url| {
                url == path || url.strip_suffix('*').is_some_and(|prefix| path.starts_with(prefix))
            })
    };
    if user.is_in(MASTERS) || rules(store, user, "").any(granted) {
        return Ok(());
    }
    Err(ApiError::forbidden_path(path, &format!("User {:?} cannot {verb}", user.name)))
}

/// The rules that hold for the user: of the cluster and of one namespace.
pub fn rules<'a>(store: &'a Store, user: &'a User, namespace: &'a str) -> impl Iterator<Item = &'a Value> {
    let cluster = bindings(store, "clusterrolebindings", None);
    let local = bindings(store, "rolebindings", Some(namespace)).filter(move |_| !namespace.is_empty());
    cluster
        .chain(local)
        .filter(move |binding| binds(binding, user))
        .filter_map(move |binding| role(store, binding))
        .flat_map(|role| role["rules"].as_array().into_iter().flatten())
}

fn bindings<'a>(
    store: &'a Store,
    plural: &str,
    namespace: Option<&'a str>,
) -> impl Iterator<Item = &'a Value> + use<'a> {
    store.list(&collection(plural), namespace).map(|(_, binding)| &binding.value)
}

fn binds(binding: &Value, user: &User) -> bool {
    list_of(binding, "subjects").any(|subject| {
        let name = subject["name"].as_str().unwrap_or_default();
        match subject["kind"].as_str() {
            Some("User") => name == user.name,
            Some("Group") => user.is_in(name),
            Some("ServiceAccount") => {
                let namespace = subject["namespace"].as_str().unwrap_or_default();
                user.name == format!("system:serviceaccount:{namespace}:{name}")
            }
            _ => false,
        }
    })
}

fn role<'a>(store: &'a Store, binding: &Value) -> Option<&'a Value> {
    let name = binding["roleRef"]["name"].as_str()?;
    let (plural, namespace) = match binding["roleRef"]["kind"].as_str()? {
        "ClusterRole" => ("clusterroles", ""),
        _ => ("roles", binding["metadata"]["namespace"].as_str()?),
    };
    store.get_ref(&collection(plural), &Key::new(namespace, name)).map(|role| &role.value)
}

fn collection(plural: &str) -> Collection {
    format!("rbac.authorization.k8s.io/{plural}").into()
}

fn has(rule: &Value, field: &str, wanted: &[&str]) -> bool {
    list(rule, field).any(|value| wanted.contains(&value))
}

fn list<'a>(rule: &'a Value, field: &str) -> impl Iterator<Item = &'a str> + use<'a> {
    list_of(rule, field).filter_map(Value::as_str)
}

fn list_of<'a>(object: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    object[field].as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn store() -> Store {
        let mut store = Store::new(10);
        let mut put = |plural: &str, namespace: &str, name: &str, mut value: Value| {
            value["metadata"] = json!({ "name": name, "namespace": namespace });
            store.put(&collection(plural), Key::new(namespace, name), value);
        };
        put(
            "clusterroles",
            "",
            "reader",
            json!({"rules": [
                {"apiGroups": [""], "resources": ["pods", "pods/status"], "verbs": ["get", "list"]},
                {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["one"], "verbs": ["get"]},
                {"nonResourceURLs": ["/healthz/*", "/version"], "verbs": ["get"]},
            ]}),
        );
        let role = json!({"kind": "ClusterRole", "name": "reader"});
        let subjects = json!([{"kind": "ServiceAccount", "namespace": "ns", "name": "sa"}]);
        put("rolebindings", "ns", "local", json!({"roleRef": role, "subjects": subjects}));
        put(
            "clusterrolebindings",
            "",
            "all",
            json!({"roleRef": role, "subjects": [{"kind": "Group", "name": "ops"}]}),
        );
        store
    }

    fn may(user: &str, group: &str, verb: &str, resource: &str, namespace: &str, name: &str) -> bool {
        let user = User { name: user.into(), groups: vec![group.into()] };
        allows(&store(), &user, &Attributes { verb, resource, namespace, name, ..Attributes::default() })
    }

    #[test]
    fn rules_are_granted_through_bindings_only() {
        assert!(may("x", "ops", "list", "pods", "", ""));
        assert!(!may("x", "ops", "delete", "pods", "", ""));
        assert!(!may("x", "none", "list", "pods", "ns", ""));
        assert!(may("system:serviceaccount:ns:sa", "none", "list", "pods", "ns", ""));
        assert!(!may("system:serviceaccount:ns:sa", "none", "list", "pods", "other", ""));
        assert!(may("x", "ops", "get", "secrets", "ns", "one"));
        assert!(!may("x", "ops", "get", "secrets", "ns", "two"));
        assert!(!may("x", "ops", "get", "secrets", "ns", ""), "a name must be asked for");
        assert!(may("x", MASTERS, "delete", "nodes", "", ""));
    }

    #[test]
    fn paths_are_granted_by_prefix() {
        let ops = User { name: "x".into(), groups: vec!["ops".into()] };
        assert!(authorize_path(&store(), &ops, &Method::GET, "/healthz/etcd").is_ok());
        assert_eq!(authorize_path(&store(), &ops, &Method::GET, "/metrics").expect_err("not").code(), 403);
    }
}
