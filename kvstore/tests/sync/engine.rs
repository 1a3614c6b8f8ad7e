//! The store that follows a real etcd.

use std::time::Duration;

use isthmus_kvstore::{
    etcd::{EtcdConfig, EtcdEnd, EtcdEngine},
    memory::{KeyRange, MemoryStore, RangeRequest, WatchRequest},
};

use crate::{etcd::Etcd, proxy::Proxy, wait};

/// Both hold the same keys, with the same values, revisions, versions and leases.
async fn same(etcd: &Etcd, store: &MemoryStore) -> bool {
    let mut client = etcd.client().await;
    let theirs = client.get(vec![0], Some(etcd_client::GetOptions::new().with_all_keys())).await.unwrap();
    let ours = store.range(&RangeRequest::new(KeyRange::all())).unwrap();
    ours.revision.0 == theirs.header().unwrap().revision()
        && store.id().0 == theirs.header().unwrap().cluster_id()
        && ours.kvs.len() == theirs.kvs().len()
        && ours.kvs.iter().zip(theirs.kvs()).all(|(ours, theirs)| {
            ours.key == theirs.key()
                && ours.value == theirs.value()
                && ours.create_revision.0 == theirs.create_revision()
                && ours.mod_revision.0 == theirs.mod_revision()
                && ours.version == theirs.version()
                && ours.lease == theirs.lease()
        })
}

async fn put(etcd: &Etcd, key: &str, value: &str) {
    etcd.client().await.put(key, value, None).await.unwrap();
}

#[tokio::test]
async fn the_store_is_what_etcd_is_revisions_included() {
    let etcd = Etcd::start().await;
    put(&etcd, "a", "1").await;
    put(&etcd, "a", "2").await;
    put(&etcd, "b", "1").await;
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    assert!(same(&etcd, engine.store()).await, "after the first list");

    let puts: Vec<_> = (0..300)
        .map(|index| etcd_client::TxnOp::put(format!("txn/{index}"), vec![b'x'; 10_000], None))
        .collect();
    let mut client = etcd.client().await;
    for chunk in puts.chunks(100) {
        client.txn(etcd_client::Txn::new().and_then(chunk)).await.unwrap();
    }
    client.delete("b", None).await.unwrap();
    let lease = client.lease_grant(600, None).await.unwrap().id();
    client.put("leased", "1", Some(etcd_client::PutOptions::new().with_lease(lease))).await.unwrap();
    wait::until("the store follows", async || same(&etcd, engine.store()).await).await;
    assert!(engine.status().borrow().following);
}

#[tokio::test]
async fn an_empty_etcd_is_followed_from_its_first_key() {
    let etcd = Etcd::start().await;
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    put(&etcd, "a", "1").await;
    wait::until("the store follows", async || same(&etcd, engine.store()).await).await;
}

#[tokio::test]
async fn a_lost_connection_costs_watchers_nothing() {
    let etcd = Etcd::start().await;
    let proxy = Proxy::to(etcd.port).await;
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config_at(proxy.port))).await;
    let mut watcher = engine.store().watch(WatchRequest::new(KeyRange::all())).unwrap();
    let mut seen = Vec::new();
    for round in 0..10 {
        put(&etcd, "a", &round.to_string()).await;
        if round % 3 == 0 {
            proxy.cut();
        }
    }
    while seen.len() < 10 {
        let batch = tokio::time::timeout(wait::DEADLINE, watcher.next()).await.unwrap().unwrap();
        seen.extend(batch.events.into_iter().map(|event| event.kv.value[0] - b'0'));
    }
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
    assert!(same(&etcd, engine.store()).await);
}

