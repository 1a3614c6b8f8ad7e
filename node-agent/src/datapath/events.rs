//! What the programs tell of their verdicts.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aya::maps::{Map, MapData, RingBuf};
use isthmus_bpf_abi::{PolicyEvent, maps};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Datapath;
use super::error::DatapathError;

/// The verdicts of the programs, in the order in which they were given. One reader at a time: what it takes is gone.
///
/// The programs tell of every packet that they drop, and of the first one of every flow that they let through, up to a
/// number of events per second and CPU. How many they have not told of is counted:
/// [`Counter::EventLimited`](isthmus_bpf_abi::Counter), [`Counter::EventLost`](isthmus_bpf_abi::Counter).
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    /// Given back when the reader is dropped.
    _reading: Reading,
}

/// That somebody reads; shared with the [`Datapath`].
#[derive(Debug, Default)]
pub(super) struct Reading(Arc<AtomicBool>);

impl Datapath {
    /// Begins to read events; the first ones may be older than this call. To be called in a tokio runtime.
    ///
    /// # Errors
    /// They are being read already, or the kernel refuses.
    pub fn events(&self) -> Result<Events, DatapathError> {
        let kernel = |source| DatapathError::Kernel { what: "reading events".to_owned(), source };
        if self.reading.0.swap(true, Ordering::AcqRel) {
            return Err(kernel(io::ErrorKind::ResourceBusy.into()));
        }
        let reading = Reading(Arc::clone(&self.reading.0));
        let ring = MapData::from_pin(self.version_dir.join(maps::EVENTS))
            .and_then(Map::from_map_data)
            .and_then(RingBuf::try_from)
            .map_err(|error| kernel(io::Error::other(error)))?;
        Ok(Events { ring: watch(ring).map_err(kernel)?, _reading: reading })
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Events {
    /// Waits for the next event. Cancelling loses none.
    ///
    /// # Errors
    /// The kernel's answer to waiting.
    pub async fn next(&mut self) -> io::Result<PolicyEvent> {
        loop {
            if let Some(event) = self.try_next() {
                return Ok(event);
            }
            let mut guard = self.ring.readable_mut().await?;
            // What came between the look above and this line has left the descriptor ready.
            let event = take(guard.get_inner_mut());
            match event {
                Some(event) => return Ok(event),
                None => guard.clear_ready(),
            }
        }
    }

    /// The next event, if there is one.
    pub fn try_next(&mut self) -> Option<PolicyEvent> {
        take(self.ring.get_mut())
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

#[expect(unsafe_code, reason = "a promise about the ring's file descriptor")]
fn watch(ring: RingBuf<MapData>) -> io::Result<AsyncFd<RingBuf<MapData>>> {
    // SAFETY: the ring owns its descriptor, never exchanges it, and closes it when it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }?)
}

fn take(ring: &mut RingBuf<MapData>) -> Option<PolicyEvent> {
    loop {
        let item = ring.next()?;
        if let Some(event) = read(&item) {
            return Some(event);
        }
    }
}

/// The kernel rounds sizes up to eight bytes, and so is an event's.
#[expect(unsafe_code, reason = "an event is read as it lies in the ring")]
fn read(bytes: &[u8]) -> Option<PolicyEvent> {
    if bytes.len() < size_of::<PolicyEvent>() {
        return None;
    }
    // SAFETY: there are enough bytes, every pattern of which is an event; the read needs no alignment.
    Some(unsafe { bytes.as_ptr().cast::<PolicyEvent>().read_unaligned() })
}
