//! What is done to daemons on kind. Each is a container of a pod, on a node that is a container itself.
//!
//! A signal goes through the node's containerd to the daemon's process, as the lab sends it. The kubelet has the last word: it
//! starts at once what was killed, and replaces what does not move for as long as the liveness probe has patience.

use std::collections::BTreeSet;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use super::daemon::{self, Daemon, Node};
use super::{Kind, KindCluster, NAMESPACE, ROLL_OUT, config, conntrack};
use crate::error::{Doing, LabError, Result};
use crate::wait;

const APISERVER: &str = "deployment/clustermesh-apiserver";
pub(super) const AGENT: &str = "daemonset/isthmus-node-agent";
const WIREGUARD: &str = "daemonset/isthmus-wireguard";

/// What the overlay installs.
pub(super) const WORKLOADS: [&str; 3] = [APISERVER, AGENT, WIREGUARD];

/// A daemon that was stopped where it stands, until it goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frozen {
    /// As it was called when it was stopped.
    daemon: String,
    cluster: String,
    pod: String,
    container: Container,
}

/// A container, by the node that runs it and containerd's name for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Container {
    pub(super) node: String,
    pub(super) id: String,
}

/// The pods of a daemon.
struct Found<'a> {
    place: Place<'a>,
    /// All that are in that place.
    all: Vec<Pod>,
    /// Those of them that are meant.
    meant: Vec<Pod>,
}

/// Where the pods of a daemon are: those that others follow when they are deleted.
struct Place<'a> {
    cluster: &'a KindCluster,
    selector: String,
    /// Of a daemon that is on every node.
    node: Option<String>,
}

impl Kind {
    /// The name of a daemon that is meant by what it does: `CLUSTER/leader` and `CLUSTER/NODE/gateway` become the name of the
    /// apiserver's pod, behind its cluster's. Other names stay.
    pub(crate) async fn resolve(&self, name: &str) -> Result<String> {
        let (cluster, daemon) = self.daemon(name)?;
        let pod = match daemon {
            Daemon::Leader => cluster.leader().await?,
            Daemon::Gateway(node) => self.gateway_of(cluster, node).await?,
            _ => return Ok(name.to_owned()),
        };
        Ok(format!("{}/{pod}", cluster.spec.name))
    }

    /// Ends a daemon at once, as a crash does. The kubelet starts it again.
    pub(crate) async fn kill(&self, name: &str) -> Result<()> {
        for pod in &self.find(name).await?.meant {
            for container in containers(pod) {
                self.signal(&container, "SIGKILL").await?;
            }
        }
        Ok(())
    }

    /// Stops a daemon where it stands.
    pub(crate) async fn pause(&self, name: &str) -> Result<()> {
        let Found { place, meant, .. } = self.find(name).await?;
        for pod in &meant {
            for container in containers(pod) {
                let frozen = Frozen {
                    daemon: name.to_owned(),
                    cluster: place.cluster.spec.name.clone(),
                    pod: name_of(pod),
                    container,
                };
                // Written down first: what fails half-way goes on again as well.
                self.frozen.lock().await.push(frozen.clone());
                self.signal(&frozen.container, "SIGSTOP").await?;
            }
        }
        Ok(())
    }

    /// Lets a daemon go on that was paused by this name. One that the kubelet has replaced meanwhile goes on already.
    pub(crate) async fn resume(&self, name: &str) -> Result<()> {
        let frozen = self.thaw(|frozen| frozen.daemon == name).await;
        if frozen.is_empty() {
            return Err(LabError::invalid(format!("{name} is not paused")));
        }
        for frozen in &frozen {
            self.go_on(frozen).await?;
        }
        Ok(())
    }

    /// Lets everything go on that is paused still.
    pub(super) async fn resume_all(&self) -> Result<()> {
        let mut outcome = Ok(());
        for frozen in self.thaw(|_| true).await {
            outcome = outcome.and(self.go_on(&frozen).await);
        }
        outcome
    }

