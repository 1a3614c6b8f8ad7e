use super::*;

const HEAD: &str = "title: t\nclusters:\n- {name: alpha, id: 1, nodes: 2}\n- {name: beta, id: 2}\n";

fn parse(rest: &str) -> Result<Scenario, String> {
    Scenario::parse(&format!("{HEAD}{rest}"), PathBuf::from("."))
}

fn refusal(rest: &str) -> String {
    parse(rest).expect_err("it must be refused")
}

#[test]
fn what_is_left_out_has_a_sensible_value() {
    let scenario = parse("").unwrap();
    assert_eq!(scenario.families, Families::V4);
    assert_eq!(scenario.store, Store::Memory);
    assert_eq!(scenario.clusters[0].nodes, ["alpha-node1", "alpha-node2"]);
    assert_eq!(scenario.clusters[0].peers, ["beta"]);
    assert_eq!(scenario.clusters[1].nodes.len(), 1);
}

#[test]
fn a_misspelt_field_is_named_with_those_there_are() {
    let refused = refusal("steps:\n- scale: {clusters: [alpha], deployment: d, replica: 1}\n");
    assert!(refused.contains("steps[0].scale") && refused.contains("`replica`"), "{refused}");
    assert!(refused.contains("`replicas`"), "{refused}");
    assert!(refusal("step: []\n").contains("expected one of"));
}

#[test]
fn a_step_does_one_thing() {
    assert!(refusal("steps:\n- say: nothing\n").contains("exactly one of apply"));
    assert!(refusal("steps:\n- {kill: alpha/x, pause: alpha/x}\n").contains("exactly one"));
}

#[test]
fn a_cluster_that_is_not_there_is_refused_wherever_it_is_named() {
    for step in [
        "scale: {clusters: [gamma], deployment: d, replicas: 1}",
        "request: {target: {from: gamma/client, service: s}, answers: [alpha]}",
        "request: {target: {from: alpha/client, service: s}, answers: [gamma]}",
        "partition: {from: alpha, to: gamma}",
        "kill: gamma/clustermesh-apiserver",
    ] {
        let refused = refusal(&format!("steps:\n- {step}\n"));
        assert!(refused.contains("steps[0]") && refused.contains("alpha, beta"), "{refused}");
    }
}

#[test]
fn traffic_is_started_before_it_is_mentioned() {
    let shows =
        "- scale: {clusters: [alpha], deployment: d, replicas: 0}\n  shows: {traffic: t, answers: [beta]}\n";
    let traffic = "- traffic: {name: t, target: {from: alpha/client, service: s}}\n";
    assert!(refusal(&format!("steps:\n{shows}")).contains("no traffic t"));
    assert!(parse(&format!("steps:\n{traffic}{shows}")).is_ok());
    assert!(refusal(&format!("steps:\n{traffic}- endTraffic: {{name: t}}\n{shows}")).contains("steps[2]"));
}

#[test]
fn clusters_are_checked() {
    let of = |clusters: &str| {
        Scenario::parse(&format!("title: t\nclusters: {clusters}\n"), ".".into()).expect_err("refused")
    };
    assert!(of("[]").contains("1 to 50"));
    assert!(of("[{name: A, id: 1}]").contains("clusters[0].name"));
    assert!(of("[{name: a, id: 0}]").contains("clusters[0].id"));
    assert!(of("[{name: a, id: 300}]").contains("1 to 255"));
    assert!(of("[{name: a, id: 1}, {name: a, id: 2}]").contains("another cluster"));
    assert!(of("[{name: a, id: 1, peers: [b]}]").contains("none of the other clusters"));
    assert!(of("[{name: a, id: 1, nodes: 0}]").contains("nodes"));
    assert!(of("[{name: a, id: 1, replicas: 9}]").contains("replicas: 1 to 8"));
}

#[test]
fn what_is_waited_for_is_a_word_or_a_condition() {
    let until = |until: &str| {
        let step =
            format!("steps:\n- wait: {{clusters: [alpha], object: clusterpeer/beta, until: {until}}}\n");
        parse(&step).map(|scenario| match &scenario.steps[0].verb {
            Verb::Wait(wait) => wait.until.clone(),
            other => panic!("{other:?}"),
        })
    };
    assert_eq!(until("gone"), Ok(Until::Gone));
    let condition = |is: &str, reason: Option<&str>| {
        Ok(Until::Condition(ObjectCondition {
            condition: "Ready".into(),
            is: is.into(),
            reason: reason.map(str::to_owned),
        }))
    };
    assert_eq!(until("{condition: Ready}"), condition("True", None));
    assert_eq!(
        until("{condition: Ready, is: \"False\", reason: Draining}"),
        condition("False", Some("Draining"))
    );
    assert!(until("soon").unwrap_err().contains("ready, gone or {condition: TYPE}"));
}

#[test]
fn objects_pods_and_files_are_checked() {
    assert!(refusal("steps:\n- delete: {clusters: [alpha], object: thing/x}\n").contains("service"));
    assert!(refusal("steps:\n- delete: {clusters: [alpha], object: service}\n").contains("KIND/NAME"));
    assert!(refusal("steps:\n- exec: {pod: alpha, command: [x]}\n").contains("CLUSTER/POD"));
    assert!(refusal("steps:\n- exec: {pod: alpha/../x, command: [x]}\n").contains("CLUSTER/POD"));
    assert!(refusal("steps:\n- apply: {clusters: [alpha], file: nothing.yaml}\n").contains("nothing.yaml"));
    assert!(refusal("manifests:\n- {clusters: [alpha], file: ../x.yaml}\n").contains("manifests[0]"));
}

#[test]
fn every_scenario_of_the_repository_is_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kind-scenarios");
    let mut found = 0;
    for entry in std::fs::read_dir(root).unwrap().flatten().filter(|e| e.path().join(FILE).exists()) {
        Scenario::load(&entry.path()).unwrap();
        found += 1;
    }
    assert!(found > 0);
}
