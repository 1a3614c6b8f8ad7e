//! What a client asks for: path, verb and options, parsed once at the edge.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use http::{HeaderMap, Method, header};
use serde::{Deserialize, Serialize};

use crate::resource::{Registry, Resource};
use crate::selector::Selector;
use crate::status::{ApiError, ApiResult};
use crate::table::IncludeObject;

/// A request for a resource.
#[derive(Debug, Clone)]
pub struct Request {
    /// As RBAC names it: get, list, watch, create, update, patch, delete, deletecollection.
    pub verb: &'static str,
    /// What is asked for.
    pub resource: Arc<Resource>,
    /// `None`: all namespaces, or a resource of the cluster.
    pub namespace: Option<String>,
    /// `None`: the whole collection.
    pub name: Option<String>,
    /// For instance `status`.
    pub subresource: Option<String>,
    /// The query.
    pub query: Query,
    /// How the answer is to be written.
    pub accept: Accept,
}

/// How the answer is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accept {
    /// The objects themselves.
    #[default]
    Objects,
    /// `kubectl get`'s table.
    Table(IncludeObject),
    /// Only `metadata`.
    Metadata,
}

/// Decoded query parameters; the last of each name counts.
#[derive(Debug, Clone, Default)]
pub struct Query(HashMap<String, String>);

/// What `resourceVersion` asks of a list or watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revision {
    /// The newest.
    Latest,
    /// Anything, so the newest.
    Any,
    /// This one or a newer one.
    NotOlderThan(u64),
    /// This one.
    Exact(u64),
}

/// Options of list and watch.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct ListOptions {
    pub selector: Selector,
    pub revision: Revision,
    pub limit: Option<usize>,
    pub continue_: Option<Continue>,
    pub bookmarks: bool,
    pub send_initial_events: bool,
    pub timeout: Option<Duration>,
}

/// Where the next page starts: the content of a `continue` token.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Continue {
    /// The revision of the first page.
    pub revision: u64,
    /// The last object of the page before.
    pub namespace: String,
    /// See `namespace`.
    pub name: String,
}

/// Options of create, update and patch.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct WriteOptions {
    pub dry_run: bool,
    /// As given, or made from the client's name.
    pub manager: String,
    /// Whether the client gave `fieldManager`.
    pub manager_given: bool,
    pub validation: FieldValidation,
    pub force: bool,
}

/// What happens to fields that the schema does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

impl Request {
    /// Parses a path below `/api/v1` or `/apis/group/version`. `None` if no such resource exists.
    pub fn parse(
        registry: &Registry,
        method: &Method,
        path: &str,
        query: Query,
        headers: &HeaderMap,
    ) -> ApiResult<Option<Self>> {
        let segments: Vec<String> = path
            .trim_matches('/')
            .split('/')
            .map(|s| percent_encoding::percent_decode_str(s).decode_utf8().map(|s| s.into_owned()))
            .collect::<Result<_, _>>()
            .map_err(|_| ApiError::bad_request("the path is not UTF-8"))?;
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let (group, version, rest) = match segments.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return Ok(None),
        };
        let (namespace, rest) = match rest {
            ["namespaces", _, "status" | "finalize"] => (None, rest),
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some((*namespace).to_owned()), rest),
            _ => (None, rest),
        };
        let (plural, name, subresource) = match *rest {
            [plural] => (plural, None, None),
            [plural, name] => (plural, Some(name), None),
            [plural, name, subresource] => (plural, Some(name), Some(subresource)),
            _ => return Ok(None),
        };
        let Some(resource) = registry.find(group, version, plural) else { return Ok(None) };
        let scoped = namespace.is_some();
        if (scoped && !resource.namespaced) || (resource.namespaced && name.is_some() && !scoped) {
            return Ok(None);
        }
        let verb = match (method, name.is_some()) {
            (&Method::GET, false) if query.flag("watch") => "watch",
            (&Method::GET, false) => "list",
            (&Method::GET, true) => "get",
            (&Method::POST, _) => "create",
            (&Method::PUT, true) => "update",
            (&Method::PATCH, true) => "patch",
            (&Method::DELETE, true) => "delete",
            (&Method::DELETE, false) => "deletecollection",
            _ => return Err(ApiError::method_not_allowed()),
        };
        Ok(Some(Self {
            verb,
            resource: resource.clone(),
            namespace,
            name: name.map(str::to_owned),
            subresource: subresource.map(str::to_owned),
            accept: Accept::parse(headers, &query)?,
            query,
        }))
    }

    /// The object's name, for requests that have one.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }
}

