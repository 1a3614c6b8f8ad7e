//! The kubelet's role on one node, played through the Kubernetes API: it registers the node, runs the pods that are
//! bound to it as real processes in namespaces and cgroups of their own, probes them, and says how they are.
//!
//! What it leaves out: init containers, volumes, liveness probes, resource limits.

mod container;
mod pod;
mod probe;
mod status;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{SecondsFormat, Utc};
use futures::TryStreamExt;
use ipnet::IpNet;
use isthmus_node_agent::kubernetes;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, ResourceExt};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::mpsc;

use crate::error::{Doing, LabError, Result};
use crate::lab::Ground;
use crate::netns::NetNs;
use crate::process::Launch;
use crate::rbac::FIELD_MANAGER;

/// One node.
pub(crate) struct Kubelet {
    pub(crate) cluster: String,
    pub(crate) node: String,
    pub(crate) client: Client,
    /// The node's network namespace.
    pub(crate) host: NetNs,
    /// The node's own addresses, one of each family.
    pub(crate) addresses: Vec<IpAddr>,
    /// Where its pods' addresses come from, one of each family, in the same order.
    pub(crate) pod_ranges: Vec<IpNet>,
    pub(crate) ground: Arc<Ground>,
}

/// Where a pod runs: enough to run something else in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PodRecord {
    /// Its cluster.
    pub cluster: String,
    /// Its node.
    pub node: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its network namespace.
    pub netns: PathBuf,
    /// The cgroup of its first container.
    pub cgroup: PathBuf,
    /// Its log.
    pub log: PathBuf,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl PodRecord {
    /// A command to be run in the pod.
    ///
    /// # Errors
    /// When the command is empty.
    pub fn launch(&self, command: &[String]) -> Result<Launch> {
        let (program, args) = command.split_first().ok_or_else(|| {
            LabError::invalid(format!("no command for pod {}/{} given", self.namespace, self.name))
        })?;
        Ok(Launch {
            name: format!("{}/{}/{}", self.cluster, self.namespace, self.name),
            program: program.into(),
            args: args.iter().map(Into::into).collect(),
            env: Default::default(),
            netns: self.netns.clone(),
            cgroup: self.cgroup.clone(),
            hostname: Some(self.name.clone()),
            log: self.log.clone(),
        })
    }
}

/// What a pod's task is told.
enum PodEvent {
    /// The object changed.
    Changed(Box<Pod>),
    /// The object is gone: there is nobody left to be graceful for.
    Gone,
}

impl Kubelet {
    /// Registers the node and, from then on, runs its pods until the lab stops.
    pub(crate) async fn start(self) -> Result<()> {
        self.register().await?;
        let kubelet = Arc::new(self);
        let stop = kubelet.ground.stop.clone();
        let tasks = kubelet.ground.tasks.clone();
        tasks.spawn(stop.run_until_cancelled_owned(async move { kubelet.watch().await }));
        Ok(())
    }

    async fn register(&self) -> Result<()> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let ranges: Vec<String> = self.pod_ranges.iter().map(ToString::to_string).collect();
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": self.node, "labels": {
                "kubernetes.io/hostname": self.node, "kubernetes.io/os": "linux",
                "kubernetes.io/arch": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" },
            }},
            "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
        });
        let doing = || format!("registering node {} of {}", self.node, self.cluster);
        let params = PatchParams::apply(FIELD_MANAGER).force();
        nodes.patch(&self.node, &params, &Patch::Apply(node)).await.doing(doing)?;
        let mut addresses: Vec<_> =
            self.addresses.iter().map(|a| json!({"type": "InternalIP", "address": a.to_string()})).collect();
        addresses.push(json!({"type": "Hostname", "address": self.node}));
        let now = Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true);
        let status = json!({"status": {
            "addresses": addresses,
            "nodeInfo": node_info(),
            "capacity": {"pods": "110"}, "allocatable": {"pods": "110"},
            "conditions": [{
                "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "the lab runs pods here",
                "lastHeartbeatTime": now, "lastTransitionTime": now,
            }],
        }});
        nodes.patch_status(&self.node, &PatchParams::default(), &Patch::Merge(status)).await.doing(doing)?;
        self.clear_taints(&nodes).await
    }

    /// A real API server marks new nodes not ready, and leaves it to a controller to take that back.
    async fn clear_taints(&self, nodes: &Api<Node>) -> Result<()> {
        let node = nodes.get(&self.node).await.doing(|| format!("reading node {}", self.node))?;
        if node.spec.and_then(|s| s.taints).is_none_or(|t| t.is_empty()) {
            return Ok(());
        }
        let none = json!({"spec": {"taints": null}});
        let patched = nodes.patch(&self.node, &PatchParams::default(), &Patch::Merge(none)).await;
        patched.map(drop).doing(|| format!("making node {} schedulable", self.node))
    }

    async fn watch(self: Arc<Self>) {
        let pods: Api<Pod> = Api::all(self.client.clone());
        let mine = watcher::Config::default().fields(&format!("spec.nodeName={}", self.node));
        let mut running: HashMap<String, mpsc::UnboundedSender<PodEvent>> = HashMap::new();
        let mut listed: Vec<String> = Vec::new();
        let ranges = Arc::new(Ipam::new(&self.pod_ranges));
        // The watcher backs off and resumes by itself; an error is worth a line and no more.
        let mut events = std::pin::pin!(kubernetes::watch(pods, mine));
        loop {
            let event = match events.try_next().await {
                Ok(Some(event)) => event,
                Ok(None) => return,
                Err(e) => {
                    tracing::debug!(node = %self.node, error = %e, "watching pods");
                    continue;
                }
            };
            match event {
                Event::Init => listed.clear(),
                Event::InitApply(pod) => {
                    listed.extend(pod.uid());
                    self.tell(&mut running, &ranges, pod);
                }
                Event::InitDone => running.retain(|uid, worker| {
                    listed.contains(uid) || worker.send(PodEvent::Gone).is_ok_and(|()| false)
                }),
                Event::Apply(pod) => self.tell(&mut running, &ranges, pod),
                Event::Delete(pod) => {
                    if let Some(worker) = pod.uid().and_then(|uid| running.remove(&uid)) {
                        let _ = worker.send(PodEvent::Gone);
                    }
                }
            }
        }
    }

    fn tell(
        self: &Arc<Self>,
        running: &mut HashMap<String, mpsc::UnboundedSender<PodEvent>>,
        ranges: &Arc<Ipam>,
        pod: Pod,
    ) {
        let Some(uid) = pod.uid() else { return };
        match running.get(&uid) {
            Some(worker) => {
                let _ = worker.send(PodEvent::Changed(Box::new(pod)));
            }
            None => {
                let (tell, events) = mpsc::unbounded_channel();
                running.insert(uid, tell);
                let worker = pod::Worker::new(Arc::clone(self), Arc::clone(ranges), pod, events);
                let stop = self.ground.stop.clone();
                self.ground.tasks.spawn(stop.run_until_cancelled_owned(worker.run()));
            }
        }
    }
}

