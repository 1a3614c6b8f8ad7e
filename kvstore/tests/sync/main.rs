//! The sync protocol from end to end: readers and writers over real connections, against a real etcd and against the
//! gateway, through everything that happens to connections and stores.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod engine;
mod etcd;
mod model;
mod pki;
#[path = "../support/ports.rs"]
mod ports;
mod proxy;
mod reader;
mod replicas;
mod side;
mod told;
mod wait;
mod writer;
