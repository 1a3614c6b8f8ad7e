//! PEM as it comes from files and Secrets: bounded, and parsed once.

use std::{
    fmt,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

/// The most that one PEM text may hold, in bytes: what a Secret can.
pub const MAX_PEM_BYTES: usize = 1 << 20;
/// The most certificates in one PEM text. The bundles of operating systems have about 150.
const MAX_CERTIFICATES: usize = 512;

/// PEM in a file, which is read anew whenever it is needed, or at hand.
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// In this file.
    File(PathBuf),
    /// This text. Never shown by `Debug`.
    Text(Arc<str>),
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Text(text) => write!(f, "Text({} bytes)", text.len()),
        }
    }
}

/// Why a PEM text cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PemError {
    /// The file is missing or unreadable.
    #[error("cannot be read: {0}; check that it exists and that this process may read it")]
    Unreadable(String),
    /// Longer than [`MAX_PEM_BYTES`].
    #[error("is longer than {MAX_PEM_BYTES} bytes, which is no certificate; check what was put there")]
    TooLong,
    /// A block cannot be decoded.
    #[error("is not valid PEM: {0}")]
    Syntax(String),
    /// There is no `CERTIFICATE` block.
    #[error("holds no PEM certificate; it should begin with -----BEGIN CERTIFICATE-----")]
    NoCertificate,
    /// There are more certificates than anybody needs.
    #[error("holds more than {MAX_CERTIFICATES} certificates; keep those that are needed")]
    TooMany,
    /// There is no private key.
    #[error("holds no PEM private key that can be used (PKCS#8, PKCS#1 or SEC1): {0}")]
    NoKey(String),
}

impl Pem {
    /// The certificates in it, at least one.
    pub(crate) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, PemError> {
        match self {
            Self::File(path) => certificates(&read(path)?),
            Self::Text(text) => certificates(text.as_bytes()),
        }
    }
}

/// Reads a file of PEM.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, PemError> {
    let mut pem = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_PEM_BYTES as u64 + 1).read_to_end(&mut pem))
        .map_err(|error| PemError::Unreadable(error.to_string()))?;
    bounded(&pem)?;
    Ok(pem)
}

/// The certificates in a PEM text, at least one. Other blocks are passed over.
pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    bounded(pem)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .take(MAX_CERTIFICATES + 1)
        .collect::<Result<_, _>>()
        .map_err(|error| PemError::Syntax(error.to_string()))?;
    match certificates.len() {
        0 => Err(PemError::NoCertificate),
        count if count > MAX_CERTIFICATES => Err(PemError::TooMany),
        _ => Ok(certificates),
    }
}

/// The first private key in a PEM text.
pub(crate) fn private_key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, PemError> {
    bounded(pem)?;
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| PemError::NoKey(error.to_string()))
}

fn bounded(pem: &[u8]) -> Result<(), PemError> {
    if pem.len() > MAX_PEM_BYTES { Err(PemError::TooLong) } else { Ok(()) }
}
