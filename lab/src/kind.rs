//! The clusters of a scenario on kind (Kubernetes in Docker): real Kubernetes, real CNI, the images that users install.
//!
//! Each of the scenario's clusters becomes a kind cluster. The images are built from this repository, loaded, and installed
//! with the overlay `kustomize/overlays/kind`; `isthmus connect` joins the clusters as it does for users. Pods of different
//! clusters meet through WireGuard alone, which needs no route: nodes of all kind clusters are in one Docker network.

mod config;
mod conntrack;
mod daemon;
mod daemons;
mod hosts;
mod images;
pub mod needs;
mod wires;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;
use tokio::sync::Mutex;

pub use self::needs::Tools;
use crate::command;
use crate::error::{Doing, LabError, Result};
use crate::kubectl::Kubectl;
use crate::names::{ClusterPlan, LabName};
use crate::report::LogTail;
use crate::runner::objects;
use crate::scenario::{ObjectCondition, Scenario, Until};
use crate::spec::{ClusterSpec, Encryption};

/// kind makes a cluster in a minute or two, once it has its image.
const CREATE: Duration = Duration::from_secs(600);
/// Images are pulled by then, so this is for starting.
const ROLL_OUT: Duration = Duration::from_secs(180);
/// `isthmus connect` waits for five minutes.
const JOIN: Duration = Duration::from_secs(330);
/// Where the daemons are.
const NAMESPACE: &str = "isthmus-system";

/// Clusters on kind.
#[derive(Debug)]
pub struct Kind {
    name: LabName,
    tools: Tools,
    /// Kubeconfig and kustomizations.
    dir: PathBuf,
    clusters: Vec<KindCluster>,
    cut: Mutex<Vec<wires::Cut>>,
    frozen: Mutex<Vec<daemons::Frozen>>,
}

/// One of them.
#[derive(Debug)]
struct KindCluster {
    spec: ClusterSpec,
    plan: ClusterPlan,
    /// What kind calls it; `docker` calls its nodes after it.
    kind: String,
    kubectl: Kubectl,
}

