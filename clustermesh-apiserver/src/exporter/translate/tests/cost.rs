//! What a change costs, counted in writes.

use super::*;

#[test]
fn a_change_writes_what_depends_on_it_and_a_repetition_writes_nothing() {
    let mut world = World::running();
    world.apply(Input::Node(Event::Applied(node("172.18.0.2"))));
    for n in 0..200 {
        let (name, ip) = (format!("echo-{n}"), format!("10.244.0.{n}"));
        world.apply(Input::Endpoint(Event::Applied(pod(&name, "echo", &[&ip], OLD))));
        world.answer();
    }
    world.writes = 0;
    world.apply(Input::Endpoint(Event::Applied(pod("echo-7", "echo", &["10.244.1.7"], OLD))));
    assert_eq!(world.writes, 2, "one address comes, one goes");
    world.apply(Input::Endpoint(Event::ListBegins));
    for n in (0..200).filter(|n| *n != 7) {
        let (name, ip) = (format!("echo-{n}"), format!("10.244.0.{n}"));
        world.apply(Input::Endpoint(Event::Listed(pod(&name, "echo", &[&ip], OLD))));
    }
    world.apply(Input::Node(Event::Applied(node("172.18.0.2"))));
    assert_eq!(world.writes, 2, "what is the same is not written again");
    world.apply(Input::Endpoint(Event::ListEnds));
    assert_eq!(world.writes, 3, "what the list lacks goes when it is complete");
}

#[test]
fn ten_thousand_pods_cost_one_write_each_and_a_node_those_of_its_pods() {
    const PODS: usize = 10_000;
    const NODES: usize = 100;
    const LABEL_SETS: usize = 500;
    let node = |n: usize, address: &str| {
        let mut node = node(address);
        node.name = Name::new("", &format!("node-{n}"));
        node
    };
    let pod = |n: usize| {
        fact::<Pod>(json!({
            "metadata": {"namespace": "app", "name": format!("pod-{n}"), "labels": {"app": format!("{}", n % LABEL_SETS)}},
            "spec": {"containers": [], "nodeName": format!("node-{}", n % NODES)},
            "status": {"phase": "Running", "podIP": format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255)},
        }))
    };
    let mut world = World::running();
    (0..NODES).for_each(|n| world.apply(Input::Node(Event::Applied(node(n, "172.18.0.1")))));
    (0..PODS).for_each(|n| world.apply(Input::Endpoint(Event::Applied(pod(n)))));
    assert_eq!(world.asked.len(), LABEL_SETS);
    world.answer();
    assert_eq!(world.writes, NODES + PODS + LABEL_SETS + 1, "and one for the namespace");
    assert_eq!(world.translator.counts().pods_without_identity, 0);

    world.writes = 0;
    world.apply(Input::Node(Event::Applied(node(7, "172.18.0.9"))));
    assert_eq!(world.writes, 1 + PODS / NODES);

    world.writes = 0;
    world.apply(Input::Endpoint(Event::ListBegins));
    (1..PODS).for_each(|n| world.apply(Input::Endpoint(Event::Listed(pod(n)))));
    assert_eq!(world.writes, 0);
    world.apply(Input::Endpoint(Event::ListEnds));
    assert_eq!(world.writes, 1, "the one that the list lacks");
}

#[test]
fn one_endpoint_of_a_service_of_ten_thousand_costs_one_write_for_each_audience() {
    let mut world = World::running();
    world.apply(Input::Service(Event::Applied(service(json!({GLOBAL: "true"})))));
    let hundred = |n: usize| -> Vec<String> { (0..100).map(|i| format!("10.1.{n}.{i}")).collect() };
    let part = |n: usize, addresses: &[String]| {
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        Input::Slice(Event::Applied(slice(&format!("echo-{n}"), &addresses)))
    };
    // They come in one batch, as at the start.
    (0..100).for_each(|n| world.translator.apply(part(n, &hundred(n))));
    world.writes = 0;
    world.drain();
    assert_eq!(world.writes, 2, "a hundred slices, one service");
    assert_eq!(world.service("app/echo").backends.len(), 10_000);
    world.writes = 0;
    world.apply(part(7, &hundred(7)[1..]));
    assert_eq!(world.writes, 2);
    assert_eq!(world.service("app/echo").backends.len(), 9_999);
}
