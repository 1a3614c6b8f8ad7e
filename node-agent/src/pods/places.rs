//! Where the addresses of this node's pods are. It lets decrypted packets be handed to a pod, and is what a pod may call
//! itself towards other nodes.
//!
//! Kubernetes says which addresses a pod has: what the pod has given itself counts for nothing.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use isthmus_bpf_abi::LocalPod;

use super::Attach;
use super::veth::PodInterface;
use crate::datapath::OpError;

pub(super) struct Places {
    datapath: Arc<dyn Attach>,
    /// By address: the pod's UID, and where it is.
    known: HashMap<IpAddr, (String, LocalPod)>,
    /// Addresses that an earlier run knew and no pod has claimed yet.
    inherited: BTreeSet<IpAddr>,
}

impl Places {
    pub(super) fn new(datapath: Arc<dyn Attach>) -> Self {
        let inherited = datapath.placed().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot tell which addresses of pods an earlier run knew");
            Vec::new()
        });
        Self { datapath, known: HashMap::new(), inherited: inherited.into_iter().collect() }
    }

    /// From now on the pod has these addresses, behind these interfaces, and no others.
    pub(super) fn set(
        &mut self,
        uid: &str,
        addresses: &[IpAddr],
        interfaces: &[PodInterface],
    ) -> Result<(), OpError> {
        let mut outcome = Ok(());
        for addr in addresses {
            let Some(place) = place(*addr, interfaces) else { continue };
            self.inherited.remove(addr);
            if self.known.get(addr).is_some_and(|(owner, known)| owner == uid && *known == place) {
                continue;
            }
            match self.datapath.place(*addr, place) {
                Ok(()) => drop(self.known.insert(*addr, (uid.to_owned(), place))),
                Err(error) => outcome = Err(error),
            }
        }
        self.keep(uid, addresses);
        outcome
    }

    /// The pod is gone.
    pub(super) fn remove(&mut self, uid: &str) {
        self.keep(uid, &[]);
    }

    /// Forgets the addresses that no pod has claimed.
    pub(super) fn release_inherited(&mut self) {
        for addr in std::mem::take(&mut self.inherited) {
            self.forget(addr);
        }
    }

    fn keep(&mut self, uid: &str, addresses: &[IpAddr]) {
        let former = self.known.iter().filter(|(addr, (owner, _))| owner == uid && !addresses.contains(addr));
        let former: Vec<IpAddr> = former.map(|(addr, _)| *addr).collect();
        for addr in former {
            self.known.remove(&addr);
            self.forget(addr);
        }
    }

    fn forget(&self, addr: IpAddr) {
        if let Err(error) = self.datapath.unplace(addr) {
            tracing::warn!(%addr, %error, "cannot forget the address of a pod that is gone");
        }
    }
}

/// The interface that has the address inside the pod. Where none shows it (a virtual machine's, say) it is behind the first.
fn place(addr: IpAddr, interfaces: &[PodInterface]) -> Option<LocalPod> {
    let has = |interface: &&PodInterface| interface.addresses.contains(&addr);
    let interface = interfaces.iter().find(has).or(interfaces.first())?;
    Some(LocalPod { ifindex: interface.host, pod_mac: interface.pod_mac, host_mac: interface.host_mac })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::datapath::DatapathError;

    #[derive(Default)]
    struct Fake(Mutex<HashMap<IpAddr, LocalPod>>);

    impl Attach for Fake {
        fn attach(&self, _: u32) -> Result<(), DatapathError> {
            Ok(())
        }
        fn detach(&self, _: u32) -> Result<(), DatapathError> {
            Ok(())
        }
        fn attached(&self) -> Result<Vec<u32>, DatapathError> {
            Ok(Vec::new())
        }
        fn place(&self, addr: IpAddr, pod: LocalPod) -> Result<(), OpError> {
            self.0.lock().expect("no panic").insert(addr, pod);
            Ok(())
        }
        fn unplace(&self, addr: IpAddr) -> Result<(), OpError> {
            self.0.lock().expect("no panic").remove(&addr);
            Ok(())
        }
        fn placed(&self) -> Result<Vec<IpAddr>, DatapathError> {
            Ok(self.0.lock().expect("no panic").keys().copied().collect())
        }
    }

    impl Fake {
        fn interface_of(&self, addr: &str) -> Option<u32> {
            self.0.lock().expect("no panic").get(&ip(addr)).map(|pod| pod.ifindex)
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn interface(host: u32, addresses: &[&str]) -> PodInterface {
        PodInterface {
            host,
            pod_mac: [host as u8; 6],
            host_mac: [0xee; 6],
            addresses: addresses.iter().map(|addr| ip(addr)).collect(),
        }
    }

    #[test]
    fn an_address_is_behind_the_interface_that_has_it() {
        let fake = Arc::new(Fake::default());
        let mut places = Places::new(fake.clone());
        let interfaces = [interface(3, &["192.168.0.9"]), interface(4, &["10.0.1.2", "fd00:1::2"])];
        places.set("a", &[ip("10.0.1.2"), ip("fd00:1::2"), ip("10.0.1.99")], &interfaces).expect("set");
        assert_eq!(fake.interface_of("fd00:1::2"), Some(4));
        assert_eq!(fake.interface_of("10.0.1.2"), Some(4));
        assert_eq!(fake.interface_of("10.0.1.99"), Some(3), "shown by none");
        assert_eq!(fake.interface_of("192.168.0.9"), None, "Kubernetes knows nothing of it");
    }

    #[test]
    fn a_pod_that_goes_takes_its_addresses_along_but_not_those_that_another_has_got_meanwhile() {
        let fake = Arc::new(Fake::default());
        let mut places = Places::new(fake.clone());
        places.set("a", &[ip("10.0.1.2"), ip("10.0.1.3")], &[interface(3, &[])]).expect("set");
        places.set("b", &[ip("10.0.1.3")], &[interface(5, &[])]).expect("set");
        places.remove("a");
        assert_eq!(fake.interface_of("10.0.1.2"), None);
        assert_eq!(fake.interface_of("10.0.1.3"), Some(5));
        places.set("b", &[], &[interface(5, &[])]).expect("set");
        assert_eq!(fake.interface_of("10.0.1.3"), None, "Kubernetes has taken it back");
    }

    #[test]
    fn what_an_earlier_run_knew_stays_until_all_pods_are_found() {
        let fake = Arc::new(Fake::default());
        for (addr, host) in [("10.0.1.2", 3), ("10.0.1.9", 9)] {
            let pod = place(ip(addr), &[interface(host, &[])]).expect("an interface");
            fake.place(ip(addr), pod).expect("placed");
        }
        let mut places = Places::new(fake.clone());
        places.set("a", &[ip("10.0.1.2")], &[interface(3, &[])]).expect("set");
        assert_eq!(fake.interface_of("10.0.1.9"), Some(9));
        places.release_inherited();
        assert_eq!(fake.interface_of("10.0.1.9"), None);
        assert_eq!(fake.interface_of("10.0.1.2"), Some(3));
    }
}
