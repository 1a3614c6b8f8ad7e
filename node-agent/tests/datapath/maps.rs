//! Changes in batches, dumps, and what happens when a map is full.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use isthmus_bpf_abi::{Backend, IpcacheEntry, IpcacheKey, Protocol, Service, ServiceKey, SlotKey};
use isthmus_node_agent::datapath::{MapOp, OpError};

use crate::model::apply;
use crate::sandbox::{SIZES, sandbox};

fn service(id: u32, backends: u32) -> Vec<MapOp> {
    let addr = IpAddr::V4(Ipv4Addr::from(0x0a60_0000 + id));
    let key = ServiceKey::new(addr, 80, Protocol::Tcp);
    let mut ops = Vec::new();
    // Worst order first: the order of the list does not matter.
    ops.push(MapOp::PutService {
        key,
        service: Service { id, count: backends, affinity_seconds: 0, flags: 0 },
    });
    for slot in 0..backends {
        let backend = Backend::new(id, Ipv4Addr::from(0x0a00_0000 + slot).into(), 8080, Protocol::Tcp, 0);
        let record = id * backends + slot;
        ops.push(MapOp::PutSlot { key: SlotKey { service: id, slot }, slot: backend.slot(record) });
        ops.push(MapOp::PutBackend { id: record, backend });
    }
    ops
}

#[test]
fn what_is_put_is_dumped_and_what_is_deleted_is_gone() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath_with(|config| config.sizes.backends = 20_000);
        // More than one batch, and more than a bucket's worth.
        let ops = service(1, 9_000);
        apply(&datapath, &ops);
        assert_eq!(datapath.services().expect("services").len(), 1);
        assert_eq!(datapath.slots().expect("slots").len(), 9_000);
        let backends = datapath.backends().expect("backends");
        assert_eq!(backends.len(), 9_000);
        for op in &ops {
            if let MapOp::PutBackend { id, backend } = op {
                assert_eq!(backends[*id as usize - 9_000], (*id, *backend));
            }
        }
        let deletions: Vec<_> = ops
            .iter()
            .map(|op| match *op {
                MapOp::PutBackend { id, backend } => MapOp::DeleteBackend { id, service: backend.service },
                MapOp::PutSlot { key, .. } => MapOp::DeleteSlot { key },
                MapOp::PutService { key, service } => MapOp::DeleteService { key, service: service.id },
                other => other,
            })
            .collect();
        apply(&datapath, &deletions);
        apply(&datapath, &deletions);
        assert_eq!(datapath.services().expect("services"), []);
        assert_eq!(datapath.slots().expect("slots"), []);
        assert_eq!(datapath.backends().expect("backends"), []);
    });
}

#[test]
fn a_full_map_is_named_and_only_the_services_that_it_hits_are_held_back() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut ops = Vec::new();
        for id in 0..SIZES.services {
            ops.extend(service(1 + id, 1));
        }
        apply(&datapath, &ops);
        let one_too_many = service(1000, 1);
        let mut ops = one_too_many.clone();
        ops.retain(|op| !matches!(op, MapOp::PutBackend { .. } | MapOp::PutSlot { .. }));
        ops.extend(service(1, 1));
        let results = datapath.apply(&ops);
        let error = results[0].clone().expect_err("the map is full");
        assert!(matches!(error, OpError::Full { map: "services", capacity: 64, .. }), "{error}");
        assert!(error.to_string().contains("raise its size with --bpf-map-services"), "{error}");
        assert!(results[1..].iter().all(Result::is_ok), "{results:?}");

        // A backend beyond the last record: its slot and its service are held back.
        let mut ops = service(SIZES.backends, 1);
        ops.extend(service(2, 1));
        let results = datapath.apply(&ops);
        assert!(matches!(results[0], Err(OpError::Withheld { .. })), "{:?}", results[0]);
        assert!(matches!(results[1], Err(OpError::Withheld { .. })), "{:?}", results[1]);
        assert!(matches!(results[2], Err(OpError::Full { map: "backends", .. })), "{:?}", results[2]);
        assert!(results[3..].iter().all(Result::is_ok));
    });
}

#[test]
fn every_entry_of_a_batch_has_its_own_result() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        // Every third prefix is longer than an address: the kernel refuses it.
        let ops: Vec<_> = (0..30u32)
            .map(|number| {
                let mut key = IpcacheKey::host(Ipv4Addr::from(0x0a00_0000 + number).into());
                if number % 3 == 0 {
                    key.prefix_len = 400;
                }
                MapOp::PutIpcache { key, entry: IpcacheEntry::default() }
            })
            .collect();
        for (number, result) in datapath.apply(&ops).into_iter().enumerate() {
            assert_eq!(result.is_err(), number % 3 == 0, "{number}: {result:?}");
        }
        assert_eq!(datapath.ipcache().expect("ipcache").len(), 20);
    });
}

#[test]
fn the_longest_prefix_of_the_ipcache_wins_in_both_families() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let entry = |identity| IpcacheEntry { identity, ..IpcacheEntry::default() };
        let v4 = |text: &str| IpAddr::V4(text.parse::<Ipv4Addr>().expect("an address"));
        let v6 = |text: &str| IpAddr::V6(text.parse::<Ipv6Addr>().expect("an address"));
        let put = |addr, prefix, identity| MapOp::PutIpcache {
            key: IpcacheKey::new(addr, prefix),
            entry: entry(identity),
        };
        apply(
            &datapath,
            &[
                put(v4("0.0.0.0"), 0, 2),
                put(v4("10.1.0.0"), 16, 3),
                put(v4("10.1.2.3"), 32, 4),
                put(v6("fd00:1::"), 64, 5),
                put(v6("fd00:1::7"), 128, 6),
            ],
        );
        let identity = |addr| datapath.ipcache_lookup(addr).expect("ipcache").map(|entry| entry.identity);
        assert_eq!(identity(v4("10.1.2.3")), Some(4));
        assert_eq!(identity(v4("10.1.2.4")), Some(3));
        assert_eq!(identity(v4("192.0.2.1")), Some(2));
        assert_eq!(identity(v6("fd00:1::7")), Some(6));
        assert_eq!(identity(v6("fd00:1::8")), Some(5));
        assert_eq!(identity(v6("fd00:2::1")), None);
        apply(&datapath, &[MapOp::DeleteIpcache { key: IpcacheKey::host(v4("10.1.2.3")) }]);
        assert_eq!(identity(v4("10.1.2.3")), Some(3));
        let dumped = datapath.ipcache().expect("ipcache");
        assert_eq!(dumped.len(), 4);
        assert!(dumped.contains(&(IpcacheKey::new(v4("10.1.0.0"), 16), entry(3))));
    });
}
