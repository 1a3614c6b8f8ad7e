//! Keeps the device as the mesh asks: brings it up, tells it its peers, publishes this node's key once it works, and
//! exchanges the key on request.
//!
//! Whatever fails ends the present session with the device; the next one begins by reading what the device has, and so
//! costs no session with a peer. A device that was started anew is noticed within a second, and told everything again.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use isthmus_wireguard::config::{Change, DeviceState, DeviceUpdate, PeerUpdate, PrivateKey};
use isthmus_wireguard::control::{Backend, Control, ControlError, Link, Location};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::device::{Circumstances, Device, address_of};
use super::key_file::{KeyFileError, KeyFiles, NodeKey};
use super::publication::{OwnNode, RotationReport, RotationState, Wanted};
use super::reach::{Pending, Question};
use super::rotation::{Rotation, Sessions};
use super::shared::SharedPeers;
use super::status::{EncryptionStatus, PeerStatus, RefusedKeyStatus};
use super::underlay;
use crate::datapath::routing::{self, RoutingError};
use crate::datapath::{Datapath, DatapathError, EncryptionDevice, EncryptionMode};
use crate::mesh::fact::Moment;

const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// How often the device is looked at for being there, and for handshakes that are waited for.
const LOOK: Duration = Duration::from_secs(1);
/// How often the status is made, in looks.
const STATUS_LOOKS: u32 = 2;
/// The same in a large mesh, where a device has much to say.
const STATUS_LOOKS_LARGE: u32 = 15;
const LARGE: usize = 500;
/// How often the device is compared with what it should have, in looks.
const COMPARE_LOOKS: u32 = 60;
/// Peers in one message to the device.
const BATCH: usize = 256;
/// How long the device may take to say what it remembers, and the API what it knows of this node, at start.
const PATIENCE: Duration = Duration::from_secs(1);

/// How traffic is to be encrypted.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which device.
    pub backend: Backend,
    /// Where it is.
    pub location: Location,
    /// UDP port of every node.
    pub port: u16,
    /// Drop what cannot be encrypted.
    pub strict: bool,
    /// Ranges of pods: in strict mode nothing goes to or comes from an address in them of which nothing else is known.
    pub strict_cidrs: Vec<IpNet>,
    /// The network's sysctls: `/proc/sys/net`, or where that can be written.
    pub sysctl_root: PathBuf,
}

