//! Asking a store right now how far it is, for who wants to show the age of the data and the lag.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use tokio::time::timeout;

use super::{ReaderStatus, SectionPhase, Shared};

/// Asks a reader's store how far it is. Outlives the reader, and then answers with its last state.
#[derive(Debug, Clone)]
pub struct Probe(pub(super) Arc<Shared>);

impl Probe {
    /// The reader's state once every section that is being followed has heard from the store, or after `patience`.
    ///
    /// Between the store's own messages a quiet section knows only where it was at the last
    /// [`ReaderConfig::progress_interval`](super::ReaderConfig::progress_interval). Asking costs one small message per
    /// section, so this is for when somebody looks, not for every moment.
    pub async fn status(&self, patience: Duration) -> ReaderStatus {
        let asked = Utc::now();
        let mut status = self.0.status.subscribe();
        self.0.probes.send_modify(|probes| *probes += 1);
        let heard = |status: &ReaderStatus| {
            let following = |phase| status.connected() && phase == SectionPhase::Following;
            status
                .sections
                .values()
                .all(|section| !following(section.phase) || section.confirmed >= Some(asked))
        };
        // In vain: the state tells that it is old.
        let _ = timeout(patience, status.wait_for(heard)).await;
        status.borrow().clone()
    }
}
