use std::time::Duration;

use isthmus_crds::CaBundle;
use isthmus_crds::peer::{ADMIT_ANNOTATION, CONNECT_ANNOTATION};
use k8s_openapi::ByteString;
use k8s_openapi::jiff::Timestamp;

use super::*;
use crate::pki::{Authority, Client};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn authority() -> Authority {
    Authority::generate("CA", DAY).unwrap()
}

fn book() -> Book {
    let own = authority().client(Client::Remote("alpha"), DAY).unwrap();
    let identity = LiveIdentity::new(&own.certificate, &own.key).unwrap();
    Book::new("system".to_owned(), "alpha".parse().unwrap(), identity)
}

fn peer(cluster: &str) -> PeerSecret {
    PeerSecret {
        cluster: cluster.parse().unwrap(),
        endpoints: vec!["https://192.0.2.1:2379".parse().unwrap()],
        ca: CaBundle::parse(authority().certificate()).unwrap(),
        server_name: None,
        addresses: BTreeMap::new(),
        identity: None,
        relation: Relation::Connected,
    }
}

/// As the API has it: named, and created some seconds after 1970.
fn stored(peer: &PeerSecret, name: &str, created: i64) -> Secret {
    let mut secret = peer.to_secret("system");
    secret.metadata.name = Some(name.to_owned());
    secret.metadata.uid = Some(format!("{name}-{created}"));
    secret.metadata.creation_timestamp = Some(Time(Timestamp::from_second(created).unwrap()));
    secret
}

fn set(secret: &mut Secret, key: &str, value: &str) {
    secret.data.as_mut().unwrap().insert(key.to_owned(), ByteString(value.as_bytes().to_vec()));
}

fn annotate(secret: &mut Secret, value: &str) {
    let annotations = secret.metadata.annotations.get_or_insert_default();
    annotations.insert(CONNECT_ANNOTATION.to_owned(), value.to_owned());
}

fn ask_for(secret: &mut Secret, relation: Relation) {
    secret.metadata.annotations = Some(relation.annotations());
}

fn secret(name: &str) -> Origin {
    Origin::Secret { namespace: "system".to_owned(), name: name.to_owned() }
}

#[test]
fn what_a_secret_says_becomes_a_client_configuration() {
    let mut book = book();
    let mut beta = peer("beta");
    beta.addresses.insert("gateway.example".to_owned(), vec!["192.0.2.9".parse().unwrap()]);
    book.applied(&stored(&beta, "peer-beta", 1));
    let found = book.found();
    let config = &found.configured["beta"];
    assert_eq!(config.client.endpoints[0].to_string(), "https://192.0.2.1:2379");
    assert_eq!(config.client.server_name.as_deref(), Some("beta.mesh.cilium.io"));
    assert_eq!(config.client.trusted_ca, Some(Pem::Text(beta.ca.shared())));
    assert_eq!(config.client.addresses, beta.addresses);
    assert_eq!(
        config.client.identity,
        Some(Identity::Live(book.identity.clone())),
        "who we are to everybody"
    );
    assert_eq!(config.authorities.as_deref(), Some(beta.ca.as_str()));
}

#[test]
fn only_what_matters_to_the_connection_changes_the_digest() {
    let mut book = book();
    let mut beta = peer("beta");
    let digest = |book: &mut Book, beta: &PeerSecret| {
        let mut secret = stored(beta, "peer-beta", 1);
        secret.metadata.resource_version = Some("7".to_owned());
        book.applied(&secret);
        book.found().configured["beta"].digest
    };
    let first = digest(&mut book, &beta);
    let mut labelled = stored(&beta, "peer-beta", 1);
    labelled.metadata.labels.get_or_insert_default().insert("team".to_owned(), "blue".to_owned());
    set(&mut labelled, "note", "not ours");
    book.applied(&labelled);
    assert_eq!(book.found().configured["beta"].digest, first);

    beta.endpoints.push("https://192.0.2.2:2379".parse().unwrap());
    let second = digest(&mut book, &beta);
    beta.ca = CaBundle::parse(authority().certificate()).unwrap();
    let third = digest(&mut book, &beta);
    beta.addresses.insert("a.example".to_owned(), vec!["192.0.2.9".parse().unwrap()]);
    let fourth = digest(&mut book, &beta);
    beta.server_name = Some("other.example".to_owned());
    let fifth = digest(&mut book, &beta);
    let all = [first, second, third, fourth, fifth];
    assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), all.len());
}

