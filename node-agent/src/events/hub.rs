//! From the one that reads the kernel's events to the many that listen.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{Stream, StreamExt, stream};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

use super::filter::Filter;
use super::flow::{Flow, Line, LostEventSource, LostEvents};

/// Lines that a listener may be behind before it loses some.
const QUEUE: usize = 4096;

/// Where listeners come to. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Hub {
    node: Arc<str>,
    lines: broadcast::Sender<Arc<Told>>,
    shutdown: CancellationToken,
}

/// A line, written once for all listeners.
#[derive(Debug)]
struct Told {
    line: Line,
    json: Bytes,
}

impl Hub {
    /// Of the node called `cluster/node`. Listeners are sent away at `shutdown`.
    pub fn new(node: &str, shutdown: CancellationToken) -> Self {
        Self { node: node.into(), lines: broadcast::Sender::new(QUEUE), shutdown }
    }

    /// `cluster/node`.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Whether anybody listens. If not, nothing needs to be put together.
    pub fn has_listeners(&self) -> bool {
        self.lines.receiver_count() > 0
    }

    /// Tells of a flow.
    pub fn tell(&self, flow: Flow) {
        let time = flow.time;
        self.send(Line {
            flow: Some(Box::new(flow)),
            lost_events: None,
            node_name: self.node.to_string(),
            time,
        });
    }

    /// Tells that the kernel has left some out.
    pub fn lost(&self, source: LostEventSource, count: u64, time: DateTime<Utc>) {
        self.send(lost(&self.node, source, count, time));
    }

    /// What is told from now on and `filter` wants, a line of JSON each. Who does not keep up is told how many are missing.
    pub fn listen(&self, filter: Filter) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
        let (node, receiver) = (self.node.clone(), self.lines.subscribe());
        let shutdown = self.shutdown.clone().cancelled_owned();
        let lines = stream::unfold(receiver, move |mut receiver| {
            let node = node.clone();
            async move {
                match receiver.recv().await {
                    Ok(told) => Some((told, receiver)),
                    Err(RecvError::Lagged(count)) => {
                        let line = lost(&node, LostEventSource::HubbleRingBuffer, count, Utc::now());
                        Some((Arc::new(Told { json: encode(&line), line }), receiver))
                    }
                    Err(RecvError::Closed) => None,
                }
            }
        });
        let wanted = move |told: Arc<Told>| {
            let wanted = told.line.flow.as_ref().is_none_or(|flow| filter.wants(flow));
            std::future::ready(wanted.then(|| Ok(told.json.clone())))
        };
        lines.filter_map(wanted).take_until(shutdown)
    }

    fn send(&self, line: Line) {
        // Without listeners there is nobody to miss it.
        let _ = self.lines.send(Arc::new(Told { json: encode(&line), line }));
    }
}

fn lost(node: &str, source: LostEventSource, count: u64, time: DateTime<Utc>) -> Line {
    let lost_events = Some(LostEvents { source, num_events_lost: count });
    Line { flow: None, lost_events, node_name: node.to_owned(), time }
}

fn encode(line: &Line) -> Bytes {
    let mut json = serde_json::to_vec(line).unwrap_or_default();
    json.push(b'\n');
    json.into()
}
