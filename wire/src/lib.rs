//! The Cluster Mesh wire format: keys and values as Cilium writes and reads them, parsed at the edge.
//!
//! Nothing here does I/O. Bytes come in, types or typed errors come out, and the types emit the bytes that
//! Cilium's own components would have written: Go's JSON conventions, key spelling, address rendering.
//!
//! - [`Key`] and [`Prefix`]: the key space, in its `state` form (what a cluster exports) and its
//!   `cache` form (what a relay mirrors of a peer).
//! - [`value`]: what is stored under those keys, each with `decode` and `encode`.
//! - [`validate`]: what a reader must check before it believes a peer. Pure functions.
//! - [`annotation`]: the Service and Namespace annotations that make services global.
//! - [`pod_labels`]: the labels of a pod's identity.
//! - [`printable`]: what a peer wrote, for people to read.
//! - [`local`]: what only the cluster's own agents read; not part of Cilium's format.
//!
//! Every decoder is bounded in the bytes it reads and in the memory it uses, and never panics: a peer chooses
//! these bytes.
#![forbid(unsafe_code)]

pub mod annotation;
mod error;
mod gojson;
mod identity;
pub mod key;
mod labels;
pub mod local;
mod name;
pub mod pod_labels;
mod printable;
pub mod validate;
pub mod value;

pub use error::{DecodeError, ValueError};
pub use identity::{ClusterId, InvalidClusterId, MaxConnectedClusters, NumericIdentity};
pub use key::{Key, KeyError, Prefix, Resource, Tree};
pub use labels::{Label, Labels};
pub use name::{ClusterName, InvalidName, Namespace, ObjectName};
pub use printable::printable;
pub use value::{
    ClusterConfig, ClusterEndpointSlice, ClusterService, IpEntry, IpIdentityPair, McsApiServiceSpec, Node,
    Timestamp,
};
