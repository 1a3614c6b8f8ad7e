//! Steps about which pods reach which: connections that are let through or not, and flows that go on or are cut.

use std::time::Duration;

use serde::Deserialize;

use super::action::{Family, PodRef};
use super::parse::duration;

/// Connects from a pod to a pod, at each of its addresses.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connects {
    /// Who connects.
    pub from: PodRef,
    /// To whom.
    pub to: PodRef,
    /// To which TCP port.
    #[serde(default = "echo")]
    pub port: u16,
    /// Over which family only; over all that the pod has when left out.
    pub family: Option<Family>,
    /// What becomes of it.
    pub expect: Expect,
    /// Tried anew until then, where it does not hold at once.
    #[serde(default = "half_a_minute", deserialize_with = "duration")]
    pub within: Duration,
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expect {
    /// It is made, and answered.
    Allowed,
    /// Nothing comes back, not even a refusal.
    Denied,
}

/// Makes a connection and keeps asking over it, until `cut`, or the end of the scenario.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flow {
    /// How later steps call it.
    pub name: String,
    /// Who connects.
    pub from: PodRef,
    /// To whom.
    pub to: PodRef,
    /// To which TCP port.
    #[serde(default = "echo")]
    pub port: u16,
    /// Over which family; the pod's first one when left out.
    pub family: Option<Family>,
    /// How long the first answer may take.
    #[serde(default = "half_a_minute", deserialize_with = "duration")]
    pub within: Duration,
}

/// Connects from a pod to a pod all the time, each time anew, until `endAttempts`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attempts {
    /// How later steps call it.
    pub name: String,
    /// Who connects.
    pub from: PodRef,
    /// To whom.
    pub to: PodRef,
    /// To which TCP port.
    #[serde(default = "echo")]
    pub port: u16,
    /// Over which family; the pod's first one when left out.
    pub family: Option<Family>,
}

/// Ends attempts and judges all of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndAttempts {
    /// Which.
    pub name: String,
    /// What has become of every single one.
    pub expect: Expect,
}

/// A flow gets more answers than it has had so far.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoesOn {
    /// Which.
    pub flow: String,
    /// How many more.
    #[serde(default = "five")]
    pub answers: usize,
    /// How long that may take.
    #[serde(default = "half_a_minute", deserialize_with = "duration")]
    pub within: Duration,
}

/// A flow that has been answered until now gets no answer any more.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// Which.
    pub flow: String,
    /// How long that may take.
    #[serde(default = "half_a_minute", deserialize_with = "duration")]
    pub within: Duration,
}

fn echo() -> u16 {
    8080
}

fn five() -> usize {
    5
}

fn half_a_minute() -> Duration {
    Duration::from_secs(30)
}
