//! One lookup: the hosts file, then each name that the host may stand for, both families at once.

use std::{
    io::{self, Read as _},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures::future::select;
use hickory_resolver::{
    Hosts, TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    lookup::Lookup,
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
    proto::{
        op::{Query, ResponseCode},
        rr::{Name, RecordType},
    },
    system_conf::parse_resolv_conf,
};
use tokio::time::timeout;

use super::{Asked, ResolveError};

/// How long a lookup may take, all names and name servers together.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one name server may take, so that there is time for another.
const SERVER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the other family's answer is waited for once there are addresses (RFC 8305, section 3).
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);
/// For how long an answer counts that lacks a family because it was late.
const PARTIAL: Duration = Duration::from_secs(5);
/// The largest resolv.conf and hosts file that are read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Which name servers to ask, and for what.
#[derive(Debug, Clone)]
pub enum NameServers {
    /// What these files say when it is asked.
    Files {
        /// `/etc/resolv.conf`: name servers, search domains, `ndots`.
        resolv_conf: PathBuf,
        /// `/etc/hosts`: names that are not asked for.
        hosts: PathBuf,
    },
    /// These.
    Given {
        /// Their addresses.
        servers: Vec<SocketAddr>,
        /// The domains that a name is looked for in.
        search: Vec<String>,
        /// A name with fewer dots is looked for in the search domains first.
        ndots: usize,
    },
}

/// The addresses of a name, at least one, and for how long they count.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) ttl: Duration,
}

impl NameServers {
    /// Those of the system.
    pub fn system() -> Self {
        Self::Files { resolv_conf: "/etc/resolv.conf".into(), hosts: "/etc/hosts".into() }
    }

    /// These alone, for names as they are.
    pub fn given(servers: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self::Given { servers: servers.into_iter().collect(), search: Vec::new(), ndots: 1 }
    }

    pub(super) async fn lookup(&self, host: &str) -> Result<Found, ResolveError> {
        let not_a_name = |reason: String| ResolveError::NotAName { host: host.to_owned(), reason };
        let name = Name::from_ascii(host).map_err(|error| not_a_name(error.to_string()))?;
        if let Some(found) = self.in_hosts(&name) {
            return Ok(found);
        }
        let unconfigured = |reason| ResolveError::Unconfigured { host: host.to_owned(), reason };
        let (config, mut options) = self.configuration().map_err(unconfigured)?;
        options.timeout = options.timeout.min(SERVER_TIMEOUT);
        options.use_hosts_file = ResolveHosts::Never;
        options.cache_size = 0;
        let names = candidates(&name, config.search(), options.ndots);
        let servers = config.name_servers().iter().flat_map(|server| {
            let port = server.connections.first().map_or(53, |connection| connection.port);
            Some(SocketAddr::new(server.ip, port))
        });
        let mut asked = Asked { names: Vec::new(), servers: servers.collect() };
        let resolver = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            .with_options(options)
            .build()
            .map_err(|error| unconfigured(error.to_string()))?;
        match timeout(LOOKUP_TIMEOUT, search(&resolver, host, &names, &mut asked)).await {
            Ok(result) => result,
            Err(_) => Err(ResolveError::TimedOut { host: host.to_owned(), asked }),
        }
    }

    fn configuration(&self) -> Result<(ResolverConfig, ResolverOpts), String> {
        match self {
            Self::Files { resolv_conf, .. } => {
                let text =
                    read(resolv_conf).map_err(|error| format!("{}: {error}", resolv_conf.display()))?;
                parse_resolv_conf(text).map_err(|error| format!("{}: {error}", resolv_conf.display()))
            }
            Self::Given { servers, search, ndots } => {
                let servers = servers.iter().map(|address| {
                    let connections =
                        [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                            connection.port = address.port();
                            connection
                        });
                    NameServerConfig::new(address.ip(), true, connections.into())
                });
                let search: Vec<_> = search
                    .iter()
                    .map(Name::from_ascii)
                    .collect::<Result<_, _>>()
                    .map_err(|error| error.to_string())?;
                let mut options = ResolverOpts::default();
                options.ndots = *ndots;
                Ok((ResolverConfig::from_parts(None, search, servers.collect()), options))
            }
        }
    }

    fn in_hosts(&self, name: &Name) -> Option<Found> {
        let Self::Files { hosts: path, .. } = self else { return None };
        let mut hosts = Hosts::default();
        hosts.read_hosts_conf(read(path).ok()?.as_slice()).ok()?;
        let mut name = name.clone();
        name.set_fqdn(true);
        let of = |family| hosts.lookup_static_host(&Query::query(name.clone(), family));
        let addresses: Vec<_> = [RecordType::AAAA, RecordType::A]
            .into_iter()
            .filter_map(of)
            .flat_map(|lookup| addresses(&lookup))
            .collect();
        // The file may change at any time, and costs little.
        (!addresses.is_empty()).then_some(Found { addresses, ttl: Duration::ZERO })
    }
}

