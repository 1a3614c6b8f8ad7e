//! Backends of a global service in their newer form (Cilium 1.20): a zstd frame around a protocol buffer, under
//! `cilium/state/endpointslices/v1/<cluster>/<namespace>/<slice>`.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::IpAddr;

use bytes::Bytes;
use prost::Message as _;

use super::{MAX_BYTES, Protocol};
use crate::gojson::parse_ip;
use crate::{ClusterId, ClusterName, Namespace, ObjectName, ValueError};

mod message;

/// Most bytes a frame may expand to. Kubernetes allows 1,000 endpoints in a slice, a few hundred bytes each.
const MAX_EXPANDED: usize = 4 << 20;
/// Most endpoints of a slice: what Kubernetes allows.
const MAX_ENDPOINTS: usize = 1_000;
/// Most ports of a slice: what Kubernetes allows.
const MAX_PORTS: usize = 20_000;
/// Largest zstd window, as a power of two: a frame may demand this much memory before it has produced anything.
const MAX_WINDOW_LOG: u32 = 23;
/// zstd level: slices are small and written once per change.
const LEVEL: i32 = 3;

/// One EndpointSlice of one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterEndpointSlice {
    /// Cluster the slice is in.
    pub cluster: ClusterName,
    /// Id of the cluster.
    pub cluster_id: ClusterId,
    /// Namespace of slice and Service.
    pub namespace: Namespace,
    /// Name of the slice.
    pub name: ObjectName,
    /// Labels of the slice; `kubernetes.io/service-name` tells the Service.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the slice.
    pub annotations: BTreeMap<String, String>,
    /// Family of all its addresses.
    pub address_type: AddressType,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Ports of every endpoint.
    pub ports: Vec<EndpointPort>,
}

/// Address family of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressType {
    /// IPv4
    IPv4,
    /// IPv6
    IPv6,
}

/// One endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Endpoint {
    /// Its addresses; readers use the first.
    pub addresses: Vec<IpAddr>,
    /// Whether it takes traffic.
    pub conditions: Conditions,
    /// Host name within a headless service.
    pub hostname: Option<String>,
    /// From an older version of the API.
    pub deprecated_topology: BTreeMap<String, String>,
    /// Node it runs on.
    pub node_name: Option<String>,
    /// Zone it runs in.
    pub zone: Option<String>,
    /// Zones that should use it; none without hints.
    pub for_zones: Option<Vec<String>>,
}

/// Whether an endpoint takes traffic. What is not said counts as in Kubernetes: ready, serving, not terminating.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Conditions {
    /// Takes new connections.
    pub ready: Option<bool>,
    /// Works, be it terminating or not.
    pub serving: Option<bool>,
    /// On its way out.
    pub terminating: Option<bool>,
}

impl Conditions {
    /// Whether it takes new connections.
    pub fn is_ready(self) -> bool {
        self.ready.unwrap_or(true)
    }

    /// Whether it works, be it terminating or not.
    pub fn is_serving(self) -> bool {
        self.serving.unwrap_or(self.is_ready())
    }

    /// Whether it is on its way out.
    pub fn is_terminating(self) -> bool {
        self.terminating.unwrap_or(false)
    }
}

/// A port of every endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointPort {
    /// Its name; none or empty if it is the only one.
    pub name: Option<String>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number; none means all ports, which load balancers skip.
    pub port: Option<u16>,
    /// What is spoken over it, if declared.
    pub app_protocol: Option<String>,
}

impl ClusterEndpointSlice {
    /// Label that names the Service a slice belongs to.
    pub const SERVICE_NAME: &'static str = "kubernetes.io/service-name";

    /// Name of the Service it belongs to.
    pub fn service_name(&self) -> Option<&str> {
        self.labels.get(Self::SERVICE_NAME).map(String::as_str)
    }

