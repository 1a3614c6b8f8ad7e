//! Noting problems, in the words of the list they are found in.

use std::fmt;

use super::problem::{Consequence, Problem, ProblemKind};
use crate::model::Effect;

impl From<Effect> for Consequence {
    /// How a problem in an element of one of the four lists fails closed, by the kind of its list.
    fn from(effect: Effect) -> Self {
        match effect {
            Effect::Allow => Self::AllowsNothing,
            Effect::Deny => Self::DeniesMore,
        }
    }
}

/// Most problems that are kept of one policy.
const MAX_PROBLEMS: usize = 64;

/// Collects what is not enforced as written.
#[derive(Default)]
pub(super) struct Report(pub(super) Vec<Problem>);

impl Report {
    pub(super) fn note(
        &mut self,
        field: impl Into<String>,
        kind: ProblemKind,
        what: impl fmt::Display,
        consequence: Consequence,
    ) {
        if self.0.len() < MAX_PROBLEMS {
            self.0.push(Problem::new(field, kind, what, consequence));
        }
    }

    /// [`Report::note`], for what fails closed in the way of its list.
    pub(super) fn fail(
        &mut self,
        field: impl Into<String>,
        kind: ProblemKind,
        what: impl fmt::Display,
        consequence: impl Into<Consequence>,
    ) {
        self.note(field, kind, what, consequence.into());
    }

    pub(super) fn invalid(
        &mut self,
        field: impl Into<String>,
        what: impl fmt::Display,
        consequence: impl Into<Consequence>,
    ) {
        self.note(field, ProblemKind::Invalid, what, consequence.into());
    }

    pub(super) fn unsupported(&mut self, field: impl Into<String>, consequence: impl Into<Consequence>) {
        self.note(
            field,
            ProblemKind::Unsupported,
            "Isthmus does not support this field yet",
            consequence.into(),
        );
    }

    /// The fields of an object that nobody knows. Returns whether there are any.
    pub(super) fn unknown(
        &mut self,
        fields: &super::fields::Fields<'_>,
        consequence: impl Into<Consequence>,
    ) -> bool {
        let consequence = consequence.into();
        let mut found = false;
        for (_, path) in fields.unknown() {
            found = true;
            self.fail(path, ProblemKind::Unknown, "there is no such field", consequence);
        }
        found
    }
}

/// The first elements of a list, up to `max`; and whether that is all of them.
pub(super) fn bounded<'a, T>(
    items: &'a [T],
    max: usize,
    field: &str,
    consequence: impl Into<Consequence>,
    report: &mut Report,
) -> (&'a [T], bool) {
    if items.len() <= max {
        return (items, true);
    }
    let what = format!("it has {} elements; at most {max} are accepted", items.len());
    report.fail(field, ProblemKind::TooLarge, what, consequence);
    (&items[..max], false)
}
