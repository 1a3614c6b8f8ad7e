//! The steps that are about what a peer's store holds, once it answers: permissions, cluster configuration, canaries,
//! heartbeat. Each reads as little as it can.

use std::collections::BTreeSet;

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use isthmus_wire::validate::{self, Incompatible};
use isthmus_wire::value::Capabilities;
use isthmus_wire::{ClusterConfig, ClusterName, Key, Prefix, Resource};

use super::fault::{Fault, instant, printable};
use super::store::{CallError, Range, Store};
use crate::relay::OwnCluster;

/// What every exporter writes each minute.
const HEARTBEAT: &str = "cilium/.heartbeat";
/// A heartbeat that is older is one that readers give up on.
const SILENCE: TimeDelta = TimeDelta::seconds(120);
/// How far in the future a heartbeat may be before the clocks are said to differ.
const AHEAD: TimeDelta = TimeDelta::seconds(30);
/// An exporter writes its first heartbeat when it has run for a minute.
const FIRST_HEARTBEAT: TimeDelta = TimeDelta::seconds(75);
/// How many keys are looked at to find out whose gateway it is.
const NAMES_FROM: i64 = 16;

/// What a step of these found: lines for people, and faults.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) seen: Vec<String>,
    pub(super) faults: Vec<Fault>,
}

impl Found {
    fn fault(fault: Fault) -> Self {
        Self { seen: Vec::new(), faults: vec![fault] }
    }
}

/// Lists each range that a relay reads, one key of each. A range is denied as a whole or not at all.
///
/// # Errors
/// The store cannot be asked any more.
pub(super) async fn permissions(store: &Store, peer: &ClusterName) -> Result<Found, CallError> {
    let config = Key::ClusterConfig(peer.clone()).to_bytes();
    let mut ranges = vec![
        Range::prefix(HEARTBEAT),
        Range::Key(config.clone()),
        Range::prefix(format!("{}{peer}/", isthmus_wire::key::SYNCED)),
    ];
    ranges
        .extend(Resource::ALL.into_iter().map(|resource| Range::prefix(Prefix::State(resource).range(peer))));
    let mut found = Found::default();
    let (mut granted, mut denied) = (0, Vec::new());
    for range in &ranges {
        match store.list(range, 1).await {
            Ok(_) => granted += 1,
            Err(CallError::Denied(_)) => denied.push(range.to_string()),
            Err(error) => return Err(error),
        }
    }
    if granted > 0 {
        found.seen.push(format!("{granted} of {} ranges can be read", ranges.len()));
    }
    if denied.is_empty() {
        return Ok(found);
    }
    // A gateway lets relays read the configuration and the canaries of its own cluster alone.
    let names = others(store, peer).await.unwrap_or_default();
    found.faults.push(if names.is_empty() {
        Fault::Denied { ranges: denied }
    } else {
        Fault::OtherCluster { names: names.into_iter().collect() }
    });
    Ok(found)
}

/// The clusters that the gateway's nodes are of, if `peer` is none of them.
async fn others(store: &Store, peer: &ClusterName) -> Result<BTreeSet<String>, CallError> {
    let nodes = store.list(&Range::prefix("cilium/state/nodes/v1/"), NAMES_FROM).await?;
    let names: BTreeSet<String> = nodes
        .pairs
        .iter()
        .filter_map(|(key, _)| std::str::from_utf8(key).ok()?.split('/').nth(4).map(printable))
        .collect();
    Ok(if names.contains(peer.as_str()) { BTreeSet::new() } else { names })
}

/// Reads the cluster configuration and holds it against the own cluster and the other peers, whose ids are `taken`.
///
/// # Errors
/// The store cannot be asked any more.
pub(super) async fn cluster_config(
    store: &Store,
    peer: &ClusterName,
    own: Option<&OwnCluster>,
    taken: &[(ClusterName, u16)],
) -> Result<(Found, Option<ClusterConfig>), CallError> {
    let key = Key::ClusterConfig(peer.clone()).to_bytes();
    let answer = store.list(&Range::Key(key), 1).await?;
    let Some((_, value)) = answer.pairs.first() else {
        let names = others(store, peer).await.unwrap_or_default();
        let fault = match names.is_empty() {
            true => Fault::ConfigMissing,
            false => Fault::OtherCluster { names: names.into_iter().collect() },
        };
        return Ok((Found::fault(fault), None));
    };
    let config = match ClusterConfig::decode(value) {
        Ok(config) => config,
        Err(error) => {
            let reason = error.to_string();
            return Ok((Found::fault(Fault::ConfigMalformed { reason }), None));
        }
    };
    let mut found = Found::default();
    found.seen.push(format!(
        "id {}, set up for {} clusters{}",
        config.id,
        config.capabilities.mesh_size().number(),
        capabilities(&config.capabilities)
    ));
    match own.map(|own| validate::cluster_config(peer, &config, own.id, own.mesh)) {
        None => found.seen.push("not compared with this cluster, which is not known here".to_owned()),
        Some(Ok(_)) => {}
        Some(Err(Incompatible::OwnId(id))) => found.faults.push(Fault::IdIsOurs { id: id.number() }),
        Some(Err(Incompatible::MeshSize { theirs, ours })) => {
            found.faults.push(Fault::MeshSize { ours: ours.number(), theirs: theirs.number() });
        }
        Some(Err(other)) => found.faults.push(Fault::Incompatible { reason: other.to_string() }),
    }
    let id = config.id.number();
    if let Some((other, _)) = taken.iter().find(|(other, taken)| other != peer && *taken == id) {
        found.faults.push(Fault::IdTaken { id, other: other.to_string() });
    }
    Ok((found, Some(config)))
}

