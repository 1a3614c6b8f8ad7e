//! `isthmus status` of clusters: what their Kubernetes APIs tell of Isthmus in them.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use futures::future::join_all;
use isthmus_crds::{PeerRelation, names};
use k8s_openapi::api::apps::v1::DaemonSet;
use serde::Serialize;

use super::certificates::{Certificate, Validity, utc};
use super::contexts::{Api, Contexts};
use super::error::{MeshError, Refusal};
use super::facts::{self, Leader, Published, Workload};
use super::peers::{PeerStatus, peer_table};
use super::wait;
use crate::output::{age, json, note, table};

/// How often clusters are asked while waiting.
const POLL: Duration = Duration::from_secs(1);
/// A CA that ends within this time is a problem: peers have to be told of the next one before.
const SOON: TimeDelta = TimeDelta::days(14);

/// What is to be shown, and how.
pub(crate) struct Request {
    /// The contexts, in the order they are shown.
    pub(crate) names: Vec<String>,
    /// For how long to wait until all is well; not at all if there is none.
    pub(crate) wait: Option<Duration>,
    /// For programs.
    pub(crate) json: bool,
}

/// All clusters.
#[derive(Debug, Serialize)]
struct Report {
    healthy: bool,
    clusters: Vec<ClusterStatus>,
    problems: Vec<Problem>,
}

/// One cluster.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct ClusterStatus {
    context: String,
    cluster: Option<String>,
    id: Option<u16>,
    version: Option<String>,
    apiserver: Option<Replicas>,
    agents: Option<Replicas>,
    leader: Option<Leader>,
    /// When the last of the cluster's CAs ends.
    ca_ends: Option<DateTime<Utc>>,
    peers: Vec<PeerStatus>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Replicas {
    ready: i32,
    desired: i32,
}

/// Something that is not well, and where to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Problem {
    context: String,
    problem: String,
    hint: String,
}

