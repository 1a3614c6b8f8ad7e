//! One number per label set, whatever happens to the objects that say so.

use super::*;

#[test]
fn pods_with_the_same_labels_share_an_identity_and_cost_one_request() {
    let mut world = World::running();
    for n in 0..10 {
        let (name, ip) = (format!("echo-{n}"), format!("10.244.0.{n}"));
        world.apply(Input::Endpoint(Event::Applied(pod(&name, "echo", &[&ip], OLD))));
    }
    assert_eq!(world.asked.len(), 1);
    world.answer();
    assert_eq!(world.keys.keys().filter(|key| key.starts_with("cilium/state/ip/")).count(), 10);
    assert_eq!(world.translator.counts().identities, 1);
}

#[test]
fn a_relabelled_pod_keeps_its_old_identity_until_the_new_one_is_stored() {
    let mut world = World::running();
    world.apply(Input::Endpoint(Event::Applied(pod("echo-1", "echo", &["10.244.0.7"], OLD))));
    world.answer();
    let before = world.address("10.244.0.7").id;
    world.apply(Input::Endpoint(Event::Applied(pod("echo-1", "other", &["10.244.0.7"], OLD))));
    assert_eq!(world.address("10.244.0.7").id, before);
    world.answer();
    assert_ne!(world.address("10.244.0.7").id, before);
}

#[test]
fn a_restart_finds_the_same_numbers_again_and_asks_for_nothing() {
    let mut first = World::running();
    first.apply(Input::Endpoint(Event::Applied(pod("echo-1", "echo", &["10.244.0.7"], OLD))));
    let stored: Vec<Input> = first.asked.iter().map(answer).collect();
    first.answer();
    let mut second = World::new(true);
    second.namespace("app", json!({}));
    second.apply(Input::Endpoint(Event::Listed(pod("echo-1", "echo", &["10.244.0.7"], OLD))));
    assert!(second.asked.is_empty(), "before the identities are listed nobody knows what is missing");
    stored.into_iter().for_each(|input| second.apply(input));
    second.lists_end();
    assert!(second.asked.is_empty());
    assert_eq!(second.keys, first.keys);
    assert_eq!(second.completed.len(), Section::ALL.len());
}

#[test]
fn canaries_wait_for_the_identities_of_the_pods_that_were_there() {
    let mut world = World::new(true);
    world.namespace("app", json!({}));
    world.apply(Input::Endpoint(Event::Listed(pod("echo-1", "echo", &["10.244.0.7"], OLD))));
    world.lists_end();
    assert!(world.completed.contains(&Section::Services) && world.completed.contains(&Section::Nodes));
    assert!(
        !world.completed.contains(&Section::Addresses) && !world.completed.contains(&Section::Identities)
    );
    // A pod that comes later does not hold them up.
    world.apply(Input::Endpoint(Event::Applied(pod("echo-2", "late", &["10.244.0.8"], OLD))));
    let early = world.asked.remove(0);
    world.apply(answer(&early));
    assert!(world.completed.contains(&Section::Addresses) && world.completed.contains(&Section::Identities));
}

#[test]
fn of_two_identities_for_one_label_set_all_replicas_take_the_lower_and_the_other_is_collected() {
    let mut world = World::running();
    world.apply(Input::Endpoint(Event::Applied(pod("echo-1", "echo", &["10.244.0.7"], OLD))));
    world.answer();
    let id = world.address("10.244.0.7").id.0;
    let labels = Labels::decode(world.value(&format!("cilium/state/identities/v1/id/{id}")).as_bytes())
        .expect("labels");
    let lower = 3 << 16 | 1;
    world.apply(Input::Identity(Event::Applied(identity(lower, &labels))));
    assert_eq!(world.address("10.244.0.7").id.0, lower);
    let delay = Duration::from_secs(900);
    world.translator.collect_garbage(Duration::ZERO, delay);
    world.drain();
    assert!(world.asked.is_empty(), "not before its time");
    world.translator.collect_garbage(delay, delay);
    world.drain();
    assert!(
        matches!(world.asked[..], [IdentityAction::Delete { id: gone, .. }] if gone == id),
        "{:?}",
        world.asked
    );
    world.answer();
    assert_eq!(world.address("10.244.0.7").id.0, lower);
    assert!(!world.keys.contains_key(&format!("cilium/state/identities/v1/id/{id}")));
}

