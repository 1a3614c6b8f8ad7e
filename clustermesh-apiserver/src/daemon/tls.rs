//! Who the gateway is, and whom it trusts.

use std::collections::BTreeMap;
use std::sync::Arc;

use isthmus_kvstore::gateway::{LiveTls, ServerTls, TlsError, TlsFiles, Trust, TrustedAuthority, Vouches};
use isthmus_wire::ClusterName;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::certificates::{Bundles, Certificates};

/// Where the gateway's certificates come from.
pub(super) enum Identities {
    /// Files, kept by somebody else.
    Files(TlsFiles),
    /// Secrets.
    Secrets(Certificates),
}

/// The authorities of the peers that are connected, PEM.
pub(super) type PeerAuthorities = BTreeMap<ClusterName, Arc<str>>;

impl Identities {
    /// The gateway's side of TLS. With certificates in Secrets it waits until they are there, and follows them until
    /// `shutdown`.
    pub(super) async fn open(
        &self,
        peers: watch::Receiver<PeerAuthorities>,
        shutdown: &CancellationToken,
    ) -> Result<ServerTls, TlsError> {
        let certificates = match self {
            Self::Files(files) => return Ok(files.clone().into()),
            Self::Secrets(certificates) => certificates,
        };
        let in_use = certificates.in_use().await;
        let live = LiveTls::new(in_use.server, trust(&in_use.bundle, &BTreeMap::new()))?;
        let following = follow(live.clone(), certificates.bundles(), peers);
        let shutdown = shutdown.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(following).await });
        Ok(live.into())
    }

    pub(super) fn certificates(&self) -> Option<&Certificates> {
        match self {
            Self::Files(_) => None,
            Self::Secrets(certificates) => Some(certificates),
        }
    }
}

async fn follow(live: LiveTls, mut bundles: Bundles, mut peers: watch::Receiver<PeerAuthorities>) {
    loop {
        let bundle = bundles.present();
        if let Some(bundle) = &bundle {
            let present = peers.borrow_and_update().clone();
            // Each is found to be usable before it comes here: what fails now fails for a reason nobody knows.
            if let Err(error) = live.set_trust(trust(bundle, &present)) {
                tracing::error!(%error, "the gateway goes on with the authorities that it trusted before");
            }
        }
        tokio::select! {
            () = bundles.changed_from(bundle.as_ref()) => {}
            Ok(()) = peers.changed() => {}
        }
    }
}

/// The own authorities vouch for any name, those of a peer for that peer alone.
fn trust(own: &Arc<str>, peers: &PeerAuthorities) -> Trust {
    let own = TrustedAuthority { pem: Arc::clone(own), vouches: Vouches::Anyone };
    let peers = peers
        .iter()
        .map(|(name, pem)| TrustedAuthority { pem: Arc::clone(pem), vouches: Vouches::Peer(name.clone()) });
    let usable = peers.filter(|peer| match peer.check() {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "nobody is let in on this authority's word");
            false
        }
    });
    Trust { authorities: std::iter::once(own).chain(usable).collect() }
}
