//! Who a client or a server is in TLS: a certificate with its key, in files or replaced in memory.

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
};

use rustls::sign::CertifiedKey;

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
pub struct LiveIdentity(Arc<RwLock<Arc<CertifiedKey>>>);

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
        let certified = certified_key(certificate.as_bytes(), key.as_bytes())?;
        Ok(Self(Arc::new(RwLock::new(Arc::new(certified)))))
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
        Self(Arc::new(RwLock::new(Arc::new(certified))))
    }

    pub(crate) fn set(&self, certified: CertifiedKey) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(certified);
    }

    /// The present one.
    pub(crate) fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
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

pub(crate) fn certified_key(certificate: &[u8], key: &[u8]) -> Result<CertifiedKey, IdentityError> {
    let chain = pem::certificates(certificate).map_err(IdentityError::Certificate)?;
    let key = pem::private_key(key).map_err(IdentityError::Key)?;
    CertifiedKey::from_der(chain, key, &rustls::crypto::ring::default_provider())
        .map_err(IdentityError::Mismatch)
}