    /// Deletes a daemon's pods, and waits until others are ready in their place.
    pub(crate) async fn restart(&self, name: &str) -> Result<()> {
        let Found { place, all, meant } = self.find(name).await?;
        let former: BTreeSet<_> = all.iter().map(uid).collect();
        let kubectl = &place.cluster.kubectl;
        for pod in &meant {
            kubectl.ask(&["delete", "pod", "--namespace", NAMESPACE, &name_of(pod)], None).await?;
        }
        wait::until(format!("{name} to be ready in another pod"), ROLL_OUT, || async {
            let now = place.pods().await.map_err(|e| e.to_string())?;
            let others = now.iter().filter(|pod| !former.contains(&uid(pod)));
            let ready = others.filter(|pod| is_ready(pod)).count();
            match ready >= meant.len() {
                true => Ok(()),
                false => Err(format!("{ready} of {} are", meant.len())),
            }
        })
        .await
    }

    /// Those that a condition holds for, which from now on are not known to be paused.
    async fn thaw(&self, which: impl Fn(&Frozen) -> bool) -> Vec<Frozen> {
        self.frozen.lock().await.extract_if(.., |frozen| which(frozen)).collect()
    }

    async fn go_on(&self, frozen: &Frozen) -> Result<()> {
        let pod = self.kubectl(&frozen.cluster)?.get(&format!("pod/{}", frozen.pod), NAMESPACE).await?;
        let Some(pod) = pod else { return Ok(()) };
        let still_there = containers(&read(pod, &frozen.pod)?).contains(&frozen.container);
        match still_there {
            true => self.signal(&frozen.container, "SIGCONT").await,
            false => Ok(()),
        }
    }

    async fn signal(&self, Container { node, id }: &Container, signal: &str) -> Result<()> {
        let ctr = ["ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", signal, id];
        self.on_node(node, &ctr).await.map(drop)
    }

    /// The apiserver's pod that the agent of a node reads from: whom its connection has been given to, as the node's kernel
    /// keeps it.
    async fn gateway_of(&self, cluster: &KindCluster, node: Node) -> Result<String> {
        let node = cluster.node(node);
        let mut ends = BTreeSet::new();
        for family in conntrack::families(cluster.plan.families()) {
            let command = conntrack::command(family);
            ends.extend(conntrack::ends(&self.on_node(&node, &command).await?));
        }
        let place = cluster.place(APISERVER, None).await?;
        let has = |pod: &Pod| addresses(pod).any(|address| ends.contains(&address));
        let mut found: Vec<String> = place.pods().await?.iter().filter(|pod| has(pod)).map(name_of).collect();
        match (found.pop(), found.as_slice()) {
            (Some(pod), []) => Ok(pod),
            (None, _) => Err(LabError::invalid(format!("the agent of {node} reads from no apiserver"))),
            (Some(pod), others) => Err(LabError::invalid(format!(
                "it cannot be told which apiserver the agent of {node} reads from: there are connections to {pod} and {}",
                others.join(" and ")
            ))),
        }
    }

    fn daemon<'n>(&self, name: &'n str) -> Result<(&KindCluster, Daemon<'n>)> {
        let (spec, daemon) = daemon::read(name, self.clusters.iter().map(|cluster| &cluster.spec))?;
        Ok((self.cluster(&spec.name)?, daemon))
    }

    async fn find(&self, name: &str) -> Result<Found<'_>> {
        let (cluster, daemon) = self.daemon(name)?;
        let (workload, node) = match daemon {
            Daemon::Agent(node) => (AGENT, Some(node)),
            Daemon::Wireguard(node) => (WIREGUARD, Some(node)),
            _ => (APISERVER, None),
        };
        let named = match daemon {
            Daemon::ApiserverPod(pod) => Some(pod.to_owned()),
            Daemon::Leader => Some(cluster.leader().await?),
            Daemon::Gateway(node) => Some(self.gateway_of(cluster, node).await?),
            _ => None,
        };
        let place = cluster.place(workload, node).await?;
        let all = place.pods().await?;
        let meant: Vec<Pod> = match (daemon, named) {
            (Daemon::Apiserver(replica), _) => all.iter().skip(replica).take(1).cloned().collect(),
            (_, Some(named)) => all.iter().filter(|pod| name_of(pod) == named).cloned().collect(),
            (_, None) => all.clone(),
        };
        match meant.is_empty() {
            true => Err(LabError::invalid(format!(
                "no pod of {name} runs: `kubectl --context {} get pods --namespace {NAMESPACE}` shows those that do",
                cluster.spec.name
            ))),
            false => Ok(Found { place, all, meant }),
        }
    }
}

