//! Sending in batches.

use std::io;
use std::net::IpAddr;

use super::{Control, Endpoint, Pair, RawAddress};

/// The largest UDP payload over IPv4; one message of several datagrams has to fit, too.
const MESSAGE_MAX: usize = 65_507;

/// Datagrams that the kernel cuts one message into, at most (128 from Linux 6.9).
const SEGMENTS_MAX: u16 = 64;

/// Messages in one call.
const MESSAGES: usize = 64;

/// Datagrams for one peer, gathered and then sent with as few calls as can be. All memory is taken at the beginning.
pub(crate) struct SendBatch {
    buffer: Box<[u8]>,
    filled: usize,
    messages: Vec<Message>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    /// The kernel cannot cut for this route (no checksum offload): each datagram by itself.
    singly: bool,
}

/// Datagrams of one size, of which the last may be shorter: what the kernel can cut apart.
#[derive(Clone, Copy)]
struct Message {
    start: usize,
    length: usize,
    size: u16,
    count: u16,
    ecn: u8,
}

/// What became of a batch.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Datagrams the kernel took.
    pub(crate) datagrams: u64,
    /// Their bytes of UDP payload.
    pub(crate) bytes: u64,
    /// Datagrams it did not take.
    pub(crate) failed: u64,
}

// SAFETY: the pointers in headers and vectors lead into memory that the batch itself owns, or are written anew
// before each call that reads them.
unsafe impl Send for SendBatch {}

impl SendBatch {
    /// Room for `size` bytes.
    pub(crate) fn new(size: usize) -> Self {
        Self {
            buffer: vec![0; size].into(),
            filled: 0,
            messages: Vec::with_capacity(MESSAGES),
            controls: vec![Control([0; 128]); MESSAGES].into(),
            vectors: vec![libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MESSAGES].into(),
            // SAFETY: all zero is a valid `mmsghdr`, with null pointers and no lengths.
            headers: vec![unsafe { std::mem::zeroed() }; MESSAGES].into(),
            singly: false,
        }
    }

    /// Whether a datagram of `length` bytes fits before the batch has to be sent.
    pub(crate) fn has_room(&self, length: usize) -> bool {
        self.buffer.len() - self.filled >= length && self.messages.len() < MESSAGES
    }

    /// Whether there is nothing to send.
    pub(crate) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Where the next datagram is to be written.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        &mut self.buffer[self.filled..]
    }

    /// Adds the `length` bytes that were written into [`SendBatch::space`] as a datagram, with these ECN bits.
    pub(crate) fn add(&mut self, length: usize, ecn: u8) {
        let start = self.filled;
        self.filled += length;
        if let Some(last) = self.messages.last_mut() {
            let size = usize::from(last.size);
            let open = last.length == size * usize::from(last.count);
            if open
                && !self.singly
                && length <= size
                && last.ecn == ecn
                && last.count < SEGMENTS_MAX
                && last.length + length <= MESSAGE_MAX
            {
                last.length += length;
                last.count += 1;
                return;
            }
        }
        // A datagram is never longer than the buffer's 64 KiB frames make it.
        self.messages.push(Message { start, length, size: length.min(0xffff) as u16, count: 1, ecn });
    }

    /// Sends everything to `to` and forgets it. An own address that is not ours any more is taken from `to`.
    pub(crate) fn send(&mut self, sockets: &Pair, to: &mut Endpoint) -> Sent {
        let mut sent = Sent::default();
        let messages = std::mem::take(&mut self.messages);
        match sockets.toward(to.remote.ip()) {
            Some(socket) => self.send_all(socket, to, &messages, &mut sent),
            None => sent.failed = messages.iter().map(|message| u64::from(message.count)).sum(),
        }
        self.messages = messages;
        self.clear();
        sent
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.messages.clear();
        self.filled = 0;
    }

    fn send_all(&mut self, socket: i32, to: &mut Endpoint, messages: &[Message], sent: &mut Sent) {
        let mut rest = messages;
        while let Some(first) = rest.first() {
            match self.send_some(socket, to, &rest[..rest.len().min(MESSAGES)]) {
                Ok(taken) => {
                    let taken = taken.clamp(1, rest.len());
                    for message in &rest[..taken] {
                        sent.datagrams += u64::from(message.count);
                        sent.bytes += message.length as u64;
                    }
                    rest = &rest[taken..];
                }
                Err(error) if to.local.is_some() && source_is_gone(&error) => to.local = None,
                Err(error) if first.count > 1 && cannot_cut(&error) => {
                    // EIO: the route's device does no checksums, so it will not the next time either.
                    self.singly |= error.raw_os_error() == Some(libc::EIO);
                    self.send_singly(socket, to, *first, sent);
                    rest = &rest[1..];
                }
                Err(_) => {
                    sent.failed += u64::from(first.count);
                    rest = &rest[1..];
                }
            }
        }
    }

    fn send_singly(&mut self, socket: i32, to: &Endpoint, message: Message, sent: &mut Sent) {
        let size = usize::from(message.size);
        for start in (0..message.length).step_by(size) {
            let length = size.min(message.length - start);
            let single = Message { start: message.start + start, length, count: 1, ..message };
            match self.send_some(socket, to, &[single]) {
                Ok(_) => {
                    sent.datagrams += 1;
                    sent.bytes += length as u64;
                }
                Err(_) => sent.failed += 1,
            }
        }
    }

    fn send_some(&mut self, socket: i32, to: &Endpoint, messages: &[Message]) -> io::Result<usize> {
        let (mut address, address_length) = RawAddress::new(to.remote);
        for (index, message) in messages.iter().enumerate() {
            let data = &mut self.buffer[message.start..message.start + message.length];
            self.vectors[index] = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = std::ptr::from_mut(&mut address).cast();
            header.msg_namelen = address_length;
            header.msg_iov = &mut self.vectors[index];
            header.msg_iovlen = 1;
            let control = &mut self.controls[index];
            let length = write_control(control, to, message);
            header.msg_controllen = length;
            header.msg_control =
                if length == 0 { std::ptr::null_mut() } else { control.0.as_mut_ptr().cast() };
        }
        loop {
            // SAFETY: the first `messages.len()` headers point to data, an address and control messages of the lengths
            // they say, all of which live through the call.
            let taken =
                unsafe { libc::sendmmsg(socket, self.headers.as_mut_ptr(), messages.len() as u32, 0) };
            match usize::try_from(taken).map_err(|_| io::Error::last_os_error()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

fn source_is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::EHOSTUNREACH)
    )
}

