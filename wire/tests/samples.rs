//! What an unmodified Cilium clustermesh-apiserver exported is read, believed, and written again byte for byte.

use isthmus_wire::{
    ClusterConfig, ClusterService, IpIdentityPair, Key, Labels, McsApiServiceSpec, Node, Timestamp, validate,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Row {
    key: String,
    value: String,
}

fn rows() -> Vec<Row> {
    let rows = include_str!("data/cilium-export.jsonl").lines();
    rows.map(|line| serde_json::from_str(line).expect("a row of the sample")).collect()
}

#[test]
fn every_row_is_emitted_again_byte_for_byte() {
    let rows = rows();
    assert_eq!(rows.len(), 11);
    for Row { key: text, value } in rows {
        let key = Key::parse(text.as_bytes()).expect(&text);
        assert_eq!(key.to_bytes(), text);
        let bytes = value.as_bytes();
        let emitted = match &key {
            Key::ClusterConfig(_) => ClusterConfig::decode(bytes).expect(&text).encode(),
            Key::Identity { .. } => Labels::decode(bytes).expect(&text).encode(),
            Key::Ip { .. } => IpIdentityPair::decode(bytes).expect(&text).encode(),
            Key::Node { .. } => Node::decode(bytes).expect(&text).encode(),
            Key::ServiceExport(_) => McsApiServiceSpec::decode(bytes).expect(&text).encode(),
            Key::Service(_) => ClusterService::decode(bytes).expect(&text).encode(),
            Key::Synced { .. } => Timestamp::decode(bytes).expect(&text).encode(),
            other => panic!("no value type for {other}"),
        };
        assert_eq!(emitted, value, "{text}");
    }
}

#[test]
fn every_row_is_what_that_cluster_may_say() {
    let rows = rows();
    let config = ClusterConfig::decode(rows[0].value.as_bytes()).expect("the cluster's configuration");
    let own = 1.try_into().expect("valid");
    let name = "real-a".parse().expect("valid");
    let remote =
        validate::cluster_config(&name, &config, own, config.capabilities.mesh_size()).expect("compatible");
    for Row { key, value } in &rows {
        let key = Key::parse(key.as_bytes()).expect(key);
        if key.resource().is_some() {
            validate::entry(&key, value.as_bytes(), &remote).unwrap_or_else(|error| panic!("{key}: {error}"));
        }
    }
}
