//! The step that node-agents take: whether nodes reach each other's WireGuard devices.

use clustermesh_apiserver::troubleshoot::{
    Circumstances, Fault, Outcome, PeerReport, Report, Source, Step, StepReport,
};
use isthmus_node_agent::encryption::ReachReport;
use isthmus_node_agent::encryption::reach::{NodeReach, Reach};

/// The most pairs of nodes that are told one by one: a mesh has as many as its nodes squared.
const MOST: usize = 20;

/// A node-agent that could not be asked.
#[derive(Debug)]
pub(super) struct Silent {
    /// Its cluster, if that is known.
    pub(super) cluster: Option<String>,
    pub(super) name: String,
    pub(super) reason: String,
}

/// What came of asking node-agents.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) reached: &'a [ReachReport],
    pub(super) silent: &'a [Silent],
    /// Those that were not asked, since there are many.
    pub(super) left_out: usize,
}

/// Adds to a cluster's report what its nodes say about those of each peer and, with `own`, of the cluster itself.
pub(super) fn add(report: &mut Report, asked: Asked<'_>, namespace: &str, own: bool) {
    let Asked { reached, silent, left_out } = asked;
    let of_cluster: Vec<&ReachReport> =
        reached.iter().filter(|reached| reached.cluster == report.cluster).collect();
    let silent: Vec<&Silent> = silent
        .iter()
        .filter(|silent| silent.cluster.as_ref().is_none_or(|cluster| *cluster == report.cluster))
        .collect();
    let circumstances = |peer: &str| Circumstances {
        own: report.cluster.clone(),
        peer: peer.to_owned(),
        source: Source::Secret { namespace: namespace.to_owned(), name: format!("peer-{peer}") },
        namespace: namespace.to_owned(),
        common_name: None,
    };
    let steps: Vec<StepReport> = report
        .peers
        .iter()
        .map(|peer| judge(&of_cluster, &silent, &peer.name, &circumstances(&peer.name)))
        .collect();
    let among_themselves = judge(&of_cluster, &[], &report.cluster, &circumstances(&report.cluster));
    for (peer, mut step) in report.peers.iter_mut().zip(steps) {
        if left_out > 0 && step.outcome != Outcome::Skipped {
            step.seen.push(format!("{left_out} node-agents were not asked, for there are many"));
        }
        peer.steps.push(step);
    }
    if own && among_themselves.outcome != Outcome::Skipped {
        report.peers.push(PeerReport {
            name: report.cluster.clone(),
            source: "its own nodes".to_owned(),
            steps: vec![among_themselves],
        });
    }
}

/// What the agents' answers mean for one peer.
fn judge(reached: &[&ReachReport], silent: &[&Silent], peer: &str, of: &Circumstances) -> StepReport {
    let mut faults: Vec<Fault> = silent
        .iter()
        .map(|silent| Fault::AgentSilent { agent: silent.name.clone(), reason: silent.reason.clone() })
        .collect();
    let enabled: Vec<&&ReachReport> = reached.iter().filter(|reached| reached.enabled).collect();
    if enabled.is_empty() && faults.is_empty() {
        let reason = match reached {
            [] => "no node-agent was asked",
            _ => "traffic between nodes is not encrypted",
        };
        return StepReport::skipped(Step::Wireguard, reason);
    }
    let (mut pairs, mut sessions, mut answered, mut not_asked) = (0, 0, 0, 0);
    for report in enabled {
        let node = &report.node;
        if let Some(problem) = &report.problem {
            faults.push(Fault::Encryption { node: node.clone(), problem: problem.clone() });
            continue;
        }
        if !report.published {
            faults.push(Fault::KeyUnpublished { node: node.clone() });
        }
        for other in report.nodes.iter().filter(|other| other.cluster == peer) {
            pairs += 1;
            match other.reach {
                Reach::Session => sessions += 1,
                Reach::Answered => answered += 1,
                Reach::NotAsked => not_asked += 1,
                Reach::Silent | Reach::KeyMissing | Reach::KeyRefused => faults.push(fault(report, other)),
            }
        }
    }
    if pairs == 0 && faults.is_empty() {
        return StepReport::skipped(Step::Wireguard, "no nodes of that cluster are known");
    }
    let mut seen = vec![format!(
        "{} of {pairs} pairs of nodes reach each other: {sessions} have a session, {answered} answered just now",
        sessions + answered
    )];
    if not_asked > 0 {
        seen.push(format!("{not_asked} pairs without a session were not asked, for there are many"));
    }
    if faults.len() > MOST {
        seen.push(format!("{} things are not right; the first {MOST} are told", faults.len()));
        faults.truncate(MOST);
    }
    StepReport::new(Step::Wireguard, seen, faults.iter().map(|fault| fault.finding(of)).collect())
}

