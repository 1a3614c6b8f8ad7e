//! The key space: every key of Cluster Mesh, parsed and written.
//!
//! A cluster exports under `cilium/state/`; a relay mirrors a peer under `cilium/cache/`. Nodes, services, slices and
//! exports keep their path below that; identities and addresses gain the peer's name.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;

use crate::error::bounded;
use crate::local::PolicyKey;
use crate::{ClusterName, InvalidName, IpEntry, Namespace, NumericIdentity, ObjectName};

mod prefix;

pub use prefix::{Prefix, Resource, Tree};

/// The key of the heartbeat, which an exporter writes every 60 s.
pub const HEARTBEAT: &str = "cilium/.heartbeat";
/// Prefix of the cluster configurations, with its trailing slash.
pub const CLUSTER_CONFIGS: &str = "cilium/cluster-config/";
/// Prefix of the sync canaries of all clusters, with its trailing slash.
pub const SYNCED: &str = "cilium/synced/";

/// Longest key that is parsed, in bytes: label sets are part of some keys.
const MAX_BYTES: usize = 16 << 10;

/// A key of the Cluster Mesh key space, or one of Isthmus' own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// `cilium/.heartbeat`
    Heartbeat,
    /// `cilium/.has-cluster-config`: tells readers up to Cilium 1.16 that a cluster configuration is mandatory.
    HasClusterConfig,
    /// `cilium/.initlock/<rand>/<lease>`: an admin client's quorum probe.
    InitLock(String),
    /// `cilium/kvstoremesh-lock/<lease>`: leader election between relays on one etcd.
    KvStoreMeshLock(String),
    /// `cilium/cluster-config/<cluster>`
    ClusterConfig(ClusterName),
    /// `cilium/synced/<cluster>/<prefix>`: a sync canary, written when everything below `prefix` has been.
    Synced {
        /// Whose data is complete.
        cluster: ClusterName,
        /// Which part of it.
        prefix: Prefix,
    },
    /// `cilium/{state,cache}/nodes/v1/<cluster>/<node>`
    Node {
        /// Exported or mirrored.
        tree: Tree,
        /// The node's cluster.
        cluster: ClusterName,
        /// The node.
        name: ObjectName,
    },
    /// `cilium/state/identities/v1/id/<id>` or `cilium/cache/identities/v1/<cluster>/id/<id>`
    Identity {
        /// The peer it was mirrored of; none in the `state` form.
        mirror_of: Option<ClusterName>,
        /// The identity.
        id: NumericIdentity,
    },
    /// `cilium/state/identities/v1/{value,locks}/...`: kept by Cilium's kvstore identity mode, not read across clusters.
    /// Holds what follows `v1/`.
    IdentityInternal(String),
    /// `cilium/state/ip/v1/default/<ip>` or `cilium/cache/ip/v1/<cluster>/<ip>`
    Ip {
        /// The peer it was mirrored of; none in the `state` form.
        mirror_of: Option<ClusterName>,
        /// The address or prefix.
        entry: IpEntry,
    },
    /// `cilium/{state,cache}/services/v1/<cluster>/<namespace>/<name>`
    Service(ObjectKey),
    /// `cilium/{state,cache}/endpointslices/v1/<cluster>/<namespace>/<name>`
    EndpointSlice(ObjectKey),
    /// `cilium/{state,cache}/serviceexports/v1/<cluster>/<namespace>/<name>`
    ServiceExport(ObjectKey),
    /// `isthmus/services/v1/<namespace>/<name>`: a Service for the cluster's own agents.
    LocalService {
        /// The Service's namespace.
        namespace: Namespace,
        /// The Service's name.
        name: ObjectName,
    },
    /// `isthmus/policies/v1/<kind>/<namespace or ->/<name>`: a network policy for the cluster's own agents.
    LocalPolicy(PolicyKey),
    /// `isthmus/namespaces/v1/<name>`: a namespace for the cluster's own agents.
    LocalNamespace(Namespace),
    /// `isthmus/refusing/v1/<cluster>`: a peer that refuses this cluster, for the cluster's own agents.
    Refusing(ClusterName),
}

/// What identifies a namespaced object of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Exported or mirrored.
    pub tree: Tree,
    /// The object's cluster.
    pub cluster: ClusterName,
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: ObjectName,
}

