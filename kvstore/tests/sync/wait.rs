//! Waiting for conditions, with a deadline that only a broken program reaches.

use std::{collections::BTreeMap, time::Duration};

use isthmus_kvstore::reader::{Reader, ReaderStatus, SectionEvent};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

/// When to give up. Nothing takes so long on a machine that is merely slow.
pub(crate) const DEADLINE: Duration = Duration::from_secs(90);

/// Waits until `condition` holds.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !condition().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(timeout(DEADLINE, wait).await.is_ok(), "waited in vain: {what}");
}

/// Waits until the reader's status is as wanted, and returns it.
pub(crate) async fn until_status(
    reader: &Reader,
    what: &str,
    wanted: impl FnMut(&ReaderStatus) -> bool,
) -> ReaderStatus {
    let mut status = reader.status();
    match timeout(DEADLINE, status.wait_for(wanted)).await {
        Ok(status) => status.unwrap().clone(),
        Err(_) => panic!("waited in vain: {what}; the status is {:#?}", *reader.status().borrow()),
    }
}

/// A consumer of one section that keeps what it is told and checks that it is told sense.
#[derive(Debug)]
pub(crate) struct Consumer {
    events: mpsc::Receiver<SectionEvent>,
    pub(crate) map: BTreeMap<String, String>,
    /// How often the section was said to be complete.
    pub(crate) synced: usize,
    /// Every deletion so far.
    pub(crate) deleted: Vec<String>,
}

impl Consumer {
    pub(crate) fn new(events: mpsc::Receiver<SectionEvent>) -> Self {
        Self { events, map: BTreeMap::new(), synced: 0, deleted: Vec::new() }
    }

    /// Takes in everything that is there.
    pub(crate) fn drain(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.take(event);
        }
    }

    /// Takes events in until the condition holds.
    pub(crate) async fn until(&mut self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let wait = async {
            while !condition(self) {
                let event = self.events.recv().await;
                self.take(event.expect("the reader lives"));
            }
        };
        let done = timeout(DEADLINE, wait).await.is_ok();
        assert!(done, "waited in vain: {what}; {} keys, synced {} times", self.map.len(), self.synced);
    }

    pub(crate) async fn until_synced(&mut self) {
        let before = self.synced;
        self.until("synchronized", |this| this.synced > before).await;
    }

    fn take(&mut self, event: SectionEvent) {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        match event {
            SectionEvent::Put { key, value, .. } => {
                let old = self.map.insert(text(&key), text(&value));
                assert_ne!(
                    old.as_deref(),
                    Some(text(&value).as_str()),
                    "{key:?} was told without a difference"
                );
            }
            SectionEvent::Delete { key, .. } => {
                let old = self.map.remove(&text(&key));
                assert!(old.is_some(), "{key:?} was deleted but never put");
                self.deleted.push(text(&key));
            }
            SectionEvent::Synced { .. } => self.synced += 1,
        }
    }
}
