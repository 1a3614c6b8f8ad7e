//! Gateways on loopback, and clients that know them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use isthmus_kvstore::{
    client::steps::{self, Resolver, TlsProblem},
    config::{ClientConfig, Identity, LiveIdentity, Pem},
    gateway::{Gateway, Grants, LiveTls, Trust, TrustedAuthority, Vouches},
    memory::{Limits, MemoryStore, StoreId},
};
use tokio::time::Instant;

use crate::mint::{Mint, Minted, Wanted};

/// However slow the machine: later than this something hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A gateway of cluster alpha.
pub(crate) struct Place {
    pub(crate) store: MemoryStore,
    pub(crate) gateway: Gateway,
    pub(crate) identity: LiveIdentity,
    pub(crate) tls: LiveTls,
}

impl Place {
    /// One that shows this certificate and trusts these.
    pub(crate) async fn start(listen: SocketAddr, server: &Minted, trust: Trust) -> Self {
        let identity = server.live();
        let tls = LiveTls::new(identity.clone(), trust).unwrap();
        let store = MemoryStore::new(StoreId::random(), Limits::default());
        let grants = Grants::cluster_mesh("alpha");
        let gateway = Gateway::serve(listen, tls.clone(), store.clone(), grants).await.unwrap();
        Self { store, gateway, identity, tls }
    }

    /// One on a port of its own, with a good certificate of `own` and trust in `own`'s clients.
    pub(crate) async fn of(own: &Mint) -> Self {
        let server = own.mint(Wanted::server(&["127.0.0.1", "alpha.mesh.cilium.io"]));
        Self::start(([127, 0, 0, 1], 0).into(), &server, trust(&[(own, Vouches::Anyone)])).await
    }

    pub(crate) fn port(&self) -> u16 {
        self.gateway.local_addr().port()
    }

    /// How `identity` reaches it, trusting `authority`.
    pub(crate) fn config(&self, authority: &Mint, identity: &Minted) -> ClientConfig {
        config(&[&format!("https://127.0.0.1:{}", self.port())], authority, Some(identity.live()))
    }
}

impl Minted {
    pub(crate) fn live(&self) -> LiveIdentity {
        LiveIdentity::new(&self.certificate, &self.key).unwrap()
    }
}

pub(crate) fn config(endpoints: &[&str], authority: &Mint, identity: Option<LiveIdentity>) -> ClientConfig {
    ClientConfig {
        endpoints: endpoints.iter().map(|endpoint| endpoint.parse().unwrap()).collect(),
        trusted_ca: Some(Pem::Text(authority.pem.as_str().into())),
        identity: identity.map(Identity::Live),
        password: None,
        server_name: None,
        addresses: BTreeMap::<String, Vec<IpAddr>>::new(),
    }
}

pub(crate) fn trust(authorities: &[(&Mint, Vouches)]) -> Trust {
    let authorities = authorities
        .iter()
        .map(|(mint, vouches)| TrustedAuthority { pem: mint.pem.as_str().into(), vouches: vouches.clone() })
        .collect();
    Trust { authorities }
}

pub(crate) fn peer(name: &str) -> Vouches {
    Vouches::Peer(name.parse().unwrap())
}

/// All steps at the first endpoint; what is wrong with TLS, if anything is.
pub(crate) async fn try_to_connect(config: &ClientConfig) -> Result<etcd_client::Client, TlsProblem> {
    let endpoint = &config.endpoints[0];
    let resolved = Resolver::system().resolve(endpoint, &config.addresses).await.unwrap();
    let dialed = steps::dial(&resolved.addresses, Instant::now() + DEADLINE).await.unwrap();
    let secured = steps::handshake(config, endpoint, dialed.stream).await?;
    match steps::open(config, endpoint, secured).await {
        Ok(client) => Ok(client),
        Err(steps::OpenError::Tls(problem)) => Err(problem),
        Err(other) => panic!("{other}"),
    }
}

/// Waits until `condition` holds.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
