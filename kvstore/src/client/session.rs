//! Calls on one connection, each answer checked against the cluster lock.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use etcd_client::{
    Client, Error, GetOptions, ResponseHeader, SortOrder, SortTarget, WatchOptions, WatchRequestSender,
    WatchResponseStream,
};
use isthmus_wire::printable;
use tokio::time::timeout;
use tonic::{Code, Status};

use super::RateLimiter;
use crate::metrics::{Action, ClientMetrics, QuorumError, Scope};

/// The most that one answer of a watch may hold when it comes in pieces, in bytes.
const MAX_REVISION_BYTES: usize = 256 << 20;
/// How long an answer may take that the store can give at once.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest answer that is taken in, in bytes. A page that is larger is asked for again in smaller pieces.
const MAX_ANSWER_BYTES: usize = 32 << 20;
/// The longest text of a store that is repeated, in characters.
const MAX_QUOTED: usize = 512;

/// Why a call failed, by what is to be done about it.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum SessionError {
    /// The history back to the wanted revision is gone: list again.
    #[error("revision {wanted} has been compacted")]
    Compacted {
        /// The revision that was asked for.
        wanted: i64,
    },
    /// The answer is larger than what is taken in: ask for less.
    #[error("the answer is larger than {MAX_ANSWER_BYTES} bytes")]
    TooLarge,
    /// The store refuses this call and may take others: try again later.
    #[error("refused: {0}")]
    Refused(String),
    /// The answer breaks the protocol in a way that concerns this call alone: try again later.
    #[error("the answer makes no sense: {0}")]
    Malformed(&'static str),
    /// The connection is of no use any more: make a new one.
    #[error("connection lost: {0}")]
    Lost(String),
    /// No answer in time: make a new connection.
    #[error("no answer within {}s", CALL_TIMEOUT.as_secs())]
    TimedOut,
    /// Another store answers on this connection: make a new one and list everything again.
    #[error("the store was exchanged: its cluster id was {was:x} and is {is:x}")]
    ClusterChanged {
        /// The cluster id that this connection started with.
        was: u64,
        /// The cluster id of the latest answer.
        is: u64,
    },
    /// An answer without header, so without cluster id: make a new connection.
    #[error("an answer came without header, so it cannot be told from which store it is")]
    NoHeader,
}

impl SessionError {
    /// Whether it says that the store is not able to work, whatever the connection does. The words are etcd's.
    fn quorum_error(&self) -> Option<QuorumError> {
        match self {
            Self::TimedOut => Some(QuorumError::Timeout),
            Self::Lost(reason) | Self::Refused(reason) => {
                let says = |words| reason.contains(words);
                if says("no leader") {
                    Some(QuorumError::NoLeader)
                } else {
                    says("request timed out").then_some(QuorumError::Timeout)
                }
            }
            _ => None,
        }
    }

    /// Whether the connection is of no further use.
    pub(crate) fn is_fatal(&self) -> bool {
        match self {
            Self::Compacted { .. } | Self::TooLarge | Self::Refused(_) | Self::Malformed(_) => false,
            Self::Lost(_) | Self::TimedOut | Self::ClusterChanged { .. } | Self::NoHeader => true,
        }
    }
}

/// A range of keys.
#[derive(Debug, Clone)]
pub(crate) enum Span {
    /// One key.
    Key(Bytes),
    /// All keys that begin so.
    Prefix(Bytes),
    /// All keys there are.
    Everything,
}

impl Span {
    /// The part of the key space that it is in.
    fn scope(&self) -> Scope {
        match self {
            Self::Key(start) | Self::Prefix(start) => Scope::of(start),
            Self::Everything => Scope::Everything,
        }
    }

    /// Whether `key` is within the range.
    pub(crate) fn contains(&self, key: &[u8]) -> bool {
        match self {
            Self::Key(this) => key == this,
            Self::Prefix(prefix) => key.starts_with(prefix),
            Self::Everything => true,
        }
    }
}

/// A key with its value, as the store has it.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) key: Bytes,
    pub(crate) value: Bytes,
    pub(crate) create_revision: i64,
    pub(crate) mod_revision: i64,
    pub(crate) version: i64,
    pub(crate) lease: i64,
}

/// One change of a key.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Put(Pair),
    Delete { key: Bytes, revision: i64 },
}

