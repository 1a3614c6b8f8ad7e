//! The agent goes and comes back; traffic does not notice.

use std::io::Write;
use std::net::TcpStream;

use aya::programs::{SchedClassifier, TcAttachType};
use isthmus_bpf_abi::Protocol;
use isthmus_node_agent::datapath::{Datapath, DatapathError, Features};

use crate::model::{Model, socket_addr};
use crate::sandbox::{ip, sandbox};
use crate::sockets::{Server, ask_tcp, ask_udp, backend_of, udp_socket};

const SERVICE: &str = "10.96.0.10:80";
const BACKENDS: [&str; 2] = ["127.0.0.11:8080", "127.0.0.12:8080"];

#[test]
fn traffic_flows_on_without_an_agent_and_the_next_one_takes_over() {
    sandbox(|sandbox| {
        let _tcp = BACKENDS.map(|addr| Server::start(Protocol::Tcp, addr));
        let _udp = BACKENDS.map(|addr| Server::start(Protocol::Udp, addr));
        let mut tcp = Model::new(1, SERVICE, Protocol::Tcp);
        let mut udp = Model::new(2, SERVICE, Protocol::Udp);
        let first = sandbox.datapath();
        tcp.grow(&first, &BACKENDS);
        udp.grow(&first, &BACKENDS);
        first.attach_sockets(&sandbox.cgroup).expect("attach");
        let mut connection = TcpStream::connect(SERVICE).expect("connect");
        let backend = backend_of(&mut connection);
        let socket = udp_socket("0.0.0.0:0");
        let (udp_backend, _) = ask_udp(&socket, SERVICE);
        let dumped = (first.services(), first.slots(), first.backends());
        drop(first);

        // Nobody is there.
        ask_tcp(SERVICE).expect("connect");
        assert_eq!(ask_udp(&socket, SERVICE), (udp_backend, socket_addr(SERVICE)));

        let second = sandbox.datapath();
        let found = (second.services(), second.slots(), second.backends());
        assert_eq!(format!("{found:?}"), format!("{dumped:?}"));
        assert_eq!(found.0.expect("services").len(), 2);
        assert_eq!(found.1.expect("slots").len(), 4);
        second.attach_sockets(&sandbox.cgroup).expect("attach again");
        second.attach_sockets(&sandbox.cgroup).expect("and again");
        second.remove_older_maps().expect("nothing to remove");
        connection.write_all(b"x").expect("the old connection lives");
        assert_eq!(backend_of(&mut connection), backend);
        assert_eq!(connection.peer_addr().expect("a peer"), socket_addr(SERVICE));
        assert_eq!(ask_udp(&socket, SERVICE), (udp_backend, socket_addr(SERVICE)));
        // Attached once: a second program would translate, and count, what the first has made of it.
        let before = second.counters().expect("counters")[0].1;
        ask_tcp(SERVICE).expect("connect");
        assert_eq!(second.counters().expect("counters")[0].1, before + 1);
        // And it is the new agent's maps that count.
        tcp.shrink(&second, BACKENDS[0]);
        for _ in 0..20 {
            assert_eq!(ask_tcp(SERVICE).expect("connect"), socket_addr(BACKENDS[1]));
        }
    });
}

#[test]
fn an_agent_with_other_map_sizes_leaves_the_old_maps_in_use_until_it_attaches() {
    sandbox(|sandbox| {
        let _servers = BACKENDS.map(|addr| Server::start(Protocol::Tcp, addr));
        let first = sandbox.datapath();
        Model::new(1, SERVICE, Protocol::Tcp).grow(&first, &BACKENDS[..1]);
        first.attach_sockets(&sandbox.cgroup).expect("attach");
        drop(first);

        let second = sandbox.datapath_with(|config| config.sizes.flows *= 2);
        assert_eq!(second.services().expect("services"), []);
        assert_eq!(ask_tcp(SERVICE).expect("connect"), socket_addr(BACKENDS[0]));
        Model::new(1, SERVICE, Protocol::Tcp).grow(&second, &BACKENDS[1..]);
        assert_eq!(ask_tcp(SERVICE).expect("connect"), socket_addr(BACKENDS[0]));
        second.attach_sockets(&sandbox.cgroup).expect("attach");
        assert_eq!(ask_tcp(SERVICE).expect("connect"), socket_addr(BACKENDS[1]));
        let versions = || {
            let entries = std::fs::read_dir(&sandbox.pin_dir).expect("pins");
            entries.filter(|entry| !entry.as_ref().expect("a pin").path().ends_with("links")).count()
        };
        assert_eq!(versions(), 2);
        second.remove_older_maps().expect("remove");
        assert_eq!(versions(), 1);
        assert_eq!(ask_tcp(SERVICE).expect("connect"), socket_addr(BACKENDS[1]));
        drop(second);
        Datapath::remove_pins(&sandbox.pin_dir).expect("remove");
        ask_tcp(SERVICE).expect_err("nothing is attached any more");
    });
}

#[test]
fn packet_programs_are_attached_once_and_found_again() {
    for features in [Features::Detect, Features::Floor] {
        sandbox(|sandbox| {
            let open = || sandbox.datapath_with(|config| config.features = features);
            ip("link add host0 type veth peer name pod0");
            let index = nix::net::if_::if_nametoindex("host0").expect("the interface");
            let first = open();
            first.attach_pod(index).expect("attach");
            first.attach_pod(index).expect("attach again");
            drop(first);
            let second = open();
            assert_eq!(second.attached_pods().expect("pins"), [index]);
            second.attach_pod(index).expect("take over");
            assert_eq!(second.attached_pods().expect("pins"), [index]);
            // Before 6.6 there is no TCX to ask.
            if features == Features::Detect
                && let Ok((_, programs)) = SchedClassifier::query_tcx("host0", TcAttachType::Ingress)
            {
                let [program] = programs.as_slice() else { panic!("{programs:?}") };
                // The verifier's limit is a million; older ones take more steps.
                let steps = program.verified_instruction_count().expect("a number");
                assert!(steps < 200_000, "{steps} steps of the verifier");
            }
            second.detach_pod(index).expect("detach");
            second.detach_pod(index).expect("detach again");
            assert_eq!(second.attached_pods().expect("pins"), [] as [u32; 0]);
            second.attach_pod(index).expect("attach");
            ip("link del host0");
            assert_eq!(second.attached_pods().expect("pins"), [] as [u32; 0]);
            second.attach_pod(index).expect_err("there is no such interface");
            Datapath::remove_pins(&sandbox.pin_dir).expect("remove");
        });
    }
}

#[test]
fn wrong_directories_are_refused_with_advice() {
    sandbox(|sandbox| {
        let elsewhere = tempfile::tempdir().expect("a directory");
        let config = isthmus_node_agent::datapath::DatapathConfig::new(elsewhere.path().join("pins"));
        let error = Datapath::open(config).expect_err("no BPF file system");
        assert!(matches!(error, DatapathError::NotBpffs { .. }));
        assert!(error.to_string().contains("mount -t bpf"), "{error}");

        let config = isthmus_node_agent::datapath::DatapathConfig::new(sandbox.pin_dir.with_extension("d"));
        let error = Datapath::open(config).expect_err("no such name is possible");
        assert!(matches!(error, DatapathError::DottedName { .. }), "{error}");

        let datapath = sandbox.datapath();
        let error = datapath.attach_sockets(elsewhere.path()).expect_err("no cgroup");
        assert!(matches!(error, DatapathError::NotCgroup2 { .. }), "{error}");
    });
}
