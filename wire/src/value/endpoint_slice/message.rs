//! The protocol buffer (proto2) inside of a slice's frame, field by field as section A.2 of the format lists it.

use std::collections::BTreeMap;

/// Number of the field [`ClusterEndpointSlice::endpoints`].
pub(super) const ENDPOINTS: u32 = 8;
/// Number of the field [`ClusterEndpointSlice::ports`].
pub(super) const PORTS: u32 = 9;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ClusterEndpointSlice {
    #[prost(string, optional, tag = "1")]
    pub(super) cluster: Option<String>,
    #[prost(uint32, optional, tag = "2")]
    pub(super) cluster_id: Option<u32>,
    #[prost(string, optional, tag = "3")]
    pub(super) namespace: Option<String>,
    #[prost(string, optional, tag = "4")]
    pub(super) name: Option<String>,
    #[prost(btree_map = "string, string", tag = "5")]
    pub(super) labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "6")]
    pub(super) annotations: BTreeMap<String, String>,
    #[prost(string, optional, tag = "7")]
    pub(super) address_type: Option<String>,
    #[prost(message, repeated, tag = "8")]
    pub(super) endpoints: Vec<Endpoint>,
    #[prost(message, repeated, tag = "9")]
    pub(super) ports: Vec<EndpointPort>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Endpoint {
    #[prost(string, repeated, tag = "1")]
    pub(super) addresses: Vec<String>,
    #[prost(message, optional, tag = "2")]
    pub(super) conditions: Option<Conditions>,
    #[prost(string, optional, tag = "3")]
    pub(super) hostname: Option<String>,
    #[prost(btree_map = "string, string", tag = "5")]
    pub(super) deprecated_topology: BTreeMap<String, String>,
    #[prost(string, optional, tag = "6")]
    pub(super) node_name: Option<String>,
    #[prost(string, optional, tag = "7")]
    pub(super) zone: Option<String>,
    #[prost(message, optional, tag = "8")]
    pub(super) hints: Option<Hints>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Conditions {
    #[prost(bool, optional, tag = "1")]
    pub(super) ready: Option<bool>,
    #[prost(bool, optional, tag = "2")]
    pub(super) serving: Option<bool>,
    #[prost(bool, optional, tag = "3")]
    pub(super) terminating: Option<bool>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Hints {
    #[prost(message, repeated, tag = "1")]
    pub(super) for_zones: Vec<ForZone>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ForZone {
    #[prost(string, optional, tag = "1")]
    pub(super) name: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct EndpointPort {
    #[prost(string, optional, tag = "1")]
    pub(super) name: Option<String>,
    #[prost(string, optional, tag = "2")]
    pub(super) protocol: Option<String>,
    #[prost(int32, optional, tag = "3")]
    pub(super) port: Option<i32>,
    #[prost(string, optional, tag = "4")]
    pub(super) app_protocol: Option<String>,
}
