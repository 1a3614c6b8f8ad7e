//! Mirrors the peers: the only place where their data enters, and so the trust boundary.
//!
//! A peer's keys come in through `kvstore`'s reader, are parsed and checked here, and go into the own store under
//! `cilium/cache/` (wire format, section A.6). A hostile peer can lie about itself and about nothing else.

mod admission;
mod metrics;
mod mirror;
mod peer;
mod peers;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use isthmus_crds::peer::Relation;
use isthmus_kvstore::config::ClientConfig;
use isthmus_kvstore::writer::Writer;
use isthmus_wire::local::REFUSING;
use isthmus_wire::{ClusterName, Key};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use self::admission::OwnCluster;
use self::admission::Registry;
pub use self::metrics::Metrics;
use self::peer::Peer;
pub use self::peers::{Authorities, SecretSource, Sources, SourcesConfig};
pub(crate) use self::peers::{Origin, Refused};
use self::peers::{PeerConfig, Peers};
pub(crate) use self::view::PeerSync;
use self::view::{PeerView, Shown};
use crate::status::{AdmittedPeer, PeerState, PeerStatus};

/// Why nothing reaches for a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NotReached {
    /// What configures it cannot be used; why.
    Unusable(String),
    /// It may read from us, and nobody asks for more.
    Admitted,
}

/// How the relay is set up.
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// The own cluster.
    pub own: OwnCluster,
    /// Which peers there are.
    pub sources: Sources,
    /// The times that it keeps.
    pub timing: Timing,
}

/// The times that the relay keeps. The defaults are Cilium's.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long what was mirrored of a removed peer stays, so that readers can let go of it. 3 minutes.
    pub drain_grace: Duration,
    /// How long services of an unreachable peer stay; none is for ever, which is the default.
    pub cache_ttl: Option<Duration>,
    /// How long readiness waits for a peer that cannot be reached. 15 s.
    pub peer_ready_timeout: Duration,
    /// How long readiness waits for all peers. 10 minutes.
    pub ready_timeout: Duration,
}

impl Timing {
    /// How long a peer may refuse this cluster's certificate before nothing new is sent to its services. It keeps its
    /// side for the drain grace, which both sides are taken to have alike: three quarters of it are for what is open.
    pub(super) fn refusal_patience(&self) -> Duration {
        self.drain_grace / 4
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            drain_grace: Duration::from_secs(180),
            cache_ttl: None,
            peer_ready_timeout: Duration::from_secs(15),
            ready_timeout: Duration::from_secs(600),
        }
    }
}

/// Mirrors every peer that is configured until `shutdown`. Cheap to clone.
#[derive(Clone)]
pub struct Relay {
    views: watch::Receiver<BTreeMap<ClusterName, watch::Receiver<PeerView>>>,
    peers: watch::Receiver<Peers>,
    changed: Arc<Notify>,
    begun: watch::Receiver<bool>,
    timing: Timing,
    started: Instant,
}

impl Relay {
    /// Begins to mirror into the store behind `writer`. The second part of the answer ends after `shutdown`, when every
    /// peer's task has ended. Must be called within a tokio runtime.
    pub fn spawn(
        config: RelayConfig,
        writer: Writer,
        metrics: Arc<Metrics>,
        shutdown: CancellationToken,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let peers = config.sources.peers;
        let changed = Arc::new(Notify::new());
        let (began, begun) = watch::channel(false);
        let (send, views) = watch::channel(BTreeMap::new());
        let supervisor = Supervisor {
            own: config.own.name.clone(),
            registry: Registry::new(config.own),
            writer,
            timing: config.timing,
            metrics,
            peers: peers.clone(),
            configs: BTreeMap::new(),
            tasks: JoinSet::new(),
            views: send,
            changed: Arc::clone(&changed),
            began,
            shutdown,
        };
        let relay = Self { views, peers, changed, begun, timing: config.timing, started: Instant::now() };
        (relay, tokio::spawn(supervisor.run()))
    }

    /// Where every peer stands, by name.
    pub fn peers(&self) -> Vec<PeerStatus> {
        let status = |(name, view): (&ClusterName, &watch::Receiver<PeerView>)| {
            (name.clone(), view.borrow().status(name))
        };
        // One lock after the other: who holds both may wait for ever for those who would change them.
        let mut all: Vec<_> = self.views.borrow().iter().map(status).collect();
        let peers = self.peers.borrow();
        for (name, status) in all.iter_mut().filter(|(_, status)| status.state == PeerState::Draining) {
            // It was removed and is wanted again: whoever has just connected it is told why it is not.
            if let Some(again) = peers.configured.get(name) {
                status.source = Some(again.origin.clone());
                status.reason = Some(format!(
                    "it was removed before, and is connected again once what was mirrored of it is gone: in {}s at most",
                    self.timing.drain_grace.as_secs()
                ));
            }
        }
        all.into_iter().map(|(_, status)| status).collect()
    }

