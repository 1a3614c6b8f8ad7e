//! Asks the daemons how they are, over their API sockets.

use std::path::Path;
use std::time::Duration;

use clustermesh_apiserver::status::ApiserverStatus;
use clustermesh_apiserver::troubleshoot::Report;
use isthmus_node_agent::encryption::ReachReport;
use isthmus_node_agent::status::AgentStatus;
use serde::de::DeserializeOwned;

use crate::error::{LabError, Result};
use crate::http;

/// A daemon that does not answer in this time is not well.
const DEADLINE: Duration = Duration::from_secs(3);
/// What waits for answers of others takes longer.
const PROBE: Duration = Duration::from_secs(60);

/// A clustermesh-apiserver's status.
///
/// # Errors
/// When it does not answer, or with something else; the message says what to look at.
pub async fn apiserver(socket: &Path) -> Result<ApiserverStatus> {
    ask(socket, "/v1/status", DEADLINE).await
}

/// Why an apiserver's peer is not connected, step by step, or that it is.
///
/// # Errors
/// As [`apiserver`].
pub async fn troubleshoot(socket: &Path, peer: &str) -> Result<Report> {
    ask(socket, &format!("/v1/troubleshoot?peer={peer}"), PROBE).await
}

/// Which nodes' WireGuard devices a node-agent's device reaches.
///
/// # Errors
/// As [`apiserver`].
pub async fn reach(socket: &Path) -> Result<ReachReport> {
    ask(socket, "/v1/probe", PROBE).await
}

/// A node-agent's status.
///
/// # Errors
/// As [`apiserver`].
pub async fn agent(socket: &Path) -> Result<AgentStatus> {
    ask(socket, "/v1/status", DEADLINE).await
}

async fn ask<T: DeserializeOwned>(socket: &Path, path: &str, deadline: Duration) -> Result<T> {
    let refused = |what: String| LabError::invalid(format!("{}: {what}", socket.display()));
    let answered = http::get_unix(socket, path, deadline).await;
    let (status, body) = answered.map_err(|e| refused(format!("no answer ({e}); is the daemon running?")))?;
    if status != 200 {
        return Err(refused(format!("the daemon answers {status}: {}", body.trim())));
    }
    serde_json::from_str(&body).map_err(|e| refused(format!("the answer is of another version ({e})")))
}
