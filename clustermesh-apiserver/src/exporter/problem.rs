//! What could not be used, said so that the owner of the object knows what to do.

use std::fmt;

use super::facts::Name;

/// One thing about an object that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub reason: Reason,
    /// What it is and what happens instead or what to do.
    pub message: String,
}

impl Finding {
    pub(crate) fn new(reason: Reason, message: String) -> Self {
        Self { reason, message }
    }

    /// The same finding, with the place in the object where it was made.
    pub(crate) fn within(mut self, place: &str) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

/// The object a finding is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Subject {
    pub api_version: &'static str,
    pub kind: &'static str,
    pub name: Name,
    pub uid: String,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// Why something could not be used: the label of a counter and the reason of a Kubernetes Event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Reason {
    /// The object, or a part of it, is not of its kind's form.
    InvalidObject,
    /// An annotation's value is not one of those it may have.
    InvalidAnnotation,
    /// An address or address range is not one.
    InvalidAddress,
    /// A port's number or protocol is not one.
    InvalidPort,
    /// An identity is not a number, not in the cluster's range, or has labels that cannot travel.
    InvalidIdentity,
    /// Every number of the cluster's range is taken.
    IdentitiesExhausted,
    /// Kubernetes refused to store an identity.
    IdentityRefused,
    /// The value is larger than etcd takes.
    TooLarge,
    /// A policy has a part that cannot be read.
    InvalidPolicy,
    /// A policy has a part that is not supported.
    UnsupportedPolicy,
    /// A policy selects no pod.
    PolicySelectsNothing,
}

impl Reason {
    /// Every reason, for whoever shows them all.
    pub(crate) const ALL: [Self; 11] = [
        Self::InvalidObject,
        Self::InvalidAnnotation,
        Self::InvalidAddress,
        Self::InvalidPort,
        Self::InvalidIdentity,
        Self::IdentitiesExhausted,
        Self::IdentityRefused,
        Self::TooLarge,
        Self::InvalidPolicy,
        Self::UnsupportedPolicy,
        Self::PolicySelectsNothing,
    ];

    /// In PascalCase, as Kubernetes Events have it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::InvalidObject => "InvalidObject",
            Self::InvalidAnnotation => "InvalidAnnotation",
            Self::InvalidAddress => "InvalidAddress",
            Self::InvalidPort => "InvalidPort",
            Self::InvalidIdentity => "InvalidIdentity",
            Self::IdentitiesExhausted => "IdentitiesExhausted",
            Self::IdentityRefused => "IdentityRefused",
            Self::TooLarge => "TooLarge",
            Self::InvalidPolicy => "InvalidPolicy",
            Self::UnsupportedPolicy => "UnsupportedPolicy",
            Self::PolicySelectsNothing => "PolicySelectsNothing",
        }
    }
}
