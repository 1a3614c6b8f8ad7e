//! Whether other nodes' devices can be reached, asked when somebody wants to know.
//!
//! A session that is in use proves it. A peer without one is greeted, as a new peer is: the device begins a handshake
//! although there is nothing to send, and who answers can be reached in both directions. Nothing else about the peer is
//! touched, and the greeting ends by itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use isthmus_wireguard::config::{DeviceState, PeerUpdate, PublicKey};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::device::{Circumstances, Device};
use super::peers::Peers;
use super::status::EncryptionStatus;
use crate::mesh::fact::Moment;

/// How long an answer is waited for: WireGuard sends a handshake anew after five seconds.
const PATIENCE: Duration = Duration::from_secs(6);
/// How long the device's task may take beyond that.
const GRACE: Duration = Duration::from_secs(4);
/// A session is not used beyond this age.
const SESSION: Duration = Duration::from_secs(180);
/// The most peers that are greeted at once.
const MOST_GREETED: usize = 256;

/// `GET /v1/probe?cluster=NAME`: which nodes' devices this node's device reaches.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReachReport {
    /// Name of the own cluster.
    pub cluster: String,
    /// Name of this node.
    pub node: String,
    /// Traffic between nodes is to be encrypted here.
    pub enabled: bool,
    /// What cannot be encrypted is dropped.
    pub strict: bool,
    /// Why the device cannot be asked.
    pub problem: Option<String>,
    /// Whether the other nodes are told this node's key: they answer nobody else.
    pub published: bool,
    /// How long answers were waited for at most.
    pub waited_seconds: f64,
    /// The other nodes, by cluster and name.
    pub nodes: Vec<NodeReach>,
    /// How many without a session were not asked, for there were too many.
    pub not_asked: usize,
}

/// Whether one node can be reached.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeReach {
    /// Name of its cluster.
    pub cluster: String,
    /// Its name.
    pub node: String,
    /// Where its device is expected.
    pub endpoint: Option<String>,
    /// What is known.
    pub reach: Reach,
    /// Seconds since the last handshake; none if there was none.
    pub last_handshake_seconds: Option<f64>,
    /// More about it, where there is more.
    pub reason: Option<String>,
}

/// What is known about the way to a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reach {
    /// There is a session that can be used.
    Session,
    /// It answered the handshake that it was asked for.
    Answered,
    /// It did not answer.
    Silent,
    /// It had no session and was not asked, for there were too many.
    NotAsked,
    /// It publishes no key.
    KeyMissing,
    /// Its key is not used.
    KeyRefused,
}

/// Asks the task that keeps the device, for one caller at a time.
#[derive(Clone, Debug)]
pub struct Prober {
    cluster: Arc<str>,
    node: Arc<str>,
    /// None where nothing is encrypted.
    questions: Option<mpsc::Sender<Question>>,
    status: watch::Receiver<EncryptionStatus>,
    turn: Arc<Semaphore>,
}

/// Somebody else is asking.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the nodes are being asked already; ask again in a few seconds")]
pub struct Busy;

/// What the device's task is asked.
#[derive(Debug)]
pub struct Question {
    /// About this cluster's nodes alone.
    cluster: Option<String>,
    answer: oneshot::Sender<ReachReport>,
}

impl Prober {
    /// One for the node `node` of `cluster`. The second part is for the task that keeps the device.
    pub fn new(
        cluster: &str,
        node: &str,
        status: watch::Receiver<EncryptionStatus>,
    ) -> (Self, mpsc::Receiver<Question>) {
        let (questions, asked) = mpsc::channel(1);
        let prober = Self { questions: Some(questions), ..Self::off(cluster, node, status) };
        (prober, asked)
    }

