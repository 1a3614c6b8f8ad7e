//! What the tests against other implementations and the benchmark share: network namespaces, and devices of several
//! makes between them. As root.
//!
//! Namespaces have no name: they end with the test, however it ends. So do the processes.

pub(crate) mod device;
pub(crate) mod netns;

use std::time::{Duration, Instant};

/// How long anything that is waited for may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Waits until `look` finds something.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < DEADLINE, "waited in vain for: {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}
