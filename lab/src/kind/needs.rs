//! What a scenario needs to run on kind: said all at once, before anything is made.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::config::HIGHLY_AVAILABLE;
use crate::error::{LabError, Result};
use crate::programs;
use crate::scenario::Scenario;
use crate::spec::{Encryption, Peering, Store};

/// The programs that kind takes, and where this repository is.
#[derive(Debug, Clone)]
pub struct Tools {
    /// `kind`.
    pub kind: PathBuf,
    /// `docker`.
    pub docker: PathBuf,
    /// `kubectl`.
    pub kubectl: PathBuf,
    /// The folder with `images/` and `kustomize/`.
    pub repository: PathBuf,
}

/// Names the overlay, from the repository's folder.
pub(super) const OVERLAY: &str = "kustomize/overlays/kind";

const GET_KIND: &str = "  kind is not installed: it is one file, see https://kind.sigs.k8s.io/docs/user/quick-start/#installation \
                        (`go install sigs.k8s.io/kind@latest` with Go)";
const GET_DOCKER: &str =
    "  docker is not installed: apt-get install -y docker.io, or see https://docs.docker.com/engine/install/";
const GET_KUBECTL: &str = "  kubectl is not installed: see https://kubernetes.io/docs/tasks/tools/";
const START_DOCKER: &str = "  docker does not answer (`docker info` fails): start it (systemctl start docker), \
                            and let this user reach it (the group docker, or root)";

impl Tools {
    /// Looks for all of them.
    ///
    /// # Errors
    /// [`LabError::Missing`], one line for each thing that is not there, each with how to get it.
    pub fn find(scenario: &Scenario) -> Result<Self> {
        let mut missing = Vec::new();
        let mut look = |name: &str, advice: &str| {
            let found = programs::on_path(name);
            if found.is_none() {
                missing.push(advice.to_owned());
            }
            found.unwrap_or_default()
        };
        let (kind, docker) = (look("kind", GET_KIND), look("docker", GET_DOCKER));
        let kubectl = look("kubectl", GET_KUBECTL);
        if docker.is_file() && !answers(&docker) {
            missing.push(START_DOCKER.to_owned());
        }
        let repository = repository(&scenario.dir);
        if repository.is_none() {
            missing.push(format!(
                "  {OVERLAY} is in no folder above {}, nor above this one: run it in a clone of the repository, \
                 from which the images are built",
                scenario.dir.display()
            ));
        }
        match (missing.is_empty(), repository) {
            (true, Some(repository)) => Ok(Self { kind, docker, kubectl, repository }),
            _ => Err(LabError::Missing(missing.join("\n"))),
        }
    }
}

/// Whether a scenario can be run on kind at all.
///
/// # Errors
/// With the steps that need the lab, and why each does.
pub fn fits(scenario: &Scenario) -> Result<()> {
    let mut reasons: Vec<String> = Vec::new();
    if scenario.encryption == Encryption::Off {
        reasons.push(
            "  encryption: off: on kind pods of different clusters meet through WireGuard alone".into(),
        );
    }
    if scenario.store == Store::Etcd {
        reasons.push(
            "  store: etcd: the installation of etcd takes cert-manager, which is not in the images".into(),
        );
    }
    let odd = |replicas| replicas != 1 && replicas != HIGHLY_AVAILABLE;
    if scenario.clusters.iter().any(|cluster| odd(cluster.replicas)) {
        reasons.push(format!("  replicas: one, or {HIGHLY_AVAILABLE} as in the installation"));
    }
    if scenario.peering == Peering::Files {
        reasons.push("  peering: files: the installation is for Secrets".into());
    }
    if !scenario.mesh {
        reasons.push("  mesh: false: `kind create cluster` alone makes such clusters".into());
    }
    reasons.extend(scenario.steps.iter().enumerate().filter_map(|(i, step)| {
        step.verb.needs_lab().map(|why| format!("  step {} ({}): {why}", i + 1, step.say))
    }));
    match reasons.is_empty() {
        true => Ok(()),
        false => Err(LabError::invalid(format!(
            "this scenario needs the lab (--on lab), for:\n{}",
            reasons.join("\n")
        ))),
    }
}

fn answers(docker: &Path) -> bool {
    let mut docker = Command::new(docker);
    docker.arg("info").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    docker.status().is_ok_and(|status| status.success())
}

/// The first folder above the scenario, or above the working directory, that has the overlay.
fn repository(scenario: &Path) -> Option<PathBuf> {
    let places = [scenario.canonicalize(), std::env::current_dir()];
    let above = |place: PathBuf| place.ancestors().map(Path::to_owned).collect::<Vec<_>>();
    places.into_iter().flatten().flat_map(above).find(|dir| dir.join(OVERLAY).is_dir())
}
