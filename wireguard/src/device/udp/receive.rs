//! Receiving in batches.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{Control, Endpoint, RawAddress};

/// Bytes of one message: the most that `UDP_GRO` joins.
const MESSAGE_MAX: usize = 65_536;

/// Messages asked for in one call while the kernel joins none, and while it does: a few joined ones fill the cache.
const MESSAGES: usize = 32;
const JOINED_MESSAGES: usize = 4;

/// Buffers for one call of `recvmmsg`, made once.
pub(crate) struct ReceiveBatch {
    buffers: Box<[u8]>,
    addresses: Box<[RawAddress]>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    joined: bool,
}

/// One message: datagrams of one sender, joined by the kernel.
pub(crate) struct Datagrams<'a> {
    /// All of them, one after the other.
    pub(crate) bytes: &'a mut [u8],
    /// Bytes of each but the last.
    pub(crate) size: usize,
    /// Whom they come from, and which address of ours they went to.
    pub(crate) from: Endpoint,
    /// Whether the network marked them as having met congestion (ECN CE).
    pub(crate) congested: bool,
}

// SAFETY: the pointers in headers and vectors lead into memory that the batch itself owns, or are written anew
// before each call that reads them.
unsafe impl Send for ReceiveBatch {}

impl ReceiveBatch {
    pub(crate) fn new() -> Self {
        Self {
            buffers: vec![0; MESSAGES * MESSAGE_MAX].into(),
            addresses: vec![RawAddress::default(); MESSAGES].into(),
            controls: vec![Control([0; 128]); MESSAGES].into(),
            vectors: vec![libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MESSAGES].into(),
            // SAFETY: all zero is a valid `mmsghdr`, with null pointers and no lengths.
            headers: vec![unsafe { std::mem::zeroed() }; MESSAGES].into(),
            joined: false,
        }
    }

    /// Receives what is there, at most a batch, and gives it to `handle` message by message. Returns how many there
    /// were.
    pub(crate) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        mut handle: impl FnMut(Datagrams<'_>),
    ) -> io::Result<usize> {
        let asked = if self.joined { JOINED_MESSAGES } else { MESSAGES };
        self.point_headers(asked);
        let flags = libc::MSG_DONTWAIT;
        let headers = self.headers.as_mut_ptr();
        // SAFETY: the first `asked` headers point to buffers, addresses and control rooms of the lengths they say,
        // which live in `self`, and nothing else touches them during the call.
        let received =
            unsafe { libc::recvmmsg(socket.as_raw_fd(), headers, asked as u32, flags, std::ptr::null_mut()) };
        let Ok(received) = usize::try_from(received) else {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(0) } else { Err(error) };
        };
        self.joined = false;
        for index in 0..received {
            let header = &self.headers[index];
            let length = (header.msg_len as usize).min(MESSAGE_MAX);
            let control = parse_control(&header.msg_hdr);
            let Some(remote) = self.addresses[index].parse() else { continue };
            let start = index * MESSAGE_MAX;
            self.joined |= control.size.is_some();
            handle(Datagrams {
                bytes: &mut self.buffers[start..start + length],
                size: control.size.unwrap_or(length).max(1),
                from: Endpoint { remote, local: control.local },
                congested: control.congested,
            });
        }
        Ok(received)
    }

    fn point_headers(&mut self, count: usize) {
        for index in 0..count {
            let buffer = &mut self.buffers[index * MESSAGE_MAX..][..MESSAGE_MAX];
            self.vectors[index] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: MESSAGE_MAX };
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = std::ptr::from_mut(&mut self.addresses[index]).cast();
            header.msg_namelen = size_of::<RawAddress>() as libc::socklen_t;
            header.msg_iov = &mut self.vectors[index];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[index].0.as_mut_ptr().cast();
            header.msg_controllen = size_of::<Control>();
            header.msg_flags = 0;
        }
    }
}

#[derive(Default)]
struct Parsed {
    size: Option<usize>,
    local: Option<IpAddr>,
    congested: bool,
}

const ECN_MASK: u8 = 3;
const ECN_CE: u8 = 3;

fn parse_control(header: &libc::msghdr) -> Parsed {
    let mut parsed = Parsed::default();
    // SAFETY: the kernel filled `msg_control` with `msg_controllen` bytes of well-formed control messages, which the
    // CMSG macros walk; every payload is read unaligned and is at least as long as its kind is.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = at.as_ref() {
            let data = libc::CMSG_DATA(at);
            match (message.cmsg_level, message.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    parsed.size = usize::try_from(data.cast::<libc::c_int>().read_unaligned()).ok();
                }
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    parsed.local = Some(IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()));
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    parsed.local = Some(IpAddr::from(info.ipi6_addr.s6_addr));
                }
                // One byte for IPv4, an int for IPv6: the first byte of which holds the bits on any machine whose
                // int is in little-endian order, and is read as an int where it is one.
                (libc::IPPROTO_IP, libc::IP_TOS) => parsed.congested = *data & ECN_MASK == ECN_CE,
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    let class = data.cast::<libc::c_int>().read_unaligned();
                    parsed.congested = class as u8 & ECN_MASK == ECN_CE;
                }
                _ => {}
            }
            at = libc::CMSG_NXTHDR(header, at);
        }
    }
    parsed
}
