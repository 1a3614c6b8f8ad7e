//! Which policy decides about a packet, and why, without sending one: `GET /v1/explain`.
//!
//! Each agent answers for the pods of its own node: for what one sends if it is the source, for what one receives if it is
//! the destination. Asking all agents gives the whole answer. What is asked is the engine that fills the maps.

mod known;
mod question;

use std::net::IpAddr;
use std::sync::Arc;

use isthmus_policy::resolve::{Explanation, Question};
use isthmus_policy::{Direction, Effect, EndpointId, Engine, NamedPorts, PolicyName, RuleOrigin};
use isthmus_wire::{Labels, NumericIdentity};
use serde::{Deserialize, Serialize};

pub use self::known::Known;
pub use self::question::{Asked, AskedError, Port, Target};
use crate::events::Directory;
use crate::mesh::reserved;
use crate::policy::{EndpointState, Standing};

/// What the agent knows, as far as it is asked about.
pub trait Knowledge: Directory {
    /// Name of the own cluster.
    fn own_cluster(&self) -> &str;
    /// The engine that fills the maps.
    fn engine(&self) -> &Engine;
    /// Whether a part of a policy is not enforced as written.
    fn has_problems(&self, policy: &PolicyName) -> bool;
    /// Pods of this node with an address of their own.
    fn local_pods(&self) -> Vec<LocalPod>;
    /// The identity that the programs take an address for.
    fn identity_at(&self, address: IpAddr) -> u32;
    /// The Service of the own cluster with an address, and the addresses behind it, also those in other clusters.
    fn service_at(&self, address: IpAddr) -> Option<Behind>;
    /// An identity that has all of these labels (a key with any source, or with one); the lowest, if there are several.
    fn identity_with(&self, labels: &[(String, String)]) -> Option<u32>;
}

/// A pod of this node.
#[derive(Clone, Debug)]
pub struct LocalPod {
    /// What the engine calls it; none if it has not been told of it.
    pub id: Option<EndpointId>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its identity; 0 while it is not known.
    pub identity: u32,
    /// The ports of its containers that have names.
    pub named_ports: NamedPorts,
    /// What stands between its policies and its packets.
    pub standing: Standing,
}

/// An agent's answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// `cluster/node` of the agent.
    pub node: String,
    /// Whom it takes the source for; none if it knows no such thing.
    pub source: Option<Party>,
    /// Whom it takes the destination for.
    pub destination: Option<Party>,
    /// Protocol and port. Of a port by name only the destination's agent knows.
    pub port: Option<AnsweredPort>,
    /// What the source's policies say, if it is a pod of this node.
    pub egress: Option<Side>,
    /// What the destination's policies say, if it is a pod of this node.
    pub ingress: Option<Side>,
}

/// One end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Party {
    /// It is a pod of the agent's node.
    pub local: bool,
    /// Its numeric identity.
    pub identity: u32,
    /// Its labels, as `source:key=value`.
    pub labels: Vec<String>,
    /// `cluster/namespace/name`, if it is a pod whose name the agent knows.
    pub pod: Option<String>,
    /// Its addresses, as far as they are known.
    pub addresses: Vec<IpAddr>,
    /// It is no pod at all but a Service, whose address is translated before policies are asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Behind>,
}

/// A Service, and what is behind it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Behind {
    /// `namespace/name`.
    pub service: String,
    /// Addresses of its backends.
    pub backends: Vec<IpAddr>,
}

/// Protocol and port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AnsweredPort {
    /// IP protocol number.
    pub protocol: u8,
    /// Port, or type of the ICMP message.
    pub port: u16,
}

