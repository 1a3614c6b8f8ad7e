//! Packets that come out of the encryption device, decrypted and from the node that owns their source. They have no
//! Ethernet header.
//!
//! What is for a pod of this node is handed to it past the host's stack, and meets the same program on its veth as any
//! packet. Everything carries a mark that tells it was not in the clear.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::helpers::generated::bpf_skb_change_head;
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Addr, Counter, LocalPod, mark};

use crate::count::count;
use crate::encrypt::set_mark;
use crate::ipcache;
use crate::maps::LOCAL_PODS;
use crate::packet::{
    ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_LEN, IPV6_LEN, Ipv4Header, Ipv6Header, at, make_linear,
    read_addr,
};

#[inline(always)]
pub fn from_wire(ctx: &TcContext) -> i32 {
    set_mark(ctx, mark::DECRYPTED);
    // SAFETY: the context is the kernel's.
    let protocol = unsafe { (*ctx.skb.skb).protocol } as u16;
    let action = match protocol {
        ETHERTYPE_IPV4 => destination_v4(ctx).map(|addr| deliver::<true>(ctx, &addr)),
        ETHERTYPE_IPV6 => destination_v6(ctx).map(|addr| deliver::<false>(ctx, &addr)),
        _ => None,
    };
    match action {
        Some(action) => action,
        None => {
            count(Counter::EncryptError);
            TC_ACT_SHOT
        }
    }
}

#[inline(always)]
fn deliver<const V4: bool>(ctx: &TcContext, destination: &Addr) -> i32 {
    // SAFETY: the map is not preallocated, so an element that is found is not reused while the program runs.
    if let Some(pod) = unsafe { LOCAL_PODS.get(destination) } {
        // SAFETY: the context is the kernel's.
        if unsafe { bpf_skb_change_head(ctx.skb.skb, ETH_LEN as u32, 0) } == 0 {
            return hand_over(ctx, pod, if V4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 });
        }
        // Before 5.12 a kernel may find a full packet with a header too long for the device. The stack can do it too.
    } else if ipcache::lookup::<V4>(destination).is_some_and(ipcache::is_elsewhere) {
        // This node is nobody's way to another one: it would go on in the clear.
        count(Counter::DecryptedElsewhere);
        return TC_ACT_SHOT;
    }
    count(Counter::DecryptedToStack);
    TC_ACT_OK
}

/// Fills in the Ethernet header, for which there is room by now, and sends the frame to the pod.
#[inline(always)]
fn hand_over(ctx: &TcContext, pod: &LocalPod, ethertype: u16) -> i32 {
    let Some(header) = at::<[u16; 7]>(ctx, 0) else {
        count(Counter::EncryptError);
        return TC_ACT_SHOT;
    };
    let (to, from): (*const u16, *const u16) = (pod.pod_mac.as_ptr().cast(), pod.host_mac.as_ptr().cast());
    // SAFETY: `at` has checked the bounds, the addresses are six bytes each, and the machine has no alignment trap.
    unsafe {
        *header = [
            to.read_volatile(),
            to.add(1).read_volatile(),
            to.add(2).read_volatile(),
            from.read_volatile(),
            from.add(1).read_volatile(),
            from.add(2).read_volatile(),
            ethertype,
        ];
    }
    count(Counter::Decrypted);
    // SAFETY: the helper takes numbers only.
    unsafe { bpf_redirect(pod.ifindex, 0) as i32 }
}

#[inline(always)]
fn destination_v4(ctx: &TcContext) -> Option<Addr> {
    make_linear(ctx, IPV4_LEN);
    // SAFETY: `at` has checked the bounds.
    let ip = unsafe { &*at::<Ipv4Header>(ctx, 0)? };
    if ip.version_ihl >> 4 != 4 {
        return None;
    }
    Some(Addr::from_v4_word(ip.destination))
}

#[inline(always)]
fn destination_v6(ctx: &TcContext) -> Option<Addr> {
    make_linear(ctx, IPV6_LEN);
    // SAFETY: `at` has checked the bounds.
    let ip = unsafe { &*at::<Ipv6Header>(ctx, 0)? };
    let [version, ..] = ip.version_class_flow.to_ne_bytes();
    if version >> 4 != 6 {
        return None;
    }
    Some(read_addr(&ip.destination))
}