fn node_info() -> serde_json::Value {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    json!({
        "kubeletVersion": concat!("v", env!("CARGO_PKG_VERSION"), "-isthmus-lab"), "kubeProxyVersion": "",
        "containerRuntimeVersion": concat!("lab://", env!("CARGO_PKG_VERSION")),
        "kernelVersion": read("/proc/sys/kernel/osrelease"), "bootID": read("/proc/sys/kernel/random/boot_id"),
        "machineID": "", "systemUUID": "", "osImage": "this machine", "operatingSystem": "linux",
        "architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" },
    })
}

/// Hands out the addresses of a node's pod ranges in turn, so that one that was just given back rests longest.
struct Ipam {
    ranges: Vec<IpNet>,
    state: Mutex<IpamState>,
}

#[derive(Default)]
struct IpamState {
    last: u8,
    taken: std::collections::BTreeSet<u8>,
}

/// A set of addresses, one per range, given back when dropped.
struct Lease {
    ipam: Arc<Ipam>,
    host: u8,
}

impl Ipam {
    /// The first host numbers are the node's own by custom.
    const FIRST: u8 = 10;
    const LAST: u8 = 250;

    fn new(ranges: &[IpNet]) -> Self {
        Self { ranges: ranges.to_vec(), state: Mutex::default() }
    }

    fn lease(self: &Arc<Self>) -> Result<Lease> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let after = state.last.clamp(Self::FIRST - 1, Self::LAST);
        let free =
            (after + 1..=Self::LAST).chain(Self::FIRST..=after).find(|host| !state.taken.contains(host));
        let host = free.ok_or_else(|| LabError::invalid("the node's pod range is used up"))?;
        state.last = host;
        state.taken.insert(host);
        Ok(Lease { ipam: Arc::clone(self), host })
    }
}

impl Lease {
    fn addresses(&self) -> Vec<IpAddr> {
        let add = |range: &IpNet| match range.network() {
            IpAddr::V4(net) => IpAddr::V4((u32::from(net) + u32::from(self.host)).into()),
            IpAddr::V6(net) => IpAddr::V6((u128::from(net) + u128::from(self.host)).into()),
        };
        self.ipam.ranges.iter().map(add).collect()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.ipam.state.lock().unwrap_or_else(PoisonError::into_inner).taken.remove(&self.host);
    }
}

/// Longest time between two looks at a pod whose status could not be written.
const RETRY: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_given_back_is_the_last_to_be_given_again() {
        let ipam = Arc::new(Ipam::new(&["10.1.0.0/24".parse().unwrap(), "fd00:10:1::/64".parse().unwrap()]));
        let first = ipam.lease().unwrap();
        assert_eq!(
            first.addresses(),
            ["10.1.0.10".parse::<IpAddr>().unwrap(), "fd00:10:1::a".parse().unwrap()]
        );
        drop(first);
        let others: Vec<Lease> = (0..240).map(|_| ipam.lease().unwrap()).collect();
        assert_eq!(others[0].host, 11);
        let rest = ipam.lease().unwrap();
        assert_eq!(rest.host, 10, "it comes again after all others");
        assert!(ipam.lease().is_err(), "241 addresses and no more");
        drop((others, rest));
    }
}
