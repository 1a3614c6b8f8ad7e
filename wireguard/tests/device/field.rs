//! A device in a namespace of its own, applications on its inside, and peers played by hand on its outside.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use isthmus_wireguard::config::{AllowedIp, Configurable, DeviceUpdate, PeerUpdate, PrivateKey, PublicKey};
use isthmus_wireguard::device::{Count, Device, DeviceOptions, MessageBounds};

use crate::netns::Namespace;

/// How long anything that is waited for may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Port of the applications that listen on the inside.
pub(crate) const APPLICATION: u16 = 7000;

/// A device `wg0` with the addresses 10.9.0.1 and fd09::1. Everything behind 10.9.0.0/16 and fd09::/16 goes into it.
pub(crate) struct Field {
    pub(crate) namespace: Namespace,
    pub(crate) device: Arc<Device>,
    pub(crate) key: PrivateKey,
}

impl Field {
    pub(crate) fn new() -> Self {
        Self::in_namespace(Namespace::new(), 1, MessageBounds::PAPER)
    }

    pub(crate) fn in_namespace(namespace: Namespace, host: u8, bounds: MessageBounds) -> Self {
        let device = Arc::new(open(&namespace, DeviceOptions { bounds, ..options(true) }));
        namespace.ip_batch(&[
            format!("address add 10.9.0.{host}/16 dev wg0"),
            format!("address add fd09::{host}/16 dev wg0 nodad"),
        ]);
        let field = Self { namespace, device, key: PrivateKey::generate() };
        let private_key = isthmus_wireguard::config::Change::Set(field.key.clone());
        field.apply(DeviceUpdate { private_key, ..DeviceUpdate::default() });
        field
    }

    /// Applies an update where the device is, since it may open sockets.
    pub(crate) fn apply(&self, update: DeviceUpdate) {
        let device = Arc::clone(&self.device);
        let applied = self.namespace.enter(move || Ok(device.apply(update)));
        applied.expect("the namespace").expect("a good update");
    }

    /// Adds or changes a peer.
    pub(crate) fn peer(&self, peer: PeerUpdate) {
        self.apply(DeviceUpdate { peers: vec![peer], ..DeviceUpdate::default() });
    }

    /// A peer played by hand that owns these prefixes, on IPv4 or IPv6, and that the device knows but not where.
    pub(crate) fn hand_peer(&self, outside: IpAddr, prefixes: &[&str]) -> HandPeer {
        let key = PrivateKey::generate();
        self.peer(PeerUpdate { allowed_ips: owns(prefixes), ..PeerUpdate::new(key.public_key()) });
        HandPeer::new(self, key, self.key.public_key(), outside)
    }

    /// Where the device listens.
    pub(crate) fn listens(&self, outside: IpAddr) -> SocketAddr {
        SocketAddr::new(outside, self.device.state().listen_port)
    }

    /// A socket outside the tunnel, or an application inside.
    pub(crate) fn socket(&self, address: SocketAddr) -> UdpSocket {
        let socket = self.namespace.enter(move || UdpSocket::bind(address)).expect("a free port");
        socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        socket
    }

    /// An application on the inside that listens.
    pub(crate) fn application(&self) -> UdpSocket {
        self.socket((Ipv6Addr::UNSPECIFIED, APPLICATION).into())
    }

    pub(crate) fn count(&self, what: Count) -> u64 {
        self.device.count(what)
    }

    /// Waits until the device has counted so many.
    pub(crate) fn wait_for_count(&self, what: Count, number: u64) {
        wait_for(&format!("{number} of {what:?}"), || (self.count(what) >= number).then_some(()));
    }
}

/// A test that fails tells what the device has seen.
impl Drop for Field {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let counters = self.device.counters().into_iter().filter(|(_, number)| *number > 0);
            eprintln!("the device has counted {:?}", counters.collect::<Vec<_>>());
            eprintln!("and is {:#?}", self.device.state());
        }
    }
}

/// Opens a device.
pub(crate) fn open(namespace: &Namespace, options: DeviceOptions) -> Device {
    let opened = namespace.enter(move || Ok(Device::open(&options)));
    opened.expect("the namespace").expect("a TUN device, which root may make")
}

/// A device `wg0` with two workers.
pub(crate) fn options(ephemeral: bool) -> DeviceOptions {
    let workers = NonZeroUsize::new(2).expect("not zero");
    DeviceOptions { workers, ephemeral, ..DeviceOptions::new("wg0", 1420) }
}

pub(crate) fn owns(prefixes: &[&str]) -> Vec<AllowedIp> {
    prefixes.iter().map(|prefix| AllowedIp::Add(prefix.parse().expect("a prefix"))).collect()
}

pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < DEADLINE, "waited in vain for: {what}");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// The other end of a tunnel, without an interface: the test says what it sends.
pub(crate) struct HandPeer {
    pub(crate) key: PrivateKey,
    pub(crate) socket: UdpSocket,
    pub(crate) device: SocketAddr,
    pub(crate) tunn: Tunn,
}

