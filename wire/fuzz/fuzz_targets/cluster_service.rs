//! A global service.
#![no_main]

use isthmus_wire::ClusterService;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = ClusterService::decode(bytes) {
        assert_eq!(ClusterService::decode(&value.encode()), Ok(value));
    }
});
