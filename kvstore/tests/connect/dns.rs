//! A name server on loopback whose answers change as a test wants it.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
};

use hickory_resolver::proto::{
    op::{Message, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::SOA},
};
use isthmus_kvstore::client::steps::{NameServers, Resolver};
use tokio::{net::UdpSocket, task::JoinSet};

pub(crate) struct Dns {
    pub(crate) address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    _serving: JoinSet<()>,
}

#[derive(Default)]
struct Zone {
    names: HashMap<String, (Vec<IpAddr>, u32)>,
    mood: Mood,
    /// Every question so far, as `name. TYPE`.
    asked: Vec<String>,
}

/// How the server answers.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    #[default]
    Well,
    /// `SERVFAIL` to everything.
    Failing,
    /// Not at all.
    Silent,
    /// Not at all to questions for IPv6.
    SilentOnIpv6,
}

impl Dns {
    pub(crate) async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let zone = Arc::<Mutex<Zone>>::default();
        let mut serving = JoinSet::new();
        serving.spawn({
            let zone = Arc::clone(&zone);
            async move {
                let mut buffer = [0; 4096];
                loop {
                    let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
                    let answer = zone.lock().unwrap().answer(&buffer[..length]);
                    if let Some(answer) = answer {
                        socket.send_to(&answer, from).await.unwrap();
                    }
                }
            }
        });
        Self { address, zone, _serving: serving }
    }

    /// `name` leads to these addresses, for `ttl` seconds.
    pub(crate) fn set(&self, name: &str, addresses: &[&str], ttl: u32) {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        self.zone.lock().unwrap().names.insert(format!("{name}."), (addresses, ttl));
    }

    pub(crate) fn be(&self, mood: Mood) {
        self.zone.lock().unwrap().mood = mood;
    }

    /// How often IPv4 addresses of `name` were asked for.
    pub(crate) fn asked(&self, name: &str) -> usize {
        let question = format!("{name}. A");
        self.zone.lock().unwrap().asked.iter().filter(|asked| **asked == question).count()
    }

    /// A resolver of its own memory that asks this server.
    pub(crate) fn resolver(&self) -> Resolver {
        Resolver::new(NameServers::given([self.address]))
    }
}

impl Zone {
    fn answer(&mut self, question: &[u8]) -> Option<Vec<u8>> {
        let question = Message::from_vec(question).ok()?;
        let query = question.queries.first()?.clone();
        let name = query.name().to_lowercase().to_string();
        let family = query.query_type();
        self.asked.push(format!("{name} {family}"));
        let silent = match self.mood {
            Mood::Silent => true,
            Mood::SilentOnIpv6 => family == RecordType::AAAA,
            Mood::Well | Mood::Failing => false,
        };
        if silent {
            return None;
        }
        let mut answer = Message::response(question.metadata.id, OpCode::Query);
        answer.metadata.recursion_desired = true;
        answer.metadata.recursion_available = true;
        answer.add_query(query.clone());
        match self.names.get(&name) {
            _ if self.mood == Mood::Failing => answer.metadata.response_code = ResponseCode::ServFail,
            None => {
                answer.metadata.response_code = ResponseCode::NXDomain;
                answer.add_authority(authority());
            }
            Some((addresses, ttl)) => {
                for address in addresses {
                    let data = RData::from(*address);
                    if data.record_type() == family {
                        answer.add_answer(Record::from_rdata(query.name().clone(), *ttl, data));
                    }
                }
                if answer.answers.is_empty() {
                    answer.add_authority(authority());
                }
            }
        }
        answer.to_vec().ok()
    }
}

/// What says for how long "no" counts: two seconds.
fn authority() -> Record {
    let name = Name::from_ascii("example.").unwrap();
    let soa = SOA::new(name.clone(), name.clone(), 1, 60, 60, 60, 2);
    Record::from_rdata(name, 2, RData::SOA(soa))
}
