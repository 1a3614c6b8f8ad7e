//! The life of a reader's connection: connect, probe, find the cluster configuration, then watch over the heartbeat
//! until something fails, and begin anew; or until the client certificate is replaced, and go over to a connection made
//! with the new one.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use chrono::Utc;
use serde::Deserialize;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};

use super::{ClusterConfigState, Connection, FailureCause, ReaderStatus, Shared, Usable};
use crate::{
    backoff::Backoff,
    client::{Change, ConnectError, Connected, Rounds, Session, SessionError, Span, WatchAnswer, connect},
    config::Renewal,
    metrics::QuorumError,
};

/// The key that a live exporter writes every minute.
const HEARTBEAT: &[u8] = b"cilium/.heartbeat";
/// The largest cluster configuration that is looked at, in bytes. Real ones have about a hundred.
const MAX_CONFIG_BYTES: usize = 64 << 10;
/// The longest wait between two attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// A connection that held for so long was a good one: the next attempt does not wait longer than [`SPREAD`].
const GOOD: Duration = Duration::from_secs(10);
/// Those who lose a good connection together come back within this time.
const SPREAD: Duration = Duration::from_millis(100);

/// Keeps a connection, for as long as the task lives.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut backoff = Backoff::new(Duration::from_millis(200), MAX_BACKOFF);
    let mut rounds = Rounds::default();
    let mut successor = None;
    loop {
        let takes_over = successor.is_some();
        let made = match successor.take() {
            Some(made) => Ok(made),
            None => {
                moved(&shared, Connection::Connecting);
                make(&shared, &mut rounds).await
            }
        };
        let mut was_good = false;
        let (error, cause) = match made {
            Err(error) => (error.to_string(), FailureCause::from(&error)),
            Ok(Made { connected: Connected { client, endpoint, address }, renewal }) => {
                shared.status.send_modify(|status| {
                    status.endpoint = Some(endpoint.to_string());
                    status.address = Some(address);
                });
                // Whoever is connected stays so.
                if !takes_over {
                    moved(&shared, Connection::Probing);
                }
                let session =
                    Session::new(client, Arc::clone(&shared.limiter), shared.config.metrics.clone());
                let began = Instant::now();
                let end = use_session(&shared, &session, renewal, &mut rounds).await;
                shared.usable.send_replace(None);
                let error = match end {
                    End::Failed(error) => {
                        if matches!(error, Failure::Silent(_)) {
                            shared.config.metrics.quorum_error(QuorumError::NoEvent);
                        }
                        error
                    }
                    End::Replaced(made) => {
                        tracing::info!(cluster = %shared.name,
                            "going over to a connection made with the new client certificate");
                        shared.status.send_modify(forget_config);
                        successor = Some(*made);
                        continue;
                    }
                };
                was_good = began.elapsed() >= GOOD;
                (format!("{endpoint} ({address}): {error}"), FailureCause::Lost)
            }
        };
        tracing::warn!(cluster = %shared.name, %error, "the connection to the cluster's store is down");
        shared.status.send_modify(|status| {
            status.connection = Connection::BackingOff;
            status.since = Utc::now();
            status.endpoint = None;
            status.address = None;
            status.failures += 1;
            status.last_error = Some(error);
            status.last_cause = Some(cause);
            status.last_failure = Some(Utc::now());
            forget_config(status);
        });
        if was_good {
            backoff.reset();
            // Ten thousand agents may have lost the same gateway at the same moment.
            sleep(SPREAD.mul_f64(fastrand::f64())).await;
        } else {
            sleep(backoff.next_delay()).await;
        }
    }
}

/// The connection has come to another state.
pub(super) fn moved(shared: &Shared, connection: Connection) {
    shared.status.send_modify(|status| {
        status.connection = connection;
        status.since = Utc::now();
    });
}

/// The next connection has yet to find it.
fn forget_config(status: &mut ReaderStatus) {
    if status.cluster_config == ClusterConfigState::Retrieved {
        status.cluster_config = ClusterConfigState::Missing;
    }
}

