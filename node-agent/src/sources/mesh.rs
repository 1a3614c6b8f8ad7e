//! The mesh as the own cluster's gateway tells it: the own cluster's sections, and those of every peer that has described
//! itself. One task per section reads entries and hands on events; a section that does not keep up holds back
//! itself alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use isthmus_kvstore::Section;
use isthmus_kvstore::reader::{Reader, ReaderStatus, SectionEvent, SectionPhase};
use isthmus_wire::key::CLUSTER_CONFIGS;
use isthmus_wire::local::REFUSING;
use isthmus_wire::{ClusterConfig, ClusterId, ClusterName, Key, MaxConnectedClusters, Prefix, validate};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::entry::{self, EntryError, Origin};
use crate::mesh::fact::{self};
use crate::mesh::{MeshEvent, Resource};
use crate::metrics::Metrics;

/// An event on its way to the reconciler.
#[derive(Debug)]
pub struct Arrival {
    /// What happened.
    pub event: MeshEvent,
    /// Prefix of the section that told it.
    pub section: Arc<str>,
    /// Revision of the gateway's store.
    pub revision: u64,
    /// When it was received.
    pub received: Instant,
}

/// Who asks.
#[derive(Clone, Debug)]
pub struct OwnCluster {
    /// The own cluster's name.
    pub name: ClusterName,
    /// Its id.
    pub id: ClusterId,
    /// How many clusters the mesh is set up for.
    pub mesh_size: MaxConnectedClusters,
}

/// Reads the mesh until the receiver of its events is gone.
pub async fn run(own: OwnCluster, reader: Reader, events: mpsc::Sender<Arrival>, metrics: Arc<Metrics>) {
    let mut follower = Follower {
        own,
        reader,
        events,
        metrics,
        tasks: JoinSet::new(),
        peers: BTreeMap::new(),
        refusing: BTreeSet::new(),
    };
    let (own_name, clusters) = (follower.own.name.clone(), CLUSTER_CONFIGS.trim_end_matches('/'));
    let own_sections = [
        (Resource::Nodes, Prefix::State(isthmus_wire::Resource::Nodes)),
        (Resource::Endpoints, Prefix::State(isthmus_wire::Resource::Ip)),
        (Resource::Identities, Prefix::State(isthmus_wire::Resource::Identities)),
        (Resource::Services, Prefix::LocalServices),
        (Resource::Policies, Prefix::LocalPolicies),
        (Resource::Namespaces, Prefix::LocalNamespaces),
    ];
    for (resource, prefix) in own_sections {
        follower.follow(&own_name, true, resource, prefix);
    }
    let mut configs = follower.reader.follow(Section::new(clusters, None::<&str>));
    let mut refusing = follower.reader.follow(Section::new(REFUSING, None::<&str>));
    let mut status = follower.reader.status();
    loop {
        let goes_on = tokio::select! {
            event = configs.recv() => match event {
                Some(event) => follower.cluster_config(event).await,
                None => false,
            },
            event = refusing.recv() => match event {
                Some(event) => {
                    follower.refusal(&event);
                    follower.let_go(&mut status).await
                }
                None => false,
            },
            changed = status.changed() => {
                changed.is_ok() && follower.let_go(&mut status).await
            }
            Some(ended) = follower.tasks.join_next(), if !follower.tasks.is_empty() => match ended {
                Err(error) if error.is_panic() => {
                    tracing::error!(%error, "reading a section failed for a defect of the agent");
                    false
                }
                _ => true,
            },
        };
        if !goes_on {
            return;
        }
    }
}

struct Follower {
    own: OwnCluster,
    reader: Reader,
    events: mpsc::Sender<Arrival>,
    metrics: Arc<Metrics>,
    tasks: JoinSet<()>,
    peers: BTreeMap<ClusterName, Peer>,
    /// The peers of which the gateway says that they refuse this cluster.
    refusing: BTreeSet<ClusterName>,
}

#[derive(Default)]
struct Peer {
    /// What it last said of itself, as far as it could be used.
    config: Option<fact::ClusterConfig>,
    standing: Standing,
    sections: BTreeMap<Resource, Followed>,
}

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Standing {
    /// The gateway has a description.
    #[default]
    Described,
    /// It no longer has one. What is known of the peer stays until its entries are deleted, too: a gateway that was
    /// started anew may only not have reached the peer yet.
    Departed,
    /// It no longer has one, and this is not for want of a connection. Either it has all of the peer's services all the same: the
    /// peer was disconnected, and its entries stay for what is open, for a relay that reaches a peer for the first time describes
    /// it before it has read it whole. Or it says that the peer refuses this cluster, which a gateway that was started anew can
    /// say of a peer that it knows nothing else of. Ends with the next description, and with nothing less.
    Draining,
}

