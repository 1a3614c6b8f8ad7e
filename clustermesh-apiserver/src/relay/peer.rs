//! One peer: a task that reads its store, checks what it says, and mirrors it into the own one.
//!
//! ```text
//!   configured ──▶ following ──(configuration changed)──▶ following, everything marked and told again
//!                   │     └─(cluster id changed)──▶ everything deleted, then following
//!                   └─(removed)──▶ cluster-config deleted ──(grace)──▶ everything deleted ──▶ ended
//! ```
//!
//! A peer that cannot be reached keeps what was mirrored of it, for ever unless [`Timing::cache_ttl`] is set. One that refuses
//! this cluster's certificate has let go of this cluster, or is about to: before its nodes stop listening, nothing new
//! is to go there. So its description is taken away, as that of a removed peer is, until it takes the certificate again.
//! A relay with a new store has no description to take away, and nothing else by which agents could tell such a peer from one out
//! of reach. So it is said in a key of its own as well, for them alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll};
use isthmus_kvstore::Section;
use isthmus_kvstore::reader::{
    FailureCause, Reader, ReaderConfig, ReaderStatus, SectionBounds, SectionEvent,
};
use isthmus_kvstore::writer::{SectionWriter, Writer};
use isthmus_wire::{ClusterConfig, ClusterId, ClusterName, Key, Prefix, Resource};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::Timing;
use super::admission::{Refusal, Registry, Reservation};
use super::metrics::Metrics;
use super::mirror::Mirror;
use super::peers::PeerConfig;
use super::view::Shown;
use crate::status::Counts;

/// How often a peer whose id another one has is looked at again.
const READMIT: Duration = Duration::from_secs(5);
/// The least time between the beginnings of two readings: a peer that changes its mind all the time keeps nobody busy.
const REREAD: Duration = Duration::from_secs(1);
/// How often a quiet peer is asked how far it is: what status shows as data age and lag is no older. There are few
/// peers, so this costs little; agents, of which there are many, ask less often.
const PROGRESS: Duration = Duration::from_secs(5);

/// What a peer may make us keep, per resource: several times what the largest Kubernetes clusters have, and so little that
/// a hostile one fills no memory.
const BOUNDS: SectionBounds =
    SectionBounds { key_bytes: 4 << 10, value_bytes: 2 << 20, keys: 500_000, total_bytes: 256 << 20 };

/// Rejected entries and cluster configurations that are logged one by one, per peer and reason; of later ones every power
/// of two.
const REJECTIONS_LOGGED: u64 = 32;

/// What a peer's task needs.
pub(super) struct Peer {
    pub(super) name: ClusterName,
    pub(super) registry: Registry,
    pub(super) writer: Writer,
    pub(super) timing: Timing,
    pub(super) metrics: Arc<Metrics>,
    /// The present configuration; none once it was removed.
    pub(super) config: watch::Receiver<Option<PeerConfig>>,
    pub(super) view: Shown,
    /// There while readers are told that the peer refuses this cluster.
    pub(super) withheld: Option<Withheld>,
    pub(super) shutdown: CancellationToken,
}

/// What is kept from readers because the peer refuses this cluster.
pub(super) struct Withheld {
    /// What the peer said of itself before. None if the store is newer than that.
    description: Option<ClusterConfig>,
}

/// Why following a store ended.
enum Ended {
    /// Another configuration, or other capabilities: read again from the start, keeping what is mirrored meanwhile.
    Changed,
    /// It is another cluster now: nothing mirrored of the old one is true any more.
    Exchanged,
    Removed,
    Shutdown,
}

impl Peer {
    /// Runs until the peer was removed and what was mirrored is deleted, or until shutdown.
    pub(super) async fn run(mut self) {
        self.take_over();
        let mut mirror = Mirror::default();
        self.recollect();
        loop {
            let Some(config) = self.config.borrow_and_update().clone() else {
                self.drain(&mut mirror).await;
                return;
            };
            self.view.send_modify(|view| view.origin = Some(config.origin.clone()));
            let begun = Instant::now();
            match self.follow(&config, &mut mirror).await {
                Ended::Changed => self.describe_again(),
                Ended::Removed => continue,
                Ended::Exchanged => self.delete_all(&mut mirror).await,
                Ended::Shutdown => return,
            }
            tokio::select! {
                () = sleep_until(begun + REREAD) => {}
                () = self.shutdown.cancelled() => return,
            }
        }
    }

