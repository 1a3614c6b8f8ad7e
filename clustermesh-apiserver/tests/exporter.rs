//! The exporter against a Kubernetes API.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use clustermesh_apiserver::election::{Election, Timing};
use clustermesh_apiserver::exporter::{ExporterConfig, Source};
use clustermesh_apiserver::tasks::Tasks;
use isthmus_crds::CiliumIdentity;
use isthmus_kvstore::memory::{Limits, MemoryStore, StoreId};
use isthmus_wire::local::LocalPolicy;
use isthmus_wire::{ClusterService, IpIdentityPair};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};
use support::{Cluster, Export, LOOPBACK, config, eventually};
use tokio_util::sync::CancellationToken;

const SERVICE: &str = "cilium/state/services/v1/alpha/app/echo";
const LOCAL_SERVICE: &str = "isthmus/services/v1/app/echo";

fn address(export: &Export, ip: &str) -> Option<IpIdentityPair> {
    let value = export.get(&format!("cilium/state/ip/v1/default/{ip}"))?;
    Some(IpIdentityPair::decode(value.as_bytes()).expect("an address"))
}

async fn exported_address(export: &Export, ip: &str) -> IpIdentityPair {
    eventually(ip, || address(export, ip).ok_or_else(|| export.keys("cilium/state/ip/"))).await
}

