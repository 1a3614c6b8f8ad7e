//! The gateway beside a real etcd: a store that mirrors etcd's revisions answers every question as etcd does.

use std::process::{Command, Stdio};
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, GetOptions, PutOptions, SortOrder, SortTarget, Txn,
    TxnOp, WatchFilterType, WatchOptions, WatchStream,
};
use isthmus_kvstore::memory::{KeyValue, Mirrored, Revision};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tempfile::TempDir;

use crate::fixture::{DEADLINE, Running, Served, eventually};
use crate::ports;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirrored_store_answers_as_the_etcd_that_it_mirrors() {
    let etcd = Etcd::start().await;
    let served = Served::start().await;
    let mut real = etcd.client().await;
    let mut ours = served.client("admin-alpha").await;
    let mut random = Random::new();

    let mut mirror = Mirror::start(&mut real, &served).await;
    let lease = real.lease_grant(3600, None).await.unwrap().id();
    for _ in 0..200 {
        change(&mut real, random.one(&changes()), lease).await;
    }
    mirror.catch_up(&mut real).await;
    compare_reads(&mut real, &mut ours, &mut random, 300).await;
    compare_watches(&mut real, &mut ours, &mut random, 0).await;

    let compacted = served.store.revision().0 / 2;
    real.compact(compacted, None).await.unwrap();
    served.store.compact(Revision(compacted)).unwrap();
    for _ in 0..50 {
        change(&mut real, random.one(&changes()), lease).await;
    }
    mirror.catch_up(&mut real).await;
    compare_reads(&mut real, &mut ours, &mut random, 300).await;
    compare_watches(&mut real, &mut ours, &mut random, compacted).await;
}

/// Keys few enough that all of them collide, and that equal ones sort alike (etcd's sort is stable only for twelve).
fn key() -> impl Strategy<Value = String> {
    prop_oneof!["[ab]", "[ab]/[ab]", "[ab]/[ab]/x"]
}

#[derive(Clone, Debug)]
enum Change {
    Put(String, String, bool),
    Delete(String),
    DeletePrefix(String),
    Batch(Vec<(String, String)>),
}

fn changes() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (key(), "[a-c]{0,2}", any::<bool>()).prop_map(|(key, value, leased)| Change::Put(key, value, leased)),
        1 => key().prop_map(Change::Delete),
        1 => "[ab]/[ab]".prop_map(Change::DeletePrefix),
        1 => prop::collection::btree_map(key(), "[a-c]", 1..4).prop_map(|batch| Change::Batch(batch.into_iter().collect())),
    ]
}

async fn change(etcd: &mut Client, change: Change, lease: i64) {
    match change {
        Change::Put(key, value, leased) => {
            let options = leased.then(|| PutOptions::new().with_lease(lease));
            etcd.put(key, value, options).await.unwrap();
        }
        Change::Delete(key) => drop(etcd.delete(key, None).await.unwrap()),
        Change::DeletePrefix(prefix) => {
            etcd.delete(prefix, Some(DeleteOptions::new().with_prefix())).await.unwrap();
        }
        Change::Batch(puts) => {
            let puts: Vec<_> = puts.into_iter().map(|(key, value)| TxnOp::put(key, value, None)).collect();
            etcd.txn(Txn::new().and_then(puts)).await.unwrap();
        }
    }
}

#[derive(Clone, Debug)]
struct Read {
    key: String,
    end: End,
    limit: i64,
    revision: i64,
    sort: Option<(SortTarget, SortOrder)>,
    what: u8,
    bounds: [i64; 4],
}

#[derive(Clone, Debug)]
enum End {
    Key,
    Prefix,
    FromKey,
    Before(String),
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![Just(End::Key), Just(End::Prefix), Just(End::FromKey), key().prop_map(End::Before)]
}

fn reads(newest: i64) -> impl Strategy<Value = Read> {
    let target = prop_oneof![
        Just(SortTarget::Key),
        Just(SortTarget::Version),
        Just(SortTarget::Create),
        Just(SortTarget::Mod),
        Just(SortTarget::Value),
    ];
    let order = prop_oneof![Just(SortOrder::None), Just(SortOrder::Ascend), Just(SortOrder::Descend)];
    let bound = || prop_oneof![3 => Just(0), 1 => 0..newest];
    let revision = prop_oneof![2 => Just(0), 2 => 1..newest, 1 => Just(newest + 1), 1 => Just(-1)];
    (
        prop_oneof![9 => key(), 1 => Just(String::new())],
        end(),
        0..5_i64,
        revision,
        prop::option::of((target, order)),
        0..6_u8,
        [bound(), bound(), bound(), bound()],
    )
        .prop_map(|(key, end, limit, revision, sort, what, bounds)| Read {
            key,
            end,
            limit,
            revision,
            sort,
            what,
            bounds,
        })
}

