//! The gateway's certificate and the authorities of its clients, as they are at each handshake.

mod files;
mod live;
mod trust;
mod verifier;

use std::path::PathBuf;
use std::sync::Arc;

use rustls::ServerConfig;
use tokio::sync::watch;

pub use self::files::TlsFiles;
use self::files::TlsReloader;
pub use self::live::LiveTls;
pub use self::trust::{Trust, TrustedAuthority, Vouches};
pub(super) use self::verifier::TrustVerifier;
use crate::pem::PemError;

/// Where a gateway's identity and trust come from.
#[derive(Clone, Debug)]
pub enum ServerTls {
    /// Files, looked at again when a client connects. Open connections stay whatever becomes of the files.
    Files(TlsFiles),
    /// Memory, changed by whoever holds a clone.
    Live(LiveTls),
}

impl From<TlsFiles> for ServerTls {
    fn from(files: TlsFiles) -> Self {
        Self::Files(files)
    }
}

impl From<LiveTls> for ServerTls {
    fn from(live: LiveTls) -> Self {
        Self::Live(live)
    }
}

/// Why a gateway's identity or trust cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file does not hold what it should.
    #[error("{} {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: PemError,
    },
    /// The files do not fit each other.
    #[error("{} and {} cannot be used together: {reason}", certificate.display(), key.display())]
    Mismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The certificates of an authority cannot be used.
    #[error("the authority that vouches for {vouches} {source}")]
    Authority {
        /// Whose authority it is.
        vouches: Vouches,
        /// What is wrong with its PEM.
        source: PemError,
    },
    /// A certificate is none that an authority can have.
    #[error("a certificate of the authority that vouches for {vouches} cannot be used: {reason}")]
    Anchor {
        /// Whose authority it is.
        vouches: Vouches,
        /// What is wrong.
        reason: String,
    },
    /// Nobody could connect.
    #[error("no authority is trusted, so no client could connect; name at least the own cluster's")]
    NoAuthority,
    /// TLS cannot be configured at all.
    #[error("TLS cannot be configured: {0}")]
    Configuration(#[from] rustls::Error),
}

/// What makes the configuration of each handshake.
#[derive(Debug)]
pub(super) enum Handshakes {
    Files(TlsReloader),
    Live(LiveTls),
}

impl Handshakes {
    pub(super) fn new(tls: ServerTls) -> Result<Self, TlsError> {
        match tls {
            ServerTls::Files(files) => TlsReloader::new(files).map(Self::Files),
            ServerTls::Live(live) => Ok(Self::Live(live)),
        }
    }

    /// What the next handshake is to use.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        match self {
            Self::Files(reloader) => reloader.config(),
            Self::Live(live) => live.config(),
        }
    }

    /// Where trust changes show to open connections, if they are to follow it.
    pub(super) fn trust(&self) -> Option<watch::Receiver<Arc<TrustVerifier>>> {
        match self {
            Self::Files(_) => None,
            Self::Live(live) => Some(live.verifier()),
        }
    }
}
