//! The queue against hand-made cases, and against an etcd that is a map.

use futures::FutureExt as _;
use proptest::prelude::*;

use super::*;

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn put(queue: &Queue, key: &str, value: &str) {
    queue.set(bytes(key), Some(bytes(value)));
}

fn batch(queue: &Queue) -> Vec<Write> {
    loop {
        match queue.take() {
            Work::Batch(batch) => return batch,
            Work::Lease => queue.add_lease(queue.leases().len() as i64 + 1),
            Work::Nothing => return Vec::new(),
        }
    }
}

#[test]
fn a_key_stands_in_line_once_with_its_latest_value() {
    let queue = Queue::new();
    put(&queue, "a", "1");
    put(&queue, "b", "1");
    put(&queue, "a", "2");
    let batch = batch(&queue);
    assert_eq!(batch.len(), 2);
    assert_eq!(batch[0].value.as_ref().unwrap().0, "2");
    queue.done(&batch, 2);
    put(&queue, "a", "2");
    assert_eq!(queue.take(), Work::Nothing, "the same value is not written again");
}

#[test]
fn a_key_in_flight_waits_for_its_turn() {
    let queue = Queue::new();
    put(&queue, "a", "1");
    let first = batch(&queue);
    put(&queue, "a", "2");
    assert_eq!(queue.take(), Work::Nothing);
    assert!(queue.flush().now_or_never().is_none());
    queue.done(&first, 2);
    let second = batch(&queue);
    assert_eq!(second[0].value.as_ref().unwrap().0, "2");
    assert!(queue.flush().now_or_never().is_none());
    queue.done(&second, 3);
    assert!(queue.flush().now_or_never().is_some());
}

#[test]
fn a_flush_waits_for_what_was_before_it_alone() {
    let queue = Queue::new();
    put(&queue, "a", "1");
    let first = batch(&queue);
    let mut flush = Box::pin(queue.flush());
    assert!(flush.as_mut().now_or_never().is_none());
    put(&queue, "b", "1");
    queue.done(&first, 2);
    assert!(flush.now_or_never().is_some());
}

#[test]
fn no_lease_holds_more_than_its_share() {
    let queue = Queue::new();
    for index in 0..2_500 {
        put(&queue, &index.to_string(), "1");
    }
    let mut written = HashMap::<i64, usize>::new();
    loop {
        let batch = batch(&queue);
        if batch.is_empty() {
            break;
        }
        for write in &batch {
            *written.entry(write.value.as_ref().unwrap().1).or_default() += 1;
        }
        queue.done(&batch, 2);
    }
    assert_eq!(written.values().sum::<usize>(), 2_500);
    assert_eq!(written.len(), 3);
    assert!(written.values().all(|keys| *keys <= KEYS_PER_LEASE));
}

#[test]
fn keys_of_a_lost_lease_are_written_again_under_another() {
    let queue = Queue::new();
    put(&queue, "a", "1");
    let first = batch(&queue);
    queue.done(&first, 2);
    queue.lease_lost(1);
    let again = batch(&queue);
    assert_eq!(again[0].key, "a");
    queue.done(&again, 4);
    // Its own deletion by the lost lease was at revision 3, and is seen only now.
    queue.vanished(&bytes("a"), 3);
    assert_eq!(queue.take(), Work::Nothing);
    queue.vanished(&bytes("a"), 5);
    assert_eq!(batch(&queue).len(), 1);
    assert_eq!(queue.suspects().now_or_never().unwrap().len(), 1);
}

#[test]
fn what_is_refused_goes_alone_and_behind_the_others() {
    let queue = Queue::new();
    put(&queue, "bad", "1");
    put(&queue, "good", "1");
    let both = batch(&queue);
    queue.failed(&both, true, "refused".into());
    let (one, other) = (batch(&queue), batch(&queue));
    assert_eq!((one.len(), other.len()), (1, 1));
    for single in [one, other] {
        if single[0].key == "bad" {
            queue.reject(&single[0], "too large".into());
        } else {
            queue.done(&single, 2);
        }
    }
    assert_eq!(queue.status().rejected, 1);
    assert!(queue.flush().now_or_never().is_some());
    put(&queue, "bad", "2");
    assert_eq!(batch(&queue).len(), 1);
}

#[test]
fn the_backlog_is_told_by_cluster_and_part_and_goes_with_the_cluster() {
    let queue = Queue::new();
    put(&queue, "cilium/state/nodes/v1/alpha/n1", "1");
    put(&queue, "cilium/cache/nodes/v1/beta/n1", "1");
    put(&queue, "cilium/cache/nodes/v1/beta/n2", "1");
    let told = || {
        let mut told: Vec<_> = queue
            .backlogs()
            .into_iter()
            .map(|of| (of.cluster.unwrap_or_default(), of.scope.as_str(), of.pending, of.failures))
            .collect();
        told.sort();
        told
    };
    assert_eq!(told(), [(String::new(), "nodes/v1", 1, 0), ("beta".into(), "nodes/v1", 2, 0)]);
    let first = batch(&queue);
    put(&queue, "cilium/cache/nodes/v1/beta/n2", "2");
    assert_eq!(told()[1].2, 3, "the newer change waits for the one under way");
    queue.failed(&first, false, "lost".into());
    assert_eq!(told(), [(String::new(), "nodes/v1", 1, 1), ("beta".into(), "nodes/v1", 2, 2)]);
    let again = batch(&queue);
    queue.done(&again, 2);
    queue.set(bytes("cilium/state/nodes/v1/alpha/n1"), None);
    for node in ["n1", "n2"] {
        queue.set(bytes(&format!("cilium/cache/nodes/v1/beta/{node}")), None);
    }
    let last = batch(&queue);
    queue.done(&last, 3);
    assert_eq!(told(), [(String::new(), "nodes/v1", 0, 1)], "nothing is left of beta");
}