    /// Stands behind what an earlier leader has mirrored, until the peer itself says what is true: it may be out of reach.
    fn take_over(&self) {
        let config = Key::ClusterConfig(self.name.clone()).to_bytes();
        if let Some(value) = self.writer.value(&config) {
            self.writer.put(config, value);
        }
        Resource::ALL.into_iter().for_each(|resource| self.section(resource).take_over());
    }

    /// Reads the store that `config` names until something about it changes.
    async fn follow(&mut self, config: &PeerConfig, mirror: &mut Mirror) -> Ended {
        mirror.reread();
        // The version of the Secret that says so; it may be written again and say the same.
        let mut version = config.version.clone();
        let reader_config = ReaderConfig {
            progress_interval: PROGRESS,
            bounds: BOUNDS,
            metrics: self.metrics.client().clone(),
            ..ReaderConfig::new(config.client.clone())
        };
        let reader = Reader::spawn(self.name.clone(), reader_config);
        self.view.send_modify(|view| view.limiter = Some(reader.limiter()));
        let mut following = Following {
            config: reader.cluster_config(),
            status: reader.status(),
            admitted: None,
            events: SelectAll::new(),
            reader,
        };
        let mut readmit = Instant::now() + READMIT;
        let mut lost: Option<Instant> = None;
        let mut revoked = false;
        let mut refused: Option<Instant> = None;
        // The configuration may be there already.
        following.config.mark_changed();
        following.status.mark_changed();
        loop {
            let expiry = match (self.timing.cache_ttl, lost) {
                (Some(ttl), Some(since)) if !revoked => Some(since + ttl),
                _ => None,
            };
            let withhold = match refused {
                Some(since) if self.withheld.is_none() => Some(since + self.timing.refusal_patience()),
                _ => None,
            };
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return Ended::Shutdown,
                Ok(()) = self.config.changed() => {
                    match self.config.borrow_and_update().as_ref() {
                        None => return Ended::Removed,
                        Some(new) if !new.connects_like(config) => return Ended::Changed,
                        // The same in another place, or written again.
                        Some(new) => {
                            version = new.version.clone();
                            let connected = following.status.borrow().connected();
                            self.view.send_modify(|view| {
                                view.origin = Some(new.origin.clone());
                                if connected {
                                    view.observed = version.clone();
                                }
                            });
                        }
                    }
                }
                Ok(()) = following.config.changed() => {
                    let value = following.config.borrow_and_update().clone();
                    if let Some(ended) = self.admit(&mut following, mirror, value) {
                        return ended;
                    }
                }
                () = sleep_until(readmit), if following.admitted.is_none() => {
                    readmit = Instant::now() + READMIT;
                    let value = following.config.borrow().clone();
                    if let Some(ended) = self.admit(&mut following, mirror, value) {
                        return ended;
                    }
                }
                Ok(()) = following.status.changed() => {
                    let status = following.status.borrow_and_update().clone();
                    self.metrics.connection(&self.name, &status);
                    match (status.connected(), lost) {
                        (true, Some(_)) => {
                            lost = None;
                            if std::mem::take(&mut revoked) {
                                self.restore(mirror);
                            }
                        }
                        (false, None) if status.synced() => lost = Some(Instant::now()),
                        _ => {}
                    }
                    if status.connected() {
                        refused = None;
                        self.describe_again();
                    } else if status.last_cause == Some(FailureCause::CertificateRefused) {
                        refused.get_or_insert_with(Instant::now);
                    }
                    self.view.send_modify(|view| {
                        if status.connected() {
                            view.observed = version.clone();
                        }
                        view.reader = Some(status);
                    });
                }
                Some((resource, event)) = following.events.next(), if !following.events.is_empty() => {
                    self.event(&mut following, mirror, resource, event).await;
                }
                () = sleep_until(expiry.unwrap_or_else(Instant::now)), if expiry.is_some() => {
                    revoked = true;
                    self.revoke(mirror).await;
                }
                () = sleep_until(withhold.unwrap_or_else(Instant::now)), if withhold.is_some() => {
                    refused = None;
                    self.withhold();
                }
            }
        }
    }

    /// Looks at the peer's cluster configuration. The first one that is admitted begins the mirroring; a later one that
    /// differs in what matters ends this reading.
    fn admit(&mut self, following: &mut Following, mirror: &Mirror, value: Option<Bytes>) -> Option<Ended> {
        // Deleted: a peer that shuts down. What is mirrored stays, as with a peer that cannot be reached.
        let value = value?;
        let config = match ClusterConfig::decode(&value) {
            Ok(config) => config,
            Err(error) => {
                self.refuse(&Refusal::Malformed(error));
                return None;
            }
        };
        if let Some(admitted) = &following.admitted {
            if admitted.config.id != config.id {
                tracing::warn!(peer = %self.name, old = %admitted.config.id, new = %config.id,
                    "the peer has another cluster id; deleting what was mirrored");
                return Some(Ended::Exchanged);
            }
            // One that could not be used may have come in between.
            self.view.send_if_modified(|view| view.refusal.take().is_some());
            return (admitted.config != config).then_some(Ended::Changed);
        }
        // The first id of this reading, but perhaps another than the one that is mirrored.
        if self.mirrored_id().is_some_and(|id| id != config.id) {
            return Some(Ended::Exchanged);
        }
        let reservation = match self.registry.admit(&self.name, &config) {
            Ok(reservation) => reservation,
            Err(refusal) => {
                self.refuse(&refusal);
                return None;
            }
        };
        tracing::info!(peer = %self.name, id = %config.id, "peer admitted");
        self.view.send_modify(|view| {
            view.cluster_id = Some(config.id.number());
            view.refusal = None;
        });
        self.begin(following, mirror, config, reservation);
        None
    }

    fn begin(
        &mut self,
        following: &mut Following,
        mirror: &Mirror,
        config: ClusterConfig,
        reservation: Reservation,
    ) {
        let mut sections = BTreeMap::new();
        for resource in Resource::ALL {
            let section = self.section(resource);
            // What an earlier connection told stays until this one has told everything.
            for cached in mirror.entries(resource) {
                section.put(cached.key, cached.value);
            }
            let exported = match resource {
                Resource::Services => config.capabilities.endpoint_slices_export_mode.exports_services(),
                Resource::EndpointSlices => config.capabilities.endpoint_slices_export_mode.exports_slices(),
                Resource::ServiceExports => config.capabilities.service_exports_enabled.is_some(),
                Resource::Nodes | Resource::Identities | Resource::Ip => true,
            };
            if exported {
                let theirs = match config.capabilities.cached {
                    true => Prefix::Cache(resource),
                    false => Prefix::State(resource),
                };
                let canary = Key::canary(&self.name, theirs).to_bytes();
                let events = following.reader.follow(Section::new(theirs.range(&self.name), Some(canary)));
                following
                    .events
                    .push(ReceiverStream::new(events).map(move |event| (resource, event)).boxed());
            }
            // The rest have no keys; their canary is written with the others', for who waits for all of them.
            sections.insert(resource, Progress { section, exported, synced: !exported });
        }
        self.describe(&config);
        following.admitted = Some(Admitted { config, reservation, sections, announced: false });
    }

    /// Tells readers what the peer says of itself, and that it is read from here: so it does not refuse this cluster.
    fn describe(&mut self, config: &ClusterConfig) {
        let mut cached = config.clone();
        cached.capabilities.cached = true;
        cached.capabilities.synced_canaries = true;
        self.writer.put(Key::ClusterConfig(self.name.clone()).to_bytes(), cached.encode());
        self.withhold_no_more();
    }

    /// The peer refuses this cluster: readers are to send nothing new there, as if it had been removed. What was mirrored
    /// stays for what is open, and for services that nobody else has.
    fn withhold(&mut self) {
        tracing::warn!(peer = %self.name,
            "the peer refuses this cluster's certificate: it has disconnected this cluster, or lost its authority; nothing new is sent to its services while others have them");
        let description = self.described();
        self.writer.put(Key::Refusing(self.name.clone()).to_bytes(), "true");
        self.writer.delete(Key::ClusterConfig(self.name.clone()).to_bytes());
        self.withheld = Some(Withheld { description });
        self.view.send_modify(|view| view.withheld = true);
    }

    /// The peer takes this cluster again, or is to be asked anew.
    fn describe_again(&mut self) {
        let description = self.withheld.as_ref().and_then(|withheld| withheld.description.clone());
        match description {
            Some(config) => self.describe(&config),
            // It has to say again what it is.
            None => self.withhold_no_more(),
        }
    }

    /// Says no more that the peer refuses this cluster. Comes after its description, so that readers never lack both.
    fn withhold_no_more(&mut self) {
        if self.withheld.take().is_some() {
            self.writer.delete(Key::Refusing(self.name.clone()).to_bytes());
            self.view.send_modify(|view| view.withheld = false);
        }
    }

    /// A store that outlives the process still says what an earlier run has found out.
    fn recollect(&mut self) {
        let refusing = Key::Refusing(self.name.clone()).to_bytes();
        if self.writer.value(&refusing).is_none() {
            return;
        }
        match self.described() {
            // It was interrupted in between, on the way there or back.
            Some(_) => self.writer.delete(refusing),
            None => {
                self.writer.put(refusing, "true");
                self.withheld = Some(Withheld { description: None });
                self.view.send_modify(|view| view.withheld = true);
            }
        }
    }

    async fn event(
        &mut self,
        following: &mut Following,
        mirror: &mut Mirror,
        resource: Resource,
        event: SectionEvent,
    ) {
        let Some(admitted) = &mut following.admitted else { return };
        let Some(progress) = admitted.sections.get_mut(&resource) else { return };
        match event {
            SectionEvent::Put { key, value, .. } => {
                match mirror.put(admitted.reservation.remote(), resource, key, value) {
                    Ok(cached) => progress.section.put(cached.key, cached.value),
                    Err(rejection) => {
                        let reason = rejection.reason();
                        self.metrics.rejected(&self.name, reason);
                        let mut count = 0;
                        self.view.send_modify(|view| {
                            let rejected = view.rejected.entry(reason).or_default();
                            *rejected += 1;
                            count = *rejected;
                        });
                        if is_logged(count) {
                            tracing::warn!(peer = %self.name, reason, count, error = %rejection,
                                "entry of a peer rejected; the rest goes on");
                        }
                    }
                }
            }
            SectionEvent::Delete { key, .. } => {
                if let Some(cached) = mirror.delete(resource, &key) {
                    progress.section.delete(cached);
                }
            }
            SectionEvent::Synced { .. } => {
                for cached in mirror.sweep(resource) {
                    progress.section.delete(cached);
                }
                if !std::mem::replace(&mut progress.synced, true) {
                    if !self.finish_initial(&progress.section).await {
                        return;
                    }
                    self.view.send_modify(|view| {
                        view.written.insert(resource);
                    });
                }
                if !admitted.announced && admitted.sections.values().all(|progress| progress.synced) {
                    admitted.announced = true;
                    for (resource, progress) in
                        admitted.sections.iter().filter(|(_, progress)| !progress.exported)
                    {
                        // What the peer exported before it stopped exporting this resource at all.
                        for cached in mirror.sweep(*resource) {
                            progress.section.delete(cached);
                        }
                        if !self.finish_initial(&progress.section).await {
                            return;
                        }
                        self.view.send_modify(|view| {
                            view.written.insert(*resource);
                        });
                    }
                    tracing::info!(peer = %self.name, "peer synchronized");
                    self.view.send_modify(|view| view.synced = true);
                }
            }
        }
        self.count(mirror);
    }

    /// Takes services back that a peer, out of reach for too long, may no longer have. Nodes, identities and addresses
    /// stay: they harm nobody, and open connections need them.
    async fn revoke(&mut self, mirror: &Mirror) {
        tracing::warn!(peer = %self.name, "out of reach for longer than --clustermesh-cache-ttl; its services are withdrawn");
        self.metrics.revoked(&self.name);
        for resource in [Resource::Services, Resource::ServiceExports, Resource::EndpointSlices] {
            // What an earlier leader mirrored, and this one could not read, is no younger.
            let left = self.section(resource).keys();
            for key in mirror.entries(resource).map(|cached| cached.key).chain(left) {
                self.writer.delete(key);
            }
        }
        self.flush().await;
    }

    /// The peer is back: what was revoked is written again. What changed meanwhile follows from its store.
    fn restore(&mut self, mirror: &Mirror) {
        for resource in [Resource::Services, Resource::ServiceExports, Resource::EndpointSlices] {
            for cached in mirror.entries(resource) {
                self.writer.put(cached.key, cached.value);
            }
        }
    }

    /// The peer was removed: readers are told at once, and what was mirrored goes after the grace period, when they have
    /// let go of it. A peer that is configured again meanwhile waits for the end.
    async fn drain(&mut self, mirror: &mut Mirror) {
        tracing::info!(peer = %self.name, grace = ?self.timing.drain_grace, "peer removed; draining");
        self.view.send_modify(|view| view.draining = true);
        self.writer.delete(Key::ClusterConfig(self.name.clone()).to_bytes());
        tokio::select! {
            () = sleep(self.timing.drain_grace) => {}
            () = self.shutdown.cancelled() => return,
        }
        self.delete_all(mirror).await;
        tracing::info!(peer = %self.name, "peer drained");
    }

    /// Canaries first, so that nobody takes the emptying for the whole. What an earlier run left goes too.
    async fn delete_all(&mut self, mirror: &mut Mirror) {
        self.writer.delete(Key::ClusterConfig(self.name.clone()).to_bytes());
        for resource in Resource::ALL {
            self.writer.delete(Key::canary(&self.name, Prefix::Cache(resource)).to_bytes());
        }
        self.view.send_modify(|view| view.written.clear());
        self.flush().await;
        // A store that follows etcd need not show all of it yet.
        for key in mirror.clear() {
            self.writer.delete(key);
        }
        self.withhold_no_more();
        for resource in Resource::ALL {
            let section = self.section(resource);
            tokio::select! {
                () = section.remove() => {}
                () = self.shutdown.cancelled() => return,
            }
        }
        self.view.send_modify(|view| {
            view.cluster_id = None;
            view.synced = false;
        });
        self.count(mirror);
    }

    /// Where a resource is mirrored to.
    fn section(&self, resource: Resource) -> SectionWriter {
        let prefix = Prefix::Cache(resource);
        let canary = Key::canary(&self.name, prefix).to_bytes();
        self.writer.section(Section::new(prefix.range(&self.name), Some(canary)))
    }

    /// The id of the cluster that is mirrored at present, also by an earlier run.
    fn mirrored_id(&self) -> Option<ClusterId> {
        let withheld = self.withheld.as_ref().and_then(|withheld| withheld.description.as_ref());
        withheld.map(|config| config.id).or_else(|| self.described().map(|config| config.id))
    }

    /// What readers are told at present, also by an earlier run.
    fn described(&self) -> Option<ClusterConfig> {
        let value = self.writer.value(&Key::ClusterConfig(self.name.clone()).to_bytes())?;
        ClusterConfig::decode(&value).ok()
    }

    /// Waits until a section is in the own store whole, or for the shutdown. Whether it is.
    async fn finish_initial(&self, section: &SectionWriter) -> bool {
        self.shutdown.run_until_cancelled(section.finish_initial()).await.is_some()
    }

    /// Waits until the own store has taken everything, or for the shutdown.
    async fn flush(&self) {
        tokio::select! {
            () = self.writer.flush() => {}
            () = self.shutdown.cancelled() => {}
        }
    }

    fn refuse(&mut self, refusal: &Refusal) {
        if self.view.borrow().refusal.as_ref() != Some(refusal) {
            self.metrics.rejected(&self.name, "cluster_config");
            let mut count = 0;
            self.view.send_modify(|view| {
                view.refusal = Some(refusal.clone());
                view.refusals += 1;
                count = view.refusals;
            });
            if is_logged(count) {
                tracing::error!(peer = %self.name, count, reason = %refusal, "peer refused");
            }
        }
    }

    fn count(&self, mirror: &Mirror) {
        self.view.send_modify(|view| {
            view.counts = Counts {
                nodes: mirror.len(Resource::Nodes),
                identities: mirror.len(Resource::Identities),
                endpoints: mirror.len(Resource::Ip),
                services: mirror.len(Resource::Services),
                endpoint_slices: mirror.len(Resource::EndpointSlices),
                service_exports: mirror.len(Resource::ServiceExports),
            };
        });
    }
}

/// Whether what a peer is told off for so often is logged: one that does nothing else must not fill the log.
fn is_logged(count: u64) -> bool {
    count <= REJECTIONS_LOGGED || count.is_power_of_two()
}

/// One reading of a peer's store.
struct Following {
    reader: Reader,
    config: watch::Receiver<Option<Bytes>>,
    status: watch::Receiver<ReaderStatus>,
    admitted: Option<Admitted>,
    events: SelectAll<BoxStream<'static, (Resource, SectionEvent)>>,
}

/// What is known of a peer that may take part.
struct Admitted {
    config: ClusterConfig,
    reservation: Reservation,
    sections: BTreeMap<Resource, Progress>,
    /// Every section was complete, and the canaries of those without keys are written.
    announced: bool,
}

struct Progress {
    section: SectionWriter,
    /// Whether the peer exports it at all.
    exported: bool,
    synced: bool,
}
