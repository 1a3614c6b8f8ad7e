//! Plain clusters: wires, pods, controllers, and that nothing is left of them. As root.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use isthmus_lab::cleanup::Remains;
use isthmus_lab::names::Families;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use support::{eventually, plain_lab, sh};

#[tokio::test(flavor = "multi_thread")]
async fn pods_reach_pods_of_other_nodes_and_clusters_over_both_families_and_nobody_across_a_cut() {
    let lab = plain_lab("t-wires", Families::Dual, 2).await;
    let cluster = |name| lab.cluster(name).unwrap();
    for (name, node) in [("alpha", "alpha-node1"), ("alpha", "alpha-node2"), ("beta", "beta-node1")] {
        let pods: Api<Pod> = Api::namespaced(cluster(name).client(), "default");
        let pod = serde_json::from_value(json!({
            "metadata": {"name": node},
            "spec": {"nodeName": node, "terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": "isthmus.io/echo"}]},
        }));
        pods.create(&PostParams::default(), &pod.unwrap()).await.unwrap();
    }
    for (name, node) in [("alpha", "alpha-node1"), ("alpha", "alpha-node2"), ("beta", "beta-node1")] {
        eventually(&format!("{node} runs"), async || {
            cluster(name).pod("default", node).map_err(|e| e.to_string())
        })
        .await;
    }
    let from = |pod: &str, to: &isthmus_lab::PodRecord, family: usize| {
        let address = std::net::SocketAddr::new(to.addresses[family], 8080);
        let launch =
            cluster("alpha").in_pod("default", pod, &sh(&format!("curl -sf --max-time 2 http://{address}/")));
        async move {
            let output = launch.unwrap().output(Duration::from_secs(30)).await.unwrap();
            (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
        }
    };
    let near = cluster("alpha").pod("default", "alpha-node2").unwrap();
    let far = cluster("beta").pod("default", "beta-node1").unwrap();
    let answers = async |to: &isthmus_lab::PodRecord, family| {
        eventually("an answer", async || match from("alpha-node1", to, family).await {
            (true, text) if text.contains(&to.name) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    };
    for family in [0, 1] {
        for to in [&near, &far] {
            answers(to, family).await;
        }
    }

    lab.cut("beta", "alpha").await.unwrap();
    for family in [0, 1] {
        assert!(!from("alpha-node1", &far, family).await.0, "no answer comes back over a cut");
        // A cluster stays whole.
        answers(&near, family).await;
    }
    lab.heal().await.unwrap();
    answers(&far, 0).await;
    lab.down().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_is_scaled_and_its_endpoints_follow() {
    let lab = plain_lab("t-scale", Families::V4, 2).await;
    let client = lab.cluster("alpha").unwrap().client();
    support::apply_web(&client).await;
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    let ready = async || {
        let of_web = ListParams::default().labels("kubernetes.io/service-name=web");
        let all = slices.list(&of_web).await.map_err(|e| e.to_string())?;
        let endpoints = all.items.into_iter().flat_map(|s| s.endpoints);
        Ok::<_, String>(
            endpoints.filter(|e| e.conditions.as_ref().and_then(|c| c.ready) == Some(true)).count(),
        )
    };
    let wait_for = async |count: usize| {
        eventually(&format!("{count} ready endpoints"), async || match ready().await? {
            found if found == count => Ok(()),
            found => Err(format!("{found} are")),
        })
        .await;
    };
    wait_for(2).await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let nodes = async || -> std::collections::BTreeSet<String> {
        pods.list(&ListParams::default())
            .await
            .unwrap()
            .into_iter()
            .filter_map(|p| p.spec?.node_name)
            .collect()
    };
    assert_eq!(nodes().await.len(), 2, "siblings are spread over nodes");

    for replicas in [3, 0, 1] {
        let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
        deployments.patch_scale("web", &PatchParams::default(), &patch).await.unwrap();
        wait_for(replicas).await;
    }
    eventually("the status to follow", async || {
        let status = deployments.get("web").await.map_err(|e| e.to_string())?.status.unwrap_or_default();
        if status.ready_replicas == Some(1) && status.replicas == Some(1) {
            Ok(())
        } else {
            Err(format!("{status:?}"))
        }
    })
    .await;

    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    services.delete("web", &DeleteParams::default()).await.unwrap();
    eventually("the slices to go", async || {
        match slices.list(&ListParams::default().labels("kubernetes.io/service-name=web")).await {
            Ok(left) if left.items.is_empty() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    deployments.delete("web", &DeleteParams::default()).await.unwrap();
    eventually("the pods to go", async || match pods.list(&ListParams::default()).await {
        Ok(left) if left.items.is_empty() => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    lab.down().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_ends_is_started_again_and_one_that_cannot_start_says_why() {
    let lab = plain_lab("t-restart", Families::V4, 1).await;
    let pods: Api<Pod> = Api::namespaced(lab.cluster("alpha").unwrap().client(), "default");
    let pod = |name: &str, container: serde_json::Value| {
        serde_json::from_value::<Pod>(
            json!({"metadata": {"name": name}, "spec": {"containers": [container]}}),
        )
        .unwrap()
    };
    let crashing = json!({"name": "c", "image": "any", "command": ["sh", "-c", "echo begun; exit 3"]});
    pods.create(&PostParams::default(), &pod("crashing", crashing)).await.unwrap();
    pods.create(&PostParams::default(), &pod("unknown", json!({"name": "c", "image": "nginx"})))
        .await
        .unwrap();
    let status = async |name: &str| {
        let pod = pods.get(name).await.map_err(|e| e.to_string())?;
        let status = pod.status.and_then(|s| s.container_statuses).and_then(|c| c.into_iter().next());
        status.ok_or_else(|| "no status yet".to_owned())
    };
    eventually("two restarts", async || match status("crashing").await?.restart_count {
        0 | 1 => Err("too few".to_owned()),
        _ => Ok(()),
    })
    .await;
    eventually("a reason", async || {
        let waiting = status("unknown").await?.state.and_then(|s| s.waiting).ok_or("not waiting")?;
        let message = waiting.message.unwrap_or_default();
        if message.contains("isthmus.io/echo") { Ok(()) } else { Err(message) }
    })
    .await;
    for name in ["crashing", "unknown"] {
        pods.delete(name, &DeleteParams::default()).await.unwrap();
    }
    eventually("both to go", async || match pods.list(&ListParams::default()).await {
        Ok(left) if left.items.is_empty() => Ok(()),
        Ok(left) => Err(left.items.iter().map(ResourceExt::name_any).collect::<Vec<_>>().join(", ")),
        Err(e) => Err(e.to_string()),
    })
    .await;
    lab.down().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_labs_live_side_by_side_and_one_goes_alone() {
    let (one, two) =
        tokio::join!(plain_lab("t-one", Families::V4, 1), plain_lab("t-one-two", Families::V4, 1));
    let name = one.name().clone();
    one.down().await.unwrap();
    assert!(Remains::of(&name).none(), "{:?}", Remains::of(&name));
    let client = two.cluster("alpha").unwrap().client();
    support::apply_web(&client).await;
    let other = two.name().clone();
    assert!(!Remains::of(&other).none());
    drop(two);
    assert!(Remains::of(&other).none(), "dropping is enough: {:?}", Remains::of(&other));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_name_of_a_lab_cannot_be_taken_twice() {
    let lab = plain_lab("t-twice", Families::V4, 1).await;
    let again = isthmus_lab::Lab::up(lab.spec().clone(), &mut |_| {}).await;
    let refused = again.err().expect("refused").to_string();
    assert!(refused.contains("isthmus lab down t-twice"), "{refused}");
    assert!(
        lab.cluster("alpha").unwrap().client().apiserver_version().await.is_ok(),
        "the first is untouched"
    );
    lab.down().await.unwrap();
}
