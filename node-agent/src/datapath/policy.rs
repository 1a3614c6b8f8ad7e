//! The pods of this node and what each may do: [`Datapath::put_endpoint`], [`Datapath::replace_policy`],
//! [`Datapath::update_policy`].
//!
//! No packet sees half of a change:
//! - [`Datapath::replace_policy`] fills a map of its own and then puts it in the old one's place.
//! - [`Datapath::update_policy`] of entries of one kind (of identities, or of "any identity") is made in place: first what
//!   is put, longest prefix first, then what is deleted, shortest prefix first. Of all entries that match a packet the
//!   longest decides, so each packet meets the old longest one until it meets the new longest one. A change of both kinds
//!   at once becomes a replacement.
//!
//! Every change raises the epoch at its end: flows that were allowed before it are decided again with their next packet.
//!
//! What cannot be made leaves the endpoint closed: nothing is allowed in the directions that its policy is about until a
//! later [`Datapath::replace_policy`] succeeds.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use isthmus_bpf_abi::{
    Addr, Endpoint, PolicyCtEntry, PolicyCtKey, PolicyEntry, PolicyKey, endpoint_flags, maps,
};

use super::Datapath;
use super::error::{DatapathError, OpError};
use super::map::Map;
use super::sys;

/// The agent's flag that sets how many entries an endpoint's policy may have.
pub(super) const ENTRIES_FLAG: &str = "--policy-map-max";
/// The one that sets how many endpoints there may be.
pub(super) const ENDPOINTS_FLAG: &str = "--bpf-map-endpoints";
/// The one that sets how many flows are remembered.
pub(super) const FLOWS_FLAG: &str = "--bpf-map-policy-flows";

/// In which directions an endpoint's policy is enforced: what it does not allow there is dropped.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Enforcement {
    /// What comes to the pod.
    pub ingress: bool,
    /// What the pod sends.
    pub egress: bool,
}

/// Who the pod behind an interface is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct EndpointSettings {
    /// Its numeric security identity; 0 while it is not known.
    pub identity: u32,
    /// Its addresses. What it sends from an address that belongs to another identity is dropped; without them the ipcache is
    /// asked for each packet.
    pub ipv4: Option<Ipv4Addr>,
    /// The same.
    pub ipv6: Option<Ipv6Addr>,
}

/// What happens to the packets of an endpoint that is made known, until its policy is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AtFirst {
    /// They are dropped, but for what the node itself sends to it.
    Wait,
    /// They pass.
    Pass,
}

/// Why an endpoint or its policy could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It was not made known with [`Datapath::put_endpoint`], or is no longer.
    #[error("no endpoint is known at interface {ifindex}; make it known before its policy")]
    UnknownEndpoint {
        /// The interface.
        ifindex: u32,
    },
    /// Its policy has too many entries. The endpoint is closed.
    #[error(
        "the policy of the endpoint at interface {ifindex} needs {needed} entries and has room for {capacity}; nothing is \
         allowed until it fits: select fewer identities or ports, or raise {ENTRIES_FLAG}"
    )]
    TooManyEntries {
        /// The interface.
        ifindex: u32,
        /// Entries that it has.
        needed: usize,
        /// Entries that there is room for.
        capacity: u32,
    },
    /// Its policy could not be put in place, and only some of it would be known now.
    #[error(
        "the endpoint at interface {ifindex} is closed, since its policy could not be put in place; give it a whole policy"
    )]
    Closed {
        /// The interface.
        ifindex: u32,
    },
    /// There are too many endpoints.
    #[error(
        "there is no room for the policy of interface {ifindex}, so nothing is allowed to its pod: at most {capacity} \
         endpoints; raise {ENDPOINTS_FLAG}"
    )]
    TooManyEndpoints {
        /// The interface.
        ifindex: u32,
        /// Endpoints that there is room for.
        capacity: u32,
    },
    /// One entry was refused. The endpoint is closed if it was one of its policy.
    #[error("the policy of the endpoint at interface {ifindex}: {source}")]
    Refused {
        /// The interface.
        ifindex: u32,
        /// The kernel's answer.
        source: OpError,
    },
    /// Any other system call.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
}

