//! Get and list.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use http::StatusCode;
use serde_json::{Value, json};

use super::{Answer, Api, Payload, State};
use crate::request::{Accept, Continue, ListOptions, Request, Revision};
use crate::resource::Resource;
use crate::status::{ApiError, ApiResult};
use crate::store::{Key, Object};
use crate::table::partial;

impl Api {
    pub(super) fn get(&self, request: &Request) -> ApiResult<Answer> {
        let object = self.state().find(request)?;
        Ok(one(request, StatusCode::OK, &object))
    }

    pub(super) fn list(&self, request: &Request) -> ApiResult<Answer> {
        let options = request.query.list_options(&request.resource.kind)?;
        let page = self.state().page(request, &options)?;
        Ok(render(request, &page))
    }
}

/// Some objects of a list, and where it goes on.
struct Page {
    revision: u64,
    objects: Vec<Arc<Object>>,
    next: Option<Continue>,
    /// How many come after, if that is known.
    remaining: Option<usize>,
}

impl State {
    /// The object that the request names.
    pub(crate) fn find(&self, request: &Request) -> ApiResult<Arc<Object>> {
        let key = Key::new(request.namespace.as_deref().unwrap_or_default(), request.name());
        self.store
            .get(&request.resource.collection, &key)
            .ok_or_else(|| ApiError::not_found(&request.resource, request.name()))
    }

    fn page(&self, request: &Request, options: &ListOptions) -> ApiResult<Page> {
        let collection = &request.resource.collection;
        let namespace = request.namespace.as_deref();
        let current = self.store.revision();
        let wanted = match (&options.continue_, options.revision) {
            (Some(token), _) => Some(token.revision),
            (None, Revision::Exact(revision)) => Some(revision),
            (None, Revision::NotOlderThan(revision)) if revision > current => {
                return Err(ApiError::too_new(revision, current));
            }
            _ => None,
        };
        let Some(revision) = wanted.filter(|revision| *revision != current) else {
            return Ok(collect(self.store.list(collection, namespace), current, options));
        };
        if revision > current {
            return Err(ApiError::too_new(revision, current));
        }
        let then = self.store.list_at(collection, namespace, revision).map_err(|compacted| {
            ApiError::expired(match options.continue_ {
                Some(_) => "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter.".to_owned(),
                None => format!("The resourceVersion for the provided list is too old: {revision} ({})", compacted.oldest),
            })
        })?;
        Ok(collect(then.iter(), revision, options))
    }
}

fn collect<'a>(
    objects: impl Iterator<Item = (&'a Key, &'a Arc<Object>)>,
    revision: u64,
    options: &ListOptions,
) -> Page {
    let after = options.continue_.as_ref().map(|token| Key::new(&token.namespace, &token.name));
    let mut matching = objects
        .filter(|(key, _)| after.as_ref().is_none_or(|after| *key > after))
        .filter(|(_, object)| options.selector.is_everything() || options.selector.matches(&object.value));
    let limit = options.limit.unwrap_or(usize::MAX);
    let page: BTreeMap<&Key, &Arc<Object>> = matching.by_ref().take(limit).collect();
    let more = matching.count();
    let next = page.last_key_value().filter(|_| more > 0).map(|(key, _)| Continue {
        revision,
        namespace: key.namespace.clone(),
        name: key.name.clone(),
    });
    Page {
        revision,
        objects: page.into_values().cloned().collect(),
        next,
        remaining: (more > 0 && options.selector.is_everything()).then_some(more),
    }
}

fn render(request: &Request, page: &Page) -> Answer {
    let resource = &request.resource;
    let mut metadata = json!({ "resourceVersion": page.revision.to_string() });
    if let Some(next) = &page.next {
        metadata["continue"] = json!(next.token());
    }
    if let Some(remaining) = page.remaining {
        metadata["remainingItemCount"] = json!(remaining);
    }
    let values = page.objects.iter().map(|object| &object.value);
    match request.accept {
        Accept::Table(include) => Answer::ok(resource.columns.table(metadata, values, include)),
        Accept::Metadata => Answer::ok(json!({
            "kind": "PartialObjectMetadataList",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": metadata,
            "items": values.map(partial).collect::<Vec<_>>(),
        })),
        Accept::Objects => {
            let head = json!({ "kind": resource.list_kind, "apiVersion": resource.api_version(), "metadata": metadata });
            let head = head.to_string();
            let mut body = BytesMut::from(head.trim_end_matches('}').as_bytes());
            // trim_end_matches took the braces of metadata too.
            body.put_slice(b"},\"items\":[");
            for (index, object) in page.objects.iter().enumerate() {
                if index > 0 {
                    body.put_u8(b',');
                }
                body.put_slice(&versioned(resource, object));
            }
            body.put_slice(b"]}");
            Answer::new(StatusCode::OK, Payload::Serialized(body.freeze()))
        }
    }
}

/// One object in the form that was asked for.
pub(super) fn one(request: &Request, status: StatusCode, object: &Object) -> Answer {
    let payload = match request.accept {
        Accept::Objects if request.query.flag("pretty") => {
            Payload::Json(in_version(&request.resource, &object.value))
        }
        Accept::Objects => Payload::Serialized(versioned(&request.resource, object)),
        accept => Payload::Json(formed(&request.resource, accept, &object.value)),
    };
    Answer::new(status, payload)
}

/// An object as JSON in the version of the request. Versions of a custom resource differ in `apiVersion`
/// only (conversion strategy `None`).
pub(super) fn versioned(resource: &Resource, object: &Object) -> Bytes {
    if object.value["apiVersion"] == resource.api_version() {
        return object.json().clone();
    }
    Bytes::from(in_version(resource, &object.value).to_string())
}

/// An object in the form that was asked for.
pub(super) fn formed(resource: &Resource, accept: Accept, value: &Value) -> Value {
    match accept {
        Accept::Objects => in_version(resource, value),
        Accept::Metadata => partial(value),
        Accept::Table(include) => {
            let metadata = json!({ "resourceVersion": value["metadata"]["resourceVersion"] });
            resource.columns.table(metadata, std::iter::once(value), include)
        }
    }
}

fn in_version(resource: &Resource, value: &Value) -> Value {
    let mut value = value.clone();
    value["apiVersion"] = json!(resource.api_version());
    value
}
