//! The way to a peer, by the steps that the real connection takes, and what their errors mean.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use etcd_client::Client;
use isthmus_kvstore::client::steps::{
    self, OpenError, ResolveError, Resolver, Secured, Source, TlsProblem, Why,
};
use isthmus_kvstore::config::{ClientConfig, Endpoint, IdentityError, Pem};
use isthmus_kvstore::{Certificate, Validity};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::fault::{Fault, period, printable};

/// The most of a PEM file that is looked at.
const MOST_PEM: u64 = 1 << 20;
/// The most authorities that are told.
const MOST_AUTHORITIES: usize = 16;
/// A certificate that has less than this left should have been renewed.
const SOON: TimeDelta = TimeDelta::days(3);
/// What makes an HTTP server show itself, and nobody else do anything.
const HELLO: &[u8] = b"HEAD / HTTP/1.0\r\n\r\n";
/// How much of an answer is looked at.
const ANSWER: usize = 128;
/// How long it is waited for.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// The certificates of a configuration.
#[derive(Debug, Default)]
pub(super) struct Material {
    /// Who is trusted.
    pub(super) authorities: Vec<Certificate>,
    /// Who we are.
    pub(super) own: Option<Certificate>,
    pub(super) faults: Vec<Fault>,
}

/// Reads the certificates as they are now.
pub(super) fn material(config: &ClientConfig, now: DateTime<Utc>) -> Material {
    let mut material = Material::default();
    for endpoint in config.endpoints.iter().filter(|endpoint| !endpoint.tls) {
        material.faults.push(Fault::PlainText { endpoint: endpoint.to_string() });
    }
    if config.endpoints.iter().all(|endpoint| !endpoint.tls) {
        return material;
    }
    if let Some(trusted) = &config.trusted_ca {
        match authorities(trusted) {
            Ok(authorities) => material.authorities = authorities,
            Err(reason) => material.faults.push(Fault::Material {
                field: "the trusted authorities,",
                place: place(trusted),
                reason,
            }),
        }
        // One of several may be on its way out.
        let expired = |authority: &Certificate| authority.validity(now) != Validity::Valid;
        if !material.authorities.is_empty() && material.authorities.iter().all(expired) {
            let certificate = material.authorities[0].clone();
            material.faults.push(Fault::AuthorityExpired { certificate, now });
        }
    }
    match steps::own_certificate(config, now) {
        Ok(None) => material.faults.push(Fault::NoIdentity),
        Ok(Some((certificate, validity))) => {
            match validity {
                Validity::Expired => {
                    material.faults.push(Fault::OwnExpired { certificate: certificate.clone(), now });
                }
                Validity::NotYet => {
                    material.faults.push(Fault::OwnNotYetValid { certificate: certificate.clone(), now });
                }
                Validity::Valid if certificate.not_after - now < SOON => {
                    material.faults.push(Fault::OwnExpiresSoon { certificate: certificate.clone(), now });
                }
                Validity::Valid => {}
            }
            material.own = Some(certificate);
        }
        Err(problem) => material.faults.push(identity_fault(&problem, config)),
    }
    material
}

/// An endpoint's addresses.
#[derive(Debug)]
pub(super) struct Resolution {
    pub(super) addresses: Vec<SocketAddr>,
    /// What was asked and answered, for people.
    pub(super) told: String,
    /// Something that is not right although there are addresses.
    pub(super) fault: Option<Fault>,
}

/// Finds an endpoint's addresses as the relay does.
pub(super) async fn resolve(
    resolver: &Resolver,
    config: &ClientConfig,
    endpoint: &Endpoint,
    patience: Duration,
) -> Result<Resolution, Fault> {
    let asked = timeout(patience + ANSWER_PATIENCE, resolver.resolve(endpoint, &config.addresses)).await;
    let host = &endpoint.host;
    let resolved = match asked {
        Ok(Ok(resolved)) => resolved,
        Ok(Err(error)) => return Err(resolve_fault(error)),
        Err(_) => return Err(Fault::DnsSilent { host: host.clone(), asked: "asked for it".to_owned() }),
    };
    let (how, fault) = match resolved.source {
        Source::Literal => ("an address, not looked up", None),
        Source::Configured => ("as `addresses` says, not looked up", None),
        Source::Asked => ("asked just now", None),
        Source::Remembered => ("an answer that still counts", None),
        Source::Stale(error) => ("the last known", Some(resolve_fault(error))),
    };
    let ips: Vec<_> = resolved.addresses.iter().map(SocketAddr::ip).collect();
    let told = format!("{host}: {} ({how})", super::fault::addresses(&ips));
    Ok(Resolution { addresses: resolved.addresses, told, fault })
}

