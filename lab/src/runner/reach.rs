//! Steps about which pods reach which.

use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Runner;
use crate::error::{LabError, Result};
use crate::kubelet::PodRecord;
use crate::scenario::{Connects, Cut, Expect, Family, Flow, GoesOn, PodRef};
use crate::{programs, wait};

/// A connection that is not made within this time is taken for denied: a second attempt of TCP lies in it.
const CONNECT: Duration = Duration::from_secs(2);
/// What `curl` answers when nothing came back in time.
const TIMED_OUT: i32 = 28;

/// A connection over which a pod asks again and again.
pub(super) struct RunningFlow {
    /// Answers so far; the sender is gone once there will be no more.
    answers: watch::Receiver<usize>,
    reader: JoinHandle<()>,
    _process: Child,
}

impl Drop for RunningFlow {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Runner<'_> {
    pub(super) async fn connects(&mut self, step: &Connects) -> Result<()> {
        let from = self.client(&step.from)?;
        let addresses = self.addresses(&step.to, step.family)?;
        let deadline = Instant::now() + step.within;
        let all = addresses
            .into_iter()
            .map(|address| connects(step, &from, SocketAddr::new(address, step.port), deadline));
        try_join_all(all).await.map(drop)
    }

    pub(super) async fn flow(&mut self, step: &Flow) -> Result<()> {
        let from = self.client(&step.from)?;
        let address = self.addresses(&step.to, step.family)?.remove(0);
        let flow = RunningFlow::start(&from, SocketAddr::new(address, step.port)).await?;
        flow.answered(1, step.within)
            .await
            .map_err(|e| LabError::invalid(format!("flow {}: {e}", step.name)))?;
        self.flows.insert(step.name.clone(), flow);
        Ok(())
    }

    pub(super) async fn goes_on(&self, step: &GoesOn) -> Result<()> {
        let flow = self.running_flow(&step.flow)?;
        let so_far = *flow.answers.borrow();
        let more = flow.answered(so_far + step.answers, step.within).await;
        more.map_err(|e| LabError::invalid(format!("flow {}: {e}", step.flow)))
    }

    pub(super) async fn cut_flow(&mut self, step: &Cut) -> Result<()> {
        let flow = self.running_flow(&step.flow)?;
        let answers = flow.answers.clone();
        wait::until(format!("flow {} to get no answer any more", step.flow), step.within, || async {
            match answers.has_changed() {
                Err(_) => Ok(()),
                Ok(_) => Err(format!("{} answers, and it goes on", *answers.borrow())),
            }
        })
        .await?;
        self.flows.remove(&step.flow);
        Ok(())
    }

    fn running_flow(&self, name: &str) -> Result<&RunningFlow> {
        self.flows.get(name).ok_or_else(|| LabError::invalid(format!("no flow {name} runs")))
    }

    fn client(&mut self, pod: &PodRef) -> Result<PodRecord> {
        let record = self.lab.cluster(&pod.cluster)?.pod(&pod.namespace, &pod.name)?;
        self.node = Some(format!("{}/{}", pod.cluster, record.node));
        Ok(record)
    }

    fn addresses(&self, pod: &PodRef, family: Option<Family>) -> Result<Vec<IpAddr>> {
        let record = self.lab.cluster(&pod.cluster)?.pod(&pod.namespace, &pod.name)?;
        let wanted = |address: &IpAddr| match family {
            None => true,
            Some(Family::Ipv4) => address.is_ipv4(),
            Some(Family::Ipv6) => address.is_ipv6(),
        };
        let addresses: Vec<IpAddr> = record.addresses.into_iter().filter(wanted).collect();
        match addresses.is_empty() {
            true => Err(LabError::invalid(format!("pod {pod} has no such address"))),
            false => Ok(addresses),
        }
    }
}

impl RunningFlow {
    async fn start(from: &PodRecord, address: SocketAddr) -> Result<Self> {
        let lab_pod = programs::ours(programs::LAB_POD)?.to_string_lossy().into_owned();
        let launch = from.launch(&[lab_pod, "ask".to_owned(), address.to_string()])?;
        let mut process = launch.piped(Stdio::null()).await?;
        let output =
            process.stdout.take().ok_or_else(|| LabError::invalid("a process without its output"))?;
        let (tell, answers) = watch::channel(0);
        let reader = tokio::spawn(async move {
            let mut lines = BufReader::new(output).lines();
            while let Ok(Some(_)) = lines.next_line().await {
                tell.send_modify(|answers| *answers += 1);
            }
        });
        Ok(Self { answers, reader, _process: process })
    }

    async fn answered(&self, answers: usize, within: Duration) -> Result<(), String> {
        let mut so_far = self.answers.clone();
        let answered = so_far.wait_for(|so_far| *so_far >= answers);
        match tokio::time::timeout(within, answered).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(format!("cut after {} answers", *self.answers.borrow())),
            Err(_) => Err(format!("{} answers within {within:?}, not {answers}", *self.answers.borrow())),
        }
    }
}

/// Tries until the expectation holds, or the deadline has passed.
async fn connects(step: &Connects, from: &PodRecord, address: SocketAddr, deadline: Instant) -> Result<()> {
    loop {
        let found = connect(from, address).await?;
        if found.as_ref().ok() == Some(&step.expect) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let (from, to) = (&step.from, &step.to);
            return Err(LabError::invalid(match (found, step.expect) {
                (Ok(_), Expect::Denied) => format!("{from} reaches {address} of {to}"),
                (Ok(_), Expect::Allowed) => format!("{from} does not reach {address} of {to}"),
                (Err(other), _) => format!("{from} to {address} of {to}: {other}"),
            }));
        }
    }
}

/// What becomes of one connection; in words if it is neither.
async fn connect(from: &PodRecord, address: SocketAddr) -> Result<Result<Expect, String>> {
    let seconds = CONNECT.as_secs().to_string();
    let url = format!("http://{address}/");
    let command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", &seconds, &url];
    let output = from.launch(&command.map(str::to_owned))?.output(CONNECT * 3).await?;
    Ok(match output.status.code() {
        Some(0) => Ok(Expect::Allowed),
        Some(TIMED_OUT) => Ok(Expect::Denied),
        _ => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())),
    })
}
