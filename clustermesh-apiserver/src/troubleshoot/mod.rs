//! Why a peer is not connected, or does not keep up: `isthmus troubleshoot`.
//!
//! ```text
//! configuration ─▶ DNS ─▶ TCP ─▶ TLS ─▶ gateway ─▶ permissions ─▶ cluster config ─▶ canaries, heartbeat, store ─▶ relay
//! ```
//!
//! A connection of its own is made step by step with the code that makes the real one, from the process that keeps the
//! real one: its place in the network, its name resolution, its certificate, its clock. What a step finds is a
//! [`Fault`]; what is to be said about it, and what to run next, follows from the fault alone.
//!
//! Nothing is changed at the peer or here. Every question is bounded in time, and a peer is probed once at a time, so that
//! who asks often does the peer no harm.

mod api;
mod command;
mod data;
mod fault;
mod link;
mod probe;
mod relay;
mod render;
mod report;
mod store;
mod target;

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use chrono::Utc;
use futures::StreamExt;
use isthmus_kvstore::client::steps::Resolver;

pub use self::api::{of_daemon, router};
pub use self::command::{Flags, from_files, run};
pub use self::fault::{Circumstances, Fault, Source};
pub use self::probe::Limits;
pub use self::render::{Signs, step as step_text, text};
pub use self::report::{Finding, Next, Origin, Outcome, PeerReport, Report, Step, StepReport};
pub use self::target::{Target, in_directory};
use crate::relay::OwnCluster;
use crate::status::PeerStatus;

/// What stands for the own cluster's name where that is not known.
const HERE: &str = "here";
/// How many peers are probed at the same time.
const AT_ONCE: usize = 8;

/// What the peers are, and what they are held against.
pub struct Setup {
    /// The own cluster's name, as far as it is known.
    pub cluster: String,
    /// The own cluster, where a peer's id and size can be compared with it.
    pub own: Option<OwnCluster>,
    /// The namespace that the daemons run in, for the commands that are suggested.
    pub namespace: String,
    /// Where this runs.
    pub origin: Origin,
    /// How names are resolved.
    pub resolver: Resolver,
    /// What a probe is bounded by.
    pub limits: Limits,
}

/// The peers as they are configured at present.
type Targets = Box<dyn Fn() -> Option<Vec<Target>> + Send + Sync>;
/// Where the relay stands with each of them.
type Mirrored = Box<dyn Fn() -> Vec<PeerStatus> + Send + Sync>;

/// Probes peers, each once at a time.
pub struct Troubleshooter {
    setup: Setup,
    targets: Targets,
    relay: Option<Mirrored>,
    /// The peers that are being probed.
    busy: Mutex<BTreeSet<String>>,
}

/// Why nothing is probed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// This peer is being probed for somebody else.
    #[error("{0} is being probed already; ask again in a few seconds")]
    Busy(String),
    /// This replica connects to no peers.
    #[error("this replica has no connections to peers at present; ask the one that leads")]
    NoRelay,
}

impl Troubleshooter {
    /// One for the peers that `targets` answers with each time it is asked; none while this process has nothing to do
    /// with peers.
    pub fn new(setup: Setup, targets: impl Fn() -> Option<Vec<Target>> + Send + Sync + 'static) -> Self {
        Self { setup, targets: Box::new(targets), relay: None, busy: Mutex::default() }
    }

    /// With a running relay, which says where it stands with each peer.
    #[must_use]
    pub fn beside(mut self, relay: impl Fn() -> Vec<PeerStatus> + Send + Sync + 'static) -> Self {
        self.relay = Some(Box::new(relay));
        self
    }

    /// Probes the peers with these names, or all if none is named. A name that is no peer's has a report that says so.
    ///
    /// # Errors
    /// [`Refusal`]
    pub async fn report(&self, names: &[String]) -> Result<Report, Refusal> {
        let targets = (self.targets)().ok_or(Refusal::NoRelay)?;
        // A cluster is no peer of its own: of several that are asked alike each leaves itself out.
        let names_given = !names.is_empty();
        let names: Vec<&String> = names.iter().filter(|name| **name != self.setup.cluster).collect();
        let known: Vec<String> = targets.iter().map(|target| target.name.to_string()).collect();
        let unknown: Vec<&String> = names.iter().copied().filter(|name| !known.contains(name)).collect();
        let asked: Vec<Target> = targets
            .into_iter()
            .filter(|target| !names_given || names.iter().any(|name| target.name.as_str() == name.as_str()))
            .collect();
        let _turn = self.turn(asked.iter().map(|target| target.name.to_string()))?;

        let taken = Utc::now();
        let relay = self.relay.as_ref().map(|relay| relay());
        let against = probe::Against {
            own: self.setup.own.as_ref(),
            relay: relay.as_deref(),
            resolver: &self.setup.resolver,
            limits: self.setup.limits,
        };
        let against = &against;
        let probes: Vec<_> = asked
            .iter()
            .map(|target| {
                let of = self.circumstances(target.name.as_str(), target.source.clone());
                probe::run(target, of, against)
            })
            .collect();
        let mut peers: Vec<PeerReport> = futures::stream::iter(probes).buffered(AT_ONCE).collect().await;
        peers.extend(unknown.into_iter().map(|name| {
            let name = fault::printable(name);
            let source =
                Source::Secret { namespace: self.setup.namespace.clone(), name: format!("peer-{name}") };
            probe::unknown(&name, &self.circumstances(&name, source), known.clone())
        }));
        Ok(Report { cluster: self.setup.cluster.clone(), origin: self.setup.origin, taken, peers })
    }

    fn circumstances(&self, peer: &str, source: Source) -> Circumstances {
        Circumstances {
            own: self.setup.cluster.clone(),
            peer: peer.to_owned(),
            source,
            namespace: self.setup.namespace.clone(),
            common_name: None,
        }
    }

    fn turn(&self, names: impl Iterator<Item = String>) -> Result<Turn<'_>, Refusal> {
        let names: BTreeSet<String> = names.collect();
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = names.iter().find(|name| busy.contains(*name)) {
            return Err(Refusal::Busy(name.clone()));
        }
        busy.extend(names.iter().cloned());
        Ok(Turn { busy: &self.busy, names })
    }
}

impl std::fmt::Debug for Troubleshooter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Troubleshooter").field("cluster", &self.setup.cluster).finish_non_exhaustive()
    }
}

/// The right to probe these peers, given back also when who asked has left.
struct Turn<'a> {
    busy: &'a Mutex<BTreeSet<String>>,
    names: BTreeSet<String>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).retain(|name| !self.names.contains(name));
    }
}
