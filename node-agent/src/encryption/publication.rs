//! This node's own Node object: where its public key is published, a rotation of the key asked for, and its progress
//! told. What is published is put back when somebody changes it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use futures::StreamExt;
use isthmus_wireguard::config::PublicKey;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::kubernetes;

/// The public key, in base64, under the name that Cilium's users know.
pub const PUBLIC_KEY: &str = "network.cilium.io/wg-pub-key";
/// Asks for another key. The value names the request: each is answered once.
pub const ROTATE: &str = "isthmus.io/rotate-wireguard-key";
/// How the latest request is doing: a [`RotationReport`] in JSON.
pub const ROTATION: &str = "isthmus.io/wireguard-key-rotation";

/// Longest name of a request.
const LONGEST_REQUEST: usize = 253;
/// Writes are at least so far apart, so that two that disagree do not keep the API busy.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// What the Node object should say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Wanted {
    /// What it says now: nothing is known yet that should be published.
    #[default]
    AsItIs,
    /// This key, and how a rotation is doing.
    Key {
        /// The key.
        key: PublicKey,
        /// The rotation.
        rotation: Option<RotationReport>,
    },
    /// None of these keys; another's is left alone.
    Nothing {
        /// This node's keys, present and past.
        of: BTreeSet<PublicKey>,
    },
}

/// How a rotation is doing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RotationReport {
    /// The request's name.
    pub id: String,
    /// Where it stands.
    pub state: RotationState,
    /// The new public key, in base64; the present one where there is no new one.
    pub public_key: String,
    /// Peers that use the new key.
    pub switched: usize,
    /// Peers that have a session with the node.
    pub peers: usize,
    /// Why it has not begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Where a rotation stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RotationState {
    /// Both keys are in use.
    InProgress,
    /// The new key alone is in use.
    Done,
    /// There is no new key.
    Failed,
}

/// What the Node object says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OwnNode {
    /// It has been read.
    pub seen: bool,
    /// Its internal addresses.
    pub addresses: Vec<IpAddr>,
    /// The published key, as it is written there.
    pub published: Option<String>,
    /// The request for another key.
    pub request: Option<String>,
    /// What was last said about an answer.
    pub rotation: Option<RotationReport>,
    /// Why it could not be read or written the last time.
    pub error: Option<String>,
}

impl OwnNode {
    /// Whether this key is the published one.
    pub fn shows(&self, key: &PublicKey) -> bool {
        self.published.as_ref().is_some_and(|published| *published == key.to_string())
    }
}

/// Keeps the Node object as `wanted` says, and tells `seen` what it says, until `shutdown`.
pub async fn run(
    nodes: Api<Node>,
    name: String,
    mut wanted: watch::Receiver<Wanted>,
    seen: watch::Sender<OwnNode>,
    shutdown: CancellationToken,
) {
    let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut events = std::pin::pin!(kubernetes::watch(nodes.clone(), only));
    let mut annotations = Annotations::default();
    let mut retry = PAUSE;
    let mut next_write = Instant::now();
    loop {
        let patch = annotations.patch(&wanted.borrow_and_update());
        tokio::select! {
            () = shutdown.cancelled() => return,
            event = events.next() => match event {
                Some(Ok(Event::Apply(node) | Event::InitApply(node))) => {
                    annotations.read(&node);
                    seen.send_if_modified(|seen| exchange(seen, read(&node)));
                }
                Some(Ok(Event::Delete(_))) => annotations = Annotations::default(),
                Some(Ok(Event::Init | Event::InitDone)) => {}
                Some(Err(error)) => note(&seen, format!("cannot watch node {name}: {error}")),
                None => return,
            },
            changed = wanted.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep_until(next_write), if patch.is_some() => {
                let Some(patch) = patch else { continue };
                let body = Patch::Merge(json!({"metadata": {"annotations": patch}}));
                match nodes.patch(&name, &PatchParams::default(), &body).await {
                    Ok(node) => {
                        annotations.take(node.metadata.annotations.unwrap_or_default());
                        seen.send_if_modified(|seen| annotations.tell(seen));
                        tracing::info!(node = %name, "node annotations written");
                        retry = PAUSE;
                        next_write = Instant::now() + PAUSE;
                    }
                    Err(error) => {
                        let advice = "the agent may need the right to patch nodes";
                        note(&seen, format!("cannot publish the WireGuard key in node {name}: {error} ({advice})"));
                        next_write = Instant::now() + retry;
                        retry = (retry * 2).min(LONGEST_RETRY);
                    }
                }
            }
        }
    }
}

/// The annotations that concern us; none before the object has been read.
#[derive(Debug, Default)]
struct Annotations {
    known: bool,
    key: Option<String>,
    rotation: Option<String>,
}

impl Annotations {
    fn read(&mut self, node: &Node) {
        self.take(node.metadata.annotations.clone().unwrap_or_default());
    }

    fn take(&mut self, mut all: std::collections::BTreeMap<String, String>) {
        *self = Self { known: true, key: all.remove(PUBLIC_KEY), rotation: all.remove(ROTATION) };
    }

    fn tell(&self, seen: &mut OwnNode) -> bool {
        let now = OwnNode { published: self.key.clone(), error: None, ..seen.clone() };
        exchange(seen, now)
    }

