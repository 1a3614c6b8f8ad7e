//! The way from a configuration to a connection: names, addresses, TLS with live identities; and what is
//! said when it ends on the way.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod dns;
mod mint;
mod names;
mod place;
mod problems;
mod renewal;
mod trust;
