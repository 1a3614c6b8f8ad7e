//! Where events come from.

pub mod entry;
pub mod host;
pub mod local;
pub mod mesh;
