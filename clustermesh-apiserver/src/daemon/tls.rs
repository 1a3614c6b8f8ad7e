//! Who the gateway is, and whom it trusts.

use std::sync::Arc;

use isthmus_kvstore::config::LiveIdentity;
use isthmus_kvstore::gateway::{LiveTls, ServerTls, TlsError, TlsFiles, Trust, TrustedAuthority, Vouches};
use tokio::sync::watch;

use crate::certificates::{Bundles, Certificates};
use crate::relay::Authorities;
use crate::tasks::Tasks;

/// Where the gateway's certificates come from.
pub(super) enum Identities {
    /// Files, kept by somebody else.
    Files(TlsFiles),
    /// Secrets.
    Secrets(Certificates),
}

/// The gateway's side of TLS.
pub(super) enum GatewayTls {
    Files(TlsFiles),
    Secrets {
        live: LiveTls,
        bundles: Bundles,
        /// Who our relay is towards peers.
        remote: LiveIdentity,
    },
}

impl Identities {
    /// With certificates in Secrets it waits until they are there.
    pub(super) async fn open(&self) -> Result<GatewayTls, TlsError> {
        match self {
            Self::Files(files) => Ok(GatewayTls::Files(files.clone())),
            Self::Secrets(certificates) => {
                let in_use = certificates.in_use().await;
                let live = LiveTls::new(in_use.server, trust(&in_use.bundle, &Vec::new()))?;
                Ok(GatewayTls::Secrets { live, bundles: certificates.bundles(), remote: in_use.remote })
            }
        }
    }

    pub(super) fn certificates(&self) -> Option<&Certificates> {
        match self {
            Self::Files(_) => None,
            Self::Secrets(certificates) => Some(certificates),
        }
    }
}

impl GatewayTls {
    /// What the gateway is given. With certificates in Secrets, whom it trusts follows them, and `peers`.
    pub(super) fn serve(self, peers: watch::Receiver<Authorities>, tasks: &Tasks) -> ServerTls {
        let (live, bundles) = match self {
            Self::Files(files) => return files.into(),
            Self::Secrets { live, bundles, .. } => (live, bundles),
        };
        tasks.spawn("the following of whom the gateway trusts", follow(live.clone(), bundles, peers));
        live.into()
    }

    /// Who our relay is towards peers, if that is in a Secret.
    pub(super) fn remote(&self) -> Option<&LiveIdentity> {
        match self {
            Self::Files(_) => None,
            Self::Secrets { remote, .. } => Some(remote),
        }
    }
}

async fn follow(live: LiveTls, mut bundles: Bundles, mut peers: watch::Receiver<Authorities>) {
    loop {
        let bundle = bundles.present();
        let present = peers.borrow_and_update().clone();
        if let Some(bundle) = &bundle
            && let Err(error) = live.set_trust(trust(bundle, &present))
        {
            tracing::error!(%error, "the gateway goes on with the authorities that it trusted before");
        }
        tokio::select! {
            () = bundles.changed_from(bundle.as_ref()) => {}
            Ok(()) = peers.changed() => {}
        }
    }
}

/// The own authorities vouch for any name, those of a peer for that peer alone.
fn trust(own: &Arc<str>, peers: &Authorities) -> Trust {
    let own = TrustedAuthority { pem: Arc::clone(own), vouches: Vouches::Anyone };
    let peers = peers
        .iter()
        .map(|(name, pem)| TrustedAuthority { pem: Arc::clone(pem), vouches: Vouches::Peer(name.clone()) });
    // One that cannot be used is no reason to ignore the others.
    let usable = peers.filter(|peer| match peer.check() {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "nobody is let in on the word of this authority");
            false
        }
    });
    Trust { authorities: std::iter::once(own).chain(usable).collect() }
}