impl Kind {
    /// Makes up its mind where things will be; makes nothing but an empty folder.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn prepare(scenario: &Scenario, name: LabName, tools: Tools) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix(&format!("isthmus-kind-{name}-")).tempdir();
        let dir = dir.doing(|| "making a folder for kubeconfigs")?.keep();
        let clusters = scenario.clusters.iter().enumerate().map(|(i, spec)| KindCluster {
            spec: spec.clone(),
            plan: ClusterPlan::new(i, scenario.families),
            kind: format!("isthmus-{name}-{}", spec.name),
            kubectl: Kubectl::new(&tools.kubectl, dir.join("kubeconfig"), &spec.name),
        });
        let clusters = clusters.collect();
        Ok(Self { name, tools, dir, clusters, cut: Mutex::default(), frozen: Mutex::default() })
    }

    /// Raises everything and returns when the clusters are joined. When it fails, or is dropped half-way, [`Kind::down`]
    /// removes what there is.
    ///
    /// # Errors
    /// What the first program that failed said.
    pub async fn up(&self, scenario: &Scenario, progress: &mut (dyn FnMut(&str) + Send)) -> Result<()> {
        progress("the images, built from this repository");
        self.build_images().await?;
        for cluster in &self.clusters {
            progress(&format!("kind cluster {}", cluster.kind));
            self.create(cluster).await?;
            self.load_images(cluster).await?;
        }
        if needs::this_machine(scenario) {
            // Known since there is a cluster: better now than once a step wants it.
            self.bridge().await?;
        }
        for cluster in &self.clusters {
            progress(&format!("Isthmus in {}", cluster.spec.name));
            self.install(cluster, scenario).await?;
            for workload in daemons::WORKLOADS {
                cluster.kubectl.rolled_out(workload, NAMESPACE, ROLL_OUT).await?;
            }
        }
        progress(if scenario.connected {
            "the clusters joined, by isthmus connect"
        } else {
            "Secrets for peers"
        });
        for (from, to) in config::pairs(&scenario.clusters) {
            let mut join = command::isthmus("connect", &self.kubeconfig())?;
            join.args(["--context", from, "--destination-context", to]);
            command::output(join, None, JOIN).await?;
            if !scenario.connected {
                let mut part = command::isthmus("disconnect", &self.kubeconfig())?;
                part.args(["--context", from, "--destination-context", to]);
                command::output(part, None, JOIN).await?;
            }
        }
        Ok(())
    }

    /// Mends what steps have broken and not mended: joins what is cut, and lets go on what is paused.
    ///
    /// # Errors
    /// When something cannot be mended; the rest is.
    pub async fn mend(&self) -> Result<()> {
        let healed = self.heal().await;
        self.resume_all().await.and(healed)
    }

    /// Deletes the clusters, those that were half made, too.
    ///
    /// # Errors
    /// When kind cannot delete one; the others are deleted.
    pub async fn down(&self) -> Result<()> {
        let mut outcome = Ok(());
        for cluster in &self.clusters {
            let mut kind = self.kind(&["delete", "cluster", "--name", &cluster.kind]);
            kind.arg("--kubeconfig").arg(self.kubeconfig());
            let deleted = command::output(kind, None, CREATE).await;
            outcome = outcome.and(deleted.map(drop));
        }
        if outcome.is_ok() {
            outcome = std::fs::remove_dir_all(&self.dir).doing(|| format!("removing {}", self.dir.display()));
        }
        outcome
    }

    /// Its name.
    pub fn name(&self) -> &LabName {
        &self.name
    }

    /// For `kubectl` and `isthmus`: a context for each cluster, called as the scenario calls it.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// What kind calls its clusters.
    pub fn clusters(&self) -> impl Iterator<Item = &str> {
        self.clusters.iter().map(|cluster| cluster.kind.as_str())
    }

    pub(crate) fn kubectl(&self, cluster: &str) -> Result<&Kubectl> {
        self.cluster(cluster).map(|cluster| &cluster.kubectl)
    }

    /// Applies a file's objects, completed as the lab's kubelets complete them.
    pub(crate) async fn apply(&self, cluster: &str, file: &Path) -> Result<()> {
        let kubectl = self.kubectl(cluster)?;
        for mut object in objects::documents(file)? {
            complete(&mut object, cluster);
            kubectl.apply(&object.to_string()).await?;
        }
        Ok(())
    }

    /// What the cluster's ClusterPeer says.
    pub(crate) async fn peer_connected(&self, cluster: &str, peer: &str) -> Result<bool, String> {
        let kubectl = self.kubectl(cluster).map_err(|e| e.to_string())?;
        let found =
            kubectl.get(&format!("clusterpeer/{peer}"), NAMESPACE).await.map_err(|e| e.to_string())?;
        let found = found.ok_or_else(|| format!("it has no peer {peer}"))?;
        let connected = |is: &str| {
            let condition = ObjectCondition { condition: "Connected".into(), is: is.into(), reason: None };
            objects::is("clusterpeer", Some(&found), &Until::Condition(condition))
        };
        match (connected("True"), connected("False")) {
            (Ok(()), _) => Ok(true),
            (_, Ok(())) => Ok(false),
            (Err(how), _) => Err(how),
        }
    }

    /// The last lines of all daemons.
    pub(crate) async fn logs(&self, lines: usize) -> Vec<LogTail> {
        let mut logs = Vec::new();
        for cluster in &self.clusters {
            for workload in daemons::WORKLOADS {
                let lines = match cluster.selector(workload).await {
                    Ok(selector) => cluster.kubectl.logs(&selector, NAMESPACE, lines).await,
                    Err(e) => Err(e),
                };
                let lines = lines.unwrap_or_else(|e| format!("  (cannot be read: {e})"));
                logs.push(LogTail { process: format!("{}/{workload}", cluster.spec.name), lines });
            }
        }
        logs
    }

    async fn create(&self, cluster: &KindCluster) -> Result<()> {
        let file = self.dir.join(format!("{}.kind.yaml", cluster.spec.name));
        let config = config::cluster(&cluster.spec, &cluster.plan);
        std::fs::write(&file, config.to_string()).doing(|| format!("writing {}", file.display()))?;
        let mut kind = self.kind(&["create", "cluster", "--name", &cluster.kind, "--wait", "5m"]);
        kind.arg("--config").arg(&file).arg("--kubeconfig").arg(self.kubeconfig());
        command::output(kind, None, CREATE).await?;
        // kind calls the context after itself; the scenario's name for it is what steps and people use.
        let context = format!("kind-{}", cluster.kind);
        let mut rename = Command::new(&self.tools.kubectl);
        rename.arg("--kubeconfig").arg(self.kubeconfig());
        rename.args(["config", "rename-context", &context, &cluster.spec.name]);
        command::output(rename, None, CREATE).await.map(drop)
    }

    /// Starts every agent again with encryption on, off or strict, and waits until all are ready.
    pub(crate) async fn encrypt(&self, mode: Encryption, scenario: &Scenario) -> Result<()> {
        let scenario = Scenario { encryption: mode, ..scenario.clone() };
        for cluster in &self.clusters {
            self.install(cluster, &scenario).await?;
        }
        for cluster in &self.clusters {
            cluster.kubectl.rolled_out(daemons::AGENT, NAMESPACE, ROLL_OUT).await?;
        }
        Ok(())
    }

    /// Applies the overlay; what is there already and differs from it is changed.
    async fn install(&self, cluster: &KindCluster, scenario: &Scenario) -> Result<()> {
        let dir = self.dir.join(&cluster.spec.name);
        std::fs::create_dir_all(&dir).doing(|| format!("making {}", dir.display()))?;
        let kustomization = config::kustomization(&dir, &self.tools.repository, &cluster.spec, scenario)?;
        let file = dir.join("kustomization.yaml");
        std::fs::write(&file, kustomization.to_string()).doing(|| format!("writing {}", file.display()))?;
        cluster.kubectl.apply_kustomization(&dir.to_string_lossy()).await
    }

    fn kind(&self, args: &[&str]) -> Command {
        let mut kind = Command::new(&self.tools.kind);
        kind.args(args);
        kind
    }

    async fn docker(&self, args: &[&str]) -> Result<String> {
        let mut docker = Command::new(&self.tools.docker);
        // Of Docker's two ways to build, the one that knows caches; the default of later versions.
        docker.args(args).env("DOCKER_BUILDKIT", "1");
        command::output(docker, None, CREATE).await
    }

    fn cluster(&self, name: &str) -> Result<&KindCluster> {
        self.clusters.iter().find(|c| c.spec.name == name).ok_or_else(|| {
            let all: Vec<&str> = self.clusters.iter().map(|c| c.spec.name.as_str()).collect();
            LabError::invalid(format!("there is no cluster {name}, only {}", all.join(", ")))
        })
    }
}

