//! Policy: what each endpoint may do, decided in the kernel.

mod bypass;
mod events;
mod flows;
mod fragments;
mod icmp;
mod maps;
mod rules;
mod swap;
mod traffic;

use std::net::{IpAddr, SocketAddr};

use isthmus_bpf_abi::{Counter, Direction, IpcacheEntry, IpcacheKey, PolicyEntry, PolicyKey, policy_flags};
use isthmus_node_agent::datapath::{
    AtFirst, Datapath, EndpointSettings, Enforcement, MapOp, PacketContext, PacketProgram,
};

use crate::model::{apply, socket_addr};
use crate::packet::{Frame, TCP, UDP};
use crate::sandbox::{Sandbox, sandbox};

pub(crate) const SCTP: u8 = 132;
pub(crate) const PASS: u32 = 0;
pub(crate) const DROP: u32 = 2;

/// The endpoint is at the loopback, where test packets are met by default.
pub(crate) const POD: u32 = 1;
pub(crate) const POD_IDENTITY: u32 = 66_000;
pub(crate) const PEER_IDENTITY: u32 = 131_100;
pub(crate) const OTHER_IDENTITY: u32 = 131_200;
pub(crate) const WORLD: u32 = 2;
/// Where packets come from that the node has not sent itself.
const NETWORK: u32 = 77;

pub(crate) const INGRESS: Enforcement = Enforcement { ingress: true, egress: false };
pub(crate) const EGRESS: Enforcement = Enforcement { ingress: false, egress: true };
pub(crate) const BOTH: Enforcement = Enforcement { ingress: true, egress: true };
pub(crate) const NEITHER: Enforcement = Enforcement { ingress: false, egress: false };

/// The pod, somebody with an identity of its own, somebody with another, and somebody without.
#[derive(Clone, Copy)]
pub(crate) struct Family {
    pub(crate) pod: &'static str,
    pub(crate) peer: &'static str,
    pub(crate) other: &'static str,
    pub(crate) stranger: &'static str,
}

pub(crate) const V4: Family = Family {
    pod: "10.0.1.2:8080",
    peer: "10.0.2.3:40000",
    other: "10.0.3.4:40000",
    stranger: "198.51.100.7:40000",
};
pub(crate) const V6: Family = Family {
    pod: "[fd00:1::2]:8080",
    peer: "[fd00:2::3]:40000",
    other: "[fd00:3::4]:40000",
    stranger: "[2001:db8::7]:40000",
};

/// A datapath with the pod as its endpoint.
pub(crate) struct Pod {
    pub(crate) datapath: Datapath,
    pub(crate) family: Family,
}

/// Runs `test` for both families. Nothing about policy depends on what the kernel has.
pub(crate) fn each_family(test: impl Fn(&Pod) + Sync) {
    sandbox(|sandbox| {
        let mut pod = Pod::new(sandbox, V4);
        test(&pod);
        pod.datapath.forget_flows().expect("no flows");
        pod.datapath.remove_endpoint(POD).expect("removed");
        pod.family = V6;
        pod.know();
        test(&pod);
    });
}

impl Pod {
    pub(crate) fn new(sandbox: &Sandbox, family: Family) -> Self {
        let pod = Self { datapath: sandbox.datapath(), family };
        pod.know();
        pod
    }

    fn know(&self) {
        let known = [
            (self.family.peer, PEER_IDENTITY),
            (self.family.other, OTHER_IDENTITY),
            (self.family.pod, POD_IDENTITY),
        ];
        for (addr, identity) in known {
            self.identify(addr, identity);
        }
        self.datapath.put_endpoint(POD, &self.settings(), AtFirst::Wait).expect("an endpoint");
    }

    pub(crate) fn settings(&self) -> EndpointSettings {
        let mut settings = EndpointSettings { identity: POD_IDENTITY, ..EndpointSettings::default() };
        match socket_addr(self.family.pod).ip() {
            IpAddr::V4(addr) => settings.ipv4 = Some(addr),
            IpAddr::V6(addr) => settings.ipv6 = Some(addr),
        }
        settings
    }

    pub(crate) fn identify(&self, addr: &str, identity: u32) {
        let entry = IpcacheEntry { identity, ..IpcacheEntry::default() };
        apply(&self.datapath, &[MapOp::PutIpcache { key: IpcacheKey::host(socket_addr(addr).ip()), entry }]);
    }

    pub(crate) fn allow(&self, enforcement: Enforcement, entries: &[(PolicyKey, PolicyEntry)]) {
        self.datapath.replace_policy(POD, enforcement, entries).expect("a policy");
    }

    /// The pod sends.
    pub(crate) fn sends(&self, frame: &[u8]) -> u32 {
        self.datapath.test_run(PacketProgram::FromPod, frame, 1).expect("a test run").retval
    }

    /// The pod gets it from the network.
    pub(crate) fn gets(&self, frame: &[u8]) -> u32 {
        let context = PacketContext { ingress_ifindex: NETWORK, ..PacketContext::default() };
        self.datapath.test_run_in(PacketProgram::ToPod, frame, context, 1).expect("a test run").retval
    }

    /// The node itself sends it to the pod.
    pub(crate) fn gets_from_host(&self, frame: &[u8]) -> u32 {
        self.datapath.test_run(PacketProgram::ToPod, frame, 1).expect("a test run").retval
    }

    pub(crate) fn counter(&self, wanted: Counter) -> u64 {
        let counters = self.datapath.counters().expect("counters");
        counters.into_iter().find(|(known, _)| *known == wanted).expect("every counter is there").1
    }
}

pub(crate) fn frame(protocol: u8, source: &str, destination: &str, flags: u8) -> Vec<u8> {
    let frame = match protocol {
        TCP => Frame::tcp(source, destination, flags),
        _ => Frame { protocol, ..Frame::udp(source, destination) },
    };
    frame.bytes()
}

/// The same address with another port.
pub(crate) fn at_port(addr: &str, port: u16) -> String {
    SocketAddr::new(socket_addr(addr).ip(), port).to_string()
}

pub(crate) fn allowed() -> PolicyEntry {
    PolicyEntry { rule: 16, ..PolicyEntry::default() }
}

pub(crate) fn denied() -> PolicyEntry {
    PolicyEntry { rule: 17, flags: policy_flags::DENY, ..PolicyEntry::default() }
}

/// Everything from (or to) an identity.
pub(crate) fn all_of(identity: u32, direction: Direction) -> PolicyKey {
    PolicyKey::any(identity, direction)
}

pub(crate) fn port(identity: u32, direction: Direction, protocol: u8, port: u16) -> PolicyKey {
    PolicyKey::ports(identity, direction, protocol, port, 16)
}

/// Protocols with ports.
pub(crate) const PROTOCOLS: [u8; 3] = [TCP, UDP, SCTP];
