//! Writing a section so that its readers know when it is complete.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use chrono::{SecondsFormat, Utc};

use super::Writer;
use crate::section::Section;

/// Writes one section (wire format, section A.4): everything first, then the canary.
#[derive(Debug)]
pub struct SectionWriter {
    writer: Writer,
    section: Section,
    /// What this run has put so far; none once the section is complete.
    initial: Mutex<Option<HashSet<Bytes>>>,
}

impl SectionWriter {
    pub(super) fn new(writer: Writer, section: Section) -> Self {
        Self { writer, section, initial: Mutex::new(Some(HashSet::new())) }
    }

    /// The section that is written.
    pub fn section(&self) -> &Section {
        &self.section
    }

    /// The key, given whole, shall have this value. Never waits.
    pub fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        let key = key.into();
        if let Some(initial) = &mut *self.initial() {
            initial.insert(key.clone());
        }
        self.writer.put(key, value);
    }

    /// The key, given whole, shall not exist. Never waits.
    pub fn delete(&self, key: impl Into<Bytes>) {
        let key = key.into();
        if let Some(initial) = &mut *self.initial() {
            initial.remove(&key);
        }
        self.writer.delete(key);
    }

    /// The section's keys in the store, what an earlier run left too. On the etcd engine, as far as etcd has been followed.
    pub fn keys(&self) -> Vec<Bytes> {
        self.writer.keys_below(&self.section.directory())
    }

    /// Puts what an earlier run left of the section, its canary too, as it is: whoever left it renews its leases no more, and
    /// it would go with them before it is known whether it should. What has not been put by itself by
    /// [`SectionWriter::finish_initial`] is removed then all the same.
    pub fn take_over(&self) {
        for key in self.keys().into_iter().chain(self.section.canary.clone()) {
            if let Some(value) = self.writer.value(&key) {
                self.writer.put(key, value);
            }
        }
    }

    /// Everything that the section shall hold has been put. Waits until it is in the store, removes what an earlier
    /// run left below the prefix, and then writes the canary, if the section has one. Called again, it only waits for
    /// what was put meanwhile and writes the canary again.
    ///
    /// May be called again if it was dropped before it was done.
    pub async fn finish_initial(&self) {
        // New before old: a reader may see a key that is about to go, but never misses one that is to stay.
        self.writer.flush().await;
        let leftovers: Vec<Bytes> = match &*self.initial() {
            None => Vec::new(),
            Some(initial) => self.keys().into_iter().filter(|key| !initial.contains(key)).collect(),
        };
        if !leftovers.is_empty() {
            tracing::info!(
                section = self.section.name(),
                count = leftovers.len(),
                "removing what an earlier run left"
            );
        }
        for key in leftovers {
            // A put that came in while this was going on is newer than the list.
            if self.initial().as_ref().is_some_and(|initial| !initial.contains(&key)) {
                self.writer.delete(key);
            }
        }
        self.writer.flush().await;
        *self.initial() = None;
        if let Some(canary) = &self.section.canary {
            self.writer.put(canary.clone(), Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true));
            self.writer.flush().await;
        }
    }

    /// Removes the section: first the canary, so that nobody takes what is left for the whole, then every key.
    pub async fn remove(&self) {
        *self.initial() = Some(HashSet::new());
        if let Some(canary) = &self.section.canary {
            self.writer.delete(canary.clone());
        }
        self.writer.flush().await;
        for key in self.keys() {
            self.writer.delete(key);
        }
        self.writer.flush().await;
    }

    fn initial(&self) -> std::sync::MutexGuard<'_, Option<HashSet<Bytes>>> {
        self.initial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