#[tokio::test]
async fn annotating_a_service_exports_it_and_removing_the_annotation_retracts_it() {
    let cluster = Cluster::start().await;
    cluster.serve_echo(json!({})).await;
    let mut export = cluster.export(config());
    export.ready().await;
    assert_eq!(export.get(SERVICE), None);
    assert!(export.get(LOCAL_SERVICE).is_some(), "agents see every service");

    cluster
        .merge::<Service>("echo", json!({"metadata": {"annotations": {"io.cilium/global-service": "true"}}}))
        .await;
    export.until(SERVICE, |value| value.is_some()).await;
    let service =
        ClusterService::decode(export.get(SERVICE).expect("the key").as_bytes()).expect("a service");
    assert_eq!(service.frontends.len(), 1);
    assert_eq!(service.backends.len(), 1);

    let none: [(); 0] = [];
    cluster.merge::<EndpointSlice>("echo-1", json!({"endpoints": none})).await;
    export.until(SERVICE, |value| value.is_some_and(|value| value.contains(r#""backends":{}"#))).await;
    cluster
        .merge::<Service>("echo", json!({"metadata": {"annotations": {"service.cilium.io/shared": "false"}}}))
        .await;
    export.until(SERVICE, |value| value.is_none()).await;
    cluster.delete::<Service>("echo").await;
    export.until(LOCAL_SERVICE, |value| value.is_none()).await;
    export.stop().await;
}

#[tokio::test]
async fn canaries_come_after_everything_that_there_was() {
    let cluster = Cluster::start().await;
    cluster.serve_echo(json!({"service.cilium.io/global": "true"})).await;
    for n in 0..20 {
        cluster.run_pod(&format!("echo-{n}"), &format!("app-{n}"), &format!("10.244.0.{n}")).await;
    }
    let mut export = cluster.export(config());
    export.ready().await;
    assert_eq!(export.keys("cilium/state/ip/v1/default/").len(), 20);
    assert_eq!(
        export.keys("cilium/synced/alpha/").into_keys().collect::<Vec<_>>(),
        [
            "cilium/state/identities/v1",
            "cilium/state/ip/v1",
            "cilium/state/nodes/v1",
            "cilium/state/services/v1",
            "isthmus/namespaces/v1",
            "isthmus/policies/v1",
            "isthmus/services/v1",
        ]
        .map(|prefix| format!("cilium/synced/alpha/{prefix}"))
    );
    let created = |prefix: &str| {
        let keys = export.keys(prefix).into_keys();
        keys.map(|key| export.store.get(key.as_bytes()).expect("the key").create_revision).collect::<Vec<_>>()
    };
    for resource in ["identities", "ip", "nodes", "services"] {
        let prefix = format!("cilium/state/{resource}/v1");
        let keys = created(&format!("{prefix}/"));
        let canary = created(&format!("cilium/synced/alpha/{prefix}"));
        assert!(!keys.is_empty() && keys.iter().all(|revision| *revision < canary[0]), "{resource}");
    }
    assert_eq!(
        export.get("cilium/cluster-config/alpha").as_deref(),
        Some(r#"{"id":1,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255}}"#)
    );
    export.stop().await;
}

#[tokio::test]
async fn pods_come_and_go_with_their_addresses() {
    let cluster = Cluster::start().await;
    let mut export = cluster.export(config());
    export.ready().await;
    cluster.run_pod("echo-1", "echo", "10.244.0.7").await;
    let first = exported_address(&export, "10.244.0.7").await;
    assert_eq!(first.host_ip.expect("a host").to_string(), "172.18.0.2");
    assert_eq!(first.id.0 >> 16, 1, "in the cluster's range");
    cluster.run_pod("echo-2", "echo", "10.244.0.8").await;
    assert_eq!(exported_address(&export, "10.244.0.8").await.id, first.id, "same labels, same identity");
    cluster.delete::<Pod>("echo-1").await;
    export.until("cilium/state/ip/v1/default/10.244.0.7", |value| value.is_none()).await;
    assert!(address(&export, "10.244.0.8").is_some());
    export.stop().await;
}

#[tokio::test]
async fn identities_survive_a_restart_and_leftovers_of_the_earlier_run_go() {
    let cluster = Cluster::start().await;
    for n in 0..10 {
        cluster.run_pod(&format!("echo-{n}"), &format!("app-{n}"), &format!("10.244.0.{n}")).await;
    }
    let store = MemoryStore::new(StoreId::random(), Limits::default());
    let mut first = cluster.export_into(store.clone(), config());
    first.ready().await;
    let before = first.keys("cilium/state/");
    first.stop().await;
    cluster.delete::<Pod>("echo-0").await;

    let mut second = cluster.export_into(store, config());
    second.ready().await;
    let mut expected = before;
    assert!(expected.remove("cilium/state/ip/v1/default/10.244.0.0").is_some());
    assert_eq!(second.keys("cilium/state/"), expected);
    second.stop().await;
}

#[tokio::test]
async fn replicas_that_meet_the_same_pods_at_once_agree_on_every_identity() {
    let cluster = Cluster::start().await;
    let (mut one, mut two) = (cluster.export(config()), cluster.export(config()));
    one.ready().await;
    two.ready().await;
    for n in 0..40 {
        cluster.run_pod(&format!("echo-{n}"), &format!("app-{n}"), &format!("10.244.0.{n}")).await;
    }
    eventually("both replicas to agree", || {
        let (of_one, of_two) = (one.keys("cilium/state/ip/"), two.keys("cilium/state/ip/"));
        if of_one.len() == 40 && of_one == of_two { Ok(()) } else { Err((of_one.len(), of_two.len())) }
    })
    .await;
    let identities: Api<CiliumIdentity> = Api::all(cluster.client.clone());
    let stored = identities.list(&ListParams::default()).await.expect("a list").items;
    let sets: BTreeSet<_> = stored.iter().map(|identity| identity.security_labels.clone()).collect();
    assert_eq!((stored.len(), sets.len()), (40, 40), "one object per label set");
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn an_identity_that_no_pod_needs_is_deleted_after_its_retention() {
    let cluster = Cluster::start().await;
    cluster.run_pod("echo-1", "echo", "10.244.0.7").await;
    cluster.run_pod("stay-1", "stay", "10.244.0.8").await;
    let mut export =
        cluster.export(ExporterConfig { identity_retention: Duration::from_millis(500), ..config() });
    export.ready().await;
    let id = exported_address(&export, "10.244.0.7").await.id;
    cluster.delete::<Pod>("echo-1").await;
    export.until(&format!("cilium/state/identities/v1/id/{id}"), |value| value.is_none()).await;
    let identities: Api<CiliumIdentity> = Api::all(cluster.client.clone());
    assert_eq!(
        identities.list(&ListParams::default()).await.expect("a list").items.len(),
        1,
        "the other one stays"
    );
    export.stop().await;
}

#[tokio::test]
async fn lost_watches_take_nothing_away_and_what_they_missed_is_made_up_for() {
    let cluster = Cluster::start().await;
    cluster.serve_echo(json!({"service.cilium.io/global": "true"})).await;
    cluster.run_pod("echo-1", "echo", "10.244.0.7").await;
    cluster.run_pod("echo-2", "echo", "10.244.0.8").await;
    let mut export = cluster.export(config());
    export.ready().await;
    for round in 0..3 {
        let keys = export.keys("cilium/state/");
        cluster.api.disconnect_watches();
        cluster.run_pod(&format!("new-{round}"), "new", &format!("10.244.1.{round}")).await;
        // Who asks for what came before is told 410 now.
        cluster.api.compact();
        exported_address(&export, &format!("10.244.1.{round}")).await;
        let now = export.keys("cilium/state/");
        assert!(keys.iter().all(|(key, value)| now.get(key) == Some(value)), "{keys:#?}\n{now:#?}");
    }
    cluster.api.disconnect_watches();
    cluster.delete::<Pod>("echo-1").await;
    cluster.api.compact();
    export.until("cilium/state/ip/v1/default/10.244.0.7", |value| value.is_none()).await;
    assert!(address(&export, "10.244.0.8").is_some());
    export.stop().await;
}

#[tokio::test]
async fn an_api_that_is_down_takes_nothing_away_and_what_it_has_when_it_is_back_holds() {
    let cluster = Cluster::start().await;
    cluster.serve_echo(json!({"service.cilium.io/global": "true"})).await;
    cluster.run_pod("echo-1", "echo", "10.244.0.7").await;
    let mut export = cluster.export(config());
    export.ready().await;
    let keys = export.keys("cilium/state/");
    let address = cluster.api.addresses()[0];
    cluster.api.stop().await;
    let failing = |export: &Export| {
        let status = export.handle.status.borrow();
        status.watches.values().filter(|watch| watch.error.is_some()).count()
    };
    eventually("all watches to fail", || if failing(&export) == 9 { Ok(()) } else { Err(failing(&export)) })
        .await;
    assert_eq!(export.keys("cilium/state/"), keys);

    // Back from a backup that knows less.
    let cluster = Cluster::start_at(address).await;
    cluster.run_pod("echo-2", "echo", "10.244.0.8").await;
    exported_address(&export, "10.244.0.8").await;
    export.until(SERVICE, |value| value.is_none()).await;
    export.until("cilium/state/ip/v1/default/10.244.0.7", |value| value.is_none()).await;
    eventually("all watches to work", || if failing(&export) == 0 { Ok(()) } else { Err(failing(&export)) })
        .await;
    export.stop().await;
}

/// The first Event with this reason.
async fn event(cluster: &Cluster, reason: &str) -> Event {
    let events: Api<Event> = cluster.namespaced();
    let found = async {
        loop {
            let listed = events.list(&ListParams::default()).await.expect("a list").items;
            if let Some(event) = listed.into_iter().find(|event| event.reason.as_deref() == Some(reason)) {
                return event;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), found).await.expect("an Event in time")
}

#[tokio::test]
async fn a_bad_annotation_is_told_on_the_object_and_counted_and_the_rest_goes_on() {
    let cluster = Cluster::start().await;
    cluster
        .serve_echo(json!({"service.cilium.io/global": "true", "service.cilium.io/affinity": "nearest"}))
        .await;
    let mut export = cluster.export(config());
    export.ready().await;
    assert!(export.get(SERVICE).is_some());
    assert_eq!(export.handle.status.borrow().problems.get("InvalidAnnotation"), Some(&1));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &export.registry).expect("metrics");
    assert!(text.contains(r#"isthmus_exporter_problems_total{reason="InvalidAnnotation"} 1"#), "{text}");

    let found = event(&cluster, "InvalidAnnotation").await;
    let regarding = found.regarding.expect("an object");
    assert_eq!((regarding.kind.as_deref(), regarding.name.as_deref()), (Some("Service"), Some("echo")));
    assert!(found.note.expect("a note").contains("service.cilium.io/affinity"));
    export.stop().await;
}

#[tokio::test]
async fn without_the_custom_resource_it_says_what_to_apply_and_starts_once_it_is_there() {
    let cluster = Cluster::without_definitions(LOOPBACK).await;
    let mut export = cluster.export(config());
    eventually("advice", || {
        let status = export.handle.status.borrow().clone();
        let error = status.watches.get("CiliumIdentity").and_then(|watch| watch.error.clone());
        error
            .filter(|error| error.contains("apply crds/yaml/ciliumidentities.cilium.io.yaml"))
            .ok_or(status.watches)
    })
    .await;
    assert!(!*export.handle.ready.borrow());
    for definition in isthmus_crds::definitions() {
        cluster.define(serde_json::to_value(definition).expect("JSON")).await;
    }
    export.ready().await;
    assert_eq!(export.handle.status.borrow().watches["CiliumIdentity"].error, None);
    export.stop().await;
}

#[tokio::test]
async fn with_cilium_its_own_objects_are_exported_and_nothing_is_allocated() {
    let cluster = Cluster::start().await;
    for (kind, plural, scope) in
        [("CiliumNode", "ciliumnodes", "Cluster"), ("CiliumEndpoint", "ciliumendpoints", "Namespaced")]
    {
        cluster.define(permissive(kind, plural, scope)).await;
    }
    // Pods and Nodes of Kubernetes say nothing here.
    cluster.run_pod("echo-1", "echo", "10.244.0.7").await;
    cluster
        .create_global::<CiliumIdentity>(json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumIdentity", "metadata": {"name": "70000"},
            "security-labels": {"k8s:app": "echo", "k8s:io.kubernetes.pod.namespace": "app"},
        }))
        .await;
    create_dynamic(&cluster, "CiliumNode", None, json!({
        "metadata": {"name": "node-9"},
        "spec": {"addresses": [{"type": "InternalIP", "ip": "172.18.0.9"}], "ipam": {"podCIDRs": ["10.9.0.0/24"]}},
    }))
    .await;
    create_dynamic(&cluster, "CiliumEndpoint", Some("app"), json!({
        "metadata": {"name": "echo-9"},
        "status": {"identity": {"id": 70000}, "networking": {"addressing": [{"ipv4": "10.9.0.7"}], "node": "172.18.0.9"}},
    }))
    .await;
    let mut export = cluster.export(ExporterConfig { source: Source::Cilium, ..config() });
    export.ready().await;
    assert_eq!(
        export.keys("cilium/state/").into_keys().collect::<Vec<_>>(),
        [
            "cilium/state/identities/v1/id/70000",
            "cilium/state/ip/v1/default/10.9.0.7",
            "cilium/state/nodes/v1/alpha/node-9",
        ]
    );
    let identities: Api<CiliumIdentity> = Api::all(cluster.client.clone());
    assert_eq!(identities.list(&ListParams::default()).await.expect("a list").items.len(), 1);
    export.stop().await;
}

fn permissive(kind: &str, plural: &str, scope: &str) -> Value {
    json!({
        "metadata": {"name": format!("{plural}.cilium.io")},
        "spec": {
            "group": "cilium.io", "scope": scope,
            "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase(), "listKind": format!("{kind}List")},
            "versions": [{"name": "v2", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "x-kubernetes-preserve-unknown-fields": true,
            }}}],
        },
    })
}

async fn create_dynamic(cluster: &Cluster, kind: &str, namespace: Option<&str>, object: Value) {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("cilium.io", "v2", kind));
    let mut object: DynamicObject = serde_json::from_value(object).expect("an object");
    object.types = Some(kube::core::TypeMeta { api_version: "cilium.io/v2".into(), kind: kind.into() });
    let api: Api<DynamicObject> = match namespace {
        Some(namespace) => Api::namespaced_with(cluster.client.clone(), namespace, &resource),
        None => Api::all_with(cluster.client.clone(), &resource),
    };
    api.create(&PostParams::default(), &object).await.expect("created");
}

const POLICY: &str = "isthmus/policies/v1/ciliumnetworkpolicy/app/web";

fn cilium_policies(cluster: &Cluster) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("cilium.io", "v2", "CiliumNetworkPolicy");
    let resource = ApiResource::from_gvk_with_plural(&kind, "ciliumnetworkpolicies");
    Api::namespaced_with(cluster.client.clone(), "app", &resource)
}

async fn create_policy(cluster: &Cluster, spec: Value) {
    let object = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "web"}, "spec": spec,
    });
    let object = serde_json::from_value(object).expect("an object");
    cilium_policies(cluster).create(&PostParams::default(), &object).await.expect("created");
}

