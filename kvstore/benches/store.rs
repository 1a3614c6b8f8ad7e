//! What the memory store costs: writes beside watchers, paginated lists, fan-out, bytes per key.
//!
//! `cargo bench -p isthmus-kvstore --bench store` prints a table and, with `ISTHMUS_BENCH_DIR` set, writes `store.json` there.
#![allow(clippy::print_stdout, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use isthmus_kvstore::memory::{KeyRange, Limits, MemoryStore, RangeRequest, StoreId, WatchRequest};

const KEYS: usize = 100_000;
const PUTS: usize = 200_000;
const WATCHERS: usize = 1_000;
const FAN_OUT_PUTS: usize = 2_000;
const PAGE: usize = 256;

struct Row {
    what: String,
    figure: f64,
    unit: &'static str,
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime starts");
    let _inside = runtime.enter();
    let mut rows = Vec::new();
    let mut row = |what: String, figure: f64, unit| rows.push(Row { what, figure, unit });

    let before = resident();
    let filled = store();
    puts(&filled, KEYS);
    let held = resident().saturating_sub(before);
    row("memory per key of 16 + 64 bytes, history included".into(), (held / KEYS) as f64, "B");
    let rate = per_second(KEYS, || list(&filled));
    row(format!("list of {KEYS} keys in pages of {PAGE}"), KEYS as f64 / rate * 1e3, "ms");
    let rate = per_second(1, || {
        let all = filled.range(&RangeRequest::new(KeyRange::prefix("key/"))).expect("now is readable");
        assert_eq!(all.kvs.len(), KEYS);
    });
    row(format!("list of {KEYS} keys at once"), 1e3 / rate, "ms");
    drop(filled);

    let alone = store();
    puts(&alone, PUTS);
    row("puts, no watcher".into(), per_second(PUTS, || puts(&alone, PUTS)), "/s");
    // One watcher starts the dispatcher thread; what it costs must not grow with more of them.
    for count in [1, WATCHERS] {
        let elsewhere = store();
        puts(&elsewhere, PUTS);
        let told = watchers(&elsewhere, count, |number| format!("other/{number}/"));
        let rate = per_second(PUTS, || puts(&elsewhere, PUTS));
        assert_eq!(told.load(Ordering::Relaxed), 0);
        row(format!("puts, watchers of other prefixes: {count}"), rate, "/s");
    }

    let followed = store();
    let told = watchers(&followed, WATCHERS, |_| "key/".into());
    let start = Instant::now();
    let rate = per_second(FAN_OUT_PUTS, || puts(&followed, FAN_OUT_PUTS));
    row(format!("puts, {WATCHERS} watchers of these keys, both cores busy with them"), rate, "/s");
    let events = FAN_OUT_PUTS * WATCHERS;
    while told.load(Ordering::Relaxed) < events {
        std::thread::park_timeout(Duration::from_micros(100));
    }
    let rate = events as f64 / start.elapsed().as_secs_f64();
    row(format!("events delivered to {WATCHERS} watchers of one prefix"), rate, "/s");

    if let Some(dir) = std::env::var_os("ISTHMUS_BENCH_DIR") {
        let fields = rows.iter().map(|row| (row.what.clone(), serde_json::json!(row.figure)));
        let report = serde_json::Value::Object(fields.collect());
        let dir = std::path::PathBuf::from(dir);
        std::fs::create_dir_all(&dir).expect("the folder for the report");
        std::fs::write(dir.join("store.json"), format!("{report:#}\n")).expect("the report");
    }
    for Row { what, figure, unit } in rows {
        println!("{what:<68} {figure:>14.0} {unit}");
    }
}

fn store() -> MemoryStore {
    MemoryStore::new(StoreId::random(), Limits::default())
}

fn puts(store: &MemoryStore, count: usize) {
    for number in 0..count {
        store.put(format!("key/{:012}", number % KEYS), vec![b'v'; 64]);
    }
}

/// Lists as Cilium's readers do.
fn list(store: &MemoryStore) {
    let revision = Some(store.revision());
    let mut range = KeyRange::prefix("key/");
    let mut seen = 0;
    loop {
        let page = store.range(&RangeRequest { revision, limit: PAGE, ..RangeRequest::new(range) });
        let page = page.expect("history is long enough");
        seen += page.kvs.len();
        let Some(last) = page.kvs.last().filter(|_| page.more) else { break };
        range = KeyRange::between([&last.key[..], &[0]].concat(), "key0");
    }
    assert_eq!(seen, KEYS);
}

/// Watchers that count what they are told.
fn watchers(store: &MemoryStore, count: usize, prefix: impl Fn(usize) -> String) -> Arc<AtomicUsize> {
    let told = Arc::new(AtomicUsize::new(0));
    for number in 0..count {
        let request = WatchRequest::new(KeyRange::prefix(prefix(number)));
        let mut watcher = store.watch(request).expect("now is watchable");
        let told = told.clone();
        tokio::spawn(async move {
            while let Ok(batch) = watcher.next().await {
                told.fetch_add(batch.events.len(), Ordering::Relaxed);
            }
        });
    }
    told
}

fn per_second(count: usize, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    count as f64 / start.elapsed().as_secs_f64()
}

/// Bytes of memory that this process has.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    pages.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
}
