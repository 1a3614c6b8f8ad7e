//! Several gateways of one cluster, each over a store of its own: the one in use goes, the reader goes on with another.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use isthmus_kvstore::{
    Section,
    config::ClientConfig,
    gateway::{Gateway, Grants, TlsFiles},
    memory::{Limits, MemoryStore, StoreId},
    reader::{Reader, ReaderConfig},
};

use crate::{
    pki::Pki,
    proxy::Proxy,
    wait::{Consumer, until_status},
};

const PREFIX: &str = "cilium/state/nodes/v1/beta";
const CANARY: &str = "cilium/synced/beta/cilium/state/nodes/v1";

fn key(name: &str) -> String {
    format!("{PREFIX}/{name}")
}

/// What every replica exports, and what was ever deleted.
#[derive(Default)]
struct Export {
    keys: BTreeMap<String, String>,
    deleted: BTreeSet<String>,
}

struct Replica {
    store: MemoryStore,
    gateway: Gateway,
}

struct Replicas {
    pki: Pki,
    running: BTreeMap<SocketAddr, Replica>,
    export: Export,
    written: usize,
}

impl Replicas {
    /// One at each of these addresses of the loopback, on the same port.
    async fn start(addresses: &[IpAddr]) -> Self {
        let mut replicas =
            Self { pki: Pki::new(), running: BTreeMap::new(), export: Export::default(), written: 0 };
        let mut port = 0;
        for address in addresses {
            port = replicas.raise((*address, port).into()).await.port();
        }
        replicas
    }

    /// A replica with an empty store, which its exporter fills while it already serves.
    async fn raise(&mut self, listen: SocketAddr) -> SocketAddr {
        let store = MemoryStore::new(StoreId::random(), Limits::default());
        let tls = TlsFiles {
            certificate: self.pki.path("server.crt"),
            key: self.pki.path("server.key"),
            client_ca: self.pki.ca(),
        };
        let grants = Grants::cluster_mesh("beta");
        let gateway = Gateway::serve(listen, tls, store.clone(), grants).await.unwrap();
        store.put("cilium/cluster-config/beta", r#"{"id":2,"capabilities":{"syncedCanaries":true}}"#);
        for (key, value) in &self.export.keys {
            store.put(key.clone(), value.clone());
            tokio::task::yield_now().await;
        }
        store.put(CANARY, "now");
        let address = gateway.local_addr();
        self.running.insert(address, Replica { store, gateway });
        address
    }

    /// So many changes, at every replica that runs.
    async fn churn(&mut self, changes: usize) {
        for _ in 0..changes {
            self.written += 1;
            let (key, value) = (key(&format!("n{}", self.written % 23)), self.written.to_string());
            let delete = self.written.is_multiple_of(5) && self.export.keys.contains_key(&key);
            for replica in self.running.values() {
                if delete {
                    replica.store.delete(key.clone());
                } else {
                    replica.store.put(key.clone(), value.clone());
                }
            }
            if delete {
                self.export.keys.remove(&key);
                self.export.deleted.insert(key);
            } else {
                self.export.keys.insert(key, value);
            }
            tokio::task::yield_now().await;
        }
    }

    /// Ends the replica, in good order or at once.
    async fn end(&mut self, address: SocketAddr, in_order: bool) {
        let replica = self.running.remove(&address).unwrap();
        if in_order {
            replica.gateway.shutdown().await;
        }
    }

    /// Kills the replica in use again and again, changes going on all the while.
    async fn kill_the_one_in_use(&mut self, config: ClientConfig) {
        let reader = Reader::spawn("beta".parse().unwrap(), ReaderConfig::new(config));
        let mut consumer = Consumer::new(reader.follow(Section::new(PREFIX, Some(CANARY))));
        self.churn(100).await;
        consumer.until_synced().await;
        let mut used = BTreeSet::new();
        for round in 0..6 {
            let status = until_status(&reader, "ready", |status| status.ready()).await;
            let address = status.address.unwrap();
            used.insert(address);
            self.churn(50).await;
            self.end(address, round % 2 == 0).await;
            self.churn(50).await;
            let moved = until_status(&reader, "another replica", |status| {
                status.ready() && status.address != Some(address)
            })
            .await;
            assert_eq!(moved.failures, status.failures + 1, "the next one is taken at once: {moved:#?}");
            if round % 2 == 0 {
                let error = moved.last_error.unwrap_or_default();
                assert!(
                    error.contains("server stopped"),
                    "it was told to go, and had not to find out: {error}"
                );
            }
            self.churn(20).await;
            let export = &self.export.keys;
            consumer.until("the reader knows everything", |consumer| consumer.map == *export).await;
            self.raise(address).await;
        }
        assert_eq!(used.len(), 3, "all of them are used in turn: {used:?}");
        let never: Vec<_> =
            consumer.deleted.iter().filter(|key| !self.export.deleted.contains(*key)).collect();
        assert!(never.is_empty(), "told as deleted and never were: {never:?}");
    }
}

#[tokio::test]
async fn with_three_endpoints_no_event_is_lost_when_the_one_in_use_goes() {
    let addresses = [IpAddr::from([127, 0, 0, 1]), [127, 0, 0, 2].into(), [127, 0, 0, 3].into()];
    let mut replicas = Replicas::start(&addresses).await;
    let port = replicas.running.keys().next().unwrap().port();
    let mut config = replicas.pki.client("remote-alpha", port);
    config.server_name = Some("127.0.0.1".into());
    config.endpoints = addresses.map(|address| format!("https://{address}:{port}").parse().unwrap()).into();
    replicas.kill_the_one_in_use(config).await;
}

#[tokio::test]
async fn a_name_of_three_addresses_is_as_good_as_three_endpoints() {
    let addresses = [IpAddr::from([127, 0, 0, 1]), [127, 0, 0, 2].into(), [127, 0, 0, 3].into()];
    let mut replicas = Replicas::start(&addresses).await;
    let port = replicas.running.keys().next().unwrap().port();
    let mut config = replicas.pki.client("remote-alpha", port);
    config.server_name = Some("127.0.0.1".into());
    config.endpoints = vec![format!("https://gateways.beta.svc:{port}").parse().unwrap()];
    config.addresses.insert("gateways.beta.svc".into(), addresses.into());
    replicas.kill_the_one_in_use(config).await;
}

#[tokio::test]
async fn where_a_connection_has_died_is_tried_last() {
    let addresses = [IpAddr::from([127, 0, 0, 1]), [127, 0, 0, 2].into()];
    let replicas = Replicas::start(&addresses).await;
    let [first, second] = addresses.map(|address| {
        *replicas.running.keys().find(|replica| replica.ip() == address).expect("it was started")
    });
    // It goes on listening, as a gateway does that is about to end or whose packets are lost on the way.
    let proxy = Proxy::to(first.port()).await;
    let mut config = replicas.pki.client("remote-alpha", proxy.port);
    config.server_name = Some("127.0.0.1".into());
    config.endpoints.push(format!("https://{second}").parse().unwrap());
    let reader = Reader::spawn("beta".parse().unwrap(), ReaderConfig::new(config));
    let status = until_status(&reader, "connected", |status| status.connected()).await;
    assert_eq!(status.address.unwrap().port(), proxy.port);
    proxy.cut();
    let status =
        until_status(&reader, "connected again", |status| status.connected() && status.failures == 1).await;
    assert_eq!(status.address, Some(second));
    assert_eq!(proxy.accepted(), 1);
}
