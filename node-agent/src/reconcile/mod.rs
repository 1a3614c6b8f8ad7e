//! From events to the kernel.

pub mod core;

pub use self::core::{Policy, Reconciler, Started};
