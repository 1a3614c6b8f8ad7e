//! What a stranger and a peer may send: bytes of any kind, packets of any kind encrypted as they should be, several joined
//! into one message, repeated, cut, with bits exchanged, handshakes in between. Whatever it is, another peer's packets
//! arrive.
//!
//! As root: the device is a real one, in a network namespace of its own; datagrams are given to it by hand.
#![no_main]

use std::cell::RefCell;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use isthmus_wireguard::config::{
    AllowedIp, Change, Configurable, DeviceUpdate, PeerUpdate, PrivateKey, PublicKey,
};
use isthmus_wireguard::device::fuzzing::Receiver;
use isthmus_wireguard::device::{Count, Device, DeviceOptions};
use nix::sched::{CloneFlags, unshare};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    thread_local!(static FIELD: RefCell<Option<Field>> = const { RefCell::new(None) });
    FIELD.with_borrow_mut(|field| field.get_or_insert_with(Field::new).run(bytes));
});

/// Sessions end after three minutes; these are made anew before.
const RENEW: Duration = Duration::from_secs(60);

struct Field {
    receiver: Receiver,
    key: PublicKey,
    /// Does what the input says.
    hostile: End,
    /// Sends one packet after each input, which must arrive.
    witness: End,
    begun: Instant,
}

impl Field {
    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("network namespaces, which root may make");
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(up.expect("ip").success());
        let options = DeviceOptions { ephemeral: true, ..DeviceOptions::new("wgfuzz0", 1420) };
        let device = Device::open(&options).expect("a TUN device");
        let private = PrivateKey::generate();
        let key = private.public_key();
        let (hostile, witness) = (End::new(key), End::new(key));
        let peer = |end: &End, prefix: &str| PeerUpdate {
            endpoint: Some(end.address()),
            allowed_ips: vec![AllowedIp::Add(prefix.parse().expect("a prefix"))],
            ..PeerUpdate::new(end.private.public_key())
        };
        let peers = vec![peer(&hostile, "10.1.0.0/16"), peer(&witness, "10.2.0.0/16")];
        let update = DeviceUpdate { private_key: Change::Set(private), peers, ..DeviceUpdate::default() };
        device.apply(update).expect("a configuration");
        let mut field =
            Self { receiver: Receiver::new(device), key, hostile, witness, begun: Instant::now() };
        field.hostile.shake_hands(&mut field.receiver);
        field.witness.shake_hands(&mut field.receiver);
        field
    }

    fn run(&mut self, bytes: &[u8]) {
        if self.begun.elapsed() > RENEW {
            self.begun = Instant::now();
            self.hostile.renew(self.key);
            self.witness.renew(self.key);
            self.hostile.shake_hands(&mut self.receiver);
            self.witness.shake_hands(&mut self.receiver);
        }
        let mut input = Input(bytes);
        let mut last = Vec::new();
        while let Some(what) = input.byte() {
            self.act(what, &mut input, &mut last);
        }
        let before = self.receiver.device().count(Count::ReceivedPackets);
        let mut datagram = self.witness.seal(&tcp([10, 2, 0, 1], 0, 0x10, b"here"));
        let size = datagram.len();
        self.receiver.receive(self.witness.address(), &mut datagram, size);
        assert_eq!(
            self.receiver.device().count(Count::ReceivedPackets),
            before + 1,
            "the other peer is heard"
        );
    }

    fn act(&mut self, what: u8, input: &mut Input<'_>, last: &mut Vec<u8>) {
        let mut size = None;
        match what % 8 {
            0 => *last = input.chunk().to_vec(),
            1 => *last = self.hostile.seal(input.chunk()),
            2 => {
                // Segments of one stream, which the device may join; as one message.
                let source = [10, 1, 0, input.byte().unwrap_or(0)];
                let (flags, mut sequence) = (input.byte().unwrap_or(0x10), input.number());
                let payload = input.chunk();
                last.clear();
                for _ in 0..usize::from(what >> 4) + 1 {
                    let datagram = self.hostile.seal(&tcp(source, sequence, flags, payload));
                    size = Some(datagram.len());
                    last.extend(datagram);
                    sequence = sequence.wrapping_add(payload.len() as u32);
                }
            }
            3 => {
                // A header that is right, and what may be wrong behind it.
                let mut packet = tcp([10, 1, 0, 1], 0, 0x10, b"");
                let (at, with) = (usize::from(input.byte().unwrap_or(0)), input.chunk());
                packet.iter_mut().skip(at).zip(with).for_each(|(old, new)| *old ^= new);
                *last = self.hostile.seal(&packet);
            }
            4 => {
                let at = usize::from(input.byte().unwrap_or(0));
                last.iter_mut().skip(at).zip(input.chunk()).for_each(|(old, new)| *old ^= new);
            }
            5 => last.truncate(usize::from(input.byte().unwrap_or(0))),
            6 => *last = self.hostile.initiation(),
            // Once more as it was.
            _ => {}
        }
        let size = size.unwrap_or(match what {
            0..128 => last.len(),
            _ => usize::from(what),
        });
        self.receiver.receive(self.hostile.address(), &mut last.clone(), size);
    }
}

