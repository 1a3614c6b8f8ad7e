//! Names and their addresses: remembered as long as they count, looked up anew when what they led to has died.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use isthmus_kvstore::{
    client::steps::{self, NameServers, ResolveError, Resolver, Source},
    config::Endpoint,
    reader::{Reader, ReaderConfig},
};
use tokio::net::TcpListener;

use crate::{
    dns::{Dns, Mood},
    mint::{Mint, Wanted},
    place::{DEADLINE, Place, config, until},
};

fn endpoint(host: &str) -> Endpoint {
    format!("https://{host}:2379").parse().unwrap()
}

async fn addresses(resolver: &Resolver, host: &str) -> (Vec<String>, Source) {
    let resolved =
        resolver.resolve(&endpoint(host), &[].into()).await.unwrap_or_else(|error| panic!("{error}"));
    let mut addresses: Vec<_> = resolved.addresses.iter().map(ToString::to_string).collect();
    addresses.sort();
    (addresses, resolved.source)
}

async fn error(resolver: &Resolver, host: &str) -> ResolveError {
    resolver.resolve(&endpoint(host), &[].into()).await.unwrap_err()
}

#[tokio::test]
async fn an_answer_counts_for_its_time_and_not_longer() {
    let dns = Dns::start().await;
    dns.set("gw.example", &["10.0.0.1", "fd00::1"], 60);
    dns.set("brief.example", &["10.0.0.2"], 1);
    let resolver = dns.resolver();
    // The answer for one family is not waited for as soon as there is the other's.
    until("both families are answered in one go", async || {
        resolver.forget("gw.example");
        let (known, source) = addresses(&resolver, "gw.example").await;
        assert_eq!(source, Source::Asked);
        known == ["10.0.0.1:2379", "[fd00::1]:2379"]
    })
    .await;
    let asked = dns.asked("gw.example");
    dns.set("gw.example", &["10.0.0.9"], 60);
    for _ in 0..10 {
        let (known, source) = addresses(&resolver, "GW.example").await;
        assert_eq!((known.len(), source), (2, Source::Remembered));
    }
    assert_eq!(dns.asked("gw.example"), asked);

    addresses(&resolver, "brief.example").await;
    dns.set("brief.example", &["10.0.0.3"], 1);
    until("the brief answer has run out", async || {
        addresses(&resolver, "brief.example").await.0 == ["10.0.0.3:2379"]
    })
    .await;

    resolver.forget("gw.example");
    assert_eq!(addresses(&resolver, "gw.example").await, (vec!["10.0.0.9:2379".into()], Source::Asked));
}

#[tokio::test]
async fn each_way_to_fail_is_told_apart_and_says_who_was_asked() {
    let dns = Dns::start().await;
    let server = dns.address.to_string();
    let resolver = dns.resolver();
    dns.set("empty.example", &[], 60);

    let missing = error(&resolver, "missing.example").await;
    assert!(matches!(missing, ResolveError::NoSuchName { .. }), "{missing}");
    assert!(
        missing.to_string().contains("missing.example. at") && missing.to_string().contains(&server),
        "{missing}"
    );
    let empty = error(&resolver, "empty.example").await;
    assert!(matches!(empty, ResolveError::NoAddress { .. }), "{empty}");
    error(&resolver, "missing.example").await;
    assert_eq!(dns.asked("missing.example"), 1, "that there is none counts for a while, too");
    dns.set("missing.example", &["10.0.0.1"], 60);
    until("the name is there", async || {
        resolver.resolve(&endpoint("missing.example"), &[].into()).await.is_ok()
    })
    .await;

    dns.be(Mood::Failing);
    let failed = error(&resolver, "other.example").await;
    assert!(matches!(failed, ResolveError::ServerFailed { .. }), "{failed}");
    assert!(failed.to_string().contains(&server), "{failed}");
    dns.be(Mood::Silent);
    let begun = Instant::now();
    let silent = error(&resolver, "other.example").await;
    assert!(matches!(silent, ResolveError::TimedOut { .. }), "{silent}");
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    let nobody = Resolver::new(NameServers::Files {
        resolv_conf: "/nowhere/resolv.conf".into(),
        hosts: "/nowhere/hosts".into(),
    });
    let nobody = error(&nobody, "other.example").await;
    assert!(nobody.to_string().contains("/nowhere/resolv.conf"), "{nobody}");
    let long = error(&resolver, &format!("{}.example", "a".repeat(70))).await;
    assert!(matches!(long, ResolveError::NotAName { .. }), "{long}");
}

