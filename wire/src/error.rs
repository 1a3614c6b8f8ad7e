//! Why bytes were not a value.

use std::fmt;

use crate::Key;

/// Longest piece of foreign text that an error repeats, in bytes.
const MAX_QUOTED: usize = 160;

/// Why a value could not be decoded. Names the field; the caller adds the key through [`DecodeError`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ValueError {
    /// Longer than any real value of this kind.
    #[error("the value is {size} bytes long; at most {limit} are accepted")]
    TooLarge {
        /// Bytes of the value.
        size: usize,
        /// Most bytes accepted.
        limit: usize,
    },
    /// A field does not hold what its type demands.
    #[error("field `{field}`: {problem}")]
    Field {
        /// Path of the field, such as `IPAddresses[1].IP`; `.` is the value itself.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The compressed frame is damaged.
    #[error("not a zstd frame: {0}")]
    Compression(String),
    /// The frame would expand beyond what any real value needs.
    #[error("the value expands to more than {limit} bytes")]
    Expands {
        /// Most bytes accepted after decompression.
        limit: usize,
    },
    /// The message is not the protocol buffer that was expected.
    #[error("not a ClusterEndpointSlice message: {0}")]
    Protobuf(String),
}

impl ValueError {
    pub(crate) fn field(field: impl fmt::Display, problem: impl fmt::Display) -> Self {
        Self::Field { field: bounded(field), problem: bounded(problem) }
    }

    /// A short, fixed word for each kind of failure, fit for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } | Self::Expands { .. } => "too_large",
            Self::Field { .. } | Self::Compression(_) | Self::Protobuf(_) => "malformed_value",
        }
    }
}

/// A [`ValueError`] together with the key it was found under.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {source}")]
pub struct DecodeError {
    /// The key the value was stored under.
    pub key: Key,
    /// What is wrong with the value.
    #[source]
    pub source: ValueError,
}

/// Foreign text, as it is shown in errors.
pub(crate) fn bounded(text: impl fmt::Display) -> String {
    crate::printable(&text.to_string(), MAX_QUOTED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_in_an_error_is_short_and_printable() {
        let error = ValueError::field("\u{1b}[31mName", "x".repeat(10_000));
        let text = error.to_string();
        assert!(text.len() < 2 * MAX_QUOTED + 40, "{}", text.len());
        assert!(!text.contains('\u{1b}'));
    }
}