/// A connection, and what tells when the client certificate that it was made with is replaced.
struct Made {
    connected: Connected,
    renewal: Renewal,
}

async fn make(shared: &Shared, rounds: &mut Rounds) -> Result<Made, ConnectError> {
    // From before the handshake on, so that no renewal is missed.
    let renewal = Renewal::of(shared.config.client.identity.as_ref());
    let connected = connect(&shared.config.resolver, &shared.config.client, rounds).await?;
    Ok(Made { connected, renewal })
}

/// Waits until the client certificate has been replaced, and connects with the new one. While that fails, the connection
/// that there is does as well as before.
async fn successor(shared: &Shared, mut renewal: Renewal, rounds: &mut Rounds) -> Made {
    renewal.comes().await;
    sleep(shared.config.renew_within.mul_f64(fastrand::f64())).await;
    let mut backoff = Backoff::new(Duration::from_millis(500), MAX_BACKOFF);
    loop {
        match make(shared, rounds).await {
            Ok(made) => return made,
            Err(error) => tracing::warn!(cluster = %shared.name, %error,
                "cannot connect with the new client certificate yet; the connection made with the former one goes on"),
        }
        sleep(backoff.next_delay()).await;
    }
}

/// How the use of a connection ended.
enum End {
    Failed(Failure),
    /// There is another one, made with the present client certificate.
    Replaced(Box<Made>),
}

/// Uses a connection until it fails, or there is a better one.
async fn use_session(shared: &Shared, session: &Session, renewal: Renewal, rounds: &mut Rounds) -> End {
    // Connected is whoever has listed the heartbeat, whether it is there or not.
    let revision = match list_heartbeat(session).await {
        Ok(revision) => revision,
        Err(error) => return End::Failed(error.into()),
    };
    shared.status.send_modify(|status| {
        status.connection = Connection::Connected;
        status.since = Utc::now();
        status.cluster_id = session.cluster_id();
        status.store_revision = session.store_revision();
    });
    tracing::info!(cluster = %shared.name, cluster_id = session.cluster_id(), "connected to the cluster's store");

    let (broken, mut reports) = mpsc::channel(1);
    tokio::select! {
        failure = heartbeat(shared, session, revision) => End::Failed(failure),
        failure = cluster_config(shared, session, &broken) => End::Failed(failure),
        Some(report) = reports.recv() => End::Failed(Failure::Section(report)),
        made = successor(shared, renewal, rounds) => End::Replaced(Box::new(made)),
    }
}

/// Why a connection was given up.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(
        "no heartbeat for {}s; is the exporter of that cluster running, and does it write {}?",
        .0.as_secs(), String::from_utf8_lossy(HEARTBEAT)
    )]
    Silent(Duration),
    #[error("{0}")]
    Section(String),
}

async fn list_heartbeat(session: &Session) -> Result<i64, SessionError> {
    let mut listing = session.list(Span::Prefix(Bytes::from_static(HEARTBEAT)));
    while listing.next_page().await?.is_some() {}
    Ok(listing.revision())
}

/// Watches the heartbeat; returns when it has been silent for too long or cannot be watched.
async fn heartbeat(shared: &Shared, session: &Session, mut revision: i64) -> Failure {
    let silence = shared.config.heartbeat_timeout;
    let mut last = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(500), MAX_BACKOFF);
    loop {
        let error = match session.watch(Span::Prefix(Bytes::from_static(HEARTBEAT)), revision + 1).await {
            Err(error) => error,
            Ok(mut watch) => loop {
                let answer = tokio::select! {
                    // Where this process was held up, a beat that has come meanwhile counts before the time that has passed.
                    biased;
                    answer = watch.next() => answer,
                    () = sleep_until(last + silence) => return Failure::Silent(silence),
                };
                match answer {
                    Err(error) => break error,
                    Ok(WatchAnswer::Progress { .. }) => {}
                    Ok(WatchAnswer::Changes { changes, .. }) => {
                        if changes.iter().any(|change| matches!(change, Change::Put(_))) {
                            last = Instant::now();
                            backoff.reset();
                            shared.status.send_modify(|status| {
                                status.last_heartbeat = Some(Utc::now());
                                status.store_revision = session.store_revision();
                            });
                        }
                    }
                }
            },
        };
        if error.is_fatal() {
            return error.into();
        }
        tracing::debug!(cluster = %shared.name, %error, "the heartbeat is watched anew");
        if last.elapsed() >= silence {
            return Failure::Silent(silence);
        }
        sleep(backoff.next_delay()).await;
        revision = match list_heartbeat(session).await {
            Ok(revision) => revision,
            Err(error) => return error.into(),
        };
    }
}

