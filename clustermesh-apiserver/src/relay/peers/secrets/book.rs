//! What the Secrets say, and who is right when two say the same. Pure bookkeeping.

use std::collections::BTreeMap;
use std::sync::Arc;

use isthmus_crds::SecretVersion;
use isthmus_crds::peer::{CERTIFICATE, CLUSTER_NAME, PeerIdentity, PeerSecret, Relation, secret_name};
use isthmus_kvstore::config::{ClientConfig, Endpoint, Identity, LiveIdentity, Pem};
use isthmus_wire::ClusterName;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use sha2::{Digest, Sha256};

use super::super::{Admission, Found, Origin, PeerConfig, Refused};

/// The most Secrets that are taken; a mesh has at most 511 clusters.
const MAX_SECRETS: usize = 1024;

/// The Secrets that ask for something, by name.
pub(super) struct Book {
    namespace: String,
    own: ClusterName,
    identity: LiveIdentity,
    entries: BTreeMap<String, Entry>,
    /// A new list, not complete yet.
    listing: Option<BTreeMap<String, Entry>>,
}

/// What is known of a Secret.
#[derive(Clone)]
struct Entry {
    uid: Option<String>,
    created: Option<Time>,
    /// What it asks for.
    relation: Relation,
    /// Why it cannot be used as it is now.
    problem: Option<Refused>,
    /// What it said when it could be used last.
    usable: Option<Usable>,
}

#[derive(Clone)]
struct Usable {
    cluster: ClusterName,
    admission: Admission,
    /// None if it only admits.
    connection: Option<Connection>,
}

#[derive(Clone)]
struct Connection {
    config: PeerConfig,
    /// The client certificate that the Secret holds.
    identity: Option<LiveIdentity>,
}

impl Usable {
    /// What is left of it when no more than this is asked for: who takes an annotation away means it, whatever else the
    /// Secret says by then.
    fn at_most(mut self, relation: Relation) -> Self {
        self.connection = self.connection.filter(|_| relation == Relation::Connected);
        self
    }

    fn identity(&self) -> Option<&LiveIdentity> {
        self.connection.as_ref()?.identity.as_ref()
    }

    fn stays(&self) -> String {
        let how = if self.connection.is_some() { "connected" } else { "admitted" };
        format!("peer {} stays {how} as it was", self.cluster)
    }
}

impl Book {
    pub(super) fn new(namespace: String, own: ClusterName, identity: LiveIdentity) -> Self {
        Self { namespace, own, identity, entries: BTreeMap::new(), listing: None }
    }

    /// What is listed from here on is all there is, once the list has ended.
    pub(super) fn begin_list(&mut self) {
        self.listing = Some(BTreeMap::new());
    }

    pub(super) fn listed(&mut self, secret: &Secret) {
        let name = name_of(secret);
        let entry = self.read(secret, self.entries.get(&name));
        if let (Some(listing), Some(entry)) = (&mut self.listing, entry) {
            insert(listing, name, entry);
        }
    }

    pub(super) fn end_list(&mut self) {
        if let Some(listing) = self.listing.take() {
            self.entries = listing;
        }
    }

    pub(super) fn applied(&mut self, secret: &Secret) {
        let name = name_of(secret);
        match self.read(secret, self.entries.get(&name)) {
            Some(entry) => insert(&mut self.entries, name, entry),
            None => drop(self.entries.remove(&name)),
        }
    }

    pub(super) fn deleted(&mut self, secret: &Secret) {
        self.entries.remove(&name_of(secret));
    }

    /// What all of them say together. Of two that describe one cluster the older one counts; of two of the same second the one
    /// whose name comes first.
    pub(super) fn found(&self) -> Found {
        let mut found = Found::default();
        let mut by_age: Vec<_> = self.entries.iter().collect();
        by_age.sort_by_key(|(name, entry)| (&entry.created, *name));
        for (name, entry) in by_age {
            let origin = self.origin(name);
            if let Some(problem) = &entry.problem {
                found.refused.insert(origin.clone(), problem.clone());
            }
            let Some(usable) = &entry.usable else { continue };
            let cluster = usable.cluster.clone();
            if let Some(older) = described(&found, &cluster) {
                let reason = format!(
                    "peer {cluster} is described by {older} already, which is older; delete one of the two, or correct \
                     `{CLUSTER_NAME}`"
                );
                let relation = entry.relation;
                let refused = Refused { cluster: Some(cluster), relation, reason, uid: entry.uid.clone() };
                found.refused.entry(origin).or_insert(refused);
                continue;
            }
            match &usable.connection {
                Some(connection) => drop(found.configured.insert(cluster, connection.config.clone())),
                None => drop(found.admitted.insert(cluster, usable.admission.clone())),
            }
        }
        found
    }

