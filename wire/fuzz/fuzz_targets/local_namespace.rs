//! A namespace for the cluster's own agents.
#![no_main]

use isthmus_wire::local::LocalNamespace;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = LocalNamespace::decode(bytes) {
        assert_eq!(LocalNamespace::decode(&value.encode()), Ok(value));
    }
});
