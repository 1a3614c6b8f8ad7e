//! How the limits on a client's calls are used, as Cilium's `api_limiter_*` tell it of its own client of etcd.

use std::{fmt, sync::Arc, time::Duration};

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::client::RateLimiter;

/// Tells how a client's limits are used, also after the client has gone. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Limiter(pub(crate) Arc<RateLimiter>);

impl Limiter {
    /// How they are used now.
    pub fn status(&self) -> LimiterStatus {
        self.0.status()
    }
}

/// How a client's limits are used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LimiterStatus {
    /// Calls per second at present.
    pub limit: u32,
    /// Calls that may come at once after a pause.
    pub burst: u32,
    /// Calls that wait for their answer.
    pub in_flight: usize,
    /// How many may.
    pub max_in_flight: usize,
    /// How long the last ten calls waited for their turn, on average.
    pub mean_wait: Duration,
    /// How long the last ten answers took, on average.
    pub mean_processing: Duration,
    /// Calls that were answered.
    pub succeeded: u64,
    /// Calls that failed.
    pub failed: u64,
}

/// Writes `<namespace>_api_limiter_*` for each client, by the name that its calls go under.
///
/// # Errors
/// Those of the encoder.
pub fn tell_limiters(
    encoder: &mut DescriptorEncoder<'_>,
    namespace: &str,
    limiters: &[(String, LimiterStatus)],
) -> fmt::Result {
    type Values = fn(&LimiterStatus) -> [(&'static str, f64); 2];
    let gauges: [(&str, &str, Values); 2] = [
        ("rate_limit", "Calls per second, and calls that may come at once", |status| {
            [("limit", status.limit.into()), ("burst", status.burst.into())]
        }),
        ("requests_in_flight", "Calls that wait for their answer, and how many may", |status| {
            [("in-flight", status.in_flight as f64), ("limit", status.max_in_flight as f64)]
        }),
    ];
    for (name, help, values) in gauges {
        let name = format!("{namespace}_api_limiter_{name}");
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
        for (api_call, status) in limiters {
            for (value, number) in values(status) {
                let labels = [("api_call", api_call.as_str()), ("value", value)];
                ConstGauge::new(number).encode(family.encode_family(&labels)?)?;
            }
        }
    }
    type Mean = fn(&LimiterStatus) -> Duration;
    let means: [(&str, &str, Mean); 2] = [
        ("wait_duration_seconds", "Seconds that the last ten calls waited for their turn", |status| {
            status.mean_wait
        }),
        ("processing_duration_seconds", "Seconds that the last ten answers took", |status| {
            status.mean_processing
        }),
    ];
    for (name, help, mean) in means {
        let name = format!("{namespace}_api_limiter_{name}");
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
        for (api_call, status) in limiters {
            let labels = [("api_call", api_call.as_str()), ("value", "mean")];
            ConstGauge::new(mean(status).as_secs_f64()).encode(family.encode_family(&labels)?)?;
        }
    }
    let name = format!("{namespace}_api_limiter_processed_requests");
    let help = "Calls that have ended";
    let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
    for (api_call, status) in limiters {
        // The codes are what Cilium makes of the outcomes.
        for (outcome, code, number) in [("success", "200", status.succeeded), ("fail", "500", status.failed)]
        {
            let labels = [("api_call", api_call.as_str()), ("outcome", outcome), ("return_code", code)];
            ConstCounter::new(number).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}
