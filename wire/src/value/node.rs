//! A node: `cilium/state/nodes/v1/<cluster>/<node>`.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{MAX_OBJECT_BYTES, json_value};
use crate::gojson::{ByName, NetIp, NullIfEmpty, Nullable, go_object};
use crate::{ClusterId, ClusterName, ObjectName};

go_object! {
    /// A node of a cluster: its addresses, pod ranges and keys.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct Node {
        /// Name of the node.
        pub name: ObjectName = "Name" required,
        /// Cluster it belongs to.
        pub cluster: ClusterName = "Cluster" required,
        /// All its addresses.
        pub addresses: Vec<NodeAddress> = "IPAddresses" always as NullIfEmpty,
        /// Range of its pods' IPv4 addresses; none where addresses are not handed out per node.
        pub ipv4_pod_cidr: Option<PodCidr> = "IPv4AllocCIDR" always,
        /// More IPv4 ranges.
        pub ipv4_secondary_pod_cidrs: Vec<PodCidr> = "IPv4SecondaryAllocCIDRs" always as NullIfEmpty,
        /// Range of its pods' IPv6 addresses.
        pub ipv6_pod_cidr: Option<PodCidr> = "IPv6AllocCIDR" always,
        /// More IPv6 ranges.
        pub ipv6_secondary_pod_cidrs: Vec<PodCidr> = "IPv6SecondaryAllocCIDRs" always as NullIfEmpty,
        /// Address of its health endpoint.
        pub ipv4_health_ip: Option<IpAddr> = "IPv4HealthIP" always as NetIp,
        /// Address of its health endpoint.
        pub ipv6_health_ip: Option<IpAddr> = "IPv6HealthIP" always as NetIp,
        /// Address of its ingress endpoint.
        pub ipv4_ingress_ip: Option<IpAddr> = "IPv4IngressIP" always as NetIp,
        /// Address of its ingress endpoint.
        pub ipv6_ingress_ip: Option<IpAddr> = "IPv6IngressIP" always as NetIp,
        /// Id of its cluster.
        pub cluster_id: ClusterId = "ClusterID" required,
        /// Where the exporter had it from: `custom-resource`, or empty.
        pub source: String = "Source" always,
        /// 0: not encrypted, 1 to 15: IPsec, 255: WireGuard.
        pub encryption_key: u8 = "EncryptionKey" always,
        /// Labels of the Kubernetes node.
        pub labels: Option<BTreeMap<String, String>> = "Labels" always as Nullable<ByName>,
        /// Annotations of the Kubernetes node.
        pub annotations: Option<BTreeMap<String, String>> = "Annotations" always as Nullable<ByName>,
        /// Written up to Cilium 1.19, always 0 there; gone since. Readers of 1.20 ignore it.
        pub node_identity: u32 = "NodeIdentity" always,
        /// WireGuard public key, in base64; empty without encryption.
        pub wireguard_public_key: String = "WireguardPubKey" always,
        /// The kernel's boot id; empty if unknown.
        pub boot_id: String = "BootID" always,
    }
}

json_value!(Node, MAX_OBJECT_BYTES);

impl Node {
    /// A node of which nothing is known but its name.
    pub fn new(cluster: ClusterName, cluster_id: ClusterId, name: ObjectName) -> Self {
        Self {
            name,
            cluster,
            addresses: Vec::new(),
            ipv4_pod_cidr: None,
            ipv4_secondary_pod_cidrs: Vec::new(),
            ipv6_pod_cidr: None,
            ipv6_secondary_pod_cidrs: Vec::new(),
            ipv4_health_ip: None,
            ipv6_health_ip: None,
            ipv4_ingress_ip: None,
            ipv6_ingress_ip: None,
            cluster_id,
            source: "custom-resource".to_owned(),
            encryption_key: 0,
            labels: None,
            annotations: None,
            node_identity: 0,
            wireguard_public_key: String::new(),
            boot_id: String::new(),
        }
    }

