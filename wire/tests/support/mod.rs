//! Strategies: any key and any value that the types can hold.

use std::collections::BTreeMap;
use std::net::IpAddr;

use isthmus_wire::annotation::Affinity;
use isthmus_wire::key::ObjectKey;
use isthmus_wire::local::{
    LocalBackend, LocalNamespace, LocalPolicy, LocalPort, LocalService, PolicyKey, PolicyKind,
};
use isthmus_wire::value::*;
use isthmus_wire::*;
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;

pub(crate) fn cluster_name() -> impl Strategy<Value = ClusterName> {
    "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?".prop_map(|name| name.parse().expect("made to be valid"))
}

pub(crate) fn namespace() -> impl Strategy<Value = Namespace> {
    "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?".prop_map(|name| name.parse().expect("made to be valid"))
}

pub(crate) fn object_name() -> impl Strategy<Value = ObjectName> {
    "[a-z0-9]([a-z0-9.-]{0,80}[a-z0-9])?".prop_map(|name| name.parse().expect("made to be valid"))
}

pub(crate) fn cluster_id() -> impl Strategy<Value = ClusterId> {
    (1..=511u32).prop_map(|id| id.try_into().expect("made to be valid"))
}

pub(crate) fn identity() -> impl Strategy<Value = NumericIdentity> {
    any::<u32>().prop_map(NumericIdentity)
}

/// An address as Go holds it: IPv4 never in IPv6 form.
pub(crate) fn ip() -> impl Strategy<Value = IpAddr> {
    any::<IpAddr>().prop_map(|ip| ip.to_canonical())
}

pub(crate) fn ip_entry() -> impl Strategy<Value = IpEntry> {
    (ip(), option::of(0..=128u8)).prop_map(|(ip, length)| match length {
        None => IpEntry::Host(ip),
        Some(length) => {
            let length = if ip.is_ipv4() { length.min(32) } else { length };
            IpEntry::Prefix(format!("{ip}/{length}").parse().expect("made to be valid"))
        }
    })
}

/// Text of any kind, with what Go escapes among it.
pub(crate) fn text() -> impl Strategy<Value = String> {
    prop_oneof![any::<String>(), "[a-z<>&\u{2028}\u{2029}\"\\\\\u{0}-\u{1f}]{0,12}", Just(String::new())]
}

fn texts() -> impl Strategy<Value = BTreeMap<String, String>> {
    btree_map(text(), text(), 0..4)
}

pub(crate) fn tree() -> impl Strategy<Value = Tree> {
    prop_oneof![Just(Tree::State), Just(Tree::Cache)]
}

fn prefix() -> impl Strategy<Value = Prefix> {
    let resource = || proptest::sample::select(Resource::ALL.to_vec());
    prop_oneof![
        resource().prop_map(Prefix::State),
        resource().prop_map(Prefix::Cache),
        Just(Prefix::LocalServices),
        Just(Prefix::LocalPolicies),
        Just(Prefix::LocalNamespaces)
    ]
}

fn object_key() -> impl Strategy<Value = ObjectKey> {
    (tree(), cluster_name(), namespace(), object_name())
        .prop_map(|(tree, cluster, namespace, name)| ObjectKey { tree, cluster, namespace, name })
}

pub(crate) fn key() -> impl Strategy<Value = Key> {
    prop_oneof![
        Just(Key::Heartbeat),
        Just(Key::HasClusterConfig),
        "[0-9a-f]{1,16}/[0-9a-f]{1,16}".prop_map(Key::InitLock),
        "[0-9a-f]{1,16}".prop_map(Key::KvStoreMeshLock),
        cluster_name().prop_map(Key::ClusterConfig),
        (cluster_name(), prefix()).prop_map(|(cluster, prefix)| Key::Synced { cluster, prefix }),
        (tree(), cluster_name(), object_name()).prop_map(|(tree, cluster, name)| Key::Node {
            tree,
            cluster,
            name
        }),
        (option::of(cluster_name()), identity()).prop_map(|(mirror_of, id)| Key::Identity { mirror_of, id }),
        "value/[a-z:=;]{1,40}/[0-9.]{1,10}".prop_map(Key::IdentityInternal),
        (option::of(cluster_name()), ip_entry()).prop_map(|(mirror_of, entry)| Key::Ip { mirror_of, entry }),
        object_key().prop_map(Key::Service),
        object_key().prop_map(Key::EndpointSlice),
        object_key().prop_map(Key::ServiceExport),
        (namespace(), object_name()).prop_map(|(namespace, name)| Key::LocalService { namespace, name }),
        policy_key().prop_map(Key::LocalPolicy),
        namespace().prop_map(Key::LocalNamespace),
        cluster_name().prop_map(Key::Refusing),
    ]
}

