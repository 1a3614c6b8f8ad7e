//! What is read of a cluster before anything is decided about it. Nothing is judged here, and nothing is written.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use ipnet::IpNet;
use isthmus_crds::peer::{PEER_SECRET_TYPE, Relation};
use isthmus_crds::{ClusterInfo, ClusterPeer, names};
use isthmus_node_agent::encryption::publication::PUBLIC_KEY;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Secret, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use kube::api::{ApiResource, DynamicObject, ListParams, PostParams};
use serde::Serialize;
use serde_json::json;

use super::certificates::{self, Certificate};
use super::contexts::Api;
use super::error::Refusal;
use super::ranges::{Ranges, in_refusal};
use super::wait;

/// Objects asked for at a time.
const PAGE: u32 = 500;

/// A cluster, as it was when it was read.
#[derive(Debug)]
pub(crate) struct Facts {
    /// The context it was read through.
    pub(crate) context: String,
    /// Isthmus's namespace.
    pub(crate) namespace: String,
    /// The uid of namespace `kube-system`, which tells clusters apart whatever they are called.
    pub(crate) uid: Option<String>,
    /// What its apiserver publishes.
    pub(crate) info: Published,
    /// Its clustermesh-apiserver.
    pub(crate) apiserver: Option<Workload>,
    /// The replica of it that leads.
    pub(crate) leader: Option<Leader>,
    /// The Service in front of the gateway.
    pub(crate) service: Option<Service>,
    /// All nodes.
    pub(crate) nodes: Vec<NodeFacts>,
    /// Where pods' addresses come from.
    pub(crate) pods: Ranges,
    /// Where Services' addresses come from.
    pub(crate) services: ServiceRanges,
    /// The API server's clock.
    pub(crate) clock: Option<Clock>,
    /// Secrets of type `isthmus.io/peer`, by name; `None` if they may not be read.
    pub(crate) peer_secrets: Option<BTreeMap<String, Secret>>,
    /// The peers it knows, and how the connections are.
    pub(crate) peers: Vec<ClusterPeer>,
    /// What could not be read, and why.
    pub(crate) unread: Vec<Refusal>,
}

/// What there is of ConfigMap `isthmus-cluster-info`.
#[derive(Debug)]
pub(crate) enum Published {
    /// All of it.
    Is(Box<Identity>),
    /// It is there and cannot be used: why.
    Broken(String),
    /// Isthmus is not installed, or its apiserver has never led.
    Missing,
    /// It could not be read; [`Facts::unread`] says why.
    Unknown,
}

/// Who a cluster is to its peers.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// As published.
    pub(crate) info: ClusterInfo,
    /// The certificates in it.
    pub(crate) authorities: Vec<Certificate>,
}

/// A Deployment, StatefulSet or DaemonSet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Workload {
    /// `Deployment`, say.
    pub(crate) kind: &'static str,
    /// How many pods there should be.
    pub(crate) desired: i32,
    /// How many are ready.
    pub(crate) ready: i32,
}

/// Which replica leads.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Leader {
    /// Its name.
    pub(crate) holder: String,
    /// Seconds since it last said so, by this machine's clock.
    pub(crate) renewed_seconds: f64,
    /// After so many another one may lead.
    pub(crate) lease_seconds: i32,
}

impl Leader {
    /// Whether it has been heard of. Twice the lease's time, for clocks differ.
    pub(crate) fn is_there(&self) -> bool {
        self.renewed_seconds <= 2.0 * f64::from(self.lease_seconds.max(1))
    }
}

/// What matters of a Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeFacts {
    /// Its name.
    pub(crate) name: String,
    /// Its addresses in the clusters' common network.
    pub(crate) internal: Vec<IpAddr>,
    /// Whether it takes traffic.
    pub(crate) ready: bool,
    /// Whether it says which range its pods are in.
    pub(crate) has_range: bool,
    /// Whether it encrypts what its pods say to those of other nodes.
    pub(crate) encrypts: bool,
}

/// Ranges, and how they were learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ServiceRanges {
    /// The cluster says so.
    Known(Ranges),
    /// Only the addresses in use are known.
    InUse(Ranges),
}

