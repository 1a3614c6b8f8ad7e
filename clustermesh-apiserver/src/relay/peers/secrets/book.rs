//! What the Secrets say, and who is right when two say the same. Pure bookkeeping.

use std::collections::BTreeMap;

use isthmus_crds::SecretVersion;
use isthmus_crds::peer::{
    CERTIFICATE, CLUSTER_NAME, PeerIdentity, PeerSecret, secret_name, wants_connection,
};
use isthmus_kvstore::config::{ClientConfig, Endpoint, Identity, LiveIdentity, Pem};
use isthmus_wire::ClusterName;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use sha2::{Digest, Sha256};

use super::super::{Found, Origin, PeerConfig, Refused};

/// The most Secrets that are taken; a mesh has at most 511 clusters.
const MAX_SECRETS: usize = 1024;

/// The Secrets that ask for a connection, by name.
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
    /// Why it cannot be used as it is now.
    problem: Option<Refused>,
    /// What it said when it could be used last.
    usable: Option<Usable>,
}

#[derive(Clone)]
struct Usable {
    cluster: ClusterName,
    config: PeerConfig,
    /// The client certificate that it holds.
    identity: Option<LiveIdentity>,
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
            match found.configured.get(&usable.cluster) {
                None => drop(found.configured.insert(usable.cluster.clone(), usable.config.clone())),
                Some(older) => {
                    let reason = format!(
                        "peer {} is described by {} already, which is older; delete one of the two, or correct \
                         `{CLUSTER_NAME}`",
                        usable.cluster, older.origin
                    );
                    let cluster = Some(usable.cluster.clone());
                    let refused = Refused { cluster, reason, uid: entry.uid.clone() };
                    found.refused.entry(origin).or_insert(refused);
                }
            }
        }
        found
    }

    /// What a Secret says; none if it does not ask for the connection.
    fn read(&self, secret: &Secret, before: Option<&Entry>) -> Option<Entry> {
        if !wants_connection(secret) {
            return None;
        }
        let uid = secret.metadata.uid.clone();
        // Another one of the same name has nothing to do with it.
        let before = before.filter(|before| before.uid == uid).and_then(|before| before.usable.as_ref());
        let (problem, usable) = match self.understand(secret, before) {
            Ok(usable) => (None, Some(usable)),
            Err(mut reason) => {
                if let Some(before) = before {
                    reason = format!("{reason}; peer {} stays connected as it was", before.cluster);
                }
                let cluster = stands_for(secret, before);
                (Some(Refused { cluster, reason, uid: uid.clone() }), before.cloned())
            }
        };
        Some(Entry { uid, created: secret.metadata.creation_timestamp.clone(), problem, usable })
    }

    fn understand(&self, secret: &Secret, before: Option<&Usable>) -> Result<Usable, String> {
        let peer = PeerSecret::parse(secret).map_err(|error| error.to_string())?;
        if peer.cluster == self.own {
            return Err(format!(
                "`{CLUSTER_NAME}` is {}, the name of this cluster itself; put the peer's name, endpoints and authority there",
                self.own
            ));
        }
        let identity = match &peer.identity {
            None => None,
            Some(pem) => Some(renewed(pem, before.and_then(|before| before.identity.as_ref()))?),
        };
        let server_name = peer.server_name();
        let digest = digest(&peer, &server_name);
        let client = ClientConfig {
            endpoints: peer
                .endpoints
                .iter()
                .map(|endpoint| Endpoint { tls: true, host: endpoint.host.clone(), port: endpoint.port })
                .collect(),
            trusted_ca: Some(Pem::Text(peer.ca.shared())),
            identity: Some(Identity::Live(identity.clone().unwrap_or_else(|| self.identity.clone()))),
            password: None,
            server_name: Some(server_name),
            addresses: peer.addresses,
        };
        let origin = self.origin(&name_of(secret));
        let version = SecretVersion::of(&secret.metadata);
        let config = PeerConfig { digest, client, origin, version, authorities: Some(peer.ca.shared()) };
        Ok(Usable { cluster: peer.cluster, config, identity })
    }

    fn origin(&self, name: &str) -> Origin {
        Origin::Secret { namespace: self.namespace.clone(), name: name.to_owned() }
    }
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
