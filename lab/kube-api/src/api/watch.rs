//! Watch: what there is (if asked), then every change, in order, once each.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::stream;
use http::StatusCode;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::read::{formed, versioned};
use super::{Answer, Api, Payload, State, full};
use crate::request::{Accept, ListOptions, Request, Revision};
use crate::status::{ApiError, ApiResult};
use crate::store::{Change, Event, Object};

/// A watch without `timeoutSeconds` ends after this, as those of the real server do after 30 to 60 minutes.
const LONGEST_WATCH: Duration = Duration::from_secs(45 * 60);

impl Api {
    pub(super) fn watch(self: &Arc<Self>, request: &Request) -> ApiResult<Answer> {
        let options = request.query.list_options(&request.resource.kind)?;
        let started = match self.state().start_watch(request, &options) {
            Ok(started) => started,
            // As the watch cache does: the watch begins, and its only event is the error.
            Err(error) if error.code() == 410 => {
                let line = full(error_line(&error));
                return Ok(Answer::new(StatusCode::OK, Payload::Stream(line)));
            }
            Err(error) => return Err(error),
        };
        let mut bookmark_timer = tokio::time::interval_at(
            Instant::now() + self.settings.bookmark_interval,
            self.settings.bookmark_interval,
        );
        bookmark_timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let watcher = Watcher {
            api: self.clone(),
            disconnected: self.disconnected(),
            deadline: Instant::now() + options.timeout.unwrap_or(LONGEST_WATCH),
            seen: started.seen,
            changed: started.changed,
            pending: started.initial,
            bookmark_timer,
            request: request.clone(),
            api_version: request.resource.api_version(),
            options,
            ended: false,
        };
        let frames = stream::unfold(watcher, |mut watcher| async move {
            let line = watcher.next().await?;
            Some((Ok(Frame::data(line)), watcher))
        });
        Ok(Answer::new(StatusCode::OK, Payload::Stream(StreamBody::new(frames).boxed_unsync())))
    }
}

struct Started {
    seen: u64,
    changed: watch::Receiver<u64>,
    initial: VecDeque<Bytes>,
}

impl State {
    fn start_watch(&mut self, request: &Request, options: &ListOptions) -> ApiResult<Started> {
        let collection = &request.resource.collection;
        let mut changed = self.store.subscribe(collection);
        // What has happened since the revision to go on from is sent at once, not with the next change.
        changed.mark_changed();
        let current = self.store.revision();
        let mut initial = VecDeque::new();
        let from = match options.revision {
            Revision::NotOlderThan(revision) | Revision::Exact(revision) => Some(revision),
            Revision::Latest | Revision::Any => None,
        };
        if from.is_some_and(|from| from > current) {
            // After a restart with an empty store: the client must list again, so say so.
            return Err(ApiError::expired(format!("too new resource version: the newest is {current}")));
        }
        let send_all = options.send_initial_events || (from.is_none() && !initial_events_off(request));
        if send_all {
            let namespace = request.namespace.as_deref();
            let matching = self
                .store
                .list(collection, namespace)
                .filter(|(_, object)| options.selector.matches(&object.value));
            initial.extend(matching.map(|(_, object)| line(request, "ADDED", object)));
            if options.send_initial_events && options.bookmarks {
                initial.push_back(bookmark(request, current, true));
            }
        }
        let seen = if send_all { current } else { from.unwrap_or(current) };
        self.store.events_after(collection, seen).map_err(|compacted| {
            ApiError::expired(format!("too old resource version: {seen} ({})", compacted.oldest))
        })?;
        Ok(Started { seen, changed, initial })
    }
}

/// `sendInitialEvents=false` without a revision: only what happens from now on.
fn initial_events_off(request: &Request) -> bool {
    request.query.text("sendInitialEvents") == "false"
}

struct Watcher {
    api: Arc<Api>,
    request: Request,
    api_version: String,
    options: ListOptions,
    /// All changes up to this revision were sent, or did not match.
    seen: u64,
    changed: watch::Receiver<u64>,
    pending: VecDeque<Bytes>,
    bookmark_timer: Interval,
    deadline: Instant,
    disconnected: CancellationToken,
    ended: bool,
}