    /// How far the parts of every peer are, by name.
    pub(crate) fn sync(&self) -> Vec<PeerSync> {
        self.views.borrow().iter().map(|(name, view)| view.borrow().sync(name)).collect()
    }

    /// The clusters that may read from this one, and of which nothing is mirrored, also nothing that is still to go.
    pub fn admitted(&self) -> Vec<AdmittedPeer> {
        // One lock after the other, as in `peers`.
        let mirrored: BTreeSet<ClusterName> = self.views.borrow().keys().cloned().collect();
        let peers = self.peers.borrow();
        let alone = |name: &ClusterName| !mirrored.contains(name) && !peers.configured.contains_key(name);
        let admitted = peers.admitted.iter().filter(|(name, _)| alone(name));
        admitted
            .map(|(name, admission)| AdmittedPeer {
                name: name.to_string(),
                source: admission.origin.clone(),
                observed_secret: admission.version.clone(),
                problem: None,
            })
            .collect()
    }

    /// Waits until something about a peer or a configuration has changed since this was called last. For one caller.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What says how each peer is reached, and what it says; or why nothing reaches for it.
    pub(crate) fn configurations(&self) -> Vec<(ClusterName, Origin, Result<ClientConfig, NotReached>)> {
        let peers = self.peers.borrow();
        let usable = peers
            .configured
            .iter()
            .map(|(name, peer)| (name.clone(), peer.origin.clone(), Ok(peer.client.clone())));
        let unconnected = |name: &ClusterName| !peers.configured.contains_key(name);
        // Of one that is admitted, nothing is wrong with not reaching for it; unless somebody asks for that as well.
        let refused = peers.refused.iter().filter_map(|(origin, refused)| {
            let wanted = |name: &ClusterName| {
                refused.relation == Relation::Connected || !peers.admitted.contains_key(name)
            };
            let name = refused.cluster.clone().filter(|name| unconnected(name) && wanted(name))?;
            Some((name, origin.clone(), Err(NotReached::Unusable(refused.reason.clone()))))
        });
        let mut all: Vec<_> = usable.chain(refused).collect();
        for (name, admission) in &peers.admitted {
            if !all.iter().any(|(known, ..)| known == name) {
                all.push((name.clone(), admission.origin.clone(), Err(NotReached::Admitted)));
            }
        }
        all
    }

    /// Files in the directory that are not used, and why; the directory itself, if it cannot be read.
    pub fn refused_files(&self) -> BTreeMap<String, String> {
        let peers = self.peers.borrow();
        let files = peers.refused.iter().filter_map(|(origin, refused)| match origin {
            Origin::File(name) => Some((name.clone(), refused.reason.clone())),
            Origin::Secret { .. } => None,
        });
        let directory = peers.directory_unread.iter().map(|reason| (".".to_owned(), reason.clone()));
        files.chain(directory).collect()
    }

    /// Secrets that are not used, `namespace/name`, and why.
    pub fn refused_secrets(&self) -> BTreeMap<String, String> {
        let peers = self.peers.borrow();
        let secrets = peers.refused.iter().filter_map(|(origin, refused)| match origin {
            Origin::Secret { namespace, name } => {
                Some((format!("{namespace}/{name}"), refused.reason.clone()))
            }
            Origin::File(_) => None,
        });
        secrets.collect()
    }

    /// Why the Secrets cannot be read at present.
    pub fn secrets_unread(&self) -> Option<String> {
        Some(self.peers.borrow().secrets_unread.as_ref()?.reason.clone())
    }

    /// Every configuration that is not used, with what is needed to tell of it.
    pub(crate) fn refused(&self) -> BTreeMap<Origin, Refused> {
        self.peers.borrow().refused.clone()
    }

    /// Whether a cluster is certainly no peer any more: nothing configures it, and nothing of it is left.
    pub(crate) fn is_gone(&self, cluster: &ClusterName) -> bool {
        // One lock after the other, as in `peers`.
        let removed = *self.begun.borrow() && self.peers.borrow().removed(cluster);
        removed && !self.views.borrow().contains_key(cluster)
    }

    /// What readiness waits for: a peer that can be reached and is not complete yet. None when ready.
    pub fn waiting_for(&self) -> Option<String> {
        if self.started.elapsed() >= self.timing.ready_timeout {
            return None;
        }
        let configured: Vec<_> = {
            let peers = self.peers.borrow();
            if let Some(unread) = peers.secrets_unread.as_ref().filter(|unread| unread.first) {
                return Some(unread.reason.clone());
            }
            peers.configured.keys().cloned().collect()
        };
        let views = self.views.borrow();
        let waiting =
            views.iter().find(|(_, view)| !view.borrow().settled(&self.timing)).map(|(name, _)| name);
        // A peer that was found and has no task yet.
        let unborn = || configured.iter().find(|name| !views.contains_key(*name));
        waiting.or_else(unborn).map(|name| format!("peer {name} is not mirrored completely yet"))
    }
}

