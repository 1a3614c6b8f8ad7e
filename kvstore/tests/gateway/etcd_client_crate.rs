//! The etcd-client crate, which our own readers use, and through it what a client can ask of watches and transactions.

use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, EventType, GetOptions, SortOrder, SortTarget, Txn, TxnOp, WatchFilterType,
    WatchOptions, WatchResponse, WatchStream,
};
use isthmus_kvstore::gateway::{GatewayLimits, GatewayOptions};
use isthmus_kvstore::memory::{Limits, Mutation, Revision};

use crate::fixture::{DEADLINE, Served, eventually};

async fn next(watch: &mut WatchStream) -> WatchResponse {
    let message = tokio::time::timeout(DEADLINE, watch.message()).await.expect("a response");
    message.expect("the watch goes on").expect("the watch goes on")
}

fn shown(response: &WatchResponse) -> Vec<String> {
    let show = |event: &etcd_client::Event| {
        let kv = event.kv().unwrap();
        let (sign, value) = match event.event_type() {
            EventType::Put => ("=", kv.value_str().unwrap()),
            EventType::Delete => ("-", ""),
        };
        format!("{}{sign}{value}@{}", kv.key_str().unwrap(), kv.mod_revision())
    };
    response.events().iter().map(show).collect()
}

#[tokio::test]
async fn a_reader_lists_in_pages_at_one_revision_and_watches_from_the_next() {
    let served = Served::start().await;
    for key in 0..1000 {
        served.store.put(format!("cilium/state/ip/v1/default/10.0.{}.{}", key / 256, key % 256), "{}");
    }
    let mut client = served.client("remote-beta").await;
    let end = "cilium/state/ip/v1/default0";
    let mut start = b"cilium/state/ip/v1/default/".to_vec();
    let (mut seen, mut pinned) = (0, 0);
    loop {
        let options = GetOptions::new()
            .with_range(end)
            .with_limit(256)
            .with_revision(pinned)
            .with_sort(SortTarget::Key, SortOrder::Ascend);
        let page = client.get(start, Some(options)).await.unwrap();
        if pinned == 0 {
            pinned = page.header().unwrap().revision();
        }
        seen += page.kvs().len();
        // What is written while the list goes on belongs to the watch.
        served.store.put("cilium/state/ip/v1/default/10.9.9.9", seen.to_string());
        if !page.more() {
            break;
        }
        start = [page.kvs().last().unwrap().key(), b"\0"].concat();
    }
    assert_eq!(seen, 1000);
    let options = WatchOptions::new().with_prefix().with_start_revision(pinned + 1);
    let mut watch = client.watch("cilium/state/ip/v1/default/", Some(options)).await.unwrap();
    assert!(next(&mut watch).await.created());
    let mut values = Vec::new();
    while values.len() < 4 {
        values.extend(shown(&next(&mut watch).await));
    }
    let expected: Vec<_> = [256, 512, 768, 1000]
        .iter()
        .zip(1002..)
        .map(|(seen, revision)| format!("cilium/state/ip/v1/default/10.9.9.9={seen}@{revision}"))
        .collect();
    assert_eq!(values, expected);
}

