//! Once a session stands, no packet costs an allocation. As root.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use isthmus_wireguard::config::{Configurable, PeerUpdate};
use isthmus_wireguard::device::{Count, MessageBounds};

#[path = "device/field.rs"]
#[allow(dead_code, reason = "shared with tests that need more of it")]
mod field;
#[path = "support/netns.rs"]
#[allow(dead_code, reason = "shared with tests that need more of it")]
mod netns;

use field::{DEADLINE, Field, owns};
use netns::{Namespace, join};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Counts what the packet threads allocate.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// Ids of the threads that are watched; two devices with two workers each.
static WATCHED: [AtomicI32; 4] = [const { AtomicI32::new(0) }; 4];

fn count() {
    // SAFETY: no arguments, and it cannot fail.
    let this = unsafe { libc::gettid() };
    if WATCHED.iter().any(|watched| watched.load(Ordering::Relaxed) == this) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is the system's allocator, which is asked the same.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are the system allocator's conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[test]
fn megabytes_in_both_directions_cost_no_allocation() {
    let namespaces = [Namespace::new(), Namespace::new()];
    join((&namespaces[0], &["192.0.2.1/24"]), (&namespaces[1], &["192.0.2.2/24"]));
    let [one, other] = namespaces;
    let one = Field::in_namespace(one, 1, MessageBounds::PAPER);
    let other = Field::in_namespace(other, 2, MessageBounds::PAPER);
    for (node, peer, host) in [(&one, &other, 2), (&other, &one, 1)] {
        node.peer(PeerUpdate {
            endpoint: Some(([192, 0, 2, host], peer.device.state().listen_port).into()),
            allowed_ips: owns(&[&format!("10.9.0.{host}/32"), &format!("fd09::{host}/128")]),
            ..PeerUpdate::new(peer.key.public_key())
        });
    }
    let listen: SocketAddr = "[::]:7001".parse().unwrap();
    let listener = other.namespace.enter(move || TcpListener::bind(listen)).unwrap();
    let udp = other.application();
    let to_udp: UdpSocket = one.socket("10.9.0.1:0".parse().unwrap());
    udp.set_read_timeout(Some(DEADLINE)).unwrap();

    // The first round warms everything up: sessions, caches, and what grows once.
    let mut allocations = u64::MAX;
    for round in 0..2 {
        if round == 1 {
            watch_packet_threads();
        }
        for address in ["10.9.0.2:7001", "[fd09::2]:7001"] {
            let address: SocketAddr = address.parse().unwrap();
            let client = one.namespace.enter(move || TcpStream::connect(address)).unwrap();
            let (server, _) = listener.accept().unwrap();
            transfer(&client, &server);
            transfer(&server, &client);
        }
        for _ in 0..100 {
            to_udp.send_to(&[1; 1000], "10.9.0.2:7000").unwrap();
            udp.recv_from(&mut [0; 2000]).unwrap();
        }
        allocations = ALLOCATIONS.load(Ordering::Relaxed);
    }
    let packets = one.count(Count::SentPackets) + other.count(Count::SentPackets);
    assert!(packets > 10_000, "only {packets} packets went");
    assert_eq!(allocations, 0, "allocations for about {} packets", packets / 2);
}

fn transfer(mut from: &TcpStream, mut to: &TcpStream) {
    const BYTES: usize = 8 << 20;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let block = [7; 1 << 16];
            (0..BYTES / block.len()).for_each(|_| from.write_all(&block).expect("a connection"));
            from.shutdown(Shutdown::Write).expect("a connection");
        });
        let mut received = 0;
        let mut block = vec![0; 1 << 16];
        while received < BYTES {
            match to.read(&mut block).expect("a connection") {
                0 => break,
                length => received += length,
            }
        }
        assert_eq!(received, BYTES);
    });
}

fn watch_packet_threads() {
    let mut places = WATCHED.iter();
    for task in std::fs::read_dir("/proc/self/task").expect("procfs") {
        let task = task.expect("procfs");
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.starts_with("packets-") {
            let id = task.file_name().to_string_lossy().parse().expect("a number");
            places.next().expect("four packet threads").store(id, Ordering::Relaxed);
        }
    }
    assert!(places.next().is_none(), "all packet threads are watched");
}