    /// Reads the value: bounded before, during and after decompression.
    ///
    /// # Errors
    /// Too long, compressed or not; no such frame or message; or a field that does not hold what it should.
    pub fn decode(bytes: &[u8]) -> Result<Self, ValueError> {
        if bytes.len() > MAX_BYTES {
            return Err(ValueError::TooLarge { size: bytes.len(), limit: MAX_BYTES });
        }
        let expanded = expand(bytes)?;
        check_counts(&expanded)?;
        let message = message::ClusterEndpointSlice::decode(expanded.as_slice())
            .map_err(|error| ValueError::Protobuf(error.to_string()))?;
        message.try_into()
    }

    /// The value as a zstd frame.
    pub fn encode(&self) -> Bytes {
        let message = message::ClusterEndpointSlice::from(self).encode_to_vec();
        zstd::bulk::compress(&message, LEVEL).expect("compressing memory to memory cannot fail").into()
    }
}

fn expand(bytes: &[u8]) -> Result<Vec<u8>, ValueError> {
    let damaged = |error: std::io::Error| ValueError::Compression(crate::error::bounded(error));
    let mut decoder = zstd::stream::read::Decoder::with_buffer(bytes).map_err(damaged)?;
    decoder.window_log_max(MAX_WINDOW_LOG).map_err(damaged)?;
    let mut expanded = Vec::with_capacity((bytes.len() * 4).min(MAX_EXPANDED));
    decoder.take(MAX_EXPANDED as u64 + 1).read_to_end(&mut expanded).map_err(damaged)?;
    if expanded.len() > MAX_EXPANDED {
        return Err(ValueError::Expands { limit: MAX_EXPANDED });
    }
    Ok(expanded)
}

/// Counts before anything is read into memory, where an endpoint of two bytes takes a hundred times as much.
fn check_counts(message: &[u8]) -> Result<(), ValueError> {
    use prost::encoding::{DecodeContext, decode_key, skip_field};
    let damaged = |error: prost::DecodeError| ValueError::Protobuf(error.to_string());
    let (mut rest, mut endpoints, mut ports) = (message, 0, 0);
    while !rest.is_empty() {
        let (tag, wire_type) = decode_key(&mut rest).map_err(damaged)?;
        skip_field(wire_type, tag, &mut rest, DecodeContext::default()).map_err(damaged)?;
        let (field, count, limit) = match tag {
            message::ENDPOINTS => ("endpoints", &mut endpoints, MAX_ENDPOINTS),
            message::PORTS => ("ports", &mut ports, MAX_PORTS),
            _ => continue,
        };
        *count += 1;
        if *count > limit {
            return Err(ValueError::field(field, format_args!("there are more than {limit}")));
        }
    }
    Ok(())
}

impl TryFrom<message::ClusterEndpointSlice> for ClusterEndpointSlice {
    type Error = ValueError;

    fn try_from(message: message::ClusterEndpointSlice) -> Result<Self, ValueError> {
        fn name<T: std::str::FromStr<Err: std::fmt::Display>>(
            field: &str,
            text: Option<String>,
        ) -> Result<T, ValueError> {
            text.unwrap_or_default().parse().map_err(|error| ValueError::field(field, error))
        }
        let address_type = match message.address_type.as_deref() {
            Some("IPv4") => AddressType::IPv4,
            Some("IPv6") => AddressType::IPv6,
            other => {
                let problem = format!("{:?} is neither IPv4 nor IPv6", other.unwrap_or_default());
                return Err(ValueError::field("addressType", problem));
            }
        };
        let endpoints = message.endpoints.into_iter().enumerate();
        let ports = message.ports.into_iter().enumerate();
        Ok(Self {
            cluster: name("cluster", message.cluster)?,
            cluster_id: ClusterId::try_from(message.cluster_id.unwrap_or(0))
                .map_err(|error| ValueError::field("clusterID", error))?,
            namespace: name("namespace", message.namespace)?,
            name: name("name", message.name)?,
            labels: message.labels,
            annotations: message.annotations,
            address_type,
            endpoints: endpoints
                .map(|(at, endpoint)| read_endpoint(at, endpoint, address_type))
                .collect::<Result<_, _>>()?,
            ports: ports.map(|(at, port)| read_port(at, port)).collect::<Result<_, _>>()?,
        })
    }
}