    /// What has to be written, if anything.
    fn patch(&self, wanted: &Wanted) -> Option<Map<String, Value>> {
        if !self.known {
            return None;
        }
        let mut patch = Map::new();
        match wanted {
            Wanted::AsItIs => {}
            Wanted::Key { key, rotation } => {
                let key = key.to_string();
                if self.key.as_ref() != Some(&key) {
                    patch.insert(PUBLIC_KEY.to_owned(), key.into());
                }
                let report = rotation.as_ref().and_then(|report| serde_json::to_string(report).ok());
                if let Some(report) = report.filter(|report| self.rotation.as_ref() != Some(report)) {
                    patch.insert(ROTATION.to_owned(), report.into());
                }
            }
            Wanted::Nothing { of } => {
                let published = self.key.as_ref().and_then(|key| key.parse::<PublicKey>().ok());
                if published.is_some_and(|key| of.contains(&key)) {
                    patch.insert(PUBLIC_KEY.to_owned(), Value::Null);
                }
            }
        }
        (!patch.is_empty()).then_some(patch)
    }
}

fn read(node: &Node) -> OwnNode {
    let annotation = |name| node.metadata.annotations.as_ref().and_then(|all| all.get(name)).cloned();
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
    OwnNode {
        seen: true,
        addresses: addresses
            .into_iter()
            .flatten()
            .filter(|address| address.type_ == "InternalIP")
            .filter_map(|address| address.address.parse().ok())
            .collect(),
        published: annotation(PUBLIC_KEY),
        request: annotation(ROTATE)
            .filter(|id| !id.is_empty() && id.len() <= LONGEST_REQUEST && is_plain(id)),
        rotation: annotation(ROTATION).and_then(|report| serde_json::from_str(&report).ok()),
        error: None,
    }
}

/// The name of a request is written into a file and into log lines.
fn is_plain(id: &str) -> bool {
    id.chars().all(|letter| letter.is_ascii_graphic())
}

fn exchange(seen: &mut OwnNode, now: OwnNode) -> bool {
    let changed = *seen != now;
    *seen = now;
    changed
}

fn note(seen: &watch::Sender<OwnNode>, error: String) {
    tracing::warn!("{error}");
    seen.send_if_modified(|seen| {
        let now = OwnNode { error: Some(error), ..seen.clone() };
        exchange(seen, now)
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(all: &[(&str, &str)]) -> Annotations {
        let mut annotations = Annotations::default();
        annotations.take(all.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect());
        annotations
    }

    fn key(number: u8) -> PublicKey {
        PublicKey::new([number; 32])
    }

    #[test]
    fn the_key_is_written_once_and_again_when_somebody_changes_it() {
        let wanted = Wanted::Key { key: key(1), rotation: None };
        assert_eq!(Annotations::default().patch(&wanted), None, "the object has not been read");
        let written = json!({PUBLIC_KEY: key(1).to_string()});
        for other in [&[][..], &[(PUBLIC_KEY, "oops")], &[(PUBLIC_KEY, &key(2).to_string())]] {
            assert_eq!(annotations(other).patch(&wanted).map(Value::Object), Some(written.clone()));
        }
        assert_eq!(annotations(&[(PUBLIC_KEY, &key(1).to_string())]).patch(&wanted), None);
    }

    #[test]
    fn without_encryption_the_own_key_is_withdrawn_and_anothers_stays() {
        let wanted = Wanted::Nothing { of: BTreeSet::from([key(1)]) };
        let ours = annotations(&[(PUBLIC_KEY, &key(1).to_string())]);
        assert_eq!(ours.patch(&wanted).map(Value::Object), Some(json!({PUBLIC_KEY: null})));
        assert_eq!(annotations(&[(PUBLIC_KEY, &key(2).to_string())]).patch(&wanted), None);
        assert_eq!(annotations(&[]).patch(&wanted), None);
    }

    #[test]
    fn what_was_said_about_a_rotation_is_read_and_nonsense_is_nothing() {
        let report = RotationReport {
            id: "one".to_owned(),
            state: RotationState::InProgress,
            public_key: key(1).to_string(),
            switched: 1,
            peers: 2,
            message: None,
        };
        let text = serde_json::to_string(&report).expect("JSON");
        for (annotation, expected) in [(text.as_str(), Some(report)), ("nonsense", None), ("", None)] {
            let node = json!({"metadata": {"name": "n", "annotations": {ROTATION: annotation}}});
            assert_eq!(read(&serde_json::from_value(node).expect("a Node")).rotation, expected);
        }
    }

    #[test]
    fn a_request_that_could_break_a_line_is_none() {
        let node = |request: &str| -> Node {
            serde_json::from_value(json!({"metadata": {"name": "n", "annotations": {ROTATE: request}}}))
                .expect("a Node")
        };
        assert_eq!(read(&node("2026-01-01T00:00:00Z")).request.as_deref(), Some("2026-01-01T00:00:00Z"));
        for bad in ["", "a\nb", "a b", &"x".repeat(254)] {
            assert_eq!(read(&node(bad)).request, None, "{bad:?}");
        }
    }
}
