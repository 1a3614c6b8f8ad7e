//! Network policies by identity: parsed from the objects users write, and resolved to what each endpoint may do.
//!
//! Pure: no I/O and no clock.
#![forbid(unsafe_code)]