impl Read {
    fn options(&self) -> GetOptions {
        let [min_mod, max_mod, min_create, max_create] = self.bounds;
        let mut options = GetOptions::new()
            .with_limit(self.limit)
            .with_revision(self.revision)
            .with_min_mod_revision(min_mod)
            .with_max_mod_revision(max_mod)
            .with_min_create_revision(min_create)
            .with_max_create_revision(max_create);
        options = match &self.end {
            End::Key => options,
            End::Prefix => options.with_prefix(),
            End::FromKey => options.with_from_key(),
            End::Before(end) => options.with_range(end.as_str()),
        };
        if let Some((target, order)) = self.sort {
            options = options.with_sort(target, order);
        }
        match self.what {
            0 => options.with_keys_only(),
            1 => options.with_count_only(),
            2 => options.with_serializable(),
            _ => options,
        }
    }

    async fn answer(&self, client: &mut Client) -> String {
        match client.get(self.key.as_str(), Some(self.options())).await {
            Ok(answer) => format!(
                "{:?} count {} more {} at {}",
                answer.kvs(),
                answer.count(),
                answer.more(),
                answer.header().unwrap().revision()
            ),
            Err(Error::GRpcStatus(status)) => format!("{:?}: {}", status.code(), status.message()),
            Err(other) => panic!("{other}"),
        }
    }
}

async fn compare_reads(real: &mut Client, ours: &mut Client, random: &mut Random, count: usize) {
    let newest = real.get("x", None).await.unwrap().header().unwrap().revision();
    for _ in 0..count {
        let read = random.one(&reads(newest));
        let (expected, found) = (read.answer(real).await, read.answer(ours).await);
        assert_eq!(found, expected, "{read:?}");
        let (target, operator) = (random.one(&(0..4_u8)), random.one(&(0..4_u8)));
        let number = random.one(&(0..newest));
        let txn = || {
            let key = read.key.as_str();
            let operator = [CompareOp::Equal, CompareOp::Greater, CompareOp::Less, CompareOp::NotEqual]
                [operator as usize];
            let compare = match target {
                0 => Compare::version(key, operator, number % 4),
                1 => Compare::create_revision(key, operator, number),
                2 => Compare::mod_revision(key, operator, number),
                _ => Compare::value(key, operator, "b"),
            };
            let compare = if number % 2 == 0 { compare.with_prefix() } else { compare };
            // A negative revision in a transaction is answered by etcd as it happens to be: now, or compacted.
            let options = Some(Read { revision: read.revision.max(0), ..read.clone() }.options());
            Txn::new().when([compare]).and_then([TxnOp::get(key, options)]).or_else([TxnOp::get("a", None)])
        };
        let show = |result: Result<etcd_client::TxnResponse, Error>| match result {
            Ok(answer) => {
                let gets = answer.op_responses().into_iter().map(|outcome| match outcome {
                    etcd_client::TxnOpResponse::Get(get) => {
                        format!("{:?} {} {}", get.kvs(), get.count(), get.more())
                    }
                    other => panic!("{other:?}"),
                });
                format!("{} {:?}", answer.succeeded(), gets.collect::<Vec<_>>())
            }
            Err(Error::GRpcStatus(status)) => format!("{:?}: {}", status.code(), status.message()),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(show(ours.txn(txn()).await), show(real.txn(txn()).await), "{read:?} in a transaction");
    }
}

/// The same watches on both; whatever each tells until the present must be the same.
async fn compare_watches(real: &mut Client, ours: &mut Client, random: &mut Random, compacted: i64) {
    let newest = real.get("x", None).await.unwrap().header().unwrap().revision();
    for _ in 0..30 {
        let (key, end) = (random.one(&key()), random.one(&end()));
        let mut start = random.one(&(1..newest + 1));
        if start == compacted {
            // etcd 3.4 loses a deletion at just that revision.
            start += 1;
        }
        let (no_put, no_delete, prev_kv) = random.one(&any::<(bool, bool, bool)>());
        let options = || {
            let mut filters = Vec::new();
            filters.extend(no_put.then_some(WatchFilterType::NoPut));
            filters.extend(no_delete.then_some(WatchFilterType::NoDelete));
            let options = WatchOptions::new().with_start_revision(start).with_filters(filters);
            let options = if prev_kv { options.with_prev_key() } else { options };
            match &end {
                End::Key => options,
                End::Prefix => options.with_prefix(),
                End::FromKey => options.with_from_key(),
                End::Before(end) => options.with_range(end.as_str()),
            }
        };
        let (expected, found) = tokio::join!(
            async { told(real.watch(key.as_str(), Some(options())).await.unwrap(), newest).await },
            async { told(ours.watch(key.as_str(), Some(options())).await.unwrap(), newest).await },
        );
        assert_eq!(found, expected, "watch {key:?} {end:?} from {start}, compacted {compacted}");
    }
}

/// Everything a watch tells about the past. Two more watches on the same stream, of the last change alone, mark the end.
/// Both engines serve a stream's watches of the past together, in no order: with the first mark what is asked for may
/// still be on its way, but not with the second, which is set when the first has come.
async fn told(mut watch: WatchStream, newest: i64) -> Vec<String> {
    const ENDS: [i64; 2] = [1000, 1001];
    let mut marks = ENDS.into_iter();
    set_mark(&mut watch, marks.next(), newest).await;
    let (mut told, mut last, mut created) = (Vec::new(), 0, false);
    let mut ended = false;
    while !(ended && created) {
        let response = tokio::time::timeout(DEADLINE, watch.message()).await.expect("the end of the past");
        let response = response.expect("the watch goes on").expect("the watch goes on");
        if ENDS.contains(&response.watch_id()) {
            if !response.events().is_empty() {
                ended = !set_mark(&mut watch, marks.next(), newest).await;
            }
            continue;
        }
        if response.created() {
            created = true;
            told.push(format!("created, id {}", response.watch_id()));
        }
        if response.canceled() {
            told.push(format!(
                "canceled: {:?}, compacted {}",
                response.cancel_reason(),
                response.compact_revision()
            ));
            break;
        }
        for event in response.events() {
            let kv = event.kv().unwrap();
            assert!(kv.mod_revision() >= last, "in order");
            last = kv.mod_revision();
            told.push(format!("{:?} {kv:?} before {:?}", event.event_type(), event.prev_kv()));
        }
    }
    told
}

/// Watches the last change by this id; false when there is none.
async fn set_mark(watch: &mut WatchStream, id: Option<i64>, newest: i64) -> bool {
    let Some(id) = id else { return false };
    let options = WatchOptions::new().with_watch_id(id).with_start_revision(newest);
    watch.watch("end", Some(options)).await.expect("the watch goes on");
    true
}

/// Copies etcd's commits into the store, one by one.
struct Mirror<'a> {
    served: &'a Served,
    watch: WatchStream,
}

