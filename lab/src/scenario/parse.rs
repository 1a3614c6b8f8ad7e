//! Small values as users write them.

use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

/// `250ms`, `10s` or `2m`.
pub(super) fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    parse_duration(&text).map_err(de::Error::custom)
}

/// As [`duration`], for a field that may be left out.
pub(super) fn some_duration<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    duration(from).map(Some)
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let advice = || format!("{text:?} is no duration: write it like 250ms, 10s or 2m (at most 10m)");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| advice())?;
    let milliseconds = match &text[digits.len()..] {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => None,
    };
    match milliseconds {
        Some(ms) if ms <= 600_000 => Ok(Duration::from_millis(ms)),
        _ => Err(advice()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit_and_a_bound() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("10s"), Ok(Duration::from_secs(10)));
        for bad in ["10", "s", "-1s", "1h", "11m", "1.5s", "18446744073709551615m"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
