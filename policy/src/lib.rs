//! Network policies by identity: parsed from the objects users write, and resolved to what each endpoint may do.
//!
//! ```text
//! policies ──▶ parse ──▶ model ─┐
//! identities, services ─────────┼─▶ resolve::Engine ──▶ Changes: a policy map per endpoint, identities of CIDRs
//! endpoints, namespaces ────────┘                           │
//!                                                           └─▶ lookup: what the map says about a packet
//! ```
//!
//! Pure: no I/O and no clock. What comes out is a function of what went in last, not of the order it came in.
#![forbid(unsafe_code)]

pub mod labels;
pub mod lookup;
pub mod model;
pub mod parse;
pub mod resolve;

pub use model::{Direction, Effect, PolicyKind, PolicyName, RuleOrigin};
pub use parse::{Parsed, Problem};
pub use resolve::{
    Changes, CidrIdentity, Decision, EndpointChange, EndpointId, Enforcement, Engine, Explanation, L4Prefix,
    NamedPorts, PolicyKey, Resolved, RuleId, Service, ServiceName, Settings, Subject,
};
