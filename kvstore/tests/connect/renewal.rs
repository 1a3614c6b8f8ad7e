//! A client certificate that is replaced while a reader is connected by it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use isthmus_kvstore::{
    Section,
    config::LiveIdentity,
    gateway::Vouches,
    reader::{Reader, ReaderConfig, ReaderStatus, SectionEvent},
};
use tokio::sync::{mpsc, watch};

use crate::{
    mint::{Mint, Wanted},
    place::{DEADLINE, Place, config, trust, try_to_connect, until},
};

/// A reader of nodes, connected to a gateway by a certificate of `former`.
struct World {
    own: Mint,
    former: Mint,
    later: Mint,
    place: Place,
    identity: LiveIdentity,
    status: watch::Receiver<ReaderStatus>,
    events: mpsc::Receiver<SectionEvent>,
    _reader: Reader,
}

impl World {
    async fn start() -> Self {
        let [own, former, later] = ["Alpha CA", "The former CA", "The later CA"].map(Mint::new);
        let server = own.mint(Wanted::server(&["127.0.0.1"]));
        let trusted = trust(&[(&former, Vouches::Anyone)]);
        let place = Place::start(([127, 0, 0, 1], 0).into(), &server, trusted).await;
        let identity = former.mint(Wanted::client("agent-alpha")).live();
        let client = config(&[&format!("https://127.0.0.1:{}", place.port())], &own, Some(identity.clone()));
        let config = ReaderConfig {
            cluster_config_required: false,
            renew_within: Duration::from_millis(10),
            ..ReaderConfig::new(client)
        };
        let reader = Reader::spawn("alpha".parse().unwrap(), config);
        let section = Section::new("cilium/state/nodes/v1/alpha/", None::<&str>);
        let events = reader.follow(section);
        let status = reader.status();
        let mut world = Self { own, former, later, place, identity, status, events, _reader: reader };
        world.sees("n1").await;
        world
    }

    fn put(&self, node: &str) {
        self.place.store.put(format!("cilium/state/nodes/v1/alpha/{node}"), "{}");
    }

    /// Puts a node, which is told, and nothing else is.
    async fn sees(&mut self, node: &str) {
        self.put(node);
        let wanted = format!("cilium/state/nodes/v1/alpha/{node}");
        loop {
            match tokio::time::timeout(DEADLINE, self.events.recv()).await.expect("news").expect("a reader") {
                SectionEvent::Synced { .. } => {}
                SectionEvent::Put { key, .. } if key == wanted => return,
                other => panic!("{other:?} while {node} was waited for"),
            }
        }
    }

    fn renew(&self) {
        let renewed = self.later.mint(Wanted::client("agent-alpha"));
        self.identity.replace(&renewed.certificate, &renewed.key).unwrap();
    }

    /// Trusts only these from now on, and waits until the gateway has ended what was connected with the former certificate.
    async fn end_the_former(&self) {
        let former = self.former.mint(Wanted::client("agent-alpha"));
        let mut other = try_to_connect(&self.place.config(&self.own, &former)).await.unwrap();
        other.get("cilium/.heartbeat", None).await.unwrap();
        self.trust(&[&self.later]);
        until("connections of the former authority are ended", async || {
            other.get("cilium/.heartbeat", None).await.is_err()
        })
        .await;
    }

    fn trust(&self, authorities: &[&Mint]) {
        let authorities: Vec<_> = authorities.iter().map(|mint| (*mint, Vouches::Anyone)).collect();
        self.place.tls.set_trust(trust(&authorities)).unwrap();
    }

    /// Waits until another connection than the one since `before` is in use. There is one at any time.
    async fn goes_over(&mut self, before: DateTime<Utc>) {
        let other = self.status.wait_for(|status| {
            assert!(status.connected(), "{status:#?}");
            status.since != before
        });
        drop(tokio::time::timeout(DEADLINE, other).await.expect("another connection").unwrap());
    }
}

#[tokio::test]
async fn a_reader_goes_over_to_its_new_certificate_before_the_old_one_is_of_no_more_use() {
    let mut world = World::start().await;
    world.trust(&[&world.former, &world.later]);
    let before = world.status.borrow().since;
    world.renew();
    world.goes_over(before).await;
    world.sees("n2").await;

    world.end_the_former().await;
    world.sees("n3").await;
    assert_eq!(world.status.borrow().failures, 0);
}

#[tokio::test]
async fn a_new_certificate_that_is_not_trusted_yet_costs_nothing() {
    let mut world = World::start().await;
    let before = world.status.borrow().since;
    world.renew();
    // Nobody is let in by it.
    let refused = world.later.mint(Wanted::client("agent-alpha"));
    assert!(try_to_connect(&world.place.config(&world.own, &refused)).await.is_err());
    world.sees("n2").await;
    assert_eq!((world.status.borrow().since, world.status.borrow().failures), (before, 0));

    world.trust(&[&world.former, &world.later]);
    world.goes_over(before).await;
    world.sees("n3").await;
    assert_eq!(world.status.borrow().failures, 0);
}
