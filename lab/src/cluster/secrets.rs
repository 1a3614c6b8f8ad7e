//! Trust and peers by Kubernetes objects: each cluster's apiserver makes an authority and certificates of its own in Secrets,
//! and a Secret for each peer joins the clusters. The lab does what surrounds that: it is the cloud that gives the gateway's
//! Service an address, the kubelets that mount certificates, and whoever exchanges what clusters publish.

use std::collections::BTreeMap;
use std::time::Duration;

use isthmus_crds::ClusterInfo;
use isthmus_crds::names;
use isthmus_crds::peer::{PeerEndpoint, PeerSecret, Relation};
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use super::{Cluster, Flags, GATEWAY, READY};
use crate::error::{Doing, LabError, Result};
use crate::projection::Projections;
use crate::rbac::FIELD_MANAGER;
use crate::spec::LabSpec;
use crate::wait;

const NAMESPACE: &str = names::DEFAULT_NAMESPACE;

impl Cluster {
    /// The gateway's Service with the addresses of all replicas, as a cloud's load balancer would have them, and folders that
    /// will show certificates once they are issued.
    pub(crate) async fn prepare_secrets(&self) -> Result<()> {
        self.publish_service().await?;
        let agents = self.nodes().iter().map(|node| self.ground.state.agent_certificate(self.name(), node));
        let folders = BTreeMap::from([
            (names::AGENT_CERT_SECRET.to_owned(), agents.collect()),
            (names::ADMIN_CERT_SECRET.to_owned(), vec![self.ground.state.admin_certificate(self.name())]),
        ]);
        self.projections.get_or_init(|| Projections::start(&self.ground, self.client(), NAMESPACE, folders));
        Ok(())
    }

    pub(super) fn secrets_flags(&self, flags: &mut Flags) {
        flags.add("--namespace", NAMESPACE);
        // The lab's kubelets show a change at once.
        flags.add("--ca-rotation-settle", "2s");
        // Agents know the gateways by these, peers by a name.
        for gateway in self.gateways() {
            flags.add("--gateway-san", gateway.ip().to_string());
        }
    }

    /// Waits until the agents' and the administrator's certificates are there as files.
    pub(crate) async fn certificates_shown(&self) -> Result<()> {
        let Some(projections) = self.projections.get() else { return Ok(()) };
        projections.shown(names::AGENT_CERT_SECRET, READY).await?;
        projections.shown(names::ADMIN_CERT_SECRET, READY).await
    }

    /// Writes a Secret for each peer, from what that peer has published. A cluster that reads from this one, and not this one
    /// from it, has a Secret too, which lets it in.
    pub(crate) async fn join(&self, lab: &LabSpec, all: &[Cluster]) -> Result<()> {
        if let Some(stranger) = self.spec.peers.iter().find(|peer| all.iter().all(|c| c.name() != *peer)) {
            return Err(LabError::invalid(format!("there is no cluster {stranger} to join")));
        }
        let secrets: Api<Secret> = Api::namespaced(self.client(), NAMESPACE);
        for other in all.iter().filter(|other| other.name() != self.name()) {
            let reads = self.spec.peers.iter().any(|peer| peer == other.name());
            if !reads && !other.spec.peers.contains(&self.spec.name) {
                continue;
            }
            let relation = match lab.connected {
                true if reads => Relation::Connected,
                true => Relation::Admitted,
                false => Relation::Apart,
            };
            let secret = PeerSecret { relation, ..other.as_peer().await? }.to_secret(NAMESPACE);
            let params = PatchParams::apply(FIELD_MANAGER).force();
            let applied = secrets.patch(&secret.name_any(), &params, &Patch::Apply(&secret)).await;
            applied.doing(|| format!("joining {} and {}", self.name(), other.name()))?;
        }
        Ok(())
    }

    /// Waits until every peer is connected.
    pub(crate) async fn joined(&self) -> Result<()> {
        for peer in &self.spec.peers {
            let what = format!("{} to be connected to {peer}", self.name());
            wait::until(what, READY, || async {
                match self.peer_connected(peer).await? {
                    true => Ok(()),
                    false => Err("it is not".to_owned()),
                }
            })
            .await?;
        }
        Ok(())
    }

    /// This cluster, as others keep it in a Secret.
    async fn as_peer(&self) -> Result<PeerSecret> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client(), NAMESPACE);
        let what = format!("what others must know of {}", self.name());
        let info = wait::until(what, Duration::from_secs(30), || async {
            let map = maps.get_opt(names::CLUSTER_INFO).await.map_err(|e| e.to_string())?;
            let map = map.ok_or_else(|| format!("there is no ConfigMap {}", names::CLUSTER_INFO))?;
            ClusterInfo::parse(&map).map_err(|e| e.to_string())
        })
        .await?;
        let endpoint = |g: &std::net::SocketAddr| PeerEndpoint { host: g.ip().to_string(), port: g.port() };
        Ok(PeerSecret {
            cluster: info.cluster,
            endpoints: self.gateways().iter().map(endpoint).collect(),
            ca: info.ca,
            server_name: Some(info.server_name),
            addresses: BTreeMap::new(),
            identity: None,
            relation: Relation::Connected,
        })
    }

    async fn publish_service(&self) -> Result<()> {
        let doing = || format!("publishing the gateway of {}", self.name());
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let services: Api<Service> = Api::namespaced(self.client(), NAMESPACE);
        // Without a selector: the gateways are no pods here.
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": names::APISERVER, "namespace": NAMESPACE},
            "spec": {
                "type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ipFamilyPolicy": "PreferDualStack",
                "ports": [{"name": "gateway", "port": GATEWAY, "targetPort": GATEWAY, "protocol": "TCP"}],
            },
        });
        services.patch(names::APISERVER, &params, &Patch::Apply(service)).await.doing(doing)?;
        let addresses = |replica| self.net.plan.apiserver(replica).into_iter().map(|net| net.addr());
        let all: Vec<std::net::IpAddr> = (0..self.spec.replicas).flat_map(addresses).collect();
        let ingress: Vec<_> = all.iter().map(|address| json!({"ip": address.to_string()})).collect();
        let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
        let merge = PatchParams::default();
        services.patch_status(names::APISERVER, &merge, &Patch::Merge(status)).await.doing(doing)?;

        let slices: Api<EndpointSlice> = Api::namespaced(self.client(), NAMESPACE);
        for (family, v4) in [("IPv4", true), ("IPv6", false)] {
            let endpoints: Vec<_> = all
                .iter()
                .filter(|address| address.is_ipv4() == v4)
                .map(|address| json!({"addresses": [address.to_string()], "conditions": {"ready": true}}))
                .collect();
            if endpoints.is_empty() {
                continue;
            }
            let name = format!("{}-{}", names::APISERVER, family.to_lowercase());
            let slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": name, "namespace": NAMESPACE, "labels": {
                    "kubernetes.io/service-name": names::APISERVER,
                    "endpointslice.kubernetes.io/managed-by": FIELD_MANAGER,
                }},
                "addressType": family, "endpoints": endpoints,
                "ports": [{"name": "gateway", "port": GATEWAY, "protocol": "TCP"}],
            });
            slices.patch(&name, &params, &Patch::Apply(slice)).await.doing(doing)?;
        }
        Ok(())
    }
}
