use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use isthmus_bpf_abi::{IpcacheKey, Protocol};

use super::model::MapModel;
use super::*;

const KEY_PORT: u16 = 80;

fn key(last: u8) -> ServiceKey {
    ServiceKey::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, last)), KEY_PORT, Protocol::Tcp)
}

fn backend(number: u32) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number)), 8080)
}

fn frontend(backends: impl IntoIterator<Item = u32>) -> Frontend {
    Frontend {
        backends: backends.into_iter().map(|number| (backend(number), 0)).collect(),
        ..Frontend::default()
    }
}

/// `chosen` of `all`; the others take nothing new.
fn choosing(all: impl IntoIterator<Item = u32>, chosen: impl Fn(u32) -> bool) -> Frontend {
    let (backends, open_only): (Vec<_>, Vec<_>) = all.into_iter().partition(|number| chosen(*number));
    Frontend { open_only: frontend(open_only).backends, ..frontend(backends) }
}

fn only(key: ServiceKey, wanted: Option<Frontend>) -> Delta {
    Delta { frontends: BTreeMap::from([(key, wanted)]), ..Delta::default() }
}

/// A planner and the maps that it changes.
struct Maps {
    planner: Planner,
    model: MapModel,
}

impl Maps {
    fn new(capacity: u32) -> Self {
        Self { planner: Planner::adopt(&Dump::default(), capacity), model: MapModel::default() }
    }

    fn to(&mut self, key: ServiceKey, wanted: Option<Frontend>) -> Vec<MapOp> {
        let ops = self.planner.plan(&only(key, wanted), &Retention::NONE);
        let results = self.model.apply(&ops, |_| None);
        assert!(self.planner.confirm(&ops, &results).is_empty());
        ops
    }

    /// The record of a backend of the service that was made first.
    fn record(&self, number: u32) -> Option<(u32, Backend)> {
        let backends = self.model.dump().backends;
        backends.into_iter().find(|(_, known)| known.service == 1 && known.addr.ip() == backend(number).ip())
    }

    fn behind(&self, key: ServiceKey) -> Vec<SocketAddr> {
        self.model
            .visible()
            .frontends
            .get(&key)
            .map(|(all, _)| all.keys().copied().collect())
            .unwrap_or_default()
    }
}

#[test]
fn one_endpoint_of_ten_thousand_costs_a_constant_number_of_operations() {
    let mut maps = Maps::new(20_000);
    maps.to(key(1), Some(frontend(0..10_000)));

    let added = maps.to(key(1), Some(frontend(0..10_001)));
    assert_eq!(added.len(), 3, "backend, slot, count: {added:?}");

    let removed = maps.to(key(1), Some(frontend((0..10_001).filter(|number| *number != 17))));
    assert_eq!(removed.len(), 4, "slot into the gap, count, last slot, backend: {removed:?}");

    let exchanged =
        maps.to(key(1), Some(frontend((0..10_002).filter(|number| *number != 17 && *number != 4000))));
    assert_eq!(exchanged.len(), 3, "backend, slot, old backend: {exchanged:?}");

    let nothing =
        maps.to(key(1), Some(frontend((0..10_002).filter(|number| *number != 17 && *number != 4000))));
    assert_eq!(nothing, []);
}

#[test]
fn who_takes_nothing_new_keeps_its_record_at_the_cost_of_a_constant_number_of_operations() {
    let mut maps = Maps::new(20_000);
    maps.to(key(1), Some(frontend(0..10_000)));
    let (id, record) = maps.record(17).expect("a record");
    assert!(record.takes_new());

    let retired = maps.to(key(1), Some(choosing(0..10_000, |number| number != 17)));
    assert_eq!(retired.len(), 4, "slot into the gap, count, last slot, record: {retired:?}");
    assert!(!maps.behind(key(1)).contains(&backend(17)));
    assert_eq!(maps.record(17), Some((id, record.open_only())));
    assert_eq!(maps.to(key(1), Some(choosing(0..10_000, |number| number != 17))), []);

    let chosen = maps.to(key(1), Some(frontend(0..10_000)));
    assert_eq!(chosen.len(), 3, "record, slot, count: {chosen:?}");
    assert!(maps.behind(key(1)).contains(&backend(17)));
    assert_eq!(maps.record(17), Some((id, record)), "what is open goes on");

    maps.to(key(1), Some(choosing(0..10_000, |number| number != 17)));
    let gone = maps.to(key(1), Some(frontend((0..10_000).filter(|number| *number != 17))));
    assert_eq!(gone, [MapOp::DeleteBackend { id, service: 1 }]);
}

