//! Protocols, ports and ICMP types.

use std::sync::Arc;

use serde_json::Value;

use super::fields::{Fields, describe};
use super::problem::short;
use crate::model::{IcmpFamily, PortMatch, PortSet, Transport};

/// An element of `toPorts[].ports` (Cilium).
pub(super) fn cilium(path: &str, value: &Value) -> Result<PortMatch, String> {
    let mut fields = Fields::of(path, value)?;
    let protocol = match fields.text("protocol")?.unwrap_or_default().to_ascii_uppercase().as_str() {
        "" | "ANY" => None,
        "TCP" => Some(Transport::Tcp),
        "UDP" => Some(Transport::Udp),
        "SCTP" => Some(Transport::Sctp),
        "ICMP" | "ICMPV6" => return Err("ICMP is matched with the field icmps".to_owned()),
        other => return Err(format!("protocol {:?} is not one of TCP, UDP, SCTP, ANY", short(other))),
    };
    let port = fields.get("port");
    let end = end_port(&mut fields)?;
    let ports = match port {
        None => return Err("it has no port".to_owned()),
        Some(Value::String(text)) if text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() => {
            let number = text.parse::<u16>().map_err(|_| format!("port {text} is above 65535"))?;
            range(number, end)?
        }
        Some(Value::String(_)) if end.is_some() => {
            return Err("endPort needs a port that is a number".to_owned());
        }
        Some(Value::String(text)) => PortSet::Named(port_name(text)?),
        Some(Value::Number(_)) => range(number(port, "port", 0)?, end)?,
        Some(other) => return Err(format!("{} is not a port", describe(other))),
    };
    no_more(&fields)?;
    Ok(PortMatch::Transport { protocol, ports })
}

/// An element of `ports` (Kubernetes). The protocol is TCP unless another is given.
pub(super) fn kubernetes(path: &str, value: &Value) -> Result<PortMatch, String> {
    let mut fields = Fields::of(path, value)?;
    let protocol = match fields.text("protocol")? {
        None | Some("TCP") => Transport::Tcp,
        Some("UDP") => Transport::Udp,
        Some("SCTP") => Transport::Sctp,
        Some(other) => return Err(format!("protocol {:?} is not one of TCP, UDP, SCTP", short(other))),
    };
    let port = fields.get("port");
    let end = end_port(&mut fields)?;
    let ports = match port {
        None if end.is_some() => return Err("endPort needs a port".to_owned()),
        None => PortSet::All,
        Some(Value::String(_)) if end.is_some() => {
            return Err("endPort needs a port that is a number".to_owned());
        }
        Some(Value::String(text)) => PortSet::Named(port_name(text)?),
        some => range(number(some, "port", 1)?, end)?,
    };
    no_more(&fields)?;
    Ok(PortMatch::Transport { protocol: Some(protocol), ports })
}

/// An element of `icmps[].fields`. The family is IPv4 unless another is given; the type is a number or its name.
pub(super) fn icmp(path: &str, value: &Value) -> Result<PortMatch, String> {
    let mut fields = Fields::of(path, value)?;
    let family = match fields.text("family")? {
        None | Some("" | "IPv4") => IcmpFamily::V4,
        Some("IPv6") => IcmpFamily::V6,
        Some(other) => return Err(format!("family {:?} is not one of IPv4, IPv6", short(other))),
    };
    let kind = match fields.get("type") {
        None => return Err("it has no type".to_owned()),
        Some(Value::Number(number)) => number.as_u64().and_then(|number| u8::try_from(number).ok()),
        Some(Value::String(text)) => text.parse().ok().or_else(|| named_icmp(family, text)),
        Some(_) => None,
    };
    let kind = kind.ok_or("type is neither a number from 0 to 255 nor the name of a type of its family")?;
    no_more(&fields)?;
    Ok(PortMatch::Icmp { family, kind })
}

fn no_more(fields: &Fields<'_>) -> Result<(), String> {
    match fields.unknown().next() {
        Some((name, _)) => Err(format!("there is no such field as {:?}", short(name))),
        None => Ok(()),
    }
}

