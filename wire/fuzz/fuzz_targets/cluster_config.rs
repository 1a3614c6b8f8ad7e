//! A cluster's configuration.
#![no_main]

use isthmus_wire::ClusterConfig;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = ClusterConfig::decode(bytes) {
        assert_eq!(ClusterConfig::decode(&value.encode()), Ok(value));
    }
});