/// Few keys of few clusters.
fn key_of(number: u8) -> Bytes {
    bytes(&format!("cilium/cache/nodes/v1/cluster-{}/{number}", number % 3))
}

fn clusters_of<'k>(keys: impl IntoIterator<Item = &'k Bytes>) -> BTreeSet<String> {
    let cluster = |key: &Bytes| String::from_utf8(crate::metrics::cluster_of(key)?.to_vec()).ok();
    keys.into_iter().filter_map(cluster).collect()
}

#[derive(Debug, Clone)]
enum Step {
    Put(u8, u8),
    Delete(u8),
    Take,
    Done(usize),
    Failed(usize, bool),
    LeaseLost(i64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..6u8, 0..4u8).prop_map(|(key, value)| Step::Put(key, value)),
        (0..6u8).prop_map(Step::Delete),
        Just(Step::Take),
        (0..4usize).prop_map(Step::Done),
        (0..4usize, any::<bool>()).prop_map(|(which, alone)| Step::Failed(which, alone)),
        (1..4i64).prop_map(Step::LeaseLost),
    ]
}

proptest! {
    /// Against an etcd that is a map: in the end it holds what was wanted, each key under a lease that lives.
    #[test]
    fn etcd_ends_with_what_was_wanted(steps in prop::collection::vec(step(), 0..120)) {
        let queue = Queue::new();
        let mut wanted = HashMap::new();
        let mut etcd = HashMap::new();
        let mut alive = HashSet::new();
        let mut granted = 0;
        let mut flying: Vec<Vec<Write>> = Vec::new();
        let mut revision = 1;
        let mut take = |flying: &mut Vec<Vec<Write>>, alive: &mut HashSet<i64>| loop {
            match queue.take() {
                Work::Nothing => return false,
                Work::Lease => {
                    granted += 1;
                    alive.insert(granted);
                    queue.add_lease(granted);
                }
                Work::Batch(batch) => {
                    for write in &batch {
                        let twice = flying.iter().flatten().any(|other| other.key == write.key);
                        assert!(!twice, "a key is in flight twice");
                    }
                    flying.push(batch);
                    return true;
                }
            }
        };
        let mut land = |batch: Vec<Write>, etcd: &mut HashMap<Bytes, (Bytes, i64)>, alive: &HashSet<i64>| {
            let lost = batch.iter().any(|write| write.value.as_ref().is_some_and(|(_, lease)| !alive.contains(lease)));
            if lost {
                // etcd refuses the whole transaction; the driver finds the lease gone.
                queue.failed(&batch, false, "lease not found".into());
                for (_, lease) in batch.iter().filter_map(|write| write.value.as_ref()) {
                    if !alive.contains(lease) {
                        queue.lease_lost(*lease);
                    }
                }
                return;
            }
            revision += 1;
            for write in &batch {
                match &write.value {
                    Some(value) => etcd.insert(write.key.clone(), value.clone()),
                    None => etcd.remove(&write.key),
                };
            }
            queue.done(&batch, revision);
        };
        for step in steps {
            match step {
                Step::Put(key, value) => {
                    wanted.insert(key_of(key), Bytes::from(vec![value]));
                    queue.set(key_of(key), Some(Bytes::from(vec![value])));
                }
                Step::Delete(key) => {
                    wanted.remove(&key_of(key));
                    queue.set(key_of(key), None);
                }
                Step::Take => {
                    take(&mut flying, &mut alive);
                }
                Step::Done(which) if which < flying.len() => {
                    land(flying.remove(which), &mut etcd, &alive);
                }
                Step::Failed(which, alone) if which < flying.len() => {
                    queue.failed(&flying.remove(which), alone, "lost".into());
                }
                Step::LeaseLost(lease) if alive.remove(&lease) => {
                    etcd.retain(|_, (_, held_by)| *held_by != lease);
                    queue.lease_lost(lease);
                }
                Step::Done(_) | Step::Failed(..) | Step::LeaseLost(_) => {}
            }
            let backlog: usize = queue.backlogs().iter().map(|of| of.pending).sum();
            prop_assert_eq!(backlog, queue.status().pending);
        }
        let mut rounds = 0;
        while take(&mut flying, &mut alive) || !flying.is_empty() {
            for batch in std::mem::take(&mut flying) {
                land(batch, &mut etcd, &alive);
            }
            rounds += 1;
            prop_assert!(rounds < 100, "it never comes to rest");
        }
        let held: HashMap<Bytes, Bytes> =
            etcd.iter().map(|(key, (value, _))| (key.clone(), value.clone())).collect();
        let told: BTreeSet<_> = queue.backlogs().into_iter().filter_map(|of| of.cluster).collect();
        prop_assert_eq!(told, clusters_of(held.keys()));
        prop_assert_eq!(held, wanted);
        prop_assert!(etcd.values().all(|(_, lease)| alive.contains(lease)));
        prop_assert_eq!(queue.status().pending, 0);
        prop_assert!(queue.flush().now_or_never().is_some());
    }
}