impl Accept {
    fn parse(headers: &HeaderMap, query: &Query) -> ApiResult<Self> {
        let Some(accept) = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()) else {
            return Ok(Self::Objects);
        };
        let include = match query.text("includeObject") {
            "None" => IncludeObject::None,
            "Object" => IncludeObject::Object,
            _ => IncludeObject::Metadata,
        };
        for option in accept.split(',') {
            let mut parts = option.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            let parameter = |name: &str| {
                option.split(';').map(str::trim).find_map(|p| p.strip_prefix(name)?.strip_prefix('='))
            };
            match (media, parameter("as"), parameter("v")) {
                ("application/json", Some("Table"), Some("v1" | "v1beta1")) => {
                    return Ok(Self::Table(include));
                }
                ("application/json", Some("PartialObjectMetadata" | "PartialObjectMetadataList"), _) => {
                    return Ok(Self::Metadata);
                }
                ("application/json" | "application/*" | "*/*", None, _) => return Ok(Self::Objects),
                // Whoever wants protobuf alone is answered in JSON, and says so in Content-Type.
                ("application/vnd.kubernetes.protobuf", None, _) if !accept.contains("json") => {
                    return Ok(Self::Objects);
                }
                _ => {}
            }
        }
        Err(ApiError::not_acceptable("application/json"))
    }
}

impl Query {
    /// Parses the part of the URL after `?`.
    pub fn parse(text: Option<&str>) -> Self {
        Self(form_urlencoded::parse(text.unwrap_or_default().as_bytes()).into_owned().collect())
    }

    /// The parameter, or the empty string.
    pub fn text(&self, name: &str) -> &str {
        self.0.get(name).map(String::as_str).unwrap_or_default()
    }