    /// One for a node that does not encrypt.
    pub fn off(cluster: &str, node: &str, status: watch::Receiver<EncryptionStatus>) -> Self {
        Self {
            cluster: cluster.into(),
            node: node.into(),
            questions: None,
            status,
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    /// Asks about the nodes of `cluster`, or about all. Takes a few seconds if some do not answer.
    ///
    /// # Errors
    /// [`Busy`] while somebody else asks.
    pub async fn ask(&self, cluster: Option<String>) -> Result<ReachReport, Busy> {
        let _turn = self.turn.try_acquire().map_err(|_| Busy)?;
        let now = self.status.borrow().clone();
        let of = |report| ReachReport {
            cluster: self.cluster.to_string(),
            node: self.node.to_string(),
            strict: now.strict,
            ..report
        };
        let Some(questions) = &self.questions else { return Ok(of(ReachReport::default())) };
        let problem =
            |problem| of(ReachReport { enabled: true, problem: Some(problem), ..ReachReport::default() });
        if !now.ready {
            let reason = now.problem.clone();
            return Ok(problem(reason.unwrap_or_else(|| "the device is not ready".to_owned())));
        }
        let (answer, answered) = oneshot::channel();
        let asked = async {
            questions.send(Question { cluster, answer }).await.ok()?;
            answered.await.ok()
        };
        Ok(match tokio::time::timeout(PATIENCE + GRACE, asked).await {
            Ok(Some(report)) => of(report),
            Ok(None) => problem("the device went away while it was asked".to_owned()),
            Err(_) => problem("the device does not answer".to_owned()),
        })
    }
}

/// A question while answers are waited for.
#[derive(Debug)]
pub struct Pending {
    answer: oneshot::Sender<ReachReport>,
    report: ReachReport,
    /// Peers that were asked, by their place in the report, and when they were last heard of before.
    asked: BTreeMap<usize, (PublicKey, Option<SystemTime>)>,
    until: Moment,
}

impl Pending {
    /// Begins to ask, and what to tell the device for that.
    pub fn begin(
        question: Question,
        state: &DeviceState,
        device: &mut Device,
        peers: &Peers,
        at: Circumstances,
    ) -> (Self, Vec<PeerUpdate>) {
        let wanted = |cluster: &str| question.cluster.as_deref().is_none_or(|wanted| wanted == cluster);
        let now = SystemTime::now();
        let until = Moment(at.now.0 + PATIENCE);
        let mut nodes = Vec::new();
        for (id, peer) in peers.all() {
            let Some(cluster) = peers.cluster(id).filter(|cluster| wanted(cluster)) else { continue };
            let known = state.peer(&peer.key);
            let before = known.and_then(|known| known.last_handshake);
            let age = before.map(|at| now.duration_since(at).unwrap_or_default());
            let fresh = age.is_some_and(|age| age < SESSION);
            let node = NodeReach {
                cluster: cluster.to_string(),
                node: id.name.to_string(),
                endpoint: known.and_then(|known| known.endpoint).map(|endpoint| endpoint.to_string()),
                reach: if fresh { Reach::Session } else { Reach::NotAsked },
                last_handshake_seconds: age.map(|age| age.as_secs_f64()),
                reason: None,
            };
            nodes.push((node, (!fresh).then_some((peer.key, before))));
        }
        let without = peers.keyless().filter(|(_, cluster)| wanted(cluster));
        nodes
            .extend(without.map(|(id, cluster)| (keyless(&id.name, cluster, Reach::KeyMissing, None), None)));
        let refused = peers.refused().into_iter().filter(|refused| wanted(&refused.cluster));
        nodes.extend(refused.map(|refused| {
            let reason = Some(refused.reason.to_string());
            (keyless(&refused.node, &refused.cluster, Reach::KeyRefused, reason), None)
        }));
        nodes.sort_by(|(a, _), (b, _)| (&a.cluster, &a.node).cmp(&(&b.cluster, &b.node)));

        let mut asked = BTreeMap::new();
        let mut not_asked = 0;
        for (place, (node, peer)) in nodes.iter_mut().enumerate() {
            match peer {
                Some(peer) if asked.len() < MOST_GREETED => {
                    node.reach = Reach::Silent;
                    asked.insert(place, *peer);
                }
                Some(_) => not_asked += 1,
                None => {}
            }
        }
        let updates = device.greet(asked.values().copied(), until);
        let report = ReachReport {
            enabled: true,
            published: at.published,
            waited_seconds: PATIENCE.as_secs_f64(),
            nodes: nodes.into_iter().map(|(node, _)| node).collect(),
            not_asked,
            ..ReachReport::default()
        };
        (Self { answer: question.answer, report, asked, until }, updates)
    }

    /// Takes in who has answered by now. Gives itself back while there is somebody to wait for.
    pub fn proceed(mut self, state: &DeviceState, now: Moment) -> Option<Self> {
        let report = &mut self.report;
        self.asked.retain(|place, (key, before)| {
            let latest = state.peer(key).and_then(|peer| peer.last_handshake);
            if latest <= *before {
                return true;
            }
            if let Some(node) = report.nodes.get_mut(*place) {
                node.reach = Reach::Answered;
                node.last_handshake_seconds = Some(0.0);
            }
            false
        });
        // Who asked may have left meanwhile.
        if !self.asked.is_empty() && now < self.until && !self.answer.is_closed() {
            return Some(self);
        }
        let _ = self.answer.send(self.report);
        None
    }
}

fn keyless(node: &str, cluster: &str, reach: Reach, reason: Option<String>) -> NodeReach {
    NodeReach {
        cluster: cluster.to_owned(),
        node: node.to_owned(),
        endpoint: None,
        reach,
        last_handshake_seconds: None,
        reason,
    }
}
