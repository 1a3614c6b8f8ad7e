//! `kubectl` as a person would type it, against one context of a kubeconfig.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

use crate::command;
use crate::error::{Doing, Result};
use crate::rbac::FIELD_MANAGER;

/// Longest time one call may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// One cluster, as `kubectl` reaches it.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    context: String,
}

/// Which metadata is set.
#[derive(Debug, Clone, Copy)]
pub enum Metadata {
    /// `kubectl annotate`.
    Annotations,
    /// `kubectl label`.
    Labels,
}

impl Kubectl {
    /// Of this context.
    pub fn new(
        program: impl Into<PathBuf>,
        kubeconfig: impl Into<PathBuf>,
        context: impl Into<String>,
    ) -> Self {
        Self { program: program.into(), kubeconfig: kubeconfig.into(), context: context.into() }
    }

    /// Applies manifests, YAML or JSON, server-side.
    ///
    /// # Errors
    /// When the API refuses one.
    pub async fn apply(&self, manifests: &str) -> Result<()> {
        self.ask(&[&APPLY[..], &["--filename", "-"]].concat(), Some(manifests)).await.map(drop)
    }

    /// Applies what a kustomization renders to.
    ///
    /// # Errors
    /// When it does not render, or the API refuses an object.
    pub async fn apply_kustomization(&self, dir: &str) -> Result<()> {
        self.ask(&[&APPLY[..], &["--kustomize", dir]].concat(), None).await.map(drop)
    }

    /// Sets annotations or labels of `kind/name`; `None` takes one away.
    ///
    /// # Errors
    /// When there is no such object.
    pub async fn set(
        &self,
        what: Metadata,
        object: &str,
        namespace: &str,
        set: &BTreeMap<String, Option<String>>,
    ) -> Result<()> {
        let verb = match what {
            Metadata::Annotations => "annotate",
            Metadata::Labels => "label",
        };
        let pairs: Vec<String> = set
            .iter()
            .map(|(key, value)| match value {
                Some(value) => format!("{key}={value}"),
                None => format!("{key}-"),
            })
            .collect();
        let mut args = vec![verb, "--namespace", namespace, "--overwrite", object];
        args.extend(pairs.iter().map(String::as_str));
        self.ask(&args, None).await.map(drop)
    }

    /// Scales a Deployment.
    ///
    /// # Errors
    /// When there is none of this name.
    pub async fn scale(&self, deployment: &str, namespace: &str, replicas: u16) -> Result<()> {
        let (object, replicas) = (format!("deployment/{deployment}"), format!("--replicas={replicas}"));
        self.ask(&["scale", "--namespace", namespace, &object, &replicas], None).await.map(drop)
    }

    /// Deletes `kind/name`, and does not wait until it is gone.
    ///
    /// # Errors
    /// When there is no such object.
    pub async fn delete(&self, object: &str, namespace: &str) -> Result<()> {
        self.ask(&["delete", "--namespace", namespace, "--wait=false", object], None).await.map(drop)
    }

    /// Reads `kind/name`, if it is there.
    ///
    /// # Errors
    /// When the API cannot be asked.
    pub async fn get(&self, object: &str, namespace: &str) -> Result<Option<Value>> {
        let args = ["get", "--namespace", namespace, "--ignore-not-found", "--output", "json", object];
        let answer = self.ask(&args, None).await?;
        if answer.trim().is_empty() {
            return Ok(None);
        }
        let read = serde_json::from_str(&answer).map_err(std::io::Error::from);
        read.map(Some).doing(|| format!("reading {object} of {}", self.context))
    }

    /// Reads all objects of a kind, of one namespace, that `selector` (`--selector=...` or `--field-selector=...`) picks.
    ///
    /// # Errors
    /// When the API cannot be asked.
    pub async fn list(&self, kind: &str, namespace: &str, selector: &str) -> Result<Vec<Value>> {
        let args = ["get", "--namespace", namespace, "--output", "json", selector, kind];
        let answer = self.ask(&args, None).await?;
        let mut list: Value = serde_json::from_str(&answer)
            .map_err(std::io::Error::from)
            .doing(|| format!("reading {kind} of {}", self.context))?;
        Ok(match list["items"].take() {
            Value::Array(items) => items,
            _ => Vec::new(),
        })
    }

    /// Waits until a workload (`deployment/name`, `daemonset/name`) runs as it is described.
    ///
    /// # Errors
    /// When it does not in time.
    pub async fn rolled_out(&self, workload: &str, namespace: &str, within: Duration) -> Result<()> {
        let timeout = format!("--timeout={}s", within.as_secs());
        let args = ["rollout", "status", "--namespace", namespace, &timeout, workload];
        self.within(&args, None, within + DEADLINE).await.map(drop)
    }

    /// A command in a pod, not started yet.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[String]) -> Command {
        let mut kubectl = self.command();
        kubectl.args(["exec", "--namespace", namespace, pod, "--"]).args(command);
        kubectl
    }

    /// What a pod wrote last.
    ///
    /// # Errors
    /// When the API cannot be asked.
    pub async fn logs(&self, selector: &str, namespace: &str, lines: usize) -> Result<String> {
        let tail = format!("--tail={lines}");
        self.ask(&["logs", "--namespace", namespace, "--selector", selector, &tail], None).await
    }

    /// Calls it and returns what it printed.
    ///
    /// # Errors
    /// When it fails: with what it printed to standard error.
    pub async fn ask(&self, args: &[&str], input: Option<&str>) -> Result<String> {
        self.within(args, input, DEADLINE).await
    }

    async fn within(&self, args: &[&str], input: Option<&str>, deadline: Duration) -> Result<String> {
        let mut command = self.command();
        command.args(args);
        command::output(command, input, deadline).await
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(["--context", &self.context]);
        command
    }
}

/// As the lab itself applies: what the scenario says, whoever else says something about it.
const APPLY: [&str; 5] = ["apply", "--server-side", "--force-conflicts", "--field-manager", FIELD_MANAGER];
