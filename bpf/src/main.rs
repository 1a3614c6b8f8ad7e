//! The eBPF programs.
//!
//! Two ways lead from a service's address to a backend:
//! - [`socket`]: at `connect()` and `sendmsg()`, once per connection;
//! - [`from_pod`] and [`to_pod`]: per packet on the host side of a pod's veth, with connection tracking, for what the
//!   socket hooks do not see.
//!
//! Both choose through [`service`]. What is not addressed to a service passes untouched everywhere.
//!
//! What a pod may send and get is up to its [`policy`], which is asked about packets as they are between the pods: after a
//! service's address was translated on the way out, and before the answer's is on the way in.
//!
//! After that, [`encrypt`] gives what goes to a pod of another node to the encryption device, and [`from_wire`] hands
//! what comes out of it to the pod.
//!
//! Written for Linux 5.10: no helper or verifier feature is newer, or it stands behind a constant of [`config`] that
//! the loader sets and the verifier removes the branch of.
#![no_std]
#![no_main]

mod checksum;
mod config;
mod conntrack;
mod count;
mod encrypt;
mod event;
mod fragment;
mod from_pod;
mod from_wire;
mod icmp;
mod ipcache;
mod maps;
mod packet;
mod policy;
mod refuse;
mod rewrite;
mod service;
mod socket;
mod to_pod;

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::macros::{cgroup_sock_addr, classifier};
use aya_ebpf::programs::{SockAddrContext, TcContext};

#[classifier]
#[inline(always)]
pub fn tc_from_pod(ctx: TcContext) -> i32 {
    from_pod::from_pod(&ctx)
}

#[classifier]
#[inline(always)]
pub fn tc_to_pod(ctx: TcContext) -> i32 {
    to_pod::to_pod(&ctx)
}

#[classifier]
pub fn tc_from_wire(ctx: TcContext) -> i32 {
    from_wire::from_wire(&ctx)
}

#[classifier]
pub fn tc_to_network(ctx: TcContext) -> i32 {
    encrypt::to_network(&ctx)
}

/// Does nothing: what the benchmark subtracts.
#[classifier]
pub fn tc_empty(_ctx: TcContext) -> i32 {
    TC_ACT_OK
}

#[cgroup_sock_addr(connect4)]
pub fn sock_connect4(ctx: SockAddrContext) -> i32 {
    socket::connect4(ctx.sock_addr)
}

#[cgroup_sock_addr(connect6)]
pub fn sock_connect6(ctx: SockAddrContext) -> i32 {
    socket::connect6(ctx.sock_addr)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sock_sendmsg4(ctx: SockAddrContext) -> i32 {
    socket::sendmsg4(ctx.sock_addr)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sock_sendmsg6(ctx: SockAddrContext) -> i32 {
    socket::sendmsg6(ctx.sock_addr)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn sock_recvmsg4(ctx: SockAddrContext) -> i32 {
    socket::peer4(ctx.sock_addr)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn sock_recvmsg6(ctx: SockAddrContext) -> i32 {
    socket::peer6(ctx.sock_addr)
}

#[cgroup_sock_addr(getpeername4)]
pub fn sock_getpeername4(ctx: SockAddrContext) -> i32 {
    socket::peer4(ctx.sock_addr)
}

#[cgroup_sock_addr(getpeername6)]
pub fn sock_getpeername6(ctx: SockAddrContext) -> i32 {
    socket::peer6(ctx.sock_addr)
}

/// What a program does with a packet.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Verdict {
    Pass = 0,
    Drop = 1,
    /// Back out of the device that it came in by.
    TurnBack = 2,
    /// Answered as a closed port would.
    Refuse = 3,
}

impl Verdict {
    #[inline(always)]
    fn action(self, ctx: &TcContext) -> i32 {
        match self {
            Self::Pass => TC_ACT_OK,
            Self::Drop | Self::Refuse => TC_ACT_SHOT,
            Self::TurnBack => {
                policy::vouch_for(ctx);
                // SAFETY: the helper takes numbers only; the context pointer is the kernel's.
                unsafe { aya_ebpf::helpers::bpf_redirect((*ctx.skb.skb).ifindex, 0) as i32 }
            }
        }
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The optimiser removes every panic, or the verifier would refuse the endless loop.
    loop {}
}

/// Helpers such as `bpf_set_retval` are open to every licence, `bpf_skb_*` too; the checksum helpers are not.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
