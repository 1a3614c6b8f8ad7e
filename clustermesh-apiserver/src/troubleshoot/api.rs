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

use super::{Limits, Origin, Refusal, Setup, Troubleshooter, target};
use crate::relay::{OwnCluster, Relay};

/// Which peer.
#[derive(Deserialize)]
struct Asked {
    peer: Option<String>,
}

/// The route, for the API socket and the health address.
pub fn router(troubleshooter: Arc<Troubleshooter>) -> Router {
    Router::new().route("/v1/troubleshoot", get(troubleshoot)).with_state(troubleshooter)
}

/// The route of a daemon. Its peers are those of the relay that `relay` answers with while this replica runs one, files
/// among them in `peers_dir`.
pub fn of_daemon(
    own: OwnCluster,
    namespace: &str,
    peers_dir: Option<PathBuf>,
    relay: impl Fn() -> Option<Relay> + Clone + Send + Sync + 'static,
) -> Router {
    let setup = Setup {
        cluster: own.name.to_string(),
        own: Some(own),
        namespace: namespace.to_owned(),
        origin: Origin::Apiserver,
        resolver: Resolver::system(),
        limits: Limits::default(),
    };
    let directory = peers_dir.unwrap_or_default();
    let configured = relay.clone();
    let targets = move || configured().map(|relay| target::of_relay(&relay, &directory));
    let mirrored = move || relay().map(|relay| relay.peers()).unwrap_or_default();
    router(Arc::new(Troubleshooter::new(setup, targets).beside(mirrored)))
}

async fn troubleshoot(
    State(troubleshooter): State<Arc<Troubleshooter>>,
    Query(asked): Query<Asked>,
) -> Response {
    match troubleshooter.report(asked.peer.as_slice()).await {
        Ok(report) => Json(report).into_response(),
        Err(refusal @ Refusal::Busy(_)) => {
            (StatusCode::TOO_MANY_REQUESTS, format!("{refusal}\n")).into_response()
        }
        Err(refusal @ Refusal::NoRelay) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("{refusal}\n")).into_response()
        }
    }
}