#[test]
fn who_never_was_chosen_has_nothing_open_and_gets_no_record() {
    let mut maps = Maps::new(4);
    maps.to(key(1), Some(choosing(0..100, |number| number < 3)));
    assert_eq!(maps.planner.filled().1, 3);
    assert!(maps.model.open_only().is_empty());
    assert!(maps.planner.short().is_empty());
}

#[test]
fn a_restarted_planner_adopts_who_serves_only_what_is_open() {
    let mut maps = Maps::new(64);
    maps.to(key(1), Some(frontend(0..4)));
    let wanted = choosing(0..4, |number| number > 1);
    maps.to(key(1), Some(wanted.clone()));
    let dump = maps.model.dump();

    maps.planner = Planner::adopt(&dump, 64);
    assert_eq!(maps.to(key(1), Some(wanted.clone())), []);
    maps.planner.readopt(&dump, 64);
    assert_eq!(maps.to(key(1), Some(wanted)), []);
    assert_eq!(maps.to(key(1), None).len(), 1 + 2 + 4, "the service, its slots and its records");
    assert_eq!(maps.model, MapModel::default());
}

#[test]
fn in_a_full_map_a_record_for_open_connections_gives_way_to_one_for_new_ones() {
    let mut maps = Maps::new(4);
    maps.to(key(1), Some(frontend(0..3)));
    maps.to(key(2), Some(frontend([7])));
    maps.to(key(1), Some(choosing(0..3, |number| number == 2)));

    // One free id is missing, and one record gives way. It is given out with the next plan.
    let ops = maps.to(key(2), Some(frontend([7, 8])));
    assert!(matches!(ops[..], [MapOp::DeleteBackend { service: 1, .. }]), "{ops:?}");
    assert_eq!(maps.planner.short(), &BTreeMap::from([(key(2), 1)]));
    maps.to(key(2), Some(frontend([7, 8])));
    assert_eq!(maps.behind(key(2)), [backend(7), backend(8)]);
    assert!(maps.planner.short().is_empty());
    assert_eq!(maps.model.open_only()[&key(1)].len(), 1, "as many as are needed");
    assert_eq!(maps.to(key(1), Some(choosing(0..3, |number| number == 2))), [], "it has none any more");

    // The one that is exchanged gives way as well, once its slot is gone.
    let exchanged = choosing([2, 3, 4], |number| number != 2);
    for _ in 0..3 {
        maps.to(key(1), Some(exchanged.clone()));
    }
    assert_eq!(maps.behind(key(1)), [backend(3), backend(4)]);
    assert!(maps.model.open_only().is_empty());
}

#[test]
fn ids_that_the_same_plan_frees_are_not_asked_of_who_serves_what_is_open() {
    let mut maps = Maps::new(3);
    maps.to(key(1), Some(frontend([0, 1])));
    maps.to(key(1), Some(choosing([0, 1], |number| number == 0)));
    maps.to(key(2), Some(frontend([7])));
    maps.to(key(2), Some(frontend([8])));
    assert!(maps.record(1).is_some());
    maps.to(key(2), Some(frontend([8])));
    assert_eq!(maps.behind(key(2)), [backend(8)]);
    assert!(maps.record(1).is_some());
}

#[test]
fn a_service_without_backends_is_there_and_refuses() {
    let mut maps = Maps::new(16);
    maps.to(key(1), Some(frontend([])));
    assert_eq!(maps.model.visible().frontends[&key(1)].0.len(), 0);
    maps.to(key(1), None);
    assert!(maps.model.visible().frontends.is_empty());
}

#[test]
fn a_service_id_is_never_given_again() {
    let mut maps = Maps::new(16);
    let mut ids = BTreeSet::new();
    for round in 0..10 {
        maps.to(key(round % 2), Some(frontend([1])));
        ids.extend(maps.model.dump().services.iter().map(|(_, service)| service.id));
        maps.to(key(round % 2), None);
    }
    assert_eq!(ids.len(), 10);
}

