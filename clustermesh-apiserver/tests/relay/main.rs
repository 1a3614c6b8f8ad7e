//! The relay against real gateways over mTLS on loopback: what it mirrors, what it refuses, and how it lets go.

mod fixture;
mod hostile;
mod lifecycle;
