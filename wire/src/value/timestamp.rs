//! RFC 3339 times: heartbeats, sync canaries, creation times.

use std::fmt;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ValueError;
use crate::error::bounded;

/// A time with a resolution of one second, in UTC. Readers never compare heartbeats and canaries; what counts is that
/// they were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(DateTime<Utc>);

impl Timestamp {
    /// The present time.
    pub fn now() -> Self {
        Utc::now().into()
    }

    /// Reads a heartbeat or a canary.
    ///
    /// # Errors
    /// Not a time of RFC 3339.
    pub fn decode(bytes: &[u8]) -> Result<Self, ValueError> {
        const LIMIT: usize = 128;
        if bytes.len() > LIMIT {
            return Err(ValueError::TooLarge { size: bytes.len(), limit: LIMIT });
        }
        let text = std::str::from_utf8(bytes).map_err(|error| ValueError::field(".", error))?;
        parse(text).map_err(|problem| ValueError::field(".", problem))
    }

    /// The time as text.
    pub fn encode(&self) -> Bytes {
        self.to_string().into()
    }

    /// As chrono's type.
    pub fn datetime(self) -> DateTime<Utc> {
        self.0
    }
}

fn parse(text: &str) -> Result<Timestamp, String> {
    DateTime::parse_from_rfc3339(text)
        .map(|time| time.to_utc().into())
        .map_err(|error| format!("{:?} is not an RFC 3339 time: {error}", bounded(text)))
}

impl From<DateTime<Utc>> for Timestamp {
    fn from(time: DateTime<Utc>) -> Self {
        // A leap second is chrono's `:59` with more than a second of nanoseconds: cut to whole seconds as well.
        Self(DateTime::from_timestamp(time.timestamp(), 0).unwrap_or(time))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0.to_rfc3339_opts(SecondsFormat::Secs, true))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_utc_with_whole_seconds() {
        for (from, to) in [
            ("2026-11-20T12:38:19Z", "2026-11-20T12:38:19Z"),
            ("2026-11-20T13:38:19+01:00", "2026-11-20T12:38:19Z"),
            ("2026-11-20T12:38:19.999999999Z", "2026-11-20T12:38:19Z"),
        ] {
            assert_eq!(Timestamp::decode(from.as_bytes()).expect(from).to_string(), to);
        }
        for bad in ["", "now", "2026-11-20", "2026-13-20T12:38:19Z"] {
            assert!(Timestamp::decode(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
