//! What a writer must bear, on either engine.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use isthmus_kvstore::{
    Section,
    etcd::{EtcdConfig, EtcdEngine},
    memory::{KeyRange, Limits, MemoryStore, RangeRequest, StoreId},
    writer::Writer,
};

use prometheus_client::registry::Registry;

use crate::{
    etcd::Etcd,
    proxy::Proxy,
    told::{metric, told},
    wait,
};

const PREFIX: &str = "cilium/state/nodes/v1/alpha";
const CANARY: &str = "cilium/synced/alpha/cilium/state/nodes/v1";

fn key(name: impl std::fmt::Display) -> String {
    format!("{PREFIX}/{name}")
}

fn nodes() -> Section {
    Section::new(PREFIX, Some(CANARY))
}

/// The keys below a prefix.
fn keys(store: &MemoryStore, prefix: &'static str) -> BTreeSet<String> {
    let response = store.range(&RangeRequest::new(KeyRange::prefix(prefix))).unwrap();
    response.kvs.iter().map(|kv| String::from_utf8(kv.key.to_vec()).unwrap()).collect()
}

fn value(store: &MemoryStore, key: &str) -> Option<String> {
    store.get(key.as_bytes()).map(|kv| String::from_utf8(kv.value.to_vec()).unwrap())
}

fn memory() -> MemoryStore {
    MemoryStore::new(StoreId::random(), Limits::default())
}

/// A section's life, the same on both engines: `store` shows what is there.
async fn a_section_is_complete_before_its_canary(writer: &Writer, store: &MemoryStore) {
    writer.put(key("of-an-earlier-run"), "1");
    writer.put("cilium/state/nodes/v1/alpha-2/not-below", "1");
    writer.flush().await;
    let eventually = async |what: &str, condition: &dyn Fn() -> bool| {
        wait::until(what, async || condition()).await;
    };
    eventually("the leftover is there", &|| value(store, &key("of-an-earlier-run")).is_some()).await;

    let section = writer.section(nodes());
    for index in 0..500 {
        section.put(key(index), "1");
    }
    section.put(key("passing"), "1");
    section.delete(key("passing"));
    assert_eq!(value(store, CANARY), None);
    section.finish_initial().await;
    eventually("the canary", &|| value(store, CANARY).is_some()).await;
    let canary = store.get(CANARY.as_bytes()).unwrap().mod_revision;
    let response = store.range(&RangeRequest::new(KeyRange::prefix(format!("{PREFIX}/")))).unwrap();
    assert_eq!(response.kvs.len(), 500, "everything is there and nothing is left over");
    assert!(response.kvs.iter().all(|kv| kv.mod_revision < canary), "the canary comes last");
    assert_eq!(
        keys(store, "cilium/state/nodes/v1/alpha-2/").len(),
        1,
        "another cluster's keys are not below it"
    );

    // The same value is not written again.
    let before = store.revision();
    section.put(key(7), "1");
    writer.flush().await;
    section.put(key(8), "2");
    writer.flush().await;
    eventually("a change", &|| value(store, &key(8)).as_deref() == Some("2")).await;
    assert_eq!(store.revision().0, before.0 + 1);

    // Only the last of many values counts, and it is the last one written.
    for round in 0..1_000 {
        section.put(key("counter"), round.to_string());
    }
    writer.flush().await;
    eventually("the last value", &|| value(store, &key("counter")).as_deref() == Some("999")).await;

    section.remove().await;
    eventually("the section is gone", &|| keys(store, "cilium/state/nodes/v1/alpha/").is_empty()).await;
    assert_eq!(value(store, CANARY), None);
}

#[tokio::test]
async fn a_section_is_complete_before_its_canary_in_memory() {
    let store = memory();
    a_section_is_complete_before_its_canary(&Writer::memory(store.clone()), &store).await;
}