struct Supervisor {
    own: ClusterName,
    registry: Registry,
    writer: Writer,
    timing: Timing,
    metrics: Arc<Metrics>,
    peers: watch::Receiver<Peers>,
    /// One per task.
    configs: BTreeMap<ClusterName, watch::Sender<Option<PeerConfig>>>,
    tasks: JoinSet<ClusterName>,
    views: watch::Sender<BTreeMap<ClusterName, watch::Receiver<PeerView>>>,
    changed: Arc<Notify>,
    /// Whether every peer has a task, those that an earlier run mirrored and that are to be drained too.
    began: watch::Sender<bool>,
    shutdown: CancellationToken,
}

impl Supervisor {
    async fn run(mut self) {
        self.peers.mark_changed();
        loop {
            tokio::select! {
                Ok(()) = self.peers.changed() => self.apply(),
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => self.ended(ended),
                () = self.shutdown.cancelled() => break,
            }
        }
        while self.tasks.join_next().await.is_some() {}
    }

    /// Tells every task its present configuration, and gives a task to who has none.
    fn apply(&mut self) {
        let peers = self.peers.borrow_and_update().clone();
        self.metrics.peers(peers.configured.len());
        for (name, config) in &self.configs {
            let present = peers.configured.get(name);
            config.send_if_modified(|config| {
                // One that was removed drains to its end before it begins anew.
                let changed = config.is_some() && config.as_ref() != present;
                if changed {
                    *config = present.cloned();
                }
                changed
            });
        }
        for (name, config) in &peers.configured {
            if !self.configs.contains_key(name) {
                self.start(name.clone(), Some(config.clone()));
            }
        }
        // While a source cannot be read, or a configuration not be understood, nobody is taken for removed.
        if peers.known() {
            for name in self.left_behind() {
                if !self.configs.contains_key(&name) && peers.removed(&name) {
                    tracing::info!(peer = %name, "mirrored by an earlier run, and no peer any more");
                    self.start(name, None);
                }
            }
            self.began.send_replace(true);
        }
        self.changed.notify_one();
    }

    /// The clusters of which the store holds anything. A store that outlives the process may hold peers that were
    /// removed meanwhile, or were being drained.
    fn left_behind(&self) -> BTreeSet<ClusterName> {
        let prefixes =
            [isthmus_wire::key::CLUSTER_CONFIGS, isthmus_wire::key::SYNCED, "cilium/cache/"].map(Bytes::from);
        let refusing = Bytes::from(format!("{REFUSING}/"));
        let keys = prefixes.iter().chain([&refusing]).flat_map(|prefix| self.writer.keys_below(prefix));
        let names = keys.filter_map(|key| Key::parse(&key).ok()?.mirror_of().cloned());
        names.filter(|name| *name != self.own).collect()
    }

    /// Gives a peer a task; one without a configuration has been removed and only drains.
    fn start(&mut self, name: ClusterName, config: Option<PeerConfig>) {
        let origin = config.as_ref().map(|config| config.origin.clone());
        let (config, follow) = watch::channel(config);
        let (view, seen) = Shown::new(PeerView::new(origin), Arc::clone(&self.changed));
        self.configs.insert(name.clone(), config);
        self.views.send_modify(|views| {
            views.insert(name.clone(), seen);
        });
        let peer = Peer {
            name: name.clone(),
            registry: self.registry.clone(),
            writer: self.writer.clone(),
            timing: self.timing,
            metrics: Arc::clone(&self.metrics),
            config: follow,
            view,
            withheld: None,
            shutdown: self.shutdown.clone(),
        };
        self.tasks.spawn(async move {
            peer.run().await;
            name
        });
    }

    fn ended(&mut self, ended: Result<ClusterName, tokio::task::JoinError>) {
        match ended {
            Ok(name) => self.forget(&name),
            // A panic is a defect of ours. The peer is started again, since one peer's data must not stop the mirror.
            Err(error) => {
                tracing::error!(%error, "a peer's task failed; it is started again");
                let dead: Vec<_> = self
                    .configs
                    .iter()
                    .filter(|(_, config)| config.is_closed())
                    .map(|(name, _)| name.clone())
                    .collect();
                for name in &dead {
                    self.forget(name);
                }
            }
        }
        // It may have been configured again while it drained.
        self.apply();
    }

    fn forget(&mut self, name: &ClusterName) {
        self.configs.remove(name);
        self.metrics.forget(name);
        self.views.send_modify(|views| {
            views.remove(name);
        });
    }
}
