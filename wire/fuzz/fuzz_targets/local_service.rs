//! A Service for the cluster's own agents.
#![no_main]

use isthmus_wire::local::LocalService;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = LocalService::decode(bytes) {
        assert_eq!(LocalService::decode(&value.encode()), Ok(value));
    }
});
