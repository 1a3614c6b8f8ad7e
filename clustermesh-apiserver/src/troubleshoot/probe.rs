//! One peer, step by step, in the order in which its connection is made. A step that cannot be tried is told as such, and
//! why.

use std::net::SocketAddr;
use std::time::Duration;

use chrono::Utc;
use etcd_client::Client;
use futures::future::join_all;
use isthmus_kvstore::client::steps::Resolver;
use isthmus_kvstore::config::{ClientConfig, Endpoint};
use isthmus_wire::{ClusterConfig, ClusterName};
use tokio::net::TcpStream;

use super::data::{self, Found};
use super::fault::{Circumstances, Fault, instant, one_line};
use super::link;
use super::relay;
use super::report::{Outcome, PeerReport, Step, StepReport};
use super::store::{CallError, Store};
use super::target::Target;
use crate::relay::{NotReached, OwnCluster};
use crate::status::PeerStatus;

/// The most addresses that are tried.
const MOST_ADDRESSES: usize = 16;
/// Cluster Mesh needs what etcd can do since this version.
const OLDEST_ETCD: (u64, u64) = (3, 4);

/// What a probe is bounded by.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long one question may take: a name, a connection, a handshake, a call.
    pub patience: Duration,
    /// How old the mirrored data may be. The relay asks every 30 s how far it is.
    pub data_age: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { patience: Duration::from_secs(5), data_age: Duration::from_secs(75) }
    }
}

/// What is held against a peer.
pub(super) struct Against<'a> {
    /// The own cluster, where it is known.
    pub(super) own: Option<&'a OwnCluster>,
    /// The running relay's peers, where there is one.
    pub(super) relay: Option<&'a [PeerStatus]>,
    pub(super) resolver: &'a Resolver,
    pub(super) limits: Limits,
}

/// Probes one peer.
pub(super) async fn run(target: &Target, of: Circumstances, against: &Against<'_>) -> PeerReport {
    let mut probe = Probe { of, steps: Vec::new(), limits: against.limits };
    if target.client == Err(NotReached::Admitted) {
        let seen = vec![format!("{} may read from this cluster; nothing is read from it", target.name)];
        probe.told(Step::Configuration, Found { seen, faults: Vec::new() });
        let why = "nothing is read from it; ask where it is whether it reads from here";
        let rest = Step::OF_APISERVER.into_iter().filter(|step| *step != Step::Configuration);
        rest.for_each(|step| probe.skip(step, why));
        return probe.report(target);
    }
    let revision = probe.connection(target, against).await;
    let ran_into = probe.failure();
    let relay = against.relay.map(|peers| peers.iter().find(|peer| peer.name == target.name.as_str()));
    match relay {
        None => probe.skip(Step::Relay, "asked without an apiserver"),
        Some(peer) => {
            let (outcome, found) = relay::judge(peer, revision, ran_into, against.limits.data_age);
            match outcome {
                Some(reason) => {
                    probe.skip(Step::Relay, reason);
                    if let Some(report) = probe.steps.last_mut() {
                        report.seen.extend(found.seen);
                    }
                }
                None => {
                    probe.told(Step::Relay, found);
                }
            }
        }
    }
    probe.report(target)
}

/// A report on a peer that is none.
pub(super) fn unknown(name: &str, of: &Circumstances, known: Vec<String>) -> PeerReport {
    let finding = Fault::NotConfigured { known }.finding(of);
    let mut steps = vec![StepReport::new(Step::Configuration, Vec::new(), vec![finding])];
    let rest = Step::OF_APISERVER.into_iter().filter(|step| *step != Step::Configuration);
    steps.extend(rest.map(|step| StepReport::skipped(step, "nothing is known of this peer")));
    PeerReport { name: name.to_owned(), source: "nothing".to_owned(), steps }
}

struct Probe {
    of: Circumstances,
    steps: Vec<StepReport>,
    limits: Limits,
}

