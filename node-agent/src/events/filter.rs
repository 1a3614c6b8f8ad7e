//! Which flows a listener wants. Values of one field are alternatives; every field that is given has to hold.

use std::net::IpAddr;

use ipnet::IpNet;

use super::flow::{Endpoint, Flow, TrafficDirection, Verdict};

/// Values of one field; more would be a mistake, or mischief.
const MOST_VALUES: usize = 64;

/// Which flows. Without any value, all of them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Filter {
    /// Of the pod on either side: `name`, `namespace/name` or `cluster/namespace/name`; a name may be a prefix.
    pub pods: Vec<String>,
    /// `key`, `key=value`, with a source before it or without, of either side. All of a comma-separated list have to hold.
    pub labels: Vec<String>,
    /// Cluster of either side.
    pub clusters: Vec<String>,
    /// Numeric identity of either side.
    pub identities: Vec<u32>,
    /// Address of either side, or a prefix that it is in.
    pub ips: Vec<IpNet>,
    /// Source or destination port.
    pub ports: Vec<u16>,
    /// `TCP`, `UDP`, `SCTP`, `ICMPv4`, `ICMPv6`, or `ICMP` for both.
    pub protocols: Vec<String>,
    /// What became of them.
    pub verdicts: Vec<Verdict>,
    /// Which policy was asked.
    pub directions: Vec<TrafficDirection>,
}

/// Why a filter is not one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FilterError {
    /// Not a field.
    #[error("`{0}` is not a filter; there are {known}", known = FIELDS.join(", "))]
    Unknown(String),
    /// Not a value of that field.
    #[error("{field}: `{value}` is not {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// What was given.
        value: String,
        /// What it could be.
        expected: &'static str,
    },
    /// Too many values.
    #[error("{0}: more than {MOST_VALUES} values")]
    TooMany(&'static str),
}

const FIELDS: [&str; 9] =
    ["pod", "label", "cluster", "identity", "ip", "port", "protocol", "verdict", "direction"];

impl Filter {
    /// Reads the query of a URL: `pod=default/client&verdict=DROPPED`.
    ///
    /// # Errors
    /// A field that is none, or a value that is none of its field.
    pub fn from_query(query: &str) -> Result<Self, FilterError> {
        let mut filter = Self::default();
        for (field, value) in form_urlencoded::parse(query.as_bytes()) {
            filter.add(&field, &value)?;
        }
        Ok(filter)
    }

    /// Adds a value.
    ///
    /// # Errors
    /// As [`Filter::from_query`].
    pub fn add(&mut self, field: &str, value: &str) -> Result<(), FilterError> {
        let Some(field) = FIELDS.into_iter().find(|known| *known == field) else {
            return Err(FilterError::Unknown(short(field)));
        };
        let wrong = |expected| FilterError::Value { field, value: short(value), expected };
        if value.is_empty() {
            return Err(wrong("anything"));
        }
        match field {
            "pod" if value.split('/').count() > 3 => Err(wrong("a pod, [[CLUSTER/]NAMESPACE/]NAME")),
            "pod" => push(&mut self.pods, field, value.to_owned()),
            "label" => push(&mut self.labels, field, value.to_owned()),
            "cluster" => push(&mut self.clusters, field, value.to_owned()),
            "identity" => {
                push(&mut self.identities, field, value.parse().map_err(|_| wrong("a numeric identity"))?)
            }
            "ip" => {
                let net = value.parse().or_else(|_| value.parse::<IpAddr>().map(IpNet::from));
                push(&mut self.ips, field, net.map_err(|_| wrong("an address or a prefix"))?)
            }
            "port" => push(&mut self.ports, field, value.parse().map_err(|_| wrong("a port"))?),
            "protocol" => {
                let known = ["tcp", "udp", "sctp", "icmp", "icmpv4", "icmpv6"];
                let value = value.to_ascii_lowercase();
                if !known.contains(&value.as_str()) {
                    return Err(wrong("tcp, udp, sctp, icmp, icmpv4 or icmpv6"));
                }
                push(&mut self.protocols, field, value)
            }
            "verdict" => {
                let verdict = match value.to_ascii_lowercase().as_str() {
                    "forwarded" => Verdict::Forwarded,
                    "dropped" => Verdict::Dropped,
                    _ => return Err(wrong("forwarded or dropped")),
                };
                push(&mut self.verdicts, field, verdict)
            }
            _ => {
                let direction = match value.to_ascii_lowercase().as_str() {
                    "ingress" => TrafficDirection::Ingress,
                    "egress" => TrafficDirection::Egress,
                    _ => return Err(wrong("ingress or egress")),
                };
                push(&mut self.directions, field, direction)
            }
        }
    }

