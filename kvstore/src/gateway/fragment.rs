//! Splitting a large watch response, for clients that asked for it.

use prost::Message;

use super::proto::etcdserverpb::WatchResponse;

/// etcd's: the size of the largest request, plus its overhead.
const FRAGMENT_BYTES: usize = (1536 + 512) << 10;

/// The response in parts, all but the last marked as to be continued. An event is never split.
pub(super) fn fragments(response: WatchResponse) -> Vec<WatchResponse> {
    split(response, FRAGMENT_BYTES)
}

fn split(mut response: WatchResponse, limit: usize) -> Vec<WatchResponse> {
    if response.encoded_len() < limit || response.events.len() < 2 {
        return vec![response];
    }
    let events = std::mem::take(&mut response.events);
    let (mut parts, mut size) = (vec![response.clone()], 0);
    for event in events {
        let bytes = event.encoded_len();
        match parts.last_mut() {
            Some(part) if part.events.is_empty() || size + bytes < limit => part.events.push(event),
            _ => {
                parts.push(WatchResponse { events: vec![event], ..response.clone() });
                size = 0;
            }
        }
        size += bytes;
    }
    let last = parts.len() - 1;
    parts.iter_mut().take(last).for_each(|part| part.fragment = true);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::proto::mvccpb::{Event, KeyValue};

    #[test]
    fn every_event_travels_once_and_only_the_last_part_ends_the_response() {
        let event = |size: usize| Event {
            kv: Some(KeyValue { value: vec![b'v'; size].into(), ..KeyValue::default() }),
            ..Event::default()
        };
        let events: Vec<_> = [10, 60, 10, 200, 10, 10, 10].map(event).into();
        let whole = WatchResponse { watch_id: 3, events, ..WatchResponse::default() };
        let parts = split(whole.clone(), 100);
        assert!(parts.len() > 1);
        let (last, others) = parts.split_last().unwrap();
        assert!(!last.fragment && others.iter().all(|part| part.fragment));
        assert!(parts.iter().all(|part| part.watch_id == 3));
        assert!(parts.iter().all(|part| part.events.len() == 1 || part.encoded_len() < 120));
        let rejoined: Vec<_> = parts.into_iter().flat_map(|part| part.events).collect();
        assert_eq!(rejoined, whole.events);
        assert_eq!(split(whole.clone(), 10_000), [whole]);
    }
}
