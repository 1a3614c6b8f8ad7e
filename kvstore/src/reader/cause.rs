//! Why a connection failed, told apart by what is to be done: for programs, beside the words for people.

use serde::Serialize;

use crate::client::ConnectError;
use crate::client::steps::{Step, TlsProblem};

/// Why a connection failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCause {
    /// The name of the store has no address, or none can be found out.
    NameNotResolved,
    /// Nothing answers at any address, or not in time.
    Unreachable,
    /// The store's certificate has expired, or is not valid yet.
    CertificateExpired,
    /// The store's certificate comes from an authority that is not trusted, or is not a server's.
    CertificateNotTrusted,
    /// The store does not take this side's certificate.
    CertificateRefused,
    /// The store's certificate is for other names.
    WrongName,
    /// This side's own certificate, key or authorities cannot be used.
    Misconfigured,
    /// There was a connection, or something that speaks TLS, and it is of no use.
    Lost,
}

impl From<&ConnectError> for FailureCause {
    fn from(error: &ConnectError) -> Self {
        match error {
            ConnectError::Resolve { .. } | ConnectError::TimedOut { step: Step::Resolve, .. } => {
                Self::NameNotResolved
            }
            ConnectError::Unreachable { .. } | ConnectError::TimedOut { .. } => Self::Unreachable,
            ConnectError::Tls { problem, .. } => problem.into(),
            ConnectError::Protocol { .. } => Self::Lost,
        }
    }
}

impl From<&TlsProblem> for FailureCause {
    fn from(problem: &TlsProblem) -> Self {
        match problem {
            TlsProblem::Expired { .. } | TlsProblem::NotYetValid { .. } => Self::CertificateExpired,
            TlsProblem::UnknownIssuer { .. } | TlsProblem::NotAServer { .. } => Self::CertificateNotTrusted,
            TlsProblem::WrongName { .. } => Self::WrongName,
            TlsProblem::Refused { .. } => Self::CertificateRefused,
            TlsProblem::Trust { .. }
            | TlsProblem::NoTrust
            | TlsProblem::Identity(_)
            | TlsProblem::Name { .. } => Self::Misconfigured,
            TlsProblem::NotTls | TlsProblem::Ended { .. } | TlsProblem::Other(_) => Self::Lost,
        }
    }
}
