//! From a record of the kernel to what a person can read.

use std::net::IpAddr;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use isthmus_bpf_abi::{Direction, DropReason, PolicyEvent, PolicyVerdict, event_flags};
use isthmus_policy::RuleOrigin;
use isthmus_wire::Labels;

use super::flow::{
    DropReasonDesc, Endpoint, EventType, Extra, Flow, FlowType, Icmp, Ip, IpVersion, Layer4, PolicyRef,
    Ports, TcpFlags, TrafficDirection, Verdict,
};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// What the agent knows about identities, addresses and rules.
pub trait Directory {
    /// Labels of an identity of any cluster, reserved or of this node's own.
    fn labels(&self, identity: u32) -> Option<Arc<Labels>>;
    /// Name of the cluster that an identity belongs to.
    fn cluster(&self, identity: u32) -> Option<Arc<str>>;
    /// The pod that has an address.
    fn pod(&self, address: IpAddr) -> Option<PodName>;
    /// The rule behind a number.
    fn rule(&self, rule: u32) -> Option<RuleOrigin>;
}

/// Namespace and name of a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodName {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// The flow that an event is about. `node` is `cluster/node`, `time` when it happened.
pub fn decorate(event: &PolicyEvent, time: DateTime<Utc>, node: &str, directory: &dyn Directory) -> Flow {
    let (source, destination) = (event.source.ip(), event.destination.ip());
    let verdict = match PolicyVerdict::from_number(event.verdict) {
        Some(PolicyVerdict::Forwarded) => Verdict::Forwarded,
        Some(PolicyVerdict::Dropped) | None => Verdict::Dropped,
    };
    let direction = match Direction::from_number(event.direction) {
        Some(Direction::Egress) => TrafficDirection::Egress,
        Some(Direction::Ingress) | None => TrafficDirection::Ingress,
    };
    let reason = DropReason::from_number(event.reason).unwrap_or(DropReason::None);
    let desc = (verdict == Verdict::Dropped).then(|| desc(reason));
    let origin = directory.rule(event.rule);
    let by: Vec<PolicyRef> = origin.iter().map(policy).collect();
    let of = |wanted: (TrafficDirection, Verdict)| {
        if (direction, verdict) == wanted { by.clone() } else { Vec::new() }
    };
    let l4 = layer4(event);
    Flow {
        time,
        verdict,
        drop_reason: desc.map(|desc| desc as u32),
        drop_reason_desc: desc,
        ip: Ip {
            source,
            destination,
            version: if source.is_ipv4() { IpVersion::IPv4 } else { IpVersion::IPv6 },
        },
        summary: summary(l4.as_ref(), event.protocol),
        l4,
        source: endpoint(event.source_identity, source, directory),
        destination: endpoint(event.destination_identity, destination, directory),
        kind: FlowType::L3_L4,
        node_name: node.to_owned(),
        is_reply: event.flags & event_flags::REPLY != 0,
        event_type: EventType { kind: if verdict == Verdict::Dropped { 1 } else { 5 } },
        traffic_direction: direction,
        egress_allowed_by: of((TrafficDirection::Egress, Verdict::Forwarded)),
        ingress_allowed_by: of((TrafficDirection::Ingress, Verdict::Forwarded)),
        egress_denied_by: of((TrafficDirection::Egress, Verdict::Dropped)),
        ingress_denied_by: of((TrafficDirection::Ingress, Verdict::Dropped)),
        isthmus: Extra {
            reason: match (verdict, &origin) {
                (Verdict::Dropped, _) => reason.words(),
                (Verdict::Forwarded, Some(_)) => "a rule allows it",
                (Verdict::Forwarded, None) => "nothing forbids it",
            }
            .to_owned(),
            rule: origin.map(|origin| origin.to_string()),
            bytes: event.len,
            interface: event.ifindex,
            icmp_error: event.flags & event_flags::RELATED != 0,
        },
    }
}

/// What there is to say about an identity at an address.
pub fn endpoint(identity: u32, address: IpAddr, directory: &dyn Directory) -> Endpoint {
    let labels = directory.labels(identity);
    let label = |key| labels.as_ref().and_then(|labels| labels.k8s(key)).unwrap_or_default().to_owned();
    let pod = directory.pod(address);
    let mut cluster = label(Labels::CLUSTER);
    if cluster.is_empty() {
        cluster = directory.cluster(identity).map(|name| name.to_string()).unwrap_or_default();
    }
    Endpoint {
        identity,
        cluster_name: cluster,
        namespace: match &pod {
            Some(pod) => pod.namespace.to_string(),
            None => label(Labels::NAMESPACE),
        },
        pod_name: pod.map(|pod| pod.name.to_string()).unwrap_or_default(),
        labels: words(labels.as_deref()),
    }
}

/// Labels as `source:key=value`, ordered by key.
pub(crate) fn words(labels: Option<&Labels>) -> Vec<String> {
    let word = |key: &str, source: &str, value: &str| match value {
        "" => format!("{source}:{key}"),
        value => format!("{source}:{key}={value}"),
    };
    labels
        .into_iter()
        .flat_map(Labels::iter)
        .map(|(key, label)| word(key, &label.source, &label.value))
        .collect()
}

fn policy(origin: &RuleOrigin) -> PolicyRef {
    PolicyRef {
        name: origin.policy.name.to_string(),
        namespace: origin.policy.namespace.as_ref().map(ToString::to_string).unwrap_or_default(),
        kind: origin.policy.kind.kind().to_owned(),
    }
}

/// Cilium's reason that comes nearest.
fn desc(reason: DropReason) -> DropReasonDesc {
    match reason {
        DropReason::Denied => DropReasonDesc::PolicyDeny,
        DropReason::Unreadable => DropReasonDesc::InvalidPacketDropped,
        DropReason::ForgedSource => DropReasonDesc::InvalidSourceIp,
        DropReason::None | DropReason::NoRule | DropReason::Waiting | DropReason::Fragment => {
            DropReasonDesc::PolicyDenied
        }
    }
}

fn layer4(event: &PolicyEvent) -> Option<Layer4> {
    let (source_port, destination_port) =
        (u16::from_be(event.source_port_be), u16::from_be(event.destination_port_be));
    let ports = |flags| Ports { source_port, destination_port, flags };
    Some(match event.protocol {
        TCP => Layer4::TCP(ports(Some(TcpFlags::from_byte(event.tcp_flags)))),
        UDP => Layer4::UDP(ports(None)),
        SCTP => Layer4::SCTP(ports(None)),
        ICMP => Layer4::ICMPv4(Icmp { kind: destination_port }),
        ICMPV6 => Layer4::ICMPv6(Icmp { kind: destination_port }),
        _ => return None,
    })
}

fn summary(l4: Option<&Layer4>, protocol: u8) -> String {
    match l4 {
        Some(Layer4::TCP(Ports { flags: Some(flags), .. })) => format!("TCP Flags: {}", flags.words()),
        Some(Layer4::ICMPv4(Icmp { kind }) | Layer4::ICMPv6(Icmp { kind })) => {
            format!("{} type {kind}", l4.map(Layer4::name).unwrap_or_default())
        }
        Some(l4) => l4.name().to_owned(),
        None => format!("IP protocol {protocol}"),
    }
}