struct Followed {
    prefix: Arc<str>,
    task: tokio::task::AbortHandle,
}

impl Follower {
    /// Takes in a change of a peer's description. Says whether there is still someone to tell.
    async fn cluster_config(&mut self, event: SectionEvent) -> bool {
        let section: Arc<str> = CLUSTER_CONFIGS.trim_end_matches('/').into();
        let (event, revision) = match event {
            SectionEvent::Synced { revision } => {
                let cluster = self.own.name.as_str().into();
                (Some(MeshEvent::Synced { cluster, resource: Resource::ClusterConfigs }), revision)
            }
            SectionEvent::Delete { key, revision } => {
                if let Ok(Key::ClusterConfig(name)) = Key::parse(&key)
                    && let Some(peer) = self.peers.get_mut(&name)
                {
                    tracing::info!(cluster = %name, "the gateway no longer knows this peer; what is known of it stays until its entries are deleted");
                    peer.standing = Standing::Departed;
                    let mut status = self.reader.status();
                    return self.let_go(&mut status).await;
                }
                (None, revision)
            }
            SectionEvent::Put { key, value, revision } => match self.described(&key, &value) {
                Ok(event) => (event, revision),
                Err((reason, error)) => {
                    self.metrics.rejected("cluster-configs", reason);
                    tracing::warn!(key = %String::from_utf8_lossy(&key), %error, "cluster configuration left out");
                    (None, revision)
                }
            },
        };
        let Some(event) = event else { return true };
        self.send(event, section, revision).await
    }

    /// Takes in what the gateway says about who refuses this cluster.
    fn refusal(&mut self, event: &SectionEvent) {
        match event {
            SectionEvent::Put { key, .. } => {
                if let Ok(Key::Refusing(name)) = Key::parse(key) {
                    self.refusing.insert(name);
                }
            }
            SectionEvent::Delete { key, .. } => {
                if let Ok(Key::Refusing(name)) = Key::parse(key) {
                    self.refusing.remove(&name);
                }
            }
            SectionEvent::Synced { .. } => {}
        }
    }

    /// Starts to follow a peer that has described itself.
    fn described(
        &mut self,
        key: &[u8],
        value: &[u8],
    ) -> Result<Option<MeshEvent>, (&'static str, Box<dyn std::error::Error + Send + Sync>)> {
        let key = Key::parse(key).map_err(|error| ("malformed_key", error.into()))?;
        let Key::ClusterConfig(name) = key else { return Ok(None) };
        if name == self.own.name {
            return Ok(None);
        }
        let config = ClusterConfig::decode(value).map_err(|error| (error.reason(), error.into()))?;
        let peer = validate::cluster_config(&name, &config, self.own.id, self.own.mesh_size)
            .map_err(|error| ("incompatible", error.into()))?;
        let mode = config.capabilities.endpoint_slices_export_mode;
        let slices_only = !mode.exports_services();

        use isthmus_wire::Resource as Kind;
        let (wanted, unwanted) = if slices_only {
            ((Resource::Slices, Kind::EndpointSlices), Resource::Services)
        } else {
            ((Resource::Services, Kind::Services), Resource::Slices)
        };
        if let Some(followed) = self.peers.get_mut(&name).and_then(|peer| peer.sections.remove(&unwanted)) {
            followed.task.abort();
        }
        let always = [
            (Resource::Nodes, Kind::Nodes),
            (Resource::Endpoints, Kind::Ip),
            (Resource::Identities, Kind::Identities),
        ];
        for (resource, kind) in always.into_iter().chain([wanted]) {
            self.follow(&name, false, resource, Prefix::Cache(kind));
        }
        let config = fact::ClusterConfig { id: peer.id.number(), slices_only, draining: false };
        let peer = self.peers.entry(name.clone()).or_default();
        (peer.config, peer.standing) = (Some(config), Standing::Described);
        Ok(Some(MeshEvent::Cluster { cluster: name.as_str().into(), config }))
    }

