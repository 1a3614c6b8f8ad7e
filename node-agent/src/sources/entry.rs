//! One entry of the store, read and checked: the edge where the wire format ends. The relay has checked what peers
//! wrote; it is checked here again, for an agent may read a gateway that is older than itself.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use isthmus_bpf_abi::Protocol;
use isthmus_policy::model::Transport;
use isthmus_policy::{NamedPorts, Parsed, PolicyName};
use isthmus_wire::local::{LocalNamespace, LocalPolicy, LocalService};
use isthmus_wire::validate::{self, RemoteCluster};
use isthmus_wire::value::{AddressKind, ServicePorts, TrafficPolicy};
use isthmus_wire::{
    ClusterEndpointSlice, ClusterName, ClusterService, IpIdentityPair, Key, KeyError, Labels,
    MaxConnectedClusters, Node, Tree, ValueError, annotation,
};
use isthmus_wireguard::config::PublicKey;

use crate::mesh::fact::{self, Condition, Port, ServiceName};
use crate::mesh::{MeshEvent, Resource};

/// Where an entry was found.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Whose it is.
    pub cluster: ClusterName,
    /// Whether that is the own cluster: its entries are under `cilium/state/`, a peer's under `cilium/cache/`.
    pub own: bool,
    /// Which kind of entry belongs there.
    pub resource: Resource,
    /// How many clusters the mesh is set up for.
    pub mesh_size: MaxConnectedClusters,
}

/// Why an entry is left out. What was known under its key before stays.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// The key cannot be read.
    #[error(transparent)]
    Key(Box<KeyError>),
    /// The key is of another kind than its section's.
    #[error("{0} does not belong among the {1} of cluster {2}")]
    Misplaced(String, Resource, ClusterName),
    /// The value cannot be read.
    #[error("{key}: {source}")]
    Value {
        /// Where.
        key: String,
        /// Why.
        source: ValueError,
    },
    /// The value says what its cluster may not say.
    #[error("{key}: {source}")]
    Rejected {
        /// Where.
        key: String,
        /// Why.
        source: Box<validate::Rejection>,
    },
}

impl EntryError {
    /// A short, fixed word for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Key(_) => "malformed_key",
            Self::Misplaced(..) => "misplaced",
            Self::Value { source, .. } => source.reason(),
            Self::Rejected { source, .. } => source.reason(),
        }
    }
}

/// What an entry says; no value is its deletion.
///
/// # Errors
/// See [`EntryError`].
pub fn read(origin: &Origin, key: &[u8], value: Option<&[u8]>) -> Result<MeshEvent, EntryError> {
    let key = Key::parse(key).map_err(|error| EntryError::Key(Box::new(error)))?;
    let cluster: Arc<str> = origin.cluster.as_str().into();
    let misplaced = || EntryError::Misplaced(key.to_string(), origin.resource, origin.cluster.clone());
    if !belongs(origin, &key) {
        return Err(misplaced());
    }
    Ok(match &key {
        Key::Node { name, .. } => MeshEvent::Node {
            cluster,
            name: name.as_str().into(),
            node: value.map(|value| node(origin, &key, value)).transpose()?,
        },
        Key::Ip { entry, .. } => MeshEvent::Endpoint {
            cluster,
            prefix: entry.net(),
            endpoint: value.map(|value| endpoint(&key, value, *entry)).transpose()?,
        },
        Key::Identity { id, .. } => MeshEvent::Identity {
            cluster,
            id: id.0,
            labels: value.map(|value| labels(origin, &key, value)).transpose()?,
        },
        Key::Service(object) => MeshEvent::RemoteService {
            cluster,
            name: ServiceName::new(object.namespace.as_str(), object.name.as_str()),
            service: value.map(|value| remote_service(origin, &key, value)).transpose()?,
        },
        Key::EndpointSlice(object) => MeshEvent::RemoteSlice {
            cluster,
            name: ServiceName::new(object.namespace.as_str(), object.name.as_str()),
            slice: match value {
                Some(value) => remote_slice(origin, &key, value)?,
                None => None,
            },
        },
        Key::LocalService { namespace, name } => MeshEvent::LocalService {
            name: ServiceName::new(namespace.as_str(), name.as_str()),
            service: value.map(|value| local_service(&key, value)).transpose()?,
        },
        Key::LocalPolicy(name) => MeshEvent::Policy {
            name: name.clone(),
            policy: value.map(|value| policy(&key, name, value)).transpose()?,
        },
        Key::LocalNamespace(name) => MeshEvent::Namespace {
            name: name.as_str().into(),
            labels: value
                .map(|value| Ok(decoded(&key, LocalNamespace::decode(value))?.labels))
                .transpose()?,
        },
        _ => return Err(misplaced()),
    })
}