/// The far end of a session.
struct End {
    private: PrivateKey,
    tunn: Tunn,
    socket: UdpSocket,
}

impl End {
    fn new(device: PublicKey) -> Self {
        let private = PrivateKey::generate();
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a UDP port");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        Self { tunn: tunn(&private, device), private, socket }
    }

    fn address(&self) -> SocketAddr {
        self.socket.local_addr().expect("it is bound")
    }

    fn renew(&mut self, device: PublicKey) {
        self.tunn = tunn(&self.private, device);
    }

    fn seal(&mut self, packet: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0; packet.len() + 160];
        match self.tunn.encapsulate(packet, &mut datagram) {
            TunnResult::WriteToNetwork(sealed) => sealed.to_vec(),
            result => panic!("there is a session: {result:?}"),
        }
    }

    fn initiation(&mut self) -> Vec<u8> {
        let mut buffer = [0; 148];
        match self.tunn.format_handshake_initiation(&mut buffer, true) {
            TunnResult::WriteToNetwork(message) => message.to_vec(),
            _ => Vec::new(),
        }
    }

    /// Until there is a session. Whatever else the device has sent here is passed over; when it is busy with what the
    /// input made it do, the first attempts may be in vain.
    fn shake_hands(&mut self, receiver: &mut Receiver) {
        let address = self.address();
        for _ in 0..100 {
            let mut message = self.initiation();
            let size = message.len();
            receiver.receive(address, &mut message, size);
            let mut buffer = [0; 2048];
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(100) {
                let Ok(length) = self.socket.recv(&mut buffer) else { break };
                let mut answer = [0; 2048];
                if let TunnResult::WriteToNetwork(keepalive) =
                    self.tunn.decapsulate(None, &buffer[..length], &mut answer)
                {
                    let size = keepalive.len();
                    receiver.receive(address, keepalive, size);
                    return;
                }
            }
        }
        panic!("no handshake was answered");
    }
}

fn tunn(private: &PrivateKey, device: PublicKey) -> Tunn {
    Tunn::new(private.secret().clone(), device.into(), None, None, 0, None)
}

/// A TCP segment in IPv4, whose lengths and checksums are right.
fn tcp(source: [u8; 4], sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let total = (40 + payload.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
    packet.extend(source);
    packet.extend([10, 9, 0, 1]);
    packet.extend([0, 80, 0x9c, 0x40]);
    packet.extend(sequence.to_be_bytes());
    packet.extend([0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    packet.extend(payload);
    let header = checksum(0, &packet[..20]);
    packet[10..12].copy_from_slice(&header.to_be_bytes());
    let pseudo = u32::from(total) - 20 + 6;
    let sum = checksum(pseudo, &packet[12..]);
    packet[36..38].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum = start + bytes.chunks(2).map(word).sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The fuzzer's bytes, taken from the front.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> u32 {
        u32::from_be_bytes(std::array::from_fn(|_| self.byte().unwrap_or(0)))
    }

    /// So many bytes as the first two say, as far as there are any.
    fn chunk(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte().unwrap_or(0)) << 8 | usize::from(self.byte().unwrap_or(0));
        let (chunk, rest) = self.0.split_at((length % 2048).min(self.0.len()));
        self.0 = rest;
        chunk
    }
}
