//! Steps about what crosses the wires: who can read it, and whose word is taken for it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::curl::Curl;
use super::{LONGEST_CHECK, Runner};
use crate::capture::Packets;
use crate::error::{LabError, Result};
use crate::forge::Liar;
use crate::images::Answer;
use crate::netns::NetNs;
use crate::platform::{Platform, PlatformNode, RunningPod};
use crate::report::{Captured, StepReport, Tally};
use crate::scenario::{Capture, Forge, Plaintext, PodRef, RotateKey};
use crate::{command, wait};

/// The port that forged packets go to. Nobody needs to listen: they are looked for before that.
const PORT: u16 = 7007;
/// What the agent's status calls packets that a device has dropped for their source.
const FORGED: &str = "drop_in_forged_source";
/// How long packets may be under way before they are looked for.
const UNDER_WAY: Duration = Duration::from_millis(100);

impl Runner<'_> {
    /// Sends requests with a word that stands nowhere else, and looks for it, and for the answers, on every wire.
    pub(super) async fn capture(&mut self, step: &Capture, report: &mut StepReport) -> Result<()> {
        let platform = self.platform;
        let word = format!("word-{:x}", chrono::Utc::now().timestamp_nanos_opt().unwrap_or_default());
        let curl = Curl::new(platform, &step.target).await?.saying(&word);
        self.node = Some(format!("{}/{}", step.target.from.cluster, curl.node()));
        let deadline = Instant::now() + step.within.unwrap_or_default();
        loop {
            let capture = platform.tap().await?;
            let (mut tally, mut answers) = (Tally::default(), Vec::new());
            for _ in 0..step.count {
                let outcome = curl.ask().await;
                tally.add(&outcome);
                answers.extend(outcome.ok());
            }
            let packets = capture.end().await?;
            let outcome = tally.check(&step.answers);
            report.requests = Some(tally);
            let addresses = addresses(platform, &step.target.from, curl.pod(), &answers).await;
            let seen = seen(&packets, &word, addresses, &answers);
            report.captured = Some(seen.clone());
            let judged = judge(step.plaintext, &seen);
            match (outcome, judged) {
                (Ok(()), Judged::AsExpected) => return Ok(()),
                // What was read once has been read: that it is hidden later does not help.
                (_, Judged::Never(why)) => return Err(LabError::Invalid(why)),
                (Err(why), _) | (Ok(()), Judged::NotYet(why)) if Instant::now() >= deadline => {
                    return Err(LabError::Invalid(why));
                }
                _ => {}
            }
        }
    }

    /// Runs `isthmus rotate-key`, which waits until the node says that its peers use the new key alone.
    pub(super) async fn rotate_key(&mut self, step: &RotateKey) -> Result<()> {
        let node = self.platform.node(&step.node)?;
        self.node = Some(format!("{}/{}", step.node.cluster, node.name()));
        let mut isthmus = command::isthmus("rotate-key", &self.platform.kubeconfig())?;
        isthmus.args([node.name(), "--context", &step.node.cluster]);
        isthmus.arg("--timeout").arg(step.within.as_secs().max(1).to_string());
        command::output(isthmus, None, step.within + LONGEST_CHECK).await.map(drop)
    }

    /// A node sends in another pod's name, and in the name of one of its own. The pod they are for gets only the latter.
    pub(super) async fn forge(&mut self, step: &Forge) -> Result<()> {
        let platform = self.platform;
        let (victim, named) = (platform.pod(&step.to).await?, platform.pod(&step.source).await?);
        self.node = Some(format!("{}/{}", step.to.cluster, victim.node()));
        let node = platform.node(&step.node)?;
        let (from, ranges) = (node.netns().await?, node.pod_ranges().await?);
        let device = node.agent().await?.encryption.interface;
        let (guard, inside) =
            (platform.node_of(&step.to.cluster, &victim), platform.pod_netns(&step.to).await?);
        let before = dropped(&guard).await?;
        let mut sent = 0;
        for destination in victim.addresses() {
            let like = |address: &&IpAddr| address.is_ipv4() == destination.is_ipv4();
            let Some(lie) = named.addresses().iter().find(like) else { continue };
            let Some(truth) = own_address(&ranges, *destination) else { continue };
            let (lie, truth) = (SocketAddr::new(*lie, PORT), SocketAddr::new(truth, PORT));
            let liar = from.liar(&device, SocketAddr::new(*destination, PORT))?;
            send_until_honest(&liar, &inside, lie, truth, step).await?;
            sent += u64::from(step.count);
        }
        if sent == 0 {
            return Err(LabError::invalid(format!(
                "{} and {} have no addresses of the same family as pods of {} have",
                step.source, step.to, step.node
            )));
        }
        wait::until("the dropped packets to be counted", step.within, || async {
            match dropped(&guard).await.map_err(|e| e.to_string())?.saturating_sub(before) {
                counted if counted >= sent => Ok(()),
                counted => Err(format!("{counted} of {sent} are")),
            }
        })
        .await
    }
}

/// How many packets the device of a node has dropped since they bore an address that their sender does not own: by our own
/// device's counter, or by the interface's where the device is the kernel's.
async fn dropped(node: &PlatformNode<'_>) -> Result<u64> {
    let status = node.agent().await?.encryption;
    match status.mode.as_deref() {
        Some("kernel") => node.netns().await?.frame_errors(&status.interface),
        _ => Ok(status.counters.get(FORGED).copied().unwrap_or_default()),
    }
}

