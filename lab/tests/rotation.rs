//! Nodes exchange their keys, agents are replaced, and traffic flows on: every datagram is counted. As root.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use isthmus_lab::cleanup::{self, Remains};
use isthmus_lab::names::LabName;
use isthmus_lab::netns::NetNs;
use isthmus_lab::scenario::Scenario;
use isthmus_lab::{Lab, Silent, status};
use isthmus_node_agent::encryption::publication::{
    PUBLIC_KEY, ROTATE, ROTATION, RotationReport, RotationState,
};
use isthmus_node_agent::status::AgentStatus;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use support::eventually;

const PORT: u16 = 9999;
/// Between two datagrams: a handshake that waited for its timer would cost a thousand of them.
const PACE: Duration = Duration::from_millis(5);
const UNDER_WAY: u32 = 128;

#[tokio::test(flavor = "multi_thread")]
async fn no_datagram_is_lost_while_both_ends_exchange_their_keys_and_agents_are_replaced() {
    let lab = raise("t-rotation").await;
    let client = |cluster: &str| lab.cluster(cluster).unwrap().pod("default", "client").unwrap();
    let address = |cluster: &str| -> IpAddr { client(cluster).addresses[0] };
    let (near, far) = (client("alpha").node, client("beta").node);
    let nodes = lab.cluster("alpha").unwrap().nodes();
    let bystander = nodes.iter().find(|node| **node != near).unwrap().clone();
    let agent_of = |node: &str| format!("alpha/{node}/node-agent");
    let netns = |cluster: &str| NetNs::open(&lab.name().pod_netns(cluster, "default", "client")).unwrap();
    let _echo = Echo::start(&netns("beta"), SocketAddr::new(address("beta"), PORT));
    let mut stream = Stream::start(&netns("alpha"), SocketAddr::new(address("beta"), PORT));

    for (cluster, node) in [("beta", far.as_str()), ("alpha", near.as_str())] {
        stream.note(&format!("{node} exchanges its key"));
        let before = published(&lab, cluster, node).await;
        rotate(&lab, cluster, node, "first").await;
        let after = published(&lab, cluster, node).await;
        assert_ne!(before, after, "{node}");
    }
    stream.note("an agent starts anew");
    // The files, the device and the Node agree, also for an agent that starts anew.
    let key = published(&lab, "alpha", &near).await;
    lab.restart(&agent_of(&near)).await.unwrap();
    eventually("the agent to use the new key again", async || {
        let encryption = agent(&lab, "alpha", &near).await?.encryption;
        let same = encryption.public_key.as_deref() == Some(key.as_str());
        if same && encryption.published { Ok(()) } else { Err(format!("{encryption:?}")) }
    })
    .await;
    assert_eq!(published(&lab, "alpha", &near).await, key, "the request was answered once");

    stream.note("a key is claimed twice");
    // One key that two nodes claim: who had it first keeps it, and both are named.
    let stolen = published(&lab, "beta", &far).await;
    lab.daemon(&agent_of(&bystander)).unwrap().stop(Duration::from_secs(5)).await;
    publish(&lab, "alpha", &bystander, &stolen).await;
    eventually("the second claim to be refused by name", async || {
        let status = agent(&lab, "alpha", &near).await?;
        let refused = status.encryption.refused_keys;
        let named = refused.iter().any(|key| key.node == bystander && key.reason.contains(&far));
        if named && !status.problems.is_empty() { Ok(()) } else { Err(format!("{refused:?}")) }
    })
    .await;
    stream.note("the claim is taken back");
    // Its own agent puts back what is true.
    lab.restart(&agent_of(&bystander)).await.unwrap();
    eventually("the right key to be published again", async || {
        let status = agent(&lab, "alpha", &near).await?.encryption;
        if status.refused_keys.is_empty() && published(&lab, "alpha", &bystander).await != stolen {
            Ok(())
        } else {
            Err(format!("{:?}", status.refused_keys))
        }
    })
    .await;

    let ended = stream.end();
    assert!(ended.sent > 1000, "only {} datagrams were sent", ended.sent);
    assert!(ended.lost.is_empty(), "{ended:?}");
    let name = lab.name().clone();
    lab.down().await.unwrap();
    assert!(Remains::of(&name).none(), "{:?}", Remains::of(&name));
}

async fn raise(name: &str) -> Lab {
    let name: LabName = name.parse().unwrap();
    cleanup::down(&name).await.unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kind-scenarios/encryption");
    let mut scenario = Scenario::load(&dir).unwrap();
    scenario.steps.truncate(4);
    let lab = Lab::up(scenario.lab(name, None), &mut |_| {}).await.unwrap();
    let report = isthmus_lab::run(&lab, &scenario, Duration::ZERO, &mut Silent).await;
    assert!(report.passed, "{}", serde_json::to_string_pretty(&report).unwrap());
    lab
}

async fn agent(lab: &Lab, cluster: &str, node: &str) -> Result<AgentStatus, String> {
    status::agent(&lab.cluster(cluster).unwrap().agent_socket(node)).await.map_err(|e| e.to_string())
}

