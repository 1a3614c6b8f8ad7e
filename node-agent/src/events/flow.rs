//! A verdict in JSON. The names and the shape are those of Hubble's `GetFlowsResponse`, so that what reads the one reads the
//! other; what Hubble has no field for is under `isthmus`.

use std::net::IpAddr;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// One line of `GET /v1/events`: a flow, or that some were lost.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Line {
    /// What became of a packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow: Option<Box<Flow>>,
    /// Some that would have come here did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_events: Option<LostEvents>,
    /// `cluster/node`.
    pub node_name: String,
    /// When.
    pub time: DateTime<Utc>,
}

/// Events that were lost.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LostEvents {
    /// Where.
    pub source: LostEventSource,
    /// How many, since the last time that some were.
    pub num_events_lost: u64,
}

/// Where events can be lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum LostEventSource {
    /// Between the kernel and the agent: the agent did not read in time.
    PerfEventRingBuffer,
    /// Between the agent and this listener, who did not read in time.
    HubbleRingBuffer,
    /// In the kernel, which tells of no more verdicts per second than it was asked to.
    RateLimit,
}

/// What became of a packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Flow {
    /// When.
    pub time: DateTime<Utc>,
    /// What became of it.
    pub verdict: Verdict,
    /// Cilium's number for the reason; left out if it was not dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_reason: Option<u32>,
    /// Cilium's name for the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_reason_desc: Option<DropReasonDesc>,
    /// Addresses.
    #[serde(rename = "IP")]
    pub ip: Ip,
    /// Ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l4: Option<Layer4>,
    /// Who has sent it.
    pub source: Endpoint,
    /// Whom it is for, after service translation.
    pub destination: Endpoint,
    /// Always `L3_L4`.
    #[serde(rename = "Type")]
    pub kind: FlowType,
    /// `cluster/node`.
    pub node_name: String,
    /// It goes the other way than the packet that began the flow.
    pub is_reply: bool,
    /// What told of it.
    pub event_type: EventType,
    /// Which of the endpoint's policies was asked.
    pub traffic_direction: TrafficDirection,
    /// In short.
    #[serde(rename = "Summary")]
    pub summary: String,
    /// The rule that has let it out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress_allowed_by: Vec<PolicyRef>,
    /// The rule that has let it in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ingress_allowed_by: Vec<PolicyRef>,
    /// The rule that has not let it out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress_denied_by: Vec<PolicyRef>,
    /// The rule that has not let it in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ingress_denied_by: Vec<PolicyRef>,
    /// What Hubble has no field for.
    pub isthmus: Extra,
}

/// What became of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Verdict {
    /// It went on.
    Forwarded,
    /// It did not.
    Dropped,
}

/// Cilium's names for reasons, as far as they are used here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum DropReasonDesc {
    /// No rule allows it.
    PolicyDenied = 133,
    /// A rule denies it.
    PolicyDeny = 181,
    /// Not to be read.
    InvalidPacketDropped = 134,
    /// Sent from somebody else's address.
    InvalidSourceIp = 132,
}

/// Which sort of flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[allow(non_camel_case_types, reason = "as Hubble spells it")]
pub enum FlowType {
    /// Of addresses and ports.
    L3_L4,
}

/// Addresses.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ip {
    /// Of the sender.
    pub source: IpAddr,
    /// Of the receiver.
    pub destination: IpAddr,
    /// `IPv4` or `IPv6`.
    #[serde(rename = "ipVersion")]
    pub version: IpVersion,
}

/// Family of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum IpVersion {
    /// 4
    IPv4,
    /// 6
    IPv6,
}

/// What is above IP.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Layer4 {
    /// 6
    TCP(Ports),
    /// 17
    UDP(Ports),
    /// 132
    SCTP(Ports),
    /// 1
    ICMPv4(Icmp),
    /// 58
    ICMPv6(Icmp),
}

/// Ports.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ports {
    /// Of the sender.
    pub source_port: u16,
    /// Of the receiver.
    pub destination_port: u16,
    /// Of TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flags: Option<TcpFlags>,
}

/// Flags of TCP; what is not set is left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE", default)]
#[allow(missing_docs, reason = "as in TCP")]
pub struct TcpFlags {
    #[serde(skip_serializing_if = "is_false")]
    pub fin: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub syn: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub rst: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub psh: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub ack: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub urg: bool,
}

/// A message of ICMP.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Icmp {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: u16,
}

/// One side of a flow.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its numeric identity.
    pub identity: u32,
    /// Its cluster.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cluster_name: String,
    /// Its namespace.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// `source:key=value`, ordered by key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// The pod, where it is known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod_name: String,
}

/// What told of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EventType {
    /// 1 is a drop, 5 a verdict of a policy.
    #[serde(rename = "type")]
    pub kind: i32,
}

/// Which way, seen from the endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TrafficDirection {
    /// To it.
    Ingress,
    /// From it.
    Egress,
}

/// A policy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PolicyRef {
    /// Its name.
    pub name: String,
    /// Its namespace; empty for one of the whole cluster.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Its kind.
    pub kind: String,
}

/// What Hubble has no field for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Extra {
    /// Why, in words.
    pub reason: String,
    /// The rule that has decided: `CiliumNetworkPolicy app/allow-web ingress[0]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Bytes of the packet, with its Ethernet header.
    pub bytes: u32,
    /// Interface of the endpoint.
    pub interface: u32,
    /// It is an ICMP error, and addresses and ports are those of the packet that it is about.
    #[serde(default, skip_serializing_if = "is_false")]
    pub icmp_error: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl Layer4 {
    /// Its name, as the filters have it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::TCP(_) => "TCP",
            Self::UDP(_) => "UDP",
            Self::SCTP(_) => "SCTP",
            Self::ICMPv4(_) => "ICMPv4",
            Self::ICMPv6(_) => "ICMPv6",
        }
    }

    /// Source and destination port, if it has any.
    pub fn ports(&self) -> Option<(u16, u16)> {
        match self {
            Self::TCP(ports) | Self::UDP(ports) | Self::SCTP(ports) => {
                Some((ports.source_port, ports.destination_port))
            }
            Self::ICMPv4(_) | Self::ICMPv6(_) => None,
        }
    }
}

impl TcpFlags {
    /// From the byte in the header.
    pub fn from_byte(byte: u8) -> Self {
        let bit = |bit: u8| byte & (1 << bit) != 0;
        Self { fin: bit(0), syn: bit(1), rst: bit(2), psh: bit(3), ack: bit(4), urg: bit(5) }
    }

    /// Those that are set: `SYN, ACK`.
    pub fn words(&self) -> String {
        let all = [
            (self.syn, "SYN"),
            (self.fin, "FIN"),
            (self.rst, "RST"),
            (self.psh, "PSH"),
            (self.ack, "ACK"),
            (self.urg, "URG"),
        ];
        all.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    }
}