impl Watcher {
    /// The next line; `None` at the end of the watch.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(line) = self.pending.pop_front() {
                return Some(line);
            }
            if self.ended {
                return None;
            }
            tokio::select! {
                biased;
                () = self.api.stopping.cancelled() => return None,
                () = self.disconnected.cancelled() => return None,
                changed = self.changed.changed() => match changed {
                    Ok(()) => self.read(),
                    Err(_) => return None,
                },
                _ = self.bookmark_timer.tick(), if self.options.bookmarks => self.bookmark(),
                () = tokio::time::sleep_until(self.deadline) => {
                    self.ended = true;
                    if self.options.bookmarks {
                        self.bookmark();
                    }
                }
            }
        }
    }

    fn read(&mut self) {
        let collection = &self.request.resource.collection;
        let (events, current) = {
            let state = self.api.state();
            (state.store.events_after(collection, self.seen), state.store.revision())
        };
        match events {
            Ok(events) => {
                let lines: Vec<Bytes> = events.iter().filter_map(|event| self.line_of(event)).collect();
                self.pending.extend(lines);
                self.seen = current;
            }
            Err(compacted) => {
                // It slept longer than the history reaches back.
                let why = format!("too old resource version: {} ({})", self.seen, compacted.oldest);
                self.pending.push_back(error_line(&ApiError::expired(why)));
                self.ended = true;
            }
        }
    }

    fn bookmark(&mut self) {
        // Up to now nothing was missed: whatever came since `read` would be in the log.
        self.read();
        if !self.ended || self.pending.is_empty() {
            self.pending.push_back(bookmark(&self.request, self.seen, false));
        }
    }

    /// The event as this watcher sees it: an object that starts or stops to match is added or deleted.
    fn line_of(&self, event: &Event) -> Option<Bytes> {
        if self.request.namespace.as_ref().is_some_and(|wanted| *wanted != event.key.namespace) {
            return None;
        }
        let matches = |object: &Object| {
            self.options.selector.is_everything() || self.options.selector.matches(&object.value)
        };
        // Whoever watches whole objects in the stored version gets the same bytes.
        let plain = self.request.accept == Accept::Objects;
        let as_it_is = |kind: &str, new: &Object| {
            let stored = new.value["apiVersion"] == self.api_version;
            let make = || line(&self.request, kind, new);
            if plain && stored { event.line(make).clone() } else { make() }
        };
        match &event.change {
            Change::Added { new } => matches(new).then(|| as_it_is("ADDED", new)),
            Change::Modified { old, new } => match (matches(old), matches(new)) {
                (true, true) => Some(as_it_is("MODIFIED", new)),
                (false, true) => Some(line(&self.request, "ADDED", new)),
                (true, false) => {
                    // As it last matched, at the revision at which it ceased to.
                    let mut last = old.value.clone();
                    last["metadata"]["resourceVersion"] = new.value["metadata"]["resourceVersion"].clone();
                    Some(line(&self.request, "DELETED", &Object::new(last)))
                }
                (false, false) => None,
            },
            Change::Deleted { old, new } => matches(old).then(|| as_it_is("DELETED", new)),
        }
    }
}

fn line(request: &Request, kind: &str, object: &Object) -> Bytes {
    let json = match request.accept {
        Accept::Objects => versioned(&request.resource, object),
        accept => Bytes::from(formed(&request.resource, accept, &object.value).to_string()),
    };
    let mut line = BytesMut::with_capacity(json.len() + 40);
    line.put_slice(b"{\"type\":\"");
    line.put_slice(kind.as_bytes());
    line.put_slice(b"\",\"object\":");
    line.put_slice(&json);
    line.put_slice(b"}\n");
    line.freeze()
}

fn error_line(error: &ApiError) -> Bytes {
    Bytes::from(format!("{}\n", json!({ "type": "ERROR", "object": error.to_value() })))
}

fn bookmark(request: &Request, revision: u64, initial_events_end: bool) -> Bytes {
    let resource = &request.resource;
    let mut object = json!({
        "kind": resource.kind,
        "apiVersion": resource.api_version(),
        "metadata": { "resourceVersion": revision.to_string(), "creationTimestamp": null },
    });
    if initial_events_end {
        object["metadata"]["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
    }
    let object: Value = match request.accept {
        Accept::Objects => object,
        accept => formed(resource, accept, &object),
    };
    Bytes::from(format!("{}\n", json!({ "type": "BOOKMARK", "object": object })))
}
