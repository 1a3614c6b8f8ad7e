//! What the server offers: versions, groups, resources, health, OpenAPI.

use std::sync::Arc;

use http::header;
use serde_json::{Value, json};

use super::{Answer, Api, Incoming};
use crate::openapi;
use crate::resource::{Registry, Resource, group_version};
use crate::status::{ApiError, ApiResult};

/// The version that the server claims to be: the API of this Kubernetes release is what it follows.
const VERSION: (&str, &str) = ("1", "33");

impl Api {
    pub(super) fn discover(&self, registry: &Registry, incoming: &Incoming<'_>) -> ApiResult<Answer> {
        let segments: Vec<&str> = incoming.path.trim_matches('/').split('/').collect();
        let aggregated = aggregated(incoming);
        match segments.as_slice() {
            ["healthz" | "livez" | "readyz", ..] => Ok(Answer::text("ok")),
            ["version"] => Ok(Answer::ok(version())),
            [""] => Ok(Answer::ok(json!({ "paths": paths(registry) }))),
            ["api"] => Ok(match aggregated {
                Some(version) => Answer::discovery(version, vec![group(registry, "", &["v1"])]),
                None => Answer::ok(json!({ "kind": "APIVersions", "versions": ["v1"] })),
            }),
            ["apis"] => {
                let groups = registry.groups();
                Ok(match aggregated {
                    Some(version) => {
                        let groups = groups.iter().map(|(name, versions)| group(registry, name, versions));
                        Answer::discovery(version, groups.collect())
                    }
                    None => {
                        let groups: Vec<Value> =
                            groups.iter().map(|(name, versions)| api_group(name, versions)).collect();
                        Answer::ok(json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups }))
                    }
                })
            }
            ["apis", name] => {
                let groups = registry.groups();
                let versions = groups.get(name).ok_or_else(ApiError::no_such_path)?;
                let mut answer = api_group(name, versions);
                answer["kind"] = json!("APIGroup");
                answer["apiVersion"] = json!("v1");
                Ok(Answer::ok(answer))
            }
            ["openapi", "v2"] => Ok(openapi::v2(registry, accepts_protobuf(incoming))),
            ["openapi", "v3"] => Ok(Answer::ok(openapi::v3_index(registry))),
            ["openapi", "v3", "api", version] => openapi_v3(registry, "", version),
            ["openapi", "v3", "apis", group, version] => openapi_v3(registry, group, version),
            ["api", version] => resource_list(registry, "", version),
            ["apis", group, version] => resource_list(registry, group, version),
            _ => Err(ApiError::no_such_path()),
        }
    }
}

impl Answer {
    fn discovery(version: &str, items: Vec<Value>) -> Self {
        let body = json!({
            "kind": "APIGroupDiscoveryList",
            "apiVersion": format!("apidiscovery.k8s.io/{version}"),
            "metadata": {},
            "items": items,
        });
        let content_type = match version {
            "v2" => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
            _ => "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList",
        };
        let bytes = body.to_string().into();
        Self::new(http::StatusCode::OK, super::Payload::Typed(bytes, content_type))
    }
}

fn accepts_protobuf(incoming: &Incoming<'_>) -> bool {
    let accept = incoming.headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    accept.is_some_and(|accept| accept.contains("proto-openapi.spec.v2"))
}

fn openapi_v3(registry: &Registry, group: &str, version: &str) -> ApiResult<Answer> {
    openapi::v3(registry, group, version).map(Answer::ok).ok_or_else(ApiError::no_such_path)
}

