//! The device between a network namespace's TUN interface and peers that the test plays by hand, datagram by datagram:
//! what it takes, what it refuses and under which name it counts that. As root.

#[path = "../support/netns.rs"]
#[allow(dead_code, reason = "shared with tests that need more of it")]
mod netns;

mod bad_input;
mod field;
mod keys;
mod lifetime;
mod traffic;