/// Why bytes are not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("key `{key}`: {problem}")]
pub struct KeyError {
    /// The key, cut to a readable length.
    pub key: String,
    /// What is wrong with it.
    pub problem: KeyProblem,
}

/// What can be wrong with a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyProblem {
    /// Longer than any real key.
    #[error("{0} bytes are more than the {MAX_BYTES} accepted")]
    TooLong(usize),
    /// Keys are UTF-8.
    #[error("not UTF-8")]
    NotUtf8,
    /// Nothing that Cluster Mesh knows starts like this. Newer versions may add keys: not a fault by itself.
    #[error("not a key of the Cluster Mesh key space")]
    Unknown,
    /// The number or the spelling of the elements is not that of this kind of key.
    #[error("expected `{expected}`")]
    Shape {
        /// What such a key looks like.
        expected: &'static str,
    },
    /// One of the elements is not a valid name.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// Not an identity in canonical decimal form.
    #[error("{0:?} is not a numeric identity in plain decimal")]
    Identity(String),
    /// Not an address or prefix in canonical form.
    #[error("{0:?} is not an address or prefix in canonical form")]
    Address(String),
}

impl KeyError {
    /// Whether the key is of an unknown kind rather than damaged.
    pub fn is_unknown(&self) -> bool {
        self.problem == KeyProblem::Unknown
    }
}

impl Key {
    /// Parses a key. Only canonical spellings are keys: what this accepts, [`Key::to_bytes`] writes again, byte for byte.
    ///
    /// # Errors
    /// Unknown, malformed, over-long or not canonical; never more work than the key is long.
    pub fn parse(bytes: &[u8]) -> Result<Self, KeyError> {
        let fail = |problem| KeyError {
            key: bounded(String::from_utf8_lossy(&bytes[..bytes.len().min(512)])),
            problem,
        };
        if bytes.len() > MAX_BYTES {
            return Err(fail(KeyProblem::TooLong(bytes.len())));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| fail(KeyProblem::NotUtf8))?;
        parse(text).map_err(fail)
    }

    /// The sync canary of `cluster` for `prefix`.
    pub fn canary(cluster: &ClusterName, prefix: Prefix) -> Self {
        Self::Synced { cluster: cluster.clone(), prefix }
    }

    /// The key as it goes over the wire.
    pub fn to_bytes(&self) -> Bytes {
        self.to_string().into()
    }

    /// Which of the synchronised resources this key belongs to; none for bookkeeping keys.
    pub fn resource(&self) -> Option<Resource> {
        Some(match self {
            Self::Node { .. } => Resource::Nodes,
            Self::Identity { .. } => Resource::Identities,
            Self::Ip { .. } => Resource::Ip,
            Self::Service(_) => Resource::Services,
            Self::EndpointSlice(_) => Resource::EndpointSlices,
            Self::ServiceExport(_) => Resource::ServiceExports,
            _ => return None,
        })
    }

    /// The cluster that a key under `cilium/cache/`, a canary of such keys, a cluster configuration, or the word that it refuses
    /// this cluster is about.
    pub fn mirror_of(&self) -> Option<&ClusterName> {
        match self {
            Self::ClusterConfig(cluster)
            | Self::Refusing(cluster)
            | Self::Synced { cluster, prefix: Prefix::Cache(_) }
            | Self::Node { tree: Tree::Cache, cluster, .. } => Some(cluster),
            Self::Identity { mirror_of, .. } | Self::Ip { mirror_of, .. } => mirror_of.as_ref(),
            Self::Service(key) | Self::EndpointSlice(key) | Self::ServiceExport(key) => {
                (key.tree == Tree::Cache).then_some(&key.cluster)
            }
            _ => None,
        }
    }

