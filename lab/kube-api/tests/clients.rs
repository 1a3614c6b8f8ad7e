//! kube-rs against the server: what controllers rely on.

mod cluster;

use std::collections::BTreeSet;
use std::time::Duration;

use cluster::{Cluster, within};
use futures::{StreamExt, TryStreamExt};
use isthmus_kube_api::Config;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, WatchEvent,
    WatchParams,
};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

#[tokio::test]
async fn a_reflector_sees_every_object_and_every_change() {
    for config in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
        let cluster = Cluster::start().await;
        let maps = default_maps(&cluster.admin().await);
        maps.create(&PostParams::default(), &map("before", "1")).await.expect("created");
        let (store, writer) = reflector::store();
        let follow = watcher(maps.clone(), config).reflect(writer).applied_objects().for_each(|_| async {});
        let follow = tokio::spawn(follow);
        within("the first list", store.wait_until_ready()).await.expect("a list");
        maps.create(&PostParams::default(), &map("after", "1")).await.expect("created");
        let change = json!({ "data": { "value": "2" } });
        maps.patch("before", &PatchParams::default(), &Patch::Merge(change)).await.expect("changed");
        let followed = || {
            let state: BTreeSet<(String, String)> = store
                .state()
                .iter()
                .filter(|m| m.name_any() != "kube-root-ca.crt")
                .map(|m| (m.name_any(), m.data.clone().unwrap_or_default()["value"].clone()))
                .collect();
            state == BTreeSet::from([("before".into(), "2".into()), ("after".into(), "1".into())])
        };
        within("both objects", until(followed)).await;
        maps.delete("after", &DeleteParams::default()).await.expect("deleted");
        within("the deletion", until(|| store.state().iter().all(|m| m.name_any() != "after"))).await;
        follow.abort();
        cluster.stop().await;
    }
}

#[tokio::test]
async fn a_watcher_lists_again_when_its_revision_is_gone() {
    let cluster = Cluster::start().await;
    let Some(stand_in) = cluster.stand_in() else {
        return cluster.stop().await; // The real server cannot be told to compact.
    };
    let maps = default_maps(&cluster.admin().await);
    let mut events = watcher(maps.clone(), watcher::Config::default().any_semantic()).boxed();
    within("the first list", next_matching(&mut events, |e| matches!(e, watcher::Event::InitDone))).await;
    maps.create(&PostParams::default(), &map("missed", "1")).await.expect("created");
    maps.delete("missed", &DeleteParams::default()).await.expect("deleted");
    maps.create(&PostParams::default(), &map("kept", "1")).await.expect("created");
    stand_in.compact();
    stand_in.disconnect_watches();
    let kept = |e: &watcher::Event<ConfigMap>| match e {
        watcher::Event::InitApply(m) | watcher::Event::Apply(m) => m.name_any() == "kept",
        _ => false,
    };
    within("the object", next_matching(&mut events, kept)).await;
    cluster.stop().await;
}

#[tokio::test]
async fn an_old_revision_is_answered_with_410() {
    let cluster = Cluster::start_with(Config { history_events: 3, ..Config::default() }).await;
    if cluster.stand_in().is_none() {
        return cluster.stop().await; // The real server keeps minutes of history.
    }
    let maps = default_maps(&cluster.admin().await);
    for n in 0..10 {
        maps.create(&PostParams::default(), &map(&format!("m{n}"), "1")).await.expect("created");
    }
    let first = maps.list(&ListParams::default().limit(2)).await.expect("a page");
    let revision = first.metadata.resource_version.clone().expect("a revision");
    for n in 0..10 {
        let change = json!({ "data": { "value": "2" } });
        maps.patch(&format!("m{n}"), &PatchParams::default(), &Patch::Merge(change)).await.expect("changed");
    }
    let watched = maps.watch(&WatchParams::default(), &revision).await;
    let code = match watched {
        Err(error) => code(&error),
        Ok(stream) => match within("an event", stream.boxed().next()).await {
            Some(Ok(WatchEvent::Error(status))) => status.code,
            Some(Err(error)) => code(&error),
            other => panic!("expected 410, got {other:?}"),
        },
    };
    assert_eq!(code, 410);
    let token = first.metadata.continue_.clone().expect("more pages");
    let next = maps.list(&ListParams::default().limit(2).continue_token(&token)).await;
    assert_eq!(code_of(next), 410);
    cluster.stop().await;
}

