//! Steps about which pods reach which.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Runner;
use crate::error::{LabError, Result};
use crate::platform::RunningPod;
use crate::scenario::{Attempts, Connects, Cut, EndAttempts, Expect, Family, Flow, GoesOn, PodRef};
use crate::wait;

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

/// A pod that connects again and again.
pub(super) struct RunningAttempts {
    tally: Arc<Mutex<AttemptTally>>,
    reader: JoinHandle<()>,
    _process: Child,
}

#[derive(Debug, Clone, Copy, Default)]
struct AttemptTally {
    made: usize,
    denied: usize,
}

impl Drop for RunningAttempts {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Drop for RunningFlow {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Runner<'_> {
    pub(super) async fn connects(&mut self, step: &Connects) -> Result<()> {
        let from = self.client(&step.from).await?;
        let addresses = self.addresses(&step.to, step.family).await?;
        let deadline = Instant::now() + step.within;
        let all = addresses
            .into_iter()
            .map(|address| connects(step, &from, SocketAddr::new(address, step.port), deadline));
        try_join_all(all).await.map(drop)
    }

    pub(super) async fn flow(&mut self, step: &Flow) -> Result<()> {
        let from = self.client(&step.from).await?;
        let address = self.addresses(&step.to, step.family).await?.remove(0);
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

    pub(super) async fn attempts(&mut self, step: &Attempts) -> Result<()> {
        let from = self.client(&step.from).await?;
        let address = SocketAddr::new(self.addresses(&step.to, step.family).await?.remove(0), step.port);
        let running = RunningAttempts::start(&from, address).await?;
        wait::until(format!("attempts {} to begin", step.name), Duration::from_secs(30), || async {
            let tally = running.tally();
            if tally.made + tally.denied > 0 { Ok(()) } else { Err("none yet".to_owned()) }
        })
        .await?;
        self.attempts.insert(step.name.clone(), running);
        Ok(())
    }

    pub(super) fn end_attempts(&mut self, step: &EndAttempts) -> Result<()> {
        let running = self.attempts.remove(&step.name);
        let running = running.ok_or_else(|| LabError::invalid(format!("no attempts {} run", step.name)))?;
        let AttemptTally { made, denied } = running.tally();
        let against = if step.expect == Expect::Allowed { denied } else { made };
        if made + denied > 0 && against == 0 {
            return Ok(());
        }
        Err(LabError::invalid(format!("attempts {}: {made} connections were made, {denied} not", step.name)))
    }

    fn running_flow(&self, name: &str) -> Result<&RunningFlow> {
        self.flows.get(name).ok_or_else(|| LabError::invalid(format!("no flow {name} runs")))
    }

    async fn client(&mut self, pod: &PodRef) -> Result<RunningPod> {
        let running = self.platform.pod(pod).await?;
        self.node = Some(format!("{}/{}", pod.cluster, running.node()));
        Ok(running)
    }

    async fn addresses(&self, pod: &PodRef, family: Option<Family>) -> Result<Vec<IpAddr>> {
        let running = self.platform.pod(pod).await?;
        let wanted = |address: &IpAddr| match family {
            None => true,
            Some(Family::Ipv4) => address.is_ipv4(),
            Some(Family::Ipv6) => address.is_ipv6(),
        };
        let addresses: Vec<IpAddr> = running.addresses().iter().copied().filter(wanted).collect();
        match addresses.is_empty() {
            true => Err(LabError::invalid(format!("pod {pod} has no such address"))),
            false => Ok(addresses),
        }
    }
}

impl RunningAttempts {
    async fn start(from: &RunningPod, address: SocketAddr) -> Result<Self> {
        let (process, mut lines) = ask(from, "knock", address).await?;
        let tally = Arc::new(Mutex::new(AttemptTally::default()));
        let reader = tokio::spawn({
            let tally = tally.clone();
            async move {
                while let Ok(Some(line)) = lines.next_line().await {
                    let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
                    match line.as_str() {
                        "made" => tally.made += 1,
                        _ => tally.denied += 1,
                    }
                }
            }
        });
        Ok(Self { tally, reader, _process: process })
    }

    fn tally(&self) -> AttemptTally {
        *self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a part of `lab-pod` in a pod, and reads what it says line by line.
async fn ask(
    from: &RunningPod,
    part: &str,
    address: SocketAddr,
) -> Result<(Child, Lines<BufReader<ChildStdout>>)> {
    let mut process = from.piped(&[from.lab_pod()?, part.to_owned(), address.to_string()]).await?;
    let output = process.stdout.take().ok_or_else(|| LabError::invalid("a process without its output"))?;
    Ok((process, BufReader::new(output).lines()))
}

impl RunningFlow {
    async fn start(from: &RunningPod, address: SocketAddr) -> Result<Self> {
        let (process, mut lines) = ask(from, "ask", address).await?;
        let (tell, answers) = watch::channel(0);
        let reader = tokio::spawn(async move {
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
async fn connects(step: &Connects, from: &RunningPod, address: SocketAddr, deadline: Instant) -> Result<()> {
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
async fn connect(from: &RunningPod, address: SocketAddr) -> Result<Result<Expect, String>> {
    let seconds = CONNECT.as_secs().to_string();
    let url = format!("http://{address}/");
    let command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", &seconds, &url];
    let output = from.output(&command.map(str::to_owned), CONNECT * 3).await?;
    Ok(match output.status.code() {
        Some(0) => Ok(Expect::Allowed),
        Some(TIMED_OUT) => Ok(Expect::Denied),
        _ => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())),
    })
}
