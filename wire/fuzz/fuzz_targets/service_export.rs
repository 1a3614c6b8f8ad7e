//! A service export.
#![no_main]

use isthmus_wire::McsApiServiceSpec;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = McsApiServiceSpec::decode(bytes) {
        assert_eq!(McsApiServiceSpec::decode(&value.encode()), Ok(value));
    }
});