fn cannot_cut(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE | libc::EOPNOTSUPP))
}

/// Returns how many bytes of `control` are used.
fn write_control(control: &mut Control, to: &Endpoint, message: &Message) -> usize {
    let mut writer = ControlWriter { control, used: 0 };
    if message.count > 1 {
        writer.add(libc::SOL_UDP, libc::UDP_SEGMENT, &message.size);
    }
    match to.local {
        Some(IpAddr::V4(local)) => {
            let local = libc::in_addr { s_addr: u32::from_ne_bytes(local.octets()) };
            let any = libc::in_addr { s_addr: 0 };
            let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: local, ipi_addr: any };
            writer.add(libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
        }
        Some(IpAddr::V6(local)) => {
            let local = libc::in6_addr { s6_addr: local.octets() };
            writer.add(
                libc::IPPROTO_IPV6,
                libc::IPV6_PKTINFO,
                &libc::in6_pktinfo { ipi6_addr: local, ipi6_ifindex: 0 },
            );
        }
        None => {}
    }
    if message.ecn != 0 {
        let class = libc::c_int::from(message.ecn);
        if to.remote.is_ipv4() {
            writer.add(libc::IPPROTO_IP, libc::IP_TOS, &class);
        } else {
            writer.add(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &class);
        }
    }
    writer.used
}

struct ControlWriter<'a> {
    control: &'a mut Control,
    used: usize,
}

impl ControlWriter<'_> {
    fn add<T>(&mut self, level: i32, kind: i32, value: &T) {
        // SAFETY: CMSG_SPACE and CMSG_LEN only calculate.
        let (space, length) =
            unsafe { (libc::CMSG_SPACE(size_of::<T>() as u32), libc::CMSG_LEN(size_of::<T>() as u32)) };
        let (space, length) = (space as usize, length as usize);
        let room = &mut self.control.0[self.used..self.used + space];
        let header = libc::cmsghdr { cmsg_len: length, cmsg_level: level, cmsg_type: kind };
        let at = room.as_mut_ptr();
        // SAFETY: `room` has CMSG_SPACE bytes: a header, and a payload of the size of `T` at its aligned end.
        unsafe {
            at.cast::<libc::cmsghdr>().write_unaligned(header);
            at.add(libc::CMSG_LEN(0) as usize).cast::<T>().write_unaligned(std::ptr::read(value));
        }
        self.used += space;
    }
}