fn belongs(origin: &Origin, key: &Key) -> bool {
    let tree = if origin.own { Tree::State } else { Tree::Cache };
    let mirror = |of: &Option<ClusterName>| of.as_ref() == (!origin.own).then_some(&origin.cluster);
    match (origin.resource, key) {
        (Resource::Nodes, Key::Node { tree: of, cluster, .. }) => *of == tree && *cluster == origin.cluster,
        (Resource::Endpoints, Key::Ip { mirror_of, .. }) => mirror(mirror_of),
        (Resource::Identities, Key::Identity { mirror_of, .. }) => mirror(mirror_of),
        (Resource::Services, Key::Service(object)) | (Resource::Slices, Key::EndpointSlice(object)) => {
            !origin.own && object.tree == tree && object.cluster == origin.cluster
        }
        (Resource::Services, Key::LocalService { .. })
        | (Resource::Policies, Key::LocalPolicy(_))
        | (Resource::Namespaces, Key::LocalNamespace(_)) => origin.own,
        _ => false,
    }
}

fn decoded<T>(key: &Key, value: Result<T, ValueError>) -> Result<T, EntryError> {
    value.map_err(|source| EntryError::Value { key: key.to_string(), source })
}

/// Everything is checked but the cluster's id, which the mesh's state judges: it may change, and come later.
fn checked(
    origin: &Origin,
    key: &Key,
    id: isthmus_wire::ClusterId,
    check: impl FnOnce(&RemoteCluster) -> Result<(), validate::Rejection>,
) -> Result<(), EntryError> {
    let cluster =
        RemoteCluster { name: origin.cluster.clone(), id, max_connected_clusters: origin.mesh_size };
    check(&cluster).map_err(|source| EntryError::Rejected { key: key.to_string(), source: Box::new(source) })
}

fn node(origin: &Origin, key: &Key, value: &[u8]) -> Result<fact::Node, EntryError> {
    let node = decoded(key, Node::decode(value))?;
    checked(origin, key, node.cluster_id, |cluster| validate::node(key, &node, cluster))?;
    let address = |address: &isthmus_wire::value::NodeAddress| {
        let internal = match address.kind {
            AddressKind::InternalIp => true,
            AddressKind::ExternalIp | AddressKind::CiliumInternalIp => false,
            _ => return None,
        };
        Some(fact::NodeAddress { ip: address.ip()?, internal })
    };
    let present = |ips: [Option<IpAddr>; 2]| ips.into_iter().flatten().collect();
    Ok(fact::Node {
        cluster_id: node.cluster_id.number(),
        addresses: node.addresses.iter().filter_map(address).collect(),
        // A range of everything would make every unknown address one of that node's.
        pod_cidrs: node.pod_cidrs().filter(|range| range.prefix_len() > 0).collect(),
        health: present([node.ipv4_health_ip, node.ipv6_health_ip]),
        ingress: present([node.ipv4_ingress_ip, node.ipv6_ingress_ip]),
        encryption_key: node.encryption_key,
        wireguard_key: wireguard_key(&node.wireguard_public_key),
    })
}

fn wireguard_key(text: &str) -> fact::WireguardKey {
    if text.is_empty() {
        return fact::WireguardKey::None;
    }
    match text.parse::<PublicKey>() {
        Ok(key) if !key.is_zero() => fact::WireguardKey::Key(key),
        _ => fact::WireguardKey::Invalid,
    }
}

fn endpoint(key: &Key, value: &[u8], entry: isthmus_wire::IpEntry) -> Result<fact::Endpoint, EntryError> {
    let pair = decoded(key, IpIdentityPair::decode(value))?;
    let mismatch = |field, found: String| EntryError::Rejected {
        key: key.to_string(),
        source: Box::new(validate::Rejection::KeyMismatch { field, found, key: entry.to_string() }),
    };
    if pair.entry != entry {
        return Err(mismatch("IP", pair.entry.to_string()));
    }
    if entry.net().prefix_len() == 0 {
        return Err(mismatch("Mask", "a prefix that covers every address".to_owned()));
    }
    Ok(fact::Endpoint {
        identity: pair.id.0,
        host: pair.host_ip,
        encryption_key: pair.key,
        named_ports: named_ports(&pair.named_ports),
    })
}

/// Most named ports that count of one address; what a pod's containers may have is not bounded by Kubernetes.
const MAX_NAMED_PORTS: usize = 64;

