//! Mirrors the peers: the only place where their data enters, and so the trust boundary.
//!
//! A peer's keys come in through `kvstore`'s reader, are parsed and checked here, and go into the own store under
//! `cilium/cache/` (wire format, section A.6). A hostile peer can lie about itself and about nothing else.

mod admission;
mod directory;
mod metrics;
mod mirror;
mod peer;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use isthmus_kvstore::writer::Writer;
use isthmus_wire::{ClusterName, Key};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use self::admission::OwnCluster;
use self::admission::Registry;
use self::directory::{PeerFile, Peers};
pub use self::metrics::Metrics;
use self::peer::{Peer, PeerView};
use crate::status::PeerStatus;

/// How the relay is set up.
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// The own cluster.
    pub own: OwnCluster,
    /// The directory with one client configuration per peer.
    pub peers_dir: PathBuf,
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

/// Mirrors every peer in the directory until `shutdown`.
pub struct Relay {
    views: watch::Receiver<BTreeMap<ClusterName, watch::Receiver<PeerView>>>,
    directory: watch::Receiver<Peers>,
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
        let directory = directory::follow(config.peers_dir, config.own.name.clone(), shutdown.clone());
        let (send, views) = watch::channel(BTreeMap::new());
        let supervisor = Supervisor {
            own: config.own.name.clone(),
            registry: Registry::new(config.own),
            writer,
            timing: config.timing,
            metrics,
            directory: directory.clone(),
            files: BTreeMap::new(),
            tasks: JoinSet::new(),
            views: send,
            shutdown,
        };
        let relay = Self { views, directory, timing: config.timing, started: Instant::now() };
        (relay, tokio::spawn(supervisor.run()))
    }

    /// Where every peer stands, by name.
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.views.borrow().iter().map(|(name, view)| view.borrow().status(name)).collect()
    }

    /// Files in the directory that cannot be used, and why; the directory itself, if it cannot be read.
    pub fn refused_files(&self) -> BTreeMap<String, String> {
        let peers = self.directory.borrow();
        let mut refused = peers.refused.clone();
        if let Some(reason) = &peers.unreadable {
            refused.insert(".".to_owned(), reason.clone());
        }
        refused
    }

    /// What readiness waits for: a peer that can be reached and is not complete yet. None when ready.
    pub fn waiting_for(&self) -> Option<String> {
        if self.started.elapsed() >= self.timing.ready_timeout {
            return None;
        }
        let views = self.views.borrow();
        // A peer that was found and has no task yet.
        let unborn =
            self.directory.borrow().configured.keys().find(|name| !views.contains_key(*name)).cloned();
        let waiting =
            views.iter().find(|(_, view)| !view.borrow().settled(&self.timing)).map(|(name, _)| name.clone());
        waiting.or(unborn).map(|name| format!("peer {name} is not mirrored completely yet"))
    }
}

struct Supervisor {
    own: ClusterName,
    registry: Registry,
    writer: Writer,
    timing: Timing,
    metrics: Arc<Metrics>,
    directory: watch::Receiver<Peers>,
    /// One per task.
    files: BTreeMap<ClusterName, watch::Sender<Option<PeerFile>>>,
    tasks: JoinSet<ClusterName>,
    views: watch::Sender<BTreeMap<ClusterName, watch::Receiver<PeerView>>>,
    shutdown: CancellationToken,
}

impl Supervisor {
    async fn run(mut self) {
        self.directory.mark_changed();
        loop {
            tokio::select! {
                Ok(()) = self.directory.changed() => self.apply(),
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => self.ended(ended),
                () = self.shutdown.cancelled() => break,
            }
        }
        while self.tasks.join_next().await.is_some() {}
    }

    /// Tells every task its present file, and gives a task to who has none.
    fn apply(&mut self) {
        let peers = self.directory.borrow_and_update().clone();
        self.metrics.peers(peers.configured.len());
        for (name, file) in &self.files {
            let present = peers.configured.get(name);
            file.send_if_modified(|file| {
                // One that was removed drains to its end before it begins anew.
                let changed = file.is_some() && file.as_ref() != present;
                if changed {
                    *file = present.cloned();
                }
                changed
            });
        }
        for (name, file) in &peers.configured {
            if !self.files.contains_key(name) {
                self.start(name.clone(), Some(file.clone()));
            }
        }
        // While the directory cannot be read, or a file not be understood, nobody is taken for removed.
        if peers.unreadable.is_none() {
            for name in self.left_behind() {
                if !self.files.contains_key(&name) && !peers.refused.contains_key(name.as_str()) {
                    tracing::info!(peer = %name, "mirrored by an earlier run, and no peer any more");
                    self.start(name, None);
                }
            }
        }
    }

    /// The clusters of which the store holds anything. A store that outlives the process may hold peers that were
    /// removed meanwhile, or were being drained.
    fn left_behind(&self) -> BTreeSet<ClusterName> {
        let prefixes = [isthmus_wire::key::CLUSTER_CONFIGS, isthmus_wire::key::SYNCED, "cilium/cache/"];
        let keys = prefixes.into_iter().flat_map(|prefix| self.writer.keys_below(&prefix.into()));
        let names = keys.filter_map(|key| Key::parse(&key).ok()?.mirror_of().cloned());
        names.filter(|name| *name != self.own).collect()
    }

    /// Gives a peer a task; one without a file has been removed and only drains.
    fn start(&mut self, name: ClusterName, file: Option<PeerFile>) {
        let (file, follow) = watch::channel(file);
        let (view, seen) = watch::channel(PeerView::new());
        self.files.insert(name.clone(), file);
        self.views.send_modify(|views| {
            views.insert(name.clone(), seen);
        });
        let peer = Peer {
            name: name.clone(),
            registry: self.registry.clone(),
            writer: self.writer.clone(),
            timing: self.timing,
            metrics: Arc::clone(&self.metrics),
            file: follow,
            view,
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
                    .files
                    .iter()
                    .filter(|(_, file)| file.is_closed())
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
        self.files.remove(name);
        self.metrics.forget(name);
        self.views.send_modify(|views| {
            views.remove(name);
        });
    }
}