    /// What a Secret says; none if it asks for nothing.
    fn read(&self, secret: &Secret, before: Option<&Entry>) -> Option<Entry> {
        let relation = Relation::of(secret);
        if relation == Relation::Apart {
            return None;
        }
        let uid = secret.metadata.uid.clone();
        // Another one of the same name has nothing to do with it.
        let before = before.filter(|before| before.uid == uid).and_then(|before| before.usable.as_ref());
        let (problem, usable) = match self.understand(secret, before) {
            Ok(usable) => (None, Some(usable)),
            Err(mut reason) => {
                let stays = before.cloned().map(|before| before.at_most(relation));
                if let Some(stays) = &stays {
                    reason = format!("{reason}; {}", stays.stays());
                }
                let cluster = stands_for(secret, before);
                (Some(Refused { cluster, relation, reason, uid: uid.clone() }), stays)
            }
        };
        let created = secret.metadata.creation_timestamp.clone();
        Some(Entry { uid, created, relation, problem, usable })
    }

    fn understand(&self, secret: &Secret, before: Option<&Usable>) -> Result<Usable, String> {
        let peer = PeerSecret::parse(secret).map_err(|error| error.to_string())?;
        if peer.cluster == self.own {
            return Err(format!(
                "`{CLUSTER_NAME}` is {}, the name of this cluster itself; put the peer's name, endpoints and authority there",
                self.own
            ));
        }
        let authorities = peer.ca.shared();
        let origin = self.origin(&name_of(secret));
        let version = SecretVersion::of(&secret.metadata);
        let admission = Admission { origin, version, authorities };
        let connection = match peer.relation {
            Relation::Connected => Some(self.connection(&peer, &admission, before)?),
            Relation::Admitted | Relation::Apart => None,
        };
        Ok(Usable { cluster: peer.cluster, admission, connection })
    }

    fn connection(
        &self,
        peer: &PeerSecret,
        admission: &Admission,
        before: Option<&Usable>,
    ) -> Result<Connection, String> {
        let identity = match &peer.identity {
            None => None,
            Some(pem) => Some(renewed(pem, before.and_then(Usable::identity))?),
        };
        let server_name = peer.server_name();
        let digest = digest(peer, &server_name);
        let client = ClientConfig {
            endpoints: peer
                .endpoints
                .iter()
                .map(|endpoint| Endpoint { tls: true, host: endpoint.host.clone(), port: endpoint.port })
                .collect(),
            trusted_ca: Some(Pem::Text(Arc::clone(&admission.authorities))),
            identity: Some(Identity::Live(identity.clone().unwrap_or_else(|| self.identity.clone()))),
            password: None,
            server_name: Some(server_name),
            addresses: peer.addresses.clone(),
        };
        let Admission { origin, version, authorities } = admission.clone();
        let config = PeerConfig { digest, client, origin, version, authorities: Some(authorities) };
        Ok(Connection { config, identity })
    }

    fn origin(&self, name: &str) -> Origin {
        Origin::Secret { namespace: self.namespace.clone(), name: name.to_owned() }
    }
}

/// What describes a cluster already.
fn described<'a>(found: &'a Found, cluster: &ClusterName) -> Option<&'a Origin> {
    let connected = found.configured.get(cluster).map(|config| &config.origin);
    connected.or_else(|| found.admitted.get(cluster).map(|admission| &admission.origin))
}

fn name_of(secret: &Secret) -> String {
    secret.metadata.name.clone().unwrap_or_default()
}

fn insert(entries: &mut BTreeMap<String, Entry>, name: String, entry: Entry) {
    if entries.len() < MAX_SECRETS || entries.contains_key(&name) {
        entries.insert(name, entry);
    } else {
        tracing::error!(secret = name, "there are more than {MAX_SECRETS} Secrets of peers; it is left out");
    }
}

/// The identity in use with its present certificate, or a new one: a renewed certificate needs no new connection.
fn renewed(pem: &PeerIdentity, before: Option<&LiveIdentity>) -> Result<LiveIdentity, String> {
    match before {
        None => LiveIdentity::new(&pem.certificate, &pem.key),
        Some(identity) => identity.replace(&pem.certificate, &pem.key).map(|()| identity.clone()),
    }
    .map_err(|error| format!("`{CERTIFICATE}`: {error}"))
}

/// The cluster that an unusable Secret stands for: the one that it stood for, says, or is named after.
fn stands_for(secret: &Secret, before: Option<&Usable>) -> Option<ClusterName> {
    if let Some(before) = before {
        return Some(before.cluster.clone());
    }
    let says = secret.data.as_ref().and_then(|data| data.get(CLUSTER_NAME));
    let says = says.and_then(|name| std::str::from_utf8(&name.0).ok()?.trim().parse::<ClusterName>().ok());
    says.or_else(|| {
        let named = name_of(secret).strip_prefix("peer-")?.parse::<ClusterName>().ok()?;
        (secret_name(&named) == name_of(secret)).then_some(named)
    })
}

/// Of everything that a new connection is needed for. Certificates are replaced within one.
fn digest(peer: &PeerSecret, server_name: &str) -> [u8; 32] {
    let mut sha = Sha256::new();
    let mut part = |text: &str| {
        sha.update((text.len() as u64).to_be_bytes());
        sha.update(text);
    };
    part(peer.cluster.as_str());
    part(server_name);
    part(peer.ca.as_str());
    part(if peer.identity.is_some() { "its own identity" } else { "" });
    for endpoint in &peer.endpoints {
        part(&endpoint.to_string());
    }
    for (host, addresses) in &peer.addresses {
        part(host);
        for address in addresses {
            part(&address.to_string());
        }
    }
    sha.finalize().into()
}

#[cfg(test)]
mod tests;
