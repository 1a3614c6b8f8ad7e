//! The server behind the connections: one state, one lock, and the way of a request through it.

mod discovery;
mod read;
mod review;
mod scale;
mod watch;
mod write;

pub(crate) use write::{now, remove as forget};

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::auth::User;
use crate::kinds::{self, services::Addresses};
use crate::rbac;
use crate::request::{Query, Request};
use crate::resource::Registry;
use crate::selector::Selector;
use crate::status::{ApiError, ApiResult};
use crate::store::Store;

/// A response's body: bytes, or a stream of them.
pub(crate) type Body = UnsyncBoxBody<Bytes, std::convert::Infallible>;

/// What the server is, apart from its sockets.
pub(crate) struct Api {
    state: Mutex<State>,
    pub(crate) settings: Settings,
    /// Ends all watches.
    pub(crate) stopping: CancellationToken,
    /// Ends the watches that run now; replaced afterwards.
    disconnect: Mutex<CancellationToken>,
}

/// What of the configuration matters to requests.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) bookmark_interval: Duration,
    pub(crate) max_body: usize,
}

/// Everything that requests change. One lock: writes are microseconds, and a transaction needs no retries.
pub(crate) struct State {
    pub(crate) store: Store,
    pub(crate) registry: Arc<Registry>,
    pub(crate) addresses: Addresses,
}

/// A request whose body has been read.
pub(crate) struct Incoming<'a> {
    pub(crate) user: &'a User,
    pub(crate) method: Method,
    pub(crate) path: &'a str,
    pub(crate) query: Query,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: Bytes,
}

/// An answer in the making.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Payload,
    /// Sentences for the `Warning` header.
    pub(crate) warnings: Vec<String>,
}

pub(crate) enum Payload {
    Json(Value),
    Serialized(Bytes),
    /// With this content type.
    Typed(Bytes, &'static str),
    Stream(Body),
}

impl Answer {
    pub(crate) fn ok(value: Value) -> Self {
        Self::new(StatusCode::OK, Payload::Json(value))
    }

    pub(crate) fn new(status: StatusCode, body: Payload) -> Self {
        Self { status, body, warnings: Vec::new() }
    }

    pub(crate) fn text(text: &'static str) -> Self {
        Self::new(StatusCode::OK, Payload::Typed(Bytes::from_static(text.as_bytes()), "text/plain"))
    }
}

impl Api {
    pub(crate) fn new(settings: Settings, history: usize, addresses: Addresses) -> Self {
        let mut state =
            State { store: Store::new(history), registry: Arc::new(Registry::builtin()), addresses };
        kinds::bootstrap(&mut state);
        Self {
            state: Mutex::new(state),
            settings,
            stopping: CancellationToken::new(),
            disconnect: Mutex::new(CancellationToken::new()),
        }
    }

    /// The state, locked. A panic in another request cannot leave a half-made change behind: each change
    /// is prepared on a copy and put in place at the end. So poison is no reason to stop.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Ends the watches that run now, as a restarting load balancer would.
    pub(crate) fn disconnect_watches(&self) {
        let mut token = self.disconnect.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        std::mem::replace(&mut *token, CancellationToken::new()).cancel();
    }

    pub(crate) fn disconnected(&self) -> CancellationToken {
        self.disconnect.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Answers a request. Errors become `Status` objects.
    pub(crate) fn answer(self: &Arc<Self>, incoming: &Incoming<'_>) -> Response<Body> {
        let answer = self.acting_user(incoming).and_then(|user| self.route(&user, incoming));
        match answer {
            Ok(answer) => respond(answer, incoming.query.flag("pretty")),
            Err(error) => respond_error(&error),
        }
    }

    /// Who the request acts as: the user, or whom the user may and wants to impersonate (`kubectl --as`).
    fn acting_user<'a>(&self, incoming: &Incoming<'a>) -> ApiResult<Cow<'a, User>> {
        let texts = |name: &str| {
            let values = incoming.headers.get_all(name).into_iter();
            values.filter_map(|value| value.to_str().ok()).map(str::to_owned).collect::<Vec<_>>()
        };
        let mut groups = texts("impersonate-group");
        let Some(name) = texts("impersonate-user").pop() else {
            return match groups.is_empty() {
                true => Ok(Cow::Borrowed(incoming.user)),
                false => Err(ApiError::bad_request("Impersonate-Group needs Impersonate-User beside it")),
            };
        };
        for (resource, name) in
            std::iter::once(("users", &name)).chain(groups.iter().map(|group| ("groups", group)))
        {
            let asked = rbac::Attributes { verb: "impersonate", resource, name, ..Default::default() };
            if !rbac::allows(&self.state().store, incoming.user, &asked) {
                let why = asked.refusal(incoming.user);
                return Err(ApiError::forbidden_because(&format!("{resource} {name:?} is forbidden: {why}")));
            }
        }
        groups.push("system:authenticated".to_owned());
        Ok(Cow::Owned(User { name, groups }))
    }

