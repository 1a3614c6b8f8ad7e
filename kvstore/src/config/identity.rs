//! Who a client or a server is in TLS: a certificate with its key, in files or replaced in memory.

use std::{fmt, path::PathBuf, sync::Arc};

use rustls::sign::CertifiedKey;
use tokio::sync::watch;

use crate::{
    certificate::Certificate,
    pem::{self, PemError},
};

/// Where a client's certificate and key come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// Two files, read anew at each handshake.
    Files(IdentityFiles),
    /// In memory, the present one at each handshake.
    Live(LiveIdentity),
}

/// The two PEM files that make up a client's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The certificate, followed by the intermediate certificates if there are any.
    pub cert_file: PathBuf,
    /// The private key of the certificate: PKCS#8, PKCS#1 or SEC1.
    pub key_file: PathBuf,
}

/// A certificate chain and its key that may be replaced at any time. Each handshake takes the present one; connections
/// that exist are not touched. Clones share it, and only they are equal to it.
#[derive(Clone)]
pub struct LiveIdentity(Arc<watch::Sender<Arc<CertifiedKey>>>);

/// Why a certificate and a key do not make an identity.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IdentityError {
    /// The certificate cannot be used.
    #[error("the certificate {0}")]
    Certificate(#[source] PemError),
    /// The key cannot be used.
    #[error("the private key {0}")]
    Key(#[source] PemError),
    /// The two do not belong together, or are of a kind that TLS here does not know.
    #[error("the certificate and the private key cannot be used together: {0}; were both renewed?")]
    Mismatch(#[source] rustls::Error),
}

impl LiveIdentity {
    /// An identity of a PEM chain, the own certificate first, and its PEM key.
    ///
    /// # Errors
    /// [`IdentityError`] when one of them cannot be used, or they do not belong together.
    pub fn new(certificate: &str, key: &str) -> Result<Self, IdentityError> {
        Ok(Self::of(certified_key(certificate.as_bytes(), key.as_bytes())?))
    }

    /// What is used from the next handshake on. An unusable one changes nothing.
    ///
    /// # Errors
    /// As [`LiveIdentity::new`].
    pub fn replace(&self, certificate: &str, key: &str) -> Result<(), IdentityError> {
        self.set(certified_key(certificate.as_bytes(), key.as_bytes())?);
        Ok(())
    }

    pub(crate) fn of(certified: CertifiedKey) -> Self {
        Self(Arc::new(watch::Sender::new(Arc::new(certified))))
    }

    pub(crate) fn set(&self, certified: CertifiedKey) {
        self.0.send_if_modified(|current| {
            // The same one, written again, is no other one.
            let differs = current.cert != certified.cert;
            *current = Arc::new(certified);
            differs
        });
    }

    /// The present one.
    pub(crate) fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.borrow())
    }

    /// Changes when another certificate takes the place of the present one.
    fn renewals(&self) -> watch::Receiver<Arc<CertifiedKey>> {
        self.0.subscribe()
    }

    /// What the present certificate says of itself, none if it cannot be understood.
    pub fn certificate(&self) -> Option<Certificate> {
        Certificate::parse(self.current().cert.first()?)
    }
}

impl PartialEq for LiveIdentity {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for LiveIdentity {}

impl fmt::Debug for LiveIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LiveIdentity")
            .field(&self.certificate().map(|certificate| certificate.subject))
            .finish()
    }
}

impl IdentityFiles {
    /// The identity that the files hold now.
    ///
    /// # Errors
    /// [`IdentityError`] when one of them cannot be used, or they do not belong together.
    pub(crate) fn read(&self) -> Result<CertifiedKey, IdentityError> {
        let certificate = pem::read(&self.cert_file).map_err(IdentityError::Certificate)?;
        let key = pem::read(&self.key_file).map_err(IdentityError::Key)?;
        certified_key(&certificate, &key)
    }
}

impl Identity {
    /// What a handshake that begins now shows.
    ///
    /// # Errors
    /// As [`IdentityError`] says, where it is in files.
    pub(crate) fn current(&self) -> Result<Arc<CertifiedKey>, IdentityError> {
        match self {
            Self::Files(files) => files.read().map(Arc::new),
            Self::Live(live) => Ok(live.current()),
        }
    }
}

/// Whether the certificate that there was has been replaced since.
#[derive(Debug)]
pub(crate) struct Renewal(Option<watch::Receiver<Arc<CertifiedKey>>>);

impl Renewal {
    /// Of the certificate that is shown now. Files tell nothing of themselves until they are read.
    pub(crate) fn of(identity: Option<&Identity>) -> Self {
        Self(match identity {
            Some(Identity::Live(live)) => Some(live.renewals()),
            Some(Identity::Files(_)) | None => None,
        })
    }

    /// Waits until it has been replaced, for ever if nobody can any more.
    pub(crate) async fn comes(&mut self) {
        if let Some(receiver) = &mut self.0
            && receiver.changed().await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }
}

pub(crate) fn certified_key(certificate: &[u8], key: &[u8]) -> Result<CertifiedKey, IdentityError> {
    let chain = pem::certificates(certificate).map_err(IdentityError::Certificate)?;
    let key = pem::private_key(key).map_err(IdentityError::Key)?;
    CertifiedKey::from_der(chain, key, &rustls::crypto::ring::default_provider())
        .map_err(IdentityError::Mismatch)
}