fn policy_key() -> impl Strategy<Value = PolicyKey> {
    (proptest::sample::select(PolicyKind::ALL.to_vec()), namespace(), object_name()).prop_map(
        |(kind, namespace, name)| PolicyKey {
            kind,
            namespace: kind.is_namespaced().then_some(namespace),
            name,
        },
    )
}

pub(crate) fn labels() -> impl Strategy<Value = Labels> {
    vec(("[a-z]{0,4}", "[^=;]{1,12}", "[^;]{0,12}"), 0..6).prop_map(|items| {
        let mut labels = Labels::new();
        for (source, key, value) in items {
            labels.insert(&source, &key, &value).expect("made to be valid");
        }
        labels
    })
}

pub(crate) fn cluster_config() -> impl Strategy<Value = ClusterConfig> {
    let size = option::of(prop_oneof![Just(MaxConnectedClusters::C255), Just(MaxConnectedClusters::C511)]);
    let mode = prop_oneof![
        Just(EndpointSlicesExportMode::ServicesOnly),
        Just(EndpointSlicesExportMode::ServicesAndEndpointSlices),
        Just(EndpointSlicesExportMode::EndpointSlicesOnly),
    ];
    (cluster_id(), any::<bool>(), any::<bool>(), size, any::<Option<bool>>(), mode).prop_map(
        |(id, synced_canaries, cached, max_connected_clusters, service_exports_enabled, mode)| {
            ClusterConfig {
                id,
                capabilities: Capabilities {
                    synced_canaries,
                    cached,
                    max_connected_clusters,
                    service_exports_enabled,
                    endpoint_slices_export_mode: mode,
                },
            }
        },
    )
}

fn pod_cidr() -> impl Strategy<Value = PodCidr> {
    ip_entry().prop_map(|entry| PodCidr(entry.net()))
}

fn node_address() -> impl Strategy<Value = NodeAddress> {
    prop_oneof![
        ip().prop_map(|ip| NodeAddress::new(AddressKind::InternalIp, ip)),
        text().prop_map(|address| NodeAddress { kind: AddressKind::Hostname, address }),
        text().prop_map(|kind| NodeAddress { kind: kind.as_str().into(), address: "192.0.2.1".to_owned() }),
    ]
}

pub(crate) fn node() -> impl Strategy<Value = Node> {
    let names = (cluster_name(), cluster_id(), object_name());
    let addresses = (vec(node_address(), 0..4), vec(option::of(ip()), 4));
    let cidrs =
        (option::of(pod_cidr()), vec(pod_cidr(), 0..3), option::of(pod_cidr()), vec(pod_cidr(), 0..3));
    let rest = (text(), any::<u8>(), option::of(texts()), option::of(texts()), any::<u32>(), text(), text());
    (names, addresses, cidrs, rest).prop_map(|(names, (addresses, ips), cidrs, rest)| Node {
        addresses,
        ipv4_pod_cidr: cidrs.0,
        ipv4_secondary_pod_cidrs: cidrs.1,
        ipv6_pod_cidr: cidrs.2,
        ipv6_secondary_pod_cidrs: cidrs.3,
        ipv4_health_ip: ips[0],
        ipv6_health_ip: ips[1],
        ipv4_ingress_ip: ips[2],
        ipv6_ingress_ip: ips[3],
        source: rest.0,
        encryption_key: rest.1,
        labels: rest.2,
        annotations: rest.3,
        node_identity: rest.4,
        wireguard_public_key: rest.5,
        boot_id: rest.6,
        ..Node::new(names.0, names.1, names.2)
    })
}

