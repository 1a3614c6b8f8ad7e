//! Whatever happens to store and connection, in whatever order: the consumer ends with what the store holds, is told
//! nothing twice, and never sees a key go that is in the store before and after an exchange.

use std::collections::BTreeMap;

use isthmus_kvstore::{
    Section,
    reader::{Reader, ReaderConfig},
};
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};
use tokio::time::{sleep, timeout};

use crate::{
    proxy::Proxy,
    side::{Engine, Side},
    wait::{Consumer, DEADLINE, until_status},
};

const PREFIX: &str = "cilium/state/services/v1/beta";
const CANARY: &str = "cilium/synced/beta/cilium/state/services/v1";
/// Never changed: what must not be seen to go.
const STAYS: &str = "stays";

#[derive(Debug, Clone)]
enum Step {
    Put(u8, u8),
    Delete(u8),
    /// A burst that a slow consumer cannot swallow at once.
    Burst(u8),
    Cut,
    Compact,
    /// Another store in its place, filled again key by key; cut once more on the way.
    Exchange {
        cut_after: u8,
    },
    /// The consumer takes in what is there.
    Drain,
    /// Time passes, so that something else is under way when the next step comes.
    Wait(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..12u8, 0..3u8).prop_map(|(key, value)| Step::Put(key, value)),
        4 => (0..12u8).prop_map(Step::Delete),
        1 => (0..12u8).prop_map(Step::Burst),
        2 => Just(Step::Cut),
        2 => Just(Step::Compact),
        1 => (0..6u8).prop_map(|cut_after| Step::Exchange { cut_after }),
        2 => Just(Step::Drain),
        3 => (0..30u8).prop_map(Step::Wait),
    ]
}

fn key(name: impl std::fmt::Display) -> String {
    format!("{PREFIX}/default/{name}")
}

/// Writes a whole export in the order that an exporter does, with a cut on the way.
async fn export(side: &Side, model: &BTreeMap<String, String>, proxy: &Proxy, cut_after: usize) {
    side.put("cilium/cluster-config/beta", r#"{"id":2,"capabilities":{"syncedCanaries":true}}"#).await;
    for (index, (key, value)) in model.iter().enumerate() {
        if index == cut_after {
            proxy.cut();
        }
        side.put(key, value).await;
    }
    side.put(CANARY, "now").await;
}

async fn run(engine: Engine, steps: &[Step]) {
    let mut side = Side::start(engine).await;
    let proxy = Proxy::to(side.port()).await;
    let mut model = BTreeMap::from([(key(STAYS), "1".to_owned())]);
    export(&side, &model, &proxy, usize::MAX).await;
    let config = ReaderConfig { channel_capacity: 2, ..ReaderConfig::new(side.config_at(proxy.port)) };
    let reader = Reader::spawn("beta".parse().unwrap(), config);
    let mut consumer = Consumer::new(reader.follow(Section::new(PREFIX, Some(CANARY))));
    consumer.until_synced().await;

    for step in steps {
        match step {
            Step::Put(name, value) => {
                model.insert(key(name), value.to_string());
                side.put(&key(name), &value.to_string()).await;
            }
            Step::Delete(name) => {
                model.remove(&key(name));
                side.delete(&key(name)).await;
            }
            Step::Burst(name) => {
                for round in 0..50 {
                    model.insert(key(name), format!("burst {round}"));
                    side.put(&key(name), &format!("burst {round}")).await;
                }
            }
            Step::Cut => proxy.cut(),
            Step::Compact => side.compact().await,
            Step::Exchange { cut_after } => {
                let next = Side::start_like(&side).await;
                proxy.lead_to(next.port());
                export(&next, &model, &proxy, usize::from(*cut_after)).await;
                side = next;
            }
            Step::Drain => consumer.drain(),
            Step::Wait(millis) => sleep(std::time::Duration::from_millis((*millis).into())).await,
        }
    }

    // A last word, so that it is known when everything has come.
    model.insert(key("last"), "1".into());
    side.put(&key("last"), "1").await;
    let settled = timeout(DEADLINE, async {
        while consumer.map != model {
            consumer.drain();
            sleep(std::time::Duration::from_millis(2)).await;
        }
    });
    assert!(settled.await.is_ok(), "the consumer has {:#?}, the store {model:#?}", consumer.map);
    until_status(&reader, "ready in the end", |status| status.ready()).await;
    consumer.drain();
    assert_eq!(consumer.map, model, "and it stays so");
    assert!(!consumer.deleted.contains(&key(STAYS)), "a key that always was in the store was seen to go");
}

/// Runs cases of random steps; a failing one is printed by the panic of `run`, together with its steps.
fn cases(engine: Engine, count: usize, length: usize) {
    let mut runner = TestRunner::new(Config::default());
    let steps = prop::collection::vec(step(), 1..length);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for _ in 0..count {
        let steps = steps.new_tree(&mut runner).unwrap().current();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            runtime.block_on(run(engine, &steps));
        }));
        if let Err(panic) = outcome {
            eprintln!("the steps were {steps:?}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn any_order_of_faults_ends_in_the_stores_content_on_the_gateway() {
    cases(Engine::Gateway, 25, 60);
}

#[test]
fn any_order_of_faults_ends_in_the_stores_content_on_etcd() {
    cases(Engine::Etcd, 5, 60);
}
