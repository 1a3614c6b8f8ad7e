//! Cluster ids and numeric identities: how 24 bits are shared between clusters.

use std::fmt;
use std::num::NonZeroU16;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Id of a cluster, unique in the mesh: 1..=511. Whether more than 255 is allowed depends on
/// [`MaxConnectedClusters`], which every cluster of a mesh must share.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(NonZeroU16);

impl ClusterId {
    /// The id as a number, 1..=511.
    pub fn number(self) -> u16 {
        self.0.get()
    }
}

/// A number that is no cluster id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidClusterId {
    /// 0 means that the cluster has no id and cannot take part in a mesh.
    #[error("cluster id 0 means unset; a cluster in a mesh needs an id of its own, 1 to 255 (511)")]
    Unset,
    /// Beyond what nine bits hold.
    #[error("cluster id {0} is out of range; the highest is 511")]
    OutOfRange(u32),
    /// Valid in itself, but not in this mesh.
    #[error("cluster id {id} is above {max}, the highest with {max} connected clusters")]
    AboveMaximum {
        /// The id.
        id: ClusterId,
        /// What the mesh is set up for.
        max: MaxConnectedClusters,
    },
}

impl TryFrom<u32> for ClusterId {
    type Error = InvalidClusterId;

    fn try_from(id: u32) -> Result<Self, InvalidClusterId> {
        if id > 511 {
            return Err(InvalidClusterId::OutOfRange(id));
        }
        NonZeroU16::new(id as u16).map(Self).ok_or(InvalidClusterId::Unset)
    }
}

impl From<ClusterId> for u32 {
    fn from(id: ClusterId) -> Self {
        id.number().into()
    }
}

impl FromStr for ClusterId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let id: u32 = text.parse().map_err(|_| format!("{text:?} is not a number from 1 to 511"))?;
        Self::try_from(id).map_err(|error| error.to_string())
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Serialize for ClusterId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32((*self).into())
    }
}

impl<'de> Deserialize<'de> for ClusterId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::try_from(u32::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// How many clusters a mesh is set up for, which decides how the 24 bits of a numeric identity are split.
/// All clusters of a mesh must agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum MaxConnectedClusters {
    /// 8 bits of cluster id, 65,535 identities each. The default.
    #[default]
    C255,
    /// 9 bits of cluster id, 32,767 identities each.
    C511,
}

impl MaxConnectedClusters {
    /// The number itself: 255 or 511.
    pub fn number(self) -> u32 {
        match self {
            Self::C255 => 255,
            Self::C511 => 511,
        }
    }

    /// Bits of a numeric identity that are local to its cluster.
    pub fn shift(self) -> u32 {
        match self {
            Self::C255 => 16,
            Self::C511 => 15,
        }
    }

    /// Whether `cluster` may take part in such a mesh.
    ///
    /// # Errors
    /// [`InvalidClusterId::AboveMaximum`].
    pub fn admit(self, cluster: ClusterId) -> Result<(), InvalidClusterId> {
        if u32::from(cluster) > self.number() {
            return Err(InvalidClusterId::AboveMaximum { id: cluster, max: self });
        }
        Ok(())
    }

    /// The numeric identities that belong to `cluster`.
    pub fn identities(self, cluster: ClusterId) -> RangeInclusive<NumericIdentity> {
        let first = u32::from(cluster) << self.shift();
        NumericIdentity(first)..=NumericIdentity(first + (1 << self.shift()) - 1)
    }
}

impl TryFrom<u32> for MaxConnectedClusters {
    type Error = String;

    fn try_from(number: u32) -> Result<Self, String> {
        match number {
            255 => Ok(Self::C255),
            511 => Ok(Self::C511),
            other => Err(format!("maxConnectedClusters is either 255 or 511, not {other}")),
        }
    }
}

impl FromStr for MaxConnectedClusters {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<u32>().map_err(|_| format!("{text:?} is neither 255 nor 511"))?.try_into()
    }
}

impl fmt::Display for MaxConnectedClusters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.number(), f)
    }
}

impl Serialize for MaxConnectedClusters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.number())
    }
}

impl<'de> Deserialize<'de> for MaxConnectedClusters {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::try_from(u32::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A security identity as a number. Identities of a cluster are 24 bits, `cluster id << shift | local`;
/// 1..=255 are reserved and mean the same everywhere; above 24 bits they are local to a node and never travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NumericIdentity(pub u32);

impl NumericIdentity {
    /// The node the observer itself runs on.
    pub const HOST: Self = Self(1);
    /// Everything outside of the mesh.
    pub const WORLD: Self = Self(2);
    /// A pod that is not managed (yet).
    pub const UNMANAGED: Self = Self(3);
    /// A node's health endpoint.
    pub const HEALTH: Self = Self(4);
    /// A pod whose labels are not known yet.
    pub const INIT: Self = Self(5);
    /// Any other node, of this cluster or of another.
    pub const REMOTE_NODE: Self = Self(6);
    /// The Kubernetes API.
    pub const KUBE_APISERVER: Self = Self(7);
    /// A node's ingress endpoint.
    pub const INGRESS: Self = Self(8);

    /// Whether this is one of 1..=255, which mean the same in every cluster.
    pub fn is_reserved(self) -> bool {
        (1..256).contains(&self.0)
    }

    /// The cluster this identity belongs to; none for reserved and node-local ones.
    pub fn cluster(self, max: MaxConnectedClusters) -> Option<ClusterId> {
        if self.0 >= 1 << 24 {
            return None;
        }
        ClusterId::try_from(self.0 >> max.shift()).ok()
    }
}

impl fmt::Display for NumericIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_names_its_cluster_for_both_mesh_sizes() {
        let three = ClusterId::try_from(3).expect("valid");
        assert_eq!(NumericIdentity(196_915).cluster(MaxConnectedClusters::C255), Some(three));
        assert_eq!(NumericIdentity(3 << 15 | 7).cluster(MaxConnectedClusters::C511), Some(three));
        assert_eq!(NumericIdentity(4).cluster(MaxConnectedClusters::C255), None);
        assert_eq!(NumericIdentity(0x0100_0001).cluster(MaxConnectedClusters::C255), None);
        let last = ClusterId::try_from(511).expect("valid");
        assert_eq!(*MaxConnectedClusters::C511.identities(last).end(), NumericIdentity(0x00ff_ffff));
    }

    #[test]
    fn ids_out_of_range_are_refused() {
        assert_eq!(ClusterId::try_from(0), Err(InvalidClusterId::Unset));
        assert_eq!(ClusterId::try_from(512), Err(InvalidClusterId::OutOfRange(512)));
        assert_eq!(ClusterId::try_from(u32::MAX), Err(InvalidClusterId::OutOfRange(u32::MAX)));
        let high = ClusterId::try_from(256).expect("valid");
        assert!(MaxConnectedClusters::C255.admit(high).is_err());
        assert!(MaxConnectedClusters::C511.admit(high).is_ok());
    }
}
