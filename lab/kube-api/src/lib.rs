//! A small Kubernetes API server for the lab, used where the real one cannot be had.
//!
//! It behaves as the Kubernetes documentation says, so that the same clients and the same scenarios pass on
//! it and on a real kube-apiserver. Like that one it runs no controllers: a Deployment is an object and
//! nothing more. The exceptions are what a test would otherwise wait for in vain, and are what
//! kube-controller-manager would do: a namespace's content goes with it, and every namespace has its
//! `default` ServiceAccount. There are no webhooks, no CEL rules, no tokens, and no
//! answers in protobuf.
//!
//! The way of a request: [`server`] reads it, `api` routes it, [`rbac`] allows it, [`request`] makes it
//! typed. All resources take the same way through `api::write` and `api::read`, driven by their
//! [`resource::Resource`] and its [`schema::Schema`]; what single kinds demand beyond that is in `kinds`.
//! [`store`] keeps the objects and the history that watches read.

#![forbid(unsafe_code)]

mod api;
pub mod auth;
mod config;
pub mod fields;
mod kinds;
mod openapi;
pub mod patch;
pub mod ports;
pub mod protobuf;
pub mod rbac;
pub mod real;
pub mod request;
pub mod resource;
pub mod schema;
pub mod selector;
pub mod server;
pub mod status;
pub mod store;
pub mod table;
pub mod validate;

pub use config::{Config, ServeError, Tls};
pub use server::KubeApi;