/// What one end's policies say.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Side {
    /// It passes.
    pub allowed: bool,
    /// Whether anything restricts the pod in this direction.
    pub enforced: bool,
    /// Why, in words.
    pub reason: String,
    /// The rule that decides, if one does.
    pub rule: Option<String>,
    /// How far the pod's policy is. As an earlier run left it: what is said here is what will be in force.
    #[serde(default)]
    pub state: EndpointState,
    /// What else to know about the answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Every rule that is about such a packet, those that deny first.
    pub matching: Vec<String>,
    /// Policies that deny by default.
    pub default_deny_by: Vec<String>,
}

/// Answers as far as this node can.
pub fn explain(node: &str, asked: &Asked, known: &dyn Knowledge) -> Answer {
    let pods = known.local_pods();
    let (source, source_pod) = party(&asked.source, known, &pods);
    let (destination, destination_pod) = party(&asked.destination, known, &pods);
    let port = answered_port(&asked.port, destination_pod);
    let side = |pod: Option<&LocalPod>, peer: &Option<Party>, direction| {
        let (pod, peer, port) = (pod?, peer.as_ref()?, port?);
        Some(side(known, pod, direction, peer.identity, port))
    };
    Answer {
        node: node.to_owned(),
        egress: side(source_pod, &destination, Direction::Egress),
        ingress: side(destination_pod, &source, Direction::Ingress),
        source,
        destination,
        port,
    }
}

fn side(known: &dyn Knowledge, pod: &LocalPod, direction: Direction, peer: u32, port: AnsweredPort) -> Side {
    let question = |endpoint| Question {
        endpoint,
        direction,
        peer: NumericIdentity(peer),
        protocol: port.protocol,
        port: port.port,
    };
    let explained = pod.id.and_then(|id| known.engine().explain(&question(id)));
    let from_host = direction == Direction::Ingress && peer == reserved::HOST;
    let mut side = match explained {
        Some(explained) => written(known, explained),
        None if from_host => nothing_known(true, "a node always reaches its own pods"),
        None => nothing_known(false, "the pod's rules are not known yet: until they are, nothing passes"),
    };
    stand(&mut side, &pod.standing, direction, from_host);
    side
}

/// What the policies say, whatever stands in their way.
fn written(known: &dyn Knowledge, explained: Explanation) -> Side {
    let words = |origins: &[RuleOrigin]| origins.iter().map(ToString::to_string).collect();
    let decide: Vec<&PolicyName> = match &explained.origin {
        Some(origin) => vec![&origin.policy],
        None if explained.effect == Effect::Deny => explained.default_deny_by.iter().collect(),
        None => Vec::new(),
    };
    let partly = decide.into_iter().filter(|policy| known.has_problems(policy));
    Side {
        allowed: explained.effect == Effect::Allow,
        enforced: explained.enforced,
        reason: match (&explained.origin, explained.effect) {
            (None, _) => explained.reason.to_owned(),
            (Some(_), Effect::Allow) => "a rule allows it".to_owned(),
            (Some(_), Effect::Deny) => "a rule denies it".to_owned(),
        },
        rule: explained.origin.as_ref().map(ToString::to_string),
        state: EndpointState::InForce,
        notes: partly
            .map(|policy| format!("{policy} is not enforced as written: `kubectl describe` it to see why"))
            .collect(),
        matching: words(&explained.matching),
        default_deny_by: explained.default_deny_by.iter().map(ToString::to_string).collect(),
    }
}

fn nothing_known(allowed: bool, reason: &str) -> Side {
    Side {
        allowed,
        enforced: true,
        reason: reason.to_owned(),
        rule: None,
        state: EndpointState::InForce,
        notes: Vec::new(),
        matching: Vec::new(),
        default_deny_by: Vec::new(),
    }
}

