//! The Secrets' names.

/// The authority.
pub(super) const CA_SECRET: &str = "isthmus-ca";
/// Its Secret's type, if we have made it.
pub(super) const CA_SECRET_TYPE: &str = "isthmus.io/ca";
/// The gateway's certificate.
pub(super) const SERVER_SECRET: &str = "clustermesh-apiserver-server-cert";
/// Our relay's.
pub(super) const REMOTE_SECRET: &str = "clustermesh-apiserver-remote-cert";
/// For who operates the cluster.
pub(super) const ADMIN_SECRET: &str = "clustermesh-apiserver-admin-cert";
/// Cilium's agents'.
pub(super) const LOCAL_SECRET: &str = "clustermesh-apiserver-local-cert";
/// Our node agents'.
pub(super) const NODE_AGENT_SECRET: &str = "isthmus-node-agent-cert";