#[tokio::test]
async fn an_outage_of_dns_does_not_take_away_what_was_known() {
    let dns = Dns::start().await;
    dns.set("gw.example", &["10.0.0.1"], 60);
    let resolver = dns.resolver();
    addresses(&resolver, "gw.example").await;
    dns.be(Mood::Failing);
    for _ in 0..3 {
        resolver.forget("gw.example");
        let (known, source) = addresses(&resolver, "gw.example").await;
        assert_eq!(known, ["10.0.0.1:2379"]);
        assert!(matches!(source, Source::Stale(ResolveError::ServerFailed { .. })), "{source:?}");
    }
    dns.be(Mood::Well);
    dns.set("gw.example", &["10.0.0.2"], 60);
    assert_eq!(addresses(&resolver, "gw.example").await.0, ["10.0.0.2:2379"]);
}

#[tokio::test]
async fn addresses_and_overrides_are_not_looked_up() {
    let dns = Dns::start().await;
    dns.be(Mood::Silent);
    let resolver = dns.resolver();
    assert_eq!(addresses(&resolver, "10.0.0.1").await, (vec!["10.0.0.1:2379".into()], Source::Literal));
    assert_eq!(addresses(&resolver, "[fd00::1]").await, (vec!["[fd00::1]:2379".into()], Source::Literal));
    let configured = [("gw.example".to_owned(), vec![IpAddr::from([10, 0, 0, 2])])].into();
    let resolved = resolver.resolve(&endpoint("GW.example"), &configured).await.unwrap();
    assert_eq!(
        (resolved.addresses, resolved.source),
        (vec!["10.0.0.2:2379".parse().unwrap()], Source::Configured)
    );
}

#[tokio::test]
async fn the_hosts_file_and_the_search_domains_are_respected() {
    let dns = Dns::start().await;
    dns.set("gw.mesh.svc.cluster.local", &["10.0.0.1"], 60);
    dns.set("gw.mesh", &["10.0.0.2"], 60);
    let search = vec!["beta.svc.cluster.local".into(), "svc.cluster.local".into()];
    let servers = NameServers::Given { servers: vec![dns.address], search, ndots: 5 };
    let resolver = Resolver::new(servers);
    assert_eq!(addresses(&resolver, "gw.mesh").await.0, ["10.0.0.1:2379"]);
    assert_eq!(dns.asked("gw.mesh.beta.svc.cluster.local"), 1);
    assert_eq!(addresses(&resolver, "gw.mesh.").await.0, ["10.0.0.2:2379"]);
    let missing = error(&resolver, "nothing.here").await;
    let ResolveError::NoSuchName { asked, .. } = &missing else { panic!("{missing}") };
    assert_eq!(
        asked.names,
        ["nothing.here.beta.svc.cluster.local.", "nothing.here.svc.cluster.local.", "nothing.here."]
    );

    let files = tempfile::tempdir().unwrap();
    let [resolv_conf, hosts] = ["resolv.conf", "hosts"].map(|file| files.path().join(file));
    std::fs::write(&resolv_conf, "nameserver 127.0.0.1\n").unwrap();
    std::fs::write(&hosts, "# a comment\n10.0.0.3 other gw.example\nfd00::3 gw.example\n").unwrap();
    let resolver = Resolver::new(NameServers::Files { resolv_conf, hosts: hosts.clone() });
    assert_eq!(addresses(&resolver, "gw.example").await.0, ["10.0.0.3:2379", "[fd00::3]:2379"]);
    std::fs::write(&hosts, "10.0.0.4 gw.example\n").unwrap();
    until("the file is read again", async || addresses(&resolver, "gw.example").await.0 == ["10.0.0.4:2379"])
        .await;
}