fn resolve_fault(error: ResolveError) -> Fault {
    match error {
        ResolveError::NoSuchName { host, asked, .. } => Fault::NoSuchName { host, asked: asked.to_string() },
        ResolveError::NoAddress { host, .. } => Fault::NoAddress { host },
        ResolveError::TimedOut { host, asked } => Fault::DnsSilent { host, asked: asked.to_string() },
        ResolveError::NotAName { host, reason }
        | ResolveError::Unconfigured { host, reason }
        | ResolveError::ServerFailed { host, reason, .. } => Fault::DnsFailed { host, reason },
    }
}

/// Connects to one address.
pub(super) async fn tcp(address: SocketAddr, patience: Duration) -> Result<(TcpStream, Duration), Fault> {
    let begun = Instant::now();
    let error = match steps::dial(&[address], begun + patience).await {
        Ok(dialed) => return Ok((dialed.stream, begun.elapsed())),
        Err(mut error) => error.failures.pop().map(|(_, error)| error),
    };
    let Some(error) = error else { return Err(Fault::Dropped { address, after: patience }) };
    let reason = error.to_string();
    Err(match error.kind() {
        io::ErrorKind::ConnectionRefused => Fault::Refused { address },
        io::ErrorKind::TimedOut => Fault::Dropped { address, after: begun.elapsed() },
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            Fault::NoRoute { address, reason }
        }
        _ => Fault::TcpFailed { address, reason },
    })
}

/// A connection on which both sides have taken each other's certificate.
pub(super) struct Shaken {
    /// What was seen, for people.
    pub(super) told: Vec<String>,
    /// The store behind it, or what there is instead.
    pub(super) opened: Result<Client, Fault>,
}

/// Shakes hands, and waits for the first word, since only that tells whether our certificate is taken.
pub(super) async fn tls(
    config: &ClientConfig,
    endpoint: &Endpoint,
    address: SocketAddr,
    stream: TcpStream,
    patience: Duration,
) -> Result<Shaken, Fault> {
    let shaken = timeout(patience, steps::handshake(config, endpoint, stream)).await;
    let secured = match shaken {
        Err(_) => return Err(Fault::TlsSilent { address, after: patience }),
        Ok(Err(TlsProblem::NotTls)) => {
            return Err(Fault::NotTls { address, answer: plain_answer(address).await });
        }
        // The other side speaks TLS, and knows HTTP/2 by name.
        Ok(Err(TlsProblem::Other(reason))) if reason.contains("NoApplicationProtocol") => {
            let opened = Err(Fault::HttpServer { answer: "no HTTP/2 here".to_owned() });
            return Ok(Shaken { told: vec![format!("{address}: TLS, but not for HTTP/2")], opened });
        }
        Ok(Err(problem)) => return Err(tls_fault(problem, config)),
        Ok(Ok(secured)) => secured,
    };
    let told = told(&secured, address);
    let opened = match timeout(patience, steps::open(config, endpoint, secured)).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(OpenError::Tls(problem))) => return Err(tls_fault(problem, config)),
        Ok(Err(OpenError::Protocol(reason))) => {
            Err(match http_answer(config, endpoint, address, patience).await {
                Some(answer) => Fault::HttpServer { answer },
                None => Fault::GatewayFailed { reason: printable(&reason) },
            })
        }
        Err(_) => Err(Fault::GatewaySilent { after: patience }),
    };
    Ok(Shaken { told, opened })
}

/// All of that on another connection, for who wants nothing but the connection.
pub(super) async fn open(
    config: &ClientConfig,
    endpoint: &Endpoint,
    address: SocketAddr,
    patience: Duration,
) -> Result<Client, Fault> {
    let (stream, _) = tcp(address, patience).await?;
    tls(config, endpoint, address, stream, patience).await?.opened
}

fn told(secured: &Secured, address: SocketAddr) -> Vec<String> {
    let mut told = Vec::new();
    match &secured.version {
        None => told.push(format!("{address}: plain text")),
        Some(version) => {
            let name = secured.name.as_deref().unwrap_or_default();
            told.push(format!("{address}: {version}, verified as {name}"));
        }
    }
    for certificate in secured.chain.iter().take(1) {
        told.push(format!(
            "theirs: {:?}, issued by {:?}, {}",
            certificate.subject,
            certificate.issuer,
            period(certificate)
        ));
        told.push(format!("for {}", certificate.names.join(", ")));
    }
    told
}

