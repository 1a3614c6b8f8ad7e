//! Whether gateways can be reached from here. A hint and no more: it is the clusters that must reach each other.

use std::time::Duration;

use futures::future::join_all;
use isthmus_crds::peer::PeerEndpoint;
use tokio::net::TcpStream;

use super::checks::Finding;
use super::exchange::Step;

const ATTEMPT: Duration = Duration::from_secs(2);

/// A warning if none of a peer's gateways can be reached from here.
pub(crate) async fn hint(step: &Step) -> Option<Finding> {
    let attempts = join_all(step.wanted.endpoints.iter().map(reach)).await;
    if attempts.iter().any(Result::is_ok) {
        return None;
    }
    let failures: Vec<String> = attempts.into_iter().filter_map(Result::err).collect();
    Some(Finding::warning(
        &[&step.context],
        format!("the gateway of cluster {} cannot be reached from here: {}", step.peer, failures.join("; ")),
        "only the clusters have to reach each other, so this may be as it should; otherwise look for a firewall",
    ))
}

async fn reach(endpoint: &PeerEndpoint) -> Result<(), String> {
    let connected = TcpStream::connect((endpoint.host.as_str(), endpoint.port));
    match tokio::time::timeout(ATTEMPT, connected).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(format!("{endpoint}: {error}")),
        Err(_) => Err(format!("{endpoint}: no answer within {} s", ATTEMPT.as_secs())),
    }
}