    /// The same key in the form in which a relay mirrors it of `peer`; none if it is not mirrored, or names
    /// another cluster.
    pub fn mirrored(&self, peer: &ClusterName) -> Option<Self> {
        let object = |object: &ObjectKey| {
            (object.cluster == *peer).then(|| ObjectKey { tree: Tree::Cache, ..object.clone() })
        };
        match self {
            Self::Node { cluster, name, .. } if cluster == peer => {
                Some(Self::Node { tree: Tree::Cache, cluster: cluster.clone(), name: name.clone() })
            }
            Self::Identity { mirror_of, id } if mirror_of.as_ref().is_none_or(|name| name == peer) => {
                Some(Self::Identity { mirror_of: Some(peer.clone()), id: *id })
            }
            Self::Ip { mirror_of, entry } if mirror_of.as_ref().is_none_or(|name| name == peer) => {
                Some(Self::Ip { mirror_of: Some(peer.clone()), entry: *entry })
            }
            Self::Service(key) => object(key).map(Self::Service),
            Self::EndpointSlice(key) => object(key).map(Self::EndpointSlice),
            Self::ServiceExport(key) => object(key).map(Self::ServiceExport),
            Self::Synced { cluster, prefix: Prefix::State(resource) | Prefix::Cache(resource) }
                if cluster == peer =>
            {
                Some(Self::canary(peer, Prefix::Cache(*resource)))
            }
            _ => None,
        }
    }
}

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::parse(text.as_bytes())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let object = |f: &mut fmt::Formatter<'_>, resource: Resource, key: &ObjectKey| {
            write!(f, "cilium/{}/{resource}/v1/{}/{}/{}", key.tree, key.cluster, key.namespace, key.name)
        };
        match self {
            Self::Heartbeat => f.write_str(HEARTBEAT),
            Self::HasClusterConfig => f.write_str("cilium/.has-cluster-config"),
            Self::InitLock(rest) => write!(f, "cilium/.initlock/{rest}"),
            Self::KvStoreMeshLock(rest) => write!(f, "cilium/kvstoremesh-lock/{rest}"),
            Self::ClusterConfig(cluster) => write!(f, "{CLUSTER_CONFIGS}{cluster}"),
            Self::Synced { cluster, prefix } => write!(f, "{SYNCED}{cluster}/{prefix}"),
            Self::Node { tree, cluster, name } => write!(f, "cilium/{tree}/nodes/v1/{cluster}/{name}"),
            Self::Identity { mirror_of: None, id } => write!(f, "cilium/state/identities/v1/id/{id}"),
            Self::Identity { mirror_of: Some(peer), id } => {
                write!(f, "cilium/cache/identities/v1/{peer}/id/{id}")
            }
            Self::IdentityInternal(rest) => write!(f, "cilium/state/identities/v1/{rest}"),
            Self::Ip { mirror_of: None, entry } => write!(f, "cilium/state/ip/v1/default/{entry}"),
            Self::Ip { mirror_of: Some(peer), entry } => write!(f, "cilium/cache/ip/v1/{peer}/{entry}"),
            Self::Service(key) => object(f, Resource::Services, key),
            Self::EndpointSlice(key) => object(f, Resource::EndpointSlices, key),
            Self::ServiceExport(key) => object(f, Resource::ServiceExports, key),
            Self::LocalService { namespace, name } => {
                write!(f, "{}/{namespace}/{name}", crate::local::SERVICES)
            }
            Self::LocalPolicy(policy) => write!(f, "{}/{policy}", crate::local::POLICIES),
            Self::LocalNamespace(name) => write!(f, "{}/{name}", crate::local::NAMESPACES),
            Self::Refusing(cluster) => write!(f, "{}/{cluster}", crate::local::REFUSING),
        }
    }
}

fn parse(text: &str) -> Result<Key, KeyProblem> {
    let shape = |expected| KeyProblem::Shape { expected };
    if let Some(rest) = text.strip_prefix("isthmus/services/v1/") {
        let (namespace, name) =
            rest.split_once('/').ok_or(shape("isthmus/services/v1/<namespace>/<name>"))?;
        return Ok(Key::LocalService { namespace: namespace.parse()?, name: name.parse()? });
    }
    if let Some(rest) = text.strip_prefix("isthmus/policies/v1/") {
        return Ok(Key::LocalPolicy(rest.parse()?));
    }
    if let Some(rest) = text.strip_prefix("isthmus/namespaces/v1/") {
        return Ok(Key::LocalNamespace(rest.parse()?));
    }
    if let Some(rest) = text.strip_prefix("isthmus/refusing/v1/") {
        return Ok(Key::Refusing(rest.parse()?));
    }
    let rest = text.strip_prefix("cilium/").ok_or(KeyProblem::Unknown)?;
    let (head, tail) = rest.split_once('/').unwrap_or((rest, ""));
    match (head, tail) {
        (".heartbeat", "") if rest == ".heartbeat" => Ok(Key::Heartbeat),
        (".has-cluster-config", "") if rest == ".has-cluster-config" => Ok(Key::HasClusterConfig),
        (".initlock", tail) if !tail.is_empty() => Ok(Key::InitLock(tail.to_owned())),
        ("kvstoremesh-lock", tail) if !tail.is_empty() => Ok(Key::KvStoreMeshLock(tail.to_owned())),
        ("cluster-config", cluster) => Ok(Key::ClusterConfig(cluster.parse()?)),
        ("synced", tail) => {
            let (cluster, prefix) = tail.split_once('/').ok_or(shape("cilium/synced/<cluster>/<prefix>"))?;
            Ok(Key::Synced {
                cluster: cluster.parse()?,
                prefix: Prefix::parse(prefix).ok_or(KeyProblem::Unknown)?,
            })
        }
        ("state", tail) => parse_tree(Tree::State, tail),
        ("cache", tail) => parse_tree(Tree::Cache, tail),
        _ => Err(KeyProblem::Unknown),
    }
}

