//! The addresses of a name: looked up when its time is over, and before that when what it led to has died.
//!
//! - An answer counts for as long as its TTL says, within bounds: the longest is a minute, since who connects so seldom
//!   can well ask again, and a wrong address costs more.
//! - [`Resolver::forget`] ends an answer's time. A connection that died may have died because the address has moved (a
//!   load balancer that was made anew), whatever its TTL promised.
//! - While no name server answers, the last addresses that were known are used: an outage of DNS is no reason to lose
//!   peers too.
//! - `/etc/resolv.conf` and `/etc/hosts` are read at each lookup, so a change of theirs needs no restart.
//!
//! A resolver costs nothing until it is asked, and one lookup per minute and name at most while it is.

mod error;
mod lookup;

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

pub use self::error::{Asked, ResolveError};
use self::lookup::Found;
pub use self::lookup::NameServers;
use crate::config::Endpoint;

/// Bounds on the time for which an answer counts.
const POSITIVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// The same for "there is no such name", which somebody is about to change.
const NEGATIVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// How long the last known addresses serve while no name server answers.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);
/// The most names that are remembered.
const MAX_NAMES: usize = 4096;
/// The most addresses of one name that are tried.
pub(crate) const MAX_ADDRESSES: usize = 32;

/// Looks names up and remembers the answers for as long as they count. Clones share what they remember.
#[derive(Debug, Clone)]
pub struct Resolver(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    servers: NameServers,
    known: Mutex<HashMap<String, Known>>,
}

/// What is known of a name.
#[derive(Debug, Clone)]
struct Known {
    answer: Result<Arc<[IpAddr]>, ResolveError>,
    until: Instant,
    /// The last addresses, and since when they are only the last ones.
    last: Option<(Arc<[IpAddr]>, Instant)>,
}

/// The addresses of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// In the order in which to try them: the families in turn, IPv6 first (RFC 8305, section 4), each in the order of
    /// the answer. Never empty.
    pub addresses: Vec<SocketAddr>,
    /// How they are known.
    pub source: Source,
}

/// How an address is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The endpoint names the address itself.
    Literal,
    /// The configuration says so (`addresses`).
    Configured,
    /// `/etc/hosts` or a name server said so, just now.
    Asked,
    /// One of them said so before, and it still counts.
    Remembered,
    /// A name server said so before. It no longer counts, but now none answers.
    Stale(ResolveError),
}

impl Resolver {
    /// The one of this process: what `/etc/resolv.conf` and `/etc/hosts` say.
    pub fn system() -> Self {
        static SYSTEM: LazyLock<Resolver> = LazyLock::new(|| Resolver::new(NameServers::system()));
        SYSTEM.clone()
    }

    /// One of its own memory that asks `servers`.
    pub fn new(servers: NameServers) -> Self {
        Self(Arc::new(Inner { servers, known: Mutex::default() }))
    }

    /// The addresses of `endpoint`, of which `configured` overrides what would be looked up.
    ///
    /// # Errors
    /// [`ResolveError`] when it has none, or none can be found out now.
    pub async fn resolve(
        &self,
        endpoint: &Endpoint,
        configured: &BTreeMap<String, Vec<IpAddr>>,
    ) -> Result<Resolved, ResolveError> {
        let at = |addresses: &[IpAddr], source| Resolved {
            addresses: in_turn(addresses).map(|address| SocketAddr::new(address, endpoint.port)).collect(),
            source,
        };
        if let Ok(address) = endpoint.host.parse::<IpAddr>() {
            return Ok(at(&[address], Source::Literal));
        }
        let host = endpoint.host.to_ascii_lowercase();
        match configured.get(&host).or_else(|| configured.get(&endpoint.host)) {
            Some(addresses) if !addresses.is_empty() => return Ok(at(addresses, Source::Configured)),
            _ => {}
        }
        let (addresses, source) = self.lookup(host).await?;
        Ok(at(&addresses, source))
    }

    /// The answer for `host` does not count any more; the next one who wants to know asks.
    pub fn forget(&self, host: &str) {
        if let Some(known) = self.known().get_mut(&host.to_ascii_lowercase()) {
            known.until = Instant::now();
        }
    }

    async fn lookup(&self, host: String) -> Result<(Arc<[IpAddr]>, Source), ResolveError> {
        let before = self.known().get(&host).cloned();
        if let Some(known) = &before
            && known.until > Instant::now()
        {
            return known.answer.clone().map(|addresses| (addresses, Source::Remembered));
        }
        let last = before.and_then(|known| match known.answer {
            Ok(addresses) => Some((addresses, known.until)),
            Err(_) => known.last,
        });
        match self.0.servers.lookup(&host).await {
            Ok(Found { addresses, ttl }) => {
                let addresses: Arc<[IpAddr]> = addresses.into_iter().take(MAX_ADDRESSES).collect();
                let until = Instant::now() + ttl.clamp(POSITIVE.0, POSITIVE.1);
                self.learn(host, Known { answer: Ok(Arc::clone(&addresses)), until, last: None });
                Ok((addresses, Source::Asked))
            }
            Err(error) => {
                let last = last.filter(|(_, since)| error.is_outage() && since.elapsed() < STALE);
                let until = Instant::now() + error.ttl().clamp(NEGATIVE.0, NEGATIVE.1);
                // An outage is not remembered: the next one who asks may have luck.
                let until = if error.is_outage() { Instant::now() } else { until };
                self.learn(host.clone(), Known { answer: Err(error.clone()), until, last: last.clone() });
                match last {
                    Some((addresses, _)) => {
                        tracing::warn!(host, %error, "the last known addresses are used");
                        Ok((addresses, Source::Stale(error)))
                    }
                    None => Err(error),
                }
            }
        }
    }

    fn learn(&self, host: String, news: Known) {
        let mut known = self.known();
        if known.len() >= MAX_NAMES && !known.contains_key(&host) {
            let now = Instant::now();
            known.retain(|_, known| known.until > now);
            if known.len() >= MAX_NAMES {
                known.clear();
            }
        }
        known.insert(host, news);
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The families in turn, each in its order, IPv6 first.
fn in_turn(addresses: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    let of = |six: bool| addresses.iter().copied().filter(move |address| address.is_ipv6() == six);
    let (mut six, mut four) = (of(true).fuse(), of(false).fuse());
    std::iter::from_fn(move || {
        Some([six.next(), four.next()]).filter(|pair| pair.iter().any(Option::is_some))
    })
    .flatten()
    .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_families_take_turns() {
        let addresses =
            |texts: &[&str]| -> Vec<IpAddr> { texts.iter().map(|text| text.parse().unwrap()).collect() };
        let given = addresses(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2"]);
        let order = addresses(&["fd00::1", "10.0.0.1", "fd00::2", "10.0.0.2", "10.0.0.3"]);
        assert_eq!(in_turn(&given).collect::<Vec<_>>(), order);
    }
}
