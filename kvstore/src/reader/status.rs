//! What a reader says about itself: never only "connected", but how old its data is and how far behind.

use std::{collections::BTreeMap, net::SocketAddr};

use chrono::{DateTime, Utc};
use isthmus_wire::ClusterName;
use serde::Serialize;

use super::FailureCause;

/// The state of a reader and of everything that it follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReaderStatus {
    /// The cluster whose store is read.
    pub cluster: ClusterName,
    /// Where the connection stands.
    pub connection: Connection,
    /// Since when it stands there.
    pub since: DateTime<Utc>,
    /// The endpoint in use, while there is a connection.
    pub endpoint: Option<String>,
    /// The address that the endpoint's name has led to.
    pub address: Option<SocketAddr>,
    /// How often a connection failed or was torn down.
    pub failures: u64,
    /// The latest failure, in words that say what to do. Kept after recovery.
    pub last_error: Option<String>,
    /// The latest failure, for programs.
    pub last_cause: Option<FailureCause>,
    /// When it happened.
    pub last_failure: Option<DateTime<Utc>>,
    /// The id of the store's cluster, which is another one when the store was exchanged.
    pub cluster_id: Option<u64>,
    /// The highest revision that the store has shown.
    pub store_revision: i64,
    /// When the store's heartbeat last came. A store whose exporter is dead has an old one.
    pub last_heartbeat: Option<DateTime<Utc>>,
    /// Whether a cluster configuration is needed and was found.
    pub cluster_config: ClusterConfigState,
    /// The sections by prefix.
    pub sections: BTreeMap<String, SectionStatus>,
}

impl ReaderStatus {
    pub(super) fn new(cluster: ClusterName, config_required: bool) -> Self {
        Self {
            cluster,
            connection: Connection::Connecting,
            since: Utc::now(),
            endpoint: None,
            address: None,
            failures: 0,
            last_error: None,
            last_cause: None,
            last_failure: None,
            cluster_id: None,
            store_revision: 0,
            last_heartbeat: None,
            cluster_config: if config_required {
                ClusterConfigState::Missing
            } else {
                ClusterConfigState::NotRequired
            },
            sections: BTreeMap::new(),
        }
    }

    /// Whether the store answers.
    pub fn connected(&self) -> bool {
        matches!(self.connection, Connection::Connected)
    }

    /// Whether everything that is followed is complete and being followed now: connected, the cluster configuration
    /// found, every section synchronized over this connection.
    pub fn ready(&self) -> bool {
        self.connected()
            && self.cluster_config != ClusterConfigState::Missing
            && self.sections.values().all(|section| section.phase == SectionPhase::Following)
    }

    /// Whether every section has been complete at least once.
    pub fn synced(&self) -> bool {
        self.sections.values().all(|section| section.synced)
    }
}

/// Where a reader's connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Connection {
    /// No connection yet, or none any more; one is being made.
    Connecting,
    /// TCP and TLS are there; the list of the heartbeat has not been answered yet.
    Probing,
    /// The store has answered.
    Connected,
    /// The last attempt failed; the next one waits.
    BackingOff,
    /// The reader was dropped.
    Stopped,
}

/// Whether the store's cluster configuration is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClusterConfigState {
    /// This reader does not ask for one.
    NotRequired,
    /// Not found yet on this connection.
    Missing,
    /// Found.
    Retrieved,
}

/// Where a section stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SectionPhase {
    /// There is no connection, or the cluster configuration is not known.
    WaitingForConnection,
    /// The exporter has not said yet that the section is complete.
    WaitingForCanary,
    /// The section is being listed.
    Listing,
    /// Listed, and followed since.
    Following,
    /// The last attempt failed while the connection holds; the next one waits.
    BackingOff,
}

/// The state of one section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SectionStatus {
    /// Where it stands.
    pub phase: SectionPhase,
    /// Whether it has been complete since the reader was made, over this connection or an earlier one.
    pub synced: bool,
    /// The revision that it is known to be complete up to, 0 before the first list. The store's revision less this
    /// one is the lag, in revisions.
    pub revision: i64,
    /// When it was last known to be complete: the age of the data is the time since.
    pub confirmed: Option<DateTime<Utc>>,
    /// When a key last changed.
    pub last_event: Option<DateTime<Utc>>,
    /// How many keys the consumer has been told of.
    pub keys: usize,
    /// How many keys and values were left out so far: too large, too many, or of an unknown kind.
    pub skipped: u64,
    /// What went wrong last, in this section alone.
    pub last_error: Option<String>,
}

impl SectionStatus {
    pub(super) fn new() -> Self {
        Self {
            phase: SectionPhase::WaitingForConnection,
            synced: false,
            revision: 0,
            confirmed: None,
            last_event: None,
            keys: 0,
            skipped: 0,
            last_error: None,
        }
    }

    /// How many revisions the section may be behind a store at `store_revision`.
    pub fn lag(&self, store_revision: i64) -> i64 {
        (store_revision - self.revision).max(0)
    }
}
