//! Metrics as a program tells them.

use prometheus_client::{encoding::text::encode, registry::Registry};

/// All of them.
pub(crate) fn told(registry: &Registry) -> String {
    let mut text = String::new();
    encode(&mut text, registry).unwrap();
    text
}

/// The value of one, named with its labels; none if there is no such.
pub(crate) fn metric(registry: &Registry, series: &str) -> Option<f64> {
    let text = told(registry);
    let (_, value) =
        text.lines().filter_map(|line| line.rsplit_once(' ')).find(|(name, _)| *name == series)?;
    value.parse().ok()
}
