//! An endpoint slice: compression and protocol buffer.
#![no_main]

use isthmus_wire::ClusterEndpointSlice;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = ClusterEndpointSlice::decode(bytes) {
        assert_eq!(ClusterEndpointSlice::decode(&value.encode()), Ok(value));
    }
});
