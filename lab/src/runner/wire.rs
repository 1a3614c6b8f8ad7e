//! Steps about what crosses the wires: who can read it, and whose word is taken for it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use isthmus_node_agent::encryption::publication::{ROTATE, ROTATION, RotationReport, RotationState};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::Runner;
use super::curl::Curl;
use crate::capture::Packets;
use crate::cluster::Cluster;
use crate::error::{Doing, LabError, Result};
use crate::images::Answer;
use crate::lab::Lab;
use crate::netns::NetNs;
use crate::platform::RunningPod;
use crate::report::{Captured, StepReport, Tally};
use crate::scenario::{Capture, Forge, Plaintext, PodRef, RotateKey};
use crate::{status, wait};

/// The port that forged packets go to. Nobody needs to listen: they are looked for before that.
const PORT: u16 = 7007;
/// What the agent's status calls packets that a device has dropped for their source.
const FORGED: &str = "drop_in_forged_source";
/// How long packets may be under way before they are looked for.
const UNDER_WAY: Duration = Duration::from_millis(100);

impl Runner<'_> {
    /// Sends requests with a word that stands nowhere else, and looks for it, and for the answers, on every wire.
    pub(super) async fn capture(&mut self, step: &Capture, report: &mut StepReport) -> Result<()> {
        let lab = self.platform.lab()?;
        let word = format!("word-{:x}", chrono::Utc::now().timestamp_nanos_opt().unwrap_or_default());
        let curl = Curl::new(self.platform, &step.target).await?.saying(&word);
        self.node = Some(format!("{}/{}", step.target.from.cluster, curl.node()));
        let deadline = Instant::now() + step.within.unwrap_or_default();
        loop {
            let capture = lab.wan().capture()?;
            let (mut tally, mut answers) = (Tally::default(), Vec::new());
            for _ in 0..step.count {
                let outcome = curl.ask().await;
                tally.add(&outcome);
                answers.extend(outcome.ok());
            }
            let packets = capture.end().await?;
            let outcome = tally.check(&step.answers);
            report.requests = Some(tally);
            let addresses = addresses(lab, &step.target.from, curl.pod(), &answers);
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

    /// Asks for another key as `isthmus rotate-key` does, and waits until the node says that its peers use it.
    pub(super) async fn rotate_key(&mut self, step: &RotateKey) -> Result<()> {
        let cluster = self.platform.lab()?.cluster(&step.node.cluster)?;
        self.node = Some(step.node.to_string());
        let nodes: Api<Node> = Api::all(cluster.client());
        let id = format!("lab-{:x}", chrono::Utc::now().timestamp_nanos_opt().unwrap_or_default());
        let patch = Patch::Merge(json!({"metadata": {"annotations": {ROTATE: id}}}));
        let asked = nodes.patch(&step.node.name, &PatchParams::default(), &patch).await;
        asked.doing(|| format!("asking {} for another key", step.node))?;
        wait::until(format!("{} to have another key", step.node), step.within, || async {
            let node = nodes.get(&step.node.name).await.map_err(|e| e.to_string())?;
            let said = node.metadata.annotations.unwrap_or_default().remove(ROTATION);
            let said = said.ok_or("the node says nothing about it")?;
            let report: RotationReport = serde_json::from_str(&said).map_err(|e| e.to_string())?;
            match report.state {
                RotationState::Done if report.id == id => Ok(()),
                _ => Err(said),
            }
        })
        .await
    }

    /// How many packets the device of a node has dropped since they bore an address that their sender does not own.
    async fn forged(&self, cluster: &Cluster, node: &str) -> Result<u64> {
        let status = status::agent(&cluster.agent_socket(node)).await?;
        Ok(status.encryption.counters.get(FORGED).copied().unwrap_or_default())
    }

    /// A node sends in another pod's name, and in the name of one of its own. The pod they are for gets only the latter.
    pub(super) async fn forge(&mut self, step: &Forge) -> Result<()> {
        let liar = self.platform.lab()?.cluster(&step.node.cluster)?;
        let position = liar.nodes().iter().position(|node| *node == step.node.name);
        let position = position.ok_or_else(|| {
            LabError::invalid(format!("cluster {} has no node {}", liar.name(), step.node.name))
        })?;
        let from = &liar.net().nodes[position];
        let cluster = self.platform.lab()?.cluster(&step.to.cluster)?;
        let victim = cluster.pod(&step.to.namespace, &step.to.name)?;
        self.node = Some(format!("{}/{}", cluster.name(), victim.node));
        let namespace =
            self.platform.lab()?.name().pod_netns(&step.to.cluster, &step.to.namespace, &step.to.name);
        let inside = NetNs::open(&namespace)?;
        let named = self.platform.lab()?.cluster(&step.source.cluster)?;
        let named = named.pod(&step.source.namespace, &step.source.name)?;
        let before = self.forged(cluster, &victim.node).await?;
        let mut sent = 0;
        for destination in &victim.addresses {
            let like = |address: &&IpAddr| address.is_ipv4() == destination.is_ipv4();
            let Some(lie) = named.addresses.iter().find(like) else { continue };
            let Some(truth) = own_address(liar, position, *destination) else { continue };
            let (lie, truth) = (SocketAddr::new(*lie, PORT), SocketAddr::new(truth, PORT));
            let to = SocketAddr::new(*destination, PORT);
            send_until_honest(from, &inside, lie, truth, to, step).await?;
            sent += u64::from(step.count);
        }
        wait::until("the dropped packets to be counted", step.within, || async {
            match self.forged(cluster, &victim.node).await.map_err(|e| e.to_string())? - before {
                counted if counted >= sent => Ok(()),
                counted => Err(format!("{counted} of {sent} are")),
            }
        })
        .await
    }
}

/// An address of one of the node's own pods, or of one that could be.
fn own_address(cluster: &Cluster, node: usize, like: IpAddr) -> Option<IpAddr> {
    let ranges = cluster.net().plan.pod_ranges(node);
    ranges.into_iter().find(|range| range.addr().is_ipv4() == like.is_ipv4()).map(|range| match range {
        IpNet::V4(range) => (u32::from(range.network()) + 250).to_be_bytes().into(),
        IpNet::V6(range) => (u128::from(range.network()) + 250).to_be_bytes().into(),
    })
}

async fn send_until_honest(
    from: &NetNs,
    inside: &NetNs,
    lie: SocketAddr,
    truth: SocketAddr,
    to: SocketAddr,
    step: &Forge,
) -> Result<()> {
    let (false_word, true_word) = (b"in another's name".as_slice(), b"in its own name".as_slice());
    let deadline = Instant::now() + step.within;
    loop {
        let capture = inside.capture()?;
        for _ in 0..step.count {
            from.forge(lie, to, false_word)?;
        }
        from.forge(truth, to, true_word)?;
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
                to.ip()
            )));
        }
    }
}

/// The addresses of the client and of the pods that answered it.
fn addresses(lab: &Lab, from: &PodRef, client: &RunningPod, answers: &[Answer]) -> BTreeSet<IpAddr> {
    // One that has ended meanwhile is found by its name alone.
    let of = |a: &Answer| lab.cluster(&a.cluster).and_then(|c| c.pod(&from.namespace, &a.pod)).ok();
    let answering = answers.iter().filter_map(of).flat_map(|record| record.addresses);
    client.addresses().iter().copied().chain(answering).collect()
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
