//! Which Secrets make clusters know each other: what is to be there and what is there in, what changes out.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_crds::peer::{ADMIT_ANNOTATION, PeerEndpoint, PeerSecret, Relation, secret_name};
use isthmus_crds::{CaBundle, ClusterInfo, MANAGED_BY_LABEL, SecretVersion, names};
use isthmus_wire::ClusterName;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use serde::Serialize;

use super::checks::Finding;

/// Who this command is towards the Kubernetes API, and the value of the label `app.kubernetes.io/managed-by` on what it
/// makes.
pub(crate) const FIELD_MANAGER: &str = "isthmus-cli";

/// One cluster being told of another.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    /// The context of the cluster that is told.
    pub(crate) context: &'a str,
    /// Its namespace of Isthmus.
    pub(crate) namespace: &'a str,
    /// What it has been told before; `None` if that may not be read.
    pub(crate) present: Option<&'a BTreeMap<String, Secret>>,
    /// Whom it is told of.
    pub(crate) peer: &'a ClusterInfo,
    /// Where the peer's gateways are, or why that is not known.
    pub(crate) endpoints: Result<Vec<PeerEndpoint>, String>,
    /// What it is to be to the peer, unless it is more already. What it knows of the peer is brought up to date in any case.
    pub(crate) at_least: Relation,
}

/// A Secret to be written.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    /// Where.
    pub(crate) context: String,
    /// The peer it is about.
    pub(crate) peer: ClusterName,
    /// What it is to be.
    pub(crate) secret: Secret,
    /// What that is in it.
    pub(crate) wanted: PeerSecret,
    /// Which version of it is there.
    pub(crate) present: Option<SecretVersion>,
    /// What that changes.
    pub(crate) change: Change,
    /// Whether fields that somebody else wrote are taken over.
    pub(crate) force: bool,
}

/// What a step changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Change {
    /// It is not there.
    Created,
    /// It says something else.
    Updated,
    /// Nothing.
    Unchanged,
    /// It may not be read; the API server will know.
    Unknown,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Updated => "updated",
            Self::Unchanged => "unchanged",
            Self::Unknown => "unknown",
        })
    }
}

impl Step {
    /// The Secret's name.
    pub(crate) fn name(&self) -> String {
        self.secret.name_any()
    }
}

/// Decides about one Secret.
///
/// # Errors
/// Why it cannot be written, and what to do.
pub(crate) fn plan(wanted: Wanted<'_>, force: bool) -> Result<Step, Finding> {
    let cluster = &wanted.peer.cluster;
    let found = wanted.present.map(|all| about(all, cluster)).unwrap_or_default();
    let at = |name: &str| format!("Secret {}/{name}", wanted.namespace);
    if let [first, second, ..] = found.as_slice() {
        return Err(Finding::error(
            &[wanted.context],
            format!(
                "{} and {} are both about cluster {cluster}",
                at(&first.name_any()),
                at(&second.name_any())
            ),
            "delete the one that is wrong",
        ));
    }
    let present = found.first().copied();
    let name = secret_name(cluster);
    if present.is_none() && wanted.present.is_some_and(|all| all.contains_key(&name)) {
        return Err(Finding::error(
            &[wanted.context],
            format!("{} is about another cluster than its name says", at(&name)),
            format!("rename it, for that name is for cluster {cluster}"),
        ));
    }
    if wanted.present.is_none() && wanted.at_least < Relation::Connected {
        return Err(Finding::error(
            &[wanted.context],
            format!(
                "whether it reads from cluster {cluster} already is not known: its Secrets may not be read"
            ),
            format!("grant the verbs get and list on secrets in namespace {}", wanted.namespace),
        ));
    }
    let relation = present.map_or(Relation::Apart, Relation::of).max(wanted.at_least);
    let known = present.and_then(|secret| PeerSecret::parse(secret).ok());
    let known = known.map(|known| known.endpoints).filter(|endpoints| !endpoints.is_empty());
    let endpoints = match (wanted.endpoints, known) {
        (Ok(endpoints), _) => endpoints,
        // Somebody has said it before; nobody can say better now.
        (Err(_), Some(known)) => known,
        (Err(_), None) if relation < Relation::Connected => Vec::new(),
        (Err(why), None) => {
            return Err(Finding::error(
                &[wanted.context],
                format!("where the gateway of cluster {cluster} is is not known: {why}"),
                "give --destination-endpoint or --source-endpoint HOST:PORT, as the other cluster reaches it",
            ));
        }
    };
    let peer = PeerSecret {
        cluster: cluster.clone(),
        endpoints,
        ca: wanted.peer.ca.clone(),
        server_name: Some(wanted.peer.server_name.clone())
            .filter(|name| *name != names::default_server_name(cluster)),
        addresses: BTreeMap::new(),
        identity: None,
        relation,
    };
    let mut secret = peer.to_secret(wanted.namespace);
    // What another writer has put there does not go by being left out.
    if relation != Relation::Admitted && present.is_some_and(says_of_admission) {
        secret.annotations_mut().insert(ADMIT_ANNOTATION.into(), false.to_string());
    }
    secret.metadata.labels.get_or_insert_default().insert(MANAGED_BY_LABEL.into(), FIELD_MANAGER.into());
    let step = |secret: Secret, change: Change, force: bool| Step {
        context: wanted.context.to_owned(),
        peer: cluster.clone(),
        secret,
        wanted: peer.clone(),
        present: present.and_then(|present| SecretVersion::of(&present.metadata)),
        change,
        force,
    };
    let Some(present) = present else {
        let change = if wanted.present.is_some() { Change::Created } else { Change::Unknown };
        return Ok(step(secret, change, force));
    };
    secret.metadata.name = present.metadata.name.clone();
    let differences = differences(present, &peer);
    if differences.is_empty() {
        return Ok(step(secret, Change::Unchanged, false));
    }
    if !is_ours(present) && !force {
        return Err(Finding::error(
            &[wanted.context],
            format!(
                "{} was made by {}, not by this command, and differs in {}",
                at(&present.name_any()),
                maker(present),
                differences.join(", ")
            ),
            "change it where it is kept, or give --force to take it over",
        ));
    }
    // A cluster chooses its own name. One that takes another's would be believed in its place.
    if !force && is_stranger(present, &peer) {
        return Err(Finding::error(
            &[wanted.context],
            format!(
                "{} knows cluster {cluster} by other CAs: none of them is among those that the cluster which now calls \
                 itself {cluster} publishes",
                at(&present.name_any())
            ),
            "give --force if it is the same cluster and has lost its CA; else one of the two needs another name",
        ));
    }
    Ok(step(secret, Change::Updated, true))
}