/// An API server's clock against this machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Clock {
    /// What it showed.
    pub(crate) server: DateTime<Utc>,
    /// What this machine's showed at that moment.
    pub(crate) here: DateTime<Utc>,
}

impl Clock {
    /// How far the API server's clock is ahead.
    pub(crate) fn ahead(&self) -> TimeDelta {
        self.server - self.here
    }
}

impl ServiceRanges {
    pub(crate) fn ranges(&self) -> &Ranges {
        match self {
            Self::Known(ranges) | Self::InUse(ranges) => ranges,
        }
    }
}

impl Facts {
    /// Reads everything.
    ///
    /// # Errors
    /// The API server does not answer at all. What it refuses to tell is in [`Facts::unread`].
    pub(crate) async fn read(api: &Api) -> Result<Self, Refusal> {
        let clock = clock(api).await?;
        let mut unread = Vec::new();
        let (uid, info, apiserver, leader, service, nodes, services, secrets, peers) = tokio::join!(
            uid(api),
            published(api),
            apiserver(api),
            leader(api),
            gateway_service(api),
            nodes(api),
            service_ranges(api),
            peer_secrets(api),
            wait::peers(api),
        );
        let mut or_note = Noting(&mut unread);
        let info = or_note.take(info).unwrap_or(Published::Unknown);
        let (nodes, pods) = or_note.take(nodes).unwrap_or_default();
        Ok(Self {
            context: api.context.clone(),
            namespace: api.namespace.clone(),
            uid: or_note.take(uid).flatten(),
            info,
            apiserver: or_note.take(apiserver).flatten(),
            leader: or_note.take(leader).flatten(),
            service: or_note.take(service).flatten(),
            nodes,
            pods,
            services: or_note.take(services).unwrap_or(ServiceRanges::InUse(Ranges::default())),
            clock,
            peer_secrets: or_note.take(secrets),
            peers: or_note.take(peers).unwrap_or_default(),
            unread,
        })
    }

    /// Who it is, if it says so.
    pub(crate) fn identity(&self) -> Option<&Identity> {
        match &self.info {
            Published::Is(identity) => Some(identity),
            _ => None,
        }
    }
}

struct Noting<'a>(&'a mut Vec<Refusal>);

impl Noting<'_> {
    fn take<T>(&mut self, read: Result<T, Refusal>) -> Option<T> {
        read.map_err(|refusal| self.0.push(refusal)).ok()
    }
}

/// The first question: any answer, even a refusal, shows the server's clock.
async fn clock(api: &Api) -> Result<Option<Clock>, Refusal> {
    let doing = "ask for the version";
    let request = http::Request::get("/version").body(kube::client::Body::empty());
    let request = request.map_err(|error| api.refused(doing, kube::Error::HttpError(error)))?;
    let before = (Utc::now(), Instant::now());
    let response = api.client.send(request).await.map_err(|error| api.refused(doing, error))?;
    let half: Duration = before.1.elapsed() / 2;
    let date = response.headers().get(http::header::DATE).and_then(|date| date.to_str().ok());
    let server = date.and_then(|date| DateTime::parse_from_rfc2822(date).ok());
    Ok(server.map(|server| Clock { server: server.to_utc(), here: before.0 + half }))
}

async fn uid(api: &Api) -> Result<Option<String>, Refusal> {
    let found = api.global::<Namespace>().get_opt("kube-system").await;
    let found = found.map_err(|error| api.refused("read Namespace kube-system", error))?;
    Ok(found.and_then(|namespace| namespace.metadata.uid))
}

/// Reads what the cluster's apiserver publishes.
pub(crate) async fn published(api: &Api) -> Result<Published, Refusal> {
    let name = names::CLUSTER_INFO;
    let found = api.namespaced::<ConfigMap>().get_opt(name).await;
    let found =
        found.map_err(|error| api.refused(format!("read ConfigMap {}/{name}", api.namespace), error))?;
    let Some(found) = found else { return Ok(Published::Missing) };
    let read = ClusterInfo::parse(&found).map_err(|error| error.to_string()).and_then(|info| {
        let authorities =
            certificates::parse(info.ca.as_str().as_bytes()).map_err(|why| format!("ca.crt: {why}"))?;
        Ok(Identity { info, authorities })
    });
    Ok(read.map_or_else(Published::Broken, |identity| Published::Is(Box::new(identity))))
}