#[tokio::test]
async fn one_stream_carries_many_watches_each_with_its_own_options() {
    let served = Served::start().await;
    let mut client = served.client("admin-alpha").await;
    served.store.put("a", "1"); // 2
    let mut watch =
        client.watch("a", Some(WatchOptions::new().with_start_revision(2).with_prev_key())).await.unwrap();
    let first = next(&mut watch).await;
    assert!(first.created());
    assert_eq!((first.watch_id(), first.header().unwrap().revision()), (0, 2));
    assert_eq!(shown(&next(&mut watch).await), ["a=1@2"]);

    let deletions = WatchOptions::new().with_prefix().with_watch_id(7).with_filters([WatchFilterType::NoPut]);
    watch.watch("", Some(deletions)).await.unwrap();
    assert_eq!(next(&mut watch).await.watch_id(), 7);
    watch.watch("b", Some(WatchOptions::new().with_watch_id(7))).await.unwrap();
    let duplicate = next(&mut watch).await;
    assert!(duplicate.created() && duplicate.canceled());
    assert_eq!(duplicate.watch_id(), -1);
    assert_eq!(duplicate.cancel_reason(), "mvcc: duplicate watch ID provided on the WatchStream");
    watch.watch("b", Some(WatchOptions::new().with_range("a"))).await.unwrap();
    assert_eq!(next(&mut watch).await.cancel_reason(), "mvcc: watcher range is empty");

    served.store.apply(vec![Mutation::put("a", "2"), Mutation::put("b", "1")]); // 3
    let changed = next(&mut watch).await;
    assert_eq!((changed.watch_id(), shown(&changed)), (0, vec!["a=2@3".to_owned()]));
    assert_eq!(changed.events()[0].prev_kv().unwrap().value(), b"1");
    served.store.delete("b"); // 4
    let deleted = next(&mut watch).await;
    assert_eq!((deleted.watch_id(), shown(&deleted)), (7, vec!["b-@4".to_owned()]));
    assert!(deleted.events()[0].prev_kv().is_none(), "it was not asked for");

    watch.cancel(0).await.unwrap();
    let canceled = next(&mut watch).await;
    assert!(canceled.canceled() && canceled.watch_id() == 0);
    served.store.delete("a"); // 5
    assert_eq!(next(&mut watch).await.watch_id(), 7, "a cancelled watch is silent");
}

#[tokio::test]
async fn a_watch_tells_where_it_was_created_so_that_it_can_be_resumed() {
    let served = Served::start().await;
    served.store.put("a", "1"); // 2
    let mut client = served.client("admin-alpha").await;
    let mut watch = client.watch("a", None).await.unwrap();
    assert_eq!(next(&mut watch).await.header().unwrap().revision(), 2);
    served.store.put("a", "2");
    assert_eq!(shown(&next(&mut watch).await), ["a=2@3"], "what was before is not told");
    let mut future = client.watch("a", Some(WatchOptions::new().with_start_revision(5))).await.unwrap();
    assert!(next(&mut future).await.created());
    served.store.put("a", "3");
    served.store.put("a", "4");
    assert_eq!(shown(&next(&mut future).await), ["a=4@5"]);
}

#[tokio::test]
async fn a_watch_of_compacted_history_is_created_and_then_canceled_with_the_revision() {
    let served = Served::start().await;
    for value in 0..8 {
        served.store.put("a", value.to_string());
    }
    served.store.compact(Revision(6)).unwrap();
    let mut client = served.client("admin-alpha").await;
    let mut watch = client.watch("a", Some(WatchOptions::new().with_start_revision(3))).await.unwrap();
    let created = next(&mut watch).await;
    assert!(created.created() && !created.canceled());
    let canceled = next(&mut watch).await;
    assert!(canceled.canceled());
    assert_eq!(canceled.compact_revision(), 6);
    watch.watch("a", Some(WatchOptions::new().with_start_revision(6))).await.unwrap();
    assert!(next(&mut watch).await.created());
    assert_eq!(shown(&next(&mut watch).await)[0], "a=4@6");
}

#[tokio::test]
async fn a_forbidden_watch_is_created_and_canceled_with_the_reason_and_the_stream_goes_on() {
    let served = Served::start().await;
    let mut client = served.client("remote-beta").await;
    let mut watch = client.watch("cilium/", Some(WatchOptions::new().with_prefix())).await.unwrap();
    let refused = next(&mut watch).await;
    assert!(refused.created() && refused.canceled());
    assert_eq!(refused.cancel_reason(), "etcdserver: permission denied");
    watch.watch("cilium/.heartbeat", None).await.unwrap();
    assert!(!next(&mut watch).await.canceled());
    served.store.put("cilium/.heartbeat", "now");
    assert_eq!(shown(&next(&mut watch).await), ["cilium/.heartbeat=now@2"]);
}

