//! Traffic between the pods of different nodes goes through a WireGuard device; this keeps the device as the mesh asks.
//!
//! ```text
//! mesh ──▶ peers (who should be a peer) ──▶ device (what to tell it) ──▶ isthmus-wireguard, or the kernel
//! wireguard.key ──▶ rotation ──▶ publication ──▶ this node's annotation ──▶ the mesh of all others
//! ```

pub mod device;
pub mod key_file;
pub mod metrics;
pub mod peers;
pub mod publication;
pub mod reach;
pub mod rotation;
pub mod shared;
pub mod status;
pub mod task;
pub mod underlay;

pub use self::key_file::KeyFiles;
pub use self::reach::{Prober, ReachReport};
pub use self::shared::SharedPeers;
pub use self::status::EncryptionStatus;
pub use self::task::{Settings, Task};