/// Finds the cluster configuration, lets the sections begin once it is there, and follows its changes.
async fn cluster_config(shared: &Shared, session: &Session, broken: &mpsc::Sender<String>) -> Failure {
    let usable = |canaries| {
        let usable = Usable { session: session.clone(), canaries, broken: broken.clone() };
        shared.usable.send_replace(Some(usable));
    };
    if !shared.config.cluster_config_required {
        usable(true);
        return std::future::pending().await;
    }
    let key = Bytes::from(format!("cilium/cluster-config/{}", shared.name));
    let mut backoff = Backoff::new(Duration::from_millis(200), MAX_BACKOFF);
    let mut begun = false;
    loop {
        let mut found = |value: Option<Bytes>| match value.as_deref().map(parse_config) {
            None => problem(
                shared,
                format!(
                    "{} is missing; the exporter of that cluster has not written it yet",
                    String::from_utf8_lossy(&key)
                ),
            ),
            Some(Err(error)) => {
                problem(shared, format!("{} cannot be understood: {error}", String::from_utf8_lossy(&key)));
            }
            Some(Ok(config)) => {
                shared.status.send_modify(|status| status.cluster_config = ClusterConfigState::Retrieved);
                shared.cluster_config.send_if_modified(|known| {
                    let differs = *known != value;
                    known.clone_from(&value);
                    differs
                });
                if !std::mem::replace(&mut begun, true) {
                    usable(config.capabilities.synced_canaries);
                }
            }
        };
        let error = async {
            let (value, revision) = session.get(&key).await?;
            found(value);
            let mut watch = session.watch(Span::Key(key.clone()), revision + 1).await?;
            loop {
                let WatchAnswer::Changes { changes, .. } = watch.next().await? else { continue };
                for change in changes {
                    match change {
                        Change::Put(pair) => found(Some(pair.value)),
                        Change::Delete { .. } => {
                            shared.cluster_config.send_replace(None);
                            shared
                                .status
                                .send_modify(|status| status.cluster_config = ClusterConfigState::Missing);
                        }
                    }
                }
            }
        };
        let error: Result<std::convert::Infallible, SessionError> = error.await;
        let Err(error) = error;
        if error.is_fatal() {
            return error.into();
        }
        problem(shared, format!("{}: {error}", String::from_utf8_lossy(&key)));
        sleep(backoff.next_delay()).await;
    }
}

/// Something is wrong that the connection survives.
fn problem(shared: &Shared, error: String) {
    tracing::warn!(cluster = %shared.name, %error, "the cluster configuration is not usable");
    shared.status.send_modify(|status| {
        status.last_error = Some(error);
        status.last_failure = Some(Utc::now());
    });
}

/// The part of the cluster configuration that the protocol itself needs. Consumers read the rest.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    capabilities: Capabilities,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Capabilities {
    #[serde(default)]
    synced_canaries: bool,
}

fn parse_config(value: &[u8]) -> Result<Config, String> {
    if value.len() > MAX_CONFIG_BYTES {
        return Err(format!("it is {} bytes long, the most is {MAX_CONFIG_BYTES}", value.len()));
    }
    serde_json::from_slice(value).map_err(|error| error.to_string())
}