pub(crate) fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)]
}

pub(crate) fn ip_identity_pair() -> impl Strategy<Value = IpIdentityPair> {
    let port = (text(), any::<u16>(), protocol()).prop_map(|(name, port, protocol)| NamedPort {
        name,
        port,
        protocol,
    });
    let texts = (text(), text(), text(), text());
    (ip_entry(), option::of(ip()), identity(), any::<u8>(), texts, vec(port, 0..3)).prop_map(
        |(entry, host_ip, id, key, (metadata, namespace, pod_name, service_account), named_ports)| {
            IpIdentityPair {
                entry,
                host_ip,
                id,
                key,
                metadata,
                namespace,
                pod_name,
                service_account,
                named_ports,
            }
        },
    )
}

fn port_name() -> impl Strategy<Value = PortName> {
    text().prop_map(|name| name.as_str().into())
}

fn service_ports() -> impl Strategy<Value = ServicePorts> {
    let port = (protocol(), any::<u16>()).prop_map(|(protocol, port)| ServicePort { protocol, port });
    btree_map(port_name(), port, 0..3).prop_map(ServicePorts)
}

pub(crate) fn cluster_service() -> impl Strategy<Value = ClusterService> {
    let zone = (text(), option::of(vec(text(), 0..3))).prop_map(|(zone, hints)| Zone {
        zone,
        for_zones: hints.map(|hints| hints.into_iter().map(|name| ZoneHint { name }).collect()),
    });
    let names = (cluster_name(), cluster_id(), namespace(), object_name());
    let addresses = (btree_map(ip(), service_ports(), 0..3), btree_map(ip(), service_ports(), 0..6));
    let details = (btree_map(ip(), text(), 0..3), btree_map(ip(), zone, 0..3));
    (names, addresses, details, texts(), texts(), any::<bool>(), any::<bool>()).prop_map(
        |(names, addresses, details, labels, selector, include_external, shared)| ClusterService {
            frontends: addresses.0,
            backends: addresses.1,
            hostnames: details.0,
            zones: details.1,
            labels,
            selector,
            include_external,
            shared,
            ..ClusterService::new(names.0, names.1, names.2, names.3)
        },
    )
}

pub(crate) fn service_export() -> impl Strategy<Value = McsApiServiceSpec> {
    let port = (text(), protocol(), option::of(text()), any::<u16>())
        .prop_map(|(name, protocol, app_protocol, port)| ExportedPort { name, protocol, app_protocol, port });
    let kind = prop_oneof![Just(ExportType::ClusterSetIP), Just(ExportType::Headless)];
    let config = option::of(option::of(any::<Option<i32>>())).prop_map(|config| {
        config.map(|config| SessionAffinityConfig {
            client_ip: config.map(|timeout_seconds| ClientIpConfig { timeout_seconds }),
        })
    });
    let affinity = prop_oneof![Just(SessionAffinity::None), Just(SessionAffinity::ClientIP)];
    let families = vec(prop_oneof![Just(IpFamily::IPv4), Just(IpFamily::IPv6)], 0..3);
    let policy = option::of(prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)]);
    let names = (cluster_name(), namespace(), object_name(), timestamp(), kind);
    let rest = (vec(port, 0..3), affinity, config, families, policy, option::of(text()));
    (names, texts(), texts(), rest).prop_map(|(names, annotations, labels, rest)| {
        let mut spec = McsApiServiceSpec::new(names.0, names.1, names.2, names.3, names.4);
        spec.annotations = annotations;
        spec.labels = labels;
        (spec.ports, spec.session_affinity, spec.session_affinity_config) = (rest.0, rest.1, rest.2);
        (spec.ip_families, spec.internal_traffic_policy, spec.traffic_distribution) =
            (rest.3, rest.4, rest.5);
        spec
    })
}

/// Any time of the years 0 to 9999, which is what RFC 3339 can write.
pub(crate) fn timestamp() -> impl Strategy<Value = Timestamp> {
    (-62_167_219_200i64..=253_402_300_799).prop_map(|seconds| {
        chrono::DateTime::from_timestamp(seconds, 0).expect("within chrono's range").into()
    })
}

