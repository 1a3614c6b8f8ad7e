use super::*;
use crate::bundle::tests::certificate;

fn secret(entries: &[(&str, &str)]) -> Secret {
    Secret {
        type_: Some(PEER_SECRET_TYPE.to_owned()),
        data: Some(
            entries
                .iter()
                .map(|(key, value)| ((*key).to_owned(), ByteString(value.as_bytes().to_vec())))
                .collect(),
        ),
        ..Secret::default()
    }
}

/// What must be there, with one key replaced or added.
fn with(key: &str, value: &str) -> Secret {
    let (ca, _) = certificate("beta", true);
    let mut secret =
        secret(&[(CLUSTER_NAME, "beta"), (ENDPOINTS, "https://192.0.2.1:2379"), (CA_BUNDLE, &ca)]);
    secret.data.as_mut().unwrap().insert(key.to_owned(), ByteString(value.as_bytes().to_vec()));
    secret
}

fn annotated(mut secret: Secret, annotations: &[(&str, &str)]) -> Secret {
    let all = annotations.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    secret.metadata.annotations = Some(all.collect());
    secret
}

fn error(key: &str, value: &str) -> String {
    PeerSecret::parse(&with(key, value)).expect_err("must be refused").to_string()
}

#[test]
fn what_is_built_reads_back_the_same() {
    let (ca, _) = certificate("beta", true);
    let (client, key) = certificate("remote-alpha", false);
    let peer = PeerSecret {
        cluster: "beta".parse().unwrap(),
        endpoints: vec!["https://a.example:2379".parse().unwrap(), "https://[::1]:1".parse().unwrap()],
        ca: CaBundle::parse(&ca).unwrap(),
        server_name: Some("gateway.example".to_owned()),
        addresses: BTreeMap::from([(
            "a.example".to_owned(),
            vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        )]),
        identity: Some(PeerIdentity { certificate: client.into(), key: key.into() }),
        relation: Relation::Connected,
    };
    let secret = peer.to_secret("isthmus-system");
    assert_eq!(secret.metadata.name.as_deref(), Some("peer-beta"));
    assert_eq!(secret.metadata.annotations.as_ref().unwrap()[CONNECT_ANNOTATION], "true");
    assert_eq!(PeerSecret::parse(&secret).unwrap(), peer);
    let admitted = PeerSecret { endpoints: Vec::new(), relation: Relation::Admitted, ..peer };
    let secret = admitted.to_secret("isthmus-system");
    assert_eq!(
        secret.metadata.annotations.as_ref().unwrap(),
        &BTreeMap::from(
            [(CONNECT_ANNOTATION, "false"), (ADMIT_ANNOTATION, "true")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
        )
    );
    assert!(!secret.data.as_ref().unwrap().contains_key(ENDPOINTS));
    assert_eq!(PeerSecret::parse(&secret).unwrap(), admitted);
}

#[test]
fn the_least_that_must_be_there_is_enough() {
    let peer = PeerSecret::parse(&with(ENDPOINTS, " https://a:1, https://b:2\n\nhttps://a:1\n")).unwrap();
    assert_eq!(
        peer.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["https://a:1", "https://b:2"]
    );
    assert_eq!(peer.server_name(), "beta.mesh.cilium.io");
    assert!(peer.identity.is_none() && peer.addresses.is_empty());
    assert_eq!(peer.relation, Relation::Apart, "nothing asks for the connection");
}

#[test]
fn only_the_word_true_connects_or_admits() {
    for (name, asked) in [(CONNECT_ANNOTATION, Relation::Connected), (ADMIT_ANNOTATION, Relation::Admitted)] {
        for (value, holds) in [("true", true), ("false", false), ("True", false), ("", false), ("1", false)] {
            let secret = annotated(with(SERVER_NAME, ""), &[(name, value)]);
            let relation = PeerSecret::parse(&secret).unwrap().relation;
            assert_eq!(relation, if holds { asked } else { Relation::Apart }, "{name}: {value:?}");
        }
    }
}

#[test]
fn who_is_connected_is_admitted_whatever_is_said_of_that() {
    for (connect, admit, relation) in [
        ("true", "false", Relation::Connected),
        ("true", "true", Relation::Connected),
        ("false", "true", Relation::Admitted),
        ("false", "false", Relation::Apart),
    ] {
        let both = [(CONNECT_ANNOTATION, connect), (ADMIT_ANNOTATION, admit)];
        assert_eq!(Relation::of(&annotated(with(SERVER_NAME, ""), &both)), relation, "{both:?}");
    }
    assert!(Relation::Connected > Relation::Admitted && Relation::Admitted > Relation::Apart);
}

#[test]
fn endpoints_are_needed_by_who_reads_from_them_alone() {
    let nowhere = with(ENDPOINTS, " \n");
    let connected = annotated(nowhere.clone(), &[(CONNECT_ANNOTATION, "true")]);
    assert_eq!(PeerSecret::parse(&connected), Err(PeerSecretError::Missing(ENDPOINTS)));
    for secret in [annotated(nowhere.clone(), &[(ADMIT_ANNOTATION, "true")]), nowhere] {
        assert!(PeerSecret::parse(&secret).unwrap().endpoints.is_empty());
    }
}

#[test]
fn every_key_is_named_when_it_is_missing() {
    for key in [CLUSTER_NAME, CA_BUNDLE] {
        let text = error(key, " \n");
        assert!(text.contains(&format!("`{key}` is missing")), "{text}");
        let mut without = with(key, "");
        without.data.as_mut().unwrap().remove(key);
        assert_eq!(PeerSecret::parse(&without), Err(PeerSecretError::Missing(key)));
    }
    let empty = Secret { type_: Some(PEER_SECRET_TYPE.to_owned()), ..Secret::default() };
    assert_eq!(PeerSecret::parse(&empty), Err(PeerSecretError::Missing(CLUSTER_NAME)));
}

#[test]
fn what_is_wrong_is_named_with_its_key_and_what_to_do() {
    let (server, key) = certificate("server", false);
    for (key, value, says) in [
        (CLUSTER_NAME, "Beta", "'B'"),
        (ENDPOINTS, "http://a:1", "does not begin with https://"),
        (CA_BUNDLE, "nothing", "no certificate"),
        (CA_BUNDLE, server.as_str(), "not that of an authority"),
        (SERVER_NAME, "*.example", "neither a DNS name"),
        (SERVER_NAME, "two words", "neither a DNS name"),
        (ADDRESSES, "a.example", "no address"),
        (ADDRESSES, "192.0.2.1 192.0.2.1", "not a DNS name"),
        (ADDRESSES, "a.example b.example", "IP address"),
        (CERTIFICATE, server.as_str(), "without `tls.key`"),
        (PRIVATE_KEY, key.as_str(), "without `tls.crt`"),
    ] {
        let text = error(key, value);
        assert!(text.contains(&format!("`{key}`")) && text.contains(says), "{text}");
    }
    let mut other = with(SERVER_NAME, "");
    other.type_ = Some("Opaque".to_owned());
    assert!(PeerSecret::parse(&other).unwrap_err().to_string().contains("delete it and create it anew"));
}

#[test]
fn everything_is_bounded() {
    let many = (0..=MAX_ENDPOINTS).map(|n| format!("https://a{n}:1\n")).collect::<String>();
    assert!(error(ENDPOINTS, &many).contains("more than 16"));
    let many = (0..=MAX_HOSTS).map(|n| format!("a{n} 192.0.2.1\n")).collect::<String>();
    assert!(error(ADDRESSES, &many).contains("more than 16 hosts"));
    let many = (0..=MAX_ADDRESSES).map(|n| format!("192.0.2.{n}")).collect::<Vec<_>>().join(",");
    assert!(error(ADDRESSES, &format!("a {many}")).contains("more than 16 addresses"));
    for key in [CLUSTER_NAME, ENDPOINTS, SERVER_NAME, ADDRESSES, CA_BUNDLE, CERTIFICATE, PRIVATE_KEY] {
        assert!(error(key, &"x".repeat(MAX_BUNDLE_BYTES + 1)).contains("bytes long"), "{key}");
    }
    let text = error(CLUSTER_NAME, &"x".repeat(10_000));
    assert!(text.len() < 500, "an error repeats no more than a little of what is wrong: {text}");
}

#[test]
fn a_private_key_is_shown_nowhere() {
    let (client, key) = certificate("remote-alpha", false);
    let mut secret = with(CERTIFICATE, &client);
    secret.data.as_mut().unwrap().insert(PRIVATE_KEY.to_owned(), ByteString(key.clone().into_bytes()));
    let shown = format!("{:?}", PeerSecret::parse(&secret).unwrap());
    assert!(!shown.contains("PRIVATE KEY") && !shown.contains(key.lines().nth(1).unwrap()), "{shown}");
    let wrong = error(PRIVATE_KEY, &key.replace("PRIVATE", "PUBLIC"));
    assert!(!wrong.contains(key.lines().nth(1).unwrap()), "{wrong}");
}
