//! What a reader must bear.

use std::time::Duration;

use bytes::Bytes;
use isthmus_kvstore::{
    Section,
    config::Pem,
    reader::{ClusterConfigState, Connection, Reader, ReaderConfig, SectionPhase},
};

use prometheus_client::registry::Registry;

use crate::{
    pki::Pki,
    proxy::Proxy,
    side::{Engine, Side, on_both_engines},
    told::{metric, told},
    wait::{self, Consumer, until_status},
};

on_both_engines!(
    lists_then_follows,
    a_section_waits_for_the_cluster_configuration_and_for_its_canary,
    without_the_capability_canaries_are_not_waited_for,
    a_peer_whose_packets_are_dropped_is_noticed_by_keepalive,
    a_silent_heartbeat_tears_the_connection_down,
    a_slow_consumer_is_compacted_away_and_heals_without_loss,
    an_exchanged_store_that_is_still_being_filled_deletes_nothing,
    what_is_too_large_is_left_out_and_the_rest_goes_on,
    a_section_beyond_its_bounds_takes_no_more_keys,
    a_probe_tells_how_far_a_quiet_section_is_now,
    keys_that_grow_beyond_the_bounds_are_left_out_too,
    pages_that_are_too_large_are_asked_for_in_smaller_pieces,
    a_list_of_many_pages_is_complete,
    a_client_certificate_is_read_anew_at_each_connection,
    errors_say_what_to_look_at,
    the_next_endpoint_is_tried_when_one_is_down,
    a_consumer_that_leaves_ends_its_section_and_a_dropped_reader_its_connection,
);

const PREFIX: &str = "cilium/state/nodes/v1/beta";
const CANARY: &str = "cilium/synced/beta/cilium/state/nodes/v1";
const CONFIG: &str = "cilium/cluster-config/beta";

fn nodes() -> Section {
    Section::new(PREFIX, Some(CANARY))
}

fn key(name: &str) -> String {
    format!("{PREFIX}/{name}")
}

/// Makes the store a complete export of cluster beta with these nodes.
async fn export(side: &Side, nodes: &[(&str, &str)]) {
    side.put(CONFIG, r#"{"id":2,"capabilities":{"syncedCanaries":true}}"#).await;
    for (name, value) in nodes {
        side.put(&key(name), value).await;
    }
    side.put(CANARY, "now").await;
}

fn spawn(config: ReaderConfig) -> Reader {
    Reader::spawn("beta".parse().unwrap(), config)
}

async fn lists_then_follows(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[("n1", "1"), ("n2", "1")]).await;
    side.put("cilium/state/nodes/v1/beta-2/n1", "of another cluster").await;
    let reader = spawn(ReaderConfig::new(side.config()));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    assert_eq!(consumer.map.keys().cloned().collect::<Vec<_>>(), [key("n1"), key("n2")]);

    side.put(&key("n2"), "1").await;
    side.put(&key("n2"), "2").await;
    side.put(&key("n3"), "1").await;
    side.delete(&key("n1")).await;
    consumer.until("n1 is gone", |this| !this.map.contains_key(&key("n1"))).await;
    assert_eq!(consumer.map[&key("n2")], "2");
    assert_eq!(consumer.map[&key("n3")], "1");

    let status = until_status(&reader, "ready", |status| {
        status.ready()
            && status.sections[PREFIX].keys == 2
            && status.sections[PREFIX].lag(status.store_revision) == 0
    })
    .await;
    assert_eq!(status.cluster_config, ClusterConfigState::Retrieved);
    assert!(status.cluster_id.is_some() && status.sections[PREFIX].confirmed.is_some());
    assert_eq!(status.connection, Connection::Connected);
}