    /// Whether a boolean parameter is set.
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.text(name), "true" | "1" | "True" | "TRUE" | "t" | "T")
    }

    fn number(&self, name: &str) -> ApiResult<Option<u64>> {
        match self.text(name) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                ApiError::bad_request(format!("invalid {name} {text:?}: write a number that is not negative"))
            }),
        }
    }

    /// Options of list and watch.
    pub fn list_options(&self, kind: &str) -> ApiResult<ListOptions> {
        let continue_ = match self.text("continue") {
            "" => None,
            token => Some(Continue::parse(token)?),
        };
        let limit = self.number("limit")?.filter(|n| *n > 0).map(|n| n as usize);
        let send_initial_events = self.flag("sendInitialEvents");
        let mode = self.text("resourceVersionMatch");
        if send_initial_events && mode != "NotOlderThan" {
            return Err(ApiError::bad_request(
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        Ok(ListOptions {
            selector: Selector::parse(self.text("labelSelector"), self.text("fieldSelector"), kind)?,
            revision: self.revision(mode)?,
            limit,
            continue_,
            bookmarks: self.flag("allowWatchBookmarks"),
            send_initial_events,
            timeout: self.number("timeoutSeconds")?.filter(|n| *n > 0).map(Duration::from_secs),
        })
    }

    fn revision(&self, mode: &str) -> ApiResult<Revision> {
        let revision = self.number("resourceVersion")?;
        match (mode, revision) {
            ("Exact", Some(revision)) if revision > 0 => Ok(Revision::Exact(revision)),
            ("Exact", _) => Err(ApiError::bad_request(
                "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\" and without one",
            )),
            ("" | "NotOlderThan", None) => Ok(Revision::Latest),
            ("" | "NotOlderThan", Some(0)) => Ok(Revision::Any),
            ("" | "NotOlderThan", Some(revision)) => Ok(Revision::NotOlderThan(revision)),
            (other, _) => Err(ApiError::bad_request(format!(
                "resourceVersionMatch {other:?} is not supported: use Exact or NotOlderThan"
            ))),
        }
    }

    /// Options of writes. The manager defaults to the client's name.
    pub fn write_options(&self, headers: &HeaderMap) -> ApiResult<WriteOptions> {
        let dry_run = match self.text("dryRun") {
            "" => false,
            "All" => true,
            other => {
                return Err(ApiError::bad_request(format!("dryRun {other:?} is not supported: use All")));
            }
        };
        let validation = match self.text("fieldValidation") {
            "" | "Warn" => FieldValidation::Warn,
            "Ignore" => FieldValidation::Ignore,
            "Strict" => FieldValidation::Strict,
            other => {
                return Err(ApiError::bad_request(format!(
                    "fieldValidation {other:?} is not supported: use Ignore, Warn or Strict"
                )));
            }
        };
        let given = self.text("fieldManager");
        if given.len() > 128 || given.chars().any(char::is_control) {
            return Err(ApiError::bad_request("fieldManager must be at most 128 printable characters"));
        }
        let agent = headers.get(header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or("unknown");
        let agent = agent.split('/').next().unwrap_or("unknown");
        let manager = if given.is_empty() { agent } else { given };
        Ok(WriteOptions {
            dry_run,
            manager: manager.chars().take(128).collect(),
            manager_given: !given.is_empty(),
            validation,
            force: self.flag("force"),
        })
    }
}

impl Continue {
    /// The token for clients, who must not look inside.
    pub fn token(&self) -> String {
        BASE64.encode(serde_json::to_vec(self).expect("strings and a number"))
    }

    fn parse(token: &str) -> ApiResult<Self> {
        BASE64
            .decode(token)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .ok_or_else(|| ApiError::bad_request("continue key is not valid: start the list again"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: Method, path: &str, query: &str) -> Option<Request> {
        let query = Query::parse(Some(query));
        Request::parse(&Registry::builtin(), &method, path, query, &HeaderMap::new()).expect("a request")
    }

    #[test]
    fn paths_name_resources_objects_and_subresources() {
        let request = parse(Method::GET, "/api/v1/namespaces/ns/pods/a/status", "").expect("pod status");
        assert_eq!((request.verb, request.name(), request.namespace.as_deref()), ("get", "a", Some("ns")));
        assert_eq!(request.subresource.as_deref(), Some("status"));
        assert_eq!(parse(Method::GET, "/api/v1/pods", "watch=1").expect("watch").verb, "watch");
        assert_eq!(parse(Method::GET, "/api/v1/namespaces/ns", "").expect("namespace").name(), "ns");
        assert_eq!(
            parse(Method::PUT, "/api/v1/namespaces/ns/finalize", "")
                .expect("finalize")
                .subresource
                .as_deref(),
            Some("finalize")
        );
        let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/system%3Anode";
        assert_eq!(parse(Method::GET, role, "").expect("role").name(), "system:node");
        for nothing in ["/api/v1/namespaces/ns/nodes", "/api/v1/pods/a", "/apis/apps/v2/deployments", "/x"] {
            assert!(parse(Method::GET, nothing, "").is_none(), "{nothing}");
        }
    }

    #[test]
    fn a_forged_continue_token_is_refused() {
        assert_eq!(Query::parse(Some("continue=%21")).list_options("Pod").expect_err("forged").code(), 400);
    }

    #[test]
    fn tables_are_recognised_as_kubectl_asks_for_them() {
        let mut headers = HeaderMap::new();
        let accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        headers.insert(header::ACCEPT, accept.parse().expect("a header"));
        let accepted = Accept::parse(&headers, &Query::default()).expect("acceptable");
        assert_eq!(accepted, Accept::Table(IncludeObject::Metadata));
    }
}
