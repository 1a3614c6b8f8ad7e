//! Where events come from.

pub mod entry;
pub mod mesh;
