//! Which resources the server has: what they are called, where they live, and how they look.
//!
//! Everything else in the server is driven by these definitions. The built-in ones are one line each in
//! [`builtin`]; a CRD adds more while the server runs.

pub mod builtin;
pub mod custom;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::schema::Schema;
use crate::store::Collection;
use crate::table::Columns;

/// One resource in one version.
#[derive(Debug, Clone)]
pub struct Resource {
    /// API group; empty for the core group.
    pub group: String,
    /// For instance `v1`.
    pub version: String,
    /// For instance `Pod`.
    pub kind: String,
    /// For instance `PodList`.
    pub list_kind: String,
    /// As in URLs, for instance `pods`.
    pub plural: String,
    /// For instance `pod`.
    pub singular: String,
    /// For instance `po`.
    pub short_names: Vec<String>,
    /// For instance `all`.
    pub categories: Vec<String>,
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Whether `status` is a subresource, and so not written together with the rest.
    pub status: bool,
    /// Where `scale` finds its numbers, if it is a subresource.
    pub scale: Option<Scale>,
    /// Further subresources (create only), for discovery and access checks.
    pub actions: &'static [&'static str],
    /// What objects look like.
    pub schema: Schema,
    /// The full name of the type, for instance `io.k8s.api.core.v1.Pod`.
    pub definition: String,
    /// The schema as its CRD gave it.
    pub custom_schema: Option<serde_json::Value>,
    /// `kubectl get`'s columns.
    pub columns: Columns,
    /// Whether names may contain colons and the like, as those of RBAC do.
    pub path_segment_names: bool,
    /// Virtual resources are answered, never stored (access reviews).
    pub virtual_: bool,
    /// Whether a CRD defined it.
    pub custom: bool,
    /// Where the store keeps it; the same for all versions.
    pub collection: Collection,
}

/// The paths of the scale subresource, each a list of field names.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Scale {
    pub spec_replicas: Vec<String>,
    pub status_replicas: Vec<String>,
    /// A selector as text or as a label selector.
    pub selector: Option<Vec<String>>,
}

impl Resource {
    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        group_version(&self.group, &self.version)
    }

    /// `pods` or `deployments.apps`.
    pub fn qualified(&self) -> String {
        match self.group.as_str() {
            "" => self.plural.clone(),
            group => format!("{}.{group}", self.plural),
        }
    }

    /// The verbs that discovery lists.
    pub fn verbs(&self) -> &'static [&'static str] {
        match self.virtual_ {
            true => &["create"],
            false => &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"],
        }
    }

    /// Whether this is the built-in resource `plural` of `group`.
    pub fn is(&self, group: &str, plural: &str) -> bool {
        self.group == group && self.plural == plural
    }
}

/// `v1` or `apps/v1`.
pub fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// All resources, by group, version and plural name.
#[derive(Debug, Clone)]
pub struct Registry {
    resources: BTreeMap<(String, String, String), Arc<Resource>>,
}

impl Registry {
    /// The built-in resources.
    pub fn builtin() -> Self {
        let mut registry = Self { resources: BTreeMap::new() };
        for resource in builtin::resources() {
            registry.add(resource.clone());
        }
        registry
    }

    /// Adds a resource, or replaces it.
    pub fn add(&mut self, resource: Arc<Resource>) {
        let key = (resource.group.clone(), resource.version.clone(), resource.plural.clone());
        self.resources.insert(key, resource);
    }

    /// Removes every version of a custom resource.
    pub fn remove_custom(&mut self, group: &str, plural: &str) {
        self.resources.retain(|_, r| !(r.custom && r.is(group, plural)));
    }

    /// The resource at `/apis/group/version/plural`.
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.resources.get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
    }

    /// Any version of a resource.
    pub fn any_version(&self, group: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.iter().find(|r| r.is(group, plural))
    }

    /// All resources, by group, then version, then name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values()
    }

    /// Groups (not the core group) and their versions, the preferred one first.
    pub fn groups(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for resource in self.iter().filter(|r| !r.group.is_empty()) {
            let versions = groups.entry(&resource.group).or_default();
            if !versions.contains(&resource.version.as_str()) {
                versions.push(&resource.version);
            }
        }
        for versions in groups.values_mut() {
            versions.sort_by_key(|version| std::cmp::Reverse(maturity(version)));
        }
        groups
    }

    /// Whether the group has this version.
    pub fn has_version(&self, group: &str, version: &str) -> bool {
        self.iter().any(|r| r.group == group && r.version == version)
    }
}

/// Orders versions as Kubernetes does: v2 over v1 over v1beta1 over v1alpha1 over anything else.
fn maturity(version: &str) -> (u8, u32, u32) {
    let Some(rest) = version.strip_prefix('v') else { return (0, 0, 0) };
    let number = |text: &str| text.parse::<u32>().ok();
    if let Some(major) = number(rest) {
        return (3, major, 0);
    }
    for (rank, label) in [(2, "beta"), (1, "alpha")] {
        if let Some((major, minor)) = rest.split_once(label)
            && let (Some(major), Some(minor)) = (number(major), number(minor))
        {
            return (rank, major, minor);
        }
    }
    (0, 0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preferred_version_is_the_most_mature() {
        let mut versions = ["v1alpha1", "v1", "v2beta1", "v2", "v1beta2", "vnext"];
        versions.sort_by_key(|v| std::cmp::Reverse(maturity(v)));
        assert_eq!(versions, ["v2", "v1", "v2beta1", "v1beta2", "v1alpha1", "vnext"]);
    }
}
