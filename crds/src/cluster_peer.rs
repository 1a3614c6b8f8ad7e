//! `ClusterPeer`: how the connection to another cluster is. Written by the leading apiserver, read by people and tools.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time};
use kube::{CustomResource, CustomResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Condition: the peer's gateway answers.
pub const CONNECTED: &str = "Connected";
/// Condition: everything that the peer shares is mirrored, and followed now.
pub const SYNCED: &str = "Synced";
/// Condition: both, and the peer takes part in the mesh. What `kubectl wait --for=condition=Ready` waits for.
pub const READY: &str = "Ready";
/// Condition, the only one of a peer of which nothing is read: it may read from this cluster.
pub const ADMITTED: &str = "Admitted";

/// Where a peer's configuration comes from.
///
/// A ClusterPeer says how things are and configures nothing: it is made when a peer is configured, and goes when the peer
/// was removed and everything that was mirrored of it is gone. Its name is the peer's cluster name.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "isthmus.io",
    version = "v1alpha1",
    kind = "ClusterPeer",
    plural = "clusterpeers",
    shortname = "cpeer",
    category = "isthmus",
    status = "ClusterPeerStatus",
    derive = "PartialEq",
    doc = "How the connection to another cluster of the mesh is. Written by Isthmus; it configures nothing.",
    printcolumn = r#"{"name": "Relation", "type": "string", "jsonPath": ".spec.relation",
        "description": "Connected: this cluster reads from the peer. Admitted: only the peer reads from this cluster."}"#,
    printcolumn = r#"{"name": "ID", "type": "integer", "jsonPath": ".status.clusterID"}"#,
    printcolumn = r#"{"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name": "Reason", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].reason"}"#,
    printcolumn = r#"{"name": "Data Age", "type": "date", "jsonPath": ".status.confirmed",
        "description": "Time since everything mirrored was last known to be complete."}"#,
    printcolumn = r#"{"name": "Lag", "type": "integer", "jsonPath": ".status.revisionLag"}"#,
    printcolumn = r#"{"name": "Endpoint", "type": "string", "jsonPath": ".status.endpoint"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct ClusterPeerSpec {
    /// What configures the peer.
    pub source: PeerSource,
    /// The Secret that does, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<SecretName>,
    /// Whether the peer is read from, or may only read from this cluster.
    #[serde(default)]
    pub relation: PeerRelation,
}

/// What a peer is to a cluster: it is read from (`Connected`), or it may read from the cluster while nothing is read from it
/// (`Admitted`), of which there is nothing that could be ready or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PeerRelation {
    /// It is read from.
    #[default]
    Connected,
    /// It may read.
    Admitted,
}

/// What configures a peer: a `Secret` of type `isthmus.io/peer`, or a file in the `Directory` of etcd client
/// configurations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PeerSource {
    /// A Secret.
    Secret,
    /// A file.
    Directory,
}

/// A Secret.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct SecretName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// One version of a Secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretVersion {
    /// Its uid.
    pub uid: String,
    /// Its resource version.
    pub resource_version: String,
}

/// How the connection is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterPeerStatus {
    /// The peer's cluster id, once it takes part in the mesh.
    #[serde(rename = "clusterID", default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<i32>,
    /// The endpoint in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The version of the Secret that the connection is made by, or the last one was, or that the peer is admitted by. One
    /// that cannot be used is never named here, and none is if no Secret configures the peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_secret: Option<SecretVersion>,
    /// Connected, Synced and Ready; of a peer that is admitted, and of which nothing is read, Admitted alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// When everything mirrored was last known to be complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirmed: Option<Time>,
    /// Seconds from then until this status was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_age_seconds: Option<i64>,
    /// The revision of the peer's store that everything mirrored is known to be complete up to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<i64>,
    /// How many revisions of the peer's store are not mirrored yet, at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision_lag: Option<i64>,
    /// What is mirrored.
    #[serde(default)]
    pub counts: PeerCounts,
    /// How often the connection failed, since the apiserver that writes this started.
    #[serde(default)]
    pub failures: i64,
    /// The last failure, also after recovery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// When that was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<Time>,
    /// When this status was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated: Option<Time>,
}

/// How many of each are mirrored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerCounts {
    /// Nodes.
    pub nodes: i64,
    /// Security identities.
    pub identities: i64,
    /// Pod addresses.
    pub endpoints: i64,
    /// Global services.
    pub services: i64,
    /// Endpoint slices of global services.
    pub endpoint_slices: i64,
    /// Services exported through the Multi-Cluster Services API.
    pub service_exports: i64,
}