/// Whether a cluster shares no authority with the one that is known by its name. One that has exchanged its authority in
/// the usual way (`isthmus rotate-ca`) always does.
fn is_stranger(present: &Secret, wanted: &PeerSecret) -> bool {
    PeerSecret::parse(present).is_ok_and(|known| authorities(&known.ca).is_disjoint(&authorities(&wanted.ca)))
}

/// The Secrets about a cluster, whether or not they can be used.
pub(crate) fn about<'a>(all: &'a BTreeMap<String, Secret>, cluster: &ClusterName) -> Vec<&'a Secret> {
    let is_about = |secret: &&Secret| match named(secret).filter(|name| name.parse::<ClusterName>().is_ok()) {
        Some(name) => name == cluster.as_str(),
        // It names nobody. Whom it is meant for is in its own name, by which its ClusterPeer is called, too.
        None => secret.name_any() == secret_name(cluster),
    };
    all.values().filter(is_about).collect()
}

fn says_of_admission(secret: &Secret) -> bool {
    secret.annotations().contains_key(ADMIT_ANNOTATION)
}

fn named(secret: &Secret) -> Option<&str> {
    let bytes = secret.data.as_ref()?.get(isthmus_crds::peer::CLUSTER_NAME)?;
    std::str::from_utf8(&bytes.0).ok().map(str::trim)
}

/// Whether this command made it.
pub(crate) fn is_ours(secret: &Secret) -> bool {
    secret.labels().get(MANAGED_BY_LABEL).is_some_and(|by| by == FIELD_MANAGER)
}

/// Who made it, as far as it says so.
pub(crate) fn maker(secret: &Secret) -> String {
    if let Some(by) = secret.labels().get(MANAGED_BY_LABEL) {
        return by.clone();
    }
    let mut managers: Vec<&str> =
        secret.managed_fields().iter().filter_map(|entry| entry.manager.as_deref()).collect();
    managers.dedup();
    if managers.is_empty() { "somebody else".into() } else { managers.join(" and ") }
}

/// The parts of a Secret that are not as wanted. What is there beyond that (addresses, a client certificate) stays.
fn differences(present: &Secret, wanted: &PeerSecret) -> Vec<&'static str> {
    let Ok(read) = PeerSecret::parse(present) else { return vec!["what cannot be read of it"] };
    [
        ("its endpoints", read.endpoints != wanted.endpoints),
        ("its ca.crt", authorities(&read.ca) != authorities(&wanted.ca)),
        ("its server-name", read.server_name() != wanted.server_name()),
        ("its annotations", read.relation != wanted.relation),
    ]
    .into_iter()
    .filter_map(|(what, differs)| differs.then_some(what))
    .collect()
}

/// What a bundle trusts, however it is written: another order or a comment is no reason to connect anew.
fn authorities(bundle: &CaBundle) -> BTreeSet<Vec<u8>> {
    bundle.certificates().map(|certificate| certificate.to_vec()).collect()
}

#[cfg(test)]
mod tests;
