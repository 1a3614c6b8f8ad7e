//! What a step can do, field by field as it is written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use super::parse::{duration, some_duration};

/// Applies the objects of a file (server-side apply).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// Beside `scenario.yaml`.
    pub file: String,
    /// To which clusters.
    pub clusters: Vec<String>,
}

/// Sets annotations or labels; `null` takes one away.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Annotate {
    /// In which clusters.
    pub clusters: Vec<String>,
    /// `kind/name`.
    pub object: String,
    /// Of namespaced objects.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// What to set.
    pub set: BTreeMap<String, Option<String>>,
}

/// Scales a Deployment.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// In which clusters.
    pub clusters: Vec<String>,
    /// Its name.
    pub deployment: String,
    /// Its namespace.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// How many pods.
    pub replicas: u16,
}

/// Deletes an object.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delete {
    /// In which clusters.
    pub clusters: Vec<String>,
    /// `kind/name`.
    pub object: String,
    /// Of namespaced objects.
    #[serde(default = "default_namespace")]
    pub namespace: String,
}

/// Waits for an object.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wait {
    /// In which clusters.
    pub clusters: Vec<String>,
    /// `kind/name`.
    pub object: String,
    /// Of namespaced objects.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// For what.
    pub until: Until,
    /// How long at most.
    #[serde(default = "half_a_minute", deserialize_with = "duration")]
    pub within: Duration,
}

/// What [`Wait`] waits for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "UntilFile")]
pub enum Until {
    /// A Deployment has all its pods ready and no others; a pod is ready; anything else exists.
    Ready,
    /// It does not exist.
    Gone,
    /// It has a condition in `status.conditions`.
    Condition(ObjectCondition),
}

/// A condition of an object: `{condition: Connected, is: "False"}`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectCondition {
    /// Its type.
    pub condition: String,
    /// Its status.
    #[serde(default = "yes")]
    pub is: String,
    /// Its reason; any when left out.
    pub reason: Option<String>,
}

/// [`Until`] as it is written: a word, or a condition.
#[derive(Deserialize)]
#[serde(untagged)]
enum UntilFile {
    Word(String),
    Condition(ObjectCondition),
}

impl TryFrom<UntilFile> for Until {
    type Error = String;
    fn try_from(file: UntilFile) -> Result<Self, String> {
        match file {
            UntilFile::Word(word) => match word.as_str() {
                "ready" => Ok(Self::Ready),
                "gone" => Ok(Self::Gone),
                _ => {
                    Err(format!("until: {word:?} is nothing to wait for: ready, gone or {{condition: TYPE}}"))
                }
            },
            UntilFile::Condition(condition) => Ok(Self::Condition(condition)),
        }
    }
}

/// Where requests come from and go to: `curl` in a pod, to a Service's ClusterIP.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// `cluster/pod` or `cluster/namespace/pod`.
    pub from: PodRef,
    /// The Service, in the pod's cluster and namespace.
    pub service: String,
    /// Of the Service.
    #[serde(default = "http")]
    pub port: u16,
    /// To the ClusterIP of which family; the first one when left out.
    pub family: Option<Family>,
}

/// Sends requests one after the other.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// From where to where.
    pub target: Target,
    /// How many.
    #[serde(default = "twenty")]
    pub count: u32,
    /// Who answers: these, all of these, and no others, and no request fails. Empty: every request fails.
    pub answers: BTreeSet<String>,
    /// How many different pods answer at most: for session affinity.
    #[serde(rename = "mostPods")]
    pub most_pods: Option<usize>,
    /// Tried anew until then, where it does not hold at once.
    #[serde(default, deserialize_with = "some_duration")]
    pub within: Option<Duration>,
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// Sends requests all the time, until `endTraffic`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traffic {
    /// How later steps call it.
    pub name: String,
    /// From where to where.
    pub target: Target,
    /// Requests per second; while a change is being measured, as many as can be, one after the other.
    #[serde(default = "twenty")]
    pub rate: u32,
}

/// Ends traffic and judges it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct EndTraffic {
    /// Which.
    pub name: String,
    /// How many of its requests may have failed in all.
    #[serde(default)]
    pub failures: usize,
}

/// After a change: who answers.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shows {
    /// Which traffic shows it.
    pub traffic: String,
    /// Who answers from then on: these, all of these, and no others.
    pub answers: BTreeSet<String>,
    /// How long it may take.
    #[serde(default = "half_a_minute", deserialize_with = "duration")]
    pub within: Duration,
}

/// Watches traffic for a while, in which nothing may change and nothing may fail.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observe {
    /// Which traffic.
    pub traffic: String,
    /// How long.
    #[serde(rename = "for", deserialize_with = "duration")]
    pub time: Duration,
    /// Who answers: these, all of these, and no others.
    pub answers: BTreeSet<String>,
}

/// Runs a command in a pod.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Exec {
    /// `cluster/pod` or `cluster/namespace/pod`.
    pub pod: PodRef,
    /// Program and arguments.
    pub command: Vec<String>,
    /// What it must answer.
    #[serde(default)]
    pub exit_code: i32,
    /// What its output must contain.
    #[serde(default)]
    pub stdout: String,
    /// How long it may take.
    #[serde(default = "half_a_minute", deserialize_with = "duration")]
    pub within: Duration,
}

