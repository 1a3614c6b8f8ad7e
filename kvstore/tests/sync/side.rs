//! The two kinds of store that a reader meets: a real etcd, and our gateway over a store in memory.

use std::{net::Ipv4Addr, sync::Arc};

use isthmus_kvstore::{
    config::ClientConfig,
    gateway::{Gateway, Grants, TlsFiles},
    memory::{Limits, MemoryStore, Mutation, StoreId},
};

use crate::{etcd::Etcd, pki::Pki};

/// Which kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    Etcd,
    Gateway,
}

/// A store that can be read over the network, and changed from the outside.
pub(crate) enum Side {
    Etcd { etcd: Etcd, client: Box<etcd_client::Client> },
    Gateway { store: MemoryStore, port: u16, pki: Arc<Pki>, _gateway: Gateway },
}

impl Side {
    pub(crate) async fn start(engine: Engine) -> Self {
        match engine {
            Engine::Etcd => Self::of(Etcd::start().await).await,
            Engine::Gateway => Self::gateway(Arc::new(Pki::new())).await,
        }
    }

    /// Another store under the same authority.
    pub(crate) async fn start_like(other: &Self) -> Self {
        match other {
            Self::Etcd { etcd, .. } => Self::of(Etcd::start_like(etcd).await).await,
            Self::Gateway { pki, .. } => Self::gateway(Arc::clone(pki)).await,
        }
    }

    async fn of(etcd: Etcd) -> Self {
        let client = Box::new(etcd.client().await);
        Self::Etcd { etcd, client }
    }

    async fn gateway(pki: Arc<Pki>) -> Self {
        let store = MemoryStore::new(StoreId::random(), Limits::default());
        let tls = TlsFiles {
            certificate: pki.path("server.crt"),
            key: pki.path("server.key"),
            client_ca: pki.ca(),
        };
        let listen = (Ipv4Addr::LOCALHOST, 0).into();
        let grants = Grants::cluster_mesh("beta");
        let gateway = Gateway::serve(listen, tls, store.clone(), grants).await.unwrap();
        let port = gateway.local_addr().port();
        Self::Gateway { store, port, pki, _gateway: gateway }
    }

    pub(crate) fn port(&self) -> u16 {
        match self {
            Self::Etcd { etcd, .. } => etcd.port,
            Self::Gateway { port, .. } => *port,
        }
    }

    pub(crate) fn pki(&self) -> &Pki {
        match self {
            Self::Etcd { etcd, .. } => &etcd.pki,
            Self::Gateway { pki, .. } => pki,
        }
    }

    /// How a peer reaches it.
    pub(crate) fn config(&self) -> ClientConfig {
        self.config_at(self.port())
    }

    /// As [`Side::config`], through another port.
    pub(crate) fn config_at(&self, port: u16) -> ClientConfig {
        self.pki().client("remote-alpha", port)
    }

    pub(crate) async fn put(&self, key: &str, value: &str) {
        match self {
            Self::Etcd { client, .. } => {
                client.kv_client().put(key, value, None).await.unwrap();
            }
            Self::Gateway { store, .. } => {
                store.put(key.to_owned(), value.to_owned());
            }
        }
    }

    /// All at one revision; at most 128.
    pub(crate) async fn put_all(&self, pairs: Vec<(String, String)>) {
        match self {
            Self::Etcd { client, .. } => {
                let puts: Vec<_> =
                    pairs.into_iter().map(|(key, value)| etcd_client::TxnOp::put(key, value, None)).collect();
                client.kv_client().txn(etcd_client::Txn::new().and_then(puts)).await.unwrap();
            }
            Self::Gateway { store, .. } => {
                store.apply(pairs.into_iter().map(|(key, value)| Mutation::put(key, value)).collect());
            }
        }
    }

    pub(crate) async fn delete(&self, key: &str) {
        match self {
            Self::Etcd { client, .. } => {
                client.kv_client().delete(key, None).await.unwrap();
            }
            Self::Gateway { store, .. } => {
                store.delete(key.to_owned());
            }
        }
    }

    /// Forgets all history, so far as it can be told from outside.
    pub(crate) async fn compact(&self) {
        match self {
            Self::Etcd { client, .. } => {
                let revision = client.kv_client().get("x", None).await.unwrap().header().unwrap().revision();
                // Somebody else may have compacted to there already.
                let _ = client.kv_client().compact(revision, None).await;
            }
            Self::Gateway { store, .. } => {
                let _ = store.compact(store.revision());
            }
        }
    }
}

/// Makes of each `async fn name(engine: Engine)` a test on etcd and one on the gateway.
macro_rules! on_both_engines {
    ($($name:ident),* $(,)?) => {
        mod on_etcd {
            $(
                #[tokio::test]
                async fn $name() {
                    super::$name(crate::side::Engine::Etcd).await;
                }
            )*
        }
        mod on_the_gateway {
            $(
                #[tokio::test]
                async fn $name() {
                    super::$name(crate::side::Engine::Gateway).await;
                }
            )*
        }
    };
}
pub(crate) use on_both_engines;
