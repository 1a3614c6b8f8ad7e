//! The kernel's maps of a world, and packets through the programs.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use isthmus_bpf_abi::{
    Direction, IpcacheEntry, IpcacheKey, PolicyEntry, PolicyEvent, PolicyKey, policy_flags,
};
use isthmus_node_agent::datapath::{
    AtFirst, Datapath, EndpointSettings, Enforcement, Events, MapOp, PacketContext, PacketProgram,
};
use isthmus_policy::{Changes, Decision, EndpointChange, EndpointId, Resolved};
use isthmus_policy_truth as truth;
use truth::{Packet, Peer, Protocol, Reserved, World};

use crate::engine::{self, Node};
use crate::packet::{Frame, SYN, checksum_of};
use crate::sandbox::{Sandbox, ip};

/// `TC_ACT_SHOT`
const DROP: u32 = 2;
const PAIRS: u32 = 12;
const FIRST_SOURCE_PORT: u16 = 20_000;

pub(crate) struct Kernel<'a> {
    datapath: Datapath,
    runtime: tokio::runtime::Runtime,
    events: Events,
    interfaces: Vec<u32>,
    endpoints: BTreeMap<EndpointId, u32>,
    ipcache: BTreeMap<IpNet, u32>,
    /// Of the next flow: no two flows are alike.
    port: u16,
    _sandbox: &'a Sandbox,
}

/// What became of a packet.
pub(crate) struct Told {
    pub(crate) passed: bool,
    /// The rule that the program has told of; nothing if it had nothing to tell.
    pub(crate) rule: Option<u32>,
}

impl<'a> Kernel<'a> {
    pub(crate) fn new(sandbox: &'a Sandbox) -> Self {
        let datapath = sandbox.datapath_with(|config| {
            config.sizes.ipcache = 1024;
            config.sizes.endpoints = 64;
            config.sizes.policy_entries = 16_384;
            config.sizes.policy_flows = 4096;
        });
        for pair in 0..PAIRS {
            ip(&format!("link add pod{pair} type veth peer name eth{pair}"));
        }
        let interfaces =
            (0..PAIRS).map(|pair| nix::net::if_::if_nametoindex(format!("pod{pair}").as_str()).unwrap());
        let interfaces = interfaces.collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let events = {
            let _inside = runtime.enter();
            datapath.events().unwrap()
        };
        Self {
            datapath,
            runtime,
            events,
            interfaces,
            endpoints: BTreeMap::new(),
            ipcache: BTreeMap::new(),
            port: FIRST_SOURCE_PORT,
            _sandbox: sandbox,
        }
    }

    /// Another world: what is left of the former one goes.
    pub(crate) fn begin(&mut self, world: &World, node: &Node) {
        for (_, ifindex) in std::mem::take(&mut self.endpoints) {
            self.datapath.remove_endpoint(ifindex).unwrap();
        }
        self.set_addresses(world, node);
        for (id, resolved) in &node.endpoints {
            self.replace(world, *id, resolved);
        }
    }

    /// Carries out what has changed.
    pub(crate) fn follow(&mut self, world: &World, node: &Node, changes: &Changes) {
        for (id, change) in &changes.endpoints {
            match change {
                EndpointChange::Replace(resolved) => self.replace(world, *id, resolved),
                EndpointChange::Update { put, delete } => {
                    let put: Vec<_> = put.iter().map(|(key, decision)| entry(key, decision)).collect();
                    let delete: Vec<_> = delete.iter().map(key).collect();
                    self.datapath.update_policy(self.endpoints[id], &put, &delete).unwrap();
                }
                EndpointChange::Remove => {
                    if let Some(ifindex) = self.endpoints.remove(id) {
                        self.datapath.remove_endpoint(ifindex).unwrap();
                    }
                }
            }
        }
        self.set_addresses(world, node);
    }

    /// Packets that can be built to be the first of a flow: ICMP errors are about another one.
    pub(crate) fn can_send(packet: &Packet) -> bool {
        match packet.protocol {
            Protocol::Icmp => matches!(packet.port, 0 | 8),
            Protocol::Icmpv6 => matches!(packet.port, 128 | 129),
            Protocol::Tcp | Protocol::Udp | Protocol::Sctp => true,
        }
    }

    /// The first packet of a flow, through the program of its direction.
    pub(crate) fn send(&mut self, world: &World, packet: &Packet) -> Told {
        self.port = self.port.checked_add(1).unwrap_or(FIRST_SOURCE_PORT);
        let ifindex = self.endpoints[&engine::endpoint(&world.pods[packet.pod])];
        let program = match packet.direction {
            truth::Direction::Egress => PacketProgram::FromPod,
            truth::Direction::Ingress => PacketProgram::ToPod,
        };
        // What the node itself sends has come by no interface.
        let elsewhere = self.interfaces[PAIRS as usize - 1];
        let by_node = packet.peer == Peer::Reserved(Reserved::Host);
        let ingress_ifindex = match packet.direction {
            truth::Direction::Egress => ifindex,
            truth::Direction::Ingress if by_node => 0,
            truth::Direction::Ingress => elsewhere,
        };
        let context = PacketContext { ifindex, ingress_ifindex, ..PacketContext::default() };
        let frame = frame(world, packet, self.port);
        let _inside = self.runtime.enter();
        while self.events.try_next().is_some() {}
        let run = self.datapath.test_run_in(program, &frame, context, 1).unwrap();
        let rule = self.events.try_next().map(|event: PolicyEvent| event.rule);
        Told { passed: run.retval != DROP, rule }
    }

