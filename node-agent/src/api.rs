//! What the agent answers on its API socket.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use futures::future::BoxFuture;
use isthmus_bpf_abi::ServiceKey;
use tokio::sync::broadcast;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;

use crate::desired::service::{self, protocol};
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
}

/// The routes: `/v1/status`, `/v1/services`, `/v1/ipcache`, `/v1/applied`.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/services", get(services))
        .route("/v1/ipcache", get(ipcache))
        .route("/v1/applied", get(applied))
        .with_state(api)
}

async fn status(State(api): State<Api>) -> Response {
    or_leaving((api.status)().await)
}

async fn services(State(api): State<Api>) -> Response {
    or_leaving(api.looks.at(|reconciler, _| frontends(reconciler)).await)
}

async fn ipcache(State(api): State<Api>) -> Response {
    or_leaving(api.looks.at(|reconciler, _| prefixes(reconciler)).await)
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