#[test]
fn the_version_that_is_told_is_the_last_that_could_be_used() {
    let mut book = book();
    let mut beta = stored(&peer("beta"), "peer-beta", 1);
    let mut apply = |beta: &mut Secret, version: &str| {
        beta.metadata.resource_version = Some(version.to_owned());
        book.applied(beta);
        book.found().configured["beta"].clone()
    };
    let first = apply(&mut beta, "7");
    let version = |version: &str| {
        Some(SecretVersion { uid: "peer-beta-1".to_owned(), resource_version: version.to_owned() })
    };
    assert_eq!(first.version, version("7"));
    let second = apply(&mut beta, "8");
    assert_eq!(second.version, version("8"));
    assert_eq!(second.digest, first.digest, "it is no reason to connect anew");
    assert_ne!(second, first, "but it is told");
    set(&mut beta, "ca.crt", "?");
    assert_eq!(apply(&mut beta, "9").version, version("8"), "a bad edit is not in use");
}

#[test]
fn a_client_certificate_in_the_secret_is_used_and_renewed_without_a_new_connection() {
    let mut book = book();
    let theirs = authority();
    let mut beta = peer("beta");
    let issue = |beta: &mut PeerSecret| {
        let issued = theirs.client(Client::Remote("alpha"), DAY).unwrap();
        beta.identity = Some(PeerIdentity { certificate: issued.certificate.into(), key: issued.key.into() });
    };
    issue(&mut beta);
    book.applied(&stored(&beta, "peer-beta", 1));
    let before = book.found().configured["beta"].clone();
    assert_ne!(before.client.identity, Some(Identity::Live(book.identity.clone())));
    issue(&mut beta);
    book.applied(&stored(&beta, "peer-beta", 1));
    let after = book.found().configured["beta"].clone();
    assert_eq!(after.digest, before.digest);
    assert_eq!(after.client.identity, before.client.identity, "the same cell with another certificate in it");

    let other = theirs.client(Client::Remote("alpha"), DAY).unwrap();
    let mut wrong = stored(&beta, "peer-beta", 1);
    set(&mut wrong, "tls.key", &other.key);
    book.applied(&wrong);
    let found = book.found();
    assert!(found.refused[&secret("peer-beta")].reason.contains("`tls.crt`"), "{found:?}");
    assert!(found.configured.contains_key("beta"));
}

#[test]
fn a_bad_edit_cuts_nobody_off_and_taking_the_annotation_away_does() {
    let mut book = book();
    let mut beta = stored(&peer("beta"), "peer-beta", 1);
    book.applied(&beta);
    let digest = book.found().configured["beta"].digest;
    set(&mut beta, "endpoints", "http://nowhere");
    book.applied(&beta);
    let found = book.found();
    assert_eq!(found.configured["beta"].digest, digest, "the last usable configuration stays");
    let refused = &found.refused[&secret("peer-beta")];
    assert!(
        refused.reason.contains("`endpoints`") && refused.reason.contains("stays connected"),
        "{refused:?}"
    );
    assert_eq!(refused.uid.as_deref(), Some("peer-beta-1"));

    annotate(&mut beta, "false");
    book.applied(&beta);
    assert_eq!(book.found(), Found::default(), "what is not to be connected need not be right");
    annotate(&mut beta, "true");
    book.applied(&beta);
    assert!(book.found().configured.is_empty(), "what it said long ago is forgotten");
}

