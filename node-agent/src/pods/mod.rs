//! The pods of this node: packet programs on the host's side of each pod's interfaces, for as long as the pod lives.
//! What the CNI installed is not touched.
//!
//! Kubernetes says which pods there are; the cgroup that the kubelet made for a pod leads to a process of it, the process
//! to the network namespace, the namespace to the interfaces. Until the sandbox is up, this is tried again.

mod cgroup;
mod places;
mod veth;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use isthmus_bpf_abi::{Addr, LocalPod};
use isthmus_policy::Subject;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::runtime::watcher;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::places::Places;
use self::veth::{PodInterface, VethError};
use crate::datapath::{AtFirst, Datapath, DatapathError, EndpointSettings, OpError, PolicyError};
use crate::kubernetes;
use crate::policy::{self, LocalEndpoint};

const FIRST_RETRY: Duration = Duration::from_millis(50);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// How often attached pods are looked at for an exchanged sandbox.
const CHECK: Duration = Duration::from_secs(10);

/// Where packet programs can be attached, and pods be found by address.
pub trait Attach: Send + Sync + 'static {
    /// Attaches the programs to an interface.
    ///
    /// # Errors
    /// The kernel refuses.
    fn attach(&self, interface: u32) -> Result<(), DatapathError>;
    /// Detaches them. One that is gone is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    fn detach(&self, interface: u32) -> Result<(), DatapathError>;
    /// Interfaces with programs of an earlier run.
    ///
    /// # Errors
    /// They cannot be listed.
    fn attached(&self) -> Result<Vec<u32>, DatapathError>;
    /// Says where the pod with an address is.
    ///
    /// # Errors
    /// There is no room, or the kernel refuses.
    fn place(&self, addr: IpAddr, pod: LocalPod) -> Result<(), OpError>;
    /// Forgets it. What is not known is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    fn unplace(&self, addr: IpAddr) -> Result<(), OpError>;
    /// Makes an endpoint known before programs are attached to its interface, and holds its packets back until its policy
    /// is known; one that an earlier run of the agent has made known stays as it is. Says whether it is such a one.
    ///
    /// # Errors
    /// There is no room, or the kernel refuses.
    fn hold(&self, _interface: u32, _settings: &EndpointSettings) -> Result<bool, PolicyError> {
        Ok(false)
    }
    /// Whether this or an earlier run has made any endpoint known.
    ///
    /// # Errors
    /// It cannot be read.
    fn knows_endpoints(&self) -> Result<bool, DatapathError> {
        Ok(true)
    }
    /// Addresses of this and of an earlier run.
    ///
    /// # Errors
    /// They cannot be listed.
    fn placed(&self) -> Result<Vec<IpAddr>, DatapathError>;
}

impl Attach for Datapath {
    fn attach(&self, interface: u32) -> Result<(), DatapathError> {
        self.attach_pod(interface)
    }

    fn detach(&self, interface: u32) -> Result<(), DatapathError> {
        self.detach_pod(interface)
    }

    fn attached(&self) -> Result<Vec<u32>, DatapathError> {
        self.attached_pods()
    }

    fn place(&self, addr: IpAddr, pod: LocalPod) -> Result<(), OpError> {
        self.put_local_pod(addr, pod)
    }

    fn unplace(&self, addr: IpAddr) -> Result<(), OpError> {
        self.remove_local_pod(addr)
    }

    fn hold(&self, interface: u32, settings: &EndpointSettings) -> Result<bool, PolicyError> {
        let former = self.endpoints()?.into_iter().find(|(known, _)| *known == interface);
        if let Some((_, former)) = former {
            let as_known = |addr: Option<IpAddr>| addr.map_or_else(Addr::default, Addr::from);
            if former.ipv4 == as_known(settings.ipv4.map(IpAddr::V4))
                && former.ipv6 == as_known(settings.ipv6.map(IpAddr::V6))
            {
                return Ok(true);
            }
            // The interface of another pod once, whose policy is none of this one's business.
            self.remove_endpoint(interface)?;
        }
        self.put_endpoint(interface, settings, AtFirst::Wait)?;
        Ok(false)
    }

    fn knows_endpoints(&self) -> Result<bool, DatapathError> {
        Ok(self.policy_epoch()? != 0)
    }

    fn placed(&self) -> Result<Vec<IpAddr>, DatapathError> {
        Ok(self.local_pods()?.into_iter().map(|(addr, _)| addr).collect())
    }
}

/// Where pods are found on this machine.
#[derive(Clone, Debug)]
pub struct PodPaths {
    /// The cgroup2 directory below which the kubelet makes those of pods.
    pub cgroup_root: PathBuf,
    /// Where procfs is mounted.
    pub proc_root: PathBuf,
}