    /// Follows a section, unless it is followed already.
    fn follow(&mut self, cluster: &ClusterName, own: bool, resource: Resource, prefix: Prefix) {
        let sections = &mut self.peers.entry(cluster.clone()).or_default().sections;
        if sections.contains_key(&resource) {
            return;
        }
        let section = Section::new(prefix.range(cluster), Some(Key::canary(cluster, prefix).to_bytes()));
        let name: Arc<str> = section.name().into();
        let task = FollowSection {
            origin: Origin { cluster: cluster.clone(), own, resource, mesh_size: self.own.mesh_size },
            section: name.clone(),
            entries: self.reader.follow(section),
            events: self.events.clone(),
            metrics: self.metrics.clone(),
        };
        let task = self.tasks.spawn(task.run());
        sections.insert(resource, Followed { prefix: name, task });
    }

    /// Looks after peers without a description: those that still have all of their services, or refuse this cluster, are drained,
    /// those that have nothing left are forgotten. Says whether there is still someone to tell.
    async fn let_go(&mut self, status: &mut watch::Receiver<ReaderStatus>) -> bool {
        let mut draining = Vec::new();
        let mut gone = Vec::new();
        {
            let status = status.borrow_and_update();
            let section = |followed: &Followed| status.sections.get(&*followed.prefix);
            for (name, peer) in self.peers.iter_mut().filter(|(_, peer)| peer.standing != Standing::Described)
            {
                let is_empty = |followed: &Followed| {
                    section(followed).is_some_and(|section| section.synced && section.keys == 0)
                };
                // Over this very connection, so not from before the gateway was started anew.
                let is_followed = |resource| {
                    peer.sections
                        .get(&resource)
                        .and_then(section)
                        .is_some_and(|section| section.phase == SectionPhase::Following)
                };
                if peer.sections.values().all(is_empty) {
                    gone.push(name.clone());
                } else if peer.standing == Standing::Departed
                    && (self.refusing.contains(name)
                        || [Resource::Services, Resource::Slices].into_iter().any(is_followed))
                    && let Some(config) = peer.config
                {
                    peer.standing = Standing::Draining;
                    draining.push((name.clone(), fact::ClusterConfig { draining: true, ..config }));
                }
            }
        }
        for (name, config) in draining {
            tracing::info!(cluster = %name, "peer is being disconnected, or refuses this cluster: nothing new goes to its services");
            let event = MeshEvent::Cluster { cluster: name.as_str().into(), config };
            if !self.conclude(event).await {
                return false;
            }
        }
        for name in gone {
            tracing::info!(cluster = %name, "peer has left the mesh");
            for followed in self.peers.remove(&name).into_iter().flat_map(|peer| peer.sections.into_values())
            {
                followed.task.abort();
            }
            if !self.conclude(MeshEvent::ClusterRemoved { cluster: name.as_str().into() }).await {
                return false;
            }
        }
        true
    }

    /// Sends what no entry says, but all of them together.
    async fn conclude(&self, event: MeshEvent) -> bool {
        self.send(event, CLUSTER_CONFIGS.trim_end_matches('/').into(), 0).await
    }

    async fn send(&self, event: MeshEvent, section: Arc<str>, revision: i64) -> bool {
        let revision = u64::try_from(revision).unwrap_or(0);
        self.events.send(Arrival { event, section, revision, received: Instant::now() }).await.is_ok()
    }
}

struct FollowSection {
    origin: Origin,
    section: Arc<str>,
    entries: mpsc::Receiver<SectionEvent>,
    events: mpsc::Sender<Arrival>,
    metrics: Arc<Metrics>,
}

impl FollowSection {
    async fn run(mut self) {
        while let Some(entry) = self.entries.recv().await {
            let received = Instant::now();
            let (event, revision) = match entry {
                SectionEvent::Put { key, value, revision } => {
                    (entry::read(&self.origin, &key, Some(&value)), revision)
                }
                SectionEvent::Delete { key, revision } => (entry::read(&self.origin, &key, None), revision),
                SectionEvent::Synced { revision } => {
                    let cluster = self.origin.cluster.as_str().into();
                    (Ok(MeshEvent::Synced { cluster, resource: self.origin.resource }), revision)
                }
            };
            let event = match event {
                Ok(event) => event,
                Err(error) => {
                    self.left_out(&error);
                    continue;
                }
            };
            let revision = u64::try_from(revision).unwrap_or(0);
            let arrival = Arrival { event, section: self.section.clone(), revision, received };
            if self.events.send(arrival).await.is_err() {
                return;
            }
        }
    }

    fn left_out(&self, error: &EntryError) {
        self.metrics.rejected(self.origin.resource.name(), error.reason());
        tracing::warn!(cluster = %self.origin.cluster, section = %self.section, %error, "entry left out");
    }
}
