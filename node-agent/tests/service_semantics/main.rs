//! The rules of global services, row by row: once as a pure function, once with real sockets through the kernel.
//!
//! The second needs root, and brings its own namespaces and cgroup.

mod kernel;
#[path = "../datapath/sandbox.rs"]
#[expect(dead_code, reason = "shared with the tests of the datapath, which use all of it")]
mod sandbox;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use isthmus_bpf_abi::{Protocol, ServiceKey};
use isthmus_node_agent::mesh::Own;
use isthmus_node_agent::mesh::fact::{Moment, Provenance};
use isthmus_node_agent::plan::Dump;
use isthmus_node_agent::plan::model::MapModel;
use isthmus_node_agent::reconcile::{Policy, Reconciler};

use crate::table::{NODE, Row, rows};

#[test]
fn every_row_holds_as_a_pure_function() {
    let rows = rows();
    assert!(rows.len() > 70, "{} rows", rows.len());
    for row in rows {
        let mut maps = MapModel::default();
        let mut agent = agent(&row, &Dump::default());
        tell(&mut agent, &row);
        let (ops, _) = agent.plan(Moment::default(), true);
        maps.apply(&ops, |_| None);

        let found: BTreeMap<(SocketAddr, Protocol), BTreeSet<SocketAddr>> = maps
            .visible()
            .frontends
            .iter()
            .map(|(key, (backends, _))| (frontend(key), backends.keys().copied().collect()))
            .collect();
        assert_eq!(found, row.expected, "{}", row.name);

        let wanted = |key| agent.frontends().frontend(agent.mesh(), agent.rules(), key).expect("a frontend");
        let open_only: BTreeMap<_, BTreeSet<SocketAddr>> = maps
            .visible()
            .frontends
            .keys()
            .map(|key| (frontend(key), wanted(key).open_only.into_keys().collect::<BTreeSet<_>>()))
            .filter(|(_, backends)| !backends.is_empty())
            .collect();
        assert_eq!(open_only, row.open_only, "{}", row.name);
        assert!(maps.open_only().is_empty(), "{}: who never was chosen has nothing open", row.name);
    }
}

fn frontend(key: &ServiceKey) -> (SocketAddr, Protocol) {
    let protocol = Protocol::from_number(key.protocol).expect("TCP or UDP");
    (SocketAddr::new(key.addr.ip(), key.port()), protocol)
}

/// An agent of cluster alpha that has adopted what is in the maps.
fn agent(row: &Row, dump: &Dump) -> Reconciler {
    let own = Own { cluster: "alpha".into(), id: 1, node: NODE.into(), identity_shift: 16 };
    let policy = Policy {
        all_services: row.all_services,
        sync_timeout: Duration::from_secs(60),
        backend_capacity: sandbox::SIZES.backends,
    };
    Reconciler::new(own, policy, dump)
}

fn tell(agent: &mut Reconciler, row: &Row) {
    for event in row.all_events() {
        // Rows about what does not count are refused here; what counts is who answers in the end.
        let _ = agent.event(event, Provenance::default());
    }
}
