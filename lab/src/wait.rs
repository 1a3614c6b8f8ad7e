//! Waiting for a condition, with a deadline and with what was seen last.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::{LabError, Result};

/// Asks `condition` until it answers `Ok`, at first every few milliseconds and then less often. What it answers
/// instead, in words, is part of the error.
///
/// # Errors
/// [`LabError::Deadline`].
pub async fn until<T, E, F>(
    what: impl Into<String>,
    within: Duration,
    mut condition: impl FnMut() -> F,
) -> Result<T>
where
    E: std::fmt::Display,
    F: Future<Output = Result<T, E>>,
{
    let deadline = Instant::now() + within;
    let mut pause = Duration::from_millis(5);
    loop {
        let last = match condition().await {
            Ok(value) => return Ok(value),
            Err(last) => last,
        };
        if Instant::now() + pause > deadline {
            return Err(LabError::Deadline { what: what.into(), within, last: last.to_string() });
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_millis(100));
    }
}
