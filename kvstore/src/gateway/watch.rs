//! The Watch service: many watches on one stream.
//!
//! Nothing is buffered for a client but the response being sent: the stream reads the store only when the client takes
//! what it offers. A client that does not is left behind, and its watches are cancelled once history has moved on.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::time::Duration;

use futures::future::{AbortHandle, Abortable, BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, Stream, StreamExt};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::connection::Client;
use super::fragment::fragments;
use super::limits::Charge;
use super::proto::etcdserverpb as pb;
use super::proto::etcdserverpb::watch_create_request::FilterType;
use super::proto::etcdserverpb::watch_request::RequestUnion;
use super::proto::etcdserverpb::watch_server::Watch;
use super::reply::{self, Origin};
use crate::memory::{
    Canceled, KeyRange, MemoryStore, Position, Revision, StoreError, WatchBatch, WatchRequest, Watcher,
};

/// The id of answers that belong to no watch, or to all of them.
const NO_WATCH: i64 = -1;
/// What a watch takes beside its range: its state here and in the store.
const WATCH_BYTES: usize = 1024;
/// What a stream takes: a response that the client has not taken yet.
const STREAM_BYTES: usize = 256 << 10;
/// How soon to look again whether all watches have caught up, for a progress request.
const PROGRESS_RETRY: Duration = Duration::from_millis(5);

#[derive(Clone, Debug)]
pub(super) struct WatchService {
    pub(super) store: MemoryStore,
    pub(super) origin: Origin,
    pub(super) progress_interval: Duration,
    pub(super) shutdown: CancellationToken,
}

#[tonic::async_trait]
impl Watch for WatchService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let client = Client::of(&request)?;
        let room = client.watches.charge(STREAM_BYTES).ok_or_else(reply::too_many_requests)?;
        let stream = WatchStream::new(self.clone(), client, request.into_inner(), room);
        let responses = futures::stream::unfold(stream, |mut stream| async move {
            let response = stream.next_response().await?;
            Some((response, stream))
        });
        Ok(Response::new(Box::pin(responses)))
    }
}

struct WatchStream {
    service: WatchService,
    client: Client,
    requests: Streaming<pb::WatchRequest>,
    /// The client sends no more requests but still listens.
    half_closed: bool,
    watches: HashMap<i64, Active>,
    next_id: i64,
    waiting: FuturesUnordered<BoxFuture<'static, Option<Reported>>>,
    outbox: VecDeque<pb::WatchResponse>,
    progress_requested: bool,
    progress: Interval,
    _room: Charge,
}

/// A watch, while its `Watcher` waits in `WatchStream::waiting`.
struct Active {
    position: Position,
    start: Revision,
    prev_kv: bool,
    fragment: bool,
    progress_notify: bool,
    /// Nothing was sent since the last look.
    quiet: bool,
    cancel: AbortHandle,
    _room: Charge,
}

struct Reported {
    id: i64,
    watcher: Watcher,
    outcome: Result<WatchBatch, Canceled>,
}

enum Step {
    Request(Result<Option<pb::WatchRequest>, Status>),
    Reported(Option<Reported>),
    ProgressDue,
    TryProgress,
    Shutdown,
}