    fn route(self: &Arc<Self>, user: &User, incoming: &Incoming<'_>) -> ApiResult<Answer> {
        let registry = self.state().registry.clone();
        let query = incoming.query.clone();
        if let Some(request) =
            Request::parse(&registry, &incoming.method, incoming.path, query, incoming.headers)?
        {
            self.authorize(user, &request)?;
            return self.serve(&request, user, incoming);
        }
        rbac::authorize_path(&self.state().store, user, &incoming.method, incoming.path)?;
        if incoming.method != Method::GET {
            return Err(ApiError::no_such_path());
        }
        self.discover(&registry, incoming)
    }

    fn authorize(&self, user: &User, request: &Request) -> ApiResult<()> {
        // A list of the one object of that name is allowed where the object is.
        let selected = match request.name {
            None => Selector::parse("", request.query.text("fieldSelector"), &request.resource.kind).ok(),
            Some(_) => None,
        };
        let selected = selected.as_ref().and_then(Selector::name);
        let attributes = rbac::Attributes {
            verb: request.verb,
            group: &request.resource.group,
            resource: &request.resource.plural,
            subresource: request.subresource.as_deref().unwrap_or_default(),
            namespace: request.namespace.as_deref().unwrap_or_default(),
            name: selected.unwrap_or_else(|| request.name()),
        };
        if rbac::allows(&self.state().store, user, &attributes) {
            return Ok(());
        }
        Err(ApiError::forbidden(&request.resource, request.name(), &attributes.refusal(user)))
    }

    fn serve(self: &Arc<Self>, request: &Request, user: &User, incoming: &Incoming<'_>) -> ApiResult<Answer> {
        if request.resource.virtual_ {
            return self.review(request, user, incoming);
        }
        match (request.subresource.as_deref(), request.verb) {
            (None, "list") => self.list(request),
            (None, "watch") => self.watch(request),
            (None, "get") => self.get(request),
            (None, "create") if request.name.is_none() => self.create(request, incoming),
            (None | Some("status"), "update") if self.has_status(request) => self.replace(request, incoming),
            (None | Some("status"), "patch") if self.has_status(request) => {
                self.patch(request, user, incoming)
            }
            (Some("status"), "get") if self.has_status(request) => self.get(request),
            (None, "delete") => self.delete(request, incoming),
            (None, "deletecollection") => self.delete_collection(request, incoming),
            (Some("scale"), verb) if request.resource.scale.is_some() => self.scale(request, incoming, verb),
            (Some("binding"), "create") if request.resource.actions.contains(&"binding") => {
                self.bind(request, incoming)
            }
            (Some("eviction"), "create") if request.resource.actions.contains(&"eviction") => {
                self.evict(request, incoming)
            }
            (Some("finalize"), "update") if request.resource.is("", "namespaces") => {
                self.finalize(request, incoming)
            }
            (None, _) => Err(ApiError::method_not_allowed()),
            (Some(_), _) => Err(ApiError::no_such_path()),
        }
    }

    fn has_status(&self, request: &Request) -> bool {
        request.subresource.is_none() || request.resource.status
    }
}

fn respond(answer: Answer, pretty: bool) -> Response<Body> {
    let (body, content_type) = match answer.body {
        Payload::Json(value) if pretty => {
            (full(serde_json::to_vec_pretty(&value).unwrap_or_default()), "application/json")
        }
        Payload::Json(value) => (full(value.to_string()), "application/json"),
        Payload::Serialized(bytes) => (full(bytes), "application/json"),
        Payload::Typed(bytes, content_type) => (full(bytes), content_type),
        Payload::Stream(stream) => (stream, "application/json"),
    };
    let mut response = Response::new(body);
    *response.status_mut() = answer.status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    for warning in answer.warnings {
        // RFC 7234: code, agent (none), quoted text.
        let quoted = format!("299 - {:?}", warning.replace(['\n', '\r'], " "));
        if let Ok(value) = HeaderValue::try_from(quoted) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    response
}

/// A `Status` as a response.
pub(crate) fn respond_error(error: &ApiError) -> Response<Body> {
    let status = StatusCode::from_u16(error.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    respond(Answer::new(status, Payload::Json(error.to_value())), false)
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}
