//! From a service to a backend.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use isthmus_bpf_abi::{Addr, AffinityEntry, AffinityKey, Backend, Service, SlotKey};

use crate::config::{jiffies_per_second, now};
use crate::conntrack::idle;
use crate::maps::{AFFINITY, BACKENDS, SLOTS};

/// A backend and its index.
#[derive(Clone, Copy)]
pub struct Choice<'a> {
    pub id: u32,
    pub backend: &'a Backend,
}

/// The backend `id`, if it is still the one that had this fingerprint. It may be one that serves only what is open.
#[inline(always)]
pub fn alive<'a>(id: u32, fingerprint: u32) -> Option<Choice<'a>> {
    let backend = BACKENDS.get(id)?;
    // An unused record has none, and nothing remembers none.
    if backend.fingerprint == fingerprint && fingerprint != 0 { Some(Choice { id, backend }) } else { None }
}

/// A backend for a new connection of `client`.
#[inline(always)]
pub fn choose<'a>(service: &Service, client: &Addr) -> Option<Choice<'a>> {
    let affinity = service.affinity_seconds;
    if affinity == 0 {
        return random(service.id, service.count);
    }
    let key = AffinityKey { client: *client, service: service.id };
    let now = now();
    if let Some(entry) = AFFINITY.get_ptr_mut(&key) {
        // SAFETY: the kernel keeps map values readable while the program runs; a racing write gives either value.
        let entry = unsafe { &mut *entry };
        let idle = idle(now, entry.last_used) as u64;
        if idle <= affinity as u64 * jiffies_per_second() as u64 {
            match alive(entry.backend, entry.fingerprint) {
                Some(choice) if choice.backend.takes_new() => {
                    entry.last_used = now;
                    return Some(choice);
                }
                _ => {}
            }
        }
    }
    let choice = random(service.id, service.count)?;
    let entry = AffinityEntry { backend: choice.id, fingerprint: choice.backend.fingerprint, last_used: now };
    // Without room the client is balanced anew next time, which is better than not at all.
    let _ = AFFINITY.insert(&key, &entry, 0);
    Some(choice)
}

/// Looks at random slots before the first one is taken.
const TRIES: u32 = 3;

/// Any backend. `count` was read once: a slot below it may be gone by now, when the service has just shrunk. Then one
/// below that slot is tried, and at last the first one, which is the last to go. That one is looked at again even if it
/// was tried: another backend may just have been moved there.
#[inline(always)]
pub fn random<'a>(service: u32, count: u32) -> Option<Choice<'a>> {
    let mut bound = count;
    let mut tries = 0;
    while tries < TRIES && bound != 0 {
        // SAFETY: takes nothing and returns a number.
        let random = unsafe { bpf_get_prandom_u32() };
        let slot = ((random as u64 * bound as u64) >> 32) as u32;
        if let Some(choice) = in_slot(service, slot) {
            return Some(choice);
        }
        bound = slot;
        tries += 1;
    }
    if count == 0 { None } else { in_slot(service, 0) }
}

#[inline(always)]
fn in_slot<'a>(service: u32, slot: u32) -> Option<Choice<'a>> {
    // SAFETY: the map is not preallocated, so an element that is found is not reused while the program runs.
    let slot = unsafe { SLOTS.get(&SlotKey { service, slot }) }?;
    alive(slot.backend, slot.fingerprint)
}
