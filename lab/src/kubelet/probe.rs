//! Readiness probes: from the node to the pod, as a kubelet asks.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe as Spec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::time::Instant;

use super::Kubelet;
use super::pod::Sandbox;
use crate::error::{LabError, Result};
use crate::http;
use crate::process::{Launch, Process};

/// A container's readiness probe and how it has gone.
pub(super) struct Probe {
    action: Action,
    period: Duration,
    timeout: Duration,
    successes_wanted: i32,
    failures_wanted: i32,
    /// Positive: successes in a row; negative: failures in a row.
    run: i32,
    ready: bool,
    next_at: Instant,
}

enum Action {
    Http { port: u16, path: String },
    Tcp { port: u16 },
    Exec(Vec<String>),
}

/// A container that has never been ready is asked this often, whatever its period: a kubelet's first probe, too, does
/// not wait for a period to pass.
const EAGER: Duration = Duration::from_millis(50);

impl Probe {
    pub(super) fn new(spec: &Spec, container: &Container) -> Result<Self> {
        let action = if let Some(get) = &spec.http_get {
            Action::Http {
                port: number(&get.port, container)?,
                path: get.path.clone().unwrap_or_else(|| "/".into()),
            }
        } else if let Some(tcp) = &spec.tcp_socket {
            Action::Tcp { port: number(&tcp.port, container)? }
        } else if let Some(exec) = &spec.exec {
            Action::Exec(exec.command.clone().unwrap_or_default())
        } else {
            return Err(LabError::invalid("the lab's readiness probes are httpGet, tcpSocket and exec"));
        };
        let seconds = |value: Option<i32>, default: u64| {
            Duration::from_secs(value.and_then(|v| u64::try_from(v).ok()).unwrap_or(default))
        };
        Ok(Self {
            action,
            period: seconds(spec.period_seconds.filter(|p| *p > 0), 10),
            timeout: seconds(spec.timeout_seconds.filter(|t| *t > 0), 1),
            successes_wanted: spec.success_threshold.unwrap_or(1).max(1),
            failures_wanted: spec.failure_threshold.unwrap_or(3).max(1),
            run: 0,
            ready: false,
            next_at: Instant::now() + seconds(spec.initial_delay_seconds, 0),
        })
    }

    /// Probes once, when it is time, and says whether the container counts as ready. Cancel safe.
    pub(super) async fn next(&mut self, kubelet: &Kubelet, sandbox: &Sandbox, process: &Process) -> bool {
        tokio::time::sleep_until(self.next_at).await;
        let success = self.ask(kubelet, sandbox, process).await;
        self.run = match (success, self.run) {
            (true, run) => run.max(0).saturating_add(1),
            (false, run) => run.min(0).saturating_sub(1),
        };
        if self.run >= self.successes_wanted {
            self.ready = true;
        } else if -self.run >= self.failures_wanted {
            self.ready = false;
        }
        self.next_at = Instant::now() + if self.ready { self.period } else { self.period.min(EAGER) };
        self.ready
    }

    async fn ask(&self, kubelet: &Kubelet, sandbox: &Sandbox, process: &Process) -> bool {
        let pod: IpAddr = sandbox.addresses[0];
        match &self.action {
            Action::Http { port, path } => {
                let answer = http::get(&kubelet.host, SocketAddr::new(pod, *port), path, self.timeout).await;
                answer.is_ok_and(|(status, _)| (200..400).contains(&status))
            }
            Action::Tcp { port } => {
                let connected = kubelet.host.connect(SocketAddr::new(pod, *port));
                tokio::time::timeout(self.timeout, connected).await.is_ok_and(|c| c.is_ok())
            }
            Action::Exec(command) => {
                let Some((program, args)) = command.split_first() else { return false };
                let launch = Launch {
                    program: program.into(),
                    args: args.iter().map(Into::into).collect(),
                    ..process.launch().clone()
                };
                launch.output(self.timeout).await.is_ok_and(|o| o.status.success())
            }
        }
    }
}

fn number(port: &IntOrString, container: &Container) -> Result<u16> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            ports.find(|p| p.name.as_ref() == Some(name)).map(|p| p.container_port)
        }
    };
    number.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0).ok_or_else(|| {
        LabError::invalid(format!("the readiness probe's port {port:?} is none of the container's"))
    })
}
