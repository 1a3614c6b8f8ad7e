//! What a cluster says of itself: `cilium/cluster-config/<cluster>`.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{MAX_OBJECT_BYTES, json_value};
use crate::gojson::{Codec, Zero, go_object};
use crate::{ClusterId, MaxConnectedClusters};

go_object! {
    /// Id and capabilities of a cluster.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct ClusterConfig {
        /// The cluster's id. 0 (unset) is refused: such a cluster cannot take part in a mesh.
        pub id: ClusterId = "id" required,
        /// What it can do.
        pub capabilities: Capabilities = "capabilities" always,
    }
}

json_value!(ClusterConfig, MAX_OBJECT_BYTES);

go_object! {
    /// What a cluster's exporter does. Zero values are not written.
    #[derive(Debug, Clone, PartialEq, Eq, Default)]
    pub struct Capabilities {
        /// It writes sync canaries; readers wait for them.
        pub synced_canaries: bool = "syncedCanaries" omitempty,
        /// Its data is a mirror, found under `cilium/cache/`.
        pub cached: bool = "cached" omitempty,
        /// How many clusters its mesh is set up for. Absent means 255.
        pub max_connected_clusters: Option<MaxConnectedClusters> = "maxConnectedClusters" omitempty as OrUnset,
        /// Multi-Cluster Services API: none = unsupported, false = supported but off.
        pub service_exports_enabled: Option<bool> = "serviceExportsEnabled" omitempty,
        /// Which form backends are exported in.
        pub endpoint_slices_export_mode: EndpointSlicesExportMode = "endpointSlicesExportMode" omitempty,
    }
}

impl Capabilities {
    /// How many clusters its mesh is set up for.
    pub fn mesh_size(&self) -> MaxConnectedClusters {
        self.max_connected_clusters.unwrap_or_default()
    }
}

/// In which form a cluster exports the backends of its global services (Cilium 1.20 and later).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EndpointSlicesExportMode {
    /// `ClusterService` objects alone; the field is absent.
    #[default]
    ServicesOnly,
    /// Both forms.
    ServicesAndEndpointSlices,
    /// `ClusterEndpointSlice` objects alone.
    EndpointSlicesOnly,
}

impl EndpointSlicesExportMode {
    /// Whether `ClusterService` objects are exported.
    pub fn exports_services(self) -> bool {
        self != Self::EndpointSlicesOnly
    }

    /// Whether `ClusterEndpointSlice` objects are exported.
    pub fn exports_slices(self) -> bool {
        self != Self::ServicesOnly
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::ServicesOnly => "",
            Self::ServicesAndEndpointSlices => "services-and-endpointslices",
            Self::EndpointSlicesOnly => "endpointslices-only",
        }
    }
}

impl Zero for EndpointSlicesExportMode {
    fn is_zero(&self) -> bool {
        *self == Self::ServicesOnly
    }
}

impl Serialize for EndpointSlicesExportMode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for EndpointSlicesExportMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        [Self::ServicesOnly, Self::ServicesAndEndpointSlices, Self::EndpointSlicesOnly]
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| {
                serde::de::Error::unknown_variant(
                    &crate::error::bounded(text),
                    &["services-and-endpointslices", "endpointslices-only"],
                )
            })
    }
}

/// 0 stands for a field that was not set.
struct OrUnset;

impl Codec<Option<MaxConnectedClusters>> for OrUnset {
    fn serialize<S: Serializer>(
        value: &Option<MaxConnectedClusters>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(value.map_or(0, MaxConnectedClusters::number))
    }

    fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<MaxConnectedClusters>, D::Error> {
        match u32::deserialize(deserializer)? {
            0 => Ok(None),
            number => number.try_into().map(Some).map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn supported_but_off_is_not_the_same_as_unsupported() {
        let text = br#"{"id":3,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255,"serviceExportsEnabled":false}}"#;
        let config = ClusterConfig::decode(text).expect("valid");
        assert_eq!(config.capabilities.service_exports_enabled, Some(false));
        assert_eq!(config.encode().as_ref(), text);
        let old = ClusterConfig::decode(br#"{"id":3,"capabilities":{}}"#).expect("valid");
        assert_eq!(old.capabilities, Capabilities::default());
        assert_eq!(old.encode().as_ref(), br#"{"id":3,"capabilities":{}}"#);
    }

    #[test]
    fn numbers_that_mean_nothing_are_refused_by_name() {
        for (text, field) in [
            (r#"{"id":0}"#, "id"),
            (r#"{"id":512}"#, "id"),
            (r#"{"capabilities":{}}"#, "id"),
            (r#"{"id":1,"capabilities":{"maxConnectedClusters":128}}"#, "capabilities.maxConnectedClusters"),
            (
                r#"{"id":1,"capabilities":{"endpointSlicesExportMode":"x"}}"#,
                "capabilities.endpointSlicesExportMode",
            ),
        ] {
            let error = ClusterConfig::decode(text.as_bytes()).expect_err(text).to_string();
            assert!(error.contains(&format!("`{field}`")), "{text}: {error}");
        }
    }
}
