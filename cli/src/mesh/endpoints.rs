//! Where other clusters reach a cluster's gateway: what its Service says, or what the user says.

use std::net::IpAddr;

use isthmus_crds::names::{self, GATEWAY_PORT};
use isthmus_crds::peer::{MAX_ENDPOINTS, PeerEndpoint};
use k8s_openapi::api::core::v1::{Service, ServicePort};

use super::facts::{Facts, NodeFacts};

/// Nodes whose ports are given to peers: any of them forwards to the gateway, and a few outlive a lost one.
const NODES: usize = 3;

/// The endpoints that a cluster's Service offers to other clusters.
///
/// # Errors
/// In words: why it offers none, and what to do.
pub(crate) fn of(facts: &Facts) -> Result<Vec<PeerEndpoint>, String> {
    let name = format!("Service {}/{}", facts.namespace, names::APISERVER);
    let Some(service) = &facts.service else {
        return Err(format!("there is no {name}; apply one, or say where the gateway is"));
    };
    let offered = offered(service, &facts.nodes).map_err(|why| format!("{name} {why}"))?;
    Ok(offered.into_iter().take(MAX_ENDPOINTS).collect())
}

fn offered(service: &Service, nodes: &[NodeFacts]) -> Result<Vec<PeerEndpoint>, String> {
    let spec = service.spec.clone().unwrap_or_default();
    let ports = spec.ports.unwrap_or_default();
    let port = gateway_port(&ports).ok_or("has no port for the gateway: it needs port 2379")?;
    let number = u16::try_from(port.port).unwrap_or(GATEWAY_PORT);
    let external: Vec<PeerEndpoint> =
        spec.external_ips.iter().flatten().filter_map(|ip| endpoint(ip, number)).collect();
    if !external.is_empty() {
        return Ok(external);
    }
    match spec.type_.as_deref() {
        Some("LoadBalancer") => {
            let balancer = service.status.clone().and_then(|status| status.load_balancer);
            let ingress = balancer.and_then(|balancer| balancer.ingress).unwrap_or_default();
            let found: Vec<PeerEndpoint> = ingress
                .iter()
                .filter_map(|at| endpoint(at.ip.as_deref().or(at.hostname.as_deref())?, number))
                .collect();
            if found.is_empty() {
                return Err(
                    "is of type LoadBalancer and has no address yet: wait for it, or make it a NodePort \
                            if this cluster has no load balancers"
                        .into(),
                );
            }
            Ok(found)
        }
        Some("NodePort") => {
            let number = port.node_port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
            let number = number.ok_or("is of type NodePort and has no node port yet")?;
            let found: Vec<PeerEndpoint> = best(nodes)
                .filter_map(|node| endpoint(&node.internal.first()?.to_string(), number))
                .take(NODES)
                .collect();
            if found.is_empty() {
                return Err("is of type NodePort, and no node has an InternalIP".into());
            }
            Ok(found)
        }
        other => Err(format!(
            "is of type {}, which other clusters cannot reach: make it a LoadBalancer or a NodePort, or say where the \
             gateway is",
            other.unwrap_or("ClusterIP")
        )),
    }
}

/// Ready nodes first, otherwise in their own order, so that the same nodes are chosen each time.
fn best(nodes: &[NodeFacts]) -> impl Iterator<Item = &NodeFacts> {
    let mut nodes: Vec<&NodeFacts> = nodes.iter().filter(|node| !node.internal.is_empty()).collect();
    nodes.sort_by(|a, b| b.ready.cmp(&a.ready).then_with(|| a.name.cmp(&b.name)));
    nodes.into_iter()
}

fn gateway_port(ports: &[ServicePort]) -> Option<&ServicePort> {
    let by_number = ports.iter().find(|port| port.port == i32::from(GATEWAY_PORT));
    let only = if let [only] = ports { Some(only) } else { None };
    by_number.or(only)
}

fn endpoint(host: &str, port: u16) -> Option<PeerEndpoint> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Some(PeerEndpoint { host: ip.to_string(), port });
    }
    // The type's own parser decides what is a name.
    format!("https://{host}:{port}").parse().ok()
}

/// What a user writes: `HOST`, `HOST:PORT` or `https://HOST:PORT`.
///
/// # Errors
/// In words.
pub(crate) fn given(text: &str) -> Result<PeerEndpoint, String> {
    let text = text.trim();
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(PeerEndpoint { host: ip.to_string(), port: GATEWAY_PORT });
    }
    let full = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    full.parse().map_err(|problem| format!("{text:?} {problem}"))
}

