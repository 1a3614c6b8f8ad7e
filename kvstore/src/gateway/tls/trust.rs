//! Whose word counts for which names.

use std::fmt;
use std::sync::Arc;

use isthmus_wire::ClusterName;

use super::TlsError;
use super::verifier::TrustVerifier;
use crate::certificate::CommonName;

/// The authorities whose clients a gateway lets in. An authority that is listed more than once may vouch for the names
/// of all its entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    /// The own cluster's, and those of peers.
    pub authorities: Vec<TrustedAuthority>,
}

/// An authority, and what it may say.
#[derive(Clone, PartialEq, Eq)]
pub struct TrustedAuthority {
    /// Its certificates, as PEM. Several while it is being exchanged.
    pub pem: Arc<str>,
    /// The names that it may vouch for.
    pub vouches: Vouches,
}

impl fmt::Debug for TrustedAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrustedAuthority").field("vouches", &self.vouches).finish_non_exhaustive()
    }
}

impl TrustedAuthority {
    /// Whether it can be used, for whoever wants to leave out one that cannot before it spoils a whole [`Trust`].
    ///
    /// # Errors
    /// [`TlsError`] says what is wrong with it.
    pub fn check(&self) -> Result<(), TlsError> {
        TrustVerifier::of(&Trust { authorities: vec![self.clone()] }).map(drop)
    }
}

/// The names for which an authority's word counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vouches {
    /// Any name: the own cluster's authority, or one that several clusters share.
    Anyone,
    /// The clients of one peer: `remote` and `remote-<its name>`, nobody else's.
    Peer(ClusterName),
}

impl fmt::Display for Vouches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anyone => f.write_str("any name"),
            Self::Peer(cluster) => write!(f, "cluster {cluster}"),
        }
    }
}

impl Vouches {
    /// Whether a certificate with this common name may come from such an authority.
    pub(super) fn cover(&self, name: &CommonName) -> bool {
        match (self, name) {
            // Which of several names counts is read differently by different programs.
            (_, CommonName::Several) => false,
            // Without a name there is nothing that it may read.
            (Self::Anyone, CommonName::None | CommonName::One(_)) => true,
            (Self::Peer(_), CommonName::None) => false,
            (Self::Peer(cluster), CommonName::One(name)) => {
                name == "remote" || name.strip_prefix("remote-") == Some(cluster.as_str())
            }
        }
    }
}