impl Datapath {
    /// Makes an endpoint known, or changes who it is. One that is known already, also from an earlier run of the agent, keeps
    /// its policy.
    ///
    /// # Errors
    /// There is no room, or the kernel refuses.
    pub fn put_endpoint(
        &self,
        ifindex: u32,
        settings: &EndpointSettings,
        at_first: AtFirst,
    ) -> Result<(), PolicyError> {
        let policies = &self.policies;
        let _changing = policies.lock();
        let former = policies.endpoints.value(&ifindex)?;
        let (policy, flags) = former.map_or_else(
            || match at_first {
                AtFirst::Wait => (Endpoint::NO_POLICY, endpoint_flags::WAITING),
                AtFirst::Pass => (Endpoint::NO_POLICY, 0),
            },
            |former| (former.policy, former.flags),
        );
        let endpoint = Endpoint {
            identity: settings.identity,
            policy,
            flags,
            pad: 0,
            ipv4: settings.ipv4.map_or_else(Addr::default, Addr::from_v4),
            ipv6: settings.ipv6.map_or_else(Addr::default, Addr::from_v6),
        };
        if former == Some(endpoint) {
            return Ok(());
        }
        let put = policies.put_endpoint(ifindex, endpoint);
        if matches!(put, Err(PolicyError::TooManyEndpoints { .. })) {
            policies.close_others()?;
        }
        policies.raise_epoch()?;
        put
    }

    /// Forgets an endpoint and its policy: its packets pass. One that is not known is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_endpoint(&self, ifindex: u32) -> Result<(), PolicyError> {
        let policies = &self.policies;
        let mut slots = policies.lock();
        let Some(endpoint) = policies.endpoints.value(&ifindex)? else { return Ok(()) };
        let deleted = policies.endpoints.delete(&[ifindex]).into_iter().collect::<Result<(), _>>();
        deleted.map_err(|source| PolicyError::Refused { ifindex, source })?;
        policies.empty_slot(&mut slots, endpoint.policy)?;
        Ok(policies.raise_epoch().map(drop)?)
    }

    /// All endpoints that are known, those of an earlier run too, by interface.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn endpoints(&self) -> Result<Vec<(u32, Endpoint)>, DatapathError> {
        let mut endpoints = self.policies.endpoints.entries()?;
        endpoints.retain(|(ifindex, _)| *ifindex != Endpoint::OTHERS);
        Ok(endpoints)
    }

    /// Gives an endpoint another policy, which is enforced from now on, all at once. Ends its waiting.
    ///
    /// # Errors
    /// It is not known, has too many entries, or the kernel refuses; after the latter two the endpoint is closed in both
    /// the directions that `enforcement` names and those that were enforced before.
    pub fn replace_policy(
        &self,
        ifindex: u32,
        enforcement: Enforcement,
        entries: &[(PolicyKey, PolicyEntry)],
    ) -> Result<(), PolicyError> {
        let policies = &self.policies;
        let mut slots = policies.lock();
        let entries = entries.iter().copied().collect();
        policies.replace(&mut slots, ifindex, flags_of(enforcement), &entries)
    }

    /// Changes some entries of an endpoint's policy; which directions are enforced stays. Deleting what is not there is no
    /// error.
    ///
    /// # Errors
    /// As of [`Self::replace_policy`]; also if that, or this, has failed before and has not succeeded since.
    pub fn update_policy(
        &self,
        ifindex: u32,
        put: &[(PolicyKey, PolicyEntry)],
        delete: &[PolicyKey],
    ) -> Result<(), PolicyError> {
        let policies = &self.policies;
        let mut slots = policies.lock();
        policies.update(&mut slots, ifindex, put, delete)
    }

    /// The entries of an endpoint's policy.
    ///
    /// # Errors
    /// It is not known, or the map cannot be read.
    pub fn policy(&self, ifindex: u32) -> Result<Vec<(PolicyKey, PolicyEntry)>, PolicyError> {
        let policies = &self.policies;
        let _changing = policies.lock();
        let endpoint = policies.endpoint(ifindex)?;
        Ok(policies.entries(&endpoint)?.into_iter().collect())
    }

    /// Lets every flow be decided anew with its next packet. Done by all that changes policies, identities of endpoints or
    /// the ipcache here; the new epoch is returned.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn bump_epoch(&self) -> Result<u32, DatapathError> {
        let _changing = self.policies.lock();
        self.policies.raise_epoch()
    }

    /// The flows that are remembered, with what was decided about them.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn policy_flows(&self) -> Result<Vec<(PolicyCtKey, PolicyCtEntry)>, DatapathError> {
        self.policies.flows.entries()
    }

    /// Forgets all flows: each begins anew with its next packet, whichever side sends it.
    ///
    /// # Errors
    /// The map cannot be read or changed.
    pub fn forget_flows(&self) -> Result<(), DatapathError> {
        let keys: Vec<_> = self.policy_flows()?.into_iter().map(|(key, _)| key).collect();
        let deleted = self.policies.flows.delete(&keys).into_iter().collect::<Result<(), _>>();
        deleted.map_err(|error| self.policies.kernel("forgetting flows", io::Error::other(error)))
    }

    /// The epoch; 0 as long as no endpoint was ever known.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn policy_epoch(&self) -> Result<u32, DatapathError> {
        Ok(self.policies.epoch.value(&0)?.unwrap_or(0))
    }
}