/// The version of aggregated discovery that the client wants, if it does.
fn aggregated(incoming: &Incoming<'_>) -> Option<&'static str> {
    let accept = incoming.headers.get(header::ACCEPT)?.to_str().ok()?;
    accept.split(',').filter(|option| option.contains("as=APIGroupDiscoveryList")).find_map(|option| {
        ["v2beta1", "v2"]
            .into_iter()
            .find(|v| option.contains(&format!("v={v};")) || option.ends_with(&format!("v={v}")))
    })
}

fn version() -> Value {
    let (major, minor) = VERSION;
    json!({
        "major": major,
        "minor": minor,
        "gitVersion": format!("v{major}.{minor}.0+isthmus-lab"),
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "rustc",
        "platform": format!("linux/{}", std::env::consts::ARCH),
    })
}

fn paths(registry: &Registry) -> Vec<String> {
    let mut paths: Vec<String> = [
        "/api",
        "/api/v1",
        "/apis",
        "/healthz",
        "/livez",
        "/openapi/v2",
        "/openapi/v3",
        "/readyz",
        "/version",
    ]
    .map(str::to_owned)
    .into();
    for (group, versions) in registry.groups() {
        paths.push(format!("/apis/{group}"));
        paths.extend(versions.iter().map(|version| format!("/apis/{group}/{version}")));
    }
    paths.sort();
    paths
}

fn api_group(name: &str, versions: &[&str]) -> Value {
    let versions: Vec<Value> = versions
        .iter()
        .map(|version| json!({ "groupVersion": group_version(name, version), "version": version }))
        .collect();
    json!({ "name": name, "versions": versions, "preferredVersion": versions.first() })
}

fn resource_list(registry: &Registry, group: &str, version: &str) -> ApiResult<Answer> {
    if !registry.has_version(group, version) {
        return Err(ApiError::no_such_path());
    }
    let mut resources = Vec::new();
    for resource in registry.iter().filter(|r| r.group == group && r.version == version) {
        let mut entry = json!({
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": resource.verbs(),
        });
        if !resource.short_names.is_empty() {
            entry["shortNames"] = json!(resource.short_names);
        }
        if !resource.categories.is_empty() {
            entry["categories"] = json!(resource.categories);
        }
        resources.push(entry);
        for sub in subresources(resource) {
            let mut entry = json!({
                "name": format!("{}/{}", resource.plural, sub.name),
                "singularName": "",
                "namespaced": resource.namespaced,
                "kind": sub.kind,
                "verbs": sub.verbs,
            });
            if let Some((group, version)) = sub.group_version {
                entry["group"] = json!(group);
                entry["version"] = json!(version);
            }
            resources.push(entry);
        }
    }
    Ok(Answer::ok(json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": group_version(group, version),
        "resources": resources,
    })))
}

struct Subresource {
    name: &'static str,
    kind: String,
    group_version: Option<(&'static str, &'static str)>,
    verbs: &'static [&'static str],
}

fn subresources(resource: &Resource) -> Vec<Subresource> {
    let mut subs = Vec::new();
    let verbs = &["get", "patch", "update"];
    if resource.status {
        subs.push(Subresource { name: "status", kind: resource.kind.clone(), group_version: None, verbs });
    }
    if resource.scale.is_some() {
        let of = Some(("autoscaling", "v1"));
        subs.push(Subresource { name: "scale", kind: "Scale".into(), group_version: of, verbs });
    }
    for &name in resource.actions {
        let (kind, of) = match name {
            "binding" => ("Binding", None),
            _ => ("Eviction", Some(("policy", "v1"))),
        };
        subs.push(Subresource { name, kind: kind.into(), group_version: of, verbs: &["create"] });
    }
    subs
}

/// A group of aggregated discovery.
fn group(registry: &Registry, name: &str, versions: &[&str]) -> Value {
    let versions: Vec<Value> = versions
        .iter()
        .map(|version| {
            let resources: Vec<Value> = registry
                .iter()
                .filter(|r| r.group == name && r.version == *version)
                .map(|resource: &Arc<Resource>| {
                    let kind = |group: &str, version: &str, kind: &str| json!({ "group": group, "version": version, "kind": kind });
                    let subs: Vec<Value> = subresources(resource)
                        .into_iter()
                        .map(|sub| {
                            let (group, version) = sub.group_version.unwrap_or((&resource.group, &resource.version));
                            json!({
                                "subresource": sub.name,
                                "responseKind": kind(group, version, &sub.kind),
                                "verbs": sub.verbs,
                            })
                        })
                        .collect();
                    json!({
                        "resource": resource.plural,
                        "responseKind": kind(&resource.group, &resource.version, &resource.kind),
                        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
                        "singularResource": resource.singular,
                        "shortNames": resource.short_names,
                        "categories": resource.categories,
                        "verbs": resource.verbs(),
                        "subresources": subs,
                    })
                })
                .collect();
            json!({ "version": version, "resources": resources, "freshness": "Current" })
        })
        .collect();
    let metadata = if name.is_empty() { json!({}) } else { json!({ "name": name }) };
    json!({ "metadata": metadata, "versions": versions })
}
