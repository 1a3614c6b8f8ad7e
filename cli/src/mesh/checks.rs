//! What speaks against connecting clusters: facts in, findings out. All of them, so that they can be mended at once.

mod versions;

use chrono::TimeDelta;
use clustermesh_apiserver::troubleshoot::Outcome;
use isthmus_crds::{ClusterPeer, names};
use kube::ResourceExt;
use serde::Serialize;

use super::certificates::{Validity, utc};
use super::facts::{Clock, Facts, Identity, Leader, Published, ServiceRanges};

/// Clocks that differ by less than this are told of nowhere: the API servers' are known to the second.
const CLOCKS: TimeDelta = TimeDelta::seconds(10);
/// A CA that ends within this time is worth a word.
const SOON: TimeDelta = TimeDelta::days(30);

/// Something that is not as it should be, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// How bad it is.
    pub(crate) level: Level,
    /// The clusters it is about.
    pub(crate) contexts: Vec<String>,
    /// What is wrong, with the object's name.
    pub(crate) problem: String,
    /// What to do.
    pub(crate) advice: String,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// It will not work; nothing is written.
    Error,
    /// It may not work, or could not be checked.
    Warning,
}

impl From<Level> for Outcome {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => Self::Failed,
            Level::Warning => Self::Warning,
        }
    }
}

/// What the user takes upon themselves.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Allowances {
    /// Service ranges may overlap: their addresses are translated in the cluster of the client and never leave it.
    pub(crate) overlapping_services: bool,
}

impl Finding {
    pub(crate) fn error(contexts: &[&str], problem: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Level::Error, contexts, problem, advice)
    }

    pub(crate) fn warning(contexts: &[&str], problem: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Level::Warning, contexts, problem, advice)
    }

    fn new(level: Level, contexts: &[&str], problem: impl Into<String>, advice: impl Into<String>) -> Self {
        let contexts = contexts.iter().map(|context| (*context).to_owned()).collect();
        Self { level, contexts, problem: problem.into(), advice: advice.into() }
    }

    pub(crate) fn is_error(&self) -> bool {
        self.level == Level::Error
    }
}

/// What speaks against a cluster taking part in any mesh.
pub(crate) fn of_cluster(facts: &Facts) -> Vec<Finding> {
    let context = &[facts.context.as_str()];
    let map = format!("ConfigMap {}/{}", facts.namespace, names::CLUSTER_INFO);
    let mut findings: Vec<Finding> = Vec::new();
    for refusal in &facts.unread {
        // Without this one nothing can be done; without the others something remains unchecked.
        let level = if matches!(facts.info, Published::Unknown) && refusal.problem().contains(&map) {
            Level::Error
        } else {
            Level::Warning
        };
        findings.push(Finding::new(level, context, refusal.problem(), refusal.advice()));
    }
    match &facts.info {
        Published::Is(identity) => findings.extend(of_identity(facts, identity)),
        Published::Broken(why) => findings.push(Finding::error(
            context,
            format!("{map}: {why}"),
            "the leading clustermesh-apiserver writes it: see its log, and ConfigMap isthmus-config",
        )),
        Published::Missing if facts.apiserver.is_none() => findings.push(Finding::error(
            context,
            format!(
                "Isthmus is not installed: there is no {map}, and no Deployment or StatefulSet {} beside it",
                names::APISERVER
            ),
            "install it, with a name and an id for the cluster (kustomize/README.md shows the overlay to write); or give \
             --namespace",
        )),
        Published::Missing => findings.push(Finding::error(
            context,
            format!("{map} is not there: no clustermesh-apiserver has led yet, or its cluster has no name and id"),
            format!(
                "set cluster-name and cluster-id in ConfigMap {0}/{1}; then `kubectl --context {2} -n {0} logs -l \
                 app.kubernetes.io/name=clustermesh-apiserver` says more",
                facts.namespace,
                names::CONFIG,
                facts.context
            ),
        )),
        Published::Unknown => {}
    }
    match &facts.apiserver {
        Some(workload) if workload.ready == 0 => findings.push(Finding::error(
            context,
            format!(
                "{} {}/{}: none of {} replicas is ready",
                workload.kind,
                facts.namespace,
                names::APISERVER,
                workload.desired
            ),
            format!("`kubectl --context {} -n {} get pods` shows why", facts.context, facts.namespace),
        )),
        Some(_) => {}
        // It runs, somewhere.
        None if facts.leader.as_ref().is_some_and(Leader::is_there) => {}
        None if facts.identity().is_some() => findings.push(Finding::warning(
            context,
            format!("{map} is there, but no Deployment or StatefulSet {}", names::APISERVER),
            "if nothing runs in its place, nobody answers peers",
        )),
        None => {}
    }
    let silent = facts.nodes.iter().filter(|node| !node.has_range).count();
    if silent > 0 {
        findings.push(Finding::warning(
            context,
            format!("{silent} of {} Nodes have no spec.podCIDR", facts.nodes.len()),
            "see to it yourself that pods' addresses differ from those in other clusters",
        ));
    }
    if let ServiceRanges::InUse(ranges) = &facts.services
        && !ranges.is_empty()
    {
        findings.push(Finding::warning(
            context,
            "this API server does not tell the range of Services' addresses; those in use are compared",
            "see to it yourself that the ranges (--service-cluster-ip-range) differ",
        ));
    }
    findings
}

