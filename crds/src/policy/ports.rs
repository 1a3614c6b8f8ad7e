//! Protocols, ports and ICMP types in a policy.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::Unknown;

/// Ports, any of which is meant.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PortRule {
    /// Ports with their protocols.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 40))]
    pub ports: Option<Vec<PortProtocol>>,
    /// What this version does not know.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A port, or a range of ports, of a protocol.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PortProtocol {
    /// The port's number, 0 for all of them, or its name as the receiving pod has it.
    #[schemars(
        length(min = 1, max = 15),
        regex(pattern = r"^([0-9]{1,5}|[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)$")
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// The last port of a range that begins with port. Has no effect beside a name.
    #[schemars(range(min = 0, max = 65535))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_port: Option<i32>,
    /// The protocol; ANY, or none, stands for TCP, UDP and SCTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// What this version does not know.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A protocol. Cilium's definition has all of these here; ICMP is matched with icmps, VRRP and IGMP are not supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
    /// Not supported here.
    Icmp,
    /// Not supported here.
    #[serde(rename = "ICMPv6")]
    Icmpv6,
    /// Not supported.
    Vrrp,
    /// Not supported.
    Igmp,
    /// TCP, UDP and SCTP.
    Any,
}

/// Types of ICMP messages, any of which is meant.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct IcmpRule {
    /// The types.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 40))]
    pub fields: Option<Vec<IcmpField>>,
    /// What this version does not know.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A type of ICMP message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct IcmpField {
    /// Of which ICMP; IPv4 if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<IcmpFamily>,
    /// The type: its number, 0 to 255, or its name, such as EchoRequest.
    #[serde(rename = "type")]
    pub kind: IcmpType,
}

/// Which ICMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum IcmpFamily {
    /// ICMP
    IPv4,
    /// ICMPv6
    IPv6,
}

/// A type of ICMP message, by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum IcmpType {
    /// By number.
    Number(u8),
    /// By name, or by its number as text.
    Name(String),
}

impl JsonSchema for IcmpType {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "IcmpType".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // The form that the API server demands of a field that is a number or a text.
        json_schema!({ "x-kubernetes-int-or-string": true })
    }
}