fn tls_fault(problem: TlsProblem, config: &ClientConfig) -> Fault {
    let identity = identity_fault(&problem, config);
    match problem {
        TlsProblem::Expired { certificate, now } => Fault::ServerExpired { certificate, now },
        TlsProblem::NotYetValid { certificate, now } => Fault::ServerNotYetValid { certificate, now },
        TlsProblem::WrongName { expected, certificate } => {
            Fault::WrongName { wanted: expected, names: certificate.names }
        }
        TlsProblem::UnknownIssuer { certificate, trusted } => Fault::WrongAuthority { certificate, trusted },
        problem @ TlsProblem::NotAServer { .. } => Fault::BadCertificate { reason: problem.to_string() },
        TlsProblem::Refused { why, certificate, .. } => {
            let says = match why {
                Why::Validity => "by its clock it is not valid",
                Why::Authority => "it does not trust who issued it",
                Why::Required => "it wants one",
                Why::Certificate => {
                    "who issued it may not vouch for that name there, or it is none for clients"
                }
                Why::Unsaid => "it does not say why",
            };
            Fault::CertificateRefused { says, own: certificate }
        }
        TlsProblem::Trust { .. } | TlsProblem::NoTrust | TlsProblem::Identity(_) => identity,
        problem => Fault::TlsFailed { reason: printable(&problem.to_string()) },
    }
}

/// What is wrong with our own side.
fn identity_fault(problem: &TlsProblem, config: &ClientConfig) -> Fault {
    let (certificate, key) = match &config.identity {
        Some(isthmus_kvstore::config::Identity::Files(files)) => {
            (files.cert_file.display().to_string(), files.key_file.display().to_string())
        }
        _ => ("in memory".to_owned(), "in memory".to_owned()),
    };
    let material = |field, place, reason| Fault::Material { field, place, reason };
    match problem {
        TlsProblem::Identity(IdentityError::Certificate(error)) => {
            material("our certificate,", certificate, error.to_string())
        }
        TlsProblem::Identity(IdentityError::Key(error)) => material("our key,", key, error.to_string()),
        TlsProblem::Identity(IdentityError::Mismatch(error)) => {
            Fault::KeyMismatch { reason: error.to_string() }
        }
        TlsProblem::Trust { place, reason } => {
            material("the trusted authorities,", place.clone(), reason.clone())
        }
        other => material("the trusted authorities,", "none".to_owned(), other.to_string()),
    }
}

fn authorities(trusted: &Pem) -> Result<Vec<Certificate>, String> {
    let mut read = Vec::new();
    let pem: &[u8] = match trusted {
        Pem::Text(text) => text.as_bytes(),
        Pem::File(path) => {
            let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
            io::Read::read_to_end(&mut io::Read::take(file, MOST_PEM), &mut read)
                .map_err(|error| error.to_string())?;
            &read
        }
    };
    let mut all = Vec::new();
    for der in CertificateDer::pem_slice_iter(pem).take(MOST_AUTHORITIES) {
        let der = der.map_err(|error| format!("it is not valid PEM: {error}"))?;
        all.push(Certificate::parse(&der).ok_or("it holds something else than an X.509 certificate")?);
    }
    if all.is_empty() { Err("it holds no PEM certificate".to_owned()) } else { Ok(all) }
}

fn place(pem: &Pem) -> String {
    match pem {
        Pem::File(path) => path.display().to_string(),
        Pem::Text(_) => "ca.crt".to_owned(),
    }
}

/// What something says that speaks no TLS: the first line of its answer.
async fn plain_answer(address: SocketAddr) -> Option<String> {
    let stream = timeout(ANSWER_PATIENCE, TcpStream::connect(address)).await.ok()?.ok()?;
    answer(stream).await
}

/// What an HTTP server of the older kind says behind the endpoint. Nothing if it is none.
pub(super) async fn http_answer(
    config: &ClientConfig,
    endpoint: &Endpoint,
    address: SocketAddr,
    patience: Duration,
) -> Option<String> {
    let (stream, _) = tcp(address, patience).await.ok()?;
    let secured = timeout(patience, steps::handshake(config, endpoint, stream)).await.ok()?.ok()?;
    answer(secured).await.filter(|answer| answer.starts_with("HTTP/"))
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Option<String> {
    let mut bytes = vec![0; ANSWER];
    let asked = async {
        // Some begin to speak themselves, and close on what they do not understand.
        let _ = stream.write_all(HELLO).await;
        stream.read(&mut bytes).await
    };
    let length = timeout(ANSWER_PATIENCE, asked).await.ok()?.ok()?;
    let text = String::from_utf8_lossy(&bytes[..length]);
    let line = printable(text.lines().next().unwrap_or_default());
    (!line.is_empty()).then_some(line)
}