fn of_identity(facts: &Facts, identity: &Identity) -> Vec<Finding> {
    let mut findings = Vec::new();
    let context = &[facts.context.as_str()];
    let info = &identity.info;
    if let Err(error) = info.mesh.admit(info.id) {
        findings.push(Finding::error(
            context,
            error.to_string(),
            format!("set another cluster-id in ConfigMap {}/{}", facts.namespace, names::CONFIG),
        ));
    }
    if let Some(clock) = &facts.clock {
        findings.extend(authority_at(facts, identity, facts, clock));
        let ends = identity.authorities.iter().map(|ca| ca.not_after).max();
        if let Some(end) = ends.filter(|end| clock.server < *end && *end - clock.server < SOON) {
            findings.push(Finding::warning(
                context,
                format!("the CA of cluster {} ends on {}", info.cluster, utc(end)),
                format!("`isthmus rotate-ca --context {}`", facts.context),
            ));
        }
    }
    findings
}

/// What speaks against connecting two clusters, which are each well by themselves.
pub(crate) fn of_pair(one: &Facts, other: &Facts, allowed: Allowances) -> Vec<Finding> {
    let both = &[one.context.as_str(), other.context.as_str()];
    if let (Some(a), Some(b)) = (&one.uid, &other.uid)
        && a == b
    {
        return vec![Finding::error(
            both,
            format!("both contexts lead to the same cluster (kube-system has uid {a})"),
            "name contexts of two clusters",
        )];
    }
    let mut findings = Vec::new();
    if let (Some(a), Some(b)) = (one.identity(), other.identity()) {
        findings.extend(of_identities(both, a, b));
    }
    findings.extend(overlaps(one, other, allowed));
    findings.extend(same_node(one, other));
    findings.extend(clocks(one, other));
    findings
}

/// What speaks against one cluster reading from another that does not read from it.
pub(crate) fn of_one_way(reader: &Facts, other: &Facts) -> Option<Finding> {
    let encrypting = other.nodes.iter().filter(|node| node.encrypts).count();
    if encrypting == 0 {
        return None;
    }
    Some(Finding::warning(
        &[&reader.context, &other.context],
        format!(
            "{encrypting} of {} nodes in {} encrypt, and do not get to know the keys of the nodes in {}: what pods of {2} \
             send there does not arrive",
            other.nodes.len(),
            other.context,
            reader.context
        ),
        "leave out --connection-mode unicast, or start the node-agents of both clusters with --encryption=off",
    ))
}

/// What a cluster's other peers have against one more.
pub(crate) fn of_known_peers(told: &Facts, new: &Identity) -> Vec<Finding> {
    let (name, id) = (new.info.cluster.as_str(), i32::from(new.info.id.number()));
    let same = |peer: &&ClusterPeer| {
        peer.name_any() != name && peer.status.as_ref().and_then(|status| status.cluster_id) == Some(id)
    };
    let taken = told.peers.iter().find(same);
    let finding = |peer: &ClusterPeer| {
        let peer = peer.name_any();
        Finding::error(
            &[&told.context],
            format!("it is connected to cluster {peer}, which has id {id} as {name} does"),
            format!("disconnect {peer}, or set another cluster-id in {name} before it joins"),
        )
    };
    taken.map(finding).into_iter().collect()
}

fn of_identities(both: &[&str], a: &Identity, b: &Identity) -> Vec<Finding> {
    let mut findings = Vec::new();
    let rename = |what: &str| {
        format!(
            "set another {what} in ConfigMap {} of one of them, before it joins a mesh, and restart its \
             clustermesh-apiserver",
            names::CONFIG
        )
    };
    let (a, b) = (&a.info, &b.info);
    if a.cluster == b.cluster {
        let problem = format!("both clusters are called {}", a.cluster);
        findings.push(Finding::error(both, problem, rename("cluster-name")));
    }
    if a.id == b.id {
        let problem = format!("both clusters have id {}", a.id);
        findings.push(Finding::error(both, problem, rename("cluster-id")));
    }
    if a.mesh != b.mesh {
        findings.push(Finding::error(
            both,
            format!("max-connected-clusters is {} in {} and {} in {}", a.mesh, a.cluster, b.mesh, b.cluster),
            "numeric identities are split after it: all clusters of a mesh must be set up alike, before they have \
             any identities",
        ));
    }
    findings.extend(versions::of_pair(
        both,
        (a.cluster.as_str(), &a.version),
        (b.cluster.as_str(), &b.version),
    ));
    findings
}

