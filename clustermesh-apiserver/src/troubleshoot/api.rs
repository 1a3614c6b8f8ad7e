//! `GET /v1/troubleshoot?peer=NAME`: a [`Report`](super::Report) as JSON, about one peer or about all.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use isthmus_kvstore::client::steps::Resolver;
use serde::Deserialize;

use super::{DEFAULT_NAMESPACE, Limits, Origin, Setup, Troubleshooter, in_directory};
use crate::relay::OwnCluster;
use crate::status::PeerStatus;

/// Which peer.
#[derive(Deserialize)]
struct Asked {
    peer: Option<String>,
}

/// The route, for the API socket and the health address.
pub fn router(troubleshooter: Arc<Troubleshooter>) -> Router {
    Router::new().route("/v1/troubleshoot", get(troubleshoot)).with_state(troubleshooter)
}

/// The route of a daemon whose peers are in a directory and are mirrored by the relay that `relayed` asks.
pub fn of_daemon(
    own: OwnCluster,
    peers_dir: Option<PathBuf>,
    relayed: impl Fn() -> Vec<PeerStatus> + Send + Sync + 'static,
) -> Router {
    let setup = Setup {
        cluster: own.name.to_string(),
        own: Some(own.clone()),
        namespace: DEFAULT_NAMESPACE.to_owned(),
        origin: Origin::Apiserver,
        resolver: Resolver::system(),
        limits: Limits::default(),
    };
    let targets = move || {
        let found = peers_dir.as_deref().map(|directory| in_directory(directory, Some(&own.name)));
        // One that cannot be read is told in the status, and named peers are said not to be configured.
        found.and_then(Result::ok).unwrap_or_default()
    };
    router(Arc::new(Troubleshooter::new(setup, targets).beside(relayed)))
}

async fn troubleshoot(
    State(troubleshooter): State<Arc<Troubleshooter>>,
    Query(asked): Query<Asked>,
) -> Response {
    match troubleshooter.report(asked.peer.as_slice()).await {
        Ok(report) => Json(report).into_response(),
        Err(busy) => (StatusCode::TOO_MANY_REQUESTS, format!("{busy}\n")).into_response(),
    }
}