/// 0 is as good as none.
fn end_port(fields: &mut Fields<'_>) -> Result<Option<u16>, String> {
    let value = fields.get("endPort");
    if value.is_none() {
        return Ok(None);
    }
    number(value, "endPort", 0).map(|end| (end != 0).then_some(end))
}

fn number(value: Option<&Value>, what: &str, least: u16) -> Result<u16, String> {
    value
        .and_then(Value::as_u64)
        .and_then(|number| u16::try_from(number).ok())
        .filter(|number| *number >= least)
        .ok_or_else(|| {
            let found = value.map_or_else(String::new, describe);
            format!("{what} {found} is not a number from {least} to 65535")
        })
}

/// Port 0 stands for every port.
fn range(first: u16, end: Option<u16>) -> Result<PortSet, String> {
    match (first, end) {
        (0, None) => Ok(PortSet::All),
        (0, Some(end)) => {
            Err(format!("port 0 is every port, and endPort {end} cannot bound it; begin at port 1"))
        }
        (first, None) => Ok(PortSet::Range(first, first)),
        (first, Some(end)) if end >= first => Ok(PortSet::Range(first, end)),
        (first, Some(end)) => Err(format!("endPort {end} is below port {first}")),
    }
}

/// IANA's rule for names of services (RFC 6335, section 5.1); case does not matter.
fn port_name(text: &str) -> Result<Arc<str>, String> {
    let name = text.to_ascii_lowercase();
    let valid = (1..=15).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && name.bytes().any(|byte| byte.is_ascii_alphabetic())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--");
    if valid {
        Ok(name.into())
    } else {
        Err(format!("{:?} is neither a port nor a port's name", short(text)))
    }
}

/// Names of types as Cilium's definition has them; numbers from IANA's registries of ICMP and ICMPv6 types.
fn named_icmp(family: IcmpFamily, name: &str) -> Option<u8> {
    Some(match (family, name) {
        (IcmpFamily::V4, name) => match name {
            "EchoReply" => 0,
            "DestinationUnreachable" => 3,
            "Redirect" => 5,
            "Echo" | "EchoRequest" => 8,
            "RouterAdvertisement" => 9,
            "RouterSelection" => 10,
            "TimeExceeded" => 11,
            "ParameterProblem" => 12,
            "Timestamp" => 13,
            "TimestampReply" => 14,
            "Photuris" => 40,
            "ExtendedEchoRequest" => 42,
            "ExtendedEchoReply" => 43,
            _ => return None,
        },
        (IcmpFamily::V6, name) => match name {
            "DestinationUnreachable" => 1,
            "PacketTooBig" => 2,
            "TimeExceeded" => 3,
            "ParameterProblem" => 4,
            "EchoRequest" => 128,
            "EchoReply" => 129,
            "MulticastListenerQuery" => 130,
            "MulticastListenerReport" => 131,
            "MulticastListenerDone" => 132,
            "RouterSolicitation" => 133,
            "RouterAdvertisement" => 134,
            "NeighborSolicitation" => 135,
            "NeighborAdvertisement" => 136,
            "RedirectMessage" => 137,
            "RouterRenumbering" => 138,
            "ICMPNodeInformationQuery" => 139,
            "ICMPNodeInformationResponse" => 140,
            "InverseNeighborDiscoverySolicitation" => 141,
            "InverseNeighborDiscoveryAdvertisement" => 142,
            "HomeAgentAddressDiscoveryRequest" => 144,
            "HomeAgentAddressDiscoveryReply" => 145,
            "MobilePrefixSolicitation" => 146,
            "MobilePrefixAdvertisement" => 147,
            "DuplicateAddressRequestCodeSuffix" => 157,
            "DuplicateAddressConfirmationCodeSuffix" => 158,
            "ExtendedEchoRequest" => 160,
            "ExtendedEchoReply" => 161,
            _ => return None,
        },
    })
}