fn overlaps(one: &Facts, other: &Facts, allowed: Allowances) -> Vec<Finding> {
    let both = &[one.context.as_str(), other.context.as_str()];
    let (a, b) = (&one.context, &other.context);
    let mut findings = Vec::new();
    let mut overlap =
        |mine: (&str, &super::ranges::Ranges), others: (&str, &super::ranges::Ranges), advice: &str| {
            if let Some((x, y)) = mine.1.overlap(others.1) {
                let problem = if x == y {
                    format!("{x} is used for {} in {a} and for {} in {b}", mine.0, others.0)
                } else {
                    format!("{x}, used for {} in {a}, overlaps {y}, used for {} in {b}", mine.0, others.0)
                };
                findings.push(Finding::error(both, problem, advice));
            }
        };
    const PODS: &str =
        "pods' addresses must be unique in a mesh: one of the clusters has to be set up with another range";
    let (pods, services) = ("pods", "Services");
    overlap((pods, &one.pods), (pods, &other.pods), PODS);
    overlap((pods, &one.pods), (services, other.services.ranges()), PODS);
    overlap((services, one.services.ranges()), (pods, &other.pods), PODS);
    if !allowed.overlapping_services {
        overlap(
            (services, one.services.ranges()),
            (services, other.services.ranges()),
            "set up one of the clusters with another --service-cluster-ip-range; if pods never use the other cluster's \
             Service addresses directly, --allow-overlapping-service-ranges",
        );
    }
    findings
}

/// Nodes reach each other across clusters, so their addresses have to be unique as well.
fn same_node(one: &Facts, other: &Facts) -> Option<Finding> {
    let mine: std::collections::HashMap<_, _> =
        one.nodes.iter().flat_map(|node| node.internal.iter().map(move |ip| (*ip, &node.name))).collect();
    let mut others =
        other.nodes.iter().flat_map(|node| node.internal.iter().map(move |ip| (*ip, &node.name)));
    let (ip, theirs) = others.find(|(ip, _)| mine.contains_key(ip))?;
    Some(Finding::error(
        &[one.context.as_str(), other.context.as_str()],
        format!("Node {} and Node {theirs} both have the InternalIP {ip}", mine[&ip]),
        "nodes of all clusters must reach each other: they have to be in networks that differ",
    ))
}

fn clocks(one: &Facts, other: &Facts) -> Vec<Finding> {
    let both = &[one.context.as_str(), other.context.as_str()];
    let (Some(a), Some(b)) = (&one.clock, &other.clock) else { return Vec::new() };
    let mut findings = Vec::new();
    let apart = (a.ahead() - b.ahead()).abs();
    if apart > CLOCKS {
        // Both as they are at the same moment.
        let at_once = a.here + b.ahead();
        findings.push(Finding::warning(
            both,
            format!(
                "the clocks differ by {} s: {} in {}, {} in {}",
                apart.num_seconds(),
                utc(a.server),
                one.context,
                utc(at_once),
                other.context
            ),
            "set the clocks of both clusters' machines (NTP): certificates are judged by them",
        ));
    }
    if let Some(identity) = one.identity() {
        findings.extend(authority_at(one, identity, other, b));
    }
    if let Some(identity) = other.identity() {
        findings.extend(authority_at(other, identity, one, a));
    }
    findings
}

/// Whether a cluster's CA is valid by another's clock, or its own. One that is, is enough: during a rotation there are two.
fn authority_at(of: &Facts, identity: &Identity, judge: &Facts, clock: &Clock) -> Option<Finding> {
    if identity.authorities.iter().any(|ca| ca.at(clock.server) == Validity::Valid) {
        return None;
    }
    let last = identity.authorities.iter().max_by_key(|ca| ca.not_after)?;
    let what = match last.at(clock.server) {
        Validity::NotYet => "is not valid yet",
        _ => "has expired",
    };
    let own = of.clock.as_ref().map(|own| format!(", {} in {}", utc(own.server), of.context));
    let (contexts, clocks): (Vec<&str>, String) = if of.context == judge.context {
        (vec![&of.context], format!("{} in {}", utc(clock.server), judge.context))
    } else {
        let clocks = format!("{} in {}{}", utc(clock.server), judge.context, own.unwrap_or_default());
        (vec![&of.context, &judge.context], clocks)
    };
    Some(Finding::error(
        &contexts,
        format!("the CA of cluster {} ({last}) {what}: it is {clocks}", identity.info.cluster),
        match last.at(clock.server) {
            Validity::NotYet => "set the clocks right (NTP)".to_owned(),
            _ => format!("renew it: `isthmus rotate-ca --context {}`", of.context),
        },
    ))
}

#[cfg(test)]
mod tests;