#[tokio::test]
async fn a_section_is_complete_before_its_canary_in_etcd() {
    let etcd = Etcd::start().await;
    let config = EtcdConfig::new(etcd.config());
    let mut registry = Registry::with_prefix("cilium");
    config.metrics.register_calls(&mut registry);
    let engine = EtcdEngine::start(config).await;
    let term = engine.begin_term();
    a_section_is_complete_before_its_canary(term.writer(), engine.store()).await;

    // Each key counts, in however many transactions they were written.
    let written = |kind, action| {
        let labels = format!(r#"scope="nodes/v1",kind="{kind}",action="{action}",outcome="success""#);
        metric(&registry, &format!("cilium_kvstore_operations_duration_seconds_count{{{labels}}}"))
    };
    assert!(written("set", "Update") >= Some(502.0), "{}", told(&registry));
    assert!(written("delete", "Delete") >= Some(501.0), "{}", told(&registry));
    let limits = term.writer().limiter().unwrap().status();
    assert!(limits.succeeded >= 10 && limits.failed == 0, "{limits:?}");
    assert!(engine.limiter().status().succeeded >= 1);
}

#[tokio::test]
async fn the_cluster_configuration_stands_whatever_others_do() {
    let etcd = Etcd::start().await;
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    let term = engine.begin_term();
    let own = memory();
    let alpha = "alpha".parse().unwrap();
    let config = "cilium/cluster-config/alpha";
    for (writer, store) in [(term.writer().clone(), engine.store()), (Writer::memory(own.clone()), &own)] {
        let kept = writer.keep_cluster_config(&alpha, r#"{"id":1}"#);
        let stands = async || value(store, config).as_deref() == Some(r#"{"id":1}"#);
        wait::until("the configuration is written", stands).await;
        for round in 0..2 {
            if store.id() == own.id() {
                store.put(config, format!("somebody else's {round}"));
            } else {
                let mut client = etcd.client().await;
                client.put(config, format!("somebody else's {round}"), None).await.unwrap();
            }
            wait::until("somebody else's is seen or gone already", async || store.revision().0 > 1).await;
            wait::until("it is written again", stands).await;
        }
        if store.id() == own.id() {
            store.delete(config);
        } else {
            etcd.client().await.delete(config, None).await.unwrap();
        }
        wait::until("it is written again after deletion", stands).await;
        drop(kept);
    }
}

#[tokio::test]
async fn the_heartbeat_is_written_at_once() {
    let store = memory();
    let _kept = Writer::memory(store.clone()).keep_heartbeat();
    wait::until("a heartbeat", async || {
        value(&store, "cilium/.heartbeat")
            .is_some_and(|beat| chrono::DateTime::parse_from_rfc3339(&beat).is_ok())
    })
    .await;
}

#[tokio::test]
async fn keys_come_back_when_their_leases_are_revoked() {
    let etcd = Etcd::start().await;
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    let term = engine.begin_term();
    for index in 0..1_500 {
        term.writer().put(key(index), "1");
    }
    term.writer().flush().await;
    let mut client = etcd.client().await;
    let leases = client.leases().await.unwrap();
    assert_eq!(leases.leases().len(), 2);
    for lease in leases.leases() {
        client.lease_revoke(lease.id()).await.unwrap();
    }
    let old: BTreeSet<i64> = leases.leases().iter().map(etcd_client::LeaseStatus::id).collect();
    wait::until("the keys are there again", async || {
        let kvs = client.get(PREFIX, Some(etcd_client::GetOptions::new().with_prefix())).await.unwrap();
        kvs.kvs().len() == 1_500 && kvs.kvs().iter().all(|kv| kv.lease() != 0 && !old.contains(&kv.lease()))
    })
    .await;
    wait::until("the store follows", async || keys(engine.store(), "cilium/state/").len() == 1_500).await;
    assert_eq!(term.writer().status().leases, 2);
}

#[tokio::test]
async fn keys_come_back_when_their_leases_run_out_during_a_partition() {
    let etcd = Etcd::start().await;
    let proxy = Proxy::to(etcd.port).await;
    let config =
        EtcdConfig { lease_ttl: Duration::from_secs(3), ..EtcdConfig::new(etcd.config_at(proxy.port)) };
    let engine = EtcdEngine::start(config).await;
    let term = engine.begin_term();
    term.writer().put(key("n1"), "1");
    term.writer().flush().await;
    let mut client = etcd.client().await;
    proxy.stall();
    let there =
        async |client: &mut etcd_client::Client| !client.get(key("n1"), None).await.unwrap().kvs().is_empty();
    wait::until("the lease runs out", async || !there(&mut client).await).await;
    term.writer().put(key("n2"), "1");
    proxy.cut();
    proxy.recover();
    wait::until("the key is there again", async || there(&mut client).await).await;
    term.writer().flush().await;
    wait::until("the store follows", async || keys(engine.store(), PREFIX).len() == 2).await;
    // And stays, over several times the lease's life.
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert!(there(&mut client).await, "the lease is kept alive");
}

#[tokio::test]
async fn writes_survive_a_partition_in_their_order() {
    let etcd = Etcd::start().await;
    let proxy = Proxy::to(etcd.port).await;
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config_at(proxy.port))).await;
    let term = engine.begin_term();
    for round in 0..20 {
        for index in 0..200 {
            term.writer().put(key(index), round.to_string());
            if index % 2 == 1 {
                term.writer().delete(key(index));
            }
        }
        if round % 4 == 0 {
            proxy.cut();
        }
        tokio::task::yield_now().await;
    }
    term.writer().flush().await;
    let mut client = etcd.client().await;
    let kvs = client.get(PREFIX, Some(etcd_client::GetOptions::new().with_prefix())).await.unwrap();
    assert_eq!(kvs.kvs().len(), 100);
    assert!(kvs.kvs().iter().all(|kv| kv.value() == b"19"));
    assert_eq!(term.writer().status().pending, 0);
}

#[tokio::test]
async fn a_value_that_etcd_refuses_does_not_hold_back_the_others() {
    let etcd = Etcd::start().await;
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    let term = engine.begin_term();
    let writer = term.writer();
    writer.put(key("large"), "1");
    writer.flush().await;
    for index in 0..50 {
        writer.put(key(index), "1");
    }
    writer.put(key("large"), "x".repeat(2 << 20));
    for index in 50..100 {
        writer.put(key(index), "1");
    }
    writer.flush().await;
    wait::until("the others", async || keys(engine.store(), PREFIX).len() == 101).await;
    assert_eq!(value(engine.store(), &key("large")).as_deref(), Some("1"));
    let status = writer.status();
    assert_eq!(status.rejected, 1);
    assert!(status.last_error.unwrap().contains(&key("large")));
    writer.put(key("large"), "2");
    writer.flush().await;
    assert_eq!(writer.status().rejected, 0);
    wait::until("it fits again", async || value(engine.store(), &key("large")).as_deref() == Some("2")).await;
}

#[tokio::test]
async fn a_hundred_and_thirty_thousand_keys_share_leases_of_a_thousand() {
    let etcd = Etcd::start().await;
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    let term = engine.begin_term();
    for index in 0..130_000 {
        term.writer().put(format!("cilium/state/ip/v1/default/{index:06}"), "0123456789");
    }
    term.writer().flush().await;
    let mut client = etcd.client().await;
    assert_eq!(client.leases().await.unwrap().leases().len(), 130);
    let count = etcd_client::GetOptions::new().with_prefix().with_count_only();
    assert_eq!(client.get("cilium/state/ip/", Some(count)).await.unwrap().count(), 130_000);
    // One more says whose turn it is to write.
    wait::until("the store has followed", async || engine.store().stats().keys == 130_001).await;
    // Room in a lease is used again.
    for index in 0..1_000 {
        term.writer().delete(format!("cilium/state/ip/v1/default/{index:06}"));
    }
    term.writer().flush().await;
    for index in 0..1_000 {
        term.writer().put(key(index), "1");
    }
    term.writer().flush().await;
    assert_eq!(term.writer().status().leases, 130);
}

#[tokio::test]
async fn a_term_that_has_ended_writes_no_more_and_the_next_takes_over_what_it_left() {
    let etcd = Etcd::start().await;
    let proxy = Proxy::to(etcd.port).await;
    // Two replicas on one etcd; the way of the first can be cut.
    let first = EtcdEngine::start(EtcdConfig::new(etcd.config_at(proxy.port))).await;
    let second = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    let ended = first.begin_term();
    let section = ended.writer().section(nodes());
    section.put(key("stays"), "1");
    section.put(key("goes"), "1");
    section.finish_initial().await;
    wait::until("the second follows", async || keys(second.store(), PREFIX).len() == 2).await;

    // What it could not write before its end it does not write after it, though its queue still knows of it.
    proxy.stall();
    section.put(key("late"), "1");
    drop(ended);
    proxy.cut();
    proxy.recover();

    let term = second.begin_term();
    let section = term.writer().section(nodes());
    section.put(key("stays"), "1");
    section.put(key("new"), "2");
    section.finish_initial().await;
    wait::until("the first follows again", async || {
        keys(first.store(), PREFIX) == keys(second.store(), PREFIX) && first.status().borrow().following
    })
    .await;
    assert_eq!(keys(first.store(), PREFIX), BTreeSet::from([key("new"), key("stays")]));
    // It may lead once more later.
    drop(term);
    let again = first.begin_term();
    again.writer().put(key("later"), "3");
    again.writer().flush().await;
    wait::until("the second follows it", async || keys(second.store(), PREFIX).len() == 3).await;
}

#[tokio::test]
async fn a_writer_that_has_not_been_told_that_another_writes_in_its_place_changes_nothing() {
    let etcd = Etcd::start().await;
    let first = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    let second = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    let stale = first.begin_term();
    stale.writer().put(key("a"), "1");
    stale.writer().flush().await;

    // As for a replica that was stopped where it stood: its term goes on for all that it knows.
    let term = second.begin_term();
    term.writer().put(key("a"), "2");
    term.writer().flush().await;
    stale.writer().put(key("a"), "3");
    wait::until("the first learns of it", async || {
        let status = stale.writer().status();
        status.last_error.is_some_and(|error| error.contains("another replica writes"))
    })
    .await;
    term.writer().put(key("b"), "2");
    term.writer().flush().await;
    wait::until("both have followed", async || {
        [&first, &second].iter().all(|engine| value(engine.store(), &key("b")).is_some())
    })
    .await;
    for engine in [&first, &second] {
        assert_eq!(value(engine.store(), &key("a")).as_deref(), Some("2"));
    }
}

#[tokio::test]
async fn a_writer_that_is_not_told_in_time_to_end_takes_over_from_the_other() {
    let etcd = Etcd::start().await;
    let patience = Duration::from_millis(500);
    let config = EtcdConfig { told_within: patience, ..EtcdConfig::new(etcd.config()) };
    let first = EtcdEngine::start(config).await;
    // This one has more of it, as far as the test goes on.
    let config = EtcdConfig { told_within: Duration::from_secs(3600), ..EtcdConfig::new(etcd.config()) };
    let second = EtcdEngine::start(config).await;
    let right = first.begin_term();
    right.writer().put(key("a"), "1");
    right.writer().flush().await;
    let wrong = second.begin_term();
    wrong.writer().put(key("a"), "2");
    wrong.writer().flush().await;

    let asked = Instant::now();
    right.writer().put(key("b"), "1");
    right.writer().flush().await;
    assert!(asked.elapsed() >= patience, "it stood aside before: {:?}", asked.elapsed());
    wait::until("all that it wrote stands again", async || {
        let values = ["a", "b"].map(|name| value(second.store(), &key(name)));
        values.iter().all(|value| value.as_deref() == Some("1"))
    })
    .await;
    // The other is superseded in its turn, and does not come back as soon.
    wrong.writer().put(key("a"), "3");
    wait::until("the other learns of it", async || {
        let status = wrong.writer().status();
        status.last_error.is_some_and(|error| error.contains("another replica writes"))
    })
    .await;
    right.writer().put(key("c"), "1");
    wait::until("the last is followed", async || value(first.store(), &key("c")).is_some()).await;
    assert_eq!(value(first.store(), &key("a")).as_deref(), Some("1"));
}

#[tokio::test]
async fn what_an_earlier_run_left_can_be_stood_behind_before_it_is_known_whether_it_stays() {
    let etcd = Etcd::start().await;
    let leases = async || -> BTreeSet<i64> {
        let all = Some(etcd_client::GetOptions::new().with_prefix());
        let found = etcd.client().await.kv_client().get("cilium/", all).await.unwrap();
        assert_eq!(found.kvs().len(), 3);
        found.kvs().iter().map(etcd_client::KeyValue::lease).collect()
    };
    let write = async |engine: &EtcdEngine, names: &[&str]| {
        let term = engine.begin_term();
        let section = term.writer().section(nodes());
        names.iter().for_each(|name| section.put(key(name), "1"));
        section.finish_initial().await;
    };
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    write(&engine, &["stays", "goes"]).await;
    let before = leases().await;
    drop(engine);

    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    let term = engine.begin_term();
    let section = term.writer().section(nodes());
    section.take_over();
    term.writer().flush().await;
    assert!(leases().await.is_disjoint(&before), "nothing goes with the leases of who is gone");
    section.put(key("stays"), "1");
    section.finish_initial().await;
    wait::until("what was not put by itself is removed", async || {
        keys(engine.store(), "cilium/state/") == BTreeSet::from([key("stays")])
    })
    .await;
}
