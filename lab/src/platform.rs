//! Where a scenario's clusters are: in a lab of this machine, or on kind. The same steps, by the same words.
//!
//! What a scenario does to Kubernetes objects and in pods, the lab does through its own client and in its own namespaces, kind
//! through `kubectl`. What it does to machines and wires, kind does to the containers that its nodes are.

use std::net::IpAddr;
use std::process::{Output, Stdio};
use std::time::Duration;

use ipnet::IpNet;
use isthmus_node_agent::status::AgentStatus;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::Api;
use serde_json::Value;
use tokio::process::Child;

use crate::capture::Capture;
use crate::command;
use crate::error::{Doing, LabError, Result};
use crate::kind::Kind;
use crate::kubectl::{Kubectl, Metadata};
use crate::kubelet::PodRecord;
use crate::lab::Lab;
use crate::netns::NetNs;
use crate::runner::objects::{self, Object};
use crate::scenario::{NodeRef, PodRef, Scenario, Until};
use crate::spec::Encryption;
use crate::{programs, status, wait};

/// A lab, or kind.
#[derive(Clone, Copy)]
pub(crate) enum Platform<'a> {
    Lab(&'a Lab),
    Kind(&'a Kind),
}

impl<'a> Platform<'a> {
    /// Applies a file's objects in one cluster, in order.
    pub(crate) async fn apply(self, cluster: &str, file: &std::path::Path) -> Result<()> {
        match self {
            Self::Lab(lab) => objects::apply(&lab.cluster(cluster)?.client(), file).await,
            Self::Kind(kind) => kind.apply(cluster, file).await,
        }
    }

    /// Sets annotations or labels.
    pub(crate) async fn set(
        self,
        cluster: &str,
        what: Metadata,
        object: &str,
        namespace: &str,
        set: &std::collections::BTreeMap<String, Option<String>>,
    ) -> Result<()> {
        match self {
            Self::Lab(lab) => {
                let object = Object::find(lab.cluster(cluster)?.client(), object, namespace).await?;
                object.merge(&objects::metadata(what, set)).await
            }
            Self::Kind(kind) => kind.kubectl(cluster)?.set(what, object, namespace, set).await,
        }
    }

    /// Scales a Deployment.
    pub(crate) async fn scale(self, cluster: &str, name: &str, namespace: &str, replicas: u16) -> Result<()> {
        match self {
            Self::Lab(lab) => objects::scale(lab.cluster(cluster)?.client(), name, namespace, replicas).await,
            Self::Kind(kind) => kind.kubectl(cluster)?.scale(name, namespace, replicas).await,
        }
    }

    /// Deletes an object.
    pub(crate) async fn delete(self, cluster: &str, object: &str, namespace: &str) -> Result<()> {
        match self {
            Self::Lab(lab) => {
                Object::find(lab.cluster(cluster)?.client(), object, namespace).await?.delete().await
            }
            Self::Kind(kind) => kind.kubectl(cluster)?.delete(object, namespace).await,
        }
    }

    /// Waits until an object is as wished.
    pub(crate) async fn wait(
        self,
        cluster: &str,
        object: &str,
        namespace: &str,
        until: &Until,
        within: Duration,
    ) -> Result<()> {
        let what = format!("{object} in {cluster}");
        match self {
            Self::Lab(lab) => {
                let found = Object::find(lab.cluster(cluster)?.client(), object, namespace).await?;
                wait::until(what, within, || found.is(until)).await
            }
            Self::Kind(kind) => {
                let kubectl = kind.kubectl(cluster)?;
                wait::until(what, within, || async {
                    let found = kubectl.get(object, namespace).await.map_err(|e| e.to_string())?;
                    objects::is(object, found.as_ref(), until)
                })
                .await
            }
        }
    }

    /// A pod that runs.
    ///
    /// # Errors
    /// When there is none of this name.
    pub(crate) async fn pod(self, pod: &PodRef) -> Result<RunningPod> {
        match self {
            Self::Lab(lab) => {
                lab.cluster(&pod.cluster)?.pod(&pod.namespace, &pod.name).map(RunningPod::InLab)
            }
            Self::Kind(kind) => {
                KubectlPod::find(kind.kubectl(&pod.cluster)?, pod).await.map(RunningPod::ByKubectl)
            }
        }
    }

    /// The ClusterIPs of a Service.
    ///
    /// # Errors
    /// When there is none of this name.
    pub(crate) async fn cluster_ips(
        self,
        cluster: &str,
        namespace: &str,
        service: &str,
    ) -> Result<Vec<IpAddr>> {
        let found: Service = match self {
            Self::Lab(lab) => {
                let services: Api<Service> = Api::namespaced(lab.cluster(cluster)?.client(), namespace);
                services.get(service).await.doing(|| format!("reading service {service}"))?
            }
            Self::Kind(kind) => {
                let found = kind.kubectl(cluster)?.get(&format!("service/{service}"), namespace).await?;
                read(found, || format!("service {service} in {cluster}"))?
            }
        };
        let addresses = found.spec.and_then(|s| s.cluster_ips).unwrap_or_default();
        Ok(addresses.iter().filter_map(|a| a.parse().ok()).collect())
    }

    /// Whether a cluster's apiserver says that it is connected to a peer.
    ///
    /// # Errors
    /// In words: when it does not say.
    pub(crate) async fn peer_connected(self, cluster: &str, peer: &str) -> Result<bool, String> {
        match self {
            Self::Lab(lab) => {
                let cluster = lab.cluster(cluster).map_err(|e| e.to_string())?;
                cluster.peer_connected(peer).await
            }
            Self::Kind(kind) => kind.peer_connected(cluster, peer).await,
        }
    }

    /// A kubeconfig with a context for each cluster.
    pub(crate) fn kubeconfig(self) -> std::path::PathBuf {
        match self {
            Self::Lab(lab) => lab.state().all_kubeconfig(),
            Self::Kind(kind) => kind.kubeconfig(),
        }
    }

    /// The name of a daemon; see [`Lab::resolve`].
    pub(crate) async fn resolve(self, daemon: &str) -> Result<String> {
        match self {
            Self::Lab(lab) => lab.resolve(daemon).await,
            Self::Kind(kind) => kind.resolve(daemon).await,
        }
    }

    /// Ends a daemon at once, as a crash does. On kind its kubelet starts it again.
    pub(crate) async fn kill(self, daemon: &str) -> Result<()> {
        match self {
            Self::Lab(lab) => lab.kill(daemon).await,
            Self::Kind(kind) => kind.kill(daemon).await,
        }
    }

    /// Cuts the way from one cluster to another; the way back stays.
    pub(crate) async fn cut(self, from: &str, to: &str) -> Result<()> {
        match self {
            Self::Lab(lab) => lab.cut(from, to).await,
            Self::Kind(kind) => kind.cut(from, to).await,
        }
    }

    /// Joins everything that was cut.
    pub(crate) async fn heal(self) -> Result<()> {
        match self {
            Self::Lab(lab) => lab.heal().await,
            Self::Kind(kind) => kind.heal().await,
        }
    }

    /// Stops a daemon where it stands.
    pub(crate) async fn pause(self, daemon: &str) -> Result<()> {
        match self {
            Self::Lab(lab) => lab.pause(daemon),
            Self::Kind(kind) => kind.pause(daemon).await,
        }
    }

    /// Lets a paused daemon go on.
    pub(crate) async fn resume(self, daemon: &str) -> Result<()> {
        match self {
            Self::Lab(lab) => lab.resume(daemon),
            Self::Kind(kind) => kind.resume(daemon).await,
        }
    }

    /// Ends a daemon in good order, starts it again, and waits until it is ready.
    pub(crate) async fn restart(self, daemon: &str) -> Result<()> {
        match self {
            Self::Lab(lab) => lab.restart(daemon).await,
            Self::Kind(kind) => kind.restart(daemon).await,
        }
    }

    /// Starts every agent again with encryption on, off or strict, and waits until all are ready.
    pub(crate) async fn encrypt(self, mode: Encryption, scenario: &Scenario) -> Result<()> {
        match self {
            Self::Lab(lab) => lab.encrypt(mode).await,
            Self::Kind(kind) => kind.encrypt(mode, scenario).await,
        }
    }

    /// Captures what crosses the wires between nodes.
    pub(crate) async fn tap(self) -> Result<Capture> {
        match self {
            Self::Lab(lab) => lab.wan().capture(),
            Self::Kind(kind) => kind.tap().await,
        }
    }

    /// A node of the scenario.
    ///
    /// # Errors
    /// When there is none of this name.
    pub(crate) fn node(self, node: &NodeRef) -> Result<PlatformNode<'a>> {
        let name = match self {
            Self::Lab(lab) => {
                let cluster = lab.cluster(&node.cluster)?;
                cluster.position(&node.name)?;
                node.name.clone()
            }
            Self::Kind(kind) => kind.node(node)?,
        };
        Ok(PlatformNode { platform: self, cluster: node.cluster.clone(), name })
    }

    /// The node that a pod is on.
    pub(crate) fn node_of(self, cluster: &str, pod: &RunningPod) -> PlatformNode<'a> {
        PlatformNode { platform: self, cluster: cluster.to_owned(), name: pod.node().to_owned() }
    }

    /// The network namespace of a pod.
    pub(crate) async fn pod_netns(self, pod: &PodRef) -> Result<NetNs> {
        match self {
            Self::Lab(lab) => NetNs::open(&lab.name().pod_netns(&pod.cluster, &pod.namespace, &pod.name)),
            Self::Kind(kind) => kind.pod_netns(pod).await,
        }
    }
}