    /// The query that says this filter.
    pub fn to_query(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        let texts = [("pod", &self.pods), ("label", &self.labels), ("cluster", &self.clusters)];
        for (field, values) in texts.into_iter().chain([("protocol", &self.protocols)]) {
            query.extend_pairs(values.iter().map(|value| (field, value)));
        }
        query.extend_pairs(self.identities.iter().map(|value| ("identity", value.to_string())));
        query.extend_pairs(self.ips.iter().map(|value| ("ip", value.to_string())));
        query.extend_pairs(self.ports.iter().map(|value| ("port", value.to_string())));
        query.extend_pairs(self.verdicts.iter().map(|value| ("verdict", format!("{value:?}"))));
        query.extend_pairs(self.directions.iter().map(|value| ("direction", format!("{value:?}"))));
        query.finish()
    }

    /// Whether a flow is wanted.
    pub fn wants(&self, flow: &Flow) -> bool {
        let sides = [(&flow.source, flow.ip.source), (&flow.destination, flow.ip.destination)];
        let of_side = |holds: &dyn Fn(&Endpoint) -> bool| sides.iter().any(|(side, _)| holds(side));
        let ports = flow.l4.as_ref().and_then(super::flow::Layer4::ports);
        let protocol = flow.l4.as_ref().map(|l4| l4.name().to_ascii_lowercase()).unwrap_or_default();
        any(&self.pods, |wanted| of_side(&|side| is_pod(side, wanted)))
            && any(&self.labels, |wanted| {
                of_side(&|side| wanted.split(',').all(|label| has_label(side, label)))
            })
            && any(&self.clusters, |wanted| of_side(&|side| side.cluster_name == *wanted))
            && any(&self.identities, |wanted| of_side(&|side| side.identity == *wanted))
            && any(&self.ips, |wanted| sides.iter().any(|(_, ip)| wanted.contains(ip)))
            && any(&self.ports, |wanted| ports.is_some_and(|(from, to)| [from, to].contains(wanted)))
            && any(&self.protocols, |wanted| {
                protocol == *wanted || (wanted == "icmp" && protocol.starts_with("icmp"))
            })
            && any(&self.verdicts, |wanted| flow.verdict == *wanted)
            && any(&self.directions, |wanted| flow.traffic_direction == *wanted)
    }
}

fn push<T>(values: &mut Vec<T>, field: &'static str, value: T) -> Result<(), FilterError> {
    if values.len() == MOST_VALUES {
        return Err(FilterError::TooMany(field));
    }
    values.push(value);
    Ok(())
}

/// No value is no condition.
fn any<T>(values: &[T], holds: impl FnMut(&T) -> bool) -> bool {
    values.is_empty() || values.iter().any(holds)
}

fn is_pod(side: &Endpoint, wanted: &str) -> bool {
    let parts: Vec<&str> = wanted.split('/').collect();
    let (cluster, namespace, name) = match parts.as_slice() {
        [name] => (None, None, *name),
        [namespace, name] => (None, Some(*namespace), *name),
        [cluster, namespace, name] => (Some(*cluster), Some(*namespace), *name),
        _ => return false,
    };
    !side.pod_name.is_empty()
        && side.pod_name.starts_with(name)
        && namespace.is_none_or(|namespace| side.namespace == namespace)
        && cluster.is_none_or(|cluster| side.cluster_name == cluster)
}

fn has_label(side: &Endpoint, wanted: &str) -> bool {
    side.labels.iter().any(|label| {
        let without_source = label.split_once(':').map_or(label.as_str(), |(_, rest)| rest);
        [label.as_str(), without_source]
            .into_iter()
            .any(|label| label == wanted || label.split_once('=').is_some_and(|(key, _)| key == wanted))
    })
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}