#[test]
fn identities_that_others_made_are_never_collected() {
    let mut world = World::running();
    world.apply(Input::Identity(Event::Applied(fact::<CiliumIdentity>(json!({
        "metadata": {"name": "196915"}, "security-labels": {"k8s:app": "echo"},
    })))));
    for seconds in [0, 10, 20] {
        world.translator.collect_garbage(Duration::from_secs(seconds), Duration::from_secs(5));
        world.drain();
    }
    assert!(world.asked.is_empty());
}

#[test]
fn an_identity_in_use_that_somebody_deletes_is_stored_again_under_its_number() {
    let mut world = World::running();
    world.apply(Input::Endpoint(Event::Applied(pod("echo-1", "echo", &["10.244.0.7"], OLD))));
    world.answer();
    let id = world.address("10.244.0.7").id.0;
    world.apply(Input::Identity(Event::Deleted { name: Name::new("", &id.to_string()), uid: String::new() }));
    assert_eq!(world.address("10.244.0.7").id.0, id, "the address keeps its identity meanwhile");
    assert!(matches!(world.asked[..], [IdentityAction::Create { id: again, .. }] if again == id));
    world.answer();
    assert!(world.keys.contains_key(&format!("cilium/state/identities/v1/id/{id}")));
}

#[test]
fn a_number_that_somebody_else_took_is_passed_over() {
    let mut world = World::running();
    world.apply(Input::Endpoint(Event::Applied(pod("echo-1", "echo", &["10.244.0.7"], OLD))));
    let Some(IdentityAction::Create { id, .. }) = world.asked.pop() else { panic!("asked for an identity") };
    let mut others = Labels::new();
    others.insert_k8s("app", "theirs").expect("a label");
    world.apply(Input::Identity(Event::Applied(identity(id, &others))));
    assert!(
        matches!(world.asked[..], [IdentityAction::Create { id: next, .. }] if next != id),
        "{:?}",
        world.asked
    );
    world.answer();
    assert_ne!(world.address("10.244.0.7").id.0, id);
}

#[test]
fn when_all_numbers_are_taken_the_pod_is_named_and_served_as_soon_as_one_is_free() {
    let mut world = World::running();
    for id in 3 << 16..4 << 16 {
        let mut labels = Labels::new();
        labels.insert_k8s("n", &id.to_string()).expect("a label");
        world.translator.apply(Input::Identity(Event::Applied(identity(id, &labels))));
    }
    world.apply(Input::Endpoint(Event::Applied(pod("echo-1", "echo", &["10.244.0.7"], OLD))));
    world.apply(Input::Service(Event::Applied(service(json!({GLOBAL: "true"})))));
    assert!(world.asked.is_empty());
    assert_eq!(world.findings.len(), 1, "{:?}", world.findings);
    assert!(world.findings[0].starts_with("Pod app/echo-1: all 65536 identities"), "{:?}", world.findings);
    assert_eq!(world.translator.counts().pods_without_identity, 1);
    assert!(world.has("cilium/state/services/"), "the rest goes on");
    let free = 3 << 16 | 77;
    world.apply(Input::Identity(Event::Deleted {
        name: Name::new("", &free.to_string()),
        uid: String::new(),
    }));
    world.answer();
    assert_eq!(world.address("10.244.0.7").id.0, free);
    assert_eq!(world.translator.counts().pods_without_identity, 0);
}

#[test]
fn a_refused_identity_is_told_and_holds_nothing_else_up() {
    let mut world = World::new(true);
    world.namespace("app", json!({}));
    world.apply(Input::Endpoint(Event::Listed(pod("echo-1", "echo", &["10.244.0.7"], OLD))));
    world.lists_end();
    let Some(IdentityAction::Create { id, .. }) = world.asked.pop() else { panic!("asked for an identity") };
    world.apply(Input::IdentityRefused { id, why: "too long".to_owned() });
    assert!(world.findings[0].contains("too long"), "{:?}", world.findings);
    assert_eq!(world.completed.len(), Section::ALL.len());
    assert_eq!(world.translator.counts().pods_without_identity, 1);
}

#[test]
fn identities_out_of_range_and_of_another_cluster_stay_at_home() {
    let mut world = World::running();
    for (name, cluster) in [("65793", "real-a"), ("196999", "real-b")] {
        world.apply(Input::Identity(Event::Applied(fact::<CiliumIdentity>(json!({
            "metadata": {"name": name},
            "security-labels": {"k8s:app": "echo", "k8s:io.cilium.k8s.policy.cluster": cluster},
        })))));
    }
    assert!(!world.has("cilium/state/identities/"));
    assert_eq!(world.findings.len(), 1);
    assert!(
        world.findings[0].contains("outside of this cluster's range 196608 to 262143"),
        "{:?}",
        world.findings
    );
}