/// The clustermesh-apiserver, whichever kind of workload it is.
pub(crate) async fn apiserver(api: &Api) -> Result<Option<Workload>, Refusal> {
    let name = names::APISERVER;
    let refused = |kind: &str| {
        let doing = format!("read {kind} {}/{name}", api.namespace);
        move |error| api.refused(doing, error)
    };
    let found = api.namespaced::<Deployment>().get_opt(name).await.map_err(refused("Deployment"))?;
    if let Some(found) = found {
        let desired = found.spec.and_then(|spec| spec.replicas).unwrap_or(1);
        let ready = found.status.and_then(|status| status.ready_replicas).unwrap_or(0);
        return Ok(Some(Workload { kind: "Deployment", desired, ready }));
    }
    let found = api.namespaced::<StatefulSet>().get_opt(name).await.map_err(refused("StatefulSet"))?;
    Ok(found.map(|found| {
        let desired = found.spec.and_then(|spec| spec.replicas).unwrap_or(1);
        let ready = found.status.and_then(|status| status.ready_replicas).unwrap_or(0);
        Workload { kind: "StatefulSet", desired, ready }
    }))
}

/// Which replica leads, if any ever did.
pub(crate) async fn leader(api: &Api) -> Result<Option<Leader>, Refusal> {
    let name = names::LEASE;
    let found = api.namespaced::<Lease>().get_opt(name).await;
    let found = found.map_err(|error| api.refused(format!("read Lease {}/{name}", api.namespace), error))?;
    let leader = |lease: Lease| {
        let spec = lease.spec?;
        let renewed = spec.renew_time?.0.as_second();
        Some(Leader {
            holder: spec.holder_identity.filter(|holder| !holder.is_empty())?,
            renewed_seconds: (Utc::now().timestamp() - renewed).max(0) as f64,
            lease_seconds: spec.lease_duration_seconds.unwrap_or(15),
        })
    };
    Ok(found.and_then(leader))
}

async fn gateway_service(api: &Api) -> Result<Option<Service>, Refusal> {
    let name = names::APISERVER;
    let found = api.namespaced::<Service>().get_opt(name).await;
    found.map_err(|error| api.refused(format!("read Service {}/{name}", api.namespace), error))
}

async fn nodes(api: &Api) -> Result<(Vec<NodeFacts>, Ranges), Refusal> {
    let mut nodes = Vec::new();
    let mut ranges: Vec<IpNet> = Vec::new();
    for node in all::<Node>(api, &api.global(), "list Nodes").await? {
        let spec = node.spec.clone().unwrap_or_default();
        let cidrs = spec.pod_cidrs.unwrap_or_else(|| spec.pod_cidr.into_iter().collect());
        let own: Vec<IpNet> = cidrs.iter().filter_map(|cidr| cidr.parse().ok()).collect();
        let status = node.status.clone().unwrap_or_default();
        let internal = status.addresses.unwrap_or_default().into_iter();
        let internal = internal.filter(|address| address.type_ == "InternalIP");
        let ready = status.conditions.unwrap_or_default();
        nodes.push(NodeFacts {
            name: node.name_any(),
            internal: internal.filter_map(|address| address.address.parse().ok()).collect(),
            ready: ready.iter().any(|c| c.type_ == "Ready" && c.status == "True"),
            has_range: !own.is_empty(),
            encrypts: node.annotations().contains_key(PUBLIC_KEY),
        });
        ranges.extend(own);
    }
    Ok((nodes, Ranges::new(ranges)))
}