fn nodes(lab: &Lab, cluster: &str) -> Api<Node> {
    Api::all(lab.cluster(cluster).unwrap().client())
}

async fn annotation(lab: &Lab, cluster: &str, node: &str, name: &str) -> Option<String> {
    nodes(lab, cluster).get(node).await.unwrap().metadata.annotations?.remove(name)
}

async fn published(lab: &Lab, cluster: &str, node: &str) -> String {
    annotation(lab, cluster, node, PUBLIC_KEY).await.expect("a published key")
}

async fn annotate(lab: &Lab, cluster: &str, node: &str, name: &str, value: &str) {
    let patch = Patch::Merge(json!({"metadata": {"annotations": {name: value}}}));
    nodes(lab, cluster).patch(node, &PatchParams::default(), &patch).await.unwrap();
}

async fn publish(lab: &Lab, cluster: &str, node: &str, key: &str) {
    annotate(lab, cluster, node, PUBLIC_KEY, key).await;
}

async fn rotate(lab: &Lab, cluster: &str, node: &str, id: &str) {
    annotate(lab, cluster, node, ROTATE, id).await;
    eventually("the key to be exchanged", async || {
        let said = annotation(lab, cluster, node, ROTATION).await.ok_or("nothing is said about it")?;
        let report: RotationReport = serde_json::from_str(&said).map_err(|e| e.to_string())?;
        if report.id == id && report.state == RotationState::Done { Ok(()) } else { Err(said) }
    })
    .await;
}

/// Sends back what it gets, until it is dropped.
struct Echo {
    end: Arc<AtomicBool>,
}

impl Echo {
    fn start(within: &NetNs, at: SocketAddr) -> Self {
        let socket = within.run(move || UdpSocket::bind(at)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let end = Arc::new(AtomicBool::new(false));
        std::thread::spawn({
            let end = end.clone();
            move || {
                let mut buffer = [0; 64];
                while !end.load(Ordering::Relaxed) {
                    if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                        let _ = socket.send_to(&buffer[..length], from);
                    }
                }
            }
        });
        Self { end }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

/// Numbered datagrams, one after the other, each of which should come back. No more are under way than fit into every
/// buffer on their path, however slow the machine is.
struct Stream {
    end: Arc<AtomicBool>,
    sent: Arc<AtomicU32>,
    sender: JoinHandle<()>,
    receiver: JoinHandle<Vec<bool>>,
    notes: Vec<(String, u32)>,
}

/// What became of the datagrams.
#[derive(Debug)]
struct Ended {
    sent: u32,
    /// Numbers of those that have not come back.
    lost: Vec<RangeInclusive<u32>>,
    /// What was done, and the number of the next datagram then: read when something was lost.
    #[allow(dead_code, reason = "printed when something was lost")]
    notes: Vec<(String, u32)>,
}

impl Stream {
    fn start(within: &NetNs, to: SocketAddr) -> Self {
        let socket = within
            .run(move || {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.connect(to)?;
                Ok(socket)
            })
            .unwrap();
        // Longer than anything takes to come back, on however busy a machine.
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let end = Arc::new(AtomicBool::new(false));
        let (sent, back) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let sender = std::thread::spawn({
            let (end, sent, back) = (end.clone(), sent.clone(), back.clone());
            let socket = socket.try_clone().unwrap();
            move || {
                while !end.load(Ordering::Relaxed) {
                    let number = sent.load(Ordering::Relaxed);
                    let room = number.saturating_sub(back.load(Ordering::Relaxed)) < UNDER_WAY;
                    if room && socket.send(&number.to_be_bytes()).is_ok() {
                        sent.store(number + 1, Ordering::Relaxed);
                    }
                    std::thread::park_timeout(PACE);
                }
            }
        });
        let receiver = std::thread::spawn(move || {
            let mut seen = Vec::new();
            let mut buffer = [0; 64];
            while let Ok(length) = socket.recv(&mut buffer) {
                let Ok(number) = buffer[..length].try_into().map(u32::from_be_bytes) else { continue };
                let number = number as usize;
                seen.resize(seen.len().max(number + 1), false);
                seen[number] = true;
                back.fetch_add(1, Ordering::Relaxed);
            }
            seen
        });
        Self { end, sent, sender, receiver, notes: Vec::new() }
    }

    fn note(&mut self, what: &str) {
        self.notes.push((what.to_owned(), self.sent.load(Ordering::Relaxed)));
    }

    fn end(self) -> Ended {
        self.end.store(true, Ordering::Relaxed);
        self.sender.join().unwrap();
        let (sent, seen) = (self.sent.load(Ordering::Relaxed), self.receiver.join().unwrap());
        let mut lost: Vec<RangeInclusive<u32>> = Vec::new();
        for number in (0..sent).filter(|number| !seen.get(*number as usize).copied().unwrap_or(false)) {
            match lost.last_mut() {
                Some(range) if *range.end() + 1 == number => *range = *range.start()..=number,
                _ => lost.push(number..=number),
            }
        }
        Ended { sent, lost, notes: self.notes }
    }
}
