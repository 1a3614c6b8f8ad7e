//! What the device counts, for Prometheus.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::device::{Count, Device};

/// A registry that reads the device each time it is asked.
pub fn registry(device: Arc<Device>) -> Registry {
    let mut registry = Registry::with_prefix("isthmus_wireguard");
    registry.register_collector(Box::new(Reader(device)));
    registry
}

struct Reader(Arc<Device>);

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reader").field(&self.0.name()).finish()
    }
}

impl Collector for Reader {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for count in Count::ALL {
            let counter = ConstCounter::new(self.0.count(*count));
            // The encoder ends the sentence.
            let help = count.help().trim_end_matches('.');
            let metric = encoder.encode_descriptor(count.name(), help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        let peers = ConstGauge::new(i64::try_from(self.0.peer_count()).unwrap_or(i64::MAX));
        let metric = encoder.encode_descriptor("peers", "Peers configured", None, peers.metric_type())?;
        peers.encode(metric)
    }
}
