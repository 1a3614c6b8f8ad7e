//! A network policy for the cluster's own agents.
#![no_main]

use isthmus_wire::local::LocalPolicy;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = LocalPolicy::decode(bytes) {
        assert_eq!(LocalPolicy::decode(&value.encode()), Ok(value));
    }
});