fn parse_tree(tree: Tree, text: &str) -> Result<Key, KeyProblem> {
    let shape = |expected| KeyProblem::Shape { expected };
    let (resource, rest) = text.split_once("/v1/").ok_or(KeyProblem::Unknown)?;
    let resource = Resource::parse(resource).ok_or(KeyProblem::Unknown)?;
    let object = || {
        let expected = "cilium/<tree>/<resource>/v1/<cluster>/<namespace>/<name>";
        let (cluster, rest) = rest.split_once('/').ok_or(shape(expected))?;
        let (namespace, name) = rest.split_once('/').ok_or(shape(expected))?;
        Ok::<_, KeyProblem>(ObjectKey {
            tree,
            cluster: cluster.parse()?,
            namespace: namespace.parse()?,
            name: name.parse()?,
        })
    };
    match resource {
        Resource::Services => object().map(Key::Service),
        Resource::EndpointSlices => object().map(Key::EndpointSlice),
        Resource::ServiceExports => object().map(Key::ServiceExport),
        Resource::Nodes => {
            let (cluster, name) =
                rest.split_once('/').ok_or(shape("cilium/<tree>/nodes/v1/<cluster>/<node>"))?;
            Ok(Key::Node { tree, cluster: cluster.parse()?, name: name.parse()? })
        }
        Resource::Identities => {
            let (mirror_of, rest) = match tree {
                Tree::State if rest.starts_with("value/") || rest.starts_with("locks/") => {
                    return Ok(Key::IdentityInternal(rest.to_owned()));
                }
                Tree::State => (None, rest),
                Tree::Cache => {
                    let (peer, rest) =
                        rest.split_once('/').ok_or(shape("cilium/cache/identities/v1/<cluster>/id/<id>"))?;
                    (Some(peer.parse()?), rest)
                }
            };
            let id = rest.strip_prefix("id/").ok_or(shape("cilium/state/identities/v1/id/<id>"))?;
            Ok(Key::Identity { mirror_of, id: parse_identity(id)? })
        }
        Resource::Ip => {
            let (space, entry) = rest
                .split_once('/')
                .ok_or(shape("cilium/state/ip/v1/default/<ip>, or cilium/cache/ip/v1/<cluster>/<ip>"))?;
            let mirror_of = match tree {
                Tree::State if space == "default" => None,
                Tree::State => return Err(shape("cilium/state/ip/v1/default/<ip>")),
                Tree::Cache => Some(space.parse()?),
            };
            let entry = entry.parse().map_err(|_| KeyProblem::Address(bounded(entry)))?;
            Ok(Key::Ip { mirror_of, entry })
        }
    }
}