impl WatchStream {
    fn new(
        service: WatchService,
        client: Client,
        requests: Streaming<pb::WatchRequest>,
        room: Charge,
    ) -> Self {
        let interval = service.progress_interval;
        let mut progress = tokio::time::interval_at(Instant::now() + interval, interval);
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            service,
            client,
            requests,
            half_closed: false,
            watches: HashMap::new(),
            next_id: 0,
            waiting: FuturesUnordered::new(),
            outbox: VecDeque::new(),
            progress_requested: false,
            progress,
            _room: room,
        }
    }

    async fn next_response(&mut self) -> Option<Result<pb::WatchResponse, Status>> {
        loop {
            if let Some(response) = self.outbox.pop_front() {
                return Some(Ok(response));
            }
            if self.half_closed && self.watches.is_empty() {
                return None;
            }
            let step = tokio::select! {
                request = self.requests.message(), if !self.half_closed => Step::Request(request),
                Some(reported) = self.waiting.next(), if !self.waiting.is_empty() => Step::Reported(reported),
                _ = self.progress.tick() => Step::ProgressDue,
                () = tokio::time::sleep(PROGRESS_RETRY), if self.progress_requested => Step::TryProgress,
                () = self.service.shutdown.cancelled() => Step::Shutdown,
            };
            match step {
                Step::Request(Ok(Some(request))) => self.handle(request),
                Step::Request(Ok(None)) => self.half_closed = true,
                Step::Request(Err(status)) => return Some(Err(status)),
                Step::Reported(reported) => self.report(reported),
                Step::ProgressDue => self.notify_progress(),
                Step::TryProgress => self.answer_progress(),
                Step::Shutdown => return Some(Err(reply::stopped())),
            }
        }
    }

    fn handle(&mut self, request: pb::WatchRequest) {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create),
            Some(RequestUnion::CancelRequest(cancel)) => self.cancel(cancel.watch_id),
            Some(RequestUnion::ProgressRequest(_)) => {
                self.progress_requested = true;
                self.answer_progress();
            }
            // Something newer than this server: ignored, as etcd does.
            None => {}
        }
    }

    fn create(&mut self, request: pb::WatchCreateRequest) {
        let key = if request.key.is_empty() { bytes::Bytes::from_static(&[0]) } else { request.key.clone() };
        let range = KeyRange::from_wire(key, request.range_end.clone());
        if request.start_revision < 0 {
            return self.refuse(reply::COMPACTED);
        }
        if self.client.permit(&range).is_err() {
            return self.refuse(reply::PERMISSION_DENIED);
        }
        if range.is_empty() {
            return self.refuse("mvcc: watcher range is empty");
        }
        let id = match request.watch_id {
            0 => self.unused_id(),
            id if self.watches.contains_key(&id) => {
                return self.refuse("mvcc: duplicate watch ID provided on the WatchStream");
            }
            id => id,
        };
        let size = WATCH_BYTES + request.key.len() + request.range_end.len();
        let Some(room) = self.client.watches.charge(size) else {
            return self.refuse(reply::too_many_requests().message());
        };
        let filtered = |filter: FilterType| request.filters.contains(&i32::from(filter));
        let start_revision = (request.start_revision > 0).then_some(Revision(request.start_revision));
        let watch = WatchRequest {
            range,
            start_revision,
            no_put: filtered(FilterType::Noput),
            no_delete: filtered(FilterType::Nodelete),
        };
        match self.service.store.watch(watch) {
            Ok(watcher) => {
                // Where no start is given, a client resumes from this revision: it must be the watcher's own.
                let revision =
                    if start_revision.is_none() { watcher.revision() } else { self.service.store.revision() };
                self.outbox.push_back(pb::WatchResponse { created: true, ..self.response(id, revision) });
                self.follow(id, watcher, &request, room);
            }
            Err(StoreError::Compacted { compact_revision }) => {
                let revision = self.service.store.revision();
                self.outbox.push_back(pb::WatchResponse { created: true, ..self.response(id, revision) });
                self.outbox.push_back(self.compacted(id, compact_revision));
            }
            Err(error) => self.refuse(&error.to_string()),
        }
    }

    fn follow(&mut self, id: i64, watcher: Watcher, request: &pb::WatchCreateRequest, room: Charge) {
        let (cancel, aborted) = AbortHandle::new_pair();
        let active = Active {
            position: watcher.position(),
            start: watcher.revision().next(),
            prev_kv: request.prev_kv,
            fragment: request.fragment,
            progress_notify: request.progress_notify,
            quiet: true,
            cancel,
            _room: room,
        };
        self.watches.insert(id, active);
        self.wait_for(id, watcher, aborted);
    }

    fn wait_for(&mut self, id: i64, mut watcher: Watcher, aborted: futures::future::AbortRegistration) {
        let next = async move {
            let outcome = watcher.next().await;
            Reported { id, watcher, outcome }
        };
        self.waiting.push(Abortable::new(next, aborted).map(Result::ok).boxed());
    }

    fn cancel(&mut self, id: i64) {
        if let Some(watch) = self.watches.remove(&id) {
            watch.cancel.abort();
            let response = self.response(id, self.service.store.revision());
            self.outbox.push_back(pb::WatchResponse { canceled: true, ..response });
        }
    }

    fn report(&mut self, reported: Option<Reported>) {
        // What was cancelled meanwhile reports nothing more.
        let Some(Reported { id, watcher, outcome }) = reported else { return };
        let batch = match outcome {
            Ok(batch) => batch,
            Err(Canceled { compact_revision }) => {
                self.watches.remove(&id);
                let response = self.compacted(id, compact_revision);
                self.outbox.push_back(response);
                return;
            }
        };
        let mut response = self.response(id, batch.revision);
        let Some(watch) = self.watches.get_mut(&id) else { return };
        watch.quiet = false;
        response.events = batch.events.iter().map(|event| reply::event(event, watch.prev_kv)).collect();
        let fragment = watch.fragment;
        let (cancel, aborted) = AbortHandle::new_pair();
        watch.cancel = cancel;
        self.wait_for(id, watcher, aborted);
        if fragment {
            self.outbox.extend(fragments(response));
        } else {
            self.outbox.push_back(response);
        }
    }

    /// Tells quiet watches that asked for it how far they have come, so that they can resume from there.
    fn notify_progress(&mut self) {
        let mut due = Vec::new();
        for (id, watch) in &mut self.watches {
            let quiet = std::mem::replace(&mut watch.quiet, true);
            let revision = watch.position.synced_to();
            // One that starts in the future has come nowhere yet.
            if watch.progress_notify && quiet && revision >= watch.start {
                due.push((*id, revision));
            }
        }
        for (id, revision) in due {
            let response = self.response(id, revision);
            self.outbox.push_back(response);
        }
    }

    /// Answers a progress request, once no watch of the stream has anything left up to the revision it names.
    fn answer_progress(&mut self) {
        // What has been reported must be sent first, and one response at a time: there may be a whole history of it.
        while self.outbox.is_empty()
            && let Some(Some(reported)) = self.waiting.next().now_or_never()
        {
            self.report(reported);
        }
        if !self.outbox.is_empty() {
            return;
        }
        if self.watches.is_empty() {
            self.progress_requested = false;
            return;
        }
        let now = self.service.store.revision();
        let synced =
            self.watches.values().all(|watch| watch.position.synced_to() >= now && watch.start <= now.next());
        if synced {
            self.progress_requested = false;
            let response = self.response(NO_WATCH, now);
            self.outbox.push_back(response);
        }
    }

    fn refuse(&mut self, reason: &str) {
        let response = self.response(NO_WATCH, self.service.store.revision());
        let cancel_reason = reason.to_owned();
        self.outbox.push_back(pb::WatchResponse { created: true, canceled: true, cancel_reason, ..response });
    }

    fn compacted(&self, id: i64, compact_revision: Revision) -> pb::WatchResponse {
        let response = self.response(id, self.service.store.revision());
        pb::WatchResponse { canceled: true, compact_revision: compact_revision.0, ..response }
    }

    fn response(&self, watch_id: i64, revision: Revision) -> pb::WatchResponse {
        pb::WatchResponse {
            header: self.service.origin.header(revision),
            watch_id,
            ..pb::WatchResponse::default()
        }
    }

    fn unused_id(&mut self) -> i64 {
        while self.watches.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        let id = self.next_id;
        self.next_id += 1;
        id
    }
}