/// The names that `name` may stand for, in the order in which they are asked for (resolv.conf(5), `ndots`).
fn candidates(name: &Name, search: &[Name], ndots: usize) -> Vec<Name> {
    let mut absolute = name.clone();
    absolute.set_fqdn(true);
    if name.is_fqdn() {
        return vec![absolute];
    }
    let dots = usize::from(name.num_labels()).saturating_sub(1);
    let mut names: Vec<Name> = Vec::new();
    if dots >= ndots {
        names.push(absolute.clone());
    }
    for domain in search {
        // Too long together: nobody has such a name.
        let Ok(mut name) = name.clone().append_domain(domain) else { continue };
        name.set_fqdn(true);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if !names.contains(&absolute) {
        names.push(absolute);
    }
    names
}

async fn search(
    resolver: &TokioResolver,
    host: &str,
    names: &[Name],
    asked: &mut Asked,
) -> Result<Found, ResolveError> {
    let mut without_address = None;
    let mut missing = Duration::MAX;
    let mut failed = None;
    for name in names {
        asked.names.push(name.to_string());
        match both_families(resolver, name).await {
            Answer::Addresses(found) => return Ok(found),
            Answer::NoAddress(ttl) => without_address = without_address.or(Some(ttl)),
            Answer::NoSuchName(ttl) => missing = missing.min(ttl),
            Answer::Failed(reason) => failed = Some(reason),
            Answer::Silent => {
                return Err(ResolveError::TimedOut { host: host.to_owned(), asked: asked.clone() });
            }
        }
    }
    let (host, asked) = (host.to_owned(), asked.clone());
    Err(match (failed, without_address) {
        (Some(reason), _) => ResolveError::ServerFailed { host, reason, asked },
        (None, Some(ttl)) => ResolveError::NoAddress { host, asked, ttl },
        (None, None) => ResolveError::NoSuchName { host, asked, ttl: missing },
    })
}

/// What name servers say of one name.
enum Answer {
    Addresses(Found),
    /// It has records of other kinds, or names below it.
    NoAddress(Duration),
    NoSuchName(Duration),
    Failed(String),
    Silent,
}

/// IPv4 and IPv6 at once; the one that is late does not hold up the other for long.
async fn both_families(resolver: &TokioResolver, name: &Name) -> Answer {
    let ask = async |family| answer(resolver.lookup(name.clone(), family).await);
    let (six, four) = (Box::pin(ask(RecordType::AAAA)), Box::pin(ask(RecordType::A)));
    let (first, rest) = select(six, four).await.factor_first();
    let Answer::Addresses(mut found) = first else { return both(first, rest.await) };
    match timeout(RESOLUTION_DELAY, rest).await {
        Ok(second) => both(Answer::Addresses(found), second),
        Err(_) => {
            found.ttl = found.ttl.min(PARTIAL);
            Answer::Addresses(found)
        }
    }
}

fn both(one: Answer, other: Answer) -> Answer {
    match (one, other) {
        (Answer::Addresses(one), Answer::Addresses(other)) => Answer::Addresses(Found {
            addresses: one.addresses.into_iter().chain(other.addresses).collect(),
            ttl: one.ttl.min(other.ttl),
        }),
        (Answer::Addresses(found), Answer::Failed(_) | Answer::Silent)
        | (Answer::Failed(_) | Answer::Silent, Answer::Addresses(found)) => {
            Answer::Addresses(Found { ttl: found.ttl.min(PARTIAL), ..found })
        }
        (Answer::Addresses(found), _) | (_, Answer::Addresses(found)) => Answer::Addresses(found),
        (Answer::Failed(reason), _) | (_, Answer::Failed(reason)) => Answer::Failed(reason),
        (Answer::Silent, _) | (_, Answer::Silent) => Answer::Silent,
        (Answer::NoAddress(one), Answer::NoAddress(other) | Answer::NoSuchName(other))
        | (Answer::NoSuchName(one), Answer::NoAddress(other)) => Answer::NoAddress(one.min(other)),
        (Answer::NoSuchName(one), Answer::NoSuchName(other)) => Answer::NoSuchName(one.min(other)),
    }
}

fn answer(result: Result<Lookup, NetError>) -> Answer {
    let ttl = |seconds: Option<u32>| Duration::from_secs(seconds.unwrap_or_default().into());
    match result {
        Ok(lookup) => {
            let addresses = addresses(&lookup);
            let ttl = lookup.valid_until().saturating_duration_since(Instant::now());
            if addresses.is_empty() {
                Answer::NoAddress(ttl)
            } else {
                Answer::Addresses(Found { addresses, ttl })
            }
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(none))) => match none.response_code {
            ResponseCode::NXDomain => Answer::NoSuchName(ttl(none.negative_ttl)),
            ResponseCode::NoError => Answer::NoAddress(ttl(none.negative_ttl)),
            other => Answer::Failed(other.to_str().to_owned()),
        },
        Err(NetError::Dns(DnsError::ResponseCode(code))) => Answer::Failed(code.to_str().to_owned()),
        Err(NetError::Timeout | NetError::NoConnections) => Answer::Silent,
        Err(other) => Answer::Failed(other.to_string()),
    }
}

fn addresses(lookup: &Lookup) -> Vec<IpAddr> {
    lookup.answers().iter().filter_map(|record| record.data.ip_addr()).collect()
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE_BYTES).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(host: &str, search: &[&str], ndots: usize) -> Vec<String> {
        let search: Vec<_> = search.iter().map(|domain| Name::from_ascii(domain).unwrap()).collect();
        let names = candidates(&Name::from_ascii(host).unwrap(), &search, ndots);
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_name_with_few_dots_is_looked_for_in_the_search_domains_first() {
        let kubernetes = ["isthmus-system.svc.cluster.local", "svc.cluster.local", "cluster.local"];
        assert_eq!(
            names("gateway.beta", &kubernetes, 5),
            [
                "gateway.beta.isthmus-system.svc.cluster.local.",
                "gateway.beta.svc.cluster.local.",
                "gateway.beta.cluster.local.",
                "gateway.beta."
            ]
        );
        assert_eq!(names("gateway.beta", &["lan"], 1), ["gateway.beta.", "gateway.beta.lan."]);
        assert_eq!(names("gateway.beta.", &kubernetes, 5), ["gateway.beta."], "a dot at the end says it all");
    }
}