/// An address of one of the node's own pods, or of one that could be.
fn own_address(pods: &[IpNet], like: IpAddr) -> Option<IpAddr> {
    pods.iter().find(|range| range.addr().is_ipv4() == like.is_ipv4()).map(|range| match range {
        IpNet::V4(range) => (u32::from(range.network()) + 250).to_be_bytes().into(),
        IpNet::V6(range) => (u128::from(range.network()) + 250).to_be_bytes().into(),
    })
}

async fn send_until_honest(
    liar: &Liar,
    inside: &NetNs,
    lie: SocketAddr,
    truth: SocketAddr,
    step: &Forge,
) -> Result<()> {
    let (false_word, true_word) = (b"in another's name".as_slice(), b"in its own name".as_slice());
    let deadline = Instant::now() + step.within;
    loop {
        let capture = inside.capture()?;
        for _ in 0..step.count {
            liar.send(lie, false_word)?;
        }
        liar.send(truth, true_word)?;
        tokio::time::sleep(UNDER_WAY).await;
        let packets = capture.end().await?;
        let forged = packets.with(false_word);
        if forged > 0 {
            return Err(LabError::invalid(format!("{forged} packets in the name of {} arrived", lie.ip())));
        }
        // Whoever is heard with its own name would have been heard with the other one too.
        if packets.with(true_word) > 0 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(LabError::invalid(format!(
                "not even the packets in its own name ({}) arrived at {}: so it is not known whether the others were dropped for theirs",
                truth.ip(),
                step.to
            )));
        }
    }
}

/// The addresses of the client and of the pods that answered it.
async fn addresses(
    platform: Platform<'_>,
    from: &PodRef,
    client: &RunningPod,
    answers: &[Answer],
) -> BTreeSet<IpAddr> {
    let mut addresses: BTreeSet<IpAddr> = client.addresses().iter().copied().collect();
    let pods: BTreeSet<(&str, &str)> = answers.iter().map(|a| (a.cluster.as_str(), a.pod.as_str())).collect();
    for (cluster, pod) in pods {
        let pod = PodRef { cluster: cluster.into(), namespace: from.namespace.clone(), name: pod.into() };
        // One that has ended meanwhile is found by its name alone.
        if let Ok(pod) = platform.pod(&pod).await {
            addresses.extend(pod.addresses());
        }
    }
    addresses
}

fn seen(packets: &Packets, word: &str, addresses: BTreeSet<IpAddr>, answers: &[Answer]) -> Captured {
    let pods: BTreeSet<&str> = answers.iter().map(|answer| answer.pod.as_str()).collect();
    Captured {
        packets: packets.len(),
        requests: packets.with(word.as_bytes()),
        answers: pods.iter().map(|pod| packets.with(pod.as_bytes())).sum(),
        plain: addresses.into_iter().map(|address| packets.of(address)).sum(),
        encrypted: packets.encrypted(),
        encrypted_fragments: packets.encrypted_fragments(),
    }
}

enum Judged {
    AsExpected,
    NotYet(String),
    Never(String),
}

fn judge(expected: Plaintext, seen: &Captured) -> Judged {
    let readable = seen.requests + seen.answers + seen.plain;
    match expected {
        Plaintext::Unseen if readable > 0 => Judged::Never(format!(
            "of {} packets {} show a request, {} an answer, and {} are from or to a pod in the clear",
            seen.packets, seen.requests, seen.answers, seen.plain
        )),
        Plaintext::Unseen if seen.encrypted == 0 => {
            Judged::NotYet(format!("none of {} packets is an encrypted one", seen.packets))
        }
        Plaintext::Unseen if seen.encrypted_fragments > 0 => {
            Judged::Never(format!("{} encrypted packets crossed in fragments", seen.encrypted_fragments))
        }
        Plaintext::Seen if seen.requests == 0 || seen.answers == 0 => Judged::NotYet(format!(
            "of {} packets {} show a request and {} an answer: both should be there to be read",
            seen.packets, seen.requests, seen.answers
        )),
        _ => Judged::AsExpected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(requests: usize, answers: usize, encrypted: usize) -> Captured {
        Captured { packets: 100, requests, answers, encrypted, ..Captured::default() }
    }

    #[test]
    fn one_readable_packet_is_enough_and_an_empty_wire_proves_nothing() {
        assert!(matches!(judge(Plaintext::Unseen, &seen(0, 0, 9)), Judged::AsExpected));
        assert!(matches!(judge(Plaintext::Unseen, &seen(0, 1, 9)), Judged::Never(_)));
        assert!(matches!(judge(Plaintext::Unseen, &seen(1, 0, 9)), Judged::Never(_)));
        assert!(matches!(judge(Plaintext::Unseen, &seen(0, 0, 0)), Judged::NotYet(_)));
        let plain = Captured { plain: 1, ..seen(0, 0, 9) };
        assert!(matches!(judge(Plaintext::Unseen, &plain), Judged::Never(_)));
        assert!(matches!(judge(Plaintext::Seen, &seen(3, 0, 0)), Judged::NotYet(_)));
        assert!(matches!(judge(Plaintext::Seen, &seen(3, 3, 0)), Judged::AsExpected));
    }
}
