//! An address and its identity.
#![no_main]

use isthmus_wire::IpIdentityPair;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = IpIdentityPair::decode(bytes) {
        assert_eq!(IpIdentityPair::decode(&value.encode()), Ok(value));
    }
});