/// Why encryption does not work now.
#[derive(Debug, thiserror::Error)]
pub enum EncryptionError {
    /// The device.
    #[error(transparent)]
    Device(#[from] ControlError),
    /// The device went away, or another one has taken its place.
    #[error("the network interface {0} was exchanged or brought down; the device is set up again")]
    Exchanged(String),
    /// The way to the device.
    #[error(transparent)]
    Routing(#[from] RoutingError),
    /// The eBPF programs.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The key files.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The network below.
    #[error("cannot ask the kernel for the MTU of this node's network: {0}")]
    Underlay(std::io::Error),
    /// The Node object has not been read.
    #[error("this node's Node object has not been read yet{0}")]
    NodeUnknown(String),
}

/// Everything that encryption on this node needs.
pub struct Task {
    settings: Settings,
    files: KeyFiles,
    current: NodeKey,
    rotation: Rotation,
    report: Option<RotationReport>,
    peers: Arc<SharedPeers>,
    device: Option<Device>,
    datapath: Arc<Datapath>,
    node: watch::Receiver<OwnNode>,
    wanted: watch::Sender<Wanted>,
    status: watch::Sender<EncryptionStatus>,
    questions: mpsc::Receiver<Question>,
    pending: Option<Pending>,
    start: Instant,
}

/// The device while all is well.
struct Session {
    control: Control,
    link: Link,
    underlay: Vec<std::net::IpAddr>,
}

impl Task {
    /// Reads or makes this node's key, and asks the device, if there is one, whom it has as peers: they keep their keys.
    ///
    /// # Errors
    /// The key cannot be read or made.
    pub async fn prepare(
        settings: Settings,
        files: KeyFiles,
        datapath: Arc<Datapath>,
        node: watch::Receiver<OwnNode>,
        wanted: watch::Sender<Wanted>,
        status: watch::Sender<EncryptionStatus>,
        questions: mpsc::Receiver<Question>,
    ) -> Result<Self, KeyFileError> {
        let current = files.current_or_new()?;
        let rotation = Rotation::resume(files.next()?);
        let peers = Arc::new(SharedPeers::default());
        let task = Self {
            settings,
            files,
            current,
            rotation,
            report: None,
            peers,
            device: None,
            datapath,
            node,
            wanted,
            status,
            questions,
            pending: None,
            start: Instant::now(),
        };
        task.tell_own_keys();
        task.remember().await;
        Ok(task)
    }

    /// What the reconciler is to keep up to date.
    pub fn peers(&self) -> Arc<SharedPeers> {
        self.peers.clone()
    }

    /// Works until `shutdown`. The device goes on as it is then.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut retry = FIRST_RETRY;
        let mut last = String::new();
        loop {
            let begun = Instant::now();
            let outcome = tokio::select! {
                () = shutdown.cancelled() => return,
                Err(error) = self.session() => error,
            };
            let problem = outcome.to_string();
            if problem == last {
                tracing::debug!("{problem}");
            } else {
                tracing::warn!("traffic between nodes cannot be encrypted: {problem}");
            }
            last.clone_from(&problem);
            // Who asked is told so.
            self.pending = None;
            self.status.send_modify(|status| {
                status.ready = false;
                status.problem = Some(problem);
            });
            if begun.elapsed() > LONGEST_RETRY {
                retry = FIRST_RETRY;
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(retry) => {}
            }
            retry = (retry * 2).min(LONGEST_RETRY);
        }
    }

    async fn remember(&self) {
        let asked =
            async { Control::open(self.settings.backend, &self.settings.location).await?.state().await };
        // One that does not run yet has nothing to remember.
        let Ok(Ok(state)) = tokio::time::timeout(PATIENCE, asked).await else { return };
        let mut peers = self.peers.lock();
        for peer in &state.peers {
            if let Some(endpoint) = peer.endpoint {
                peers.remember(peer.public_key, address_of(endpoint));
            }
        }
    }

    /// Brings the device up and keeps it so until something fails.
    async fn session(&mut self) -> Result<std::convert::Infallible, EncryptionError> {
        let session = self.begin().await?;
        self.make_status(&session, &session.control.state().await?).await;
        tracing::info!(
            interface = session.control.interface(),
            mode = mode(&session.control),
            mtu = session.link.mtu,
            "traffic between nodes is encrypted"
        );
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looks = 0_u32;
        loop {
            tokio::select! {
                () = self.peers.changed() => self.apply_changes(&session).await?,
                Ok(()) = self.node.changed() => self.node_changed(&session).await?,
                Some(question) = self.questions.recv(), if self.pending.is_none() => {
                    self.ask(&session, question).await?;
                }
                _ = look.tick() => {
                    looks = looks.wrapping_add(1);
                    self.look(&session, looks).await?;
                }
            }
        }
    }

    async fn begin(&mut self) -> Result<Session, EncryptionError> {
        // Watching begins together with this task: what takes a moment is no failure.
        let read = self.node.wait_for(|node| node.seen || node.error.is_some());
        let _ = tokio::time::timeout(PATIENCE, read).await;
        let control = Control::open(self.settings.backend, &self.settings.location).await?;
        let state = match control.state().await {
            Ok(state) => state,
            Err(error) => {
                self.without_device(&control).await?;
                return Err(error.into());
            }
        };
        let underlay = self.underlay()?;
        self.tell_keys(&control, &state).await?;
        let below = underlay::mtu(&underlay).await.map_err(EncryptionError::Underlay)?.unwrap_or_else(|| {
            tracing::warn!(addresses = ?underlay, "no interface has this node's addresses; its network's MTU is taken to be {}", underlay::DEFAULT_MTU);
            underlay::DEFAULT_MTU
        });
        let link = control.bring_up(underlay::device_mtu(below), &[]).await?;
        routing::ensure(link.index, &self.settings.sysctl_root).await?;

        let device = self.device.get_or_insert_with(|| Device::new(control.is_kernel(), self.settings.port));
        device.adopt(&state);
        let updates = {
            let mut peers = self.peers.lock();
            peers.take_dirty();
            device.all(
                &peers,
                circumstances(self.start, &self.node, self.rotation.advertised(&self.current.key)),
            )
        };
        apply(&control, updates).await?;
        let device = EncryptionDevice { ifindex: link.index, mtu: link.mtu };
        self.datapath
            .set_encryption(EncryptionMode::On { device: Some(device), strict: self.settings.strict })?;

        if !control.is_kernel() {
            // It was told above. The kernel's takes one key, and gets the next in place of the present one.
            self.rotation.accepted();
        }
        self.publish();
        let session = Session { control, link, underlay };
        self.advance(&session).await?;
        Ok(session)
    }

    /// A device that is gone takes nothing; the programs are told, so that they need not find out packet by packet.
    async fn without_device(&self, control: &Control) -> Result<(), EncryptionError> {
        if matches!(control.link().await, Err(ControlError::NoInterface { .. })) {
            self.datapath
                .set_encryption(EncryptionMode::On { device: None, strict: self.settings.strict })?;
        }
        Ok(())
    }

    fn underlay(&self) -> Result<Vec<std::net::IpAddr>, EncryptionError> {
        let node = self.node.borrow();
        if node.seen {
            return Ok(node.addresses.clone());
        }
        let why = node.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
        Err(EncryptionError::NodeUnknown(why))
    }

    async fn apply_changes(&mut self, session: &Session) -> Result<(), EncryptionError> {
        let Some(device) = &mut self.device else { return Ok(()) };
        let updates = {
            let mut peers = self.peers.lock();
            let dirty = peers.take_dirty();
            let at = circumstances(self.start, &self.node, self.rotation.advertised(&self.current.key));
            let whole = peers.is_settled() && !device.has_settled();
            if whole { device.all(&peers, at) } else { device.changed(&dirty, &peers, at) }
        };
        apply(&session.control, updates).await
    }

    async fn node_changed(&mut self, session: &Session) -> Result<(), EncryptionError> {
        let addresses = self.node.borrow_and_update().addresses.clone();
        if addresses != session.underlay {
            return Err(EncryptionError::Exchanged(session.control.interface().to_owned()));
        }
        self.advance(session).await
    }

    /// Goes as far in exchanging the key as is possible without waiting.
    async fn advance(&mut self, session: &Session) -> Result<(), EncryptionError> {
        let node = self.node.borrow().clone();
        if self.rotation == Rotation::Idle && self.report.is_none() {
            // It ended right before an earlier run of the agent did, and whoever asked for it may not have been told.
            self.report = node.rotation.filter(|report| report.id == self.current.rotation).map(|report| {
                let public_key = self.current.key.public_key().to_string();
                RotationReport { state: RotationState::Done, public_key, message: None, ..report }
            });
        }
        if let Some(request) = node.request.filter(|id| *id != self.current.rotation)
            && self.rotation == Rotation::Idle
        {
            let next = NodeKey { key: PrivateKey::generate(), rotation: request };
            match self.files.write_next(&next) {
                Ok(()) => {
                    tracing::info!(rotation = %next.rotation, public_key = %next.key.public_key(), "exchanging this node's key");
                    self.rotation = Rotation::Prepared(next);
                }
                Err(error) => {
                    tracing::warn!(rotation = %next.rotation, %error, "this node keeps its key");
                    self.report = Some(RotationReport {
                        id: next.rotation,
                        state: RotationState::Failed,
                        public_key: self.current.key.public_key().to_string(),
                        switched: 0,
                        peers: 0,
                        message: Some(error.to_string()),
                    });
                }
            }
        }
        if let Rotation::Prepared(next) = self.rotation.clone() {
            self.tell_own_keys();
            if session.control.is_kernel() {
                return self.promote(session, &next).await;
            }
            let update = DeviceUpdate { next_private_key: Change::Set(next.key), ..DeviceUpdate::default() };
            session.control.apply(&update).await?;
            self.rotation.accepted();
        }
        let published = node.published.and_then(|key| key.parse().ok());
        if let Some(key) = published {
            self.rotation.shown(key, self.now());
        }
        self.report_rotation(&session.control.state().await?);
        self.publish();
        Ok(())
    }

    /// Makes the next key the only one.
    async fn promote(&mut self, session: &Session, next: &NodeKey) -> Result<(), EncryptionError> {
        let update = DeviceUpdate {
            private_key: Change::Set(next.key.clone()),
            next_private_key: if session.control.is_kernel() { Change::Keep } else { Change::Clear },
            ..DeviceUpdate::default()
        };
        // The file first: should the agent end between the two, the device is told the key that it knows as the next one,
        // and keeps what was agreed under it.
        self.files.promote()?;
        self.current = next.clone();
        self.rotation = Rotation::Idle;
        self.tell_own_keys();
        let peers = self.report.as_ref().map_or((0, 0), |report| (report.switched, report.peers));
        self.report = Some(RotationReport {
            id: next.rotation.clone(),
            state: RotationState::Done,
            public_key: next.key.public_key().to_string(),
            switched: peers.0,
            peers: peers.1,
            message: None,
        });
        session.control.apply(&update).await?;
        tracing::info!(rotation = %next.rotation, public_key = %next.key.public_key(), "this node's key was exchanged");
        self.publish();
        Ok(())
    }

    fn report_rotation(&mut self, state: &DeviceState) {
        let switched = self.rotation.switched(&self.sessions(state));
        if let Some(next) = self.rotation.next() {
            self.report = Some(RotationReport {
                id: next.rotation.clone(),
                state: RotationState::InProgress,
                public_key: next.key.public_key().to_string(),
                switched: switched.done,
                peers: switched.of,
                message: None,
            });
        }
    }

    fn sessions(&self, state: &DeviceState) -> Sessions {
        self.device.as_ref().map(|device| device.sessions(state)).unwrap_or_default()
    }

    fn publish(&self) {
        let key = self.rotation.advertised(&self.current.key).public_key();
        let wanted = Wanted::Key { key, rotation: self.report.clone() };
        self.wanted.send_if_modified(|now| {
            let changed = *now != wanted;
            *now = wanted;
            changed
        });
    }

    async fn look(&mut self, session: &Session, looks: u32) -> Result<(), EncryptionError> {
        let link = session.control.link().await;
        let gone = matches!(link, Err(ControlError::NoInterface { .. }));
        if gone || link.as_ref().is_ok_and(|link| link.index != session.link.index || !link.up) {
            self.without_device(&session.control).await?;
            return Err(EncryptionError::Exchanged(session.control.interface().to_owned()));
        }
        let calm = self.rotation == Rotation::Idle
            && self.pending.is_none()
            && self.device.as_ref().is_none_or(Device::is_calm);
        let large = self.device.as_ref().is_some_and(|device| device.peers() > LARGE);
        let for_status = looks.is_multiple_of(if large { STATUS_LOOKS_LARGE } else { STATUS_LOOKS });
        let for_comparison = looks.is_multiple_of(COMPARE_LOOKS);
        if calm && !for_status && !for_comparison {
            return Ok(());
        }
        let state = session.control.state().await?;
        self.check_keys(session, &state)?;
        if let Some(device) = &mut self.device {
            let at = circumstances(self.start, &self.node, self.rotation.advertised(&self.current.key));
            let updates = {
                let peers = self.peers.lock();
                let mut updates = device.progress(&state, &peers, at);
                if for_comparison && updates.is_empty() {
                    device.adopt(&state);
                    updates = device.all(&peers, at);
                    if !updates.is_empty() {
                        tracing::warn!(
                            updates = updates.len(),
                            "the device was not as the agent had left it; put right"
                        );
                    }
                }
                updates
            };
            apply(&session.control, updates).await?;
        }
        if let Some(pending) = self.pending.take() {
            self.pending = pending.proceed(&state, self.now());
        }
        if let Rotation::Switching { next, .. } = self.rotation.clone() {
            self.report_rotation(&state);
            if self.rotation.is_complete(&self.sessions(&state), self.now()) {
                self.promote(session, &next).await?;
                // Another key may have been asked for meanwhile.
                self.advance(session).await?;
            }
            self.publish();
        }
        if for_status {
            self.make_status(session, &state).await;
        }
        Ok(())
    }

    /// Begins to ask which nodes can be reached.
    async fn ask(&mut self, session: &Session, question: Question) -> Result<(), EncryptionError> {
        let state = session.control.state().await?;
        let Some(device) = &mut self.device else { return Ok(()) };
        let (pending, updates) = {
            let peers = self.peers.lock();
            let at = circumstances(self.start, &self.node, self.rotation.advertised(&self.current.key));
            Pending::begin(question, &state, device, &peers, at)
        };
        apply(&session.control, updates).await?;
        self.pending = pending.proceed(&state, self.now());
        Ok(())
    }

    /// A device in user space that was started anew within a look has no key, and one that somebody else has configured
    /// has another.
    fn check_keys(&self, session: &Session, state: &DeviceState) -> Result<(), EncryptionError> {
        let port = state.listen_port == self.settings.port;
        if port && state.private_key.as_ref() == Some(&self.current.key) {
            return Ok(());
        }
        Err(EncryptionError::Exchanged(session.control.interface().to_owned()))
    }

    async fn tell_keys(&self, control: &Control, state: &DeviceState) -> Result<(), EncryptionError> {
        let mut update = DeviceUpdate::default();
        if state.private_key.as_ref() != Some(&self.current.key) {
            update.private_key = Change::Set(self.current.key.clone());
        }
        let next = self.rotation.next().map(|next| next.key.clone());
        if !control.is_kernel() && state.next_private_key != next {
            update.next_private_key = next.map_or(Change::Clear, Change::Set);
        }
        if state.listen_port != self.settings.port {
            update.listen_port = Some(self.settings.port);
        }
        if update != DeviceUpdate::default() {
            control.apply(&update).await?;
        }
        Ok(())
    }

    fn tell_own_keys(&self) {
        let next = self.rotation.next().map(|next| next.key.public_key());
        let keys = BTreeSet::from_iter(next.into_iter().chain([self.current.key.public_key()]));
        self.peers.lock().set_own_keys(keys);
    }

    fn now(&self) -> Moment {
        Moment(self.start.elapsed())
    }

    async fn make_status(&self, session: &Session, state: &DeviceState) {
        let now = SystemTime::now();
        let key = self.rotation.advertised(&self.current.key).public_key();
        let counters = session.control.counters().await.unwrap_or_default();
        let (node, peers) = (self.node.borrow().clone(), self.peers.lock());
        let of_peer = |peer: &isthmus_wireguard::config::PeerState| {
            let node = self.device.as_ref().and_then(|device| device.node(&peer.public_key));
            let age = peer.last_handshake.map(|at| now.duration_since(at).unwrap_or_default());
            PeerStatus {
                node: node.map(|node| node.name.to_string()),
                cluster: node.and_then(|node| peers.cluster(node)).map(ToString::to_string),
                public_key: peer.public_key.to_string(),
                endpoint: peer.endpoint.map(|endpoint| endpoint.to_string()),
                last_handshake_seconds: age.map(|age| age.as_secs_f64()),
                rx_bytes: peer.rx_bytes,
                tx_bytes: peer.tx_bytes,
                allowed_ips: peer.allowed_ips.len(),
            }
        };
        let mut all: Vec<PeerStatus> = state.peers.iter().map(of_peer).collect();
        all.sort_by(|a, b| (&a.cluster, &a.node, &a.public_key).cmp(&(&b.cluster, &b.node, &b.public_key)));
        let refused = peers.refused().into_iter().map(|refused| RefusedKeyStatus {
            node: refused.node.to_string(),
            cluster: refused.cluster.to_string(),
            public_key: refused.key.map(|key| key.to_string()),
            kind: refused.reason.word().to_owned(),
            reason: refused.reason.to_string(),
        });
        self.status.send_replace(EncryptionStatus {
            enabled: true,
            strict: self.settings.strict,
            ready: true,
            problem: node.error.clone(),
            mode: Some(mode(&session.control).to_owned()),
            public_key: Some(key.to_string()),
            published: node.shows(&key),
            interface: session.control.interface().to_owned(),
            port: self.settings.port,
            mtu: session.link.mtu,
            peers: all,
            refused_keys: refused.collect(),
            rotation: self.report.clone(),
            counters,
        });
    }
}

fn mode(control: &Control) -> &'static str {
    if control.is_kernel() { "kernel" } else { "user" }
}

fn circumstances(start: Instant, node: &watch::Receiver<OwnNode>, key: &PrivateKey) -> Circumstances {
    Circumstances { now: Moment(start.elapsed()), published: node.borrow().shows(&key.public_key()) }
}

async fn apply(control: &Control, updates: Vec<PeerUpdate>) -> Result<(), EncryptionError> {
    for batch in updates.chunks(BATCH) {
        control.apply(&DeviceUpdate { peers: batch.to_vec(), ..DeviceUpdate::default() }).await?;
    }
    Ok(())
}
