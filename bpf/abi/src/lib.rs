//! Map keys and values shared by the eBPF programs and the node-agent.
#![no_std]
