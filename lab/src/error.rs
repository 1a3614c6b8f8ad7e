//! What can go wrong in a lab, in words that say what was being done.

use std::time::Duration;

/// Result of everything in this crate.
pub type Result<T, E = LabError> = std::result::Result<T, E>;

/// A lab, or a scenario in it, cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The operating system refused something.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, with the object's name.
        doing: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The kernel refused a change of links, addresses, routes or rules.
    #[error("{doing}: {source}")]
    Netlink {
        /// What was being done, with the object's name.
        doing: String,
        /// The kernel's answer.
        source: Box<rtnetlink::Error>,
    },
    /// The Kubernetes API refused a request, or could not be reached.
    #[error("{doing}: {source}")]
    Kube {
        /// What was being done, with the object's name.
        doing: String,
        /// The API's answer.
        source: Box<kube::Error>,
    },
    /// A condition was not met in time.
    #[error("{what}: not within {within:?}: {last}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        within: Duration,
        /// How it stood at the end.
        last: String,
    },
    /// A program of the lab ended by itself.
    #[error("{process} ended by itself ({status}). The last lines of {log}:\n{tail}")]
    Died {
        /// `<cluster>/<program>` or `<cluster>/<node>/<program>`.
        process: String,
        /// Its exit status.
        status: String,
        /// Path of its log.
        log: String,
        /// The last lines it wrote.
        tail: String,
    },
    /// The machine lacks something: one line for each, each with what to do.
    #[error("this machine lacks what that takes:\n{0}")]
    Missing(String),
    /// What the user asked for does not exist or makes no sense; the message says what does.
    #[error("{0}")]
    Invalid(String),
    /// The lab was told to end (a signal, or `isthmus lab down`).
    #[error("interrupted")]
    Interrupted,
}

impl LabError {
    /// A request that makes no sense, in words.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(message.into())
    }
}

/// Names what was being done when an error came up.
pub trait Doing<T> {
    /// Adds the words of `what` to an error.
    ///
    /// # Errors
    /// The error it was called on, with those words.
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Doing<T> for std::io::Result<T> {
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| LabError::Io { doing: what().into(), source })
    }
}

impl<T> Doing<T> for nix::Result<T> {
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|errno| LabError::Io { doing: what().into(), source: errno.into() })
    }
}

impl<T> Doing<T> for std::result::Result<T, rtnetlink::Error> {
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| LabError::Netlink { doing: what().into(), source: Box::new(source) })
    }
}

impl<T> Doing<T> for std::result::Result<T, kube::Error> {
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| LabError::Kube { doing: what().into(), source: Box::new(source) })
    }
}