    /// All ranges of its pods' addresses.
    pub fn pod_cidrs(&self) -> impl Iterator<Item = IpNet> {
        self.ipv4_pod_cidr
            .iter()
            .chain(&self.ipv4_secondary_pod_cidrs)
            .chain(&self.ipv6_pod_cidr)
            .chain(&self.ipv6_secondary_pod_cidrs)
            .map(|cidr| cidr.0)
    }

    /// The address other nodes reach it at: its first internal one of the wanted family, else its first external one.
    pub fn node_ip(&self, ipv6: bool) -> Option<IpAddr> {
        let of = |kind| {
            self.addresses
                .iter()
                .filter(move |address| address.kind == kind)
                .filter_map(NodeAddress::ip)
                .find(|ip| ip.is_ipv6() == ipv6)
        };
        of(AddressKind::InternalIp).or_else(|| of(AddressKind::ExternalIp))
    }
}

go_object! {
    /// One address of a node.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct NodeAddress {
        /// What kind of address it is.
        pub kind: AddressKind = "Type" required,
        /// The address. Text, for the kinds that are names hold names; [`NodeAddress::ip`] reads the others.
        pub address: String = "IP" always,
    }
}

impl NodeAddress {
    /// An address of that kind.
    pub fn new(kind: AddressKind, ip: IpAddr) -> Self {
        Self { kind, address: ip.to_canonical().to_string() }
    }

    /// The IP address; none for the kinds that are names, and for a link-local one of Cilium's own device (its option
    /// `local-router-ipv4`): all nodes may have the same, and it means nothing outside of them.
    pub fn ip(&self) -> Option<IpAddr> {
        let ip = self.address.parse::<IpAddr>().ok()?.to_canonical();
        let link_local = match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        (self.kind != AddressKind::CiliumInternalIp || !link_local).then_some(ip)
    }
}

/// Kinds of node addresses.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressKind {
    /// Reachable within the cluster's network.
    InternalIp,
    /// Reachable from outside.
    ExternalIp,
    /// The address of Cilium's own device on the node.
    CiliumInternalIp,
    /// A host name.
    Hostname,
    /// A DNS name within the cluster's network.
    InternalDns,
    /// A DNS name from outside.
    ExternalDns,
    /// One that this version does not know.
    Other(String),
}

impl AddressKind {
    const KNOWN: [(Self, &'static str); 6] = [
        (Self::InternalIp, "InternalIP"),
        (Self::ExternalIp, "ExternalIP"),
        (Self::CiliumInternalIp, "CiliumInternalIP"),
        (Self::Hostname, "Hostname"),
        (Self::InternalDns, "InternalDNS"),
        (Self::ExternalDns, "ExternalDNS"),
    ];

    /// As in JSON and as in Kubernetes.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Other(other) => other,
            known => Self::KNOWN.iter().find(|(kind, _)| kind == known).map_or("", |(_, text)| text),
        }
    }
}

impl From<&str> for AddressKind {
    fn from(text: &str) -> Self {
        let known = Self::KNOWN.into_iter().find(|(_, known)| *known == text);
        known.map_or_else(|| Self::Other(text.to_owned()), |(kind, _)| kind)
    }
}

impl Serialize for AddressKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for AddressKind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(String::deserialize(deserializer)?.as_str().into())
    }
}

/// A range of pod addresses: Go's `net.IPNet`, `{"IP":"10.244.0.0","Mask":"////AA=="}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodCidr(pub IpNet);

impl fmt::Display for PodCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

go_object! {
    struct IpMask {
        ip: Option<IpAddr> = "IP" always as NetIp,
        mask: String = "Mask" always,
    }
}

impl Serialize for PodCidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        IpMask { ip: Some(self.0.addr()), mask: encode_mask(self.0) }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PodCidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let IpMask { ip, mask } = IpMask::deserialize(deserializer)?;
        let ip = ip.ok_or_else(|| D::Error::missing_field("IP"))?;
        decode_mask(ip, &mask).map(Self).map_err(D::Error::custom)
    }
}