#[test]
fn who_is_admitted_is_vouched_for_and_not_read_from() {
    let mut book = book();
    let mut beta = peer("beta");
    beta.relation = Relation::Admitted;
    beta.endpoints.clear();
    let mut secret_of_beta = stored(&beta, "peer-beta", 1);
    secret_of_beta.metadata.resource_version = Some("7".to_owned());
    book.applied(&secret_of_beta);
    let found = book.found();
    assert!(found.configured.is_empty() && found.refused.is_empty(), "{found:?}");
    let admission = &found.admitted["beta"];
    assert_eq!(&*admission.authorities, beta.ca.as_str());
    assert_eq!(admission.origin, secret("peer-beta"));
    assert_eq!(admission.version.as_ref().unwrap().resource_version, "7");

    set(&mut secret_of_beta, "ca.crt", "?");
    book.applied(&secret_of_beta);
    let found = book.found();
    assert_eq!(&found.admitted["beta"], admission, "a bad edit shuts nobody out");
    let refused = &found.refused[&secret("peer-beta")];
    assert!(refused.reason.contains("stays admitted as it was"), "{refused:?}");
    assert_eq!(refused.relation, Relation::Admitted);

    let mut own = stored(&peer("alpha"), "peer-alpha", 1);
    ask_for(&mut own, Relation::Admitted);
    book.applied(&own);
    assert!(!book.found().admitted.contains_key("alpha"), "nobody vouches for us but ourselves");

    secret_of_beta.metadata.annotations.as_mut().unwrap().remove(ADMIT_ANNOTATION);
    book.applied(&secret_of_beta);
    let found = book.found();
    assert!(found.admitted.is_empty() && found.configured.is_empty(), "neither is asked for");
}

#[test]
fn what_is_asked_for_is_in_the_annotations_also_when_the_rest_cannot_be_used() {
    let mut book = book();
    let mut beta = stored(&peer("beta"), "peer-beta", 1);
    book.applied(&beta);
    set(&mut beta, "ca.crt", "?");
    ask_for(&mut beta, Relation::Admitted);
    book.applied(&beta);
    let found = book.found();
    assert!(found.configured.is_empty(), "nobody asks for the connection any more");
    assert!(found.admitted.contains_key("beta"), "and it is let in as it was");
    ask_for(&mut beta, Relation::Connected);
    book.applied(&beta);
    let found = book.found();
    assert!(found.configured.is_empty() && found.admitted.contains_key("beta"), "nothing new is usable");
    ask_for(&mut beta, Relation::Apart);
    book.applied(&beta);
    assert_eq!(book.found(), Found::default());
}

#[test]
fn of_two_for_one_cluster_the_older_one_says_whether_it_is_read_from() {
    let mut book = book();
    let mut admits = stored(&peer("beta"), "a", 1);
    ask_for(&mut admits, Relation::Admitted);
    book.applied(&stored(&peer("beta"), "b", 2));
    book.applied(&admits);
    let found = book.found();
    assert!(found.configured.is_empty() && found.admitted.contains_key("beta"), "{found:?}");
    let reason = &found.refused[&secret("b")].reason;
    assert!(reason.contains("Secret system/a") && reason.contains("older"), "{reason}");
    book.deleted(&admits);
    let found = book.found();
    assert!(found.configured.contains_key("beta") && found.admitted.is_empty() && found.refused.is_empty());
}

#[test]
fn another_secret_of_the_same_name_inherits_nothing() {
    let mut book = book();
    book.applied(&stored(&peer("beta"), "peer-beta", 1));
    let mut again = stored(&peer("beta"), "peer-beta", 2);
    set(&mut again, "ca.crt", "");
    book.applied(&again);
    let found = book.found();
    assert!(found.configured.is_empty());
    assert_eq!(found.refused[&secret("peer-beta")].cluster, Some("beta".parse().unwrap()));
}

