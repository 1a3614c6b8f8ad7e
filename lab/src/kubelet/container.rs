//! One container: a process in the pod's namespaces, started again when it ends, and asked whether it is ready.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::time::Duration;

use chrono::{DateTime, Utc};
use k8s_openapi::api::core::v1::{Container, EnvVar, Pod};
use kube::ResourceExt;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::Kubelet;
use super::pod::Sandbox;
use super::probe::Probe;
use crate::error::{LabError, Result};
use crate::images;
use crate::process::{Launch, Process};

/// A container that has been started at least once.
pub(super) struct RunningContainer {
    pub(super) spec: Container,
    pub(super) process: Process,
    pub(super) id: String,
    pub(super) started: DateTime<Utc>,
    pub(super) restarts: i32,
    pub(super) ready: bool,
    probe: Option<Probe>,
    /// When it is to be started again, if it has ended.
    restart_at: Option<Instant>,
}

/// Starts a container.
///
/// # Errors
/// For an image the lab does not have, or when the process cannot be made.
pub(super) async fn start(
    kubelet: &Kubelet,
    pod: &Pod,
    sandbox: &Sandbox,
    spec: &Container,
) -> Result<RunningContainer> {
    let uid = pod.uid().unwrap_or_default();
    let digest = Sha256::digest(format!("{uid}/{}", spec.name));
    let id: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    let command = match spec.command.as_deref() {
        Some([]) | None => images::command(spec.image.as_deref().unwrap_or_default())?,
        Some(command) => command.iter().map(OsString::from).collect(),
    };
    let mut command = command.into_iter().chain(spec.args.iter().flatten().map(OsString::from));
    let program = command.next().ok_or_else(|| LabError::invalid("the container has no command"))?;
    let name = format!("{}/{}/{}", kubelet.cluster, pod.namespace().unwrap_or_default(), pod.name_any());
    let launch = Launch {
        program: program.into(),
        args: command.collect(),
        env: environment(kubelet, pod, sandbox, spec),
        netns: sandbox.netns.path(),
        cgroup: sandbox.cgroup.join(&id),
        hostname: Some(pod.name_any()),
        log: kubelet.ground.state.log(&name),
        name,
    };
    let process = launch.start().await?;
    let probe = spec.readiness_probe.as_ref().map(|p| Probe::new(p, spec)).transpose()?;
    Ok(RunningContainer {
        spec: spec.clone(),
        process,
        id,
        started: Utc::now(),
        restarts: 0,
        ready: probe.is_none(),
        probe,
        restart_at: None,
    })
}

/// Is done when a container has ended, has been started again, or has become ready or not ready.
pub(super) async fn change(
    kubelet: &Kubelet,
    pod: &Pod,
    sandbox: &Sandbox,
    containers: &mut [RunningContainer],
) {
    if containers.is_empty() {
        return std::future::pending().await;
    }
    let changes = containers.iter_mut().map(|c| Box::pin(c.change(kubelet, pod, sandbox)));
    futures::future::select_all(changes).await;
}

/// Is done when a container that is being ended has become ready or not ready: as long as it runs it is still asked.
pub(super) async fn readiness_change(
    kubelet: &Kubelet,
    sandbox: &Sandbox,
    containers: &mut [RunningContainer],
) {
    if containers.is_empty() {
        return std::future::pending().await;
    }
    let changes = containers.iter_mut().map(|c| Box::pin(c.readiness_change(kubelet, sandbox)));
    futures::future::select_all(changes).await;
}

/// What is needed to end a container.
pub(super) struct Ending {
    pub(super) process: Process,
    spec: Container,
}

impl RunningContainer {
    pub(super) fn ending(&self) -> Ending {
        Ending { process: self.process.clone(), spec: self.spec.clone() }
    }

    async fn readiness_change(&mut self, kubelet: &Kubelet, sandbox: &Sandbox) {
        let before = self.ready;
        let process = self.process.clone();
        while let Some(probe) = self.probe.as_mut().filter(|_| process.running()) {
            self.ready = probe.next(kubelet, sandbox, &process).await;
            if self.ready != before {
                return;
            }
        }
        std::future::pending().await
    }

