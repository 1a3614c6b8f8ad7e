//! Calls on a peer's store, each bounded in time, whose answers say from which store they came.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use etcd_client::{Client, Error, GetOptions, ResponseHeader};
use tokio::time::timeout;
use tonic::Code;

use super::fault::printable;

/// A store that answers, on one connection.
pub(super) struct Store {
    client: Client,
    patience: Duration,
    seen: Mutex<Seen>,
}

/// What the answers' headers have said.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// The cluster ids, in the order in which they were first met.
    pub(super) ids: Vec<u64>,
    /// How many answers there were.
    pub(super) answers: usize,
    /// How many of them had no header.
    pub(super) without: usize,
    /// The highest revision.
    pub(super) revision: i64,
}

/// Keys that are listed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Range {
    /// One key.
    Key(Bytes),
    /// All that begin so.
    Prefix(String),
}

impl Range {
    pub(super) fn prefix(prefix: impl Into<String>) -> Self {
        Self::Prefix(prefix.into())
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => f.write_str(&String::from_utf8_lossy(key)),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

/// Some of the keys in a range.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) pairs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What the store says about itself.
#[derive(Debug)]
pub(super) struct About {
    /// The version of etcd that it is, or is like.
    pub(super) version: String,
    /// Alarms.
    pub(super) errors: Vec<String>,
}

/// Why a call failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum CallError {
    /// Whoever we are may not.
    #[error("{0}")]
    Denied(String),
    /// It does not know the call.
    #[error("{0}")]
    NotEtcd(String),
    /// No answer in time.
    #[error("no answer within {}s", .0.as_secs())]
    Silent(Duration),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

impl Store {
    pub(super) fn new(client: Client, patience: Duration) -> Self {
        Self { client, patience, seen: Mutex::default() }
    }

    /// What it is.
    ///
    /// # Errors
    /// It is no etcd, or does not answer.
    pub(super) async fn about(&self) -> Result<About, CallError> {
        let answer = self.call(self.client.maintenance_client().status()).await?;
        self.note(answer.header());
        let errors = answer.errors().iter().map(|error| printable(error)).collect();
        Ok(About { version: printable(answer.version()), errors })
    }

    /// The first `limit` keys of a range.
    ///
    /// # Errors
    /// It may not be read, or there is no answer.
    pub(super) async fn list(&self, range: &Range, limit: i64) -> Result<Listed, CallError> {
        let (key, options) = match range {
            Range::Key(key) => (key.to_vec(), GetOptions::new()),
            Range::Prefix(prefix) => (prefix.clone().into_bytes(), GetOptions::new().with_prefix()),
        };
        let answer = self.call(self.client.kv_client().get(key, Some(options.with_limit(limit)))).await?;
        self.note(answer.header());
        // What was not asked for is not looked at.
        let most = usize::try_from(limit).unwrap_or(usize::MAX);
        let pairs = answer.kvs().iter().take(most);
        Ok(Listed { pairs: pairs.map(|pair| (pair.key().to_vec(), pair.value().to_vec())).collect() })
    }

    /// What the answers so far have said about where they come from.
    pub(super) fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, header: Option<&ResponseHeader>) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.answers += 1;
        let Some(header) = header else {
            seen.without += 1;
            return;
        };
        let id = header.cluster_id();
        if !seen.ids.contains(&id) {
            seen.ids.push(id);
        }
        seen.revision = seen.revision.max(header.revision());
    }

    async fn call<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, CallError> {
        match timeout(self.patience, call).await {
            Err(_) => Err(CallError::Silent(self.patience)),
            Ok(answer) => answer.map_err(|error| call_error(&error)),
        }
    }
}

/// What an error of the client means.
pub(super) fn call_error(error: &Error) -> CallError {
    let Error::GRpcStatus(status) = error else { return CallError::Failed(printable(&error.to_string())) };
    let text = match status.message() {
        "" => status.code().to_string(),
        message => printable(message),
    };
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => CallError::Denied(text),
        // etcd's words for a certificate without a common name.
        Code::InvalidArgument if text.contains("user name is empty") => CallError::Denied(text),
        // No etcd answers so; tonic does for what answers no gRPC at all.
        Code::Unimplemented => CallError::NotEtcd(text),
        _ if text.contains("grpc-status header missing") => CallError::NotEtcd(text),
        _ => CallError::Failed(text),
    }
}
