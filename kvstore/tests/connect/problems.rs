//! What is said when TLS fails: whose certificate it is, what is wrong with it, and what to do.

use std::time::Duration;

use isthmus_kvstore::{
    Validity,
    client::steps::{self, TlsProblem, Why},
    config::{Identity, LiveIdentity},
    gateway::Vouches,
    reader::{Reader, ReaderConfig},
};
use tokio::{io::AsyncWriteExt as _, net::TcpListener};

use crate::{
    mint::{Mint, Minted, Wanted},
    place::{DEADLINE, Place, config, trust, try_to_connect},
};

fn agent(authority: &Mint) -> Minted {
    authority.mint(Wanted::client("agent-alpha"))
}

/// What a client of `own` is told by a gateway with this certificate.
async fn at_server(own: &Mint, server: &Minted) -> TlsProblem {
    let place = Place::start(([127, 0, 0, 1], 0).into(), server, trust(&[(own, Vouches::Anyone)])).await;
    try_to_connect(&place.config(own, &agent(own))).await.err().unwrap()
}

#[tokio::test]
async fn an_expired_server_is_told_with_both_clocks() {
    let own = Mint::new("Alpha CA");
    let problem = at_server(&own, &own.mint(Wanted::server(&["127.0.0.1"]).valid(-30, -2))).await;
    let TlsProblem::Expired { certificate, now } = &problem else { panic!("{problem}") };
    assert_eq!((certificate.subject.as_str(), certificate.issuer.as_str()), ("server", "Alpha CA"));
    assert_eq!(certificate.validity(*now), Validity::Expired);
    let text = problem.to_string();
    let until = certificate.not_after.format("%Y-%m-%dT%H:%M:%SZ").to_string();
    let clock = now.format("%Y-%m-%dT%H:%M:%SZ").to_string();
    assert!(text.contains(&until) && text.contains(&clock) && text.contains("renewed"), "{text}");

    let problem = at_server(&own, &own.mint(Wanted::server(&["127.0.0.1"]).valid(2, 30))).await;
    let TlsProblem::NotYetValid { certificate, now } = &problem else { panic!("{problem}") };
    let text = problem.to_string();
    let from = certificate.not_before.format("%Y-%m-%dT%H:%M:%SZ").to_string();
    assert_eq!(certificate.validity(*now), Validity::NotYet);
    assert!(text.contains(&from) && text.contains("clocks"), "{text}");
}

#[tokio::test]
async fn a_server_of_another_name_authority_or_kind_is_told_by_what_it_is() {
    let own = Mint::new("Alpha CA");
    let problem = at_server(&own, &own.mint(Wanted::server(&["beta.mesh.cilium.io", "10.0.0.1"]))).await;
    assert!(
        matches!(&problem, TlsProblem::WrongName { expected, .. } if expected == "127.0.0.1"),
        "{problem}"
    );
    let text = problem.to_string();
    assert!(text.contains("beta.mesh.cilium.io, 10.0.0.1") && text.contains("127.0.0.1"), "{text}");

    let other = Mint::new("Alpha CA");
    let problem = at_server(&own, &other.mint(Wanted::server(&["127.0.0.1"]))).await;
    let TlsProblem::UnknownIssuer { trusted, .. } = &problem else { panic!("{problem}") };
    assert_eq!(trusted, &["\"Alpha CA\""], "the same name, another key");
    let text = problem.to_string();
    assert!(text.contains("exchange ca.crt"), "{text}");

    let problem = at_server(&own, &own.mint(Wanted::client("a client"))).await;
    assert!(matches!(problem, TlsProblem::NotAServer { .. } | TlsProblem::WrongName { .. }), "{problem}");
}

#[tokio::test]
async fn a_refused_client_learns_which_of_its_certificates_and_why() {
    let own = Mint::new("Alpha CA");
    let place = Place::of(&own).await;
    let refused = async |identity: Option<&Minted>| {
        let mut config = place.config(&own, &agent(&own));
        config.identity = identity.map(|identity| Identity::Live(identity.live()));
        let problem = try_to_connect(&config).await.err().unwrap();
        match &problem {
            TlsProblem::Refused { why, .. } => (*why, problem.to_string()),
            other => panic!("{other}"),
        }
    };
    let expired = own.mint(Wanted::client("agent-alpha").valid(-30, -2));
    let (why, text) = refused(Some(&expired)).await;
    assert_eq!(why, Why::Validity);
    assert!(text.contains("\"agent-alpha\"") && text.contains("it has expired"), "{text}");
    let early = own.mint(Wanted::client("agent-alpha").valid(2, 30));
    let (why, text) = refused(Some(&early)).await;
    assert_eq!(why, Why::Validity);
    assert!(text.contains("it is not valid yet"), "{text}");
    let (why, text) = refused(Some(&agent(&Mint::new("Stranger")))).await;
    assert_eq!(why, Why::Authority);
    assert!(text.contains("issued by \"Stranger\"") && text.contains("exchange ca.crt"), "{text}");
    let (why, text) = refused(Some(&own.mint(Wanted::client("agent-alpha").for_servers()))).await;
    assert_eq!(why, Why::Certificate);
    assert!(text.contains("log of the gateway"), "{text}");
    let (why, text) = refused(None).await;
    assert_eq!(why, Why::Required);
    assert!(text.contains("was shown none"), "{text}");
}

