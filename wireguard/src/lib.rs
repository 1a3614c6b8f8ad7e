//! WireGuard in user space around boringtun's `noise::Tunn`, and how to configure it or the kernel's.
