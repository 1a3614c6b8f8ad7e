//! The kinds that are watched.

use isthmus_crds::{CiliumEndpoint, CiliumIdentity, CiliumNode};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use isthmus_wire::local::PolicyKind;

use super::facts::{
    CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy, EndpointFact, IdentityFact, NamespaceFact,
    NetworkPolicy, NodeFact, PolicyFact, ServiceFact, SliceFact,
};
use super::translate::{Event, Input};
use super::watch::Watched;

const IF_CILIUM_IS_ABSENT: &str = "is Cilium installed? Without it, use --source=kubernetes";

impl Watched for Namespace {
    const API_VERSION: &'static str = "v1";
    const KIND: &'static str = "Namespace";

    fn input(event: Event<NamespaceFact>) -> Input {
        Input::Namespace(event)
    }
}

impl Watched for Service {
    const API_VERSION: &'static str = "v1";
    const KIND: &'static str = "Service";

    fn input(event: Event<ServiceFact>) -> Input {
        Input::Service(event)
    }
}

impl Watched for EndpointSlice {
    const API_VERSION: &'static str = "discovery.k8s.io/v1";
    const KIND: &'static str = "EndpointSlice";

    fn input(event: Event<SliceFact>) -> Input {
        Input::Slice(event)
    }
}

impl Watched for Node {
    const API_VERSION: &'static str = "v1";
    const KIND: &'static str = "Node";

    fn input(event: Event<NodeFact>) -> Input {
        Input::Node(event)
    }
}

impl Watched for Pod {
    const API_VERSION: &'static str = "v1";
    const KIND: &'static str = "Pod";

    fn input(event: Event<EndpointFact>) -> Input {
        Input::Endpoint(event)
    }
}

impl Watched for CiliumIdentity {
    const API_VERSION: &'static str = "cilium.io/v2";
    const KIND: &'static str = "CiliumIdentity";
    const IF_ABSENT: &'static str = "apply crds/yaml/ciliumidentities.cilium.io.yaml to the cluster";

    fn input(event: Event<IdentityFact>) -> Input {
        Input::Identity(event)
    }
}

impl Watched for CiliumNode {
    const API_VERSION: &'static str = "cilium.io/v2";
    const KIND: &'static str = "CiliumNode";
    const IF_ABSENT: &'static str = IF_CILIUM_IS_ABSENT;

    fn input(event: Event<NodeFact>) -> Input {
        Input::Node(event)
    }
}

impl Watched for CiliumEndpoint {
    const API_VERSION: &'static str = "cilium.io/v2";
    const KIND: &'static str = "CiliumEndpoint";
    const IF_ABSENT: &'static str = IF_CILIUM_IS_ABSENT;

    fn input(event: Event<EndpointFact>) -> Input {
        Input::Endpoint(event)
    }
}

impl Watched for NetworkPolicy {
    const API_VERSION: &'static str = "networking.k8s.io/v1";
    const KIND: &'static str = "NetworkPolicy";

    fn input(event: Event<PolicyFact>) -> Input {
        Input::Policy(PolicyKind::NetworkPolicy, event)
    }
}

impl Watched for CiliumNetworkPolicy {
    const API_VERSION: &'static str = "cilium.io/v2";
    const KIND: &'static str = "CiliumNetworkPolicy";
    const OPTIONAL: Option<&'static str> = Some("ciliumnetworkpolicies.cilium.io");

    fn input(event: Event<PolicyFact>) -> Input {
        Input::Policy(PolicyKind::CiliumNetworkPolicy, event)
    }
}

impl Watched for CiliumClusterwideNetworkPolicy {
    const API_VERSION: &'static str = "cilium.io/v2";
    const KIND: &'static str = "CiliumClusterwideNetworkPolicy";
    const OPTIONAL: Option<&'static str> = Some("ciliumclusterwidenetworkpolicies.cilium.io");

    fn input(event: Event<PolicyFact>) -> Input {
        Input::Policy(PolicyKind::CiliumClusterwideNetworkPolicy, event)
    }
}
