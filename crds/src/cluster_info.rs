//! What other clusters must know of this one: the ConfigMap `isthmus-cluster-info`, which holds nothing secret.

use std::collections::BTreeMap;

use isthmus_wire::{ClusterId, ClusterName, MaxConnectedClusters};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::bundle::{BundleError, CaBundle, brief};
use crate::cilium_identity::{MANAGED_BY, MANAGED_BY_LABEL};
use crate::names;
use crate::peer::server_name;

/// The key of the version.
const VERSION: &str = "version";

/// A cluster as its leading apiserver makes it known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClusterInfo {
    /// Its name.
    pub cluster: ClusterName,
    /// Its id.
    pub id: ClusterId,
    /// What its mesh is set up for.
    pub mesh: MaxConnectedClusters,
    /// The version of the apiserver.
    pub version: String,
    /// Every authority that is valid for the cluster now.
    pub ca: CaBundle,
    /// The name that the gateways' certificate is to be verified under.
    pub server_name: String,
}

/// Why a ConfigMap cannot be used. The message names the key and what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClusterInfoError {
    /// A key is missing.
    #[error("`{0}` is missing; the cluster's apiserver writes it: is it up, and does it lead?")]
    Missing(&'static str),
    /// A key has a value that cannot be used.
    #[error("`{key}` {problem}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The bundle of authorities cannot be used.
    #[error("`{key}`: {0}", key = names::CA_BUNDLE_KEY)]
    Ca(#[from] BundleError),
}

impl ClusterInfo {
    /// Reads the ConfigMap.
    ///
    /// # Errors
    /// A [`ClusterInfoError`] that names the key.
    pub fn parse(map: &ConfigMap) -> Result<Self, ClusterInfoError> {
        let data = map.data.as_ref();
        let text = |key: &'static str| {
            data.and_then(|data| data.get(key)).map(|text| text.trim()).ok_or(ClusterInfoError::Missing(key))
        };
        fn parsed<T>(key: &'static str, value: Result<T, String>) -> Result<T, ClusterInfoError> {
            value.map_err(|problem| ClusterInfoError::Invalid { key, problem })
        }
        let cluster = text(names::CLUSTER_NAME_KEY)?.parse::<ClusterName>();
        let id = text(names::CLUSTER_ID_KEY)?.parse::<ClusterId>();
        let mesh = match text(names::MAX_CONNECTED_CLUSTERS_KEY)? {
            "255" => Ok(MaxConnectedClusters::C255),
            "511" => Ok(MaxConnectedClusters::C511),
            other => Err(format!("is {:?}; it is 255 or 511", brief(other))),
        };
        Ok(Self {
            cluster: parsed(names::CLUSTER_NAME_KEY, cluster.map_err(|error| error.to_string()))?,
            id: parsed(names::CLUSTER_ID_KEY, id)?,
            mesh: parsed(names::MAX_CONNECTED_CLUSTERS_KEY, mesh)?,
            version: brief(text(VERSION)?),
            ca: CaBundle::parse(text(names::CA_BUNDLE_KEY)?)?,
            server_name: parsed(names::SERVER_NAME_KEY, server_name(text(names::SERVER_NAME_KEY)?))?,
        })
    }

    /// The ConfigMap to apply.
    pub fn to_config_map(&self, namespace: &str) -> ConfigMap {
        let data = [
            (names::CLUSTER_NAME_KEY, self.cluster.to_string()),
            (names::CLUSTER_ID_KEY, self.id.to_string()),
            (names::MAX_CONNECTED_CLUSTERS_KEY, self.mesh.number().to_string()),
            (VERSION, self.version.clone()),
            (names::CA_BUNDLE_KEY, self.ca.as_str().to_owned()),
            (names::SERVER_NAME_KEY, self.server_name.clone()),
        ];
        ConfigMap {
            metadata: ObjectMeta {
                name: Some(names::CLUSTER_INFO.to_owned()),
                namespace: Some(namespace.to_owned()),
                labels: Some(BTreeMap::from([
                    (MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned()),
                    (names::PART_OF_LABEL.to_owned(), names::PART_OF.to_owned()),
                ])),
                ..ObjectMeta::default()
            },
            data: Some(data.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
            ..ConfigMap::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> ClusterInfo {
        let cluster: ClusterName = "beta".parse().unwrap();
        ClusterInfo {
            id: ClusterId::try_from(2).unwrap(),
            mesh: MaxConnectedClusters::C511,
            version: "0.1.0".to_owned(),
            ca: CaBundle::parse(crate::bundle::tests::certificate("beta", true).0.trim()).unwrap(),
            server_name: names::default_server_name(&cluster),
            cluster,
        }
    }

    #[test]
    fn what_is_published_reads_back_the_same() {
        let map = info().to_config_map("isthmus-system");
        assert_eq!(map.data.as_ref().unwrap()["max-connected-clusters"], "511");
        assert_eq!(map.data.as_ref().unwrap()["server-name"], "beta.mesh.cilium.io");
        let read = ClusterInfo::parse(&map).unwrap();
        assert_eq!(read.cluster.as_str(), "beta");
        assert_eq!(read.to_config_map("isthmus-system"), map);
    }

    #[test]
    fn the_version_that_another_cluster_tells_is_short_and_nothing_that_a_terminal_obeys() {
        let mut map = info().to_config_map("isthmus-system");
        let hostile = format!("1\u{1b}]0;x\u{7}\n{}", "9".repeat(10_000));
        map.data.as_mut().unwrap().insert(VERSION.to_owned(), hostile);
        let version = ClusterInfo::parse(&map).unwrap().version;
        assert!(version.starts_with('1') && !version.contains(char::is_control), "{version:?}");
        assert!(version.chars().count() <= 121, "{version}");
    }

    #[test]
    fn every_key_is_named_when_it_is_missing_or_wrong() {
        let map = info().to_config_map("isthmus-system");
        for key in map.data.as_ref().unwrap().keys() {
            let mut without = map.clone();
            without.data.as_mut().unwrap().remove(key);
            let error = ClusterInfo::parse(&without).unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}` is missing")), "{error}");
            if key == VERSION {
                continue;
            }
            let mut wrong = map.clone();
            wrong.data.as_mut().unwrap().insert(key.clone(), "-?-".to_owned());
            let error = ClusterInfo::parse(&wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{error}");
        }
    }
}
