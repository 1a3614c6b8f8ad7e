//! Encryption in numbers, made of the status whenever somebody asks.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use tokio::sync::watch;

use super::status::EncryptionStatus;

/// How long a session can be used, in seconds.
const SESSION: f64 = 180.0;

/// Reads the latest status.
#[derive(Debug)]
pub struct EncryptionMetrics(pub watch::Receiver<EncryptionStatus>);

impl Collector for EncryptionMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let status = self.0.borrow();
        if !status.enabled {
            return Ok(());
        }
        let sessions = status.peers.iter().filter_map(|peer| peer.last_handshake_seconds);
        let gauges = [
            ("ready", "1 when the WireGuard device works and is configured", i64::from(status.ready)),
            ("key_published", "1 when other nodes are told this node's key", i64::from(status.published)),
            ("peers", "WireGuard peers", count(status.peers.len())),
            (
                "peers_with_session",
                "WireGuard peers with a handshake in the last 180 s",
                count(sessions.filter(|age| *age < SESSION).count()),
            ),
        ];
        for (name, help, value) in gauges {
            gauge(&mut encoder, name, help, value)?;
        }
        let sum = |of: fn(&super::status::PeerStatus) -> u64| status.peers.iter().map(of).sum::<u64>();
        // Of the peers that there are: it falls when one goes, so it is no counter.
        let bytes = Unit::Bytes;
        for (name, help, value) in [
            ("peers_received", "Received from the present peers", sum(|peer| peer.rx_bytes)),
            ("peers_sent", "Sent to the present peers", sum(|peer| peer.tx_bytes)),
        ] {
            let metric = ConstGauge::<i64>::new(i64::try_from(value).unwrap_or(i64::MAX));
            let name = format!("isthmus_encryption_{name}");
            metric.encode(encoder.encode_descriptor(&name, help, Some(&bytes), metric.metric_type())?)?;
        }
        let mut refused: BTreeMap<&str, i64> =
            ["duplicate", "own", "invalid"].map(|reason| (reason, 0)).into_iter().collect();
        for key in &status.refused_keys {
            *refused.entry(&key.kind).or_default() += 1;
        }
        let metric = ConstGauge::<i64>::new(0);
        let mut family = encoder.encode_descriptor(
            "isthmus_encryption_refused_keys",
            "Keys of other nodes that are not used",
            None,
            metric.metric_type(),
        )?;
        for (reason, number) in refused {
            ConstGauge::<i64>::new(number).encode(family.encode_family(&[("reason", reason)])?)?;
        }
        for (name, value) in &status.counters {
            let metric = ConstCounter::new(*value);
            let name = format!("isthmus_encryption_device_{name}");
            metric.encode(encoder.encode_descriptor(
                &name,
                "Counted by the WireGuard device",
                None,
                metric.metric_type(),
            )?)?;
        }
        Ok(())
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: i64) -> Result<(), fmt::Error> {
    let metric = ConstGauge::<i64>::new(value);
    let name = format!("isthmus_encryption_{name}");
    metric.encode(encoder.encode_descriptor(&name, help, None, metric.metric_type())?)
}

fn count(of: usize) -> i64 {
    i64::try_from(of).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::encryption::status::{PeerStatus, RefusedKeyStatus};

    #[test]
    fn the_numbers_are_the_statuss() {
        let status = EncryptionStatus {
            enabled: true,
            ready: true,
            peers: vec![PeerStatus {
                node: Some("b".into()),
                cluster: Some("beta".into()),
                public_key: String::new(),
                endpoint: None,
                last_handshake_seconds: Some(12.0),
                rx_bytes: 7,
                tx_bytes: 9,
                allowed_ips: 2,
            }],
            refused_keys: vec![RefusedKeyStatus {
                node: "c".into(),
                cluster: "gamma".into(),
                public_key: None,
                kind: "invalid".into(),
                reason: String::new(),
            }],
            counters: [("handshakes".to_owned(), 3)].into(),
            ..EncryptionStatus::default()
        };
        let (_sender, receiver) = watch::channel(status);
        let mut registry = Registry::default();
        registry.register_collector(Box::new(EncryptionMetrics(receiver)));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
        for line in [
            "isthmus_encryption_ready 1",
            "isthmus_encryption_peers_with_session 1",
            "isthmus_encryption_peers_received_bytes 7",
            "isthmus_encryption_refused_keys{reason=\"invalid\"} 1",
            "isthmus_encryption_refused_keys{reason=\"duplicate\"} 0",
            "isthmus_encryption_device_handshakes_total 3",
        ] {
            assert!(text.lines().any(|has| has == line), "{line} is not in\n{text}");
        }
    }
}