fn capabilities(capabilities: &Capabilities) -> String {
    let mut text = String::new();
    for (holds, what) in [
        (capabilities.synced_canaries, ", writes canaries"),
        (capabilities.cached, ", is a mirror itself"),
        (capabilities.service_exports_enabled == Some(true), ", exports MCS services"),
    ] {
        text.push_str(if holds { what } else { "" });
    }
    text
}

/// Looks for the canary of each prefix that the peer exports. The second part is since when the first of them is there.
///
/// # Errors
/// The store cannot be asked any more.
pub(super) async fn canaries(
    store: &Store,
    peer: &ClusterName,
    config: &ClusterConfig,
    now: DateTime<Utc>,
) -> Result<(Found, Option<DateTime<Utc>>), CallError> {
    let capabilities = &config.capabilities;
    if !capabilities.synced_canaries {
        return Ok((Found::fault(Fault::NoCanaries), None));
    }
    let exported = Resource::ALL.into_iter().filter(|resource| match resource {
        Resource::Services => capabilities.endpoint_slices_export_mode.exports_services(),
        Resource::EndpointSlices => capabilities.endpoint_slices_export_mode.exports_slices(),
        Resource::ServiceExports => capabilities.service_exports_enabled.is_some(),
        Resource::Nodes | Resource::Identities | Resource::Ip => true,
    });
    let (mut found, mut missing, mut first) = (Found::default(), Vec::new(), None::<DateTime<Utc>>);
    for resource in exported {
        let prefix = match capabilities.cached {
            true => Prefix::Cache(resource),
            false => Prefix::State(resource),
        };
        let answer = store.list(&Range::Key(Key::canary(peer, prefix).to_bytes()), 1).await?;
        match answer.pairs.first() {
            None => missing.push(prefix.to_string()),
            Some((_, value)) => {
                let since = time(value);
                let when = since.map_or_else(|| "at an unknown time".to_owned(), |at| ago(at, now));
                found.seen.push(format!("{prefix}: complete {when}"));
                first = [first, since].into_iter().flatten().min();
            }
        }
    }
    if !missing.is_empty() {
        found.faults.push(Fault::CanaryMissing { prefixes: missing });
    }
    Ok((found, first))
}

/// Looks at the heartbeat, which a young exporter, one `since` then, need not have written yet.
///
/// # Errors
/// The store cannot be asked any more.
pub(super) async fn heartbeat(
    store: &Store,
    since: Option<DateTime<Utc>>,
    now: DateTime<Utc>,
) -> Result<Found, CallError> {
    let answer = store.list(&Range::Key(Bytes::from_static(HEARTBEAT.as_bytes())), 1).await?;
    let Some((_, value)) = answer.pairs.first() else {
        let started = since.filter(|since| now - *since < FIRST_HEARTBEAT);
        return Ok(Found::fault(Fault::HeartbeatMissing { started }));
    };
    let Some(at) = time(value) else {
        let value = printable(&String::from_utf8_lossy(value));
        return Ok(Found::fault(Fault::HeartbeatMalformed { value }));
    };
    let mut found = Found { seen: vec![format!("written {}", ago(at, now))], faults: Vec::new() };
    if now - at > SILENCE {
        found.faults.push(Fault::HeartbeatOld { at, now });
    } else if at - now > AHEAD {
        found.faults.push(Fault::HeartbeatAhead { at, now });
    }
    Ok(found)
}

/// The time that a canary or a heartbeat holds.
fn time(value: &[u8]) -> Option<DateTime<Utc>> {
    DateTime::parse_from_rfc3339(std::str::from_utf8(value).ok()?).ok().map(|time| time.to_utc())
}

fn ago(at: DateTime<Utc>, now: DateTime<Utc>) -> String {
    match (now - at).num_seconds() {
        ahead @ ..0 => format!("{}s in the future, at {}", -ahead, instant(at)),
        seconds @ 0..120 => format!("{seconds}s ago"),
        seconds @ 120..7200 => format!("{}m ago", seconds / 60),
        seconds @ 7200..172_800 => format!("{}h ago", seconds / 3600),
        _ => format!("at {}", instant(at)),
    }
}
