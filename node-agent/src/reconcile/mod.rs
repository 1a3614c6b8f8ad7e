//! From events to the kernel.

pub mod core;
pub mod task;

pub use self::core::{Policy, Reconciler, Started};
pub use self::task::{Looks, Maps, Progress, Task};