/// The policy's condition, once its status is the wanted one.
async fn condition(cluster: &Cluster, status: &str) -> Value {
    let api = cilium_policies(cluster);
    tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            let policy = api.get("web").await.expect("the policy");
            let conditions = policy.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
            if let Some(found) =
                conditions.into_iter().find(|c| c["type"] == "Valid" && c["status"] == status)
            {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("a condition in time")
}

#[tokio::test]
async fn policies_and_namespaces_reach_the_agents_as_they_were_written() {
    let cluster = Cluster::start().await;
    cluster
        .create::<NetworkPolicy>(json!({
            "metadata": {"name": "deny"}, "spec": {"podSelector": {"matchLabels": {"app": "echo"}}},
        }))
        .await;
    let mut export = cluster.export(config());
    export.ready().await;
    assert_eq!(
        export.get("isthmus/namespaces/v1/app").as_deref(),
        Some(r#"{"labels":{"kubernetes.io/metadata.name":"app"}}"#)
    );
    let found = export.get("isthmus/policies/v1/networkpolicy/app/deny").expect("the policy");
    let found = LocalPolicy::decode(found.as_bytes()).expect("a policy");
    assert_eq!(found.specs[0]["podSelector"], json!({"matchLabels": {"app": "echo"}}));

    create_policy(&cluster, json!({"endpointSelector": {}, "ingress": [{"fromEntities": ["world"]}]})).await;
    export.until(POLICY, |value| value.is_some()).await;
    let _ = cilium_policies(&cluster).delete("web", &DeleteParams::default()).await.expect("deleted");
    export.until(POLICY, |value| value.is_none()).await;
    export.stop().await;
}

#[tokio::test]
async fn a_replica_that_stands_by_exports_and_leaves_what_people_read_to_the_leader() {
    let cluster = Cluster::start().await;
    cluster
        .create::<Lease>(json!({
            "metadata": {"name": "lead"}, "spec": {"holderIdentity": "other", "leaseDurationSeconds": 3600},
        }))
        .await;
    let timing = Timing::of_lease(Duration::from_secs(1));
    let tasks = Tasks::until(CancellationToken::new());
    let (election, leadership) =
        Election::start(cluster.client.clone(), "app", "lead", "own", timing, &tasks);
    let store = MemoryStore::new(StoreId::random(), Limits::default());
    let mut export = cluster.export_led_by(leadership, store, config());
    export.ready().await;
    let fqdn = json!([{"toFQDNs": [{"matchName": "example.org"}]}]);
    create_policy(&cluster, json!({"endpointSelector": {}, "egress": fqdn})).await;
    export.until(POLICY, |value| value.is_some()).await;
    cluster.serve_echo(json!({"io.cilium/global-service": "true"})).await;
    export.until(SERVICE, |value| value.is_some()).await;
    let policy = cilium_policies(&cluster).get("web").await.expect("the policy");
    assert_eq!(policy.data["status"], Value::Null, "the leader's to write");

    // The other gives up: what is not written yet is this one's.
    cluster.merge::<Lease>("lead", json!({"spec": {"holderIdentity": ""}})).await;
    let invalid = condition(&cluster, "False").await;
    assert!(invalid["message"].as_str().expect("text").contains("toFQDNs"), "{invalid}");
    export.stop().await;
    election.release().await;
}

#[tokio::test]
async fn a_policy_s_status_names_what_is_not_supported_and_takes_it_back_once_it_is_gone() {
    let cluster = Cluster::start().await;
    let mut export = cluster.export(config());
    export.ready().await;
    let fqdn = json!([{"toFQDNs": [{"matchName": "example.org"}]}]);
    create_policy(&cluster, json!({"endpointSelector": {}, "egress": fqdn})).await;
    let invalid = condition(&cluster, "False").await;
    assert!(invalid["message"].as_str().expect("text").contains("toFQDNs"), "{invalid}");
    eventually("the status page to name it", || {
        let status = export.handle.status.borrow();
        let found = status.policies_with_problems.get("CiliumNetworkPolicy app/web").cloned();
        found.filter(|problems| problems[0].contains("toFQDNs")).ok_or("nothing")
    })
    .await;
    assert_eq!(export.handle.status.borrow().problems.get("UnsupportedPolicy"), Some(&1), "told once");
    assert!(export.get(POLICY).is_some(), "the agents enforce what they can of it");

    let better = json!({"spec": {"endpointSelector": {}, "egress": [{"toEntities": ["cluster"]}]}});
    let api = cilium_policies(&cluster);
    api.patch("web", &PatchParams::default(), &Patch::Merge(better)).await.expect("patched");
    let idle = condition(&cluster, "True").await;
    assert!(idle["message"].as_str().expect("text").contains("selects no pod"), "{idle}");
    let regarding = event(&cluster, "PolicySelectsNothing").await.regarding.expect("an object");
    let uid = api.get("web").await.expect("the policy").metadata.uid;
    assert_eq!(regarding.uid, uid, "kubectl describe shows no other Events");
    cluster.run_pod("echo-1", "echo", "10.244.0.7").await;
    let api = cilium_policies(&cluster);
    tokio::time::timeout(Duration::from_secs(60), async {
        while condition(&cluster, "True").await["message"] != "Policy validation succeeded" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the first pod that it selects is told of");
    eventually("the status page to forget it", || {
        let status = export.handle.status.borrow();
        if status.policies_with_problems.is_empty() {
            Ok(())
        } else {
            Err(status.policies_with_problems.clone())
        }
    })
    .await;
    // What is right is not written again.
    let version = api.get("web").await.expect("the policy").metadata.resource_version;
    export.stop().await;
    let mut export = cluster.export(config());
    export.ready().await;
    assert_eq!(api.get("web").await.expect("the policy").metadata.resource_version, version);
    export.stop().await;
}

#[tokio::test]
async fn beside_cilium_the_status_of_policies_is_left_to_its_operator() {
    let cluster = Cluster::start().await;
    for definition in
        [("CiliumNode", "ciliumnodes", "Cluster"), ("CiliumEndpoint", "ciliumendpoints", "Namespaced")]
    {
        let (kind, plural, scope) = definition;
        cluster.define(permissive(kind, plural, scope)).await;
    }
    create_policy(&cluster, json!({"endpointSelector": {}, "egress": [{"toFQDNs": [{"matchName": "a.b"}]}]}))
        .await;
    let mut export = cluster.export(ExporterConfig { source: Source::Cilium, ..config() });
    export.ready().await;
    eventually("the policy to be judged", || {
        let status = export.handle.status.borrow();
        if status.policies_with_problems.len() == 1 { Ok(()) } else { Err(status.problems.clone()) }
    })
    .await;
    export.stop().await;
    let policy = cilium_policies(&cluster).get("web").await.expect("the policy");
    assert_eq!(policy.data["status"], Value::Null);
}

#[tokio::test]
async fn kinds_of_policies_that_are_installed_later_are_watched_from_then_on() {
    let cluster = Cluster::without_definitions(LOOPBACK).await;
    let (policies, others): (Vec<_>, Vec<_>) = isthmus_crds::definitions()
        .into_iter()
        .map(|definition| serde_json::to_value(definition).expect("JSON"))
        .partition(|definition| {
            definition["spec"]["names"]["plural"].as_str().expect("text").contains("polic")
        });
    for definition in others {
        cluster.define(definition).await;
    }
    let mut export = cluster.export(config());
    export.ready().await;
    assert!(export.handle.status.borrow().watches["CiliumNetworkPolicy"].absent);
    for definition in policies {
        cluster.define(definition).await;
    }
    create_policy(&cluster, json!({"endpointSelector": {}})).await;
    export.until(POLICY, |value| value.is_some()).await;
    assert!(!export.handle.status.borrow().watches["CiliumNetworkPolicy"].absent);
    export.stop().await;
}
