//! Asks the daemons how they are, over their API sockets.

use std::path::Path;
use std::time::Duration;

use clustermesh_apiserver::status::ApiserverStatus;
use isthmus_node_agent::status::AgentStatus;
use serde::de::DeserializeOwned;

use crate::error::{LabError, Result};
use crate::http;

/// A daemon that does not answer in this time is not well.
const DEADLINE: Duration = Duration::from_secs(3);

/// A clustermesh-apiserver's status.
///
/// # Errors
/// When it does not answer, or with something else; the message says what to look at.
pub async fn apiserver(socket: &Path) -> Result<ApiserverStatus> {
    ask(socket).await
}

/// A node-agent's status.
///
/// # Errors
/// As [`apiserver`].
pub async fn agent(socket: &Path) -> Result<AgentStatus> {
    ask(socket).await
}

async fn ask<T: DeserializeOwned>(socket: &Path) -> Result<T> {
    let refused = |what: String| LabError::invalid(format!("{}: {what}", socket.display()));
    let answered = http::get_unix(socket, "/v1/status", DEADLINE).await;
    let (status, body) = answered.map_err(|e| refused(format!("no answer ({e}); is the daemon running?")))?;
    if status != 200 {
        return Err(refused(format!("the daemon answers {status}: {}", body.trim())));
    }
    serde_json::from_str(&body).map_err(|e| refused(format!("the answer is of another version ({e})")))
}
