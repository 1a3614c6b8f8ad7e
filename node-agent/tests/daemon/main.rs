//! The agent whole: a real gateway over mTLS on one side, the kernel on the other. What is put into the store must answer
//! on a socket; what happens to store, gateway or agent must not show there.
//!
//! Needs root, and brings its own namespaces and cgroup.

mod place;
mod pod;
#[path = "../datapath/sandbox.rs"]
#[expect(dead_code, reason = "shared with the tests of the datapath, which use all of it")]
mod sandbox;

use std::collections::BTreeMap;

use isthmus_node_agent::status::{AgentStatus, ClusterState};
use serde_json::json;

use crate::place::{Agent, Place, Stored};
use crate::pod::PodProcess;

const LOCAL: &str = "10.1.0.1:8080";
const REMOTE: &str = "10.2.0.1:8080";
const REMOTE_2: &str = "10.2.0.2:8080";

#[test]
fn what_is_put_into_the_store_reaches_the_map_and_what_is_deleted_leaves_it() {
    Place::with(async |place| {
        let agent = Agent::start(&place).await;
        place.fill(&place.store(), &[LOCAL], &[REMOTE]);
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;

        place.store().put_remote(&[REMOTE, REMOTE_2]);
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2), (REMOTE_2, 2)]).await;
        place.store().put_remote(&[]);
        place.eventually_answer(&[(LOCAL, 0)]).await;
        place.store().put_local(&[], true);
        place.eventually_answer(&[]).await;
        place.store().remove("isthmus/services/v1/default/rebel-base");
        place.eventually("the frontend goes", |maps| maps.frontends.is_empty()).await;
        agent.stop().await;
    });
}

#[test]
fn addresses_nodes_and_identities_of_all_clusters_are_known() {
    Place::with(async |place| {
        let agent = Agent::start(&place).await;
        place.fill(&place.store(), &[LOCAL], &[REMOTE]);
        place
            .eventually("pods and nodes are in the ipcache", |maps| {
                let wanted = BTreeMap::from([
                    // A pod of this node, a pod of the peer, the peer's node, its pod range, and this node.
                    ("10.1.0.1/32".to_owned(), (65_600, 0)),
                    ("10.2.0.1/32".to_owned(), (131_100, 2)),
                    ("172.18.2.1/32".to_owned(), (6, 2)),
                    ("10.2.0.0/24".to_owned(), (2, 2)),
                    ("172.18.1.1/32".to_owned(), (1, 0)),
                    ("10.1.0.0/24".to_owned(), (2, 0)),
                    // Everything else is the world, by family, as policies know it.
                    ("0.0.0.0/0".to_owned(), (9, 0)),
                    ("::/0".to_owned(), (10, 0)),
                ]);
                maps.ipcache == wanted
            })
            .await;
        agent.until_synced().await;
        let status = agent.status().await;
        assert!(status.ready, "{:?}", status.problems);
        let beta = &status.clusters[1];
        assert_eq!((beta.name.as_str(), beta.state), ("beta", ClusterState::Synced));
        assert_eq!((beta.nodes, beta.endpoints, beta.identities, beta.services), (1, 1, 1, 1));
        assert!(beta.data_age_seconds.is_some_and(|age| age < 60.0));
        agent.stop().await;
    });
}

#[test]
fn a_restarted_agent_leaves_the_maps_as_they_are() {
    Place::with(async |place| {
        let agent = Agent::start(&place).await;
        place.fill(&place.store(), &[LOCAL], &[REMOTE]);
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;
        agent.until_synced().await;
        let before = place.dump();
        agent.stop().await;
        assert_eq!(place.dump(), before, "while no agent runs");

        let watched = place.watch(before.clone());
        let agent = Agent::start(&place).await;
        agent.until_synced().await;
        watched.saw_no_change();
        assert_eq!(place.dump(), before);
        agent.stop().await;
    });
}