pub(crate) fn endpoint_slice() -> impl Strategy<Value = ClusterEndpointSlice> {
    let port = (option::of(text()), protocol(), any::<Option<u16>>(), option::of(text()))
        .prop_map(|(name, protocol, port, app_protocol)| EndpointPort { name, protocol, port, app_protocol });
    let names = (cluster_name(), cluster_id(), namespace(), object_name());
    (names, texts(), texts(), any::<bool>(), vec(port, 0..3)).prop_flat_map(
        |(names, labels, annotations, ipv6, ports)| {
            vec(endpoint(ipv6), 0..4).prop_map(move |endpoints| ClusterEndpointSlice {
                cluster: names.0.clone(),
                cluster_id: names.1,
                namespace: names.2.clone(),
                name: names.3.clone(),
                labels: labels.clone(),
                annotations: annotations.clone(),
                address_type: if ipv6 { AddressType::IPv6 } else { AddressType::IPv4 },
                endpoints,
                ports: ports.clone(),
            })
        },
    )
}

fn endpoint(ipv6: bool) -> impl Strategy<Value = Endpoint> {
    let ip = any::<u128>().prop_map(move |bits| {
        if ipv6 {
            IpAddr::from((bits | 1 << 127).to_be_bytes())
        } else {
            IpAddr::from((bits as u32).to_be_bytes())
        }
    });
    let conditions = any::<[Option<bool>; 3]>().prop_map(|[ready, serving, terminating]| Conditions {
        ready,
        serving,
        terminating,
    });
    let texts = (option::of(text()), texts(), option::of(text()), option::of(text()));
    (vec(ip, 0..3), conditions, texts, option::of(vec(text(), 0..3))).prop_map(
        |(addresses, conditions, (hostname, deprecated_topology, node_name, zone), for_zones)| Endpoint {
            addresses,
            conditions,
            hostname,
            deprecated_topology,
            node_name,
            zone,
            for_zones,
        },
    )
}

pub(crate) fn local_service() -> impl Strategy<Value = LocalService> {
    let port = (port_name(), protocol(), any::<u16>()).prop_map(|(name, protocol, port)| LocalPort {
        name,
        protocol,
        port,
    });
    let place = (option::of(text()), option::of(text()), vec(text(), 0..3));
    let backend =
        (service_ports(), any::<bool>(), place).prop_map(|(ports, terminating, (node, zone, for_zones))| {
            LocalBackend { ports, terminating, node, zone, for_zones }
        });
    let affinity = prop_oneof![Just(Affinity::None), Just(Affinity::Local), Just(Affinity::Remote)];
    let lists = (vec(ip(), 0..3), vec(port, 0..3), btree_map(ip(), backend, 0..4));
    let names = (namespace(), object_name());
    let maps = (texts(), texts());
    (names, lists, any::<(bool, bool, bool)>(), affinity, any::<Option<u32>>(), maps).prop_map(
        |((namespace, name), lists, (global, shared, local), affinity, session_affinity, maps)| {
            LocalService {
                labels: maps.0,
                selector: maps.1,
                cluster_ips: lists.0,
                ports: lists.1,
                backends: lists.2,
                global,
                shared,
                affinity,
                session_affinity,
                internal_traffic_policy: if local { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
                ..LocalService::new(namespace, name)
            }
        },
    )
}

pub(crate) fn local_policy() -> impl Strategy<Value = LocalPolicy> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        text().prop_map(Into::into),
    ];
    let spec = leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Into::into),
            btree_map(text(), inner, 0..4)
                .prop_map(|fields| serde_json::Value::Object(fields.into_iter().collect())),
        ]
    });
    (text(), any::<i64>(), vec(spec, 0..3))
        .prop_map(|(uid, generation, specs)| LocalPolicy::new(uid, generation, specs))
}

pub(crate) fn local_namespace() -> impl Strategy<Value = LocalNamespace> {
    texts().prop_map(|labels| LocalNamespace { labels })
}