fn parse_identity(text: &str) -> Result<NumericIdentity, KeyProblem> {
    let canonical = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    match text.parse() {
        Ok(id) if canonical => Ok(NumericIdentity(id)),
        _ => Err(KeyProblem::Identity(bounded(text))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_of_the_key_space_is_read_and_written_again() {
        for text in [
            "cilium/.heartbeat",
            "cilium/.has-cluster-config",
            "cilium/.initlock/ab12/1f",
            "cilium/kvstoremesh-lock/1f",
            "cilium/cluster-config/alpha",
            "cilium/synced/alpha/cilium/state/nodes/v1",
            "cilium/synced/alpha/cilium/cache/endpointslices/v1",
            "cilium/synced/alpha/isthmus/services/v1",
            "cilium/state/nodes/v1/alpha/node-1.example.org",
            "cilium/cache/nodes/v1/beta/node-1",
            "cilium/state/identities/v1/id/196915",
            "cilium/cache/identities/v1/beta/id/196915",
            "cilium/state/identities/v1/value/k8s:a=b;/10.0.0.1",
            "cilium/state/identities/v1/locks/k8s:a=b;",
            "cilium/state/ip/v1/default/10.244.0.77",
            "cilium/state/ip/v1/default/10.244.0.0/24",
            "cilium/state/ip/v1/default/fd00::1",
            "cilium/cache/ip/v1/beta/fd00::/64",
            "cilium/state/services/v1/alpha/app/echo",
            "cilium/cache/services/v1/beta/app/echo",
            "cilium/state/endpointslices/v1/alpha/app/echo-x1",
            "cilium/cache/serviceexports/v1/beta/app/echo",
            "isthmus/services/v1/app/echo",
            "isthmus/refusing/v1/beta",
        ] {
            let key = Key::parse(text.as_bytes()).expect(text);
            assert_eq!(key.to_string(), text);
        }
    }

    #[test]
    fn what_is_not_canonical_is_no_key() {
        for text in [
            "",
            "cilium",
            "cilium/",
            "/cilium/.heartbeat",
            "cilium/.heartbeat/",
            "cilium/.heartbeat/x",
            "cilium/cluster-config/",
            "cilium/cluster-config/a/b",
            "cilium/cluster-config/..",
            "cilium/synced/alpha",
            "cilium/synced/alpha/cilium/state/identities/v1/id",
            "cilium/state/nodes/v1/alpha",
            "cilium/state/nodes/v1/alpha/",
            "cilium/state/nodes/v1//node",
            "cilium/state/nodes/v2/alpha/node",
            "cilium/state/identities/v1/id/0196915",
            "cilium/state/identities/v1/id/+1",
            "cilium/state/identities/v1/id/4294967296",
            "cilium/cache/identities/v1/id/5",
            "cilium/state/ip/v1/other/10.0.0.1",
            "cilium/state/ip/v1/default/10.0.0.1/33",
            "cilium/state/ip/v1/default/10.0.0.01",
            "cilium/state/ip/v1/default/10.0.0.0/08",
            "cilium/state/ip/v1/default/FD00::1",
            "cilium/state/ip/v1/default/fd00:0::1",
            "cilium/state/services/v1/alpha/app",
            "cilium/state/services/v1/alpha/app/../echo",
            "cilium/state/services/v1/alpha/app/a/b",
            "isthmus/services/v1/app",
            "isthmus/refusing/v1/",
            "isthmus/refusing/v1/beta/x",
        ] {
            assert!(Key::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(Key::parse(&[b'c', 0xff]).is_err());
        let long = Key::parse(&vec![b'a'; MAX_BYTES + 1]).expect_err("too long");
        assert!(long.to_string().len() < 400);
    }

    #[test]
    fn a_relay_mirrors_a_peers_keys_and_no_others() {
        let beta: ClusterName = "beta".parse().expect("valid");
        let mirrored =
            |text: &str| Key::parse(text.as_bytes()).expect(text).mirrored(&beta).map(|key| key.to_string());
        for (from, to) in [
            ("cilium/state/nodes/v1/beta/n", Some("cilium/cache/nodes/v1/beta/n")),
            ("cilium/state/nodes/v1/alpha/n", None),
            ("cilium/state/identities/v1/id/7", Some("cilium/cache/identities/v1/beta/id/7")),
            ("cilium/cache/identities/v1/beta/id/7", Some("cilium/cache/identities/v1/beta/id/7")),
            ("cilium/cache/identities/v1/alpha/id/7", None),
            ("cilium/state/ip/v1/default/10.0.0.1", Some("cilium/cache/ip/v1/beta/10.0.0.1")),
            ("cilium/state/services/v1/beta/a/b", Some("cilium/cache/services/v1/beta/a/b")),
            ("cilium/state/services/v1/alpha/a/b", None),
            ("cilium/synced/beta/cilium/state/ip/v1", Some("cilium/synced/beta/cilium/cache/ip/v1")),
            ("cilium/cluster-config/beta", None),
            ("isthmus/services/v1/a/b", None),
            ("isthmus/policies/v1/networkpolicy/a/b", None),
            ("isthmus/namespaces/v1/a", None),
            ("isthmus/refusing/v1/beta", None),
        ] {
            assert_eq!(mirrored(from).as_deref(), to, "{from}");
        }
    }
}
