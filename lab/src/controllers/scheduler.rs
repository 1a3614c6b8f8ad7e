//! Binds pods to nodes: the fitting node with the fewest pods of the same owner, then with the fewest pods.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::PostParams;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use serde_json::json;

use super::{World, echo};
use crate::error::{Doing, Result};

impl World {
    /// Binds every pod that has no node yet.
    pub(super) async fn schedule(&self) -> Result<()> {
        let mut unbound: Vec<Arc<Pod>> = self.pods.state();
        unbound.retain(|pod| node_of(pod).is_none() && pod.metadata.deletion_timestamp.is_none());
        unbound.sort_by_key(|pod| pod.name_any());
        for pod in unbound {
            if let Some(node) = choose(&pod, &self.nodes.state(), &self.pods.state()) {
                self.bind(&pod, &node).await?;
            }
        }
        Ok(())
    }

    async fn bind(&self, pod: &Pod, node: &str) -> Result<()> {
        let (name, namespace) = (pod.name_any(), pod.namespace().unwrap_or_default());
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name, "namespace": namespace},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        match pods
            .create_subresource::<_, serde_json::Value>("binding", &name, &PostParams::default(), &binding)
            .await
        {
            // Bound meanwhile, or gone.
            Err(kube::Error::Api(e)) if e.code == 409 || e.code == 404 => {}
            bound => drop(bound.doing(|| format!("binding pod {namespace}/{name} to {node}"))?),
        }
        let object = ObjectRef::from(pod);
        echo(&self.pods, &object, |pod| pod.is_none_or(|pod| node_of(pod).is_some())).await
    }
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref().and_then(|s| s.node_name.as_deref())
}

fn choose(pod: &Pod, nodes: &[Arc<Node>], pods: &[Arc<Pod>]) -> Option<String> {
    let selector = pod.spec.as_ref().and_then(|s| s.node_selector.clone()).unwrap_or_default();
    let owner = |pod: &Pod| pod.owner_references().first().map(|o| o.uid.clone());
    let own = owner(pod);
    nodes
        .iter()
        .filter(|node| node.spec.as_ref().and_then(|s| s.unschedulable) != Some(true))
        .filter(|node| selector.iter().all(|(key, value)| node.labels().get(key) == Some(value)))
        .min_by_key(|node| {
            let name = node.name_any();
            let here = || pods.iter().filter(|p| node_of(p) == Some(&name));
            let siblings =
                own.as_ref().map_or(0, |own| here().filter(|p| owner(p).as_ref() == Some(own)).count());
            (siblings, here().count(), name.clone())
        })
        .map(|node| node.name_any())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, owner: &str, node: Option<&str>) -> Arc<Pod> {
        let value = json!({
            "metadata": {"name": name, "namespace": "default", "ownerReferences": [
                {"apiVersion": "apps/v1", "kind": "Deployment", "name": owner, "uid": owner},
            ]},
            "spec": {"nodeName": node, "containers": []},
        });
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn node(name: &str) -> Arc<Node> {
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": name, "labels": {"name": name}}})).unwrap(),
        )
    }

    #[test]
    fn siblings_are_spread_over_nodes() {
        let nodes = [node("a"), node("b")];
        let others = [pod("x", "x", Some("b")), pod("y", "y", Some("b")), pod("web-1", "web", Some("a"))];
        assert_eq!(choose(&pod("web-2", "web", None), &nodes, &others).unwrap(), "b");
        assert_eq!(choose(&pod("db-1", "db", None), &nodes, &others).unwrap(), "a", "the emptier node");
    }

    #[test]
    fn a_node_selector_is_kept_to() {
        let mut wanted = (*pod("p", "p", None)).clone();
        let spec = wanted.spec.as_mut().unwrap();
        spec.node_selector = Some([("name".to_owned(), "b".to_owned())].into());
        assert_eq!(choose(&wanted, &[node("a"), node("b")], &[]).unwrap(), "b");
        assert_eq!(choose(&wanted, &[node("a")], &[]), None);
    }
}