/// Where it is told which pods are at which interfaces.
#[derive(Clone, Debug)]
pub struct Tell {
    /// Index of the host's side of an interface, and its pod; none when it has none any more. Unbounded: there are as many
    /// as the node's pods change.
    pub endpoints: mpsc::UnboundedSender<(u32, Option<LocalEndpoint>)>,
    /// Whether packets of a pod are held back until its policy is known.
    pub hold: bool,
}

/// How the pods of this node are.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PodsStatus {
    /// Pods with programs on their interfaces.
    pub attached: usize,
    /// Pods without, and why: `namespace/name` to the reason.
    pub waiting: BTreeMap<String, String>,
    /// Of them, those whose packets are all dropped.
    pub closed: Vec<ClosedPod>,
    /// All pods of the node have been listed.
    pub listed: bool,
    /// Why the Kubernetes API cannot be read.
    pub error: Option<String>,
}

/// A pod for whose policy there is no room: nothing is allowed to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClosedPod {
    /// `namespace/name`.
    pub pod: Arc<str>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Why.
    pub reason: String,
}

/// Follows the pods of the node until `shutdown`. Programs stay attached then.
pub async fn run(
    pods: Api<Pod>,
    node: String,
    paths: PodPaths,
    attach: Arc<dyn Attach>,
    tell: Tell,
    status: watch::Sender<PodsStatus>,
    shutdown: CancellationToken,
) {
    let mut node_pods = NodePods::new(paths, attach, tell);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let mut events = std::pin::pin!(kubernetes::watch(pods, config));
    let mut listing: Option<BTreeSet<String>> = None;
    loop {
        let retry = node_pods.next_retry();
        tokio::select! {
            () = shutdown.cancelled() => return,
            event = events.try_next() => match event {
                Ok(Some(event)) => {
                    node_pods.error = None;
                    match event {
                        watcher::Event::Init => listing = Some(BTreeSet::new()),
                        watcher::Event::InitApply(pod) => {
                            if let (Some(seen), Some(uid)) = (&mut listing, uid(&pod)) {
                                seen.insert(uid);
                            }
                            node_pods.apply(&pod).await;
                        }
                        watcher::Event::InitDone => {
                            node_pods.retain(&listing.take().unwrap_or_default());
                        }
                        watcher::Event::Apply(pod) => node_pods.apply(&pod).await,
                        watcher::Event::Delete(pod) => {
                            if let Some(uid) = uid(&pod) {
                                node_pods.remove(&uid);
                            }
                        }
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    let error = format!("cannot watch the pods of node {node}: {}", with_causes(&error));
                    tracing::warn!("{error}; trying again");
                    node_pods.error = Some(error);
                }
            },
            () = tokio::time::sleep_until(retry) => node_pods.check_due().await,
        }
        node_pods.report(&status);
    }
}

struct NodePods {
    paths: PodPaths,
    attach: Arc<dyn Attach>,
    pods: HashMap<String, KnownPod>,
    places: Places,
    tell: Tell,
    /// An earlier run has made endpoints known. If none has, what it attached to passes as it did until policies are known.
    knew_endpoints: bool,
    /// Interfaces that an earlier run attached to and no pod has claimed yet.
    inherited: BTreeSet<u32>,
    listed: bool,
    error: Option<String>,
}

struct KnownPod {
    name: Arc<str>,
    uid: Arc<str>,
    /// As policies see it.
    subject: Arc<Subject>,
    /// As its status has them; none until the kubelet has told.
    addresses: Vec<IpAddr>,
    interfaces: Vec<PodInterface>,
    /// Of its interfaces, those that an earlier run of the agent has made known.
    inherited: BTreeSet<u32>,
    waiting: Option<String>,
    /// There was no room for its policy when it was last looked at.
    no_room: bool,
    due: Instant,
    backoff: Duration,
}

impl NodePods {
    fn new(paths: PodPaths, attach: Arc<dyn Attach>, tell: Tell) -> Self {
        let inherited = attach.attached().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot tell which interfaces an earlier run attached to");
            Vec::new()
        });
        Self {
            paths,
            places: Places::new(attach.clone()),
            tell,
            knew_endpoints: attach.knows_endpoints().unwrap_or_else(|error| {
                tracing::warn!(%error, "cannot tell whether an earlier run has enforced policies");
                true
            }),
            attach,
            pods: HashMap::new(),
            inherited: inherited.into_iter().collect(),
            listed: false,
            error: None,
        }
    }

    async fn apply(&mut self, pod: &Pod) {
        let Some(uid) = uid(pod) else { return };
        if !has_own_network(pod) {
            self.remove(&uid);
            return;
        }
        let name = format!(
            "{}/{}",
            pod.metadata.namespace.as_deref().unwrap_or_default(),
            pod.metadata.name.as_deref().unwrap_or_default()
        );
        let now = Instant::now();
        let known = self.pods.entry(uid.clone()).or_insert_with(|| KnownPod {
            name: name.into(),
            uid: uid.as_str().into(),
            subject: Arc::default(),
            addresses: Vec::new(),
            interfaces: Vec::new(),
            inherited: BTreeSet::new(),
            waiting: Some("not looked at yet".to_owned()),
            no_room: false,
            due: now,
            backoff: FIRST_RETRY,
        });
        let (addresses, subject) = (addresses(pod), policy::subject(pod));
        let news = known.addresses != addresses || *known.subject != subject;
        known.addresses = addresses;
        known.subject = Arc::new(subject);
        if news && known.waiting.is_none() {
            known.tell(&self.tell);
        }
        // A pod that changes may just have got its sandbox.
        if known.waiting.is_some() {
            known.due = now;
            known.backoff = FIRST_RETRY;
            self.check(&uid).await;
        } else if let Err(error) = self.places.set(&uid, &known.addresses, &known.interfaces) {
            self.settle(&uid, Err(error.to_string()));
        }
    }

    fn remove(&mut self, uid: &str) {
        if let Some(pod) = self.pods.remove(uid) {
            // Nothing is handed to an interface that may be another pod's by now.
            self.places.remove(uid);
            for interface in pod.interfaces {
                self.detach(interface.host);
            }
        }
    }

    /// Everything has been listed: what is not among it is gone.
    fn retain(&mut self, listed: &BTreeSet<String>) {
        let gone: Vec<_> = self.pods.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
        for uid in gone {
            self.remove(&uid);
        }
        self.listed = true;
        self.release_inherited();
    }

    /// Detaches from what no pod claims, once every pod has been found: an interface whose pod is only slow to be found
    /// must keep its programs.
    fn release_inherited(&mut self) {
        if self.listed && self.pods.values().all(|pod| pod.waiting.is_none()) {
            self.places.release_inherited();
            for interface in std::mem::take(&mut self.inherited) {
                self.detach(interface);
            }
        }
    }

    fn next_retry(&self) -> Instant {
        let latest = Instant::now() + CHECK;
        self.pods.values().map(|pod| pod.due).min().unwrap_or(latest).min(latest)
    }

    async fn check_due(&mut self) {
        let now = Instant::now();
        let due: Vec<_> =
            self.pods.iter().filter(|(_, pod)| pod.due <= now).map(|(uid, _)| uid.clone()).collect();
        for uid in due {
            self.check(&uid).await;
        }
        self.release_inherited();
    }

    async fn check(&mut self, uid: &str) {
        let Some(pod) = self.pods.get(uid) else { return };
        if pod.waiting.is_none() && pod.interfaces.iter().all(|interface| veth::exists(interface.host)) {
            self.settle(uid, Ok(None));
            return;
        }
        let found = interfaces(&self.paths, uid).await;
        let Some(pod) = self.pods.get_mut(uid) else { return };
        let known = pod.addresses.clone();
        let attached = found.and_then(|found| {
            if let Some(found) = &found {
                let mut no_room = None;
                // First: the program takes a pod's word for no address that it does not know to be the pod's.
                self.places.set(uid, &known, found).map_err(|error| error.to_string())?;
                if self.tell.hold {
                    for interface in found {
                        let settings = pod.endpoint(interface, found.len()).settings(0);
                        let attached_before = self.inherited.contains(&interface.host);
                        let stays = attached_before && !self.knew_endpoints;
                        match if stays { Ok(true) } else { self.attach.hold(interface.host, &settings) } {
                            Ok(true) => drop(pod.inherited.insert(interface.host)),
                            Ok(false) => {}
                            // The program keeps the pod closed then, if it is there.
                            Err(error @ PolicyError::TooManyEndpoints { .. }) => {
                                no_room = Some(error.to_string())
                            }
                            Err(error) => return Err(error.to_string()),
                        }
                    }
                }
                for interface in found {
                    self.attach.attach(interface.host).map_err(|error| error.to_string())?;
                }
                if let Some(no_room) = no_room {
                    pod.no_room = true;
                    return Err(no_room);
                }
            }
            Ok(found)
        });
        self.settle(uid, attached.map(|found| Some(found.unwrap_or_default())));
    }

    /// Takes in what became of a look at a pod: its interfaces, or nothing new.
    fn settle(&mut self, uid: &str, looked: Result<Option<Vec<PodInterface>>, String>) {
        let Some(pod) = self.pods.get_mut(uid) else { return };
        let now = Instant::now();
        let mut former = Vec::new();
        match looked {
            Ok(found) => {
                if let Some(found) = found {
                    for interface in &found {
                        self.inherited.remove(&interface.host);
                    }
                    let indices: Vec<u32> = found.iter().map(|interface| interface.host).collect();
                    tracing::info!(pod = %pod.name, interfaces = ?indices, addresses = ?pod.addresses, "attached");
                    former = std::mem::replace(&mut pod.interfaces, found);
                    pod.tell(&self.tell);
                }
                pod.waiting = None;
                pod.no_room = false;
                pod.backoff = FIRST_RETRY;
                pod.due = now + CHECK;
            }
            Err(reason) => {
                tracing::debug!(pod = %pod.name, reason, "not attached yet");
                pod.waiting = Some(reason);
                pod.due = now + pod.backoff;
                pod.backoff = (pod.backoff * 2).min(LONGEST_RETRY);
            }
        }
        // Those of an exchanged sandbox; what the pod still has is left alone.
        for interface in former {
            self.detach(interface.host);
        }
    }

    fn detach(&self, interface: u32) {
        // The index may already be that of another pod's interface.
        let reused = self.pods.values().flat_map(|pod| &pod.interfaces).any(|used| used.host == interface);
        if reused {
            return;
        }
        // Nobody listens any more only when the agent ends.
        let _ = self.tell.endpoints.send((interface, None));
        if let Err(error) = self.attach.detach(interface) {
            tracing::warn!(interface, %error, "cannot detach from an interface whose pod is gone");
        }
    }

    fn report(&self, status: &watch::Sender<PodsStatus>) {
        let waiting = |pod: &KnownPod| Some((pod.name.to_string(), pod.waiting.clone()?));
        let closed = |pod: &KnownPod| {
            let reason = pod.waiting.clone().filter(|_| pod.no_room)?;
            Some(ClosedPod { pod: pod.name.clone(), addresses: pod.addresses.clone(), reason })
        };
        let mut closed: Vec<_> = self.pods.values().filter_map(closed).collect();
        closed.sort_by(|a, b| a.pod.cmp(&b.pod));
        let now = PodsStatus {
            closed,
            attached: self.pods.values().filter(|pod| pod.waiting.is_none()).count(),
            waiting: self.pods.values().filter_map(waiting).collect(),
            listed: self.listed,
            error: self.error.clone(),
        };
        status.send_if_modified(|status| {
            let changed = *status != now;
            *status = now;
            changed
        });
    }
}

