//! A small Kubernetes API server for the lab, used where the real one cannot be had.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use ipnet::IpNet;
use isthmus_kube_api::{Config, KubeApi, Tls};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// A small Kubernetes API server that keeps everything in memory.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  # For kubectl and others that have a client certificate (CN is the user, O are the groups):
  lab-kube-api --listen 127.0.0.1:6443 --tls-cert server.crt --tls-key server.key --client-ca ca.crt

  # Without TLS, on loopback only; every request may do everything:
  lab-kube-api --listen 127.0.0.1:8080
  kubectl --server http://127.0.0.1:8080 get namespaces"
)]
struct Arguments {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:6443")]
    listen: SocketAddr,

    /// Listen here too; may be repeated.
    #[arg(long = "bind-extra", value_name = "ADDR")]
    bind_extra: Vec<SocketAddr>,

    /// The server's certificate chain, PEM. Without it: plain HTTP on loopback.
    #[arg(long, requires_all = ["tls_key", "client_ca"], value_name = "FILE")]
    tls_cert: Option<PathBuf>,

    /// The key of that certificate, PEM.
    #[arg(long, requires = "tls_cert", value_name = "FILE")]
    tls_key: Option<PathBuf>,

    /// Clients' certificates must be signed by one of these CAs, PEM.
    #[arg(long, requires = "tls_cert", value_name = "FILE")]
    client_ca: Option<PathBuf>,

    /// Where the addresses of Services come from: one range, or an IPv4 and an IPv6 range.
    #[arg(long, value_delimiter = ',', default_value = "10.96.0.0/16", value_name = "CIDR[,CIDR]")]
    service_cidr: Vec<IpNet>,

    /// Where clients inside the cluster reach the server; by default the first address it listens on.
    #[arg(long, value_name = "ADDR")]
    advertise: Option<SocketAddr>,

    /// How many changes of each resource are kept for watches that resume.
    #[arg(long, default_value_t = 10_000, value_name = "COUNT")]
    history_events: usize,

    /// How to log to stderr. RUST_LOG chooses what.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    log_to_stderr(arguments.log_format);
    let tls = match (&arguments.tls_cert, &arguments.tls_key, &arguments.client_ca) {
        (Some(cert), Some(key), Some(ca)) => {
            Some(Tls { cert_pem: read(cert)?, key_pem: read(key)?, client_ca_pem: read(ca)? })
        }
        _ => None,
    };
    let mut listeners = Vec::new();
    for address in std::iter::once(&arguments.listen).chain(&arguments.bind_extra) {
        let listener = TcpListener::bind(address).await;
        listeners.push(listener.with_context(|| format!("cannot listen on {address}; is it in use?"))?);
    }
    let config = Config {
        tls,
        service_cidrs: arguments.service_cidr,
        advertise: arguments.advertise,
        history_events: arguments.history_events,
        ..Config::default()
    };
    let server = KubeApi::serve_all(listeners, config)?;
    for address in server.addresses() {
        tracing::info!(%address, "serving the Kubernetes API");
    }
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    server.stop().await;
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn log_to_stderr(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}