/// A node, by the name that Kubernetes has for it.
pub(crate) struct PlatformNode<'a> {
    platform: Platform<'a>,
    cluster: String,
    name: String,
}

impl PlatformNode<'_> {
    /// What Kubernetes calls it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace.
    pub(crate) async fn netns(&self) -> Result<NetNs> {
        match self.platform {
            Platform::Lab(lab) => {
                let cluster = lab.cluster(&self.cluster)?;
                Ok(cluster.net().nodes[cluster.position(&self.name)?].clone())
            }
            Platform::Kind(kind) => kind.node_netns(&self.name).await,
        }
    }

    /// The ranges that its pods have their addresses from.
    pub(crate) async fn pod_ranges(&self) -> Result<Vec<IpNet>> {
        match self.platform {
            Platform::Lab(lab) => {
                let cluster = lab.cluster(&self.cluster)?;
                Ok(cluster.net().plan.pod_ranges(cluster.position(&self.name)?))
            }
            Platform::Kind(kind) => kind.pod_ranges(&self.cluster, &self.name).await,
        }
    }

    /// What its agent says of itself.
    pub(crate) async fn agent(&self) -> Result<AgentStatus> {
        match self.platform {
            Platform::Lab(lab) => status::agent(&lab.cluster(&self.cluster)?.agent_socket(&self.name)).await,
            Platform::Kind(kind) => kind.agent_status(&self.name).await,
        }
    }
}