fn named_ports(listed: &[isthmus_wire::value::NamedPort]) -> Option<Arc<NamedPorts>> {
    let mut ports = NamedPorts::new();
    for port in listed.iter().take(MAX_NAMED_PORTS) {
        let protocol = match port.protocol {
            isthmus_wire::value::Protocol::Tcp => Transport::Tcp,
            isthmus_wire::value::Protocol::Udp => Transport::Udp,
            isthmus_wire::value::Protocol::Sctp => Transport::Sctp,
        };
        ports.insert(&port.name, protocol, port.port);
    }
    (!ports.is_empty()).then(|| Arc::new(ports))
}

fn labels(origin: &Origin, key: &Key, value: &[u8]) -> Result<Arc<str>, EntryError> {
    let labels = decoded(key, Labels::decode(value))?;
    if let Key::Identity { id, .. } = key
        && let Some(cluster_id) = id.cluster(origin.mesh_size)
        && !origin.own
    {
        checked(origin, key, cluster_id, |cluster| validate::identity(key, &labels, cluster))?;
    }
    Ok(String::from_utf8_lossy(value).into())
}

fn remote_service(origin: &Origin, key: &Key, value: &[u8]) -> Result<fact::RemoteService, EntryError> {
    let service = decoded(key, ClusterService::decode(value))?;
    checked(origin, key, service.cluster_id, |cluster| validate::service(key, &service, cluster))?;
    let mut ports = SharedPorts::default();
    let backends = service
        .backends
        .iter()
        .map(|(addr, targets)| fact::Backend {
            addr: *addr,
            ports: ports.of(targets),
            condition: Condition::Active,
            node: None,
        })
        .collect();
    Ok(fact::RemoteService {
        cluster_id: service.cluster_id.number(),
        shared: service.shared,
        global: service.include_external,
        backends,
    })
}

/// A slice that names no service belongs to none and says nothing.
fn remote_slice(origin: &Origin, key: &Key, value: &[u8]) -> Result<Option<fact::RemoteSlice>, EntryError> {
    let slice = decoded(key, ClusterEndpointSlice::decode(value))?;
    checked(origin, key, slice.cluster_id, |cluster| validate::endpoint_slice(key, &slice, cluster))?;
    let Some(service) = slice.service_name() else { return Ok(None) };
    let ports: Arc<[Port]> = slice
        .ports
        .iter()
        .filter_map(|port| {
            Some(Port::new(port.name.as_deref().unwrap_or(""), protocol(port.protocol)?, port.port?))
        })
        .collect();
    let backends = slice
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.conditions.is_ready() || endpoint.conditions.is_serving());
    let backend = |endpoint: &isthmus_wire::value::Endpoint| {
        let terminating = endpoint.conditions.is_terminating() || !endpoint.conditions.is_ready();
        Some(fact::Backend {
            addr: *endpoint.addresses.first()?,
            ports: ports.clone(),
            condition: if terminating { Condition::Terminating } else { Condition::Active },
            node: None,
        })
    };
    Ok(Some(fact::RemoteSlice {
        cluster_id: slice.cluster_id.number(),
        service: ServiceName::new(slice.namespace.as_str(), service),
        backends: backends.filter_map(backend).collect(),
    }))
}

/// A policy, understood with the code that has told its owner what of it is not enforced as written.
fn policy(key: &Key, name: &PolicyName, value: &[u8]) -> Result<Parsed, EntryError> {
    let policy = decoded(key, LocalPolicy::decode(value))?;
    Ok(isthmus_policy::parse::policy(name, &policy.specs))
}

fn local_service(key: &Key, value: &[u8]) -> Result<fact::LocalService, EntryError> {
    let service = decoded(key, LocalService::decode(value))?;
    if let Key::LocalService { namespace, name } = key
        && (service.namespace != *namespace || service.name != *name)
    {
        return Err(EntryError::Rejected {
            key: key.to_string(),
            source: Box::new(validate::Rejection::KeyMismatch {
                field: "name",
                found: format!("{}/{}", service.namespace, service.name),
                key: format!("{namespace}/{name}"),
            }),
        });
    }
    let mut ports = SharedPorts::default();
    let mut nodes: HashMap<&str, Arc<str>> = HashMap::new();
    let backends = service
        .backends
        .iter()
        .map(|(addr, backend)| fact::Backend {
            addr: *addr,
            ports: ports.of(&backend.ports),
            condition: if backend.terminating { Condition::Terminating } else { Condition::Active },
            node: backend
                .node
                .as_deref()
                .map(|node| nodes.entry(node).or_insert_with(|| node.into()).clone()),
        })
        .collect();
    Ok(fact::LocalService {
        cluster_ips: service.cluster_ips.clone(),
        ports: service
            .ports
            .iter()
            .filter_map(|port| Some(Port::new(port.name.as_str(), protocol(port.protocol)?, port.port)))
            .collect(),
        backends,
        global: service.global,
        affinity: match service.affinity {
            annotation::Affinity::None => fact::Affinity::None,
            annotation::Affinity::Local => fact::Affinity::Local,
            annotation::Affinity::Remote => fact::Affinity::Remote,
        },
        session_affinity_seconds: service.session_affinity.filter(|seconds| *seconds > 0),
        node_local: service.internal_traffic_policy == TrafficPolicy::Local,
        labels: service.labels.clone(),
        selector: service.selector.clone(),
    })
}