#[tokio::test]
async fn pages_of_a_list_are_of_one_moment() {
    let cluster = Cluster::start().await;
    let maps = default_maps(&cluster.admin().await);
    for name in ["a", "b", "c", "d", "e"] {
        maps.create(&PostParams::default(), &labelled(map(name, "1"), "list", "yes")).await.expect("created");
    }
    let mut params = ListParams::default().labels("list=yes").limit(2);
    let mut names = Vec::new();
    loop {
        let page = maps.list(&params).await.expect("a page");
        names.extend(
            page.items.iter().map(|m| (m.name_any(), m.data.clone().unwrap_or_default()["value"].clone())),
        );
        let Some(token) = page.metadata.continue_.filter(|t| !t.is_empty()) else { break };
        // What happens between the pages is not on them.
        maps.delete("e", &DeleteParams::default()).await.ok();
        maps.create(&PostParams::default(), &labelled(map("cc", "1"), "list", "yes")).await.ok();
        let change = json!({ "data": { "value": "2" } });
        maps.patch("d", &PatchParams::default(), &Patch::Merge(change)).await.expect("changed");
        params = params.continue_token(&token);
    }
    let expected = ["a", "b", "c", "d", "e"].map(|name| (name.to_owned(), "1".to_owned()));
    assert_eq!(names, expected);
    cluster.stop().await;
}

#[tokio::test]
async fn a_watch_by_label_sees_objects_come_and_go_as_they_match() {
    let cluster = Cluster::start().await;
    let maps = default_maps(&cluster.admin().await);
    let revision = maps.list(&ListParams::default()).await.expect("a list").metadata.resource_version;
    let params = WatchParams::default().labels("watched=yes");
    let mut events = maps.watch(&params, &revision.expect("a revision")).await.expect("a watch").boxed();
    maps.create(&PostParams::default(), &map("m", "1")).await.expect("created");
    let label = |value: Value| Patch::Merge(json!({ "metadata": { "labels": { "watched": value } } }));
    for value in [json!("yes"), json!("no")] {
        maps.patch("m", &PatchParams::default(), &label(value)).await.expect("labelled");
    }
    let mut next =
        async || within("an event", events.try_next()).await.expect("a good event").expect("an event");
    let added = match next().await {
        WatchEvent::Added(m) => m,
        other => panic!("expected ADDED, got {other:?}"),
    };
    match next().await {
        WatchEvent::Deleted(m) => {
            assert_eq!(m.labels()["watched"], "yes", "it is shown as it last matched");
            assert_ne!(m.resource_version(), added.resource_version());
        }
        other => panic!("expected DELETED, got {other:?}"),
    }
    cluster.stop().await;
}

#[tokio::test]
async fn an_idle_watch_gets_bookmarks_and_ends_in_time() {
    let config = Config { bookmark_interval: Duration::from_millis(100), ..Config::default() };
    let cluster = Cluster::start_with(config).await;
    let client = cluster.admin().await;
    let maps = default_maps(&client);
    let params = WatchParams::default().timeout(3);
    let revision = maps.list(&ListParams::default()).await.expect("a list").metadata.resource_version;
    let events = maps.watch(&params, &revision.expect("a revision")).await.expect("a watch");
    // Bookmarks tell of progress elsewhere in the store.
    namespaces(&client).create(&PostParams::default(), &namespace("other")).await.expect("created");
    let events: Vec<WatchEvent<ConfigMap>> =
        within("the end of the watch", events.try_collect()).await.expect("good events");
    assert!(events.iter().any(|e| matches!(e, WatchEvent::Bookmark(_))), "{events:?}");
    cluster.stop().await;
}

#[tokio::test]
async fn writes_of_stale_or_misplaced_objects_are_refused() {
    let cluster = Cluster::start().await;
    let client = cluster.admin().await;
    let maps = default_maps(&client);
    let params = PostParams::default();
    let first = maps.create(&params, &map("m", "1")).await.expect("created");
    assert_eq!(code_of(maps.create(&params, &map("m", "2")).await), 409);
    let mut second = first.clone();
    second.data = Some([("value".to_owned(), "2".to_owned())].into());
    maps.replace("m", &params, &second).await.expect("replaced");
    assert_eq!(code_of(maps.replace("m", &params, &second).await), 409, "its resourceVersion is old");
    assert_eq!(code_of(maps.get("nothing").await), 404);
    let elsewhere: Api<ConfigMap> = Api::namespaced(client, "nowhere");
    assert_eq!(code_of(elsewhere.create(&params, &map("m", "1")).await), 404);
    assert_eq!(code_of(maps.create(&params, &map("Bad_Name", "1")).await), 422);
    let stale = DeleteParams {
        preconditions: Some(kube::api::Preconditions { uid: Some("x".into()), resource_version: None }),
        ..DeleteParams::default()
    };
    assert_eq!(code_of(maps.delete("m", &stale).await), 409);
    cluster.stop().await;
}