    fn replace(&mut self, world: &World, id: EndpointId, resolved: &Resolved) {
        let pod = world.pods.iter().find(|pod| engine::endpoint(pod) == id).expect("an endpoint is a pod");
        let free = || {
            let taken: Vec<_> = self.endpoints.values().collect();
            *self.interfaces.iter().find(|interface| !taken.contains(interface)).expect("a free interface")
        };
        let ifindex = self.endpoints.get(&id).copied().unwrap_or_else(free);
        self.endpoints.insert(id, ifindex);
        let settings = EndpointSettings { identity: pod.identity, ipv4: Some(pod.v4), ipv6: Some(pod.v6) };
        self.datapath.put_endpoint(ifindex, &settings, AtFirst::Wait).unwrap();
        let enforcement =
            Enforcement { ingress: resolved.ingress_enforced, egress: resolved.egress_enforced };
        let entries: Vec<_> = resolved.entries.iter().map(|(key, decision)| entry(key, decision)).collect();
        self.datapath.replace_policy(ifindex, enforcement, &entries).unwrap();
    }

    /// Pods and nodes, and the blocks of policies: as everywhere, the more specific one wins, and a pod over a block.
    fn set_addresses(&mut self, world: &World, node: &Node) {
        let mut wanted: BTreeMap<IpNet, u32> =
            node.cidrs.iter().map(|(prefix, identity)| (*prefix, identity.0)).collect();
        wanted.extend(
            world.addresses().into_iter().map(|(address, identity)| (IpNet::from(address), identity)),
        );
        let key = |prefix: &IpNet| IpcacheKey::new(prefix.network(), prefix.prefix_len());
        let gone = self.ipcache.keys().filter(|prefix| !wanted.contains_key(*prefix));
        let mut ops: Vec<_> = gone.map(|prefix| MapOp::DeleteIpcache { key: key(prefix) }).collect();
        for (prefix, identity) in &wanted {
            if self.ipcache.get(prefix) != Some(identity) {
                let entry = IpcacheEntry { identity: *identity, ..IpcacheEntry::default() };
                ops.push(MapOp::PutIpcache { key: key(prefix), entry });
            }
        }
        for result in self.datapath.apply(&ops) {
            result.unwrap();
        }
        self.ipcache = wanted;
    }
}

fn entry(at: &isthmus_policy::PolicyKey, decision: &Decision) -> (PolicyKey, PolicyEntry) {
    let flags = if decision.is_deny() { policy_flags::DENY } else { 0 };
    let entry = PolicyEntry { precedence: decision.precedence(), rule: decision.rule.0, flags, pad: [0; 3] };
    (key(at), entry)
}

fn key(key: &isthmus_policy::PolicyKey) -> PolicyKey {
    let direction = match key.direction {
        isthmus_policy::Direction::Ingress => Direction::Ingress,
        isthmus_policy::Direction::Egress => Direction::Egress,
    };
    match key.l4.protocol() {
        None => PolicyKey::any(key.identity.0, direction),
        Some(protocol) => {
            PolicyKey::ports(key.identity.0, direction, protocol, key.l4.first_port(), key.l4.port_bits())
        }
    }
}

fn frame(world: &World, packet: &Packet, port: u16) -> Vec<u8> {
    let (local, remote) = (packet.pod_address(world), packet.peer_address(world));
    let (source, destination) = match packet.direction {
        truth::Direction::Egress => (local, remote),
        truth::Direction::Ingress => (remote, local),
    };
    let frame = Frame {
        source: SocketAddr::new(source, port),
        destination: SocketAddr::new(destination, packet.port),
        protocol: packet.protocol.number(),
        tcp_flags: SYN,
        payload: b"truth".to_vec(),
        options: Vec::new(),
        extensions: Vec::new(),
        zero_checksum: false,
    };
    match packet.protocol {
        Protocol::Tcp | Protocol::Udp => frame.bytes(),
        Protocol::Sctp => frame.around(&sctp_init(port, packet.port)),
        Protocol::Icmp | Protocol::Icmpv6 => frame.around(&echo(source, destination, packet, port)),
    }
}

/// The first chunk of an association. Nobody here checks its checksum.
fn sctp_init(from: u16, to: u16) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(from.to_be_bytes());
    segment.extend(to.to_be_bytes());
    segment.extend([0; 8]);
    segment.extend([1, 0, 0, 20, 0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 9]);
    segment
}

fn echo(source: IpAddr, destination: IpAddr, packet: &Packet, id: u16) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    let mut message = vec![packet.port as u8, 0, 0, 0, high, low, 0, 1];
    let mut pseudo = Vec::new();
    if let (IpAddr::V6(source), IpAddr::V6(destination)) = (source, destination) {
        pseudo.extend(source.octets());
        pseudo.extend(destination.octets());
        pseudo.extend((message.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, packet.protocol.number()]);
    }
    let sum = !checksum_of(&pseudo, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}