async fn a_section_waits_for_the_cluster_configuration_and_for_its_canary(engine: Engine) {
    let side = Side::start(engine).await;
    side.put(&key("n1"), "1").await;
    let reader = spawn(ReaderConfig::new(side.config()));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    let status =
        until_status(&reader, "connected", |status| status.connected() && status.last_error.is_some()).await;
    assert!(status.last_error.unwrap().contains(CONFIG));
    assert_eq!(status.sections[PREFIX].phase, SectionPhase::WaitingForConnection);

    side.put(CONFIG, "{broken").await;
    until_status(&reader, "told what is wrong with the configuration", |status| {
        status.last_error.as_ref().is_some_and(|error| error.contains("cannot be understood"))
    })
    .await;
    side.put(CONFIG, r#"{"id":2,"capabilities":{"syncedCanaries":true}}"#).await;
    until_status(&reader, "waiting for the canary", |status| {
        status.sections[PREFIX].phase == SectionPhase::WaitingForCanary
    })
    .await;
    consumer.drain();
    assert!(consumer.map.is_empty() && consumer.synced == 0);
    side.put(CANARY, "now").await;
    consumer.until_synced().await;
    assert_eq!(consumer.map.len(), 1);

    // Its deletion means nothing; a change of the configuration is told.
    side.delete(CANARY).await;
    side.put(CONFIG, r#"{"id":2}"#).await;
    let mut config = reader.cluster_config();
    config.wait_for(|config| config.as_deref() == Some(br#"{"id":2}"#)).await.unwrap();
    side.put(&key("n2"), "1").await;
    consumer.until("n2", |this| this.map.len() == 2).await;
    assert!(reader.status().borrow().ready());
}

async fn without_the_capability_canaries_are_not_waited_for(engine: Engine) {
    let side = Side::start(engine).await;
    side.put(CONFIG, r#"{"id":2}"#).await;
    side.put(&key("n1"), "1").await;
    let reader = spawn(ReaderConfig::new(side.config()));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    assert_eq!(consumer.map.len(), 1);
}

async fn a_peer_whose_packets_are_dropped_is_noticed_by_keepalive(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[("n1", "1"), ("n2", "1")]).await;
    let proxy = Proxy::to(side.port()).await;
    let reader = spawn(ReaderConfig::new(side.config_at(proxy.port)));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;

    proxy.stall();
    let status = until_status(&reader, "the dead peer is noticed", |status| status.failures > 0).await;
    let error = status.last_error.unwrap();
    assert!(!error.contains("heartbeat"), "noticed by the silent heartbeat only: {error}");
    assert!(status.sections[PREFIX].synced, "what is known stays known");

    side.delete(&key("n1")).await;
    side.put(&key("n3"), "1").await;
    proxy.cut();
    proxy.recover();
    consumer.until_synced().await;
    assert_eq!(consumer.map.keys().cloned().collect::<Vec<_>>(), [key("n2"), key("n3")]);
    assert_eq!(consumer.deleted, [key("n1")]);
}

#[tokio::test]
async fn a_store_that_stands_still_is_noticed_and_found_again() {
    let side = Side::start(Engine::Etcd).await;
    let Side::Etcd { etcd, .. } = &side else { unreachable!() };
    export(&side, &[("n1", "1")]).await;
    let reader = spawn(ReaderConfig::new(side.config()));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    etcd.signal("STOP");
    until_status(&reader, "the stopped etcd is noticed", |status| status.failures > 0).await;
    etcd.signal("CONT");
    consumer.until_synced().await;
    side.put(&key("n2"), "1").await;
    consumer.until("n2", |this| this.map.len() == 2).await;
    assert!(consumer.deleted.is_empty());
}

async fn a_silent_heartbeat_tears_the_connection_down(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[("n1", "1")]).await;
    let config =
        ReaderConfig { heartbeat_timeout: Duration::from_secs(1), ..ReaderConfig::new(side.config()) };
    let mut registry = Registry::with_prefix("cilium");
    config.metrics.register_calls(&mut registry);
    config.metrics.register_events(&mut registry);
    let reader = spawn(config);
    let mut consumer = Consumer::new(reader.follow(nodes()));
    let status = until_status(&reader, "torn down", |status| status.failures >= 2).await;
    assert!(status.last_error.unwrap().contains("cilium/.heartbeat"));
    consumer.until_synced().await;
    let at_least = |series: &str, least| {
        let (value, text) = (metric(&registry, series), told(&registry));
        assert!(value >= Some(least), "{series} {value:?}\n{text}");
    };
    at_least(r#"cilium_kvstore_quorum_errors_total{error="no event received"}"#, 2.0);
    at_least(
        r#"cilium_kvstore_operations_duration_seconds_count{scope="nodes/v1",kind="read",action="ListPrefix",outcome="success"}"#,
        1.0,
    );
    at_least(
        r#"cilium_kvstore_operations_duration_seconds_count{scope="cilium/clust",kind="read",action="Get",outcome="success"}"#,
        1.0,
    );
    at_least(r#"cilium_kvstore_events_queue_seconds_count{scope="nodes/v1",action="create"}"#, 1.0);
    let limits = reader.limiter().status();
    assert!(limits.succeeded >= 4 && limits.mean_processing > Duration::ZERO, "{limits:?}");
    assert!(consumer.deleted.is_empty());

    // With a heartbeat it comes back.
    let beat = async {
        loop {
            side.put("cilium/.heartbeat", "now").await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let holds = async {
        let beats = "a heartbeat";
        until_status(&reader, beats, |status| status.ready() && status.last_heartbeat.is_some()).await;
        // And holds, where more time is given than a beat is under way on however busy a machine.
        let config =
            ReaderConfig { heartbeat_timeout: Duration::from_secs(5), ..ReaderConfig::new(side.config()) };
        let reader = spawn(config);
        until_status(&reader, beats, |status| status.last_heartbeat.is_some()).await;
        tokio::time::sleep(Duration::from_secs(11)).await;
        assert_eq!(reader.status().borrow().failures, 0);
    };
    tokio::select! {
        () = beat => {}
        () = holds => {}
    }
}

async fn a_slow_consumer_is_compacted_away_and_heals_without_loss(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[("gone", "1"), ("stays", "1")]).await;
    let config = ReaderConfig { channel_capacity: 1, ..ReaderConfig::new(side.config()) };
    let reader = spawn(config);
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    let other = Section::new("cilium/state/ip/v1/default", None::<Bytes>);
    let mut quick = Consumer::new(reader.follow(other));
    quick.until_synced().await;

    // More than the connection buffers, while the consumer takes nothing.
    let value = "x".repeat(512 << 10);
    for round in 0..40 {
        side.put(&key("large"), &format!("{round} {value}")).await;
    }
    side.delete(&key("gone")).await;
    side.put(&key("last"), "1").await;
    side.compact().await;

    // Its neighbour does not notice.
    side.put("cilium/state/ip/v1/default/10.0.0.1", "1").await;
    quick.until("the neighbour's event", |this| this.map.len() == 1).await;

    consumer
        .until("everything", |this| {
            this.map.contains_key(&key("last")) && !this.map.contains_key(&key("gone"))
        })
        .await;
    assert!(consumer.map[&key("large")].starts_with("39 "));
    assert_eq!(consumer.deleted, [key("gone")]);
    assert_eq!(reader.status().borrow().failures, 0, "the connection held");
}

async fn an_exchanged_store_that_is_still_being_filled_deletes_nothing(engine: Engine) {
    let first = Side::start(engine).await;
    export(&first, &[("n1", "1"), ("n2", "1"), ("n3", "1")]).await;
    let proxy = Proxy::to(first.port()).await;
    let config = first.config_at(proxy.port);
    let reader = spawn(ReaderConfig::new(config));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    let first_id = reader.status().borrow().cluster_id;

    // The same address and authority, another store: its exporter has only begun.
    let second = Side::start_like(&first).await;
    let side = &second;
    side.put(CONFIG, r#"{"id":2,"capabilities":{"syncedCanaries":true}}"#).await;
    side.put(&key("n1"), "1").await;
    proxy.lead_to(second.port());
    let status = until_status(&reader, "waiting for the new store's canary", |status| {
        status.connected()
            && status.cluster_id != first_id
            && status.sections[PREFIX].phase == SectionPhase::WaitingForCanary
    })
    .await;
    assert!(status.sections[PREFIX].synced);
    consumer.drain();
    assert_eq!(consumer.map.len(), 3);

    side.put(&key("n2"), "2").await;
    side.put(CANARY, "now").await;
    consumer.until_synced().await;
    assert_eq!(consumer.deleted, [key("n3")]);
    assert_eq!(consumer.map[&key("n2")], "2");
    assert_eq!(consumer.map.len(), 2);
}

async fn what_is_too_large_is_left_out_and_the_rest_goes_on(engine: Engine) {
    let side = Side::start(engine).await;
    let long = key(&"k".repeat(300));
    export(&side, &[("n1", "1"), ("large", &"x".repeat(2_000)), ("shrinks", "1")]).await;
    side.put(&long, "1").await;
    let mut config = ReaderConfig::new(side.config());
    config.bounds.value_bytes = 1_000;
    config.bounds.key_bytes = 200;
    let reader = spawn(config);
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    assert_eq!(consumer.map.len(), 2);
    side.put(&key("shrinks"), &"x".repeat(2_000)).await;
    side.put(&key("large"), "small now").await;
    consumer.until("the rest", |this| this.map.contains_key(&key("large"))).await;
    assert_eq!(consumer.deleted, [key("shrinks")]);
    let status = until_status(&reader, "counted", |status| status.sections[PREFIX].skipped == 3).await;
    assert!(status.sections[PREFIX].last_error.as_ref().unwrap().contains("too large"));
}

async fn a_section_beyond_its_bounds_takes_no_more_keys(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[("n1", "1"), ("n2", "1"), ("n3", "1")]).await;
    let mut config = ReaderConfig::new(side.config());
    config.bounds.keys = 2;
    config.progress_interval = Duration::from_millis(100);
    let reader = spawn(config);
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    side.put(&key("n1"), "2").await;
    consumer.until("known keys still change", |this| this.map[&key("n1")] == "2").await;
    assert_eq!(consumer.map.len(), 2);
    assert_eq!(reader.status().borrow().sections[PREFIX].skipped, 1);

    // What was left out comes when there is room.
    side.delete(&key("n1")).await;
    side.delete(&key("n2")).await;
    consumer.until("what was left out", |this| this.map.contains_key(&key("n3"))).await;
    assert_eq!(reader.status().borrow().failures, 0);
}

async fn a_probe_tells_how_far_a_quiet_section_is_now(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[("n1", "1")]).await;
    let mut config = ReaderConfig::new(side.config());
    config.progress_interval = Duration::from_secs(3600);
    let reader = spawn(config);
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    until_status(&reader, "followed", |status| status.ready()).await;
    let listed = reader.status().borrow().sections[PREFIX].revision;

    side.put("cilium/elsewhere", "1").await;
    let status = reader.probe().status(Duration::from_secs(20)).await;
    let section = &status.sections[PREFIX];
    assert!(section.revision > listed, "{} is not after {listed}", section.revision);
    assert_eq!(section.lag(status.store_revision), 0);
}

async fn keys_that_grow_beyond_the_bounds_are_left_out_too(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[("n1", "1"), ("n2", "1"), ("n3", "1")]).await;
    let mut config = ReaderConfig::new(side.config());
    config.bounds.total_bytes = 1_000;
    config.progress_interval = Duration::from_millis(100);
    let reader = spawn(config);
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    // Small when they are listed, large ever after.
    side.put(&key("n1"), &"x".repeat(700)).await;
    side.put(&key("n2"), &"x".repeat(700)).await;
    side.put(&key("n3"), "2").await;
    consumer.until("the rest", |this| this.map[&key("n3")] == "2").await;
    assert_eq!(consumer.map[&key("n1")].len(), 700);
    assert_eq!(consumer.deleted, [key("n2")], "what is left out counts as absent");

    side.delete(&key("n1")).await;
    consumer.until("room for it", |this| this.map.contains_key(&key("n2"))).await;
}

async fn pages_that_are_too_large_are_asked_for_in_smaller_pieces(engine: Engine) {
    let side = Side::start(engine).await;
    let value = "x".repeat(1 << 20);
    export(&side, &[]).await;
    for index in 0..50 {
        side.put(&key(&format!("n{index:02}")), &value).await;
    }
    let reader = spawn(ReaderConfig::new(side.config()));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    assert_eq!(consumer.map.len(), 50);
    assert_eq!(reader.status().borrow().failures, 0);
}

async fn a_list_of_many_pages_is_complete(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[]).await;
    for page in 0..10 {
        let pairs = (0..100).map(|index| (key(&format!("n{}", page * 100 + index)), "1".to_owned()));
        side.put_all(pairs.collect()).await;
    }
    let reader = spawn(ReaderConfig::new(side.config()));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    assert_eq!(consumer.map.len(), 1_000);
}

async fn a_client_certificate_is_read_anew_at_each_connection(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[("n1", "1")]).await;
    let stranger = Pki::new();
    let mut config = stranger.client("remote-alpha", side.port());
    config.trusted_ca = Some(Pem::File(side.pki().ca()));
    let files = stranger.files("remote-alpha");
    let reader = spawn(ReaderConfig::new(config));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    let status = until_status(&reader, "refused", |status| status.last_error.is_some()).await;
    assert!(!status.connected());

    side.pki().client("remote-alpha", side.port());
    let renewed = side.pki().files("remote-alpha");
    std::fs::copy(renewed.key_file, files.key_file).unwrap();
    std::fs::copy(renewed.cert_file, files.cert_file).unwrap();
    consumer.until_synced().await;
    assert_eq!(consumer.map.len(), 1);
}

async fn errors_say_what_to_look_at(engine: Engine) {
    let side = Side::start(engine).await;
    let error = async |config| {
        let reader = spawn(ReaderConfig::new(config));
        let status = until_status(&reader, "an error", |status| status.last_error.is_some()).await;
        status.last_error.unwrap()
    };
    let mut missing = side.config();
    missing.trusted_ca = Some(Pem::File("/nowhere/ca.crt".into()));
    let text = error(missing).await;
    assert!(text.contains("trusted-ca-file") && text.contains("/nowhere/ca.crt"), "{text}");

    let stranger = Pki::new();
    let mut untrusted = side.config();
    untrusted.trusted_ca = Some(Pem::File(stranger.ca()));
    let text = error(untrusted).await;
    assert!(text.contains("authority"), "{text}");

    let mut nobody = side.config();
    nobody.endpoints = vec!["https://127.0.0.1:1".parse().unwrap()];
    let text = error(nobody).await;
    assert!(text.contains("127.0.0.1:1") && text.contains("cannot connect"), "{text}");
}

async fn the_next_endpoint_is_tried_when_one_is_down(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[("n1", "1")]).await;
    let mut config = side.config();
    config.endpoints.insert(0, "https://127.0.0.1:1".parse().unwrap());
    let reader = spawn(ReaderConfig::new(config));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    assert_eq!(reader.status().borrow().failures, 0);
}

async fn a_consumer_that_leaves_ends_its_section_and_a_dropped_reader_its_connection(engine: Engine) {
    let side = Side::start(engine).await;
    export(&side, &[("n1", "1")]).await;
    let proxy = Proxy::to(side.port()).await;
    let reader = spawn(ReaderConfig::new(side.config_at(proxy.port)));
    let mut consumer = Consumer::new(reader.follow(nodes()));
    consumer.until_synced().await;
    drop(consumer);
    let status = until_status(&reader, "the section ends", |status| status.sections.is_empty()).await;
    assert!(status.connected());
    let mut seen = reader.status();
    drop(reader);
    seen.wait_for(|status| status.connection == Connection::Stopped).await.unwrap();
    wait::until("the tasks end", async || seen.changed().await.is_err()).await;
    assert_eq!(proxy.accepted(), 1);
}