#[tokio::test]
async fn a_write_that_changes_nothing_is_no_event() {
    let cluster = Cluster::start().await;
    let maps = default_maps(&cluster.admin().await);
    let first = maps.create(&PostParams::default(), &map("m", "1")).await.expect("created");
    let same = Patch::Merge(json!({ "data": { "value": "1" } }));
    let again = maps.patch("m", &PatchParams::default(), &same).await.expect("patched");
    assert_eq!(first.resource_version(), again.resource_version());
    let dry = PatchParams { dry_run: true, ..PatchParams::default() };
    let change = Patch::Merge(json!({ "data": { "value": "2" } }));
    let dry = maps.patch("m", &dry, &change).await.expect("patched");
    assert_eq!(dry.data.expect("data")["value"], "2");
    assert_eq!(maps.get("m").await.expect("there").data.expect("data")["value"], "1");
    cluster.stop().await;
}

#[tokio::test]
async fn field_managers_conflict_until_one_forces() {
    let cluster = Cluster::start().await;
    let maps = default_maps(&cluster.admin().await);
    let config = |value: &str| {
        Patch::Apply(
            json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "m" }, "data": { "value": value } }),
        )
    };
    maps.patch("m", &PatchParams::apply("one"), &config("1")).await.expect("created by applying");
    assert_eq!(code_of(maps.patch("m", &PatchParams::apply("two"), &config("2")).await), 409);
    let forced = maps.patch("m", &PatchParams::apply("two").force(), &config("2")).await.expect("forced");
    let managers: Vec<&str> = forced.managed_fields().iter().filter_map(|f| f.manager.as_deref()).collect();
    assert!(managers.contains(&"two"), "{managers:?}");
    cluster.stop().await;
}

#[tokio::test]
async fn what_the_schema_does_not_have_is_lost_but_for_who_applies_it_who_is_refused() {
    let cluster = Cluster::start().await;
    let maps = default_maps(&cluster.admin().await);
    let config = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": "m", "namespace": "default" },
        "date": {},
        "more": 1,
    });
    let refused = maps.patch("m", &PatchParams::apply("one"), &Patch::Apply(&config)).await;
    let Err(kube::Error::Api(status)) = refused else { panic!("{refused:?}") };
    assert_eq!(status.code, 500, "as Kubernetes answers");
    assert_eq!(
        status.message,
        "failed to create typed patch object (default/m; /v1, Kind=ConfigMap): errors:\n  .date: field not \
         declared in schema\n  .more: field not declared in schema"
    );
    assert_eq!(code_of(maps.get("m").await), 404);
    maps.create(&PostParams::default(), &map("m", "1")).await.expect("created");
    maps.patch("m", &PatchParams::default(), &Patch::Merge(&config)).await.expect("patched without them");
    cluster.stop().await;
}

#[tokio::test]
async fn status_and_spec_are_written_apart() {
    let cluster = Cluster::start().await;
    let deployments: Api<Deployment> = Api::default_namespaced(cluster.admin().await);
    let deployment: Deployment = parse(json!({
        "metadata": { "name": "web" },
        "spec": {
            "selector": { "matchLabels": { "app": "web" } },
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "containers": [{ "name": "c", "image": "nginx" }] },
            },
        },
        "status": { "replicas": 7 },
    }));
    let created = deployments.create(&PostParams::default(), &deployment).await.expect("created");
    assert_eq!(created.spec.as_ref().and_then(|s| s.replicas), Some(1), "defaulted");
    assert_eq!(created.meta().generation, Some(1));
    assert_ne!(created.status.and_then(|s| s.replicas), Some(7), "the status is not the client's");
    let status = Patch::Merge(json!({ "status": { "replicas": 3 }, "spec": { "replicas": 9 } }));
    let after = deployments.patch_status("web", &PatchParams::default(), &status).await.expect("patched");
    assert_eq!(after.status.and_then(|s| s.replicas), Some(3));
    assert_eq!(after.spec.and_then(|s| s.replicas), Some(1));
    assert_eq!(after.metadata.generation, Some(1));
    let scaled = Patch::Merge(json!({ "spec": { "replicas": 4 } }));
    let scale = deployments.patch_scale("web", &PatchParams::default(), &scaled).await.expect("scaled");
    assert_eq!(scale.spec.and_then(|s| s.replicas), Some(4));
    let after = deployments.get("web").await.expect("there");
    assert_eq!(after.metadata.generation, Some(2));
    let selector = Patch::Merge(json!({ "spec": { "selector": { "matchLabels": { "app": "db" } } } }));
    assert_eq!(code_of(deployments.patch("web", &PatchParams::default(), &selector).await), 422);
    cluster.stop().await;
}

