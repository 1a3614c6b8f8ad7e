//! TLS with a store, with authorities, certificate and key as they are now.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use chrono::{DateTime, Utc};
use rustls::{
    DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::ServerName,
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::problem::{Circumstances, TlsProblem};
use crate::{
    certificate::{Certificate, Validity},
    config::{ClientConfig, Endpoint, Pem},
};

/// A connection on which HTTP/2 can begin.
pub struct Secured {
    pub(super) stream: Box<dyn Stream>,
    /// What an error that comes later means. None without TLS.
    pub(super) circumstances: Option<Circumstances>,
    /// The server's certificate and those above it, as it showed them. Empty without TLS.
    pub chain: Vec<Certificate>,
    /// The name that was verified. None without TLS.
    pub name: Option<String>,
    /// The version of TLS, as `TLSv1_3`. None without TLS.
    pub version: Option<String>,
}

impl std::fmt::Debug for Secured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secured")
            .field("chain", &self.chain)
            .field("name", &self.name)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// What bytes go over.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// This side's own certificate as it is now, and how its validity stands. None if there is none to show.
///
/// # Errors
/// [`TlsProblem::Identity`] when it or its key cannot be used.
pub fn own_certificate(
    config: &ClientConfig,
    now: DateTime<Utc>,
) -> Result<Option<(Certificate, Validity)>, TlsProblem> {
    let certified = identity(config)?;
    let certificate = certified.and_then(|certified| Certificate::parse(certified.cert.first()?));
    Ok(certificate.map(|certificate| {
        let validity = certificate.validity(now);
        (certificate, validity)
    }))
}

/// Makes a connection secure, if `endpoint` says that it shall be: the server must have a certificate for
/// `config.server_name` or, without one, for the endpoint's host.
///
/// That the server takes this side's certificate is known only when it speaks: see [`open`](super::open::open).
///
/// # Errors
/// [`TlsProblem`]
pub async fn handshake(
    config: &ClientConfig,
    endpoint: &Endpoint,
    tcp: TcpStream,
) -> Result<Secured, TlsProblem> {
    if !endpoint.tls {
        return Ok(Secured {
            stream: Box::new(tcp),
            circumstances: None,
            chain: Vec::new(),
            name: None,
            version: None,
        });
    }
    let expected = config.server_name.clone().unwrap_or_else(|| endpoint.host.clone());
    let name =
        ServerName::try_from(expected.clone()).map_err(|_| TlsProblem::Name { name: expected.clone() })?;
    let identity = identity(config)?;
    let own = identity.as_ref().and_then(|identity| Certificate::parse(identity.cert.first()?));
    let (roots, trusted) = roots(config)?;
    let shown = Arc::new(Shown::default());
    let tls = tls_config(roots, identity, &shown)?;
    let mut circumstances = Circumstances { expected: expected.clone(), chain: Vec::new(), trusted, own };
    match TlsConnector::from(Arc::new(tls)).connect(name, tcp).await {
        Err(error) => {
            circumstances.chain = shown.take();
            Err(circumstances.explain(&error))
        }
        Ok(stream) => {
            let (_, session) = stream.get_ref();
            let chain = session.peer_certificates().unwrap_or_default();
            let chain = chain.iter().filter_map(Certificate::parse).collect();
            let version = session.protocol_version().map(|version| format!("{version:?}"));
            let (name, circumstances) = (Some(expected), Some(circumstances));
            Ok(Secured { stream: Box::new(stream), circumstances, chain, name, version })
        }
    }
}

fn identity(config: &ClientConfig) -> Result<Option<Arc<CertifiedKey>>, TlsProblem> {
    config.identity.as_ref().map(|identity| identity.current().map_err(TlsProblem::Identity)).transpose()
}

/// The authorities that are trusted, and their names.
fn roots(config: &ClientConfig) -> Result<(RootCertStore, Vec<String>), TlsProblem> {
    let trusted = config.trusted_ca.as_ref().ok_or(TlsProblem::NoTrust)?;
    let unusable = |reason: String| TlsProblem::Trust {
        place: match trusted {
            Pem::File(path) => format!("trusted-ca-file {}", path.display()),
            Pem::Text(_) => "the peer's ca.crt".into(),
        },
        reason,
    };
    let mut roots = RootCertStore::empty();
    let mut names = Vec::new();
    for certificate in trusted.certificates().map_err(|error| unusable(error.to_string()))? {
        names
            .extend(Certificate::parse(&certificate).map(|certificate| format!("{:?}", certificate.subject)));
        roots.add(certificate).map_err(|error| {
            unusable(format!("holds a certificate that cannot be an authority's: {error}"))
        })?;
    }
    names.dedup();
    Ok((roots, names))
}

fn tls_config(
    roots: RootCertStore,
    identity: Option<Arc<CertifiedKey>>,
    shown: &Arc<Shown>,
) -> Result<rustls::ClientConfig, TlsProblem> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| TlsProblem::Other(error.to_string()))?;
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsProblem::Other(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Remembering { verifier, shown: Arc::clone(shown) }));
    let mut tls = match identity {
        None => builder.with_no_client_auth(),
        Some(certified) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified))),
    };
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(tls)
}

/// The certificates that the server has shown, for whoever has to say what was wrong with them.
#[derive(Debug, Default)]
struct Shown(Mutex<Vec<CertificateDer<'static>>>);

impl Shown {
    fn take(&self) -> Vec<CertificateDer<'static>> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Verifies as webpki does, and remembers what it has seen.
#[derive(Debug)]
struct Remembering {
    verifier: Arc<WebPkiServerVerifier>,
    shown: Arc<Shown>,
}

impl ServerCertVerifier for Remembering {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verifier.verify_server_cert(end_entity, intermediates, name, ocsp, now).inspect_err(|_| {
            let chain = std::iter::once(end_entity).chain(intermediates);
            let chain = chain.map(|certificate| certificate.clone().into_owned()).collect();
            *self.shown.0.lock().unwrap_or_else(PoisonError::into_inner) = chain;
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}
