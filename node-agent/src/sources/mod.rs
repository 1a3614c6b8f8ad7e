//! Where events come from.

pub mod entry;
