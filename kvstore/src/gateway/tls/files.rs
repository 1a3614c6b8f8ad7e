//! Identity and trust in files, read again when they change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::sign::CertifiedKey;

use super::verifier::TrustVerifier;
use super::{LiveTls, TlsError, Vouches};
use crate::config::{IdentityError, LiveIdentity, certified_key};
use crate::pem;

/// How often the files are looked at, at most.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Where the gateway's identity and trust lie, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The gateway's certificate, followed by intermediate ones if there are any.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities whose clients are let in, whatever their names.
    pub client_ca: PathBuf,
}

/// Follows the files.
#[derive(Debug)]
pub(in crate::gateway) struct TlsReloader {
    files: TlsFiles,
    identity: LiveIdentity,
    live: LiveTls,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    content: Content,
    at: Instant,
}

#[derive(PartialEq, Eq)]
struct Content {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Vec<u8>,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Content").finish_non_exhaustive()
    }
}

impl TlsReloader {
    pub(super) fn new(files: TlsFiles) -> Result<Self, TlsError> {
        let content = Content::read(&files)?;
        let (certified, verifier) = content.parse(&files)?;
        let identity = LiveIdentity::of(certified);
        let live = LiveTls::with(identity.clone(), None, verifier)?;
        let seen = Mutex::new(Seen { content, at: Instant::now() });
        Ok(Self { files, identity, live, seen })
    }

    /// What the next handshake is to use: the files as they are now or, while they cannot be used (a rotation that is
    /// under way writes them one by one), as they were last.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.at.elapsed() >= LOOK_AGAIN_AFTER {
            seen.at = Instant::now();
            match self.reload(&seen.content) {
                Ok(None) => {}
                Ok(Some(content)) => {
                    tracing::info!(certificate = %self.files.certificate.display(), "certificates reloaded");
                    seen.content = content;
                }
                Err(error) => {
                    tracing::warn!(%error, "certificates not reloaded, the previous ones stay in use")
                }
            }
        }
        self.live.config()
    }

    fn reload(&self, known: &Content) -> Result<Option<Content>, TlsError> {
        let content = Content::read(&self.files)?;
        if content == *known {
            return Ok(None);
        }
        let (certified, verifier) = content.parse(&self.files)?;
        self.live.trust_by(None, verifier)?;
        self.identity.set(certified);
        Ok(Some(content))
    }
}

impl Content {
    fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let read =
            |path: &Path| pem::read(path).map_err(|source| TlsError::File { path: path.to_owned(), source });
        Ok(Self {
            certificate: read(&files.certificate)?,
            key: read(&files.key)?,
            client_ca: read(&files.client_ca)?,
        })
    }

    fn parse(&self, files: &TlsFiles) -> Result<(CertifiedKey, TrustVerifier), TlsError> {
        let in_file = |path: &Path, source| TlsError::File { path: path.to_owned(), source };
        let certified = certified_key(&self.certificate, &self.key).map_err(|error| match error {
            IdentityError::Certificate(source) => in_file(&files.certificate, source),
            IdentityError::Key(source) => in_file(&files.key, source),
            IdentityError::Mismatch(error) => TlsError::Mismatch {
                certificate: files.certificate.clone(),
                key: files.key.clone(),
                reason: error.to_string(),
            },
        })?;
        let authorities =
            pem::certificates(&self.client_ca).map_err(|source| in_file(&files.client_ca, source))?;
        let verifier = TrustVerifier::new([(Vouches::Anyone, authorities)])?;
        Ok((certified, verifier))
    }
}