#[tokio::test]
async fn after_a_compaction_behind_its_back_the_store_is_right_and_watchers_are_told() {
    let etcd = Etcd::start().await;
    let proxy = Proxy::to(etcd.port).await;
    put(&etcd, "stays", "1").await;
    put(&etcd, "goes", "1").await;
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config_at(proxy.port))).await;
    let mut watcher = engine.store().watch(WatchRequest::new(KeyRange::all())).unwrap();
    proxy.stall();
    let mut client = etcd.client().await;
    client.delete("goes", None).await.unwrap();
    put(&etcd, "new", "1").await;
    put(&etcd, "new", "2").await;
    let revision = client.get("new", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, None).await.unwrap();
    proxy.cut();
    proxy.recover();
    wait::until("the store is right", async || same(&etcd, engine.store()).await).await;
    let told = tokio::time::timeout(wait::DEADLINE, watcher.next()).await.unwrap();
    assert!(told.is_err(), "what happened in between is unknown: {told:?}");
    put(&etcd, "later", "1").await;
    wait::until("the store follows on", async || same(&etcd, engine.store()).await).await;
}

#[tokio::test]
async fn an_exchanged_etcd_is_neither_followed_nor_written() {
    let first = Etcd::start().await;
    let proxy = Proxy::to(first.port).await;
    let engine = EtcdEngine::start(EtcdConfig::new(first.config_at(proxy.port))).await;
    let term = engine.begin_term();
    term.writer().put("a", "1");
    term.writer().flush().await;
    let second = Etcd::start_like(&first).await;
    proxy.lead_to(second.port);
    let end = tokio::time::timeout(wait::DEADLINE, engine.ended()).await.unwrap();
    let EtcdEnd::Exchanged(why) = end else { panic!("{end:?}") };
    assert!(why.contains("exchanged") && why.contains("Restart"), "{why}");
    term.writer().put("b", "1");
    assert_eq!(
        engine.store().stats().keys,
        2,
        "what is known stands: the key, and whose turn it is to write"
    );
    let mut client = second.client().await;
    assert!(
        client
            .get(vec![0], Some(etcd_client::GetOptions::new().with_all_keys()))
            .await
            .unwrap()
            .kvs()
            .is_empty()
    );
}

/// Nobody can renew leases every zero seconds: a writer that is told to panics, for whatever else may be wrong in it.
#[tokio::test]
async fn a_writer_that_panics_is_not_silent() {
    let etcd = Etcd::start().await;
    let config = EtcdConfig { lease_ttl: Duration::ZERO, ..EtcdConfig::new(etcd.config()) };
    let engine = EtcdEngine::start(config).await;
    let _term = engine.begin_term();
    let end = tokio::time::timeout(wait::DEADLINE, engine.ended()).await.unwrap();
    assert_eq!(end, EtcdEnd::Stopped("the writing to etcd"));
}

#[tokio::test]
async fn what_was_written_outlives_its_leases_while_nobody_writes_and_not_longer() {
    let etcd = Etcd::start().await;
    let config = || EtcdConfig { lease_ttl: Duration::from_secs(6), ..EtcdConfig::new(etcd.config()) };
    let (engine, other) = (EtcdEngine::start(config()).await, EtcdEngine::start(config()).await);
    let term = engine.begin_term();
    term.writer().put("a", "1");
    term.writer().flush().await;
    let lease_of_a = async || {
        let found = etcd.client().await.kv_client().get("a", None).await.unwrap();
        found.kvs().first().map(etcd_client::KeyValue::lease)
    };
    let lives_for = async |lease| {
        let client = etcd.client().await;
        client.lease_client().time_to_live(lease, None).await.unwrap().ttl()
    };
    let lease = lease_of_a().await.unwrap();
    drop(term);

    // It would only grow shorter if nobody renewed it.
    let mut least = i64::MAX;
    wait::until("the lease of who writes no more is renewed", async || {
        let left = lives_for(lease).await;
        least = least.min(left);
        left > least
    })
    .await;
    assert_eq!(lease_of_a().await, Some(lease), "nothing is written");

    let next = other.begin_term();
    next.writer().put("a", "1");
    next.writer().flush().await;
    wait::until("the lease runs out, since another writes", async || lives_for(lease).await < 0).await;
    assert!(lease_of_a().await.is_some_and(|now| now != lease), "it is held by who writes now");
}