impl KnownPod {
    /// One of its interfaces as policies see it.
    fn endpoint(&self, interface: &PodInterface, interfaces: usize) -> LocalEndpoint {
        let has = |addr: &&IpAddr| interfaces == 1 || interface.addresses.contains(addr);
        LocalEndpoint {
            pod: self.name.clone(),
            uid: self.uid.clone(),
            subject: self.subject.clone(),
            addresses: self.addresses.iter().filter(has).copied().collect(),
            inherited: self.inherited.contains(&interface.host),
        }
    }

    fn tell(&self, tell: &Tell) {
        for interface in &self.interfaces {
            let endpoint = self.endpoint(interface, self.interfaces.len());
            // Nobody listens any more only when the agent ends.
            let _ = tell.endpoints.send((interface.host, Some(endpoint)));
        }
    }
}

/// The pod's interfaces; none for a pod that turns out to use the node's network.
async fn interfaces(paths: &PodPaths, uid: &str) -> Result<Option<Vec<PodInterface>>, String> {
    let directory = cgroup::pod_directory(&paths.cgroup_root, uid).ok_or_else(|| {
        format!("the kubelet has made no cgroup for it (yet) below {}", paths.cgroup_root.display())
    })?;
    let processes = cgroup::processes(&directory);
    if processes.is_empty() {
        return Err(format!("no process runs in {} (yet)", directory.display()));
    }
    let mut last = String::new();
    for pid in processes {
        match of_process(&paths.proc_root, pid).await {
            Ok(found) => return Ok(found),
            // The process may have ended meanwhile; another one may not have.
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

async fn of_process(proc_root: &Path, pid: u32) -> Result<Option<Vec<PodInterface>>, VethError> {
    if veth::shares_host_network(proc_root, pid)? {
        return Ok(None);
    }
    veth::of_process(proc_root, pid).await.map(Some)
}

/// An error with everything that led to it: the outermost seldom says what to do.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// The UID that the kubelet knows the pod by. A static pod's mirror in the API has another one.
fn uid(pod: &Pod) -> Option<String> {
    let mirror = pod.metadata.annotations.as_ref().and_then(|all| all.get("kubernetes.io/config.mirror"));
    mirror.or(pod.metadata.uid.as_ref()).cloned()
}

/// The pod's addresses, as the kubelet has put them into its status.
fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else { return Vec::new() };
    let several = status.pod_ips.iter().flatten().map(|address| address.ip.as_str());
    let mut addresses: Vec<IpAddr> =
        several.chain(status.pod_ip.as_deref()).filter_map(|text| text.parse().ok()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn has_own_network(pod: &Pod) -> bool {
    let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
    !host_network && !matches!(phase, "Succeeded" | "Failed")
}