fn fault(report: &ReachReport, other: &NodeReach) -> Fault {
    let (node, of) = (report.node.clone(), other.node.clone());
    match other.reach {
        Reach::KeyMissing => Fault::KeyMissing { node, of, strict: report.strict },
        Reach::KeyRefused => {
            let reason = other.reason.clone().unwrap_or_else(|| "unknown".to_owned());
            Fault::KeyRefused { node, of, reason }
        }
        _ => Fault::Unanswered {
            node,
            of,
            endpoint: other.endpoint.clone(),
            last: other.last_handshake_seconds,
            waited: report.waited_seconds,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let beta = PeerReport { name: "beta".into(), source: String::new(), steps: Vec::new() };
        Report {
            cluster: "alpha".into(),
            origin: clustermesh_apiserver::troubleshoot::Origin::Apiserver,
            taken: chrono::DateTime::from_timestamp(0, 0).unwrap(),
            peers: vec![beta],
        }
    }

    fn node(cluster: &str, name: &str, reach: Reach) -> NodeReach {
        NodeReach {
            cluster: cluster.into(),
            node: name.into(),
            endpoint: Some("192.0.2.2:51871".into()),
            reach,
            last_handshake_seconds: None,
            reason: None,
        }
    }

    fn reached(nodes: Vec<NodeReach>) -> ReachReport {
        ReachReport {
            cluster: "alpha".into(),
            node: "a1".into(),
            enabled: true,
            published: true,
            waited_seconds: 6.0,
            nodes,
            ..ReachReport::default()
        }
    }

    #[test]
    fn each_pair_counts_for_the_cluster_that_its_other_node_is_of() {
        let mut report = report();
        let nodes = vec![
            node("alpha", "a2", Reach::Session),
            node("beta", "b1", Reach::Answered),
            node("beta", "b2", Reach::Silent),
            node("beta", "b3", Reach::KeyMissing),
            node("gamma", "c1", Reach::Silent),
        ];
        let asked = Asked { reached: &[reached(nodes)], silent: &[], left_out: 7 };
        add(&mut report, asked, "isthmus-system", true);
        let beta = report.peers[0].step(Step::Wireguard).unwrap();
        let kinds: Vec<_> = beta.findings.iter().map(|finding| finding.kind.as_str()).collect();
        assert_eq!(kinds, ["wireguard-unreachable", "wireguard-key-missing"]);
        assert!(beta.seen[0].starts_with("1 of 3 pairs"), "{beta:?}");
        assert!(beta.seen[1].starts_with("7 node-agents were not asked"), "{beta:?}");
        assert!(beta.findings[0].next.command.contains("host 192.0.2.2 and udp port 51871"));
        assert_eq!(beta.findings[1].next.cluster, "beta");
        let severities = [beta.findings[0].severity, beta.findings[1].severity];
        assert_eq!(severities, [Outcome::Failed, Outcome::Warning], "it goes on in the clear");
        assert_eq!((report.peers[1].name.as_str(), report.peers[1].outcome()), ("alpha", Outcome::Passed));
    }

    #[test]
    fn where_nothing_is_encrypted_there_is_nothing_to_reach() {
        let mut report = report();
        let off = ReachReport { enabled: false, ..reached(Vec::new()) };
        add(&mut report, Asked { reached: &[off], silent: &[], left_out: 0 }, "isthmus-system", true);
        assert_eq!(report.peers[0].step(Step::Wireguard).unwrap().outcome, Outcome::Skipped);
        assert_eq!(report.peers.len(), 1);
    }

    #[test]
    fn an_agent_that_does_not_answer_is_to_be_looked_at() {
        let mut report = report();
        let silent = Silent { cluster: None, name: "a1".into(), reason: "no answer".into() };
        add(&mut report, Asked { reached: &[], silent: &[silent], left_out: 0 }, "isthmus-system", false);
        assert_eq!(report.peers[0].outcome(), Outcome::Warning);
    }
}
