//! A pod's address: `cilium/state/ip/v1/default/<ip or prefix>`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::node::{decode_mask, encode_mask};
use super::{MAX_OBJECT_BYTES, Protocol, json_value};
use crate::NumericIdentity;
use crate::gojson::{NetIp, go_object};

/// An address, or a prefix. Displays as it stands in keys: `10.244.0.77`, `10.244.0.0/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpEntry {
    /// A single address, without a mask.
    Host(IpAddr),
    /// A prefix, the whole address included.
    Prefix(IpNet),
}

impl IpEntry {
    /// The prefix it covers; all bits for a single address.
    pub fn net(self) -> IpNet {
        match self {
            Self::Host(ip) => ip.into(),
            Self::Prefix(net) => net,
        }
    }
}

impl fmt::Display for IpEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(ip) => fmt::Display::fmt(ip, f),
            Self::Prefix(net) => fmt::Display::fmt(net, f),
        }
    }
}

/// A text that is no address or prefix in canonical form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an address or prefix in canonical form")]
pub struct InvalidIpEntry;

impl FromStr for IpEntry {
    type Err = InvalidIpEntry;

    fn from_str(text: &str) -> Result<Self, InvalidIpEntry> {
        let entry = if text.contains('/') {
            Self::Prefix(text.parse().map_err(|_| InvalidIpEntry)?)
        } else {
            Self::Host(text.parse().map_err(|_| InvalidIpEntry)?)
        };
        let ip = entry.net().addr();
        // An IPv4 address in IPv6 form is written as IPv4.
        if ip != ip.to_canonical() || entry.to_string() != text { Err(InvalidIpEntry) } else { Ok(entry) }
    }
}

/// Which identity an address has, and on which node it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpIdentityPair {
    /// The address or prefix.
    pub entry: IpEntry,
    /// Address of the node, which is also the tunnel's endpoint; none if unknown.
    pub host_ip: Option<IpAddr>,
    /// The identity.
    pub id: NumericIdentity,
    /// 0: not encrypted, 1 to 15: IPsec, 255: WireGuard.
    pub key: u8,
    /// Free text, empty in practice.
    pub metadata: String,
    /// Namespace of the pod, if it is one.
    pub namespace: String,
    /// Name of the pod, if it is one.
    pub pod_name: String,
    /// Service account of the pod, if it is one.
    pub service_account: String,
    /// The pod's named ports; only in Cilium's kvstore mode.
    pub named_ports: Vec<NamedPort>,
}

json_value!(IpIdentityPair, MAX_OBJECT_BYTES);

impl IpIdentityPair {
    /// An address with an identity, nothing else known.
    pub fn new(ip: IpAddr, id: NumericIdentity) -> Self {
        Self {
            entry: IpEntry::Host(ip),
            host_ip: None,
            id,
            key: 0,
            metadata: String::new(),
            namespace: String::new(),
            pod_name: String::new(),
            service_account: String::new(),
            named_ports: Vec::new(),
        }
    }
}

go_object! {
    /// A port of a pod that has a name.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct NamedPort {
        /// Its name.
        pub name: String = "Name" always,
        /// Its number.
        pub port: u16 = "Port" always,
        /// Its protocol.
        pub protocol: Protocol = "Protocol" required,
    }
}

go_object! {
    struct Wire {
        ip: Option<IpAddr> = "IP" always as NetIp,
        mask: Option<String> = "Mask" always,
        host_ip: Option<IpAddr> = "HostIP" always as NetIp,
        id: NumericIdentity = "ID" always,
        key: u8 = "Key" always,
        metadata: String = "Metadata" always,
        namespace: String = "K8sNamespace" omitempty,
        pod_name: String = "K8sPodName" omitempty,
        service_account: String = "K8sServiceAccount" omitempty,
        named_ports: Vec<NamedPort> = "NamedPorts" omitempty,
    }
}

impl Serialize for IpIdentityPair {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mask = match self.entry {
            IpEntry::Host(_) => None,
            IpEntry::Prefix(net) => Some(encode_mask(net)),
        };
        Wire {
            ip: Some(self.entry.net().addr()),
            mask,
            host_ip: self.host_ip,
            id: self.id,
            key: self.key,
            metadata: self.metadata.clone(),
            namespace: self.namespace.clone(),
            pod_name: self.pod_name.clone(),
            service_account: self.service_account.clone(),
            named_ports: self.named_ports.clone(),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for IpIdentityPair {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        let ip = wire.ip.ok_or_else(|| D::Error::missing_field("IP"))?;
        let entry = match wire.mask.as_deref() {
            None | Some("") => IpEntry::Host(ip),
            Some(mask) => {
                let net = decode_mask(ip, mask);
                IpEntry::Prefix(net.map_err(|problem| D::Error::custom(format_args!("Mask: {problem}")))?)
            }
        };
        Ok(Self {
            entry,
            host_ip: wire.host_ip,
            id: wire.id,
            key: wire.key,
            metadata: wire.metadata,
            namespace: wire.namespace,
            pod_name: wire.pod_name,
            service_account: wire.service_account,
            named_ports: wire.named_ports,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_has_a_mask_and_a_host_has_none() {
        let host = IpIdentityPair::decode(
            br#"{"IP":"10.0.0.1","Mask":null,"HostIP":"","ID":9,"Key":0,"Metadata":""}"#,
        )
        .expect("valid");
        assert_eq!(host.entry.to_string(), "10.0.0.1");
        assert_eq!(host.host_ip, None);
        let text =
            br#"{"IP":"10.0.0.1","Mask":"////AA==","HostIP":"fd00::1","ID":9,"Key":255,"Metadata":""}"#;
        let prefix = IpIdentityPair::decode(text).expect("valid");
        assert_eq!(prefix.entry.to_string(), "10.0.0.1/24");
        assert_eq!(prefix.encode().as_ref(), text);
    }

    #[test]
    fn an_entry_without_address_or_with_a_bad_one_is_refused() {
        for text in [
            r#"{"ID":9}"#,
            r#"{"IP":"","ID":9}"#,
            r#"{"IP":"10.0.0.256","ID":9}"#,
            r#"{"IP":"10.0.0.1","ID":-9}"#,
            r#"{"IP":"10.0.0.1","Key":256}"#,
            r#"{"IP":"10.0.0.1","Mask":"AA"}"#,
        ] {
            assert!(IpIdentityPair::decode(text.as_bytes()).is_err(), "{text}");
        }
    }
}