#[tokio::test]
async fn progress_is_told_on_request_and_periodically_but_never_ahead_of_events() {
    let limits = GatewayLimits { progress_interval: Duration::from_millis(50), ..GatewayLimits::default() };
    let served =
        Served::with(Limits::default(), GatewayOptions { limits, ..GatewayOptions::default() }).await;
    let mut client = served.client("admin-alpha").await;
    let mut watch = client.watch("a", None).await.unwrap();
    assert!(next(&mut watch).await.created());
    for round in 0..50 {
        let unrelated = served.store.put("b", round.to_string());
        let related = if round % 2 == 0 { Some(served.store.put("a", round.to_string())) } else { None };
        watch.request_progress().await.unwrap();
        if let Some(revision) = related {
            assert_eq!(shown(&next(&mut watch).await), [format!("a={round}@{revision}")]);
        }
        let progress = next(&mut watch).await;
        assert_eq!((progress.watch_id(), progress.events().len()), (-1, 0));
        assert_eq!(progress.header().unwrap().revision(), related.unwrap_or(unrelated).0);
    }
    watch.cancel(0).await.unwrap();
    assert!(next(&mut watch).await.canceled());
    let options = WatchOptions::new().with_progress_notify();
    watch.watch("quiet", Some(options)).await.unwrap();
    assert!(next(&mut watch).await.created());
    let reached = served.store.put("b", "last");
    eventually("progress up to the last revision", async || {
        let progress = next(&mut watch).await;
        assert!(progress.events().is_empty() && progress.watch_id() == 1);
        (progress.header().unwrap().revision() == reached.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_large_commit_comes_whole_or_in_fragments_as_asked() {
    let served = Served::start().await;
    let client = served.client("admin-alpha").await;
    let mut kv = client.watch_client().max_decoding_message_size(64 << 20);
    let mut whole = kv.watch("a/", Some(WatchOptions::new().with_prefix())).await.unwrap();
    let mut parts = kv.watch("a/", Some(WatchOptions::new().with_prefix().with_fragment())).await.unwrap();
    assert!(next(&mut whole).await.created() && next(&mut parts).await.created());
    let value = "x".repeat(64 << 10);
    served.store.apply((0..100).map(|key| Mutation::put(format!("a/{key:03}"), value.clone())).collect());
    assert_eq!(next(&mut whole).await.events().len(), 100);
    let (mut events, mut responses) = (0, 0);
    while events < 100 {
        events += next(&mut parts).await.events().len();
        responses += 1;
    }
    assert!(responses > 3, "{responses} responses");
}

#[tokio::test]
async fn transactions_that_only_read_are_answered() {
    let served = Served::start().await;
    served.store.put("a", "1");
    served.store.put("b", "2");
    let mut client = served.client("admin-alpha").await;
    let txn = Txn::new()
        .when([
            Compare::value("a", CompareOp::Equal, "1"),
            Compare::version("absent", CompareOp::Equal, 0),
            Compare::mod_revision("b", CompareOp::Greater, 2),
        ])
        .and_then([TxnOp::get("a", None), TxnOp::get("b", None)])
        .or_else([TxnOp::get("absent", None)]);
    let response = client.txn(txn).await.unwrap();
    assert!(response.succeeded());
    assert_eq!(response.op_responses().len(), 2);
    assert_eq!(response.header().unwrap().revision(), 3);

    let absent = Txn::new().when([Compare::value("absent", CompareOp::NotEqual, "x")]);
    assert!(!client.txn(absent).await.unwrap().succeeded(), "no value of an absent key can be compared");
    let writes = Txn::new().and_then([TxnOp::get("a", None), TxnOp::put("a", "2", None)]);
    let error = client.txn(writes).await.unwrap_err().to_string();
    assert!(error.contains("etcdserver: permission denied"), "{error}");
    let many = Txn::new().and_then((0..129).map(|_| TxnOp::get("a", None)).collect::<Vec<_>>());
    let error = client.txn(many).await.unwrap_err().to_string();
    assert!(error.contains("etcdserver: too many operations in txn request"), "{error}");
}

#[tokio::test]
async fn every_answer_names_the_store_and_another_store_has_another_name() {
    let (one, other) = (Served::start().await, Served::start().await);
    let id = async |served: &Served| {
        let mut client = served.client("remote").await;
        let list = client.get("cilium/.heartbeat", Some(GetOptions::new().with_prefix())).await.unwrap();
        let mut watch = client.watch("cilium/.heartbeat", None).await.unwrap();
        let created = next(&mut watch).await;
        let status = client.status().await.unwrap();
        let ids =
            [list.header(), created.header(), status.header()].map(|header| header.unwrap().cluster_id());
        assert_eq!(ids, [served.store.id().0; 3]);
        assert!([list.header(), created.header()].iter().all(|header| header.unwrap().member_id() != 0));
        ids[0]
    };
    assert_ne!(id(&one).await, id(&other).await);
}
