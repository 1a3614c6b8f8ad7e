//! One pod's life: sandbox, containers, readiness, and an end in good order.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, ResourceExt};
use nix::sys::signal::Signal;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::container::{self, RunningContainer};
use super::{Ipam, Kubelet, Lease, PodEvent, PodRecord, RETRY, status};
use crate::error::{Doing, Result};
use crate::netns::NetNs;
use crate::{cgroup, state, topology};

/// The task of one pod.
pub(super) struct Worker {
    kubelet: Arc<Kubelet>,
    ipam: Arc<Ipam>,
    pod: Pod,
    events: mpsc::UnboundedReceiver<PodEvent>,
}

/// What holds a pod's containers.
pub(super) struct Sandbox {
    pub(super) netns: NetNs,
    pub(super) addresses: Vec<IpAddr>,
    /// `.../kubepods/besteffort/pod<uid>`.
    pub(super) cgroup: PathBuf,
    /// The node's end of the pod's veth; none with host networking.
    link: Option<String>,
    /// Holds the addresses for as long as the sandbox lives.
    _lease: Option<Lease>,
}

impl Worker {
    pub(super) fn new(
        kubelet: Arc<Kubelet>,
        ipam: Arc<Ipam>,
        pod: Pod,
        events: mpsc::UnboundedReceiver<PodEvent>,
    ) -> Self {
        Self { kubelet, ipam, pod, events }
    }

    pub(super) async fn run(mut self) {
        if self.pod.metadata.deletion_timestamp.is_some() {
            self.finish().await;
            return;
        }
        let sandbox = match self.sandbox().await {
            Ok(sandbox) => sandbox,
            Err(e) => {
                self.report(&status::waiting(&self.pod, "CreatePodSandboxError", &e.to_string())).await;
                self.until_deleted().await;
                self.finish().await;
                return;
            }
        };
        let mut containers: Vec<RunningContainer> = Vec::new();
        let wanted: Vec<Container> = self.pod.spec.iter().flat_map(|s| s.containers.clone()).collect();
        let mut failure = self
            .pod
            .spec
            .as_ref()
            .and_then(|s| s.init_containers.as_ref())
            .filter(|init| !init.is_empty())
            .map(|_| ("Unsupported", "the lab's kubelet does not run init containers".to_owned()));
        for wanted in &wanted {
            if failure.is_some() {
                break;
            }
            match container::start(&self.kubelet, &self.pod, &sandbox, wanted).await {
                Ok(container) => containers.push(container),
                Err(e) => failure = Some(("ErrImagePull", e.to_string())),
            }
        }
        let graceful = if let Some((reason, message)) = failure {
            self.report(&status::waiting(&self.pod, reason, &message)).await;
            self.until_deleted().await
        } else {
            self.record(&sandbox, &containers);
            self.live(&sandbox, &mut containers).await
        };
        let _ = std::fs::remove_file(self.record_path());
        self.end(&sandbox, &mut containers, graceful).await;
        self.remove(sandbox).await;
        if graceful {
            self.finish().await;
        }
    }

