//! What a pod's status says.

use std::net::IpAddr;

use chrono::{DateTime, SecondsFormat, Utc};
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use serde_json::{Value, json};

use super::container::RunningContainer;
use super::pod::Sandbox;

/// The name of the pod's service class, which is part of its cgroup's path.
pub(super) fn qos(spec: &PodSpec) -> &'static str {
    let asks = spec.containers.iter().filter_map(|c| c.resources.as_ref());
    let any = asks.into_iter().any(|r| {
        r.requests.as_ref().is_some_and(|m| !m.is_empty()) || r.limits.as_ref().is_some_and(|m| !m.is_empty())
    });
    if any { "burstable" } else { "besteffort" }
}

/// A pod that cannot be started, and why.
pub(super) fn waiting(pod: &Pod, reason: &str, message: &str) -> Value {
    let containers = pod.spec.iter().flat_map(|s| &s.containers);
    let statuses: Vec<Value> = containers
        .map(|c| {
            json!({
                "name": c.name, "image": c.image, "imageID": "", "ready": false, "started": false, "restartCount": 0,
                "state": {"waiting": {"reason": reason, "message": message}},
            })
        })
        .collect();
    json!({
        "phase": "Pending",
        "conditions": conditions(pod, false, Some(message)),
        "containerStatuses": statuses,
    })
}

/// A pod whose containers have been started.
pub(super) fn running(
    pod: &Pod,
    node: &[IpAddr],
    sandbox: &Sandbox,
    containers: &[RunningContainer],
) -> Value {
    let ready = containers.iter().all(|c| c.ready && c.running());
    let statuses: Vec<Value> = containers.iter().map(container).collect();
    let ips: Vec<Value> = sandbox.addresses.iter().map(|a| json!({"ip": a.to_string()})).collect();
    let host_ips: Vec<Value> = node.iter().map(|a| json!({"ip": a.to_string()})).collect();
    let started = containers.iter().map(|c| c.started).min().unwrap_or_default();
    json!({
        "phase": "Running",
        "hostIP": node.first().map(ToString::to_string), "hostIPs": host_ips,
        "podIP": sandbox.addresses.first().map(ToString::to_string), "podIPs": ips,
        "startTime": pod.status.as_ref().and_then(|s| s.start_time.clone()).map_or_else(|| json!(stamp(started)), |t| json!(t)),
        "qosClass": pod.spec.as_ref().map(|s| if qos(s) == "burstable" { "Burstable" } else { "BestEffort" }),
        "conditions": conditions(pod, ready, None),
        "containerStatuses": statuses,
    })
}

fn container(c: &RunningContainer) -> Value {
    let state = if c.running() {
        json!({"running": {"startedAt": stamp(c.started)}})
    } else {
        json!({"waiting": {"reason": "CrashLoopBackOff", "message": "it ended by itself and is started again"}})
    };
    json!({
        "name": c.spec.name, "image": c.spec.image, "imageID": c.spec.image,
        "containerID": format!("lab://{}", c.id),
        "ready": c.ready && c.running(), "started": c.running(), "restartCount": c.restarts, "state": state,
    })
}

/// The time a condition last changed is kept while it stays as it is.
fn conditions(pod: &Pod, ready: bool, message: Option<&str>) -> Vec<Value> {
    let before = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let condition = |kind: &str, holds: bool| {
        let status = if holds { "True" } else { "False" };
        let since = before
            .and_then(|all| all.iter().find(|c| c.type_ == kind && c.status == status))
            .and_then(|c| c.last_transition_time.clone())
            .map_or_else(|| json!(stamp(Utc::now())), |t| json!(t));
        let mut value = json!({"type": kind, "status": status, "lastTransitionTime": since});
        if !holds {
            value["reason"] = json!("ContainersNotReady");
            value["message"] = json!(message.unwrap_or("a container is not ready"));
        }
        value
    };
    vec![
        condition("PodScheduled", true),
        condition("Initialized", true),
        condition("ContainersReady", ready),
        condition("Ready", ready),
    ]
}

fn stamp(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}