#[tokio::test]
async fn the_own_certificate_can_be_judged_before_anybody_else_does() {
    let own = Mint::new("Alpha CA");
    let judge = |minted: Minted| {
        let config = config(&["https://127.0.0.1:1"], &own, Some(minted.live()));
        steps::own_certificate(&config, chrono::Utc::now()).unwrap().unwrap().1
    };
    assert_eq!(judge(agent(&own)), Validity::Valid);
    assert_eq!(judge(own.mint(Wanted::client("agent-alpha").valid(-30, -2))), Validity::Expired);
    assert_eq!(judge(own.mint(Wanted::client("agent-alpha").valid(2, 30))), Validity::NotYet);
    let none = config(&["https://127.0.0.1:1"], &own, None);
    assert_eq!(steps::own_certificate(&none, chrono::Utc::now()).unwrap(), None);
}

#[tokio::test]
async fn what_does_not_speak_tls_is_not_taken_for_a_certificates_fault() {
    let own = Mint::new("Alpha CA");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://{}", listener.local_addr().unwrap());
    let config = config(&[&endpoint], &own, Some(agent(&own).live()));
    let (problem, ()) = tokio::join!(try_to_connect(&config), async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    });
    let problem = problem.err().unwrap();
    assert!(matches!(problem, TlsProblem::NotTls), "{problem}");
    let (problem, ()) = tokio::join!(try_to_connect(&config), async {
        drop(listener.accept().await.unwrap());
    });
    let problem = problem.err().unwrap();
    assert!(matches!(problem, TlsProblem::Ended { .. }), "{problem}");
}

#[tokio::test]
async fn a_live_identity_is_taken_anew_at_each_handshake_and_its_exchange_drops_nothing() {
    let (own, next) = (Mint::new("Alpha CA"), Mint::new("Alpha CA"));
    let place = Place::of(&own).await;
    let identity = agent(&own).live();
    let mut config = place.config(&own, &agent(&own));
    config.identity = Some(Identity::Live(identity.clone()));
    assert_eq!(config, config.clone(), "clones share the identity");
    let mut client = try_to_connect(&config).await.unwrap_or_else(|problem| panic!("{problem}"));

    let stranger = agent(&next);
    identity.replace(&stranger.certificate, &stranger.key).unwrap();
    let problem = try_to_connect(&config).await.err().unwrap();
    assert!(matches!(problem, TlsProblem::Refused { why: Why::Authority, .. }), "{problem}");
    client.get("cilium/.heartbeat", None).await.unwrap();

    let good = agent(&own);
    let error = identity.replace(&good.certificate, &stranger.key).unwrap_err().to_string();
    assert!(error.contains("cannot be used together"), "{error}");
    let error = identity.replace("", &good.key).unwrap_err().to_string();
    assert!(error.contains("no PEM certificate"), "{error}");
    let error = identity.replace(&"-".repeat(2 << 20), &good.key).unwrap_err().to_string();
    assert!(error.contains("longer than"), "{error}");
    identity.replace(&good.certificate, &good.key).unwrap();
    try_to_connect(&config).await.unwrap_or_else(|problem| panic!("{problem}"));

    let shown = format!("{identity:?} {config:?} {:?}", LiveIdentity::new(&good.certificate, &good.key));
    assert!(
        shown.contains("agent-alpha") && !shown.contains("PRIVATE") && !shown.contains("BEGIN"),
        "{shown}"
    );
}

#[tokio::test]
async fn another_name_than_the_endpoints_can_be_verified() {
    let own = Mint::new("Alpha CA");
    let place = Place::of(&own).await;
    let mut config = place.config(&own, &agent(&own));
    config.server_name = Some("alpha.mesh.cilium.io".into());
    try_to_connect(&config).await.unwrap_or_else(|problem| panic!("{problem}"));
    config.server_name = Some("beta.mesh.cilium.io".into());
    let problem = try_to_connect(&config).await.err().unwrap();
    assert!(matches!(problem, TlsProblem::WrongName { .. }), "{problem}");
    config.server_name = Some("not a name".into());
    let problem = try_to_connect(&config).await.err().unwrap();
    assert!(matches!(problem, TlsProblem::Name { .. }), "{problem}");
}

#[tokio::test]
async fn a_readers_status_says_the_same() {
    let own = Mint::new("Alpha CA");
    let place = Place::of(&own).await;
    let expired = own.mint(Wanted::client("agent-alpha").valid(-30, -2));
    let reader = Reader::spawn("alpha".parse().unwrap(), ReaderConfig::new(place.config(&own, &expired)));
    let mut status = reader.status();
    let seen = tokio::time::timeout(DEADLINE, status.wait_for(|status| status.last_error.is_some())).await;
    let text = seen.unwrap().unwrap().last_error.clone().unwrap();
    assert!(text.contains("127.0.0.1") && text.contains("it has expired"), "{text}");
    assert!(reader.status().borrow().last_failure.unwrap() > chrono::Utc::now() - Duration::from_secs(60));
}