fn read_endpoint(at: usize, message: message::Endpoint, family: AddressType) -> Result<Endpoint, ValueError> {
    let addresses = message.addresses.iter().enumerate().map(|(index, text)| {
        let field = || format!("endpoints[{at}].addresses[{index}]");
        let ip = parse_ip(text).map_err(|problem| ValueError::field(field(), problem))?;
        if ip.is_ipv6() == (family == AddressType::IPv6) {
            Ok(ip)
        } else {
            Err(ValueError::field(field(), format!("{ip} is not of the slice's address type")))
        }
    });
    let conditions = message.conditions.unwrap_or_default();
    Ok(Endpoint {
        addresses: addresses.collect::<Result<_, _>>()?,
        conditions: Conditions {
            ready: conditions.ready,
            serving: conditions.serving,
            terminating: conditions.terminating,
        },
        hostname: message.hostname,
        deprecated_topology: message.deprecated_topology,
        node_name: message.node_name,
        zone: message.zone,
        for_zones: message
            .hints
            .map(|hints| hints.for_zones.into_iter().map(|zone| zone.name.unwrap_or_default()).collect()),
    })
}

fn read_port(at: usize, message: message::EndpointPort) -> Result<EndpointPort, ValueError> {
    let field = |name: &str| format!("ports[{at}].{name}");
    Ok(EndpointPort {
        name: message.name,
        protocol: match message.protocol.as_deref() {
            None | Some("") => Protocol::Tcp,
            Some(text) => text.parse().map_err(|problem| ValueError::field(field("protocol"), problem))?,
        },
        port: message
            .port
            .map(|port| {
                let problem = || ValueError::field(field("port"), format!("{port} is not a port number"));
                u16::try_from(port).map_err(|_| problem())
            })
            .transpose()?,
        app_protocol: message.app_protocol,
    })
}

impl From<&ClusterEndpointSlice> for message::ClusterEndpointSlice {
    fn from(slice: &ClusterEndpointSlice) -> Self {
        Self {
            cluster: Some(slice.cluster.to_string()),
            cluster_id: Some(slice.cluster_id.into()),
            namespace: Some(slice.namespace.to_string()),
            name: Some(slice.name.to_string()),
            labels: slice.labels.clone(),
            annotations: slice.annotations.clone(),
            address_type: Some(
                match slice.address_type {
                    AddressType::IPv4 => "IPv4",
                    AddressType::IPv6 => "IPv6",
                }
                .to_owned(),
            ),
            endpoints: slice.endpoints.iter().map(Into::into).collect(),
            ports: slice.ports.iter().map(Into::into).collect(),
        }
    }
}

impl From<&Endpoint> for message::Endpoint {
    fn from(endpoint: &Endpoint) -> Self {
        let Conditions { ready, serving, terminating } = endpoint.conditions;
        let zone = |name: &String| message::ForZone { name: Some(name.clone()) };
        Self {
            addresses: endpoint.addresses.iter().map(ToString::to_string).collect(),
            conditions: Some(message::Conditions { ready, serving, terminating }),
            hostname: endpoint.hostname.clone(),
            deprecated_topology: endpoint.deprecated_topology.clone(),
            node_name: endpoint.node_name.clone(),
            zone: endpoint.zone.clone(),
            hints: endpoint
                .for_zones
                .as_ref()
                .map(|zones| message::Hints { for_zones: zones.iter().map(zone).collect() }),
        }
    }
}