impl KindCluster {
    /// What picks the pods of a workload.
    pub(super) async fn selector(&self, workload: &str) -> Result<String> {
        let found = self.kubectl.get(workload, NAMESPACE).await?;
        let missing = || LabError::invalid(format!("there is no {workload} in {}", self.spec.name));
        let found = found.ok_or_else(missing)?;
        let labels =
            found.pointer("/spec/selector/matchLabels").and_then(Value::as_object).ok_or_else(missing)?;
        let pairs = labels.iter().map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()));
        Ok(pairs.collect::<Vec<_>>().join(","))
    }

    /// What Kubernetes calls a node, and Docker its container.
    pub(super) fn node(&self, Node(position): Node) -> String {
        config::node(&self.kind, self.spec.nodes.len(), position)
    }

    async fn place(&self, workload: &str, node: Option<Node>) -> Result<Place<'_>> {
        let selector = self.selector(workload).await?;
        Ok(Place { cluster: self, selector, node: node.map(|node| self.node(node)) })
    }

    /// The pod that holds the Lease.
    async fn leader(&self) -> Result<String> {
        let lease = format!("lease/{}", isthmus_crds::names::LEASE);
        wait::until(format!("{} to have an apiserver that leads", self.spec.name), ROLL_OUT, || async {
            let found = self.kubectl.get(&lease, NAMESPACE).await.map_err(|e| e.to_string())?;
            let found = found.ok_or_else(|| format!("there is no {lease}"))?;
            let lease: Lease = read(found, &lease).map_err(|e| e.to_string())?;
            let holder = lease.spec.and_then(|spec| spec.holder_identity).unwrap_or_default();
            if holder.is_empty() { Err("nobody holds the Lease".to_owned()) } else { Ok(holder) }
        })
        .await
    }
}

impl Place<'_> {
    /// In the order of their names.
    async fn pods(&self) -> Result<Vec<Pod>> {
        let selector = format!("--selector={}", self.selector);
        let found = self.cluster.kubectl.list("pods", NAMESPACE, &selector).await?;
        let pods: Result<Vec<Pod>> = found.into_iter().map(|pod| read(pod, &self.selector)).collect();
        let mut pods = pods?;
        if let Some(node) = &self.node {
            pods.retain(|pod| node_of(pod) == node);
        }
        pods.sort_by_key(name_of);
        Ok(pods)
    }
}

fn read<T: serde::de::DeserializeOwned>(found: Value, what: &str) -> Result<T> {
    serde_json::from_value(found).map_err(std::io::Error::from).doing(|| format!("reading {what}"))
}

/// The containers of a pod that run, or have run.
pub(super) fn containers(pod: &Pod) -> Vec<Container> {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    let ids = statuses.filter_map(|status| status.container_id.as_deref());
    let id = |id: &str| id.strip_prefix("containerd://").unwrap_or(id).to_owned();
    ids.map(|of| Container { node: node_of(pod).to_owned(), id: id(of) }).collect()
}

fn addresses(pod: &Pod) -> impl Iterator<Item = std::net::IpAddr> {
    let of = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
    of.filter_map(|address| address.ip.parse().ok())
}

fn name_of(pod: &Pod) -> String {
    pod.metadata.name.clone().unwrap_or_default()
}

fn uid(pod: &Pod) -> String {
    pod.metadata.uid.clone().unwrap_or_default()
}

fn node_of(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}
