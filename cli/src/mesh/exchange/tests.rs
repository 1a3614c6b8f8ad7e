use isthmus_crds::CaBundle;
use isthmus_crds::peer::{CA_BUNDLE, CONNECT_ANNOTATION, ENDPOINTS, PEER_SECRET_TYPE};
use k8s_openapi::ByteString;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

use super::*;

fn authority() -> CaBundle {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    CaBundle::parse(&params.self_signed(&key).expect("a certificate").pem()).expect("a bundle")
}

fn beta() -> ClusterInfo {
    ClusterInfo {
        cluster: "beta".parse().expect("a name"),
        id: 2.try_into().expect("an id"),
        mesh: isthmus_wire::MaxConnectedClusters::C255,
        version: "0.1.0".into(),
        ca: authority(),
        server_name: "beta.mesh.cilium.io".into(),
    }
}

fn endpoint(text: &str) -> PeerEndpoint {
    text.parse().expect("an endpoint")
}

type Present = BTreeMap<String, Secret>;

fn wanted<'a>(present: &'a Present, peer: &'a ClusterInfo) -> Wanted<'a> {
    Wanted {
        context: "kind-alpha",
        namespace: "isthmus-system",
        present: Some(present),
        peer,
        endpoints: Ok(vec![endpoint("https://192.0.2.2:2379")]),
        at_least: Relation::Connected,
    }
}

fn present(secret: Secret) -> Present {
    BTreeMap::from([(secret.name_any(), secret)])
}

/// As somebody else would make it.
fn foreign(name: &str, peer: &ClusterInfo) -> Secret {
    let nothing = BTreeMap::new();
    let mut secret = plan(wanted(&nothing, peer), false).expect("a step").secret;
    secret.metadata.name = Some(name.into());
    secret.metadata.labels = Some(BTreeMap::from([(MANAGED_BY_LABEL.into(), "argocd".into())]));
    secret
}

fn set(secret: &mut Secret, key: &str, value: &str) {
    secret.data.get_or_insert_default().insert(key.into(), ByteString(value.as_bytes().to_vec()));
}

#[test]
fn a_cluster_is_told_once() {
    let (nothing, beta) = (BTreeMap::new(), beta());
    let first = plan(wanted(&nothing, &beta), false).expect("a step");
    assert_eq!((first.change, first.name().as_str(), first.force), (Change::Created, "peer-beta", false));
    assert_eq!(first.secret.type_.as_deref(), Some(PEER_SECRET_TYPE));
    assert_eq!(first.secret.annotations()[CONNECT_ANNOTATION], "true");
    assert!(is_ours(&first.secret));
    let known = present(first.secret);
    assert_eq!(plan(wanted(&known, &beta), false).expect("a step").change, Change::Unchanged);
}

#[test]
fn what_has_changed_is_told_anew() {
    let (nothing, known_as) = (BTreeMap::new(), beta());
    let known = present(plan(wanted(&nothing, &known_as), false).expect("a step").secret);
    let both = format!("{}\n{}", known_as.ca.as_str(), authority().as_str());
    let other_ca = ClusterInfo { ca: CaBundle::parse(&both).expect("a bundle"), ..known_as.clone() };
    let other_name = ClusterInfo { server_name: "gateway.example".into(), ..known_as.clone() };
    for info in [&other_ca, &other_name] {
        let step = plan(wanted(&known, info), false).expect("a step");
        assert_eq!((step.change, step.force), (Change::Updated, true), "ours to change");
    }
    let elsewhere =
        Wanted { endpoints: Ok(vec![endpoint("https://b.example:1")]), ..wanted(&known, &known_as) };
    assert_eq!(plan(elsewhere, false).expect("a step").change, Change::Updated);
    let mut disconnected = known.clone();
    let secret = disconnected.get_mut("peer-beta").expect("the Secret");
    secret.annotations_mut().insert(CONNECT_ANNOTATION.into(), "false".into());
    let again = plan(wanted(&disconnected, &known_as), false).expect("a step");
    assert_eq!((again.change, again.wanted.relation), (Change::Updated, Relation::Connected));
}

#[test]
fn a_cluster_that_takes_another_s_name_is_not_believed() {
    let (nothing, beta) = (BTreeMap::new(), beta());
    let known = present(plan(wanted(&nothing, &beta), false).expect("a step").secret);
    let stranger = ClusterInfo { ca: authority(), ..beta };
    let finding = plan(wanted(&known, &stranger), false).expect_err("no CA in common");
    assert!(finding.is_error() && finding.problem.contains("peer-beta"), "{finding:?}");
    assert!(finding.advice.contains("--force"), "{finding:?}");
    assert_eq!(plan(wanted(&known, &stranger), true).expect("forced").change, Change::Updated);
}

#[test]
fn a_bundle_in_another_order_says_the_same() {
    let (nothing, beta) = (BTreeMap::new(), beta());
    let other = authority();
    let bundle = |first: &CaBundle, second: &CaBundle| {
        CaBundle::parse(&format!("{}\n{}", first.as_str(), second.as_str())).expect("a bundle")
    };
    let one = ClusterInfo { ca: bundle(&beta.ca, &other), ..beta.clone() };
    let turned = ClusterInfo { ca: bundle(&other, &beta.ca), ..beta.clone() };
    let known = present(plan(wanted(&nothing, &one), false).expect("a step").secret);
    assert_eq!(plan(wanted(&known, &turned), false).expect("a step").change, Change::Unchanged);
    assert_eq!(plan(wanted(&known, &beta), false).expect("a step").change, Change::Updated);
}