impl<'a> Mirror<'a> {
    async fn start(etcd: &mut Client, served: &'a Served) -> Self {
        let options = WatchOptions::new().with_all_keys().with_start_revision(1);
        Self { served, watch: etcd.watch("", Some(options)).await.unwrap() }
    }

    async fn catch_up(&mut self, etcd: &mut Client) {
        let newest = etcd.put("end", "of this round", None).await.unwrap().header().unwrap().revision();
        while self.served.store.revision().0 < newest {
            let message = tokio::time::timeout(DEADLINE, self.watch.message()).await.expect("events");
            let response = message.unwrap().unwrap();
            for commit in response.events().chunk_by(|a, b| revision(a) == revision(b)) {
                let changes = commit.iter().map(mirrored).collect();
                self.served.store.apply_at(Revision(revision(&commit[0])), changes).unwrap();
            }
        }
    }
}

fn revision(event: &etcd_client::Event) -> i64 {
    event.kv().unwrap().mod_revision()
}

fn mirrored(event: &etcd_client::Event) -> Mirrored {
    let kv = event.kv().unwrap();
    let key = kv.key().to_vec().into();
    if event.event_type() == etcd_client::EventType::Delete {
        return Mirrored::Delete { key };
    }
    Mirrored::Put(KeyValue {
        key,
        value: kv.value().to_vec().into(),
        create_revision: Revision(kv.create_revision()),
        mod_revision: Revision(kv.mod_revision()),
        version: kv.version(),
        lease: kv.lease(),
    })
}

/// A real etcd of one member, on the loopback, its data in a folder that goes with it.
struct Etcd {
    endpoint: String,
    _process: Running,
    _data: TempDir,
}

impl Etcd {
    async fn start() -> Self {
        let data = TempDir::new().unwrap();
        let (clients, peers) = (ports::reserve(), ports::reserve());
        let endpoint = format!("http://127.0.0.1:{clients}");
        let peer = format!("http://127.0.0.1:{peers}");
        // It ends with the thread of its test, however that ends.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "etcd"])
            .args(["--name", "real", "--log-level", "error", "--unsafe-no-fsync"])
            .args(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("real={peer}")])
            .arg("--data-dir")
            .arg(data.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = Running::spawn(&mut command);
        let etcd = Self { endpoint, _process: process, _data: data };
        eventually("etcd answers", async || {
            let mut client = Client::connect([&etcd.endpoint], None).await.ok()?;
            tokio::time::timeout(Duration::from_secs(2), client.get("x", None)).await.ok()?.ok()
        })
        .await;
        etcd
    }

    async fn client(&self) -> Client {
        Client::connect([&self.endpoint], None).await.unwrap()
    }
}

/// The same questions in every run.
struct Random(TestRunner);

impl Random {
    fn new() -> Self {
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        Self(TestRunner::new_with_rng(Config::default(), rng))
    }

    fn one<S: Strategy>(&mut self, strategy: &S) -> S::Value {
        strategy.new_tree(&mut self.0).unwrap().current()
    }
}
