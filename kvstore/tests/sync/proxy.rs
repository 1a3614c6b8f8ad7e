//! A TCP proxy between reader and store, with the faults that networks have.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
};

/// How the network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    Fine,
    /// Nothing comes through and nobody is told: packets are dropped.
    Stalled,
}

/// Forwards to one port at a time.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    network: watch::Sender<Network>,
    state: Arc<Mutex<State>>,
    _accepting: JoinSet<()>,
}

#[derive(Default)]
struct State {
    target: u16,
    connections: JoinSet<()>,
    accepted: usize,
}

impl Proxy {
    pub(crate) async fn to(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let network = watch::Sender::new(Network::Fine);
        let state = Arc::new(Mutex::new(State { target, ..State::default() }));
        let mut accepting = JoinSet::new();
        accepting.spawn({
            let (network, state) = (network.clone(), Arc::clone(&state));
            async move {
                loop {
                    let Ok((client, _)) = listener.accept().await else { continue };
                    let network = network.subscribe();
                    let mut state = state.lock().unwrap();
                    state.accepted += 1;
                    let target = SocketAddr::from(([127, 0, 0, 1], state.target));
                    state.connections.spawn(async move {
                        if let Ok(server) = TcpStream::connect(target).await {
                            let (from_client, to_client) = client.into_split();
                            let (from_server, to_server) = server.into_split();
                            tokio::select! {
                                () = forward(from_client, to_server, network.clone()) => {}
                                () = forward(from_server, to_client, network) => {}
                            }
                        }
                    });
                }
            }
        });
        Self { port, network, state, _accepting: accepting }
    }

    /// Cuts every connection; new ones go to `target`.
    pub(crate) fn lead_to(&self, target: u16) {
        let mut state = self.state.lock().unwrap();
        state.target = target;
        state.connections.abort_all();
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        self.state.lock().unwrap().connections.abort_all();
    }

    /// Drops all packets from now on, in both directions.
    pub(crate) fn stall(&self) {
        self.network.send_replace(Network::Stalled);
    }

    /// Lets packets through again.
    pub(crate) fn recover(&self) {
        self.network.send_replace(Network::Fine);
    }

    /// How many connections there were so far.
    pub(crate) fn accepted(&self) -> usize {
        self.state.lock().unwrap().accepted
    }
}

async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut network: watch::Receiver<Network>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(read @ 1..) = from.read(&mut buffer).await else { return };
        if network.wait_for(|network| *network == Network::Fine).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