#[test]
fn what_somebody_else_made_is_left_alone_unless_forced() {
    let beta = beta();
    let same = present(foreign("from-git", &beta));
    assert_eq!(plan(wanted(&same, &beta), false).expect("a step").change, Change::Unchanged);

    let mut differs = foreign("from-git", &beta);
    set(&mut differs, ENDPOINTS, "https://beta.example:2379");
    let differs = present(differs);
    let finding = plan(wanted(&differs, &beta), false).expect_err("not ours");
    for says in ["isthmus-system/from-git", "argocd", "its endpoints"] {
        assert!(finding.problem.contains(says), "{}", finding.problem);
    }
    assert!(finding.advice.contains("--force"));
    let forced = plan(wanted(&differs, &beta), true).expect("a step");
    assert_eq!((forced.change, forced.name().as_str()), (Change::Updated, "from-git"));

    let mut broken = foreign("peer-beta", &beta);
    set(&mut broken, CA_BUNDLE, "nothing");
    plan(wanted(&present(broken), &beta), false).expect_err("it cannot be read");
}

#[test]
fn one_secret_is_about_one_cluster() {
    let beta = beta();
    let mut two = present(foreign("from-git", &beta));
    two.extend(present(foreign("peer-beta", &beta)));
    let finding = plan(wanted(&two, &beta), true).expect_err("two");
    assert!(finding.problem.contains("both about cluster beta"), "{}", finding.problem);
    let gamma = ClusterInfo { cluster: "gamma".parse().expect("a name"), ..beta.clone() };
    let misnamed = present(foreign("peer-beta", &gamma));
    let finding = plan(wanted(&misnamed, &beta), true).expect_err("misnamed");
    assert!(finding.problem.contains("another cluster than its name says"), "{}", finding.problem);
}

#[test]
fn endpoints_that_nobody_can_tell_are_kept_or_asked_for() {
    let (nothing, beta) = (BTreeMap::new(), beta());
    let unknown = || Err("Service isthmus-system/clustermesh-apiserver is of type ClusterIP".to_owned());
    let finding = plan(Wanted { endpoints: unknown(), ..wanted(&nothing, &beta) }, false);
    let finding = finding.expect_err("nobody can tell");
    assert!(finding.problem.contains("ClusterIP") && finding.advice.contains("--destination-endpoint"));
    let known = present(plan(wanted(&nothing, &beta), false).expect("a step").secret);
    let kept = plan(Wanted { endpoints: unknown(), ..wanted(&known, &beta) }, false).expect("a step");
    assert_eq!(kept.change, Change::Unchanged);
}

#[test]
fn what_is_brought_up_to_date_is_connected_as_before() {
    let (nothing, beta) = (BTreeMap::new(), beta());
    let as_before = |present| Wanted { at_least: Relation::Apart, ..wanted(present, &beta) };
    let connected = present(plan(wanted(&nothing, &beta), false).expect("a step").secret);
    let step = plan(as_before(&connected), false).expect("a step");
    assert_eq!((step.change, step.wanted.relation), (Change::Unchanged, Relation::Connected));
    let mut disconnected = connected.clone();
    let secret = disconnected.get_mut("peer-beta").expect("the Secret");
    secret.annotations_mut().insert(CONNECT_ANNOTATION.into(), "false".into());
    let step = plan(as_before(&disconnected), false).expect("a step");
    assert_eq!((step.change, step.wanted.relation), (Change::Unchanged, Relation::Apart));
}

#[test]
fn who_is_only_read_from_lets_the_reader_in_and_need_not_know_where_it_is() {
    let (nothing, beta) = (BTreeMap::new(), beta());
    let admits = |present| Wanted {
        at_least: Relation::Admitted,
        endpoints: Err("its gateway is a ClusterIP".to_owned()),
        ..wanted(present, &beta)
    };
    let step = plan(admits(&nothing), false).expect("a step");
    assert_eq!((step.change, step.wanted.relation), (Change::Created, Relation::Admitted));
    assert_eq!(step.secret.annotations()[ADMIT_ANNOTATION], "true");
    assert!(!step.secret.data.as_ref().expect("data").contains_key(ENDPOINTS));
    let admitted = present(step.secret);
    assert_eq!(plan(admits(&admitted), false).expect("a step").change, Change::Unchanged);

    let reads = plan(wanted(&admitted, &beta), false).expect("a step");
    assert_eq!((reads.change, reads.wanted.relation), (Change::Updated, Relation::Connected));
    assert_eq!(reads.secret.annotations()[CONNECT_ANNOTATION], "true");
    assert_eq!(reads.secret.annotations()[ADMIT_ANNOTATION], "false", "or \"false\" would not disconnect it");
    let reading = present(reads.secret);
    let step = plan(admits(&reading), false).expect("a step");
    assert_eq!((step.change, step.wanted.relation), (Change::Unchanged, Relation::Connected));
    let nowhere = Wanted { at_least: Relation::Connected, ..admits(&admitted) };
    let finding = plan(nowhere, false).expect_err("who reads must know where");
    assert!(finding.problem.contains("ClusterIP"), "{}", finding.problem);
}

#[test]
fn where_secrets_may_not_be_read_the_api_server_decides() {
    let (nothing, beta) = (BTreeMap::new(), beta());
    let step = plan(Wanted { present: None, ..wanted(&nothing, &beta) }, false).expect("a step");
    assert_eq!((step.change, step.force), (Change::Unknown, false));
    let admits = Wanted { present: None, at_least: Relation::Admitted, ..wanted(&nothing, &beta) };
    let finding = plan(admits, false).expect_err("it may read from beta, and would be disconnected");
    assert!(finding.advice.contains("grant"), "{}", finding.advice);
}