#[test]
fn a_restarted_agent_that_reaches_nobody_keeps_what_is_there() {
    Place::with(async |mut place| {
        let agent = Agent::start(&place).await;
        place.fill(&place.store(), &[LOCAL], &[REMOTE]);
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;
        // One that was ended in the midst of its start leaves work to the next, gateway or not.
        agent.until_synced().await;
        agent.stop().await;
        let before = place.dump();
        place.stop_gateway().await;

        let agent = Agent::start(&place).await;
        agent
            .until("it says why it is not ready", |status| {
                !status.ready && status.problems.iter().any(|problem| problem.contains("gateway"))
            })
            .await;
        assert_eq!(place.dump(), before);
        agent.stop().await;
    });
}

#[test]
fn a_peer_that_is_disconnected_gets_nothing_new_while_what_is_open_goes_on() {
    Place::with(async |place| {
        let agent = Agent::start(&place).await;
        place.fill(&place.store(), &[LOCAL], &[REMOTE]);
        agent.until_synced().await;
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;
        let known = place.readable().ipcache;

        // The relay's first step. Its last one, when the grace period is over, takes the entries away.
        place.store().remove("cilium/cluster-config/beta");
        place.eventually_answer(&[(LOCAL, 0)]).await;
        let beta =
            |status: &AgentStatus| status.clusters.iter().find(|it| it.name == "beta").map(|it| it.state);
        agent.until("it says so", |status| beta(status) == Some(ClusterState::Draining)).await;
        assert_eq!(place.readable().ipcache, known, "what is open needs the addresses");

        place.store().fill_peer(&[REMOTE]);
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;

        place.store().remove("cilium/cluster-config/beta");
        place.eventually_answer(&[(LOCAL, 0)]).await;
        for resource in ["nodes", "ip", "identities", "services"] {
            place.store().remove(&format!("cilium/synced/beta/cilium/cache/{resource}/v1"));
            place.store().delete_prefix(&format!("cilium/cache/{resource}/v1/beta/"));
        }
        agent
            .until("it has left", |status| beta(status).is_none_or(|state| state == ClusterState::Unknown))
            .await;
        place.eventually("its addresses are gone", |maps| !maps.ipcache.contains_key("10.2.0.1/32")).await;
        agent.stop().await;
    });
}

#[test]
fn an_exchanged_store_that_is_still_being_filled_takes_nothing_away() {
    Place::with(async |mut place| {
        let agent = Agent::start(&place).await;
        place.fill(&place.store(), &[LOCAL], &[REMOTE]);
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;
        agent.until_synced().await;
        let before = place.dump();
        let first = agent.status().await.gateway.store_id;

        let watched = place.watch(before.clone());
        place.exchange_store().await;
        agent
            .until("it reads another store", |status| {
                status.gateway.connected && status.gateway.store_id != first
            })
            .await;
        // The exporter comes first, the relay reaches its peer later.
        place.store().fill_own(&[LOCAL]);
        agent
            .until("the own cluster is read again", |status| status.clusters[0].state == ClusterState::Synced)
            .await;
        place.store().fill_peer(&[REMOTE]);
        agent.until_synced().await;
        watched.saw_no_change();
        assert_eq!(place.dump(), before);

        // What the new store really lacks goes.
        place.store().put_remote(&[REMOTE_2]);
        place.eventually_answer(&[(LOCAL, 0), (REMOTE_2, 2)]).await;
        agent.stop().await;
    });
}

#[test]
fn a_peer_that_refuses_gets_nothing_new_also_where_the_store_is_new() {
    Place::with(async |mut place| {
        let agent = Agent::start(&place).await;
        place.fill(&place.store(), &[LOCAL], &[REMOTE]);
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;
        agent.until_synced().await;
        let (before, known) = (place.dump(), place.readable().ipcache);
        let first = agent.status().await.gateway.store_id;

        // The relay that was started anew does not reach its peer: for all that is known it is out of reach.
        let watched = place.watch(before.clone());
        place.exchange_store().await;
        place.store().fill_own(&[LOCAL]);
        agent
            .until("the own cluster is read from another store", |status| {
                status.gateway.store_id != first && status.clusters[0].state == ClusterState::Synced
            })
            .await;
        watched.saw_no_change();
        assert_eq!(place.dump(), before);

        place.store().put_text("isthmus/refusing/v1/beta", "true");
        place.eventually_answer(&[(LOCAL, 0)]).await;
        let beta =
            |status: &AgentStatus| status.clusters.iter().find(|it| it.name == "beta").map(|it| it.state);
        agent.until("it says so", |status| beta(status) == Some(ClusterState::Draining)).await;
        assert_eq!(place.readable().ipcache, known, "what is open needs the addresses");

        // Nobody else has the service: a peer that has only lost its authority serves it still.
        place.store().put_local(&[], true);
        place.eventually_answer(&[(REMOTE, 2)]).await;
        place.store().put_local(&[LOCAL], true);
        place.eventually_answer(&[(LOCAL, 0)]).await;

        place.store().fill_peer(&[REMOTE]);
        place.store().remove("isthmus/refusing/v1/beta");
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;
        agent.stop().await;
    });
}

