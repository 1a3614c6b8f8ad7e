//! Where events come from.

pub mod entry;
pub mod local;
pub mod mesh;
