//! What a scenario needs to run on kind: said all at once, before anything is made.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::config::HIGHLY_AVAILABLE;
use super::daemon;
use crate::error::{LabError, Result};
use crate::programs;
use crate::scenario::{Scenario, Verb};
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
        if docker.is_file() && this_machine(scenario) {
            missing.extend(apart(&docker));
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
        let (Verb::Kill(named) | Verb::Pause(named) | Verb::Resume(named) | Verb::Restart(named)) =
            &step.verb
        else {
            return None;
        };
        let why = daemon::read(named, &scenario.clusters).err()?;
        Some(format!("  step {} ({}): {why}", i + 1, step.say))
    }));
    match reasons.is_empty() {
        true => Ok(()),
        false => Err(LabError::invalid(format!(
            "this scenario needs the lab (--on lab), for:\n{}",
            reasons.join("\n")
        ))),
    }
}

/// Whether a scenario has steps for which the machine that runs them must be the one that the nodes are on, and its root the
/// one who runs them.
pub(super) fn this_machine(scenario: &Scenario) -> bool {
    scenario.steps.iter().any(|step| matches!(step.verb, Verb::Capture(_) | Verb::Forge(_)))
}

/// What keeps this process apart from the nodes' network namespaces: a line for each thing.
fn apart(docker: &Path) -> Vec<String> {
    let asked = |args: &[&str]| {
        let mut docker = Command::new(docker);
        let output = docker.args(args).stdin(Stdio::null()).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    };
    let place = Place {
        root: nix::unistd::geteuid().is_root(),
        endpoint: asked(&["context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]),
        system: asked(&["info", "--format", "{{.OperatingSystem}} {{.SecurityOptions}}"]),
    };
    place.apart()
}

/// Where this process is, and where Docker.
struct Place {
    root: bool,
    /// Where the Docker daemon listens.
    endpoint: String,
    /// What it says of the system that it runs on, and of how it is kept apart from it.
    system: String,
}

impl Place {
    fn apart(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.root {
            lines.push(format!("  {TAPS}, which takes root: run it with sudo"));
        }
        if !self.endpoint.starts_with("unix://") {
            lines.push(format!(
                "  {TAPS}, so Docker must run on this machine: docker says that it is at {}. Run it there, or unset DOCKER_HOST \
                 and DOCKER_CONTEXT",
                self.endpoint
            ));
        }
        for (word, what) in
            [("Docker Desktop", "a virtual machine (Docker Desktop)"), ("name=rootless", "rootless Docker")]
        {
            if self.system.contains(word) {
                lines.push(format!(
                    "  {TAPS}, and those of {what} are out of reach: install docker.io, or use --on lab"
                ));
            }
        }
        lines
    }
}

const TAPS: &str = "this scenario's steps capture and forge enter the nodes' network namespaces";

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_of_the_repository_that_begins_encrypted_can_be_run_on_kind() {
        let scenarios = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kind-scenarios");
        let folders = std::fs::read_dir(scenarios).unwrap().flatten().map(|entry| entry.path());
        let folders: Vec<PathBuf> =
            folders.filter(|path| path.join(crate::scenario::FILE).exists()).collect();
        assert!(!folders.is_empty());
        for folder in folders {
            let scenario = Scenario::load(&folder).unwrap();
            if folder.ends_with("one-way") {
                let reason = fits(&scenario).expect_err("nothing crosses in the clear").to_string();
                assert!(reason.lines().count() == 2 && reason.contains("encryption: off"), "{reason}");
                continue;
            }
            fits(&scenario).unwrap();
            let taps = folder.ends_with("encryption");
            assert_eq!(this_machine(&scenario), taps, "{}", folder.display());
        }
    }

    fn place(root: bool, endpoint: &str, system: &str) -> String {
        Place { root, endpoint: endpoint.into(), system: system.into() }.apart().join("\n")
    }

    #[test]
    fn whoever_taps_is_root_on_the_machine_that_docker_runs_on() {
        let (here, debian) =
            ("unix:///var/run/docker.sock", "Debian GNU/Linux 12 [name=seccomp,profile=builtin]");
        assert_eq!(place(true, here, debian), "");
        assert!(place(false, here, debian).contains("takes root"));
        assert!(place(true, "ssh://me@elsewhere", debian).contains("ssh://me@elsewhere"));
        assert!(place(true, "tcp://10.0.0.1:2376", debian).contains("DOCKER_HOST"));
        let desktop = "unix:///home/me/.docker/desktop/docker.sock";
        assert!(place(true, desktop, "Docker Desktop [name=seccomp]").contains("virtual machine"));
        let rootless = "unix:///run/user/1000/docker.sock";
        assert!(
            place(true, rootless, "Debian GNU/Linux 12 [name=seccomp name=rootless]").contains("rootless")
        );
    }
}
