//! The gateway as its clients see it: over mTLS, with stock `etcdctl`, with the etcd-client crate, beside a real etcd.
#![allow(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

mod access;
mod differential;
mod etcd_client_crate;
mod etcdctl;
mod fixture;
mod hostile;
#[path = "../support/ports.rs"]
mod ports;