/// A way to the peer.
struct Way<'a> {
    endpoint: &'a Endpoint,
    address: SocketAddr,
}

impl Probe {
    fn report(self, target: &Target) -> PeerReport {
        PeerReport { name: target.name.to_string(), source: target.source.to_string(), steps: self.steps }
    }

    /// All steps but the relay's. Returns the revision of the peer's store, if it has been asked.
    async fn connection(&mut self, target: &Target, against: &Against<'_>) -> Option<i64> {
        let Some(config) = self.configuration(target) else { return self.give_up() };
        let ways = self.dns(config, against.resolver).await;
        if ways.is_empty() {
            return self.give_up();
        }
        let connected = self.tcp(ways).await;
        if connected.is_empty() {
            return self.give_up();
        }
        let Some((way, opened)) = self.tls(config, connected).await else { return self.give_up() };
        let Some(store) = self.gateway(config, &way, opened).await else { return self.give_up() };
        self.data(&store, &target.name, against).await;
        self.store(config, &way, &store).await;
        // In the order of the steps, not of the questions.
        self.steps.sort_by_key(|report| report.step);
        self.give_up();
        Some(store.seen().revision)
    }

    /// Whatever has not been tried is told so.
    fn give_up(&mut self) -> Option<i64> {
        let reason = self
            .failure()
            .map_or_else(|| "not tried".to_owned(), |step| format!("not tried, because of: {step}"));
        for step in Step::OF_APISERVER.into_iter().filter(|step| *step != Step::Relay) {
            if !self.steps.iter().any(|report| report.step == step) {
                self.skip(step, reason.clone());
            }
        }
        None
    }

    /// The first step that failed.
    fn failure(&self) -> Option<Step> {
        self.steps.iter().find(|report| report.outcome == Outcome::Failed).map(|report| report.step)
    }

