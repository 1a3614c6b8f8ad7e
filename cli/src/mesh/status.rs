//! `isthmus status` of clusters: what their Kubernetes APIs tell of Isthmus in them.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures::future::join_all;
use isthmus_crds::peer::PEER_SECRET_TYPE;
use isthmus_crds::{PeerRelation, names};
use k8s_openapi::api::apps::v1::DaemonSet;
use serde::Serialize;

use super::checks::Level;
use super::contexts::{Api, Contexts};
use super::error::{MeshError, Refusal};
use super::expiry::{self, CertificateStatus, Concern, Judge, Kept};
use super::facts::{self, Identity, Leader, Published, Workload};
use super::peers::{PeerStatus, peer_table};
use super::wait;
use crate::output::{age, json, note, signs, table};

/// How often clusters are asked while waiting.
const POLL: Duration = Duration::from_secs(1);

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
    /// Whether nothing failed. Warnings are no failure.
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
    /// As far as they may be looked at.
    certificates: Vec<CertificateStatus>,
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
    level: Level,
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
                let (problem, hint) = error.in_context();
                let problem = Problem { level: Level::Error, context: name.clone(), problem, hint };
                (ClusterStatus { context: name.clone(), ..ClusterStatus::default() }, vec![problem])
            }
        }));
        let (clusters, problems): (Vec<_>, Vec<_>) = asked.await.into_iter().unzip();
        let problems: Vec<Problem> = problems.into_iter().flatten().collect();
        Self { healthy: problems.iter().all(|problem| problem.level != Level::Error), clusters, problems }
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
    certificates: Kept,
    /// Secrets that nobody takes note of.
    mistyped: Vec<String>,
}

impl Answers {
    async fn ask(api: &Api) -> Self {
        let (published, apiserver, agents, leader, peers, certificates, mistyped) = tokio::join!(
            facts::published(api),
            facts::apiserver(api),
            agents(api),
            facts::leader(api),
            wait::peers(api),
            Kept::ask(api),
            facts::mistyped(api),
        );
        // Who may not list Secrets is told so about certificates.
        let mistyped = mistyped.unwrap_or_default();
        let peers = peers.map(|peers| peers.iter().map(|peer| PeerStatus::of(&api.context, peer)).collect());
        let (context, namespace) = (api.context.clone(), api.namespace.clone());
        let now = Utc::now();
        Self { context, namespace, now, published, apiserver, agents, leader, peers, certificates, mistyped }
    }

    fn judge(self) -> (ClusterStatus, Vec<Problem>) {
        let kubectl = format!("kubectl --context {} -n {}", self.context, self.namespace);
        let mut status = ClusterStatus { context: self.context.clone(), ..ClusterStatus::default() };
        let mut problems =
            Problems { context: self.context, namespace: self.namespace, kubectl, found: Vec::new() };
        let published =
            problems.answer(self.published).and_then(|published| problems.of_published(published));
        if let Some(identity) = &published {
            status.cluster = Some(identity.info.cluster.to_string());
            status.id = Some(identity.info.id.number());
            status.version = Some(identity.info.version.clone());
            status.ca_ends = identity.authorities.iter().map(|ca| ca.not_after).max();
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
        self.mistyped.iter().for_each(|name| problems.of_mistyped(name));
        status.certificates = problems.of_certificates(published.as_deref(), &self.certificates, self.now);
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
        self.found.push(Problem { level: Level::Error, context: self.context.clone(), problem, hint });
    }

    fn answer<T>(&mut self, answer: Result<T, Refusal>) -> Option<T> {
        answer.map_err(|refusal| self.add(refusal.problem(), refusal.advice())).ok()
    }

    fn logs(&self) -> String {
        format!("{} logs -l app.kubernetes.io/name={} --prefix", self.kubectl, names::APISERVER)
    }

    fn of_published(&mut self, published: Published) -> Option<Box<Identity>> {
        let map = format!("ConfigMap {}/{}", self.namespace, names::CLUSTER_INFO);
        match published {
            Published::Is(identity) => return Some(identity),
            Published::Broken(why) => self.add(format!("{map}: {why}"), self.logs()),
            Published::Missing => self.add(
                format!("there is no {map}"),
                "is Isthmus installed there, and has a clustermesh-apiserver led yet?".into(),
            ),
            Published::Unknown => {}
        }
        None
    }

    fn of_certificates(
        &mut self,
        published: Option<&Identity>,
        kept: &Kept,
        now: DateTime<Utc>,
    ) -> Vec<CertificateStatus> {
        let judge = Judge { context: &self.context, namespace: &self.namespace, now, published };
        let (certificates, concerns) = judge.judge(kept);
        let problem = |Concern { level, problem, hint }| Problem {
            level,
            context: self.context.clone(),
            problem,
            hint,
        };
        self.found.extend(concerns.into_iter().map(problem));
        certificates
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

    fn of_mistyped(&mut self, name: &str) {
        self.add(
            format!(
                "Secret {}/{name} is annotated as a peer's, and is not of type {PEER_SECRET_TYPE}: nobody takes note of it",
                self.namespace
            ),
            format!("a Secret's type cannot be changed: make it anew with --type {PEER_SECRET_TYPE}"),
        );
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
    let mut clusters =
        table(&["CONTEXT", "CLUSTER", "ID", "VERSION", "APISERVER", "LEADER", "NODE-AGENTS", "PEERS READY"]);
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
            readiness(&cluster.peers),
        ]);
    }
    say!("{clusters}\n");
    let peers: Vec<PeerStatus> = report.clusters.iter().flat_map(|cluster| cluster.peers.clone()).collect();
    if !peers.is_empty() {
        say!("{}\n", peer_table(&peers, false));
    }
    let mut certificates = table(&expiry::HEADER);
    for cluster in &report.clusters {
        let shown = expiry::worth_showing(&cluster.certificates);
        certificates.add_rows(shown.map(|certificate| certificate.row(&cluster.context)));
    }
    if !certificates.is_empty() {
        say!("{certificates}\n");
    }
    say!(
        "{}",
        match (report.healthy, report.problems.is_empty()) {
            (true, true) => "All is well.",
            (true, false) => "Well, but somebody should look at this:",
            (false, _) => "Not well:",
        }
    );
    let signs = signs();
    for (number, Problem { level, context, problem, hint }) in (1..).zip(&report.problems) {
        let sign = signs.sign((*level).into());
        say!("  {number}. {sign} {context}: {problem}\n     {} {hint}", signs.arrow());
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
            certificates: Kept::default(),
            mistyped: Vec::new(),
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
