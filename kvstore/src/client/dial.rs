//! TCP to the first of several addresses that answers (RFC 8305, section 5).

use std::{fmt, io, net::SocketAddr, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, sleep_until},
};

/// How long one address is waited for before the next is tried beside it.
pub(crate) const STAGGER: Duration = Duration::from_millis(250);

/// A connection, and where it leads.
#[derive(Debug)]
pub struct Dialed {
    /// The connection.
    pub stream: TcpStream,
    /// The address that answered.
    pub address: SocketAddr,
}

/// No address answered. Says of each what became of it.
#[derive(Debug)]
pub struct DialError {
    /// The addresses that could not be connected to.
    pub failures: Vec<(SocketAddr, io::Error)>,
    /// Those that had said nothing when time was up.
    pub silent: Vec<SocketAddr>,
}

/// Connects to the first address that answers before `deadline`.
///
/// They are tried in the order given, the next one when the one before has failed or has said nothing for 250 ms. All
/// attempts but the first that succeeds are given up.
///
/// # Errors
/// [`DialError`] when all fail or time is up.
pub async fn dial(addresses: &[SocketAddr], deadline: Instant) -> Result<Dialed, DialError> {
    let mut waiting = addresses.iter().copied();
    let mut attempts = FuturesUnordered::new();
    let mut underway = Vec::new();
    let mut failures = Vec::new();
    loop {
        if let Some(address) = waiting.next() {
            underway.push(address);
            attempts.push(async move { (address, TcpStream::connect(address).await) });
        }
        loop {
            let more = waiting.len() > 0;
            tokio::select! {
                // Who has answered counts before the time that has passed.
                biased;
                attempt = attempts.next() => match attempt {
                    Some((address, Ok(stream))) => {
                        // Events are small and should not wait for more of them. Where that cannot be had, they wait.
                        let _ = stream.set_nodelay(true);
                        return Ok(Dialed { stream, address });
                    }
                    Some((address, Err(error))) => {
                        underway.retain(|other| *other != address);
                        failures.push((address, error));
                        if more {
                            break;
                        }
                    }
                    None => return Err(DialError { failures, silent: Vec::new() }),
                },
                () = sleep(STAGGER), if more => break,
                () = sleep_until(deadline) => {
                    underway.extend(waiting);
                    return Err(DialError { failures, silent: underway });
                }
            }
        }
    }
}

impl DialError {
    /// Whether every address refused at once, which says that its host is there and the port is not.
    pub fn is_refused(&self) -> bool {
        self.silent.is_empty()
            && self.failures.iter().all(|(_, error)| error.kind() == io::ErrorKind::ConnectionRefused)
    }

    fn advice(&self) -> &'static str {
        let all = |kinds: &[io::ErrorKind]| {
            !self.failures.is_empty() && self.failures.iter().all(|(_, error)| kinds.contains(&error.kind()))
        };
        if self.is_refused() {
            "nothing listens there: is the gateway running, and is the port right?"
        } else if self.failures.is_empty() || all(&[io::ErrorKind::TimedOut]) {
            "packets are dropped on the way: does a NetworkPolicy, a firewall or a security group block this port?"
        } else if all(&[io::ErrorKind::HostUnreachable, io::ErrorKind::NetworkUnreachable]) {
            "there is no route: is the address right, and can this network reach it at all?"
        } else {
            "is the address right, and is the port open for this host?"
        }
    }
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot connect: ")?;
        for (address, error) in &self.failures {
            write!(f, "{address}: {error}, ")?;
        }
        for address in &self.silent {
            write!(f, "{address}: no answer in time, ")?;
        }
        f.write_str(self.advice())
    }
}

impl std::error::Error for DialError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_fails_at_once_holds_nobody_up_and_is_named() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let mut all: Vec<_> = (1..4).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect();
        let deadline = Instant::now() + Duration::from_secs(20);
        let error = dial(&all, deadline).await.unwrap_err();
        assert!(error.is_refused() && error.failures.len() == 3, "{error}");
        assert!(error.to_string().contains("127.0.0.1:3"), "{error}");
        all.push(good);
        // The quickest of several: any one may be held up by whatever else the machine does.
        let mut quickest = Duration::MAX;
        for _ in 0..5 {
            let begun = Instant::now();
            assert_eq!(dial(&all, Instant::now() + Duration::from_secs(20)).await.unwrap().address, good);
            quickest = quickest.min(begun.elapsed());
        }
        assert!(quickest < STAGGER, "three refusals take no stagger: {quickest:?}");
    }
}
