//! An identity's labels.
#![no_main]

use isthmus_wire::Labels;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = Labels::decode(bytes) {
        assert_eq!(Labels::decode(&value.encode()), Ok(value));
    }
});