    fn configuration<'a>(&mut self, target: &'a Target) -> Option<&'a ClientConfig> {
        let config = match &target.client {
            Ok(config) => config,
            Err(NotReached::Unusable(reason)) => {
                self.told(
                    Step::Configuration,
                    Found { seen: Vec::new(), faults: vec![Fault::Unusable { reason: reason.clone() }] },
                );
                return None;
            }
            Err(NotReached::Admitted) => return None,
        };
        let endpoints: Vec<_> = config.endpoints.iter().map(ToString::to_string).collect();
        let now = Utc::now();
        let material = link::material(config, now);
        self.of.common_name = material.own.as_ref().map(|own| own.subject.clone());
        let mut seen = vec![format!("endpoints: {}", endpoints.join(", "))];
        seen.extend(material.authorities.iter().map(|authority| {
            format!("trusted: {:?}, {}", authority.subject, super::fault::period(authority))
        }));
        seen.extend(material.own.iter().map(|own| {
            format!("we are {:?}, issued by {:?}, {}", own.subject, own.issuer, super::fault::period(own))
        }));
        seen.push(format!("the clock here says {}", instant(now)));
        self.told(Step::Configuration, Found { seen, faults: material.faults }).then_some(config)
    }

    /// Resolves every endpoint's host.
    async fn dns<'a>(&mut self, config: &'a ClientConfig, resolver: &Resolver) -> Vec<Way<'a>> {
        let patience = self.limits.patience;
        let answers = join_all(
            config.endpoints.iter().map(|endpoint| link::resolve(resolver, config, endpoint, patience)),
        )
        .await;
        let (mut ways, mut found) = (Vec::new(), Found::default());
        for (endpoint, answer) in config.endpoints.iter().zip(answers) {
            match answer {
                Err(fault) if found.faults.contains(&fault) => {}
                Err(fault) => found.faults.push(fault),
                Ok(resolution) => {
                    if !found.seen.contains(&resolution.told) {
                        found.seen.push(resolution.told);
                    }
                    found.faults.extend(resolution.fault);
                    let addresses = resolution.addresses.into_iter();
                    ways.extend(addresses.map(|address| Way { endpoint, address }));
                }
            }
        }
        ways.truncate(MOST_ADDRESSES);
        self.some(Step::Dns, found, !ways.is_empty());
        ways
    }

    async fn tcp<'a>(&mut self, ways: Vec<Way<'a>>) -> Vec<(Way<'a>, TcpStream)> {
        let patience = self.limits.patience;
        let answers = join_all(ways.iter().map(|way| link::tcp(way.address, patience))).await;
        let (mut connected, mut found) = (Vec::new(), Found::default());
        for (way, answer) in ways.into_iter().zip(answers) {
            match answer {
                Err(fault) => found.faults.push(fault),
                Ok((stream, took)) => {
                    found.seen.push(format!("{}: connected in {}ms", way.address, took.as_millis()));
                    connected.push((way, stream));
                }
            }
        }
        self.some(Step::Tcp, found, !connected.is_empty());
        connected
    }

    /// Shakes hands on every connection; the first good way is gone on with.
    async fn tls<'a>(
        &mut self,
        config: &ClientConfig,
        connected: Vec<(Way<'a>, TcpStream)>,
    ) -> Option<(Way<'a>, Result<Client, Fault>)> {
        let patience = self.limits.patience;
        let tried = connected.into_iter().map(|(way, stream)| async move {
            let answer = link::tls(config, way.endpoint, way.address, stream, patience).await;
            (way, answer)
        });
        let (mut good, mut found) = (None::<(Way<'a>, Result<Client, Fault>)>, Found::default());
        for (way, answer) in join_all(tried).await {
            match answer {
                Err(fault) if found.faults.contains(&fault) => {}
                Err(fault) => found.faults.push(fault),
                Ok(shaken) => {
                    found.seen.extend(shaken.told);
                    // One that leads to a store is better than one that leads elsewhere.
                    if good.as_ref().is_none_or(|(_, opened)| opened.is_err() && shaken.opened.is_ok()) {
                        good = Some((way, shaken.opened));
                    }
                }
            }
        }
        self.some(Step::Tls, found, good.is_some());
        good
    }

    async fn gateway(
        &mut self,
        config: &ClientConfig,
        way: &Way<'_>,
        opened: Result<Client, Fault>,
    ) -> Option<Store> {
        let store = match opened {
            Ok(client) => Store::new(client, self.limits.patience),
            Err(fault) => {
                self.told(Step::Gateway, Found { seen: Vec::new(), faults: vec![fault] });
                return None;
            }
        };
        let mut found = Found::default();
        match store.about().await {
            Ok(about) => {
                found.seen.push(format!("{}: etcd v3 API, version {}", way.endpoint, about.version));
                if version(&about.version).is_some_and(|version| version < OLDEST_ETCD) {
                    found.faults.push(Fault::OldEtcd { version: about.version });
                }
                if !about.errors.is_empty() {
                    found.faults.push(Fault::Alarm { errors: about.errors });
                }
            }
            // It understood the question.
            Err(CallError::Denied(_)) => {
                found.seen.push(format!("{}: etcd v3 API, version not told to us", way.endpoint));
            }
            Err(error @ CallError::Failed(_)) => {
                // What is no HTTP/2 breaks the connection. Asked in its own language it may say what it is.
                let answer = link::http_answer(config, way.endpoint, way.address, self.limits.patience).await;
                found.faults.push(match answer {
                    Some(answer) => Fault::HttpServer { answer },
                    None => gateway_fault(error),
                });
            }
            Err(error) => found.faults.push(gateway_fault(error)),
        }
        self.told(Step::Gateway, found).then_some(store)
    }

    async fn data(&mut self, store: &Store, peer: &ClusterName, against: &Against<'_>) {
        let permissions = data::permissions(store, peer).await;
        if !self.asked(Step::Permissions, permissions) {
            return;
        }
        let taken: Vec<(ClusterName, u16)> = against
            .relay
            .into_iter()
            .flatten()
            .filter_map(|peer| Some((peer.name.parse().ok()?, peer.cluster_id?)))
            .collect();
        let config = match data::cluster_config(store, peer, against.own, &taken).await {
            Ok((found, config)) => {
                self.told(Step::ClusterConfig, found);
                config
            }
            Err(error) => {
                self.told(Step::ClusterConfig, fault(gateway_fault(error)));
                return;
            }
        };
        let since = match &config {
            None => None,
            Some(config) => self.canaries(store, peer, config).await,
        };
        let heartbeat = data::heartbeat(store, since, Utc::now()).await;
        self.asked(Step::Heartbeat, heartbeat);
    }

    async fn canaries(
        &mut self,
        store: &Store,
        peer: &ClusterName,
        config: &ClusterConfig,
    ) -> Option<chrono::DateTime<Utc>> {
        match data::canaries(store, peer, config, Utc::now()).await {
            Ok((found, since)) => {
                self.told(Step::Canaries, found);
                since
            }
            Err(error) => {
                self.told(Step::Canaries, fault(gateway_fault(error)));
                None
            }
        }
    }

    /// From which stores all the answers came; and another connection's.
    async fn store(&mut self, config: &ClientConfig, way: &Way<'_>, store: &Store) {
        let seen = store.seen();
        let [first, rest @ ..] = seen.ids.as_slice() else { return };
        let mut found = Found::default();
        found.seen.push(format!("{first:x} in {} answers, revision {}", seen.answers, seen.revision));
        if let Some(is) = rest.first() {
            found.faults.push(Fault::StoreExchanged { was: *first, is: *is });
        }
        if seen.without > 0 {
            let reason = format!("{} answers had no header, so nobody knows from which store", seen.without);
            found.faults.push(Fault::GatewayFailed { reason });
        }
        let patience = self.limits.patience;
        if let Ok(client) = link::open(config, way.endpoint, way.address, patience).await {
            let other = Store::new(client, patience);
            let _ = other.about().await;
            for id in other.seen().ids.iter().filter(|id| !seen.ids.contains(id)) {
                found.seen.push(format!(
                    "{id:x} on another connection: the peer has several replicas, or was just restarted"
                ));
            }
        }
        self.told(Step::Store, found);
    }

    /// Of several ways some may fail: that is to be looked at, and nothing worse while one works.
    fn some(&mut self, step: Step, found: Found, works: bool) {
        self.told(step, found);
        if works && let Some(report) = self.steps.last_mut() {
            for finding in &mut report.findings {
                finding.severity = finding.severity.min(Outcome::Warning);
            }
            report.outcome = report.outcome.min(Outcome::Warning);
        }
    }

    fn asked(&mut self, step: Step, answer: Result<Found, CallError>) -> bool {
        self.told(step, answer.unwrap_or_else(|error| fault(gateway_fault(error))))
    }

    /// Whether the step holds.
    fn told(&mut self, step: Step, found: Found) -> bool {
        let findings = found.faults.iter().map(|fault| fault.finding(&self.of)).collect();
        let seen = found.seen.iter().map(|line| one_line(line)).collect();
        let report = StepReport::new(step, seen, findings);
        let holds = report.holds();
        self.steps.push(report);
        holds
    }

    fn skip(&mut self, step: Step, reason: impl Into<String>) {
        self.steps.push(StepReport::skipped(step, reason));
    }
}

fn fault(fault: Fault) -> Found {
    Found { seen: Vec::new(), faults: vec![fault] }
}

fn gateway_fault(error: CallError) -> Fault {
    match error {
        CallError::NotEtcd(answer) => Fault::NotEtcd { answer },
        CallError::Silent(after) => Fault::GatewaySilent { after },
        CallError::Denied(reason) | CallError::Failed(reason) => Fault::GatewayFailed { reason },
    }
}

/// Major and minor.
fn version(text: &str) -> Option<(u64, u64)> {
    let mut numbers = text.split('.').map_while(|number| number.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}