#[tokio::test]
async fn name_servers_that_drop_questions_for_ipv6_hold_nobody_up() {
    let dns = Dns::start().await;
    dns.be(Mood::SilentOnIpv6);
    dns.set("gw.example", &["10.0.0.1"], 60);
    let took = quickest(async || {
        assert_eq!(addresses(&dns.resolver(), "gw.example").await.0, ["10.0.0.1:2379"]);
    })
    .await;
    assert!(took < Duration::from_secs(1), "{took:?}");
}

/// How long `work` takes when nothing else holds it up, as near as a few tries come to that.
async fn quickest(mut work: impl AsyncFnMut()) -> Duration {
    let mut quickest = Duration::MAX;
    for _ in 0..5 {
        let begun = Instant::now();
        work().await;
        quickest = quickest.min(begun.elapsed());
    }
    quickest
}

#[tokio::test]
async fn an_address_that_swallows_everything_delays_the_next_by_the_stagger_alone() {
    let good = TcpListener::bind("127.0.0.1:0").await.unwrap();
    // A queue of one that is full: what comes to it is dropped, as a firewall would.
    let hole = tokio::net::TcpSocket::new_v6().unwrap();
    hole.bind("[::1]:0".parse().unwrap()).unwrap();
    let hole = hole.listen(0).unwrap();
    let hole_address = hole.local_addr().unwrap();
    let mut filling = Vec::new();
    until("the queue is full", async || {
        let next =
            tokio::time::timeout(Duration::from_millis(200), tokio::net::TcpStream::connect(hole_address))
                .await;
        match next {
            Ok(stream) => filling.push(stream.unwrap()),
            Err(_) => return true,
        }
        false
    })
    .await;
    let good = good.local_addr().unwrap();
    let took = quickest(async || {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        let dialed = steps::dial(&[hole_address, good], deadline).await.unwrap();
        assert_eq!(dialed.address, good);
    })
    .await;
    assert!(took >= Duration::from_millis(200), "the first is waited for: {took:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");

    let soon = tokio::time::Instant::now() + Duration::from_millis(300);
    let error = steps::dial(&[hole_address], soon).await.unwrap_err();
    assert_eq!(error.silent, [hole_address]);
    assert!(error.to_string().contains("dropped on the way"), "{error}");
}

#[tokio::test]
async fn a_gateway_that_has_moved_is_found_when_its_connection_dies_long_before_the_ttl_runs_out() {
    let own = Mint::new("Alpha CA");
    let server = own.mint(Wanted::server(&["gw.example"]));
    let trusted = || crate::place::trust(&[(&own, isthmus_kvstore::gateway::Vouches::Anyone)]);
    let before = Place::start(([127, 0, 0, 1], 0).into(), &server, trusted()).await;
    let port = before.port();
    // The same port at another address of the loopback.
    let after = Place::start(([127, 0, 0, 2], port).into(), &server, trusted()).await;
    let dns = Dns::start().await;
    dns.set("gw.example", &["127.0.0.1"], 3600);
    let agent = own.mint(Wanted::client("agent-alpha")).live();
    let config = ReaderConfig {
        resolver: dns.resolver(),
        cluster_config_required: false,
        ..ReaderConfig::new(config(&[&format!("https://gw.example:{port}")], &own, Some(agent)))
    };
    let reader = Reader::spawn("alpha".parse().unwrap(), config);
    let mut status = reader.status();
    let at = |address: [u8; 4]| Some((address, port).into());
    let seen = tokio::time::timeout(DEADLINE, status.wait_for(|status| status.connected())).await;
    assert_eq!(seen.unwrap().unwrap().address, at([127, 0, 0, 1]));

    dns.set("gw.example", &["127.0.0.2"], 3600);
    before.gateway.shutdown().await;
    let moved = status.wait_for(|status| status.connected() && status.address == at([127, 0, 0, 2]));
    let moved =
        tokio::time::timeout(DEADLINE, moved).await.expect("the new address is found").unwrap().clone();
    assert_eq!(moved.failures, 1, "without another attempt at the old one");
    assert_eq!(moved.endpoint, Some(format!("https://gw.example:{port}")));
    assert_eq!(dns.asked("gw.example"), 2);
    drop(after);
}