#[test]
fn a_malformed_entry_is_counted_and_the_rest_goes_on() {
    Place::with(async |place| {
        let agent = Agent::start(&place).await;
        let store = place.store();
        store.put_text("cilium/cache/services/v1/beta/default/broken", "{");
        store.put_text(
            "cilium/cache/services/v1/beta/default/other",
            &json!({"cluster": "gamma"}).to_string(),
        );
        store.put_text("cilium/cache/ip/v1/beta/not-an-address", "{}");
        store.put_text("cilium/cluster-config/gamma", "{\"id\":70000}");
        place.fill(&store, &[LOCAL], &[REMOTE]);
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;
        agent.until("four entries are counted", |status| status.rejected_entries >= 4).await;
        agent.stop().await;
    });
}

#[test]
fn a_peer_that_has_left_the_mesh_is_forgotten_once_its_entries_are_deleted() {
    Place::with(async |place| {
        let agent = Agent::start(&place).await;
        place.fill(&place.store(), &[], &[REMOTE]);
        place.eventually_answer(&[(REMOTE, 2)]).await;
        let store = place.store();
        store.remove("cilium/cluster-config/beta");
        // Until they are, they are followed: nobody else has the service.
        store.put_remote(&[REMOTE, REMOTE_2]);
        place.eventually_answer(&[(REMOTE, 2), (REMOTE_2, 2)]).await;
        store.delete_prefix("cilium/cache/");
        store.delete_prefix("cilium/synced/beta/");
        place.eventually_answer(&[]).await;
        agent
            .until("beta is forgotten", |status| {
                status.clusters.iter().all(|cluster| cluster.name != "beta" || cluster.id.is_none())
            })
            .await;
        agent.stop().await;
    });
}

#[test]
fn foreign_hands_in_the_maps_are_put_right() {
    Place::with(async |place| {
        let agent = Agent::start(&place).await;
        place.fill(&place.store(), &[LOCAL], &[REMOTE]);
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;
        place.vandalise();
        place.eventually_answer(&[(LOCAL, 0), (REMOTE, 2)]).await;
        agent.stop().await;
    });
}

#[test]
fn a_pod_of_the_node_gets_its_programs_when_it_comes_up_and_loses_them_when_it_goes() {
    Place::with(async |place| {
        let agent = Agent::start(&place).await;
        place.fill(&place.store(), &[LOCAL], &[REMOTE]);
        let uid = "0a1b2c3d-0000-4000-8000-000000000001";
        place.pods().put("client", uid);
        agent
            .until("the pod waits for its sandbox", |status| {
                status
                    .datapath
                    .waiting_pods
                    .get("default/client")
                    .is_some_and(|reason| reason.contains("cgroup"))
            })
            .await;

        let pod = PodProcess::start(&place, uid);
        agent
            .until("the pod is attached", |status| {
                status.datapath.attached_pods == 1 && status.datapath.waiting_pods.is_empty()
            })
            .await;
        assert_eq!(place.attached(), [pod.interface()]);
        place.pods().put_on_host_network("kube-proxy", "0a1b2c3d-0000-4000-8000-000000000002");

        let former = pod.interface();
        drop(pod);
        let pod = PodProcess::start(&place, uid);
        assert_ne!(pod.interface(), former);
        agent.until("the pod's new sandbox is attached", |_| place.attached() == [pod.interface()]).await;

        place.pods().delete("client", uid);
        agent.until("the pod is forgotten", |status| status.datapath.attached_pods == 0).await;
        assert!(place.attached().is_empty());
        drop(pod);
        agent.stop().await;
    });
}

