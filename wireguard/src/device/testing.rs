//! What tests compare with: packets and handshakes made step by step from their definitions.

mod noise;
mod packets;

pub(crate) use noise::{ByHand, Keys};
pub(crate) use packets::{Family, TestPacket, packet_is_sound};
