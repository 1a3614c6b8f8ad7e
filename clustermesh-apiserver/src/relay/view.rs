//! What a peer's task shows to the outside, and what people and programs make of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use isthmus_crds::SecretVersion;
use isthmus_kvstore::reader::{FailureCause, ReaderStatus, SectionPhase};
use isthmus_wire::ClusterName;
use isthmus_wire::validate::Incompatible;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::Timing;
use super::admission::Refusal;
use super::peers::Origin;
use crate::status::{Counts, PeerCause, PeerState, PeerStatus};

/// What a peer's task shows to the outside.
#[derive(Clone, Debug)]
pub(super) struct PeerView {
    /// What configures it; none if an earlier run mirrored it, and nothing configures it now.
    pub(super) origin: Option<Origin>,
    /// The version of the Secret that the connection in use is made by.
    pub(super) observed: Option<SecretVersion>,
    pub(super) reader: Option<ReaderStatus>,
    pub(super) cluster_id: Option<u16>,
    pub(super) refusal: Option<Refusal>,
    /// How often it was another one.
    pub(super) refusals: u64,
    pub(super) draining: bool,
    /// It refuses this cluster, and readers are told to send nothing new there.
    pub(super) withheld: bool,
    /// Every section was complete at least once since the process started.
    pub(super) synced: bool,
    pub(super) counts: Counts,
    pub(super) rejected: BTreeMap<&'static str, u64>,
    pub(super) since: Instant,
}

impl PeerView {
    pub(super) fn new(origin: Option<Origin>) -> Self {
        Self {
            origin,
            observed: None,
            reader: None,
            cluster_id: None,
            refusal: None,
            refusals: 0,
            draining: false,
            withheld: false,
            synced: false,
            counts: Counts::default(),
            rejected: BTreeMap::new(),
            since: Instant::now(),
        }
    }
}

/// A view that is shown: whoever follows all peers at once hears of each change.
pub(super) struct Shown {
    view: watch::Sender<PeerView>,
    changed: Arc<Notify>,
}

impl Shown {
    pub(super) fn new(view: PeerView, changed: Arc<Notify>) -> (Self, watch::Receiver<PeerView>) {
        let (view, seen) = watch::channel(view);
        (Self { view, changed }, seen)
    }

    pub(super) fn borrow(&self) -> watch::Ref<'_, PeerView> {
        self.view.borrow()
    }

    pub(super) fn send_modify(&self, modify: impl FnOnce(&mut PeerView)) {
        self.view.send_modify(modify);
        self.changed.notify_one();
    }

    pub(super) fn send_if_modified(&self, modify: impl FnOnce(&mut PeerView) -> bool) {
        if self.view.send_if_modified(modify) {
            self.changed.notify_one();
        }
    }
}

impl PeerView {
    /// What people and programs are told of the peer.
    pub(super) fn status(&self, name: &ClusterName) -> PeerStatus {
        let now = chrono::Utc::now();
        let reader = self.reader.as_ref();
        let sections = || reader.into_iter().flat_map(|reader| reader.sections.values());
        let connected = !self.draining && reader.is_some_and(ReaderStatus::connected);
        let last_error = reader.and_then(|reader| reader.last_error.clone());
        let (state, cause, reason) = if self.draining {
            let reason = "it was removed; what was mirrored of it goes after the grace period".to_owned();
            (PeerState::Draining, PeerCause::Draining, Some(reason))
        } else if let Some(refusal) = &self.refusal {
            (PeerState::Refused, refusal_cause(refusal), Some(refusal.to_string()))
        } else if !connected {
            let mut reason = last_error.clone().unwrap_or_else(|| "no answer yet".to_owned());
            if self.withheld {
                reason.push_str("; its services are used only where no other cluster has them");
            }
            (PeerState::Connecting, connection_cause(reader), Some(reason))
        } else if self.cluster_id.is_none() {
            let reason = format!(
                "it has not written cilium/cluster-config/{name}: is its apiserver up, and named {name}?"
            );
            (PeerState::AwaitingConfiguration, PeerCause::AwaitingConfiguration, Some(reason))
        } else if !self.synced || !reader.is_some_and(ReaderStatus::ready) || sections().next().is_none() {
            // A new reading has no sections for a moment, until the peer's configuration has been looked at.
            let waiting = reader
                .into_iter()
                .flat_map(|reader| &reader.sections)
                .find(|(_, section)| section.phase != SectionPhase::Following);
            let reason = waiting.map(|(prefix, section)| match &section.last_error {
                Some(error) => format!("{prefix}: {error}"),
                None => format!("{prefix}: {:?}", section.phase),
            });
            let reason = reason.unwrap_or_else(|| "the first lists are under way".to_owned());
            (PeerState::Synchronizing, PeerCause::Synchronizing, Some(reason))
        } else {
            (PeerState::Ready, PeerCause::Mirrored, None)
        };
        let confirmed = sections().map(|section| section.confirmed).min().flatten();
        let store_revision = reader.map_or(0, |reader| reader.store_revision);
        PeerStatus {
            name: name.to_string(),
            cluster_id: self.cluster_id,
            state,
            source: self.origin.clone(),
            observed_secret: self.observed.clone().filter(|_| !self.draining),
            cause,
            reason,
            connected,
            address: reader.and_then(|reader| reader.address).filter(|_| connected),
            endpoint: reader.and_then(|reader| reader.endpoint.clone()).filter(|_| connected),
            confirmed,
            data_age_seconds: confirmed.map(|at| (now - at).num_milliseconds().max(0) as f64 / 1000.0),
            revision: sections().map(|section| section.revision).min().unwrap_or(0),
            revision_lag: sections().map(|section| section.lag(store_revision)).max().unwrap_or(0),
            counts: self.counts,
            rejected: self.rejected.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect(),
            failures: reader.map_or(0, |reader| reader.failures),
            last_error,
            last_failure: reader.and_then(|reader| reader.last_failure),
        }
    }

    /// Whether readiness need not wait for this peer: it was complete once, or it cannot be at the moment.
    pub(super) fn settled(&self, timing: &Timing) -> bool {
        let connected = self.reader.as_ref().is_some_and(ReaderStatus::connected);
        self.synced
            || self.draining
            || self.refusal.is_some()
            || (!connected && self.since.elapsed() >= timing.peer_ready_timeout)
    }
}

fn refusal_cause(refusal: &Refusal) -> PeerCause {
    match refusal {
        Refusal::IdTaken { .. } | Refusal::Incompatible(Incompatible::OwnId(_)) => PeerCause::IdConflict,
        Refusal::Malformed(_) | Refusal::Incompatible(_) => PeerCause::Refused,
    }
}

fn connection_cause(reader: Option<&ReaderStatus>) -> PeerCause {
    match reader.and_then(|reader| reader.last_cause) {
        None => PeerCause::Connecting,
        Some(FailureCause::NameNotResolved) => PeerCause::NameNotResolved,
        Some(FailureCause::Unreachable) => PeerCause::Unreachable,
        Some(FailureCause::CertificateExpired) => PeerCause::CertificateExpired,
        Some(FailureCause::CertificateNotTrusted) => PeerCause::CertificateNotTrusted,
        Some(FailureCause::CertificateRefused) => PeerCause::CertificateRefused,
        Some(FailureCause::WrongName) => PeerCause::WrongName,
        Some(FailureCause::Misconfigured) => PeerCause::Misconfigured,
        Some(FailureCause::Lost) => PeerCause::ConnectionLost,
    }
}
