//! Identity and trust that change while connections live.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::ServerConfig;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;

use super::verifier::TrustVerifier;
use super::{TlsError, Trust};
use crate::config::LiveIdentity;

/// A server's identity and trust in memory. Clones share them.
///
/// - The **identity** is what [`LiveIdentity::replace`] made of it last, at each handshake. Connections that exist go
///   on.
/// - **Trust** holds for handshakes from [`LiveTls::set_trust`] on, and for open connections too: those whose client
///   would not be let in any more are ended soon. A certificate that has merely expired since ends nothing.
#[derive(Clone)]
pub struct LiveTls(Arc<Shared>);

struct Shared {
    identity: LiveIdentity,
    current: Mutex<Current>,
    verifier: watch::Sender<Arc<TrustVerifier>>,
}

struct Current {
    /// What it was made of, to notice what changes nothing.
    trust: Option<Trust>,
    config: Arc<ServerConfig>,
}

impl LiveTls {
    /// A server that shows `identity` and lets in whom `trust` vouches for.
    ///
    /// # Errors
    /// [`TlsError`] names the authority that cannot be used.
    pub fn new(identity: LiveIdentity, trust: Trust) -> Result<Self, TlsError> {
        let verifier = TrustVerifier::of(&trust)?;
        Self::with(identity, Some(trust), verifier)
    }

    /// Trusts these authorities from now on, and no others. On an error everything stays as it was.
    ///
    /// # Errors
    /// As [`LiveTls::new`].
    pub fn set_trust(&self, trust: Trust) -> Result<(), TlsError> {
        if self.lock().trust.as_ref() == Some(&trust) {
            return Ok(());
        }
        let verifier = TrustVerifier::of(&trust)?;
        self.trust_by(Some(trust), verifier)
    }

    pub(super) fn with(
        identity: LiveIdentity,
        trust: Option<Trust>,
        verifier: TrustVerifier,
    ) -> Result<Self, TlsError> {
        let verifier = Arc::new(verifier);
        let config = server_config(&identity, &verifier)?;
        let current = Mutex::new(Current { trust, config });
        Ok(Self(Arc::new(Shared { identity, current, verifier: watch::Sender::new(verifier) })))
    }

    pub(super) fn trust_by(&self, trust: Option<Trust>, verifier: TrustVerifier) -> Result<(), TlsError> {
        let mut current = self.lock();
        let verifier = Arc::new(verifier.after(&self.0.verifier.borrow()));
        let config = server_config(&self.0.identity, &verifier)?;
        *current = Current { trust, config };
        self.0.verifier.send_replace(verifier);
        Ok(())
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        self.lock().config.clone()
    }

    pub(super) fn verifier(&self) -> watch::Receiver<Arc<TrustVerifier>> {
        self.0.verifier.subscribe()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Current> {
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for LiveTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveTls").field("identity", &self.0.identity).finish_non_exhaustive()
    }
}

fn server_config(
    identity: &LiveIdentity,
    verifier: &Arc<TrustVerifier>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier.clone())
        .with_cert_resolver(Arc::new(Present(identity.clone())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    // No resumption: every connection shows a certificate that the present authorities vouch for.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Shows whatever the identity is now.
#[derive(Debug)]
struct Present(LiveIdentity);

impl ResolvesServerCert for Present {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current())
    }
}