/// A pod in which commands can be run.
#[derive(Clone)]
pub(crate) enum RunningPod {
    InLab(PodRecord),
    ByKubectl(KubectlPod),
}

/// A pod that `kubectl exec` reaches.
#[derive(Clone)]
pub(crate) struct KubectlPod {
    kubectl: Kubectl,
    pod: PodRef,
    node: String,
    addresses: Vec<IpAddr>,
}

impl KubectlPod {
    async fn find(kubectl: &Kubectl, pod: &PodRef) -> Result<Self> {
        let found = kubectl.get(&format!("pod/{}", pod.name), &pod.namespace).await?;
        let found: Pod = read(found, || format!("pod {pod}"))?;
        let status = found.status.unwrap_or_default();
        let addresses = status.pod_ips.unwrap_or_default();
        Ok(Self {
            kubectl: kubectl.clone(),
            pod: pod.clone(),
            node: found.spec.and_then(|s| s.node_name).unwrap_or_default(),
            addresses: addresses.iter().filter_map(|a| a.ip.parse().ok()).collect(),
        })
    }
}

impl RunningPod {
    /// Its node.
    pub(crate) fn node(&self) -> &str {
        match self {
            Self::InLab(record) => &record.node,
            Self::ByKubectl(pod) => &pod.node,
        }
    }

    /// Its addresses.
    pub(crate) fn addresses(&self) -> &[IpAddr] {
        match self {
            Self::InLab(record) => &record.addresses,
            Self::ByKubectl(pod) => &pod.addresses,
        }
    }

    /// The lab's program of many parts, which every image of the scenarios has.
    pub(crate) fn lab_pod(&self) -> Result<String> {
        match self {
            Self::InLab(_) => Ok(programs::ours(programs::LAB_POD)?.to_string_lossy().into_owned()),
            Self::ByKubectl(_) => Ok(programs::LAB_POD.to_owned()),
        }
    }

    /// Runs a command in it to its end.
    ///
    /// # Errors
    /// When it cannot be started, or does not end in time.
    pub(crate) async fn output(&self, command: &[String], deadline: Duration) -> Result<Output> {
        match self {
            Self::InLab(record) => record.launch(command)?.output(deadline).await,
            Self::ByKubectl(KubectlPod { kubectl, pod, .. }) => {
                command::ended(kubectl.exec(&pod.namespace, &pod.name, command), None, deadline).await
            }
        }
    }

    /// Starts a command in it with its standard output for the caller to read. Ends with the answer.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) async fn piped(&self, command: &[String]) -> Result<Child> {
        match self {
            Self::InLab(record) => record.launch(command)?.piped(Stdio::null()).await,
            Self::ByKubectl(KubectlPod { kubectl, pod, .. }) => {
                command::start(kubectl.exec(&pod.namespace, &pod.name, command), false, Stdio::null())
            }
        }
    }
}

fn read<T: serde::de::DeserializeOwned>(found: Option<Value>, what: impl Fn() -> String) -> Result<T> {
    let found = found.ok_or_else(|| LabError::invalid(format!("there is no {}", what())))?;
    serde_json::from_value(found).map_err(std::io::Error::from).doing(|| format!("reading {}", what()))
}