#[test]
fn a_pod_whose_policy_does_not_fit_is_closed_and_users_see_it_at_pod_and_policy() {
    const OURS: &str = "isthmus.io/Enforced.node-0";
    // Ports with gaps, so that each is an entry.
    let ports = |from: usize, count: usize| -> serde_json::Value {
        (from..from + count)
            .map(|port| json!({"port": (1001 + 2 * port).to_string(), "protocol": "TCP"}))
            .collect()
    };
    let policy = |app: &str, count: usize| {
        let rules: Vec<_> = (0..count)
            .step_by(40)
            .map(|from| {
                json!({
                    "fromEntities": ["all"], "toPorts": [{"ports": ports(from, 40.min(count - from))}],
                })
            })
            .collect();
        let spec = json!({"endpointSelector": {"matchLabels": {"app": app}}, "ingress": rules});
        json!({"uid": app, "generation": 1, "specs": [spec]}).to_string()
    };
    Place::with(async |place| {
        let (large, small) = ("0a1b2c3d-0000-4000-8000-000000000001", "0a1b2c3d-0000-4000-8000-000000000002");
        let key = |name: &str| format!("isthmus/policies/v1/ciliumnetworkpolicy/default/{name}");
        let valid = json!({"type": "Valid", "status": "True"});
        // What an earlier run of the agent has left.
        let left = json!({"type": OURS, "status": "False"});
        place.pods().put_policy("large", json!([valid]));
        place.pods().put_policy("small", json!([valid, left]));
        let store = place.store();
        store.put_text(&key("large"), &policy("large", 300));
        store.put_text(&key("small"), &policy("small", 3));
        place.fill(&store, &[LOCAL], &[REMOTE]);
        let agent = Agent::start(&place).await;
        let pods = [PodProcess::start(&place, large), PodProcess::start_at(&place, small, "host1")];
        place.pods().put("large", large);
        place.pods().put("small", small);

        agent
            .until("one pod is closed and the other restricted", |status| {
                status.policy.endpoints == 2
                    && status.policy.ingress_enforced == 2
                    && status.policy.closed.keys().eq(["default/large"])
            })
            .await;
        agent
            .until("the policies say so", |_| {
                place.pods().conditions("large").contains_key(OURS)
                    && !place.pods().conditions("small").contains_key(OURS)
            })
            .await;
        let conditions = place.pods().conditions("large");
        assert_eq!(conditions["Valid"], valid, "what others say stays");
        assert_eq!(
            (&conditions[OURS]["status"], &conditions[OURS]["reason"]),
            (&json!("False"), &json!("PolicyTooLarge"))
        );
        let message = conditions[OURS]["message"].as_str().expect("text");
        assert!(message.contains("default/large") && message.contains("--policy-map-max"), "{message}");
        assert_eq!(place.pods().conditions("small"), BTreeMap::from([("Valid".to_owned(), valid.clone())]));
        agent.until("the pod says so", |_| !place.pods().events().is_empty()).await;
        let event = &place.pods().events()[0];
        assert_eq!((&event["type"], &event["reason"]), (&json!("Warning"), &json!("PolicyTooLarge")));
        assert_eq!((&event["regarding"]["kind"], &event["regarding"]["uid"]), (&json!("Pod"), &json!(large)));
        let note = event["note"].as_str().expect("text");
        assert!(note.contains("ciliumnetworkpolicy/default/large") && note.contains("256"), "{note}");

        store.put_text(&key("large"), &policy("large", 30));
        agent.until("it is open", |status| status.policy.closed.is_empty()).await;
        agent
            .until("pod and policy say that it is over", |_| {
                place.pods().events().len() == 2 && !place.pods().conditions("large").contains_key(OURS)
            })
            .await;
        let event = &place.pods().events()[1];
        assert_eq!((&event["type"], &event["reason"]), (&json!("Normal"), &json!("PolicyInForce")));
        assert_eq!(place.pods().conditions("large"), BTreeMap::from([("Valid".to_owned(), valid)]));
        drop(pods);
        agent.stop().await;
    });
}