/// Cuts the wire between two clusters.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Partition {
    /// From this one.
    pub from: String,
    /// To this one.
    pub to: String,
    /// Leaves the way back.
    #[serde(default)]
    pub one_way: bool,
}

/// Joins everything that was cut: `heal: {}`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heal {}

/// Connects clusters, or takes them apart, as `isthmus connect` and `isthmus disconnect` do: by running them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connect {
    /// The source cluster.
    pub from: String,
    /// The destination clusters.
    pub to: Vec<String>,
    /// Who reads from whom.
    #[serde(default)]
    pub mode: ConnectionMode,
    /// How long it may take until the peers are ready, or gone.
    #[serde(default = "minute", deserialize_with = "duration")]
    pub within: Duration,
}

/// Who reads from whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionMode {
    /// The source and each destination from each other.
    #[default]
    Bidirectional,
    /// The source alone from each destination.
    Unicast,
    /// Each from each.
    Mesh,
}

impl ConnectionMode {
    /// As the command line spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bidirectional => "bidirectional",
            Self::Unicast => "unicast",
            Self::Mesh => "mesh",
        }
    }
}

/// Asks a cluster's clustermesh-apiserver how a peer is.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// Whom to ask.
    pub cluster: String,
    /// About whom.
    pub peer: String,
    /// Whether it must be connected.
    pub connected: bool,
    /// How long it may take.
    #[serde(default = "half_a_minute", deserialize_with = "duration")]
    pub within: Duration,
}

/// Taps every wire between nodes while requests cross.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capture {
    /// From where to where.
    pub target: Target,
    /// How many requests.
    #[serde(default = "twenty")]
    pub count: u32,
    /// Who answers: these, all of these, and no others, and no request fails.
    pub answers: BTreeSet<String>,
    /// Whether requests and answers can be read.
    pub plaintext: Plaintext,
    /// Tried anew until then, where it does not hold at once. What must not be read is never tried anew.
    #[serde(default, deserialize_with = "some_duration")]
    pub within: Option<Duration>,
}

/// What someone who taps the wires can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Plaintext {
    /// Requests and answers.
    Seen,
    /// Nothing: there are encrypted packets, and not one from or to a pod.
    Unseen,
}

/// A node sends through its own encryption device in another's name, which must not arrive, and in its own, which must.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forge {
    /// `cluster/node`: who sends.
    pub node: NodeRef,
    /// In whose name.
    #[serde(rename = "as")]
    pub source: PodRef,
    /// To whom.
    pub to: PodRef,
    /// How many packets in another's name.
    #[serde(default = "twenty")]
    pub count: u32,
    /// How long it may take until a packet in its own name arrives.
    #[serde(default = "half_a_minute", deserialize_with = "duration")]
    pub within: Duration,
}

/// Gives a node another WireGuard key, as `isthmus rotate-key` does, and waits until all peers use it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotateKey {
    /// `cluster/node`.
    pub node: NodeRef,
    /// How long it may take.
    #[serde(default = "half_a_minute", deserialize_with = "duration")]
    pub within: Duration,
}

/// A node: `cluster/node`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct NodeRef {
    /// Its cluster.
    pub cluster: String,
    /// Its name.
    pub name: String,
}

impl TryFrom<String> for NodeRef {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once('/') {
            Some((cluster, name)) if !cluster.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { cluster: cluster.into(), name: name.into() })
            }
            _ => Err(format!("{text:?} is no node: write CLUSTER/NODE, like alpha/alpha-node1")),
        }
    }
}

impl fmt::Display for NodeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.name)
    }
}

/// A pod: `cluster/pod` or `cluster/namespace/pod`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PodRef {
    /// Its cluster.
    pub cluster: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl FromStr for PodRef {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        let (cluster, namespace, name) = match parts.as_slice() {
            [cluster, name] => (*cluster, "default", *name),
            [cluster, namespace, name] => (*cluster, *namespace, *name),
            _ => ("", "", ""),
        };
        // They become parts of paths.
        let sound = |part: &str| {
            let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
            !part.is_empty() && part.chars().all(allowed) && !part.starts_with('.')
        };
        if ![cluster, namespace, name].into_iter().all(sound) {
            return Err(format!("{text:?} is no pod: write CLUSTER/POD or CLUSTER/NAMESPACE/POD"));
        }
        Ok(Self { cluster: cluster.into(), namespace: namespace.into(), name: name.into() })
    }
}

impl TryFrom<String> for PodRef {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "default" => write!(f, "{}/{}", self.cluster, self.name),
            namespace => write!(f, "{}/{namespace}/{}", self.cluster, self.name),
        }
    }
}

fn yes() -> String {
    "True".into()
}

fn default_namespace() -> String {
    "default".into()
}

fn half_a_minute() -> Duration {
    Duration::from_secs(30)
}

fn minute() -> Duration {
    Duration::from_secs(60)
}

fn http() -> u16 {
    80
}

fn twenty() -> u32 {
    20
}