    /// Runs until the pod is to end. True: in good order; false: the object is gone already.
    async fn live(&mut self, sandbox: &Sandbox, containers: &mut [RunningContainer]) -> bool {
        let mut reported = None;
        loop {
            let now = status::running(&self.pod, self.kubelet.addresses.as_slice(), sandbox, containers);
            if reported.as_ref() != Some(&now) && self.report(&now).await {
                reported = Some(now);
            }
            let unreported = reported.is_none();
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(PodEvent::Changed(pod)) => {
                        self.pod = *pod;
                        if self.pod.metadata.deletion_timestamp.is_some() {
                            return true;
                        }
                    }
                    Some(PodEvent::Gone) | None => return false,
                },
                () = container::change(&self.kubelet, &self.pod, sandbox, containers) => {}
                () = tokio::time::sleep(RETRY), if unreported => {}
            }
        }
    }

    async fn until_deleted(&mut self) -> bool {
        loop {
            match self.events.recv().await {
                Some(PodEvent::Changed(pod)) if pod.metadata.deletion_timestamp.is_some() => {
                    self.pod = *pod;
                    return true;
                }
                Some(PodEvent::Changed(_)) => {}
                Some(PodEvent::Gone) | None => return false,
            }
        }
    }

    /// `preStop`, then SIGTERM, then, when the grace period is over, SIGKILL.
    /// Meanwhile readiness is asked and told as before.
    async fn end(&self, sandbox: &Sandbox, containers: &mut [RunningContainer], graceful: bool) {
        let grace = self.pod.metadata.deletion_grace_period_seconds.unwrap_or(30).max(0) as u64;
        let deadline = Instant::now() + if graceful { Duration::from_secs(grace) } else { Duration::ZERO };
        let endings: Vec<container::Ending> = containers.iter().map(RunningContainer::ending).collect();
        let each = endings.iter().map(|container| async move {
            let left = || deadline.saturating_duration_since(Instant::now());
            let _ = tokio::time::timeout(left(), container.pre_stop(&self.kubelet, &self.pod, sandbox)).await;
            container.process.signal(Signal::SIGTERM);
            let _ = tokio::time::timeout(left(), container.process.ended()).await;
        });
        let mut ended = std::pin::pin!(futures::future::join_all(each));
        loop {
            tokio::select! {
                _ = &mut ended => return,
                () = container::readiness_change(&self.kubelet, sandbox, containers) => {
                    self.report(&status::running(&self.pod, &self.kubelet.addresses, sandbox, containers)).await;
                }
            }
        }
    }

    async fn sandbox(&self) -> Result<Sandbox> {
        let spec = self.pod.spec.clone().unwrap_or_default();
        let uid = self.pod.uid().unwrap_or_default();
        let node = self.kubelet.ground.cgroup.join(&self.kubelet.cluster).join(&self.kubelet.node);
        let cgroup = node.join("kubepods").join(status::qos(&spec)).join(format!("pod{uid}"));
        cgroup::create(&cgroup)?;
        if spec.host_network == Some(true) {
            let netns = self.kubelet.host.clone();
            let addresses = self.kubelet.addresses.clone();
            return Ok(Sandbox { netns, addresses, cgroup, link: None, _lease: None });
        }
        let lease = self.ipam.lease()?;
        let addresses = lease.addresses();
        let namespace = self.pod.namespace().unwrap_or_default();
        let name =
            self.kubelet.ground.name.pod_netns(&self.kubelet.cluster, &namespace, &self.pod.name_any());
        // A pod of the same name may have been here a moment ago (a deletion by force).
        crate::netns::remove_path(&std::path::Path::new(crate::netns::NETNS_DIR).join(&name))?;
        let netns = NetNs::create(&name).await?;
        let digest = Sha256::digest(uid.as_bytes());
        let key = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
        let link = topology::wire_pod(&self.kubelet.host, &netns, &addresses, key).await?;
        Ok(Sandbox { netns, addresses, cgroup, link: Some(link), _lease: Some(lease) })
    }

    async fn remove(&self, sandbox: Sandbox) {
        let removed = async {
            cgroup::destroy(&sandbox.cgroup).await?;
            if let Some(link) = &sandbox.link {
                self.kubelet.host.netlink()?.delete_link(link).await?;
                sandbox.netns.remove()?;
            }
            Result::<()>::Ok(())
        };
        if let Err(e) = removed.await {
            tracing::warn!(pod = %self.pod.name_any(), error = %e, "removing what the pod ran in");
        }
    }

    fn record_path(&self) -> PathBuf {
        let namespace = self.pod.namespace().unwrap_or_default();
        self.kubelet.ground.state.pod(&self.kubelet.cluster, &namespace, &self.pod.name_any())
    }

    fn record(&self, sandbox: &Sandbox, containers: &[RunningContainer]) {
        let Some(first) = containers.first() else { return };
        let record = PodRecord {
            cluster: self.kubelet.cluster.clone(),
            node: self.kubelet.node.clone(),
            namespace: self.pod.namespace().unwrap_or_default(),
            name: self.pod.name_any(),
            netns: sandbox.netns.path(),
            cgroup: first.process.launch().cgroup.clone(),
            log: first.process.launch().log.clone(),
            addresses: sandbox.addresses.clone(),
        };
        if let Err(e) = state::write_json(&self.record_path(), &record) {
            tracing::warn!(pod = %self.pod.name_any(), error = %e, "`isthmus lab exec` will not find the pod");
        }
    }

    fn api(&self) -> Api<Pod> {
        Api::namespaced(self.kubelet.client.clone(), &self.pod.namespace().unwrap_or_default())
    }

    /// Writes the status; false when it has to be tried again.
    async fn report(&self, status: &serde_json::Value) -> bool {
        let patch = json!({"metadata": {"uid": self.pod.uid()}, "status": status});
        let name = self.pod.name_any();
        match self.api().patch_status(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => true,
            // Gone, or another of the same name: nothing to be told to it.
            Err(kube::Error::Api(e)) if e.code == 404 || e.code == 409 => true,
            Err(e) => {
                tracing::debug!(pod = name, error = %e, "writing the status");
                false
            }
        }
    }

    /// Nothing of the pod runs any more: the object may go.
    async fn finish(&self) {
        let uid = self.pod.uid();
        let now = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid, resource_version: None }),
            ..DeleteParams::default()
        };
        let name = self.pod.name_any();
        for _ in 0..20 {
            match self.api().delete(&name, &now).await.doing(|| format!("deleting pod {name}")) {
                Ok(_) => return,
                Err(crate::LabError::Kube { source, .. }) if matches!(&*source, kube::Error::Api(e) if e.code == 404 || e.code == 409) =>
                {
                    return;
                }
                Err(e) => {
                    tracing::debug!(error = %e, "trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}