#[tokio::test]
async fn custom_resources_come_and_go_with_their_definition() {
    let cluster = Cluster::start().await;
    let client = cluster.admin().await;
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    crds.create(&PostParams::default(), &widgets()).await.expect("created");
    let established = kube::runtime::wait::conditions::is_crd_established();
    let condition = kube::runtime::wait::await_condition(crds.clone(), "widgets.example.com", established);
    within("the CRD", condition).await.expect("established");
    let kind = ApiResource::from_gvk_with_plural(
        &kube::api::GroupVersionKind::gvk("example.com", "v1", "Widget"),
        "widgets",
    );
    let all: Api<DynamicObject> = Api::default_namespaced_with(client, &kind);
    let widget = |spec: Value| {
        let mut object = DynamicObject::new("w", &kind).within("default");
        object.data = json!({ "spec": spec, "status": { "ready": true } });
        object
    };
    let params = PostParams::default();
    let create = async |spec: Value| all.create(&params, &widget(spec)).await;
    assert_eq!(code_of(create(json!({ "size": "big" })).await), 422, "the wrong type");
    assert_eq!(code_of(create(json!({ "size": 11 })).await), 422, "too big");
    assert_eq!(code_of(create(json!({})).await), 422, "required");
    let created = within("the resource to be served", async {
        loop {
            // The real server serves it a moment after it is established.
            match create(json!({ "size": 3, "stranger": 1 })).await {
                Ok(created) => return created,
                Err(error) if code(&error) == 404 => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await;
    assert_eq!(created.data["spec"], json!({ "size": 3, "color": "red" }), "pruned and defaulted");
    assert_eq!(created.data.get("status"), None, "the status is a subresource");
    let status = Patch::Merge(json!({ "status": { "ready": true } }));
    let with_status = all.patch_status("w", &PatchParams::default(), &status).await.expect("patched");
    assert_eq!(with_status.data["status"]["ready"], true);
    assert_eq!(with_status.metadata.generation, Some(1));
    crds.delete("widgets.example.com", &DeleteParams::default()).await.expect("deleted");
    within("the resource to be gone", async {
        while code_of(all.get("w").await) != 404 || code_of(crds.get("widgets.example.com").await) != 404 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    cluster.stop().await;
}

#[tokio::test]
async fn pods_end_in_their_own_time_and_finalizers_hold() {
    let cluster = Cluster::start().await;
    let pods: Api<Pod> = Api::default_namespaced(cluster.admin().await);
    let pod: Pod = parse(json!({
        "metadata": { "name": "p", "finalizers": ["example.com/hold"] },
        "spec": { "nodeName": "n", "containers": [{ "name": "c", "image": "i" }], "terminationGracePeriodSeconds": 5 },
    }));
    let pod = pods.create(&PostParams::default(), &pod).await.expect("created");
    assert_eq!(pod.status.and_then(|s| s.phase).as_deref(), Some("Pending"));
    pods.delete("p", &DeleteParams::default()).await.expect("marked");
    let marked = pods.get("p").await.expect("still there");
    assert!(marked.metadata.deletion_timestamp.is_some());
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(5));
    // The kubelet's last word.
    pods.delete("p", &DeleteParams::default().grace_period(0)).await.expect("ended");
    assert!(pods.get("p").await.is_ok(), "the finalizer holds it");
    let release = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    pods.patch("p", &PatchParams::default(), &release).await.expect("released");
    assert_eq!(code_of(pods.get("p").await), 404);
    cluster.stop().await;
}

#[tokio::test]
async fn pods_are_bound_to_nodes_and_selected_by_node() {
    let cluster = Cluster::start().await;
    let client = cluster.admin().await;
    let nodes: Api<Node> = Api::all(client.clone());
    nodes
        .create(&PostParams::default(), &parse(json!({ "metadata": { "name": "n1" } })))
        .await
        .expect("created");
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let pod: Pod = parse(json!({
        "metadata": { "name": "p" }, "spec": { "containers": [{ "name": "c", "image": "i" }] },
    }));
    pods.create(&PostParams::default(), &pod).await.expect("created");
    let binding = json!({ "apiVersion": "v1", "kind": "Binding", "metadata": { "name": "p" }, "target": { "kind": "Node", "name": "n1" } });
    let request = http::Request::post("/api/v1/namespaces/default/pods/p/binding")
        .header("content-type", "application/json")
        .body(binding.to_string().into_bytes())
        .expect("a request");
    client.request_text(request).await.expect("bound");
    let here = pods.list(&ListParams::default().fields("spec.nodeName=n1")).await.expect("a list");
    assert_eq!(here.items.len(), 1);
    let elsewhere = pods.list(&ListParams::default().fields("spec.nodeName=n2")).await.expect("a list");
    assert!(elsewhere.items.is_empty());
    let moved = Patch::Merge(json!({ "spec": { "nodeName": "n2" } }));
    assert_eq!(code_of(pods.patch("p", &PatchParams::default(), &moved).await), 422);
    cluster.stop().await;
}

#[tokio::test]
async fn services_get_addresses_of_the_families_they_ask_for() {
    let ranges = ["10.97.0.0/24", "fd00:97::/112"].map(|r| r.parse().expect("a range"));
    let cluster = Cluster::start_with(Config { service_cidrs: ranges.into(), ..Config::default() }).await;
    let services: Api<Service> = Api::default_namespaced(cluster.admin().await);
    let create = async |name: &str, spec: Value| {
        let mut spec = spec;
        spec["ports"] = json!([{ "port": 80 }]);
        services
            .create(&PostParams::default(), &parse(json!({ "metadata": { "name": name }, "spec": spec })))
            .await
    };
    let ips = |service: Service| service.spec.and_then(|s| s.cluster_ips).unwrap_or_default();
    let single = create("single", json!({})).await.expect("created");
    let port = single.spec.clone().and_then(|s| s.ports).unwrap_or_default()[0].clone();
    assert_eq!(
        (port.protocol.as_deref(), port.target_port),
        (Some("TCP"), Some(k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(80)))
    );
    assert_eq!(ips(single).len(), 1);
    let dual = ips(create("dual", json!({ "ipFamilyPolicy": "PreferDualStack" })).await.expect("created"));
    assert!(dual[0].starts_with("10.97.0.") && dual[1].starts_with("fd00:97::"), "{dual:?}");
    let v6 = ips(create("v6", json!({ "ipFamilies": ["IPv6"] })).await.expect("created"));
    assert!(v6[0].starts_with("fd00:97::"), "{v6:?}");
    assert_eq!(ips(create("headless", json!({ "clusterIP": "None" })).await.expect("created")), ["None"]);
    assert_eq!(
        ips(create("chosen", json!({ "clusterIP": "10.97.0.77" })).await.expect("created")),
        ["10.97.0.77"]
    );
    assert_eq!(code_of(create("taken", json!({ "clusterIP": "10.97.0.77" })).await), 422);
    assert_eq!(code_of(create("outside", json!({ "clusterIP": "10.1.1.1" })).await), 422);
    let moved = Patch::Merge(json!({ "spec": { "clusterIP": "10.97.0.78", "clusterIPs": ["10.97.0.78"] } }));
    assert_eq!(code_of(services.patch("chosen", &PatchParams::default(), &moved).await), 422);
    services.delete("chosen", &DeleteParams::default()).await.expect("deleted");
    assert_eq!(
        ips(create("again", json!({ "clusterIP": "10.97.0.77" })).await.expect("free again")),
        ["10.97.0.77"]
    );
    cluster.stop().await;
}

#[tokio::test]
async fn a_namespace_takes_its_content_with_it() {
    let cluster = Cluster::start().await;
    if cluster.stand_in().is_none() {
        return cluster.stop().await; // There the namespace controller does it, which does not run.
    }
    let client = cluster.admin().await;
    let all = namespaces(&client);
    all.create(&PostParams::default(), &namespace("doomed")).await.expect("created");
    let maps: Api<ConfigMap> = Api::namespaced(client, "doomed");
    let mut held = map("held", "1");
    held.metadata.finalizers = Some(vec!["example.com/hold".into()]);
    maps.create(&PostParams::default(), &held).await.expect("created");
    maps.create(&PostParams::default(), &map("m", "1")).await.expect("created");
    all.delete("doomed", &DeleteParams::default()).await.expect("marked");
    assert_eq!(code_of(maps.get("m").await), 404);
    assert_eq!(code_of(maps.create(&PostParams::default(), &map("late", "1")).await), 403, "terminating");
    let phase = all.get("doomed").await.expect("held").status.and_then(|s| s.phase);
    assert_eq!(phase.as_deref(), Some("Terminating"));
    let release = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    maps.patch("held", &PatchParams::default(), &release).await.expect("released");
    assert_eq!(code_of(all.get("doomed").await), 404);
    cluster.stop().await;
}

#[tokio::test]
async fn users_may_do_what_their_roles_say() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin().await;
    let anonymous: Api<ConfigMap> = Api::default_namespaced(cluster.anonymous().await);
    assert_eq!(code_of(anonymous.list(&ListParams::default()).await), 401);
    let reader = cluster.client("reader", &["readers"]).await;
    let maps = default_maps(&reader);
    let refused = maps.list(&ListParams::default()).await.expect_err("no role yet");
    assert_eq!(code(&refused), 403);
    let sentence = r#"configmaps is forbidden: User "reader" cannot list resource "configmaps" in API group "" in the namespace "default""#;
    assert!(refused.to_string().contains(sentence), "{refused}");
    let role = json!({
        "metadata": { "name": "reader" },
        "rules": [{ "apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"] }],
    });
    let binding = json!({
        "metadata": { "name": "reader" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader" },
        "subjects": [{ "kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": "readers" }],
    });
    use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
    let roles: Api<Role> = Api::default_namespaced(admin.clone());
    roles.create(&PostParams::default(), &parse(role)).await.expect("created");
    let bindings: Api<RoleBinding> = Api::default_namespaced(admin);
    bindings.create(&PostParams::default(), &parse(binding)).await.expect("created");
    within("the role to work", async {
        while maps.list(&ListParams::default()).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(code_of(maps.create(&PostParams::default(), &map("m", "1")).await), 403);
    // Whoever may change and not make may apply to what is there alone.
    let changer = json!([
        { "op": "add", "path": "/rules/-", "value":
            { "apiGroups": [""], "resources": ["configmaps"], "verbs": ["patch"] } },
    ]);
    let changer = Patch::<()>::Json(serde_json::from_value(changer).expect("a patch"));
    roles.patch("reader", &PatchParams::default(), &changer).await.expect("patched");
    let there = default_maps(&cluster.admin().await);
    there.create(&PostParams::default(), &map("there", "1")).await.expect("created");
    let applied = async |name: &str| {
        let config = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name } });
        maps.patch(name, &PatchParams::apply("reader"), &Patch::Apply(config)).await
    };
    within("the right to work", async {
        while applied("there").await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let refused = applied("m").await.expect_err("it is not there");
    assert_eq!(code(&refused), 403);
    assert!(refused.to_string().contains("cannot create resource"), "{refused}");
    let everywhere: Api<ConfigMap> = Api::all(reader);
    assert_eq!(code_of(everywhere.list(&ListParams::default()).await), 403);
    cluster.stop().await;
}

#[tokio::test]
async fn unreadable_requests_are_answered_with_a_status() {
    let cluster = Cluster::start().await;
    let client = cluster.admin().await;
    let post = async |media: &str, body: Vec<u8>| {
        let request = http::Request::post("/api/v1/namespaces/default/configmaps")
            .header("content-type", media)
            .body(body)
            .expect("a request");
        code_of(client.request_text(request).await)
    };
    assert_eq!(post("application/json", b"{".to_vec()).await, 400);
    assert_eq!(post("application/json", b"[]".to_vec()).await, 400);
    assert_eq!(post("application/json", br#"{"kind":"Pod","apiVersion":"v1"}"#.to_vec()).await, 400);
    assert_eq!(post("application/json", br#"{"metadata":{"name":"m"},"data":{"a":1}}"#.to_vec()).await, 400);
    assert_eq!(post("text/plain", b"{}".to_vec()).await, 415);
    assert_eq!(post("application/json", vec![b' '; 3 * 1024 * 1024 + 1]).await, 413);
    let get = async |path: &str| {
        code_of(client.request_text(http::Request::get(path).body(Vec::new()).expect("a request")).await)
    };
    assert_eq!(get("/api/v1/configmaps?labelSelector=a%3D%28").await, 400);
    assert_eq!(get("/api/v1/configmaps?limit=x").await, 400);
    assert_eq!(get("/api/v1/configmaps?continue=x").await, 400);
    assert_eq!(get("/apis/nothing/v1/x").await, 404);
    cluster.stop().await;
}

#[tokio::test]
async fn what_is_not_well_formed_is_refused() {
    let cluster = Cluster::start().await;
    let client = cluster.admin().await;
    let in_default = |path: &str, plural: &str| format!("/{path}/namespaces/default/{plural}");
    let events = in_default("apis/events.k8s.io/v1", "events");
    let leases = in_default("apis/coordination.k8s.io/v1", "leases");
    let (secrets, maps) = (in_default("api/v1", "secrets"), in_default("api/v1", "configmaps"));
    let daemons = in_default("apis/apps/v1", "daemonsets");
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions".to_owned();
    let event = json!({
        "metadata": { "name": "e" }, "eventTime": "2026-01-01T00:00:00.000000Z", "type": "Normal",
        "regarding": { "kind": "ConfigMap", "namespace": "default", "name": "m" },
        "reportingController": "example.com/c", "reportingInstance": "c-0", "action": "Do", "reason": "Done",
    });
    let lease = json!({ "metadata": { "name": "l" }, "spec": { "leaseDurationSeconds": 15 } });
    let secret = json!({
        "metadata": { "name": "s" }, "type": "kubernetes.io/tls", "stringData": { "tls.crt": "", "tls.key": "" },
    });
    let map = json!({ "metadata": { "name": "m" }, "data": { "a.b_c-d": "" } });
    let daemon = json!({
        "metadata": { "name": "d" },
        "spec": {
            "selector": { "matchLabels": { "app": "d" } },
            "template": {
                "metadata": { "labels": { "app": "d" } },
                "spec": {
                    "hostNetwork": true,
                    "volumes": [{ "name": "v", "emptyDir": {} }],
                    "containers": [{
                        "name": "c", "image": "i",
                        "ports": [{ "containerPort": 80, "hostPort": 80 }],
                        "volumeMounts": [{ "name": "v", "mountPath": "/v" }],
                        "livenessProbe": { "tcpSocket": { "port": 80 } },
                        "securityContext": { "allowPrivilegeEscalation": false },
                    }],
                },
            },
        },
    });
    let widgets = serde_json::to_value(widgets()).expect("JSON");
    let long = |length: usize| json!("x".repeat(length));
    let mebibyte = 1024 * 1024;
    let column = json!([{ "name": "Size", "type": "number", "jsonPath": "spec.size" }]);
    // Where it goes, what is well-formed, and what makes it ill-formed below a place in it.
    let cases = [
        (
            &events,
            &event,
            "",
            vec![
                ("/action", json!(""), 422),
                ("/reason", long(129), 422),
                ("/note", long(1025), 422),
                ("/type", json!("Bad"), 422),
                ("/eventTime", json!("2026-01-01T00:00:00Z"), 400),
            ],
        ),
        (
            &leases,
            &lease,
            "/spec",
            vec![
                ("/leaseDurationSeconds", json!(0), 422),
                ("/leaseTransitions", json!(-1), 422),
                ("/renewTime", json!("2026-01-01T00:00:00.123456789Z"), 400),
            ],
        ),
        (
            &secrets,
            &secret,
            "",
            vec![
                ("/stringData", json!({ "tls.crt": "" }), 422),
                ("/stringData/a~1b", json!(""), 422),
                ("/stringData/large", long(mebibyte + 1), 422),
                ("/type", json!("kubernetes.io/service-account-token"), 422),
            ],
        ),
        (&maps, &map, "/data", vec![("/..x", json!(""), 422), ("/large", long(mebibyte + 1), 422)]),
        (
            &daemons,
            &daemon,
            "/spec",
            vec![
                ("/template/spec/volumes/0/name", json!("w"), 422),
                ("/template/spec/restartPolicy", json!("Never"), 422),
                (
                    "/updateStrategy",
                    json!({ "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": 0 } }),
                    422,
                ),
            ],
        ),
        (
            &daemons,
            &daemon,
            "/spec/template/spec/containers/0",
            vec![
                ("/ports/0/hostPort", json!(81), 422),
                ("/volumeMounts/0/mountPropagation", json!("Bidirectional"), 422),
                ("/livenessProbe", json!({ "periodSeconds": 1 }), 422),
                ("/livenessProbe/successThreshold", json!(2), 422),
                ("/securityContext/privileged", json!(true), 422),
            ],
        ),
        (
            &definitions,
            &widgets,
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec",
            vec![
                ("/properties/color", json!({}), 422),
                ("/properties/color/default", json!(1), 422),
                ("/properties/color/uniqueItems", json!(true), 422),
                ("/additionalProperties", json!({ "type": "string" }), 422),
                ("/anyOf", json!([{ "properties": { "x": { "minLength": 1 } } }]), 422),
            ],
        ),
        (&definitions, &widgets, "/spec/versions/0", vec![("/additionalPrinterColumns", column, 422)]),
    ];
    let post = async |path: &str, object: &Value| {
        let request = http::Request::post(format!("{path}?dryRun=All"))
            .header("content-type", "application/json")
            .body(object.to_string().into_bytes())
            .expect("a request");
        client.request_text(request).await
    };
    for (path, good, place, mistakes) in cases {
        post(path, good).await.unwrap_or_else(|error| panic!("{path}: {error}"));
        for (field, bad, code) in mistakes {
            let mut object = good.clone();
            let field = format!("{place}{field}");
            let (parent, name) = field.rsplit_once('/').expect("a pointer");
            let name = name.replace("~1", "/");
            object.pointer_mut(parent).expect(parent)[name.as_str()] = bad;
            let refused = post(path, &object).await.map(drop).expect_err(&field);
            assert_eq!(self::code(&refused), code, "{path} {field}: {refused}");
        }
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_custom_resource_has_all_that_its_definition_requires_also_in_its_status() {
    let cluster = Cluster::start().await;
    let client = cluster.admin().await;
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut definition = serde_json::to_value(widgets()).expect("JSON");
    let schema = &mut definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
    schema["status"]["required"] = json!(["ready"]);
    schema["spec"]["properties"]["parts"] = json!({ "type": "array", "items": { "type": "string" } });
    schema["spec"]["required"] = json!(["size", "parts"]);
    definitions.create(&PostParams::default(), &parse(definition)).await.expect("created");
    let resource = ApiResource::from_gvk(&kube::core::GroupVersionKind::gvk("example.com", "v1", "Widget"));
    let widgets: Api<DynamicObject> = Api::namespaced_with(client, "default", &resource);
    within("the definition to be served", async {
        while widgets.list(&ListParams::default()).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let widget = |spec: Value| {
        parse(
            json!({ "apiVersion": "example.com/v1", "kind": "Widget", "metadata": { "name": "w" }, "spec": spec }),
        )
    };
    let params = PostParams::default();
    assert_eq!(
        code_of(widgets.create(&params, &widget(json!({ "size": 1 }))).await),
        422,
        "a list is not made up"
    );
    widgets.create(&params, &widget(json!({ "size": 1, "parts": [] }))).await.expect("created");
    let status = |status: Value| Patch::Merge(json!({ "status": status }));
    let patch = PatchParams::default();
    assert_eq!(code_of(widgets.patch_status("w", &patch, &status(json!({ "other": 1 }))).await), 422);
    widgets.patch_status("w", &patch, &status(json!({ "ready": true }))).await.expect("patched");
    cluster.stop().await;
}

fn widgets() -> CustomResourceDefinition {
    parse(json!({
        "metadata": { "name": "widgets.example.com" },
        "spec": {
            "group": "example.com",
            "names": { "kind": "Widget", "plural": "widgets", "singular": "widget" },
            "scope": "Namespaced",
            "versions": [{
                "name": "v1", "served": true, "storage": true, "subresources": { "status": {} },
                "schema": { "openAPIV3Schema": { "type": "object", "properties": {
                    "spec": { "type": "object", "required": ["size"], "properties": {
                        "size": { "type": "integer", "minimum": 1, "maximum": 10 },
                        "color": { "type": "string", "default": "red" },
                    } },
                    "status": { "type": "object", "properties": { "ready": { "type": "boolean" } } },
                } } },
            }],
        },
    }))
}

fn parse<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("a well-formed object")
}

fn map(name: &str, value: &str) -> ConfigMap {
    parse(json!({ "metadata": { "name": name }, "data": { "value": value } }))
}

fn labelled(mut map: ConfigMap, key: &str, value: &str) -> ConfigMap {
    map.labels_mut().insert(key.into(), value.into());
    map
}

fn default_maps(client: &Client) -> Api<ConfigMap> {
    Api::namespaced(client.clone(), "default")
}

fn namespaces(client: &Client) -> Api<Namespace> {
    Api::all(client.clone())
}

fn namespace(name: &str) -> Namespace {
    parse(json!({ "metadata": { "name": name } }))
}

fn code(error: &kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        other => panic!("expected a Status, got {other}"),
    }
}

fn code_of<T: std::fmt::Debug>(result: kube::Result<T>) -> u16 {
    code(&result.expect_err("an error"))
}

async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn next_matching(
    events: &mut (impl futures::Stream<Item = watcher::Result<watcher::Event<ConfigMap>>> + Unpin),
    wanted: impl Fn(&watcher::Event<ConfigMap>) -> bool,
) {
    // A watcher reports an interruption and goes on.
    while let Some(event) = events.next().await {
        if event.is_ok_and(|event| wanted(&event)) {
            return;
        }
    }
    panic!("the watcher ended");
}
