//! A heartbeat or canary.
#![no_main]

use isthmus_wire::Timestamp;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = Timestamp::decode(bytes) {
        assert_eq!(Timestamp::decode(&value.encode()), Ok(value));
    }
});
