//! A node.
#![no_main]

use isthmus_wire::Node;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = Node::decode(bytes) {
        assert_eq!(Node::decode(&value.encode()), Ok(value));
    }
});
