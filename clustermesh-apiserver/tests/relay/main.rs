//! The relay against real gateways over mTLS on loopback: what it mirrors, what it refuses, and how it lets go.
#![allow(clippy::unwrap_used, reason = "in a test, and in what only tests call, a panic is the report")]

mod fixture;
mod hostile;
mod kubernetes;
mod lifecycle;
mod secrets;