impl Change {
    /// The revision at which it was made.
    pub(crate) fn revision(&self) -> i64 {
        match self {
            Self::Put(pair) => pair.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// What a watch says.
#[derive(Debug)]
pub(crate) enum WatchAnswer {
    /// These changes, in order. `revision` is the last one's.
    /// All changes of a revision come together.
    Changes { revision: i64, changes: Vec<Change>, unknown: usize },
    /// Nothing has changed up to this revision.
    Progress { revision: i64 },
}

/// One connection and the cluster lock that holds for it.
#[derive(Clone)]
pub(crate) struct Session {
    client: Client,
    limiter: Arc<RateLimiter>,
    metrics: ClientMetrics,
    lock: Arc<ClusterLock>,
}

#[derive(Debug, Default)]
struct ClusterLock {
    /// 0 before the first answer.
    cluster_id: AtomicU64,
    /// The highest revision that any answer has shown.
    revision: AtomicI64,
}

impl Session {
    pub(crate) fn new(client: Client, limiter: Arc<RateLimiter>, metrics: ClientMetrics) -> Self {
        Self { client, limiter, metrics, lock: Arc::default() }
    }

    /// The id of the cluster that answers, once anything has.
    pub(crate) fn cluster_id(&self) -> Option<u64> {
        Some(self.lock.cluster_id.load(Ordering::Acquire)).filter(|id| *id != 0)
    }

    /// The highest revision that any answer has shown, 0 before the first.
    pub(crate) fn store_revision(&self) -> i64 {
        self.lock.revision.load(Ordering::Relaxed)
    }

    /// The underlying client, for calls that have no method here. Their headers go through [`Session::check`].
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Begins a list of `span` in ascending order, all pages of which show the store at one revision.
    pub(crate) fn list(&self, span: Span) -> Listing {
        Listing { session: self.clone(), span, limit: PAGE, revision: 0, after: None, done: false }
    }

    /// Reads one key: its value if it exists, and the revision of the store.
    pub(crate) async fn get(&self, key: &Bytes) -> Result<(Option<Bytes>, i64), SessionError> {
        let mut listing = self.list(Span::Key(key.clone()));
        let pairs = listing.next_page().await?.unwrap_or_default();
        Ok((pairs.into_iter().next().map(|pair| pair.value), listing.revision()))
    }

    /// Watches `span` from `start` on, which is the revision after the one that was listed.
    pub(crate) async fn watch(&self, span: Span, start: i64) -> Result<Watch, SessionError> {
        self.limiter.turn().await;
        let options = WatchOptions::new().with_start_revision(start).with_fragment();
        let (key, options) = match &span {
            Span::Key(key) => (key.to_vec(), options),
            Span::Prefix(prefix) => (prefix.to_vec(), options.with_prefix()),
            Span::Everything => (Vec::new(), options.with_all_keys()),
        };
        let mut client = self.client.watch_client().max_decoding_message_size(MAX_ANSWER_BYTES);
        let stream = in_time(client.watch(key, Some(options))).await?;
        let (sender, stream) = stream.split();
        let mut watch = Watch {
            session: self.clone(),
            span,
            sender,
            stream,
            start,
            pieces: Vec::new(),
            pieces_bytes: 0,
            unknown: 0,
        };
        // The store confirms before anything else; what comes instead is an error.
        timeout(CALL_TIMEOUT, watch.created()).await.map_err(|_| SessionError::TimedOut)??;
        Ok(watch)
    }

    /// Compares an answer's cluster id with this connection's.
    ///
    /// # Errors
    /// When the answer has no header, or comes from another cluster than the first one did.
    pub(crate) fn check(&self, header: Option<&ResponseHeader>) -> Result<i64, SessionError> {
        let header = header.ok_or(SessionError::NoHeader)?;
        let is = header.cluster_id();
        let lock = &self.lock.cluster_id;
        match lock.compare_exchange(0, is, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {}
            Err(was) if was == is => {}
            Err(was) => return Err(SessionError::ClusterChanged { was, is }),
        }
        self.lock.revision.fetch_max(header.revision(), Ordering::Relaxed);
        Ok(header.revision())
    }

    /// Makes one call that is bounded in time and counts towards the rate limits; also says how long the answer took.
    pub(crate) async fn call<T>(
        &self,
        call: impl Future<Output = Result<T, Error>>,
    ) -> (Result<T, SessionError>, Duration) {
        let permit = self.limiter.permit().await;
        let answer = in_time(call).await;
        let took = permit.over(answer.is_ok());
        if let Err(error) = &answer {
            self.note(error);
        }
        (answer, took)
    }

    fn note(&self, error: &SessionError) {
        if let Some(error) = error.quorum_error() {
            self.metrics.quorum_error(error);
        }
    }
}

/// Keys per page: Cilium's `etcd.limit`.
const PAGE: i64 = 256;

/// A list in pages.
pub(crate) struct Listing {
    session: Session,
    span: Span,
    limit: i64,
    /// The revision of the first page, at which all others are read. 0 before.
    revision: i64,
    after: Option<Bytes>,
    done: bool,
}

impl Listing {
    /// The revision that the list shows, once the first page is there.
    pub(crate) fn revision(&self) -> i64 {
        self.revision
    }

    /// The next page, none after the last.
    ///
    /// # Errors
    /// [`SessionError::Compacted`] when the store has dropped the revision of the first page meanwhile.
    /// [`SessionError::TooLarge`] when a single key's answer is; [`Listing::skip`] then goes past it.
    pub(crate) async fn next_page(&mut self) -> Result<Option<Vec<Pair>>, SessionError> {
        if self.done {
            return Ok(None);
        }
        loop {
            match self.page(false).await {
                Err(SessionError::TooLarge) if self.limit > 1 => self.limit /= 4,
                other => return other.map(Some),
            }
        }
    }

    /// Goes past the next key without its value; the key's name, none if there is none.
    pub(crate) async fn skip(&mut self) -> Result<Option<Bytes>, SessionError> {
        self.limit = 1;
        let skipped = self.page(true).await?.into_iter().next().map(|pair| pair.key);
        self.limit = PAGE;
        Ok(skipped)
    }

    async fn page(&mut self, keys_only: bool) -> Result<Vec<Pair>, SessionError> {
        // The smallest key after the last one seen.
        let from = |first: &Bytes| match &self.after {
            None => first.to_vec(),
            Some(after) => [after, &b"\0"[..]].concat(),
        };
        let (key, options) = match &self.span {
            Span::Key(key) => (key.to_vec(), GetOptions::new()),
            Span::Prefix(prefix) => (from(prefix), GetOptions::new().with_range(end_of_prefix(prefix))),
            Span::Everything => {
                (from(&Bytes::from_static(b"\0")), GetOptions::new().with_range(b"\0".to_vec()))
            }
        };
        let mut options = options
            .with_sort(SortTarget::Key, SortOrder::Ascend)
            .with_limit(self.limit)
            .with_revision(self.revision);
        if keys_only {
            options = options.with_keys_only();
        }
        let mut kv = self.session.client.kv_client().max_decoding_message_size(MAX_ANSWER_BYTES);
        let (answer, took) = self.session.call(kv.get(key, Some(options))).await;
        let action = match self.span {
            Span::Key(_) => Action::Get,
            Span::Prefix(_) | Span::Everything => Action::ListPrefix,
        };
        self.session.metrics.operation(self.span.scope(), action, 1, took, answer.is_ok());
        let answer = answer.map_err(|error| match error {
            SessionError::Compacted { .. } => SessionError::Compacted { wanted: self.revision },
            other => other,
        })?;
        let revision = self.session.check(answer.header())?;
        if self.revision == 0 {
            self.revision = revision;
        }
        let more = answer.more();
        let pairs: Vec<Pair> = answer.0.kvs.into_iter().map(pair).collect();
        for pair in &pairs {
            if !self.span.contains(&pair.key) {
                return Err(SessionError::Malformed("a list holds a key outside of the range"));
            }
            if self.after.as_ref().is_some_and(|after| *after >= pair.key) {
                return Err(SessionError::Malformed("a list is not in ascending order"));
            }
            self.after = Some(pair.key.clone());
        }
        if more && pairs.is_empty() {
            return Err(SessionError::Malformed("an empty page is said to have a successor"));
        }
        self.done = !more;
        Ok(pairs)
    }
}

/// A running watch.
pub(crate) struct Watch {
    session: Session,
    span: Span,
    sender: WatchRequestSender,
    stream: WatchResponseStream,
    start: i64,
    /// What has come so far of an answer that comes in pieces.
    pieces: Vec<Change>,
    pieces_bytes: usize,
    unknown: usize,
}

impl Watch {
    /// What comes next. Safe to cancel.
    ///
    /// # Errors
    /// [`SessionError::Compacted`] when the watch fell behind, and all that a connection can suffer from.
    pub(crate) async fn next(&mut self) -> Result<WatchAnswer, SessionError> {
        loop {
            let answer = self.message().await?;
            let revision = self.checked(&answer)?;
            let in_pieces = answer.0.fragment;
            self.collect(answer.0.events);
            if in_pieces {
                if self.pieces_bytes > MAX_REVISION_BYTES {
                    return Err(SessionError::TooLarge);
                }
                continue;
            }
            self.pieces_bytes = 0;
            let changes = std::mem::take(&mut self.pieces);
            let unknown = std::mem::take(&mut self.unknown);
            return Ok(if changes.is_empty() && unknown == 0 {
                WatchAnswer::Progress { revision }
            } else {
                // The header is ahead of the changes while the watch catches up.
                let revision = changes.last().map_or(revision, Change::revision);
                WatchAnswer::Changes { revision, changes, unknown }
            });
        }
    }

    fn collect(&mut self, events: Vec<etcd_client::proto::PbEvent>) {
        for event in events {
            let change = match (event.r#type, event.kv) {
                (PUT, Some(kv)) => Some(Change::Put(pair(kv))),
                (DELETE, Some(kv)) => Some(Change::Delete { key: kv.key.into(), revision: kv.mod_revision }),
                _ => None,
            };
            let change = change.filter(|change| match change {
                Change::Put(Pair { key, .. }) | Change::Delete { key, .. } => self.span.contains(key),
            });
            match change {
                None => self.unknown += 1,
                Some(change) => {
                    self.pieces_bytes += size_of::<Change>();
                    if let Change::Put(pair) = &change {
                        self.pieces_bytes += pair.key.len() + pair.value.len();
                    }
                    self.pieces.push(change);
                }
            }
        }
    }

    /// Asks the store to say how far this watch has come; the answer is a [`WatchAnswer::Progress`].
    pub(crate) async fn request_progress(&mut self) -> Result<(), SessionError> {
        in_time(self.sender.request_progress()).await
    }

    async fn created(&mut self) -> Result<(), SessionError> {
        let answer = self.message().await?;
        self.checked(&answer)?;
        if answer.created() {
            Ok(())
        } else {
            Err(SessionError::Malformed("a watch began without confirmation"))
        }
    }

    async fn message(&mut self) -> Result<etcd_client::WatchResponse, SessionError> {
        let message = self.stream.message().await.map_err(|error| session_error(&error))?;
        message.ok_or_else(|| SessionError::Lost("the store ended the watch".into()))
    }

    fn checked(&self, answer: &etcd_client::WatchResponse) -> Result<i64, SessionError> {
        let revision = self.session.check(answer.header())?;
        if answer.compact_revision() > 0 {
            return Err(SessionError::Compacted { wanted: self.start });
        }
        if answer.canceled() {
            let reason = foreign(answer.cancel_reason());
            // etcd says so when it has lost its leader: another member may have one.
            return Err(if reason.contains("no leader") {
                let error = SessionError::Lost(reason);
                self.session.note(&error);
                error
            } else if reason.is_empty() {
                SessionError::Refused("the watch was cancelled".into())
            } else {
                SessionError::Refused(reason)
            });
        }
        Ok(revision)
    }
}

const PUT: i32 = 0;
const DELETE: i32 = 1;

fn pair(kv: etcd_client::proto::PbKeyValue) -> Pair {
    Pair {
        key: kv.key.into(),
        value: kv.value.into(),
        create_revision: kv.create_revision,
        mod_revision: kv.mod_revision,
        version: kv.version,
        lease: kv.lease,
    }
}

/// The first key after all those that begin with `prefix`; `\0`, which means "no end", if there is none.
fn end_of_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

async fn in_time<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, SessionError> {
    match timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(|error| session_error(&error)),
        Err(_) => Err(SessionError::TimedOut),
    }
}

/// Sorts an error by what is to be done about it.
pub(crate) fn session_error(error: &Error) -> SessionError {
    match error {
        Error::GRpcStatus(status) => status_error(status),
        other => SessionError::Lost(foreign(&other.to_string())),
    }
}

fn status_error(status: &Status) -> SessionError {
    let message = status.message();
    match status.code() {
        // The words are etcd's (compaction) and tonic's (size); both use the same code.
        Code::OutOfRange if message.contains("compacted") => SessionError::Compacted { wanted: 0 },
        Code::OutOfRange | Code::ResourceExhausted if message.contains("message length too large") => {
            SessionError::TooLarge
        }
        Code::Unavailable
        | Code::Cancelled
        | Code::Unknown
        | Code::Internal
        | Code::Aborted
        | Code::DataLoss
        | Code::Unauthenticated => SessionError::Lost(described(status)),
        _ => SessionError::Refused(described(status)),
    }
}

fn described(status: &Status) -> String {
    let mut text =
        if status.message().is_empty() { status.code().to_string() } else { status.message().to_owned() };
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    foreign(&text)
}

/// What the store says: it may be as long as an answer, and may try to look like several lines.
fn foreign(text: &str) -> String {
    printable(text, MAX_QUOTED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_store_says_is_short_and_on_one_line() {
        let hostile = format!("no\nERROR all is lost\u{1b}[31m{}", "x".repeat(MAX_ANSWER_BYTES));
        let SessionError::Refused(text) = status_error(&Status::permission_denied(&hostile)) else {
            panic!("refused")
        };
        assert!(text.starts_with("no ERROR") && text.ends_with('…'), "{text}");
        assert!(text.len() <= MAX_QUOTED + '…'.len_utf8() && !text.contains(char::is_control), "{text}");
        assert_eq!(foreign("permission denied"), "permission denied");
    }
}