/// Makes of what the policies say what becomes of the packet now.
fn stand(side: &mut Side, standing: &Standing, direction: Direction, from_host: bool) {
    let (state, denied) = match standing {
        Standing::InForce => (EndpointState::InForce, None),
        Standing::AsPinned => {
            side.notes.push(
                "this is what will be in force: until the mesh has been read, the rules of an earlier run of the agent \
                 decide"
                    .to_owned(),
            );
            (EndpointState::AsPinned, None)
        }
        Standing::Waiting => {
            let reason = "the pod is new and held back until its rules are known: for now, nothing passes";
            (EndpointState::Waiting, Some(reason.to_owned()))
        }
        Standing::Closed { directions, reason } => {
            let here = match direction {
                Direction::Ingress => directions.ingress,
                Direction::Egress => directions.egress,
            };
            (EndpointState::Closed, here.then(|| format!("the pod is closed: {reason}")))
        }
    };
    side.state = state;
    if let Some(reason) = denied.filter(|_| !from_host) {
        if let Some(rule) = side.rule.take() {
            side.notes.push(format!("once its policy is in force, {rule} decides"));
        }
        (side.allowed, side.enforced, side.reason) = (false, true, reason);
    }
}

/// Whom a target is, and the pod of this node if it is one.
fn party<'a>(
    target: &Target,
    known: &dyn Knowledge,
    pods: &'a [LocalPod],
) -> (Option<Party>, Option<&'a LocalPod>) {
    let local = match target {
        Target::Pod { cluster, namespace, name } if cluster == known.own_cluster() => {
            pods.iter().find(|pod| *pod.namespace == **namespace && *pod.name == **name)
        }
        Target::Pod { .. } | Target::Identity(_) => None,
        Target::Address(address) => pods.iter().find(|pod| pod.addresses.contains(address)),
        Target::Labels(wanted) => pods
            .iter()
            .filter(|pod| known.labels(pod.identity).is_some_and(|labels| has_all(&labels, wanted)))
            .min_by_key(|pod| (pod.namespace.clone(), pod.name.clone())),
    };
    if let Some(pod) = local {
        let party = Party {
            local: true,
            identity: pod.identity,
            labels: words(known, pod.identity),
            pod: Some(format!("{}/{}/{}", known.own_cluster(), pod.namespace, pod.name)),
            addresses: pod.addresses.clone(),
            service: None,
        };
        return (Some(party), Some(pod));
    }
    let (identity, address) = match target {
        Target::Pod { .. } => return (None, None),
        Target::Identity(identity) => (Some(*identity), None),
        Target::Address(address) => (Some(known.identity_at(*address)), Some(*address)),
        Target::Labels(wanted) => (known.identity_with(wanted), None),
    };
    let party = identity.map(|identity| Party {
        local: false,
        identity,
        labels: words(known, identity),
        pod: address.and_then(|address| known.pod(address)).map(|pod| {
            let cluster = known.cluster(identity);
            format!("{}/{}/{}", cluster.as_deref().unwrap_or_default(), pod.namespace, pod.name)
        }),
        addresses: address.into_iter().collect(),
        service: address.and_then(|address| known.service_at(address)),
    });
    (party, None)
}

fn words(known: &dyn Knowledge, identity: u32) -> Vec<String> {
    crate::events::decorate::words(known.labels(identity).as_deref())
}

/// Whether a label set has all of these; a key may have a source before it.
pub fn has_all(labels: &Labels, wanted: &[(String, String)]) -> bool {
    wanted.iter().all(|(key, value)| {
        let (source, key) =
            key.split_once(':').map_or((None, key.as_str()), |(source, key)| (Some(source), key));
        labels.get(key).is_some_and(|label| {
            label.value == *value && source.is_none_or(|source| source == "any" || source == label.source)
        })
    })
}

fn answered_port(port: &Port, destination: Option<&LocalPod>) -> Option<AnsweredPort> {
    match port {
        Port::Number { protocol, port } => Some(AnsweredPort { protocol: *protocol, port: *port }),
        Port::Named { name, protocol } => {
            let mut called = destination?.named_ports.called(name, *protocol);
            called.next().map(|(protocol, port)| AnsweredPort { protocol: protocol.number(), port })
        }
    }
}

#[cfg(test)]
mod tests;
