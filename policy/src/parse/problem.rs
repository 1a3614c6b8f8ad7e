//! What a policy says that is not enforced as its author meant it.

use std::fmt;

use isthmus_wire::printable;
use serde::Serialize;

/// Longest piece of a policy that a problem repeats, in bytes.
const MAX_QUOTED: usize = 120;

/// A part of a policy that is not enforced as written. Displays as one sentence that names the field, says why, and what
/// happens instead.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// Where in the object, such as `spec.egress[0].toFQDNs`.
    pub field: String,
    /// What kind of problem.
    pub kind: ProblemKind,
    /// What is the matter with it.
    pub what: String,
    /// What happens instead.
    pub consequence: Consequence,
}

/// Why a part of a policy is not enforced as written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum ProblemKind {
    /// Cilium knows it and Isthmus does not enforce it yet.
    Unsupported,
    /// Nobody knows it.
    Unknown,
    /// Its value is not one it may have.
    Invalid,
    /// There is more of it than is accepted.
    TooLarge,
    /// It is enforced, though perhaps not as its author expects.
    Note,
}

/// What happens instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Consequence {
    /// What this part would have allowed is not allowed by it.
    AllowsNothing,
    /// Everything is denied that this part could have denied.
    DeniesMore,
    /// Every endpoint is denied by default that the policy could be about.
    SelectsMore,
    /// Nodes' own traffic is not filtered; the part has no effect.
    HasNoEffect,
    /// It is enforced.
    Enforced,
}

impl Problem {
    pub(crate) fn new(
        field: impl Into<String>,
        kind: ProblemKind,
        what: impl fmt::Display,
        consequence: Consequence,
    ) -> Self {
        Self {
            field: printable(&field.into(), 2 * MAX_QUOTED),
            kind,
            what: printable(&what.to_string(), 2 * MAX_QUOTED),
            consequence,
        }
    }

    /// A word for the reason of a condition or the label of a counter.
    pub fn reason(&self) -> &'static str {
        match self.kind {
            ProblemKind::Unsupported => "UnsupportedField",
            ProblemKind::Unknown => "UnknownField",
            ProblemKind::Invalid => "InvalidField",
            ProblemKind::TooLarge => "TooLarge",
            ProblemKind::Note => "Note",
        }
    }

    /// Whether the policy is enforced otherwise than written.
    pub fn is_failure(&self) -> bool {
        self.kind != ProblemKind::Note
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let consequence = match self.consequence {
            Consequence::AllowsNothing => "; this part allows nothing",
            Consequence::DeniesMore => "; this part denies everything it could be about",
            Consequence::SelectsMore => {
                "; every endpoint it could select is denied by default and allowed nothing by it"
            }
            Consequence::HasNoEffect => "; it has no effect",
            Consequence::Enforced => "",
        };
        write!(f, "{}: {}{consequence}", self.field, self.what)
    }
}

/// A user's text, as it is shown in problems.
pub(crate) fn short(text: &str) -> String {
    printable(text, MAX_QUOTED)
}