/// The maps of policies, and which places of the array of maps are taken.
#[derive(Debug)]
pub(super) struct Policies {
    endpoints: Map<u32, Endpoint>,
    epoch: Map<u32, u32>,
    flows: Map<PolicyCtKey, PolicyCtEntry>,
    /// The array of maps.
    array: OwnedFd,
    /// Entries that one endpoint's map has room for.
    capacity: u32,
    slots: Mutex<Slots>,
}

/// Which places of the array are taken; its lock is held during every change.
#[derive(Debug)]
struct Slots {
    taken: Vec<bool>,
}

type Entries = BTreeMap<PolicyKey, PolicyEntry>;

impl Policies {
    /// Takes over what is known of an earlier run.
    pub(super) fn open(
        endpoints: Map<u32, Endpoint>,
        epoch: Map<u32, u32>,
        flows: Map<PolicyCtKey, PolicyCtEntry>,
        array: OwnedFd,
        capacity: u32,
    ) -> Result<Self, DatapathError> {
        let places = 2 * endpoints.capacity().saturating_sub(1) as usize;
        let mut taken = vec![false; places];
        for (_, endpoint) in endpoints.entries()? {
            if let Some(place) = taken.get_mut(endpoint.policy as usize) {
                *place = true;
            }
        }
        let policies = Self {
            endpoints,
            epoch,
            flows,
            array,
            capacity,
            slots: Mutex::new(Slots { taken: taken.clone() }),
        };
        policies.reserve_others()?;
        // An agent that ended between two steps of a replacement has left a map behind.
        for place in (0..places).filter(|&place| !taken[place]) {
            // Looked at first: deleting waits for all programs that run, in older kernels also where there is nothing.
            if policies.inner(place as u32)?.is_some() {
                policies.delete_inner(place as u32)?;
            }
        }
        Ok(policies)
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        // A panic in between leaves at most a place taken that nobody uses.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After a change of what decides about flows, unless there is no endpoint yet.
    pub(super) fn decide_anew(&self) -> Result<(), DatapathError> {
        let _changing = self.lock();
        if self.epoch.value(&0)?.unwrap_or(0) != 0 { self.raise_epoch().map(drop) } else { Ok(()) }
    }

    /// Keeps a place for the pods for which there is none.
    fn reserve_others(&self) -> Result<(), DatapathError> {
        if self.endpoints.value(&Endpoint::OTHERS)?.is_some() {
            return Ok(());
        }
        self.put_others(0)
    }

    /// From now on a pod's interface that has no endpoint lets nothing through. It stays so: every other pod's has one
    /// before any program is attached to it.
    fn close_others(&self) -> Result<(), DatapathError> {
        use endpoint_flags::{CLOSED, EGRESS_ENFORCED, INGRESS_ENFORCED};
        self.put_others(INGRESS_ENFORCED | EGRESS_ENFORCED | CLOSED)
    }

    fn put_others(&self, flags: u32) -> Result<(), DatapathError> {
        let others = Endpoint { policy: Endpoint::NO_POLICY, flags, ..Endpoint::default() };
        let put = self.endpoints.put(&[Endpoint::OTHERS], &[others]).into_iter().collect::<Result<(), _>>();
        put.map_err(|error| self.kernel("keeping pods without room apart", io::Error::other(error)))
    }

    fn endpoint(&self, ifindex: u32) -> Result<Endpoint, PolicyError> {
        self.endpoints.value(&ifindex)?.ok_or(PolicyError::UnknownEndpoint { ifindex })
    }

    fn put_endpoint(&self, ifindex: u32, endpoint: Endpoint) -> Result<(), PolicyError> {
        let put = self.endpoints.put(&[ifindex], &[endpoint]).into_iter().collect::<Result<(), _>>();
        put.map_err(|error| match error {
            OpError::Full { capacity, .. } => {
                PolicyError::TooManyEndpoints { ifindex, capacity: capacity.saturating_sub(1) }
            }
            source => PolicyError::Refused { ifindex, source },
        })
    }

    fn raise_epoch(&self) -> Result<u32, DatapathError> {
        let epoch = self.epoch.value(&0)?.unwrap_or(0).wrapping_add(1).max(1);
        let result = self.epoch.put(&[0], &[epoch]).into_iter().collect::<Result<(), _>>();
        result.map(|()| epoch).map_err(|error| DatapathError::Kernel {
            what: "raising the policy epoch".to_owned(),
            source: io::Error::other(error),
        })
    }

    fn replace(
        &self,
        slots: &mut Slots,
        ifindex: u32,
        flags: u32,
        entries: &Entries,
    ) -> Result<(), PolicyError> {
        let former = self.endpoint(ifindex)?;
        let result = self.exchange(slots, ifindex, &former, flags, entries);
        if result.is_err() {
            self.close(slots, ifindex, flags | former.flags)?;
        }
        self.raise_epoch()?;
        result
    }

    fn exchange(
        &self,
        slots: &mut Slots,
        ifindex: u32,
        former: &Endpoint,
        flags: u32,
        entries: &Entries,
    ) -> Result<(), PolicyError> {
        if entries.is_empty() {
            self.put_endpoint(ifindex, Endpoint { policy: Endpoint::NO_POLICY, flags, ..*former })?;
            return Ok(self.empty_slot(slots, former.policy)?);
        }
        let filled = self.fill(ifindex, entries)?;
        if former.flags == flags && former.policy != Endpoint::NO_POLICY {
            return Ok(self.put_inner(former.policy, &filled)?);
        }
        // Which directions are enforced changes with the entries: both are in one value that is exchanged whole.
        let capacity = self.endpoints.capacity().saturating_sub(1);
        let policy = slots.take().ok_or(PolicyError::TooManyEndpoints { ifindex, capacity })?;
        let put = self
            .put_inner(policy, &filled)
            .map_err(PolicyError::from)
            .and_then(|()| self.put_endpoint(ifindex, Endpoint { policy, flags, ..*former }));
        let left = if put.is_ok() { former.policy } else { policy };
        self.empty_slot(slots, left)?;
        put
    }

    fn update(
        &self,
        slots: &mut Slots,
        ifindex: u32,
        put: &[(PolicyKey, PolicyEntry)],
        delete: &[PolicyKey],
    ) -> Result<(), PolicyError> {
        let endpoint = self.endpoint(ifindex)?;
        if endpoint.flags & endpoint_flags::CLOSED != 0 {
            return Err(PolicyError::Closed { ifindex });
        }
        let keys = || put.iter().map(|(key, _)| key).chain(delete);
        let both_kinds = keys().any(|key| key.identity == 0) && keys().any(|key| key.identity != 0);
        if !both_kinds
            && let Some(map) = self.inner(endpoint.policy)?
            && update_in_place(&map, put, delete).is_ok()
        {
            return Ok(self.raise_epoch().map(drop)?);
        }
        let mut entries = match self.entries(&endpoint) {
            Ok(entries) => entries,
            Err(error) => {
                self.close(slots, ifindex, endpoint.flags)?;
                self.raise_epoch()?;
                return Err(error.into());
            }
        };
        for key in delete {
            entries.remove(key);
        }
        entries.extend(put.iter().copied());
        self.replace(slots, ifindex, endpoint.flags, &entries)
    }

    /// Lets nothing through in the directions that `flags` names.
    fn close(&self, slots: &mut Slots, ifindex: u32, flags: u32) -> Result<(), PolicyError> {
        let former = self.endpoint(ifindex)?;
        let flags = flags & !endpoint_flags::WAITING | endpoint_flags::CLOSED;
        self.put_endpoint(ifindex, Endpoint { policy: Endpoint::NO_POLICY, flags, ..former })?;
        Ok(self.empty_slot(slots, former.policy)?)
    }

    /// A map of these entries, which nothing refers to yet.
    fn fill(&self, ifindex: u32, entries: &Entries) -> Result<OwnedFd, PolicyError> {
        let full = || PolicyError::TooManyEntries { ifindex, needed: entries.len(), capacity: self.capacity };
        if entries.len() > self.capacity as usize {
            return Err(full());
        }
        let fd = sys::create_lpm_trie(
            c"isthmus_policy",
            size_of::<PolicyKey>() as u32,
            size_of::<PolicyEntry>() as u32,
            self.capacity,
        )
        .map_err(|source| DatapathError::Kernel { what: "making a policy map".to_owned(), source })?;
        let map = Map::new(fd, maps::POLICIES, ENTRIES_FLAG, self.capacity);
        let (keys, values): (Vec<_>, Vec<_>) = entries.iter().map(|(key, entry)| (*key, *entry)).unzip();
        for result in map.put(&keys, &values) {
            result.map_err(|error| match error {
                OpError::Full { .. } => full(),
                source => PolicyError::Refused { ifindex, source },
            })?;
        }
        Ok(map.into_fd())
    }

    fn entries(&self, endpoint: &Endpoint) -> Result<Entries, DatapathError> {
        match self.inner(endpoint.policy)? {
            Some(map) => Ok(map.entries()?.into_iter().collect()),
            None => Ok(Entries::new()),
        }
    }

    /// The map at a place of the array.
    fn inner(&self, policy: u32) -> Result<Option<Map<PolicyKey, PolicyEntry>>, DatapathError> {
        if policy == Endpoint::NO_POLICY {
            return Ok(None);
        }
        let opened = sys::lookup::<u32, u32>(self.array.as_fd(), &policy)
            .and_then(|id| id.map(sys::map_by_id).transpose())
            .map_err(|source| self.kernel("opening a policy map", source))?;
        Ok(opened.map(|fd| Map::new(fd, maps::POLICIES, ENTRIES_FLAG, self.capacity)))
    }

    fn put_inner(&self, place: u32, inner: &OwnedFd) -> Result<(), DatapathError> {
        use std::os::fd::AsRawFd;
        sys::update(self.array.as_fd(), &place, &(inner.as_raw_fd() as u32))
            .map_err(|source| self.kernel("exchanging a policy map", source))
    }

    fn empty_slot(&self, slots: &mut Slots, policy: u32) -> Result<(), DatapathError> {
        if policy == Endpoint::NO_POLICY {
            return Ok(());
        }
        self.delete_inner(policy)?;
        slots.give_back(policy);
        Ok(())
    }

    fn delete_inner(&self, place: u32) -> Result<(), DatapathError> {
        match sys::delete(self.array.as_fd(), &place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.kernel("freeing a policy map", error))
            }
            _ => Ok(()),
        }
    }

    fn kernel(&self, what: &str, source: io::Error) -> DatapathError {
        DatapathError::Kernel { what: what.to_owned(), source }
    }
}