/// What the lab's kubelets do by themselves: tell a container who it is, and take its image from this machine.
fn complete(object: &mut Value, cluster: &str) {
    let pod = match object["kind"].as_str() {
        Some("Pod") => object.get_mut("spec"),
        _ => object.pointer_mut("/spec/template/spec"),
    };
    let containers = pod.and_then(|pod| pod.get_mut("containers")).and_then(Value::as_array_mut);
    for container in containers.into_iter().flatten().filter_map(Value::as_object_mut) {
        container.entry("imagePullPolicy").or_insert_with(|| json!("IfNotPresent"));
        let known = json!([
            {"name": "LAB_CLUSTER", "value": cluster},
            {"name": "LAB_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "LAB_POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ]);
        if let (Some(all), Value::Array(known)) =
            (container.entry("env").or_insert_with(|| json!([])).as_array_mut(), known)
        {
            all.extend(known);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_told_who_they_are_and_everything_else_stays() {
        let mut pod =
            json!({"kind": "Pod", "spec": {"containers": [{"image": "x", "env": [{"name": "A"}]}]}});
        complete(&mut pod, "alpha");
        let container = &pod["spec"]["containers"][0];
        assert_eq!(container["env"][0]["name"], "A");
        assert_eq!(container["env"][1]["value"], "alpha");
        assert_eq!(container["imagePullPolicy"], "IfNotPresent");
        let service = json!({"kind": "Service", "spec": {"ports": []}});
        let mut same = service.clone();
        complete(&mut same, "alpha");
        assert_eq!(same, service);
    }
}