impl SecretVersion {
    /// The version of an object that the API server has answered with.
    pub fn of(secret: &ObjectMeta) -> Option<Self> {
        Some(Self { uid: secret.uid.clone()?, resource_version: secret.resource_version.clone()? })
    }

    /// Whether who knows this version knows what `written` says, or what was written over it since.
    pub fn includes(&self, written: &Self) -> bool {
        let number = |version: &Self| version.resource_version.parse::<u64>();
        self.uid == written.uid
            && match (number(self), number(written)) {
                (Ok(own), Ok(written)) => own >= written,
                // Versions of an API server that does not count tell only whether they are the same.
                _ => self.resource_version == written.resource_version,
            }
    }
}

impl ClusterPeer {
    /// The condition of a type, if the status has it.
    pub fn condition(&self, type_: &str) -> Option<&Condition> {
        self.status.as_ref()?.conditions.iter().find(|condition| condition.type_ == type_)
    }

    /// Whether the condition of a type is true.
    pub fn is(&self, type_: &str) -> bool {
        self.condition(type_).is_some_and(|condition| condition.status == "True")
    }
}

/// The definition.
pub(crate) fn definition() -> CustomResourceDefinition {
    ClusterPeer::crd()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_peer_that_is_ready_reads_back_the_same() {
        let value = json!({
            "apiVersion": "isthmus.io/v1alpha1",
            "kind": "ClusterPeer",
            "metadata": {"name": "beta"},
            "spec": {
                "source": "Secret", "secret": {"namespace": "isthmus-system", "name": "peer-beta"},
                "relation": "Connected",
            },
            "status": {
                "clusterID": 2,
                "endpoint": "https://192.0.2.1:2379",
                "observedSecret": {"uid": "u", "resourceVersion": "7"},
                "conditions": [{
                    "type": "Ready", "status": "True", "reason": "Mirrored", "message": "",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }],
                "confirmed": "2026-01-01T00:00:00Z",
                "dataAgeSeconds": 0,
                "revision": 7,
                "revisionLag": 0,
                "counts": {
                    "nodes": 1, "identities": 2, "endpoints": 3, "services": 4, "endpointSlices": 0,
                    "serviceExports": 0,
                },
                "failures": 0,
            },
        });
        let peer: ClusterPeer = serde_json::from_value(value.clone()).unwrap();
        assert!(peer.is(READY));
        assert!(!peer.is(SYNCED), "a condition that is not there is not true");
        assert_eq!(peer.spec.relation, PeerRelation::Connected);
        assert_eq!(serde_json::to_value(&peer).unwrap(), value);
    }

    #[test]
    fn a_version_includes_those_before_it_of_the_same_secret() {
        let version = |uid: &str, version: &str| SecretVersion {
            uid: uid.to_owned(),
            resource_version: version.to_owned(),
        };
        let written = version("u", "99");
        assert!(version("u", "99").includes(&written));
        assert!(version("u", "100").includes(&written), "they are numbers, not words");
        assert!(!version("u", "98").includes(&written));
        assert!(
            !version("v", "100").includes(&written),
            "another Secret of the same name says nothing of this one"
        );
        assert!(version("u", "b").includes(&version("u", "b")));
        assert!(!version("u", "b").includes(&version("u", "a")));
        assert_eq!(SecretVersion::of(&ObjectMeta::default()), None);
    }

    #[test]
    fn the_definition_is_cluster_scoped_and_has_a_status_of_its_own() {
        let definition = serde_json::to_value(definition()).unwrap();
        assert_eq!(definition["metadata"]["name"], "clusterpeers.isthmus.io");
        assert_eq!(definition["spec"]["scope"], "Cluster");
        assert_eq!(definition["spec"]["names"]["shortNames"], json!(["cpeer"]));
        let version = &definition["spec"]["versions"][0];
        assert_eq!(version["subresources"], json!({"status": {}}));
        let schema = &version["schema"]["openAPIV3Schema"]["properties"];
        assert_eq!(schema["spec"]["properties"]["source"]["enum"], json!(["Secret", "Directory"]));
        let relation = &schema["spec"]["properties"]["relation"];
        assert_eq!(relation["enum"], json!(["Connected", "Admitted"]));
        assert_eq!(relation["default"], "Connected", "one that an earlier version wrote");
        assert_eq!(
            schema["status"]["properties"]["conditions"]["x-kubernetes-list-map-keys"],
            json!(["type"])
        );
    }
}
