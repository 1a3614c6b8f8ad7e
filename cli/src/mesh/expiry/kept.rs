//! The Secrets that certificates are in, read: of each, what anybody may see. They hold keys also. Of what the API answers the
//! certificates alone are taken over, so that nothing that is made of it can print a key.

use futures::future::join_all;
use isthmus_crds::peer::{PEER_SECRET_TYPE, Relation};
use isthmus_crds::{MANAGED_BY, MANAGED_BY_LABEL, names};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource as _;
use kube::api::{GetParams, ListParams};
use kube::core::Request;
use serde::Deserialize;

use super::Role;
use crate::mesh::contexts::Api;
use crate::mesh::error::Refusal;

/// Set by cert-manager on what it issues.
pub(super) const CERT_MANAGER: &str = "cert-manager.io/certificate-name";
/// The certificates that a cluster shows, and the Secrets they are in.
const OWN: [(Role, &str); 5] = [
    (Role::Gateway, names::SERVER_CERT_SECRET),
    (Role::Relay, names::REMOTE_CERT_SECRET),
    (Role::NodeAgents, names::AGENT_CERT_SECRET),
    (Role::CiliumAgents, names::LOCAL_CERT_SECRET),
    (Role::Administrator, names::ADMIN_CERT_SECRET),
];

/// What the API said.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// The Secrets that the cluster's certificates are in.
    pub(super) own: Vec<(Role, Public)>,
    /// Names of those that are not there.
    pub(super) missing: Vec<&'static str>,
    /// What there is of peers.
    pub(super) peers: Vec<Public>,
    /// What was not told, and why.
    pub(super) refused: Vec<Refusal>,
}

/// Of a Secret, what anybody may see.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Public {
    metadata: ObjectMeta,
    #[serde(rename = "type")]
    type_: Option<String>,
    #[serde(default)]
    pub(super) data: PublicData,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct PublicData {
    #[serde(rename = "tls.crt")]
    pub(super) certificate: Option<ByteString>,
    #[serde(rename = "ca.crt")]
    pub(super) trusted: Option<ByteString>,
    #[serde(rename = "cluster-name")]
    peer: Option<ByteString>,
}

#[derive(Deserialize)]
struct PublicList {
    items: Vec<Public>,
}

impl Public {
    pub(super) fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    pub(super) fn kept_in(&self) -> String {
        format!("Secret {}", self.name())
    }

    pub(super) fn peer(&self) -> String {
        self.data
            .peer
            .as_ref()
            .map(|name| String::from_utf8_lossy(&name.0).trim().to_owned())
            .unwrap_or_default()
    }

    pub(super) fn keeper(&self) -> Keeper<'_> {
        let annotations = self.metadata.annotations.as_ref();
        if let Some(name) = annotations.and_then(|all| all.get(CERT_MANAGER)) {
            return Keeper::CertManager(name);
        }
        let label = self.metadata.labels.as_ref().and_then(|all| all.get(MANAGED_BY_LABEL));
        if label.is_some_and(|by| by == MANAGED_BY) { Keeper::Apiserver } else { Keeper::Somebody }
    }
}

/// Who renews a certificate.
pub(super) enum Keeper<'a> {
    /// By the Certificate of this name.
    CertManager(&'a str),
    /// The one that leads.
    Apiserver,
    Somebody,
}

impl Kept {
    /// Asks for each Secret by its name, and for those of peers by their type.
    pub(crate) async fn ask(api: &Api) -> Self {
        let (own, peers) = tokio::join!(join_all(OWN.map(|(_, name)| own(api, name))), peers(api));
        let mut kept = Self::default();
        for ((role, name), answer) in OWN.into_iter().zip(own) {
            match answer {
                Ok(Some(secret)) => kept.own.push((role, secret)),
                Ok(None) => kept.missing.push(name),
                Err(refusal) => kept.refused.push(refusal),
            }
        }
        match peers {
            Ok(peers) => kept.peers = peers,
            Err(refusal) => kept.refused.push(refusal),
        }
        kept
    }
}

fn secrets(api: &Api) -> Request {
    Request::new(Secret::url_path(&(), Some(&api.namespace)))
}

async fn own(api: &Api, name: &str) -> Result<Option<Public>, Refusal> {
    let refused = |error| api.refused(format!("get Secret {}/{name}", api.namespace), error);
    let request = secrets(api).get(name, &GetParams::default());
    let request = request.map_err(|error| refused(kube::Error::BuildRequest(error)))?;
    match api.client.request::<Public>(request).await {
        Ok(secret) => Ok(Some(secret)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(refused(error)),
    }
}

async fn peers(api: &Api) -> Result<Vec<Public>, Refusal> {
    let doing = format!("list Secrets of type {PEER_SECRET_TYPE} in namespace {}", api.namespace);
    let refused = |error| api.refused(doing.clone(), error);
    let of_type = ListParams::default().fields(&format!("type={PEER_SECRET_TYPE}"));
    let request = secrets(api).list(&of_type).map_err(|error| refused(kube::Error::BuildRequest(error)))?;
    let mut found = api.client.request::<PublicList>(request).await.map_err(refused)?.items;
    // What only is kept of a peer gives it nothing.
    found.retain(|secret| {
        let metadata = secret.metadata.clone();
        secret.type_.as_deref() == Some(PEER_SECRET_TYPE)
            && Relation::of(&Secret { metadata, ..Secret::default() }) > Relation::Apart
    });
    Ok(found)
}