#[test]
fn when_backend_ids_run_out_the_service_has_those_that_fit_and_the_rest_when_there_is_room() {
    let mut maps = Maps::new(4);
    maps.to(key(1), Some(frontend(0..3)));
    maps.to(key(2), Some(frontend(0..3)));
    assert_eq!(maps.behind(key(1)).len(), 3);
    assert_eq!(maps.behind(key(2)).len(), 1);
    assert_eq!(maps.planner.short(), &BTreeMap::from([(key(2), 2)]));

    maps.to(key(1), None);
    maps.to(key(2), Some(frontend(0..3)));
    assert_eq!(maps.behind(key(2)).len(), 3);
    assert!(maps.planner.short().is_empty());
}

#[test]
fn a_refused_operation_leaves_the_service_as_it_was_and_the_next_plan_leads_on_from_there() {
    let mut maps = Maps::new(64);
    maps.to(key(1), Some(frontend(0..4)));
    let wanted = only(key(1), Some(frontend(2..9)));
    for refused in 0..20 {
        let ops = maps.planner.plan(&wanted, &Retention::NONE);
        let mut number = 0;
        let results = maps.model.apply(&ops, |_| {
            number += 1;
            (number == refused).then_some(OpError::Refused { map: "slots", errno: 12 })
        });
        let failures = maps.planner.confirm(&ops, &results);
        if number >= refused && refused > 0 {
            assert_eq!(failures.frontends, BTreeSet::from([key(1)]));
        }
        if failures.is_empty() {
            break;
        }
    }
    maps.to(key(1), Some(frontend(2..9)));
    assert_eq!(maps.behind(key(1)), (2..9).map(backend).collect::<Vec<_>>());
    assert_eq!(maps.planner.filled().1, 7);
}

#[test]
fn a_restarted_planner_adopts_what_is_there_and_cleans_up_what_nobody_reads() {
    let mut maps = Maps::new(64);
    maps.to(key(1), Some(frontend(0..4)));
    let mut dump = maps.model.dump();
    let stray = Backend::new(77, backend(50).ip(), 1, Protocol::Tcp, 0);
    dump.backends.push((40, stray));
    dump.slots.push((SlotKey { service: 78, slot: 0 }, stray.slot(40)));

    let mut planner = Planner::adopt(&dump, 64);
    let ops = planner.plan(&only(key(1), Some(frontend(0..4))), &Retention::NONE);
    assert_eq!(
        ops,
        [
            MapOp::DeleteBackend { id: 40, service: 77 },
            MapOp::DeleteSlot { key: SlotKey { service: 78, slot: 0 } }
        ]
    );
    let results = vec![Ok(()); ops.len()];
    assert!(planner.confirm(&ops, &results).is_empty());

    let ops = planner.plan(&only(key(2), Some(frontend([]))), &Retention::NONE);
    assert!(matches!(ops[..], [MapOp::PutService { service: Service { id: 79, .. }, .. }]), "{ops:?}");
}

#[test]
fn what_may_still_be_wanted_is_kept_until_its_cluster_has_been_read() {
    let mut maps = Maps::new(64);
    let mut both = frontend([1]);
    both.backends.insert(backend(9), 2);
    maps.to(key(1), Some(both));

    let read: &dyn Fn(u16) -> bool = &|cluster| cluster == 2;
    let retention = Retention { services: read, ipcache: &|_| false };
    let ops = maps.planner.plan(&only(key(1), Some(frontend([1, 3]))), &retention);
    let results = maps.model.apply(&ops, |_| None);
    maps.planner.confirm(&ops, &results);
    assert_eq!(maps.behind(key(1)), [backend(1), backend(3), backend(9)]);

    maps.to(key(1), Some(frontend([1, 3])));
    assert_eq!(maps.behind(key(1)), [backend(1), backend(3)]);
}

