//! Takes events out of the ring buffer and has them told.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};
use isthmus_bpf_abi::{Counter, PolicyEvent};
use nix::time::{ClockId, clock_gettime};
use tokio_util::sync::CancellationToken;

use super::decorate::decorate;
use super::flow::LostEventSource;
use super::hub::Hub;
use crate::datapath::{Datapath, Events};
use crate::explain::Known;
use crate::reconcile::Looks;

/// Most events that are taken together: the reconciler is asked once for all of them.
const BATCH: usize = 512;
/// How often the ring is emptied while nobody listens.
const UNHEARD: Duration = Duration::from_millis(100);
/// How often it is looked at what the kernel has left out.
const LOSSES: Duration = Duration::from_secs(1);

/// Reads until `shutdown`.
pub async fn read(datapath: Arc<Datapath>, looks: Looks, hub: Hub, shutdown: CancellationToken) {
    let mut events = match datapath.events() {
        Ok(events) => events,
        Err(error) => {
            tracing::error!(%error, "verdicts cannot be told of");
            return;
        }
    };
    let mut losses = tokio::time::interval(LOSSES);
    losses.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut known = Losses::default();
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = losses.tick() => known.look(&datapath, &hub),
            // Without a listener, being woken for each of them would be for nothing.
            () = tokio::time::sleep(UNHEARD), if !hub.has_listeners() => {
                while events.try_next().is_some() {}
            }
            taken = take(&mut events, &mut batch), if hub.has_listeners() => {
                if let Err(error) = taken {
                    tracing::error!(%error, "verdicts can no longer be told of");
                    return;
                }
                tell(&mut batch, &looks, &hub).await;
            }
        }
    }
}

async fn take(events: &mut Events, batch: &mut Vec<PolicyEvent>) -> std::io::Result<()> {
    batch.push(events.next().await?);
    while batch.len() < BATCH
        && let Some(event) = events.try_next()
    {
        batch.push(event);
    }
    Ok(())
}

async fn tell(batch: &mut Vec<PolicyEvent>, looks: &Looks, hub: &Hub) {
    let (events, node, began) = (std::mem::take(batch), hub.node().to_owned(), boot());
    let decorated = looks.at(move |reconciler, _| {
        let known = Known::new(reconciler);
        let time = |event: &PolicyEvent| DateTime::<Utc>::from(began + Duration::from_nanos(event.time));
        let flows: Vec<_> = events.iter().map(|event| decorate(event, time(event), &node, &known)).collect();
        (flows, events)
    });
    // Nothing: the agent is on its way out.
    let Some((flows, mut events)) = decorated.await else { return };
    flows.into_iter().for_each(|flow| hub.tell(flow));
    events.clear();
    *batch = events;
}

/// When the kernel's monotonic clock began.
fn boot() -> SystemTime {
    let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    SystemTime::now().checked_sub(monotonic).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// What the kernel has left out, as of the last look.
#[derive(Default)]
struct Losses {
    limited: Option<u64>,
    lost: Option<u64>,
}

impl Losses {
    fn look(&mut self, datapath: &Datapath, hub: &Hub) {
        let Ok(counters) = datapath.counters() else { return };
        let value = |wanted| counters.iter().find(|(known, _)| *known == wanted).map(|(_, value)| *value);
        let now = Utc::now();
        for (before, counter, source) in [
            (&mut self.limited, Counter::EventLimited, LostEventSource::RateLimit),
            (&mut self.lost, Counter::EventLost, LostEventSource::PerfEventRingBuffer),
        ] {
            let Some(value) = value(counter) else { continue };
            // What was lost before the first look, nobody here has missed.
            let count = before.replace(value).map_or(0, |before| value.saturating_sub(before));
            if count > 0 {
                hub.lost(source, count, now);
            }
        }
    }
}
