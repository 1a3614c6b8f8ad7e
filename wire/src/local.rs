//! What only a cluster's own agents read, under `isthmus/`. With it an agent needs nothing from the Kubernetes API but the
//! pods of its own node. Not part of Cilium's format; the version is in the key.
//!
//! | key | value |
//! |---|---|
//! | `isthmus/services/v1/<namespace>/<name>` | [`LocalService`] |
//! | `isthmus/policies/v1/<kind>/<namespace or ->/<name>` | [`LocalPolicy`] |
//! | `isthmus/namespaces/v1/<name>` | [`LocalNamespace`] |
//! | `isthmus/refusing/v1/<cluster>` | `true`, while that peer refuses this cluster; no key otherwise, and no canary |

mod namespace;
mod policy;
mod service;

pub use namespace::{LocalNamespace, NAMESPACES};
pub use policy::{LocalPolicy, POLICIES, PolicyKey, PolicyKind};
pub use service::{LocalBackend, LocalPort, LocalService, SERVICES};

/// Prefix of the keys of peers that refuse this cluster, without its trailing slash. There is no canary: a key counts from the
/// moment it is there, and where there is none nothing follows.
pub const REFUSING: &str = "isthmus/refusing/v1";