/// Asked in order of how well it is known: objects, the allocator's own words, what is in use.
async fn service_ranges(api: &Api) -> Result<ServiceRanges, Refusal> {
    for version in ["v1", "v1beta1"] {
        let resource = ApiResource {
            group: "networking.k8s.io".into(),
            version: version.into(),
            api_version: format!("networking.k8s.io/{version}"),
            kind: "ServiceCIDR".into(),
            plural: "servicecidrs".into(),
        };
        let found: kube::Api<DynamicObject> = kube::Api::all_with(api.client.clone(), &resource);
        // Not every server has them, and not everybody may read them; there are other ways.
        let Ok(found) = found.list(&ListParams::default()).await else { continue };
        let cidrs = found.items.iter().flat_map(|object| {
            let cidrs = object.data.pointer("/spec/cidrs").and_then(|cidrs| cidrs.as_array().cloned());
            cidrs.unwrap_or_default()
        });
        let ranges =
            Ranges::new(cidrs.filter_map(|cidr| cidr.as_str().and_then(|cidr| cidr.parse::<IpNet>().ok())));
        if !ranges.is_empty() {
            return Ok(ServiceRanges::Known(ranges));
        }
    }
    let mut learned = Vec::new();
    // Of the ranges that RFC 5737 and 3849 keep for documentation: nobody's Services are there.
    for (family, ip) in [("IPv4", "192.0.2.1"), ("IPv6", "2001:db8::1")] {
        learned.extend(refused_range(api, family, ip).await);
    }
    if !learned.is_empty() {
        return Ok(ServiceRanges::Known(Ranges::new(learned)));
    }
    let services = all::<Service>(api, &api.global(), "list Services").await?;
    let in_use = services.into_iter().filter_map(|service| service.spec?.cluster_ips).flatten();
    let in_use = in_use.filter_map(|ip| ip.parse::<IpAddr>().ok()).map(IpNet::from);
    Ok(ServiceRanges::InUse(Ranges::new(in_use)))
}

/// Asks for a Service that cannot be, without making it.
async fn refused_range(api: &Api, family: &str, ip: &str) -> Vec<IpNet> {
    let service = json!({
        "metadata": {"generateName": "isthmus-range-"},
        "spec": {"clusterIP": ip, "ipFamilies": [family], "ports": [{"port": 443}]},
    });
    let Ok(service) = serde_json::from_value::<Service>(service) else { return Vec::new() };
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    match api.namespaced::<Service>().create(&dry, &service).await {
        Err(kube::Error::Api(status)) => in_refusal(&status.message),
        _ => Vec::new(),
    }
}

/// The peers that a cluster has been told of.
pub(crate) async fn peer_secrets(api: &Api) -> Result<BTreeMap<String, Secret>, Refusal> {
    let params = ListParams::default().fields(&format!("type={PEER_SECRET_TYPE}"));
    let doing = format!("list Secrets of type {PEER_SECRET_TYPE} in namespace {}", api.namespace);
    let found = api.namespaced::<Secret>().list(&params).await.map_err(|error| api.refused(doing, error))?;
    let found = found.items.into_iter().filter(|secret| secret.type_.as_deref() == Some(PEER_SECRET_TYPE));
    Ok(found.map(|secret| (secret.name_any(), secret)).collect())
}

/// Names of Secrets that are annotated as a peer's and are not of the type of one: nobody takes note of them. Asked for without
/// what is in them.
pub(crate) async fn mistyped(api: &Api) -> Result<Vec<String>, Refusal> {
    let params = ListParams::default().fields(&format!("type!={PEER_SECRET_TYPE}"));
    let doing = format!("list Secrets in namespace {}", api.namespace);
    let found = api.namespaced::<Secret>().list_metadata(&params).await;
    let found = found.map_err(|error| api.refused(doing, error))?;
    let asks = |metadata: &ObjectMeta| {
        Relation::of(&Secret { metadata: metadata.clone(), ..Secret::default() }) > Relation::Apart
    };
    Ok(found.iter().filter(|secret| asks(&secret.metadata)).map(ResourceExt::name_any).collect())
}

async fn all<K>(api: &Api, kind: &kube::Api<K>, doing: &str) -> Result<Vec<K>, Refusal>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let mut items = Vec::new();
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = kind.list(&params).await.map_err(|error| api.refused(doing, error))?;
        items.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(items),
        }
    }
}
