//! Why a Secret describes no peer.

use crate::bundle::BundleError;

/// Why a Secret describes no peer. The message names the key and what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerSecretError {
    /// Of another type.
    #[error("its type is {0:?}, not {type_}; a type cannot be changed, so delete it and create it anew", type_ = super::PEER_SECRET_TYPE)]
    Type(String),
    /// A key that must be there is not, or is empty.
    #[error("`{0}` is missing or empty; {advice}", advice = advice(.0))]
    Missing(&'static str),
    /// A value is longer than one of its kind needs to be.
    #[error("`{key}` is {length} bytes long, and at most {max} are taken")]
    TooLong {
        /// The key.
        key: &'static str,
        /// How long it is.
        length: usize,
        /// How long it may be.
        max: usize,
    },
    /// A value is not UTF-8.
    #[error("`{0}` is not text; was it encoded twice?")]
    NotText(&'static str),
    /// A value cannot be used.
    #[error("`{key}` {problem}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The authorities cannot be used.
    #[error("`{key}`: {0}", key = super::CA_BUNDLE)]
    Ca(#[from] BundleError),
    /// Of a certificate and its key, one is missing.
    #[error(
        "`{given}` is given without `{missing}`; give both, or neither to use the cluster's own certificate"
    )]
    Unpaired {
        /// The one that is there.
        given: &'static str,
        /// The other.
        missing: &'static str,
    },
}

fn advice(key: &str) -> &'static str {
    match key {
        super::CLUSTER_NAME => "put the peer's cluster name there",
        super::ENDPOINTS => "list where the peer's gateways are, https://HOST:PORT, one per line",
        _ => "put the certificate of the peer's authority there, PEM",
    }
}
