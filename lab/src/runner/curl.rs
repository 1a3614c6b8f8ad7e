//! One request: plain `curl` in a pod, to a Service's ClusterIP.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::error::{LabError, Result};
use crate::images::Answer;
use crate::platform::{Platform, RunningPod};
use crate::report::Tally;
use crate::scenario::{Family, PodRef, Target};

/// A service address as seen from one pod.
#[derive(Clone)]
pub(super) struct Curl {
    pod: RunningPod,
    url: String,
    word: Option<String>,
}

/// A request ends after this long at the latest.
const DEADLINE: Duration = Duration::from_secs(5);

impl Curl {
    /// Looks up the pod and the service's ClusterIP.
    pub(super) async fn new(platform: Platform<'_>, target: &Target) -> Result<Self> {
        let PodRef { cluster, namespace, .. } = &target.from;
        let pod = platform.pod(&target.from).await?;
        let addresses = platform.cluster_ips(cluster, namespace, &target.service).await?;
        let address = addresses.into_iter().find(|a| match target.family {
            None => true,
            Some(Family::Ipv4) => a.is_ipv4(),
            Some(Family::Ipv6) => a.is_ipv6(),
        });
        let address = address.ok_or_else(|| {
            LabError::invalid(format!("service {} in {cluster} has no such ClusterIP", target.service))
        })?;
        let host = std::net::SocketAddr::new(address, target.port);
        Ok(Self { pod, url: format!("http://{host}/"), word: None })
    }

    /// From now on a header of each request says this.
    pub(super) fn saying(mut self, word: &str) -> Self {
        self.word = Some(format!("X-Isthmus-Lab: {word}"));
        self
    }

    /// The client.
    pub(super) fn pod(&self) -> &RunningPod {
        &self.pod
    }

    /// The node on which the client is.
    pub(super) fn node(&self) -> &str {
        self.pod.node()
    }

    /// Sends one. The error says how it failed.
    pub(super) async fn ask(&self) -> Result<Answer, String> {
        let seconds = DEADLINE.as_secs().to_string();
        let mut command = vec![
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--noproxy",
            "*",
            "--max-time",
            &seconds,
            &self.url,
        ];
        command.extend(self.word.iter().flat_map(|word| ["--header", word.as_str()]));
        let command: Vec<String> = command.into_iter().map(str::to_owned).collect();
        let output = self.pod.output(&command, DEADLINE * 2).await.map_err(|e| e.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|e| {
            format!(
                "the answer is not one of isthmus.io/echo's ({e}): {}",
                String::from_utf8_lossy(&output.stdout)
            )
        })
    }
}

impl Tally {
    /// Counts one more.
    pub(super) fn add(&mut self, outcome: &Result<Answer, String>) {
        match outcome {
            Ok(answer) => {
                *self.answers.entry(answer.cluster.clone()).or_default() += 1;
                *self.pods.entry(answer.pod.clone()).or_default() += 1;
            }
            Err(failure) => {
                self.failed += 1;
                self.first_failure.get_or_insert_with(|| failure.clone());
            }
        }
    }

    /// Whether exactly these clusters answered, and nothing failed; nobody is expected: everything failed.
    pub(super) fn check(&self, expected: &BTreeSet<String>) -> Result<(), String> {
        let found: BTreeSet<String> = self.answers.keys().cloned().collect();
        if expected.is_empty() {
            return match self.answers.is_empty() {
                true => Ok(()),
                false => Err(format!("nobody should answer, but {} did", list(&found))),
            };
        }
        if self.failed > 0 {
            let first = self.first_failure.as_deref().unwrap_or_default();
            return Err(format!("{} requests failed, the first with: {first}", self.failed));
        }
        match found == *expected {
            true => Ok(()),
            false => Err(format!("{} should answer, but {} did", list(expected), list(&found))),
        }
    }
}

pub(super) fn list(clusters: &BTreeSet<String>) -> String {
    match clusters.len() {
        0 => "nobody".into(),
        _ => clusters.iter().map(String::as_str).collect::<Vec<_>>().join(" and "),
    }
}