/// An endpoint, and the context it is of where several could be meant: `CONTEXT=HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GivenEndpoint {
    /// The context, if it is said.
    pub(crate) context: Option<String>,
    /// Where its gateway is.
    pub(crate) endpoint: PeerEndpoint,
}

impl std::str::FromStr for GivenEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Contexts may contain anything, endpoints contain no `=`.
        let (context, rest) = match text.rsplit_once('=') {
            Some((context, rest)) => (Some(context.trim().to_owned()), rest),
            None => (None, text),
        };
        Ok(Self { context, endpoint: given(rest)? })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(spec: Value, ingress: Value) -> Service {
        let value = json!({"spec": spec, "status": {"loadBalancer": {"ingress": ingress}}});
        serde_json::from_value(value).expect("a Service")
    }

    fn node(name: &str, ip: &str, ready: bool) -> NodeFacts {
        let internal = ip.parse().into_iter().collect();
        NodeFacts { name: name.into(), internal, ready, has_range: true, encrypts: true }
    }

    fn found(service: &Service, nodes: &[NodeFacts]) -> Vec<String> {
        offered(service, nodes).expect("endpoints").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_load_balancer_is_reached_at_its_addresses() {
        let spec = json!({"type": "LoadBalancer", "ports": [{"port": 2379, "nodePort": 32379}]});
        let ingress = json!([{"ip": "192.0.2.7"}, {"ip": "2001:db8::7"}, {"hostname": "LB.example.com"}]);
        assert_eq!(
            found(&service(spec.clone(), ingress), &[]),
            ["https://192.0.2.7:2379", "https://[2001:db8::7]:2379", "https://lb.example.com:2379"]
        );
        let error = offered(&service(spec, json!([])), &[]).expect_err("no address");
        assert!(error.contains("no address yet"), "{error}");
    }

    #[test]
    fn a_node_port_is_reached_at_a_few_nodes_that_are_ready() {
        let spec = json!({"type": "NodePort", "ports": [{"port": 9962, "nodePort": 1}, {"port": 2379, "nodePort": 32379}]});
        let nodes = [
            node("n4", "172.18.0.4", true),
            node("n1", "172.18.0.1", false),
            node("n0", "", true),
            node("n3", "172.18.0.3", true),
            node("n2", "fd00::2", true),
            node("n5", "172.18.0.5", true),
        ];
        assert_eq!(
            found(&service(spec.clone(), json!([])), &nodes),
            ["https://[fd00::2]:32379", "https://172.18.0.3:32379", "https://172.18.0.4:32379"]
        );
        assert_eq!(found(&service(spec.clone(), json!([])), &nodes[1..2]), ["https://172.18.0.1:32379"]);
        offered(&service(spec, json!([])), &[]).expect_err("no nodes");
    }

    #[test]
    fn external_addresses_come_first_and_a_cluster_address_is_none() {
        let ports = json!([{"port": 2379}]);
        let spec = json!({"type": "ClusterIP", "externalIPs": ["192.0.2.9"], "ports": ports});
        assert_eq!(found(&service(spec, json!([])), &[]), ["https://192.0.2.9:2379"]);
        let error = offered(&service(json!({"type": "ClusterIP", "ports": ports}), json!([])), &[]);
        assert!(error.expect_err("not reachable").contains("NodePort"));
    }

    #[test]
    fn endpoints_are_given_as_people_write_them() {
        for (text, reads) in [
            ("192.0.2.1", "https://192.0.2.1:2379"),
            ("192.0.2.1:32379", "https://192.0.2.1:32379"),
            ("2001:db8::1", "https://[2001:db8::1]:2379"),
            ("https://beta.example:1", "https://beta.example:1"),
            ("beta.example", "https://beta.example:2379"),
        ] {
            assert_eq!(given(text).expect(text).to_string(), reads);
        }
        for text in ["", "http://a:1", "a:b", "a/b", "https://"] {
            given(text).expect_err(text);
        }
        let named: GivenEndpoint = "kind-beta=192.0.2.1:32379".parse().expect("an endpoint");
        assert_eq!(named.context.as_deref(), Some("kind-beta"));
        assert_eq!(named.endpoint.to_string(), "https://192.0.2.1:32379");
    }
}