#[test]
fn what_is_open_is_served_on_until_the_cluster_of_its_backend_has_been_read() {
    let mut maps = Maps::new(64);
    let of_peer = BTreeMap::from([(backend(9), 2)]);
    maps.to(key(1), Some(Frontend { backends: of_peer.clone(), ..Frontend::default() }));
    maps.to(key(1), Some(Frontend { open_only: of_peer.clone(), ..frontend([1]) }));
    let (id, _) = maps.record(9).expect("a record");

    // The restarted agent knows of its own cluster alone.
    maps.planner = Planner::adopt(&maps.model.dump(), 64);
    let retention = Retention { services: &|cluster| cluster == 2, ipcache: &|_| false };
    assert_eq!(maps.planner.plan(&only(key(1), Some(frontend([1]))), &retention), []);
    let chosen = Frontend { backends: of_peer, ..Frontend::default() };
    let ops = maps.planner.plan(&only(key(1), Some(chosen)), &retention);
    assert!(ops.iter().any(|op| matches!(op, MapOp::PutBackend { id: put, .. } if *put == id)), "{ops:?}");

    assert_eq!(maps.to(key(1), Some(frontend([1]))), [MapOp::DeleteBackend { id, service: 1 }]);
}

#[test]
fn who_may_be_no_more_than_a_fallback_serves_on_what_is_open() {
    let mut maps = Maps::new(64);
    let remote = Frontend { backends: BTreeMap::from([(backend(9), 2)]), ..Frontend::default() };
    maps.to(key(1), Some(frontend([1])));
    maps.to(key(1), Some(Frontend { open_only: frontend([1]).backends, ..remote }));

    let retention = Retention { services: &|cluster| cluster == 2, ipcache: &|_| false };
    let fallback = Frontend { fallback: true, ..frontend([1, 2]) };
    assert_eq!(maps.planner.plan(&only(key(1), Some(fallback)), &retention), []);
}

#[test]
fn a_fallback_waits_while_the_preferred_side_may_only_not_have_been_read() {
    let mut maps = Maps::new(64);
    let remote = Frontend { backends: BTreeMap::from([(backend(9), 2)]), ..Frontend::default() };
    maps.to(key(1), Some(remote));

    let retention = Retention { services: &|cluster| cluster == 2, ipcache: &|_| false };
    let fallback = Frontend { fallback: true, ..frontend([1]) };
    assert_eq!(maps.planner.plan(&only(key(1), Some(fallback.clone())), &retention), []);

    maps.to(key(1), Some(fallback));
    assert_eq!(maps.behind(key(1)), [backend(1)]);
}

#[test]
fn an_address_stays_as_it_is_until_its_cluster_has_been_read() {
    let key = IpcacheKey::host(backend(1).ip());
    let entry = |identity, cluster| IpcacheEntry { identity, cluster, ..IpcacheEntry::default() };
    let dump = Dump { ipcache: vec![(key, entry(70_000, 2))], ..Dump::default() };
    let mut planner = Planner::adopt(&dump, 8);
    let wanted = |entry| Delta { ipcache: BTreeMap::from([(key, entry)]), ..Delta::default() };
    let unread = Retention { services: &|_| false, ipcache: &|entry| entry.cluster == 2 };
    for wanted in [Some(entry(70_001, 2)), Some(entry(70_000, 1)), None].map(wanted) {
        assert_eq!(planner.plan(&wanted, &unread), []);
        assert_eq!(planner.plan(&wanted, &Retention::NONE).len(), 1);
    }
    let new = IpcacheKey::host(backend(2).ip());
    let wanted = Delta { ipcache: BTreeMap::from([(new, Some(entry(70_002, 2)))]), ..Delta::default() };
    assert_eq!(planner.plan(&wanted, &unread).len(), 1, "what is new is in nobody's way");
}

#[test]
fn an_ipcache_entry_is_written_once_and_deleted_once() {
    let mut maps = Maps::new(8);
    let key = IpcacheKey::host(backend(1).ip());
    let entry = IpcacheEntry { identity: 70_000, ..IpcacheEntry::default() };
    let wanted = |entry| Delta { ipcache: BTreeMap::from([(key, entry)]), ..Delta::default() };
    for (wanted, operations) in
        [(Some(entry), 1), (Some(entry), 0), (None, 1), (None, 0)].map(|(e, n)| (wanted(e), n))
    {
        let ops = maps.planner.plan(&wanted, &Retention::NONE);
        assert_eq!(ops.len(), operations);
        let results = maps.model.apply(&ops, |_| None);
        maps.planner.confirm(&ops, &results);
    }
}