/// Asks, prints, and says by the exit status whether all is well.
pub(crate) async fn run(contexts: &Contexts, request: &Request) -> Result<ExitCode, MeshError> {
    let begun = Instant::now();
    let mut told = None;
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    let report = loop {
        let report = Report::ask(contexts, &request.names).await;
        let over = request.wait.is_none_or(|within| begun.elapsed() >= within);
        if report.healthy || over {
            break report;
        }
        let news = (report.problems.len(), report.problems.first().cloned());
        if !request.json && told.as_ref() != Some(&news) {
            if let (count, Some(first)) = &news {
                let elapsed = begun.elapsed().as_secs_f64();
                note(&format!("{elapsed:>6.1}s  {count} not well yet; {}: {}", first.context, first.problem));
            }
            told = Some(news);
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            _ = &mut interrupted => break report,
        }
    };
    if request.json {
        json(&report)
    } else {
        print(&report)
    }
    Ok(if report.healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Report {
    async fn ask(contexts: &Contexts, names: &[String]) -> Self {
        let asked = join_all(names.iter().map(async |name| match contexts.open(name).await {
            Ok(api) => Answers::ask(&api).await.judge(),
            Err(error) => {
                let hint = "`kubectl config get-contexts` lists contexts".to_owned();
                let problem = Problem { context: name.clone(), problem: error.to_string(), hint };
                (ClusterStatus { context: name.clone(), ..ClusterStatus::default() }, vec![problem])
            }
        }));
        let (clusters, problems): (Vec<_>, Vec<_>) = asked.await.into_iter().unzip();
        let problems: Vec<Problem> = problems.into_iter().flatten().collect();
        Self { healthy: problems.is_empty(), clusters, problems }
    }
}

/// What a cluster's API answered.
struct Answers {
    context: String,
    namespace: String,
    now: DateTime<Utc>,
    published: Result<Published, Refusal>,
    apiserver: Result<Option<Workload>, Refusal>,
    agents: Result<Option<Replicas>, Refusal>,
    leader: Result<Option<Leader>, Refusal>,
    peers: Result<Vec<PeerStatus>, Refusal>,
}

impl Answers {
    async fn ask(api: &Api) -> Self {
        let (published, apiserver, agents, leader, peers) = tokio::join!(
            facts::published(api),
            facts::apiserver(api),
            agents(api),
            facts::leader(api),
            wait::peers(api),
        );
        let peers = peers.map(|peers| peers.iter().map(|peer| PeerStatus::of(&api.context, peer)).collect());
        let (context, namespace) = (api.context.clone(), api.namespace.clone());
        Self { context, namespace, now: Utc::now(), published, apiserver, agents, leader, peers }
    }

    fn judge(self) -> (ClusterStatus, Vec<Problem>) {
        let kubectl = format!("kubectl --context {} -n {}", self.context, self.namespace);
        let mut status = ClusterStatus { context: self.context.clone(), ..ClusterStatus::default() };
        let mut problems =
            Problems { context: self.context, namespace: self.namespace, kubectl, found: Vec::new() };
        if let Some(published) = problems.answer(self.published) {
            problems.of_published(&published, self.now, &mut status);
        }
        let leader = problems.answer(self.leader).flatten();
        if let Some(workload) = problems.answer(self.apiserver) {
            problems.of_apiserver(workload.as_ref(), leader.as_ref());
            status.apiserver = workload.map(|Workload { ready, desired, .. }| Replicas { ready, desired });
        }
        // Where Cilium's own agents run there are none of ours.
        if let Some(Some(replicas)) = problems.answer(self.agents) {
            problems.of_agents(replicas);
            status.agents = Some(replicas);
        }
        if let Some(leader) = leader {
            problems.of_leader(&leader);
            status.leader = Some(leader);
        }
        status.peers = problems.answer(self.peers).unwrap_or_default();
        for peer in status.peers.iter().filter(|peer| peer.is_unwell()) {
            let what = match peer.relation {
                PeerRelation::Connected => "is not Ready",
                PeerRelation::Admitted => "may not read from here, as it should",
            };
            problems.add(
                format!("peer {} {what}: {}", peer.peer, peer.message),
                troubleshoot(&peer.peer, &problems.context, &problems.namespace),
            );
        }
        // A cluster that does not answer would say so to every question.
        problems.found.dedup_by(|a, b| a.hint == b.hint && a.problem.ends_with(after_colon(&b.problem)));
        (status, problems.found)
    }
}

/// The command that looks for the cause in this cluster.
fn troubleshoot(peer: &str, context: &str, namespace: &str) -> String {
    let elsewhere = match namespace {
        names::DEFAULT_NAMESPACE => String::new(),
        other => format!(" --namespace {other}"),
    };
    format!("isthmus troubleshoot {peer} --context {context}{elsewhere}")
}

fn after_colon(problem: &str) -> &str {
    problem.split_once(": ").map_or(problem, |(_, why)| why)
}

struct Problems {
    context: String,
    namespace: String,
    /// How commands about this namespace begin.
    kubectl: String,
    found: Vec<Problem>,
}

impl Problems {
    fn add(&mut self, problem: String, hint: String) {
        self.found.push(Problem { context: self.context.clone(), problem, hint });
    }

    fn answer<T>(&mut self, answer: Result<T, Refusal>) -> Option<T> {
        answer.map_err(|refusal| self.add(refusal.problem(), refusal.advice())).ok()
    }

    fn logs(&self) -> String {
        format!("{} logs -l app.kubernetes.io/name={} --prefix", self.kubectl, names::APISERVER)
    }

    fn of_published(&mut self, published: &Published, now: DateTime<Utc>, status: &mut ClusterStatus) {
        let map = format!("ConfigMap {}/{}", self.namespace, names::CLUSTER_INFO);
        match published {
            Published::Is(identity) => {
                status.cluster = Some(identity.info.cluster.to_string());
                status.id = Some(identity.info.id.number());
                status.version = Some(identity.info.version.clone());
                if let Some(last) = identity.authorities.iter().max_by_key(|ca| ca.not_after) {
                    status.ca_ends = Some(last.not_after);
                    self.of_authority(last, now);
                }
            }
            Published::Broken(why) => self.add(format!("{map}: {why}"), self.logs()),
            Published::Missing => self.add(
                format!("there is no {map}"),
                "is Isthmus installed there, and has a clustermesh-apiserver led yet?".into(),
            ),
            Published::Unknown => {}
        }
    }

    fn of_authority(&mut self, last: &Certificate, now: DateTime<Utc>) {
        let rotate = format!("isthmus rotate-ca --context {}", self.context);
        match last.at(now) {
            Validity::Over => {
                self.add(format!("the CA ({last}) has expired: it is {} here", utc(now)), rotate)
            }
            Validity::NotYet => self.add(
                format!("the CA ({last}) is not valid yet: it is {} here", utc(now)),
                "compare the clocks".into(),
            ),
            Validity::Valid if last.not_after - now < SOON => {
                self.add(format!("the CA ends on {}", utc(last.not_after)), rotate);
            }
            Validity::Valid => {}
        }
    }

    fn of_apiserver(&mut self, workload: Option<&Workload>, leader: Option<&Leader>) {
        match workload {
            Some(Workload { kind, ready, desired }) if ready < desired => self.add(
                format!("{kind} {}: {ready} of {desired} replicas are ready", names::APISERVER),
                format!("{} get pods", self.kubectl),
            ),
            Some(_) => {}
            // It runs, somewhere.
            None if leader.is_some_and(Leader::is_there) => {}
            None => self.add(
                format!("there is no Deployment or StatefulSet {}/{}", self.namespace, names::APISERVER),
                "install it, with a name and an id for the cluster (kustomize/README.md shows the overlay to write); or \
                 give --namespace"
                    .into(),
            ),
        }
    }

    fn of_agents(&mut self, Replicas { ready, desired }: Replicas) {
        if ready < desired {
            self.add(
                format!("DaemonSet {}: {ready} of {desired} node-agents are ready", names::NODE_AGENT),
                format!("{} get pods -o wide", self.kubectl),
            );
        }
    }

    fn of_leader(&mut self, leader: &Leader) {
        if !leader.is_there() {
            self.add(
                format!(
                    "no clustermesh-apiserver leads: {} has not renewed Lease {} for {}",
                    leader.holder,
                    names::LEASE,
                    age(Some(leader.renewed_seconds))
                ),
                self.logs(),
            );
        }
    }
}

async fn agents(api: &Api) -> Result<Option<Replicas>, Refusal> {
    let name = names::NODE_AGENT;
    let found = api.namespaced::<DaemonSet>().get_opt(name).await;
    let found =
        found.map_err(|error| api.refused(format!("read DaemonSet {}/{name}", api.namespace), error))?;
    Ok(found.map(|found| {
        let status = found.status.unwrap_or_default();
        Replicas { ready: status.number_ready, desired: status.desired_number_scheduled }
    }))
}

fn print(report: &Report) {
    let mut clusters = table(&[
        "CONTEXT",
        "CLUSTER",
        "ID",
        "VERSION",
        "APISERVER",
        "LEADER",
        "NODE-AGENTS",
        "CA ENDS",
        "PEERS READY",
    ]);
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let replicas =
        |replicas: Option<Replicas>| or_dash(replicas.map(|r| format!("{}/{}", r.ready, r.desired)));
    for cluster in &report.clusters {
        clusters.add_row([
            cluster.context.clone(),
            or_dash(cluster.cluster.clone()),
            or_dash(cluster.id.map(|id| id.to_string())),
            or_dash(cluster.version.clone()),
            replicas(cluster.apiserver),
            or_dash(cluster.leader.as_ref().map(|leader| leader.holder.clone())),
            replicas(cluster.agents),
            or_dash(cluster.ca_ends.map(|end| end.format("%Y-%m-%d").to_string())),
            readiness(&cluster.peers),
        ]);
    }
    say!("{clusters}\n");
    let peers: Vec<PeerStatus> = report.clusters.iter().flat_map(|cluster| cluster.peers.clone()).collect();
    if !peers.is_empty() {
        say!("{}\n", peer_table(&peers, false));
    }
    if report.problems.is_empty() {
        say!("All is well.");
        return;
    }
    say!("Not well:");
    for (number, Problem { context, problem, hint }) in (1..).zip(&report.problems) {
        say!("  {number}. {context}: {problem}\n     → {hint}");
    }
}

/// How many of the peers that are read from are ready; and how many may only read, if there are any.
fn readiness(peers: &[PeerStatus]) -> String {
    let (read, admitted): (Vec<_>, Vec<_>) =
        peers.iter().partition(|peer| peer.relation == PeerRelation::Connected);
    let ready = read.iter().filter(|peer| !peer.is_unwell()).count();
    let of_read = format!("{ready}/{}", read.len());
    if admitted.is_empty() { of_read } else { format!("{of_read}, {} admitted", admitted.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well() -> Answers {
        Answers {
            context: "kind-alpha".into(),
            namespace: "isthmus-system".into(),
            now: Utc::now(),
            published: Ok(Published::Unknown),
            apiserver: Ok(Some(Workload { kind: "Deployment", desired: 3, ready: 3 })),
            agents: Ok(Some(Replicas { ready: 2, desired: 2 })),
            leader: Ok(Some(Leader { holder: "a".into(), renewed_seconds: 2.0, lease_seconds: 15 })),
            peers: Ok(Vec::new()),
        }
    }

    fn problems(answers: Answers) -> Vec<String> {
        answers.judge().1.into_iter().map(|problem| problem.problem).collect()
    }

    #[test]
    fn where_to_go_on_is_a_command_for_that_cluster() {
        let peer = serde_json::from_value(serde_json::json!({
            "apiVersion": "isthmus.io/v1alpha1", "kind": "ClusterPeer",
            "metadata": {"name": "beta"}, "spec": {"source": "Secret"},
        }));
        let peer = PeerStatus::of("kind-alpha", &peer.expect("a ClusterPeer"));
        let hint = |namespace: &str| {
            let answers = Answers { peers: Ok(vec![peer.clone()]), namespace: namespace.into(), ..well() };
            answers.judge().1.into_iter().map(|problem| problem.hint).collect::<Vec<_>>()
        };
        assert_eq!(hint("isthmus-system"), ["isthmus troubleshoot beta --context kind-alpha"]);
        assert_eq!(hint("mesh"), ["isthmus troubleshoot beta --context kind-alpha --namespace mesh"]);
    }

    #[test]
    fn each_part_that_is_not_well_is_a_problem() {
        assert_eq!(problems(well()), Vec::<String>::new());
        let one_is_not_ready = Ok(Some(Workload { kind: "StatefulSet", desired: 3, ready: 2 }));
        assert_eq!(
            problems(Answers { apiserver: one_is_not_ready, ..well() }),
            ["StatefulSet clustermesh-apiserver: 2 of 3 replicas are ready"]
        );
        assert_eq!(
            problems(Answers { agents: Ok(Some(Replicas { ready: 0, desired: 2 })), ..well() }),
            ["DaemonSet isthmus-node-agent: 0 of 2 node-agents are ready"]
        );
        let late = Leader { holder: "pod-a".into(), renewed_seconds: 61.0, lease_seconds: 15 };
        assert_eq!(
            problems(Answers { leader: Ok(Some(late)), ..well() }),
            [
                "no clustermesh-apiserver leads: pod-a has not renewed Lease isthmus-clustermesh-apiserver for 61s"
            ]
        );
        let installed_nowhere =
            Answers { published: Ok(Published::Missing), apiserver: Ok(None), leader: Ok(None), ..well() };
        let missing = problems(installed_nowhere);
        assert_eq!(missing.len(), 2, "{missing:?}");
        assert_eq!(
            problems(Answers { apiserver: Ok(None), ..well() }),
            Vec::<String>::new(),
            "it runs elsewhere"
        );
        assert_eq!(
            problems(Answers { agents: Ok(None), ..well() }),
            Vec::<String>::new(),
            "Cilium's may run"
        );
    }
}
