//! What the agent answers on its API socket.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use futures::future::BoxFuture;
use isthmus_bpf_abi::ServiceKey;
use serde::Deserialize;
use tokio::sync::{broadcast, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;

use crate::desired::service::{self, protocol};
use crate::encryption::Prober;
use crate::events::{Filter, Hub};
use crate::explain::{self, Asked, Known};
use crate::pods::PodsStatus;
use crate::reconcile::{Looks, Reconciler};
use crate::status::{AgentStatus, Applied, BackendStatus, FrontendStatus, IpcacheStatus};

/// What the API needs of the agent.
#[derive(Clone)]
pub struct Api {
    /// Makes the status; nothing once the agent is on its way out.
    pub status: Arc<dyn Fn() -> BoxFuture<'static, Option<AgentStatus>> + Send + Sync>,
    /// Looks at the reconciler.
    pub looks: Looks,
    /// Hears of every batch.
    pub applied: broadcast::Sender<Applied>,
    /// Hears of every verdict.
    pub verdicts: Hub,
    /// How the pods of the node are.
    pub pods: watch::Receiver<PodsStatus>,
    /// Asks which nodes can be reached.
    pub prober: Prober,
}

/// The routes: those of [`of_whole_node`], `/v1/services`, `/v1/ipcache`, `/v1/policy`, `/v1/applied`, `/v1/events`,
/// `/v1/explain`.
pub fn router(api: Api) -> Router {
    let whole = of_whole_node(api.clone());
    Router::new()
        .route("/v1/services", get(services))
        .route("/v1/ipcache", get(ipcache))
        .route("/v1/policy", get(policy))
        .route("/v1/applied", get(applied))
        .route("/v1/events", get(events))
        .route("/v1/explain", get(explain))
        .with_state(api)
        .merge(whole)
}

/// What is said about the node and no pod of it: `/v1/status` and `/v1/probe`.
pub fn of_whole_node(api: Api) -> Router {
    Router::new().route("/v1/status", get(status)).route("/v1/probe", get(probe)).with_state(api)
}

async fn status(State(api): State<Api>) -> Response {
    or_leaving((api.status)().await)
}

/// Which nodes to ask.
#[derive(Deserialize)]
struct Probed {
    /// Those of this cluster; all if none is named.
    cluster: Option<String>,
}

/// Asks the devices of other nodes to answer this node's.
async fn probe(State(api): State<Api>, Query(probed): Query<Probed>) -> Response {
    match api.prober.ask(probed.cluster).await {
        Ok(report) => Json(report).into_response(),
        Err(busy) => (StatusCode::TOO_MANY_REQUESTS, format!("{busy}\n")).into_response(),
    }
}

async fn services(State(api): State<Api>) -> Response {
    or_leaving(api.looks.at(|reconciler, _| frontends(reconciler)).await)
}

async fn ipcache(State(api): State<Api>) -> Response {
    or_leaving(api.looks.at(|reconciler, _| prefixes(reconciler)).await)
}

/// The policy of each pod of the node.
async fn policy(State(api): State<Api>) -> Response {
    or_leaving(api.looks.at(|reconciler, _| reconciler.policies().endpoint_policies()).await)
}

/// A line of JSON for every batch, until the caller has had enough.
async fn applied(State(api): State<Api>) -> Response {
    let lines = BroadcastStream::new(api.applied.subscribe()).filter_map(|applied| {
        // Who does not keep up misses some; what follows holds newer revisions.
        let mut line = serde_json::to_vec(&applied.ok()?).ok()?;
        line.push(b'\n');
        Some(Ok::<_, Infallible>(Bytes::from(line)))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

/// A line of JSON for every verdict that the query wants, until the caller has had enough.
async fn events(State(api): State<Api>, RawQuery(query): RawQuery) -> Response {
    match Filter::from_query(query.as_deref().unwrap_or_default()) {
        Ok(filter) => {
            let lines = Body::from_stream(api.verdicts.listen(filter));
            ([(header::CONTENT_TYPE, "application/x-ndjson")], lines).into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

/// What would become of a packet, as far as this node's pods are concerned.
async fn explain(State(api): State<Api>, RawQuery(query): RawQuery) -> Response {
    let asked = match Asked::from_query(query.as_deref().unwrap_or_default()) {
        Ok(asked) => asked,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    };
    let node = api.verdicts.node().to_owned();
    let closed = api.pods.borrow().closed.clone();
    let explained = move |reconciler: &Reconciler, _: &_| {
        explain::explain(&node, &asked, &Known::new(reconciler).beside(&closed))
    };
    or_leaving(api.looks.at(explained).await)
}

fn or_leaving<T: serde::Serialize>(answer: Option<T>) -> Response {
    match answer {
        Some(answer) => Json(answer).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the agent is shutting down\n").into_response(),
    }
}

/// Every frontend that should be in the maps.
pub fn frontends(reconciler: &Reconciler) -> Vec<FrontendStatus> {
    let mesh = reconciler.mesh();
    let cluster = |id| mesh.cluster_name(id).map_or_else(|| id.to_string(), ToString::to_string);
    let mut names: Vec<_> = mesh.local_services().collect();
    names.sort();
    let mut all = Vec::new();
    for name in names {
        let Some(view) = mesh.service(name) else { continue };
        for (key, frontend) in service::frontends(&view, reconciler.rules()) {
            if reconciler.frontends().owner(&key) != Some(name) {
                continue;
            }
            let backends = frontend
                .backends
                .iter()
                .map(|(addr, of)| BackendStatus { address: addr.to_string(), cluster: cluster(*of) })
                .collect();
            all.push(FrontendStatus {
                service: name.to_string(),
                frontend: frontend_name(&key),
                affinity_seconds: frontend.affinity_seconds,
                backends,
            });
        }
    }
    all
}

fn frontend_name(key: &ServiceKey) -> String {
    format!("{}/{}", SocketAddr::new(key.addr.ip(), key.port()), protocol(key))
}

fn prefixes(reconciler: &Reconciler) -> Vec<IpcacheStatus> {
    let mesh = reconciler.mesh();
    mesh.prefixes()
        .filter_map(|prefix| {
            let resolved = mesh.resolve(prefix)?;
            Some(IpcacheStatus {
                prefix: prefix.to_string(),
                identity: resolved.identity,
                host: resolved.host.map(|host| host.to_string()),
                cluster: mesh.cluster_name(resolved.cluster).map(ToString::to_string).unwrap_or_default(),
                encryption_key: resolved.encryption_key,
            })
        })
        .collect()
}