impl HandPeer {
    pub(crate) fn new(field: &Field, key: PrivateKey, device_key: PublicKey, outside: IpAddr) -> Self {
        let tunn = Tunn::new(key.secret().clone(), device_key.into(), None, None, 77, None);
        let socket = field.socket(SocketAddr::new(outside, 0));
        Self { key, socket, device: field.listens(outside), tunn }
    }

    pub(crate) fn public_key(&self) -> PublicKey {
        self.key.public_key()
    }

    pub(crate) fn send_raw(&self, datagram: &[u8]) {
        self.socket.send_to(datagram, self.device).expect("the device's port is open");
    }

    pub(crate) fn receive_raw(&self) -> Vec<u8> {
        self.try_receive_raw().expect("a datagram of the device")
    }

    pub(crate) fn try_receive_raw(&self) -> io::Result<Vec<u8>> {
        let mut buffer = [0; 2048];
        let (length, from) = self.socket.recv_from(&mut buffer)?;
        assert_eq!(from, self.device, "the device answers from where it was asked");
        Ok(buffer[..length].to_vec())
    }

    pub(crate) fn initiation(&mut self) -> Vec<u8> {
        let mut buffer = [0; 2048];
        match self.tunn.format_handshake_initiation(&mut buffer, true) {
            TunnResult::WriteToNetwork(message) => message.to_vec(),
            other => panic!("no initiation but {other:?}"),
        }
    }

    /// Begins a handshake and completes it. The device has confirmed nothing yet when this returns; it has the
    /// keepalive that lets it.
    pub(crate) fn shake_hands(&mut self) {
        let initiation = self.initiation();
        self.send_raw(&initiation);
        let response = wait_for("a handshake response", || {
            let message = self.receive_raw();
            (message[0] == 2).then_some(message)
        });
        let keepalive = self.take(&response).expect("a keepalive to send");
        self.send_raw(&keepalive);
    }

    /// Answers the handshake that the device begins.
    pub(crate) fn answer_handshake(&mut self) {
        let initiation = wait_for("a handshake initiation", || {
            let message = self.receive_raw();
            (message[0] == 1).then_some(message)
        });
        let response = self.take(&initiation).expect("a response");
        self.send_raw(&response);
    }

    /// What `Tunn` answers to a handshake message.
    pub(crate) fn take(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let mut buffer = [0; 2048];
        match self.tunn.decapsulate(Some(self.device.ip()), message, &mut buffer) {
            TunnResult::WriteToNetwork(answer) => Some(answer.to_vec()),
            TunnResult::Done => None,
            other => panic!("the device sent what Tunn refuses: {other:?}"),
        }
    }

    /// Encrypts without sending.
    pub(crate) fn seal(&mut self, packet: &[u8]) -> Vec<u8> {
        let mut buffer = [0; 2048];
        match self.tunn.encapsulate(packet, &mut buffer) {
            TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
            other => panic!("no datagram but {other:?}"),
        }
    }

    pub(crate) fn send(&mut self, packet: &[u8]) {
        let datagram = self.seal(packet);
        self.send_raw(&datagram);
    }

    /// Decrypts; `None` for a keepalive.
    pub(crate) fn open(&mut self, datagram: &[u8]) -> Option<Vec<u8>> {
        let mut buffer = [0; 2048];
        match self.tunn.decapsulate(None, datagram, &mut buffer) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Some(packet.to_vec())
            }
            TunnResult::Done => None,
            other => panic!("the device sent what Tunn refuses: {other:?}"),
        }
    }

    /// The next packet that the device sends, past keepalives.
    pub(crate) fn receive(&mut self) -> Vec<u8> {
        wait_for("a packet of the device", || {
            let datagram = self.receive_raw();
            if datagram[0] == 4 { self.open(&datagram) } else { None }
        })
    }
}

/// A UDP packet to the application of the device at 10.9.0.1 or fd09::1, with these bytes.
pub(crate) fn udp_packet(source: IpAddr, data: &[u8]) -> Vec<u8> {
    let length = (8 + data.len()) as u16;
    let mut udp = Vec::new();
    udp.extend(9999u16.to_be_bytes());
    udp.extend(APPLICATION.to_be_bytes());
    udp.extend(length.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(data);
    let mut packet = Vec::new();
    match source {
        IpAddr::V4(source) => {
            packet.extend([0x45, 0]);
            packet.extend((20 + length).to_be_bytes());
            packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
            packet.extend(source.octets());
            packet.extend(Ipv4Addr::new(10, 9, 0, 1).octets());
            let sum = checksum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        IpAddr::V6(source) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([17, 64]);
            packet.extend(source.octets());
            packet.extend(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 1).octets());
        }
    }
    let mut summed = packet[if source.is_ipv4() { 12 } else { 8 }..].to_vec();
    summed.extend([0, 17]);
    summed.extend(length.to_be_bytes());
    summed.extend(&udp);
    udp[6..8].copy_from_slice(&checksum(&summed).to_be_bytes());
    packet.extend(udp);
    packet
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// What the next datagram to the application holds.
pub(crate) fn heard(application: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 65_536];
    let (length, _) = application.recv_from(&mut buffer).expect("a datagram for the application");
    buffer[..length].to_vec()
}
