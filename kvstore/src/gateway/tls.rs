//! The gateway's certificate and the authority of its clients, read again when their files change.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Larger files are no certificates.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// How often the files are looked at, at most.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Where the gateway's identity and trust lie, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The gateway's certificate, followed by intermediate ones if there are any.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities whose clients are let in.
    pub client_ca: PathBuf,
}

/// Why the TLS files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: {source}; check that it exists and that this process may read it", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file is too large.
    #[error("{}: larger than {MAX_FILE_BYTES} bytes, which is no certificate; check the path", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{}: {reason}; it must be PEM", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
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
}

/// Makes the configuration of each handshake.
#[derive(Debug)]
pub(super) struct TlsReloader {
    files: TlsFiles,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    content: Content,
    config: Arc<ServerConfig>,
    looked_at: Instant,
}

#[derive(Debug, PartialEq, Eq)]
struct Content {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Vec<u8>,
}

impl TlsReloader {
    pub(super) fn new(files: TlsFiles) -> Result<Self, TlsError> {
        let content = Content::read(&files)?;
        let config = Arc::new(content.config(&files)?);
        let looked_at = Instant::now();
        Ok(Self { files, current: Mutex::new(Current { content, config, looked_at }) })
    }

    /// What the next handshake is to use: the files as they are now or, while they cannot be used (a rotation that is
    /// under way writes them one by one), as they were last.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked_at.elapsed() >= LOOK_AGAIN_AFTER {
            current.looked_at = Instant::now();
            match self.reload(&current.content) {
                Ok(None) => {}
                Ok(Some((content, config))) => {
                    tracing::info!(certificate = %self.files.certificate.display(), "certificates reloaded");
                    current.content = content;
                    current.config = Arc::new(config);
                }
                Err(error) => {
                    tracing::warn!(%error, "certificates not reloaded, the previous ones stay in use")
                }
            }
        }
        current.config.clone()
    }

    fn reload(&self, known: &Content) -> Result<Option<(Content, ServerConfig)>, TlsError> {
        let content = Content::read(&self.files)?;
        if content == *known {
            return Ok(None);
        }
        let config = content.config(&self.files)?;
        Ok(Some((content, config)))
    }
}

impl Content {
    fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        Ok(Self {
            certificate: read(&files.certificate)?,
            key: read(&files.key)?,
            client_ca: read(&files.client_ca)?,
        })
    }

    fn config(&self, files: &TlsFiles) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for authority in certificates(&files.client_ca, &self.client_ca)? {
            roots.add(authority).map_err(|error| parse_error(&files.client_ca, &error))?;
        }
        let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
            .build()
            .map_err(|error| parse_error(&files.client_ca, &error))?;
        let chain = certificates(&files.certificate, &self.certificate)?;
        let key =
            PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| parse_error(&files.key, &error))?;
        let mismatch = |error: rustls::Error| TlsError::Mismatch {
            certificate: files.certificate.clone(),
            key: files.key.clone(),
            reason: error.to_string(),
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(mismatch)?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)
            .map_err(mismatch)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // No resumption: every connection shows a certificate that the present authorities vouch for.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    use std::io::Read as _;
    let failed = |source| TlsError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut content = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() as u64 > MAX_FILE_BYTES {
        return Err(TlsError::TooLarge { path: path.to_owned() });
    }
    Ok(content)
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| parse_error(path, &error))?;
    if certificates.is_empty() {
        return Err(parse_error(path, &"it holds no certificate"));
    }
    Ok(certificates)
}

fn parse_error(path: &Path, reason: &dyn std::fmt::Display) -> TlsError {
    TlsError::Parse { path: path.to_owned(), reason: reason.to_string() }
}