    pub(super) fn running(&self) -> bool {
        self.restart_at.is_none()
    }

    /// Cancel safe: what has been seen so far is in `self`.
    async fn change(&mut self, kubelet: &Kubelet, pod: &Pod, sandbox: &Sandbox) {
        if let Some(at) = self.restart_at {
            tokio::time::sleep_until(at).await;
            // Through the whole of `start`, so that a command that cannot be found is tried again as well.
            match self.process.launch().clone().start().await {
                Ok(process) => {
                    self.process = process;
                    self.started = Utc::now();
                    self.restarts += 1;
                    self.restart_at = None;
                    self.ready = self.probe.is_none();
                }
                Err(e) => {
                    tracing::warn!(pod = %pod.name_any(), error = %e, "starting a container again");
                    self.restart_at = Some(Instant::now() + self.backoff());
                }
            }
            return;
        }
        let before = self.ready;
        let process = self.process.clone();
        loop {
            let Some(probe) = &mut self.probe else {
                process.ended().await;
                break;
            };
            tokio::select! {
                _ = process.ended() => break,
                ready = probe.next(kubelet, sandbox, &process) => {
                    self.ready = ready;
                    if ready != before {
                        return;
                    }
                }
            }
        }
        self.ready = false;
        self.restart_at = Some(Instant::now() + self.backoff());
    }

    /// Grows as a kubelet's does, but begins sooner.
    fn backoff(&self) -> Duration {
        Duration::from_millis(100 << self.restarts.clamp(0, 8))
    }
}

impl Ending {
    /// What the container wants done before it is told to end.
    pub(super) async fn pre_stop(&self, kubelet: &Kubelet, pod: &Pod, sandbox: &Sandbox) {
        let Some(hook) = self.spec.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref()) else { return };
        if let Some(sleep) = &hook.sleep {
            tokio::time::sleep(Duration::from_secs(sleep.seconds.max(0) as u64)).await;
        }
        let Some(command) = hook.exec.as_ref().and_then(|e| e.command.as_ref()) else { return };
        let Some((program, args)) = command.split_first() else { return };
        let launch = Launch {
            program: program.into(),
            args: args.iter().map(Into::into).collect(),
            env: environment(kubelet, pod, sandbox, &self.spec),
            ..self.process.launch().clone()
        };
        if let Err(e) = launch.output(Duration::from_secs(3600)).await {
            tracing::warn!(pod = %pod.name_any(), error = %e, "preStop");
        }
    }
}

fn environment(
    kubelet: &Kubelet,
    pod: &Pod,
    sandbox: &Sandbox,
    spec: &Container,
) -> BTreeMap<String, String> {
    let mut env = BTreeMap::from([
        ("HOSTNAME".to_owned(), pod.name_any()),
        ("LAB_CLUSTER".to_owned(), kubelet.cluster.clone()),
        ("LAB_NODE".to_owned(), kubelet.node.clone()),
        ("LAB_POD".to_owned(), pod.name_any()),
    ]);
    for var in spec.env.iter().flatten() {
        env.insert(var.name.clone(), value(kubelet, pod, sandbox, var));
    }
    env
}

fn value(kubelet: &Kubelet, pod: &Pod, sandbox: &Sandbox, var: &EnvVar) -> String {
    let field = var.value_from.as_ref().and_then(|v| v.field_ref.as_ref()).map(|f| f.field_path.as_str());
    match field {
        Some("metadata.name") => pod.name_any(),
        Some("metadata.namespace") => pod.namespace().unwrap_or_default(),
        Some("metadata.uid") => pod.uid().unwrap_or_default(),
        Some("spec.nodeName") => kubelet.node.clone(),
        Some("status.podIP") => sandbox.addresses.first().map(ToString::to_string).unwrap_or_default(),
        Some("status.hostIP") => kubelet.addresses.first().map(ToString::to_string).unwrap_or_default(),
        _ => var.value.clone().unwrap_or_default(),
    }
}