/// The backends of a service mostly have the same ports; they share them.
#[derive(Default)]
struct SharedPorts<'a> {
    known: HashMap<&'a ServicePorts, Arc<[Port]>>,
}

impl<'a> SharedPorts<'a> {
    fn of(&mut self, ports: &'a ServicePorts) -> Arc<[Port]> {
        let convert = || {
            let port = |(name, port): (&isthmus_wire::value::PortName, &isthmus_wire::value::ServicePort)| {
                Some(Port::new(name.as_str(), protocol(port.protocol)?, port.port))
            };
            ports.0.iter().filter_map(port).filter(|port| port.number != 0).collect()
        };
        self.known.entry(ports).or_insert_with(convert).clone()
    }
}

fn protocol(protocol: isthmus_wire::value::Protocol) -> Option<Protocol> {
    match protocol {
        isthmus_wire::value::Protocol::Tcp => Some(Protocol::Tcp),
        isthmus_wire::value::Protocol::Udp => Some(Protocol::Udp),
        isthmus_wire::value::Protocol::Sctp => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(resource: Resource) -> Origin {
        Origin {
            cluster: "real-a".parse().expect("a name"),
            own: false,
            resource,
            mesh_size: MaxConnectedClusters::C255,
        }
    }

    #[test]
    fn a_service_of_an_unmodified_cilium_becomes_backends() {
        let value = r#"{"cluster":"real-a","namespace":"app","name":"echo","frontends":{"10.96.50.104":{"http":{"Protocol":"TCP","Port":80}}},"backends":{"10.244.0.77":{"http":{"Protocol":"TCP","Port":8080},"probe":{"Protocol":"SCTP","Port":9}}},"labels":{},"selector":{"app":"echo"},"includeExternal":true,"shared":true,"clusterID":3}"#;
        let event = read(
            &origin(Resource::Services),
            b"cilium/cache/services/v1/real-a/app/echo",
            Some(value.as_bytes()),
        );
        let Ok(MeshEvent::RemoteService { service: Some(service), name, .. }) = event else {
            panic!("{event:?}")
        };
        assert_eq!(name, ServiceName::new("app", "echo"));
        assert_eq!((service.cluster_id, service.shared, service.global), (3, true, true));
        assert_eq!(service.backends.len(), 1);
        assert_eq!(service.backends[0].ports[..], [Port::new("http", Protocol::Tcp, 8080)]);
    }

    #[test]
    fn what_is_not_of_its_section_or_of_another_cluster_is_refused_with_its_key() {
        for (resource, key, value) in [
            (Resource::Nodes, "cilium/cache/services/v1/real-a/app/echo", ""),
            (Resource::Services, "cilium/cache/services/v1/other/app/echo", ""),
            (Resource::Endpoints, "cilium/state/ip/v1/default/10.0.0.1", ""),
            (
                Resource::Endpoints,
                "cilium/cache/ip/v1/real-a/10.0.0.1",
                r#"{"IP":"10.0.0.2","Mask":null,"HostIP":"","ID":196915,"Key":0,"Metadata":""}"#,
            ),
            (
                Resource::Endpoints,
                "cilium/cache/ip/v1/real-a/0.0.0.0/0",
                r#"{"IP":"0.0.0.0","Mask":"AAAAAA==","HostIP":"","ID":196915,"Key":0,"Metadata":""}"#,
            ),
            (Resource::Nodes, "cilium/cache/nodes/v1/real-a/node-1", "{"),
            (
                Resource::Identities,
                "cilium/cache/identities/v1/real-a/id/196915",
                "k8s:io.cilium.k8s.policy.cluster=other;",
            ),
        ] {
            let error = read(&origin(resource), key.as_bytes(), Some(value.as_bytes())).expect_err(key);
            assert!(error.to_string().contains(key), "{error}");
        }
    }

    #[test]
    fn a_deletion_needs_no_value() {
        let event = read(&origin(Resource::Endpoints), b"cilium/cache/ip/v1/real-a/10.0.0.1", None);
        assert!(matches!(event, Ok(MeshEvent::Endpoint { endpoint: None, .. })), "{event:?}");
    }
}