#[test]
fn a_secret_that_was_made_anew_is_connected_anew_if_it_has_a_client_certificate() {
    let mut book = book();
    let mut beta = peer("beta");
    let config = |book: &mut Book, beta: &PeerSecret, created| {
        let secret = stored(beta, "peer-beta", created);
        book.applied(&secret);
        book.found().configured["beta"].clone()
    };
    let [first, second] = [1, 2].map(|created| config(&mut book, &beta, created));
    assert!(second.connects_like(&first), "who we are to everybody has not changed");
    let issued = authority().client(Client::Remote("alpha"), DAY).unwrap();
    beta.identity = Some(PeerIdentity { certificate: issued.certificate.into(), key: issued.key.into() });
    let [third, fourth] = [3, 4].map(|created| config(&mut book, &beta, created));
    assert!(!fourth.connects_like(&third), "what is renewed from now on is the new one's");
}

#[test]
fn of_two_that_describe_one_cluster_the_older_one_counts() {
    let mut book = book();
    book.applied(&stored(&peer("beta"), "another", 2));
    book.applied(&stored(&peer("beta"), "peer-beta", 1));
    let found = book.found();
    assert_eq!(found.configured["beta"].origin, secret("peer-beta"));
    let reason = &found.refused[&secret("another")].reason;
    assert!(reason.contains("Secret system/peer-beta") && reason.contains("older"), "{reason}");

    book.applied(&stored(&peer("beta"), "a", 1));
    assert_eq!(book.found().configured["beta"].origin, secret("a"), "of the same age: by name");
    book.deleted(&stored(&peer("beta"), "a", 1));
    book.deleted(&stored(&peer("beta"), "peer-beta", 1));
    let found = book.found();
    assert_eq!(found.configured["beta"].origin, secret("another"));
    assert!(found.refused.is_empty());
}

#[test]
fn the_own_name_and_names_that_cannot_be_read_are_refused() {
    let mut book = book();
    book.applied(&stored(&peer("alpha"), "peer-alpha", 1));
    let mut nameless = stored(&peer("beta"), "some-peer", 1);
    set(&mut nameless, "cluster-name", "?");
    book.applied(&nameless);
    let mut conventional = stored(&peer("beta"), "peer-gamma", 1);
    set(&mut conventional, "cluster-name", "?");
    book.applied(&conventional);
    let found = book.found();
    assert!(found.configured.is_empty());
    assert!(found.refused[&secret("peer-alpha")].reason.contains("this cluster itself"));
    assert_eq!(found.refused[&secret("some-peer")].cluster, None);
    assert_eq!(found.refused[&secret("peer-gamma")].cluster, Some("gamma".parse().unwrap()));
}

#[test]
fn a_list_holds_once_it_is_complete() {
    let mut book = book();
    book.applied(&stored(&peer("beta"), "peer-beta", 1));
    book.applied(&stored(&peer("gamma"), "peer-gamma", 1));
    book.begin_list();
    book.listed(&stored(&peer("beta"), "peer-beta", 1));
    assert_eq!(book.found().configured.len(), 2, "half a list removes nobody");
    book.begin_list();
    let mut broken = stored(&peer("beta"), "peer-beta", 1);
    set(&mut broken, "ca.crt", "?");
    book.listed(&broken);
    book.end_list();
    let found = book.found();
    assert_eq!(found.configured.keys().map(ClusterName::as_str).collect::<Vec<_>>(), ["beta"]);
    assert!(found.refused[&secret("peer-beta")].reason.contains("stays connected"));
}

#[test]
fn there_is_an_end_to_how_many_are_taken() {
    let mut book = book();
    let beta = peer("beta");
    for number in 0..MAX_SECRETS + 5 {
        book.applied(&stored(&beta, &format!("s{number:05}"), 1));
    }
    assert_eq!(book.entries.len(), MAX_SECRETS);
}
