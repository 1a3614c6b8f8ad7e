//! A key and a value as a peer sends them, through the importer's checks: what passes belongs to the peer.
#![no_main]

use isthmus_wire::validate::{self, RemoteCluster};
use isthmus_wire::{Key, MaxConnectedClusters};

libfuzzer_sys::fuzz_target!(|pair: (&[u8], &[u8])| {
    let remote = RemoteCluster {
        name: "beta".parse().expect("valid"),
        id: 2.try_into().expect("valid"),
        max_connected_clusters: MaxConnectedClusters::C255,
    };
    let Ok(key) = Key::parse(pair.0) else { return };
    if validate::entry(&key, pair.1, &remote).is_ok() {
        assert!(key.mirrored(&remote.name).is_some(), "{key} passed, but is not the peer's to export");
    }
});
