//! What the objects are called that Isthmus keeps in a cluster, and that people and other tools meet there.
//!
//! The certificates' Secrets bear the names that Cilium gives them, so that its clients mount them unchanged.

/// The namespace of everything here, unless another is chosen.
pub const DEFAULT_NAMESPACE: &str = "isthmus-system";
/// Who Isthmus is towards the Kubernetes API when it applies an object.
pub const FIELD_MANAGER: &str = "isthmus";

/// ConfigMap: the name and the id of the cluster, as whoever installs it sets them.
pub const CONFIG: &str = "isthmus-config";
/// ConfigMap: what other clusters must know of this one, published by its leading apiserver. See
/// [`ClusterInfo`](crate::ClusterInfo).
pub const CLUSTER_INFO: &str = "isthmus-cluster-info";
/// Key of [`CONFIG`] and [`CLUSTER_INFO`]: the cluster's name.
pub const CLUSTER_NAME_KEY: &str = "cluster-name";
/// Key of [`CONFIG`] and [`CLUSTER_INFO`]: the cluster's id, in decimal.
pub const CLUSTER_ID_KEY: &str = "cluster-id";
/// Key of [`CONFIG`] and [`CLUSTER_INFO`]: what the mesh is set up for, 255 or 511.
pub const MAX_CONNECTED_CLUSTERS_KEY: &str = "max-connected-clusters";

/// Secret of type [`CA_SECRET_TYPE`]: the cluster's own certificate authority.
pub const CA_SECRET: &str = "isthmus-ca";
/// Type of [`CA_SECRET`].
pub const CA_SECRET_TYPE: &str = "isthmus.io/ca";
/// Key of [`CA_SECRET`]: during a rotation, the certificate of the authority that comes next.
pub const NEXT_CERTIFICATE_KEY: &str = "next.crt";
/// Key of [`CA_SECRET`]: during a rotation, the private key of the authority that comes next.
pub const NEXT_KEY_KEY: &str = "next.key";
/// Key of [`CA_SECRET`]: at the end of a rotation, the certificate of the authority that is to be trusted no more.
pub const FORMER_CERTIFICATE_KEY: &str = "former.crt";

/// Key of a Secret: a certificate, PEM.
pub const CERTIFICATE_KEY: &str = "tls.crt";
/// Key of a Secret: the private key of the certificate, PEM.
pub const PRIVATE_KEY_KEY: &str = "tls.key";
/// Key of a Secret or ConfigMap: the authorities that are trusted, a PEM bundle.
pub const CA_BUNDLE_KEY: &str = "ca.crt";
/// Key of [`CLUSTER_INFO`] and of a peer's Secret: the name that a gateway's certificate is verified under.
pub const SERVER_NAME_KEY: &str = "server-name";

/// Secret of type `kubernetes.io/tls`: the gateway.
pub const SERVER_CERT_SECRET: &str = "clustermesh-apiserver-server-cert";
/// Secret of type `kubernetes.io/tls`: who the relay is towards peers, `remote-<cluster>`.
pub const REMOTE_CERT_SECRET: &str = "clustermesh-apiserver-remote-cert";
/// Secret of type `kubernetes.io/tls`: a person who operates the cluster, `admin-<cluster>`.
pub const ADMIN_CERT_SECRET: &str = "clustermesh-apiserver-admin-cert";
/// Secret of type `kubernetes.io/tls`: Cilium's agents, `local-<cluster>`.
pub const LOCAL_CERT_SECRET: &str = "clustermesh-apiserver-local-cert";
/// Secret of type `kubernetes.io/tls`: node-agents, `agent-<cluster>`.
pub const AGENT_CERT_SECRET: &str = "isthmus-node-agent-cert";

/// Service and Deployment or StatefulSet: the apiserver.
pub const APISERVER: &str = "clustermesh-apiserver";
/// The port of the Service [`APISERVER`], and of the gateway.
pub const GATEWAY_PORT: u16 = 2379;
/// DaemonSet: the node-agents.
pub const NODE_AGENT: &str = "isthmus-node-agent";
/// Lease: which replica of the apiserver leads.
pub const LEASE: &str = "isthmus-clustermesh-apiserver";

/// The label that says what a thing belongs to.
pub const PART_OF_LABEL: &str = "app.kubernetes.io/part-of";
/// The value of [`PART_OF_LABEL`] on everything of Isthmus.
pub const PART_OF: &str = "isthmus";

/// The name under which the gateways of a cluster are verified unless another is given: `<cluster>.mesh.cilium.io`, one of
/// the names in every gateway's certificate (wire format, section A.7).
pub fn default_server_name(cluster: &isthmus_wire::ClusterName) -> String {
    format!("{cluster}.mesh.cilium.io")
}
