//! As many pods as a Deployment wants, of its present template, and its status.

use std::cmp::Reverse;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{World, echo};
use crate::error::{Doing, LabError, Result};

/// Distinguishes pods of different templates, under the name everybody knows.
const TEMPLATE_HASH: &str = "pod-template-hash";

impl World {
    /// Brings every Deployment's pods in line.
    pub(super) async fn deployments(&self) -> Result<()> {
        for deployment in self.deployments.state() {
            if deployment.metadata.deletion_timestamp.is_none() {
                self.deployment(&deployment).await?;
            }
        }
        // There is no garbage collector: what a deleted Deployment owned goes here.
        for pod in self.pods.state() {
            let orphan = pod.owner_references().iter().any(|o| {
                let of_deployment = o.kind == Deployment::kind(&()) && o.controller == Some(true);
                of_deployment && !self.deployments.state().iter().any(|d| d.uid().as_deref() == Some(&o.uid))
            });
            if orphan && pod.metadata.deletion_timestamp.is_none() {
                self.delete_pod(&pod).await?;
            }
        }
        Ok(())
    }

    async fn deployment(&self, deployment: &Deployment) -> Result<()> {
        let Some(spec) = &deployment.spec else { return Ok(()) };
        let wanted = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
        let hash = template_hash(deployment)?;
        let mut pods = self.pods_of(deployment);
        pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
        let (mut current, old): (Vec<_>, Vec<_>) =
            pods.into_iter().partition(|pod| pod.labels().get(TEMPLATE_HASH) == Some(&hash));

        for _ in current.len()..wanted {
            self.create_pod(deployment, &hash).await?;
        }
        // The least useful go first: not ready, then the youngest.
        current
            .sort_by_key(|pod| (ready(pod), Reverse(pod.creation_timestamp().map(|t| t.0)), pod.name_any()));
        let surplus = current.len().saturating_sub(wanted);
        for pod in &current[..surplus] {
            self.delete_pod(pod).await?;
        }
        // Pods of an earlier template stay until enough of the present one are ready.
        if current[surplus..].iter().filter(|pod| ready(pod)).count() >= wanted {
            for pod in &old {
                self.delete_pod(pod).await?;
            }
        }
        self.deployment_status(deployment, wanted, &hash).await
    }

    fn pods_of(&self, deployment: &Deployment) -> Vec<Arc<Pod>> {
        let uid = deployment.uid();
        let mut pods = self.pods.state();
        pods.retain(|pod| pod.owner_references().iter().any(|o| Some(&o.uid) == uid.as_ref()));
        pods
    }

    async fn create_pod(&self, deployment: &Deployment, hash: &str) -> Result<()> {
        let template = deployment.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default();
        let namespace = deployment.namespace().unwrap_or_default();
        let mut metadata = template.metadata.unwrap_or_default();
        metadata.namespace = Some(namespace.clone());
        metadata.name = None;
        metadata.generate_name = Some(format!("{}-{hash}-", deployment.name_any()));
        metadata.labels.get_or_insert_default().insert(TEMPLATE_HASH.to_owned(), hash.to_owned());
        metadata.owner_references = deployment.controller_owner_ref(&()).map(|owner| vec![owner]);
        let pod = Pod { metadata, spec: template.spec, status: None };
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        let created = pods.create(&PostParams::default(), &pod).await;
        let created = created
            .doing(|| format!("creating a pod of Deployment {namespace}/{}", deployment.name_any()))?;
        echo(&self.pods, &ObjectRef::from(&created), |pod| pod.is_some()).await
    }

    async fn delete_pod(&self, pod: &Pod) -> Result<()> {
        let (name, namespace) = (pod.name_any(), pod.namespace().unwrap_or_default());
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        match pods.delete(&name, &DeleteParams::default()).await {
            Err(kube::Error::Api(e)) if e.code == 404 => {}
            deleted => drop(deleted.doing(|| format!("deleting pod {namespace}/{name}"))?),
        }
        let object = ObjectRef::from(pod);
        echo(&self.pods, &object, |pod| pod.is_none_or(|p| p.metadata.deletion_timestamp.is_some())).await
    }

    async fn deployment_status(&self, deployment: &Deployment, wanted: usize, hash: &str) -> Result<()> {
        let mut pods = self.pods_of(deployment);
        pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
        let count = |of: &dyn Fn(&Pod) -> bool| pods.iter().filter(|pod| of(pod)).count() as i32;
        let all = pods.len() as i32;
        let ready = count(&ready);
        let updated = count(&|pod| pod.labels().get(TEMPLATE_HASH).is_some_and(|h| h == hash));
        let old = deployment.status.clone().unwrap_or_default();
        let same = old.observed_generation == deployment.metadata.generation
            && old.replicas.unwrap_or(0) == all
            && old.ready_replicas.unwrap_or(0) == ready
            && old.updated_replicas.unwrap_or(0) == updated;
        if same {
            return Ok(());
        }
        let available = if ready as usize >= wanted { "True" } else { "False" };
        let wanted = wanted as i32;
        let status = json!({"status": {
            "observedGeneration": deployment.metadata.generation,
            "replicas": all, "readyReplicas": ready, "availableReplicas": ready, "updatedReplicas": updated,
            "unavailableReplicas": (wanted - ready).max(0),
            "conditions": [
                {"type": "Available", "status": available, "reason": "ReadyReplicas", "message": format!("{ready} of {wanted} are ready")},
                {"type": "Progressing", "status": "True", "reason": "ReplicasUpdated", "message": format!("{updated} of {wanted} are up to date")},
            ],
        }});
        let namespace = deployment.namespace().unwrap_or_default();
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), &namespace);
        let name = deployment.name_any();
        match deployments.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await {
            Err(kube::Error::Api(e)) if e.code == 404 => Ok(()),
            patched => {
                patched.map(drop).doing(|| format!("writing the status of Deployment {namespace}/{name}"))
            }
        }
    }
}

pub(super) fn ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

fn template_hash(deployment: &Deployment) -> Result<String> {
    let template = deployment.spec.as_ref().map(|s| &s.template);
    let text = serde_json::to_vec(&template).map_err(|e| LabError::invalid(e.to_string()))?;
    let digest = Sha256::digest(text);
    Ok(digest[..5].iter().map(|b| format!("{b:02x}")).collect())
}
