//! A key.
#![no_main]

use isthmus_wire::Key;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(key) = Key::parse(bytes) {
        assert_eq!(key.to_bytes(), bytes);
    }
});