impl Slots {
    fn take(&mut self) -> Option<u32> {
        let free = self.taken.iter().position(|taken| !taken)?;
        self.taken[free] = true;
        Some(free as u32)
    }

    fn give_back(&mut self, place: u32) {
        if let Some(taken) = self.taken.get_mut(place as usize) {
            *taken = false;
        }
    }
}

fn flags_of(enforcement: Enforcement) -> u32 {
    let ingress = if enforcement.ingress { endpoint_flags::INGRESS_ENFORCED } else { 0 };
    let egress = if enforcement.egress { endpoint_flags::EGRESS_ENFORCED } else { 0 };
    ingress | egress
}

/// Each packet meets the entry that decided about it before, until it meets the one that decides afterwards.
fn update_in_place(
    map: &Map<PolicyKey, PolicyEntry>,
    put: &[(PolicyKey, PolicyEntry)],
    delete: &[PolicyKey],
) -> Result<(), OpError> {
    let mut put = put.to_vec();
    put.sort_by_key(|(key, _)| std::cmp::Reverse(key.prefix_len));
    let (keys, values): (Vec<_>, Vec<_>) = put.into_iter().unzip();
    map.put(&keys, &values).into_iter().collect::<Result<(), _>>()?;
    let mut delete = delete.to_vec();
    delete.sort_by_key(|key| key.prefix_len);
    map.delete(&delete).into_iter().collect()
}