impl From<&EndpointPort> for message::EndpointPort {
    fn from(port: &EndpointPort) -> Self {
        Self {
            name: port.name.clone(),
            protocol: Some(port.protocol.to_string()),
            port: port.port.map(Into::into),
            app_protocol: port.app_protocol.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice() -> ClusterEndpointSlice {
        ClusterEndpointSlice {
            cluster: "beta".parse().expect("valid"),
            cluster_id: 2.try_into().expect("valid"),
            namespace: "app".parse().expect("valid"),
            name: "echo-x1".parse().expect("valid"),
            labels: [(ClusterEndpointSlice::SERVICE_NAME.to_owned(), "echo".to_owned())].into(),
            annotations: BTreeMap::new(),
            address_type: AddressType::IPv4,
            endpoints: vec![Endpoint {
                addresses: vec![[10, 0, 0, 1].into()],
                conditions: Conditions { ready: Some(true), ..Conditions::default() },
                for_zones: Some(vec!["z1".to_owned()]),
                ..Endpoint::default()
            }],
            ports: vec![EndpointPort {
                name: None,
                protocol: Protocol::Tcp,
                port: Some(8080),
                app_protocol: None,
            }],
        }
    }

    fn compressed(message: &message::ClusterEndpointSlice) -> Vec<u8> {
        zstd::bulk::compress(&message.encode_to_vec(), LEVEL).expect("compresses")
    }

    #[test]
    fn a_slice_survives_the_wire() {
        let slice = slice();
        assert_eq!(ClusterEndpointSlice::decode(&slice.encode()).expect("valid"), slice);
        assert_eq!(slice.service_name(), Some("echo"));
    }

    #[test]
    fn a_frame_that_expands_without_bound_is_refused_before_it_does() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).expect("compresses");
        assert!(bomb.len() < MAX_BYTES);
        assert_eq!(ClusterEndpointSlice::decode(&bomb), Err(ValueError::Expands { limit: MAX_EXPANDED }));
    }

    #[test]
    fn more_endpoints_than_a_slice_can_have_are_refused_before_they_take_memory() {
        let with = |endpoints: usize, ports: usize| {
            let mut message = message::ClusterEndpointSlice::from(&slice());
            message.endpoints = vec![message::Endpoint::default(); endpoints];
            message.ports = vec![message::EndpointPort::default(); ports];
            ClusterEndpointSlice::decode(&compressed(&message)).map(drop)
        };
        assert_eq!(with(MAX_ENDPOINTS, 1), Ok(()));
        let error = with(2_000_000, 1).expect_err("refused").to_string();
        assert!(error.contains("`endpoints`") && error.contains("1000"), "{error}");
        assert!(with(1, MAX_PORTS + 1).expect_err("refused").to_string().contains("`ports`"));
    }

    #[test]
    fn damage_and_foreign_values_are_named() {
        let with = |change: fn(&mut message::ClusterEndpointSlice)| {
            let mut message = message::ClusterEndpointSlice::from(&slice());
            change(&mut message);
            ClusterEndpointSlice::decode(&compressed(&message)).expect_err("refused").to_string()
        };
        assert!(with(|m| m.cluster = None).contains("`cluster`"));
        assert!(with(|m| m.cluster_id = Some(70_000)).contains("`clusterID`"));
        assert!(with(|m| m.address_type = Some("FQDN".into())).contains("`addressType`"));
        assert!(with(|m| m.address_type = Some("IPv6".into())).contains("`endpoints[0].addresses[0]`"));
        assert!(with(|m| m.endpoints[0].addresses[0] = "x".into()).contains("`endpoints[0].addresses[0]`"));
        assert!(with(|m| m.ports[0].port = Some(-1)).contains("`ports[0].port`"));
        assert!(with(|m| m.ports[0].protocol = Some("ICMP".into())).contains("`ports[0].protocol`"));
        let good = slice().encode();
        assert!(matches!(
            ClusterEndpointSlice::decode(&good[..good.len() / 2]),
            Err(ValueError::Compression(_))
        ));
        assert!(matches!(ClusterEndpointSlice::decode(b"{}"), Err(ValueError::Compression(_))));
        let junk = zstd::bulk::compress(b"\xff\xff\xff", 1).expect("compresses");
        assert!(matches!(ClusterEndpointSlice::decode(&junk), Err(ValueError::Protobuf(_))));
    }
}