/// The bytes of a prefix' mask in base64: `////AA==` for an IPv4 /24.
pub(super) fn encode_mask(net: IpNet) -> String {
    match net.netmask() {
        IpAddr::V4(mask) => STANDARD.encode(mask.octets()),
        IpAddr::V6(mask) => STANDARD.encode(mask.octets()),
    }
}

/// Address and mask as a prefix; bits of the address beyond the mask are kept.
pub(super) fn decode_mask(ip: IpAddr, mask: &str) -> Result<IpNet, String> {
    let problem = |what: &str| format!("the mask {:?} {what}", crate::error::bounded(mask));
    let bytes = STANDARD.decode(mask).map_err(|_| problem("is not base64"))?;
    let bytes = match (ip, bytes.len()) {
        (IpAddr::V4(_), 4) | (IpAddr::V6(_), 16) => &bytes[..],
        // Go also holds an IPv4 mask in 16 bytes.
        (IpAddr::V4(_), 16) if bytes[..12].iter().all(|byte| *byte == 0xff) => &bytes[12..],
        _ => return Err(problem(&format!("does not fit to {ip}"))),
    };
    let ones: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
    let leading = bytes.iter().take_while(|byte| **byte == 0xff).count();
    let rest = bytes.get(leading).map_or(0, |byte| byte.leading_ones());
    if ones != leading as u32 * 8 + rest {
        return Err(problem("has a gap"));
    }
    IpNet::new(ip, ones as u8).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_go_masks() {
        let ip = |text: &str| text.parse::<IpAddr>().expect(text);
        assert_eq!(decode_mask(ip("10.0.0.1"), "////AA==").expect("valid").to_string(), "10.0.0.1/24");
        assert_eq!(
            decode_mask(ip("10.0.0.0"), "//////////////////8AAA==").expect("16 bytes").to_string(),
            "10.0.0.0/16"
        );
        assert_eq!(decode_mask(ip("0.0.0.0"), "AAAAAA==").expect("valid").to_string(), "0.0.0.0/0");
        for bad in ["", "x", "/w==", "/wD/AA==", "AP///w=="] {
            assert!(decode_mask(ip("10.0.0.0"), bad).is_err(), "{bad}");
        }
        assert!(decode_mask(ip("fd00::"), "////AA==").is_err());
    }

    #[test]
    fn a_node_without_name_cluster_or_id_is_refused() {
        for (text, field) in [
            (r#"{"Cluster":"a","ClusterID":1}"#, "Name"),
            (r#"{"Name":"n","ClusterID":1}"#, "Cluster"),
            (r#"{"Name":"n","Cluster":"a"}"#, "ClusterID"),
            (r#"{"Name":"","Cluster":"a","ClusterID":1}"#, "Name"),
            (r#"{"Name":"n","Cluster":"a","ClusterID":0}"#, "ClusterID"),
            (r#"{"Name":"n","Cluster":"a","ClusterID":1,"EncryptionKey":256}"#, "EncryptionKey"),
            (
                r#"{"Name":"n","Cluster":"a","ClusterID":1,"IPv4AllocCIDR":{"IP":"10.0.0.0","Mask":"/w=="}}"#,
                "IPv4AllocCIDR",
            ),
        ] {
            let error = Node::decode(text.as_bytes()).expect_err(text).to_string();
            assert!(error.contains(field), "{text}: {error}");
        }
    }

    #[test]
    fn a_node_of_the_newest_version_is_read_without_its_gone_field() {
        let node = Node::decode(
            br#"{"Name":"n","Cluster":"a","ClusterID":1,"IPAddresses":[{"Type":"Hostname","IP":"h"},{"Type":"InternalIP","IP":"10.0.0.1"}]}"#,
        )
        .expect("valid");
        assert_eq!(node.node_ip(false), Some([10, 0, 0, 1].into()));
        assert_eq!(node.node_ip(true), None);
        assert_eq!(node.labels, None);
    }
}
