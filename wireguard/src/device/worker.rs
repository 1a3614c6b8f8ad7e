//! A packet worker: one thread with some queues of the TUN device and a pair of sockets, both ways.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;

use super::inbound::{Inbound, Inlet};
use super::outbound::Outbound;
use super::shared::Shared;
use super::table::TableCache;
use super::udp::{Pair, ReceiveBatch, Sockets};

/// What woke the worker: this, a socket, or a queue of the TUN device.
const WAKE: u64 = 0;
const SOCKETS: u64 = 1;
const QUEUES: u64 = 3;

/// Events taken at once: more than there are sources of them.
const EVENTS: usize = 16;

pub(crate) struct Worker {
    shared: Arc<Shared>,
    number: usize,
    wake: Arc<EventFd>,
    epoll: Epoll,
    sockets: Arc<Sockets>,
    sockets_generation: u64,
    cache: TableCache,
    outbound: Outbound,
    inbound: Inbound,
    received: ReceiveBatch,
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, number: usize, wake: Arc<EventFd>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        for (queue, which) in shared.tun.queues(number).iter().zip(QUEUES..) {
            epoll.add(queue, EpollEvent::new(EpollFlags::EPOLLIN, which))?;
        }
        let sockets_generation = shared.sockets_generation();
        let sockets = shared.sockets();
        let worker = Self {
            inbound: Inbound::new(&shared),
            shared,
            number,
            wake,
            epoll,
            sockets,
            sockets_generation,
            cache: TableCache::new(),
            outbound: Outbound::new(),
            received: ReceiveBatch::new(),
        };
        worker.watch_sockets()?;
        Ok(worker)
    }

    /// Until the device stops.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        while !self.shared.stop.load(Ordering::Acquire) {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            self.cache.refresh(&self.shared.table);
            for event in &events[..count] {
                match event.data() {
                    WAKE => self.woken()?,
                    SOCKETS..QUEUES => self.receive((event.data() - SOCKETS) as usize),
                    which => self.send((which - QUEUES) as usize)?,
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, which: usize) -> io::Result<()> {
        let Some(queue) = self.shared.tun.queues(self.number).iter().nth(which) else { return Ok(()) };
        self.outbound.round(queue, &self.shared, &mut self.cache, self.sockets.pair(self.number))
    }

    fn receive(&mut self, which: usize) {
        let queues = self.shared.tun.queues(self.number);
        let sockets: &Pair = self.sockets.pair(self.number);
        let Some(socket) = sockets.sockets().nth(which) else { return };
        let inbound = &mut self.inbound;
        let mut inlet = Inlet { shared: &self.shared, cache: &mut self.cache, queues, sockets };
        // An error is one that an earlier datagram met on its way, told here; reading it takes it away.
        let _ = self.received.receive(socket, |datagrams| inbound.take(&mut inlet, datagrams));
        inbound.flush(queues, &self.shared);
    }

    fn woken(&mut self) -> io::Result<()> {
        self.wake.read()?;
        let generation = self.shared.sockets_generation();
        if generation != self.sockets_generation {
            self.sockets_generation = generation;
            for socket in self.sockets.pair(self.number).sockets() {
                self.epoll.delete(socket)?;
            }
            self.sockets = self.shared.sockets();
            self.watch_sockets()?;
        }
        Ok(())
    }

    fn watch_sockets(&self) -> io::Result<()> {
        for (number, socket) in self.sockets.pair(self.number).sockets().enumerate() {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, SOCKETS + number as u64);
            self.epoll.add(socket.as_fd(), event)?;
        }
        Ok(())
    }
}
