//! The command line, parsed into a [`DaemonConfig`]: whatever is wrong with it is told before anything is started.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use isthmus_daemon::{LogFormat, LogLevel, LoopbackAddr};
use isthmus_kvstore::gateway::TlsFiles;
use isthmus_wire::{ClusterId, ClusterName, MaxConnectedClusters};
use rustls::pki_types::DnsName;

use crate::certificates::{self, Issuer, LONGEST_VALIDITY, SHORTEST_VALIDITY};
use crate::daemon::{DaemonConfig, Engine, Tls};
use crate::election;
use crate::exporter::Source;
use crate::relay::Timing;

const EXAMPLES: &str = "\
Examples:
  # In a pod, any number of replicas, with certificates and peers in Secrets of the namespace:
  clustermesh-apiserver --cluster-name alpha --cluster-id 1 \\
      --namespace isthmus-system --replica-name \"$POD_NAME\"

  # Replicas that share an etcd of their own, in a cluster that runs Cilium, with cert-manager's certificates:
  clustermesh-apiserver --cluster-name alpha --cluster-id 1 --source cilium \\
      --namespace isthmus-system --certificates external \\
      --store etcd --etcd-config /var/lib/isthmus/etcd.yaml

  # One replica beside Cilium's own configuration, with everything in files:
  clustermesh-apiserver --cluster-name alpha --cluster-id 1 \\
      --peers-dir /var/lib/cilium/clustermesh \\
      --tls-cert /tls/tls.crt --tls-key /tls/tls.key --tls-client-ca /tls/ca.crt

  # What it is doing:
  curl --unix-socket /run/isthmus/apiserver.sock http://localhost/v1/status
";

/// Exports a cluster into the mesh and mirrors its peers.
///
/// Reads Services, pods and nodes from the Kubernetes API, serves them to peers and node agents over mTLS as an etcd
/// that nobody can write to, and mirrors what the peers serve. Speaks Cilium Cluster Mesh: peers and agents may be
/// Cilium's own.
#[derive(Debug, Parser)]
#[command(name = "clustermesh-apiserver", version, after_help = EXAMPLES)]
pub struct Flags {
    /// Name of this cluster, unique in the mesh: at most 32 of a-z, 0-9 and `-`.
    #[arg(long, value_name = "NAME")]
    cluster_name: ClusterName,
    /// Id of this cluster, unique in the mesh: 1 to 255, or to 511 with --max-connected-clusters 511.
    #[arg(long, value_name = "ID")]
    cluster_id: ClusterId,
    /// How many clusters the mesh is set up for: 255 or 511. Must be the same in all of its clusters.
    #[arg(long, value_name = "N", default_value_t)]
    max_connected_clusters: MaxConnectedClusters,

    /// Access to the Kubernetes API. Without it, that of the pod's service account.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Where our own objects are in the Kubernetes API: certificates, peers, the Lease of the replica that leads. Without it,
    /// all of that is in files, and there must be one replica.
    #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE")]
    namespace: Option<String>,
    /// Who this replica is among several: a name that no other has. The hostname unless given.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    replica_name: Option<String>,
    /// Whether replicas elect one that leads. Without an election there must be one replica. True with --namespace.
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set)]
    leader_elect: Option<bool>,
    /// How long a replica that leads and is not heard of keeps others from leading, in whole seconds. It is renewed for two
    /// thirds of that, and 7 or 8 times in it.
    #[arg(long, value_name = "DURATION", default_value = "15s", value_parser = duration)]
    leader_elect_lease_duration: Duration,

    /// Where pods, nodes and identities come from: `cilium` in a cluster that runs Cilium.
    #[arg(long, value_enum, default_value_t)]
    source: SourceFlag,
    /// Whether a namespace takes part in the mesh unless annotated clustermesh.cilium.io/global.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    clustermesh_default_global_namespace: bool,

    /// A directory with one etcd client configuration per peer, named like the peer. Changes need no restart. Without
    /// it nothing is mirrored.
    #[arg(long, value_name = "DIR")]
    peers_dir: Option<PathBuf>,
    /// How long services of an unreachable peer are kept, such as 30m. 0 keeps them for ever.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration)]
    clustermesh_cache_ttl: Duration,
    /// How long what was mirrored of a removed peer is kept, so that agents can let go of it.
    #[arg(long, value_name = "DURATION", default_value = "3m", value_parser = duration)]
    peer_drain_grace: Duration,
    /// How long readiness waits for a peer that cannot be reached.
    #[arg(long, value_name = "DURATION", default_value = "15s", value_parser = duration)]
    per_cluster_ready_timeout: Duration,
    /// How long readiness waits for all peers together.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
    global_ready_timeout: Duration,

    /// Where peers and agents connect, over mTLS.
    #[arg(long, value_name = "ADDR:PORT", default_value = "[::]:2379")]
    listen: SocketAddr,
    /// The certificate to show, PEM. Read again when it changes, as are the next two. Without the three, certificates are
    /// in Secrets of --namespace.
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_client_ca"])]
    tls_cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_cert", "tls_client_ca"])]
    tls_key: Option<PathBuf>,
    /// The authorities whose clients may connect, PEM. A client's common name decides what it may read.
    #[arg(long, value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    tls_client_ca: Option<PathBuf>,
    /// Who issues the certificates in Secrets.
    #[arg(long, value_enum, default_value_t, conflicts_with = "tls_cert")]
    certificates: IssuerFlag,
    /// How long certificates are valid that we issue, such as 2160h. They are renewed at two thirds of it.
    #[arg(long, value_name = "DURATION", default_value = "2160h", value_parser = duration)]
    certificate_validity: Duration,
    /// A further name or address of the gateway, to be in the certificate that we issue for it. May be repeated.
    #[arg(long, value_name = "NAME", value_parser = gateway_name)]
    gateway_san: Vec<String>,
    /// How long a change of the authorities may take to reach the files of every pod that has them mounted. A rotation waits
    /// for it.
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = duration)]
    ca_rotation_settle: Duration,

    /// Where the state is kept: in this process, or in an etcd that replicas share.
    #[arg(long, value_enum, default_value_t)]
    store: StoreFlag,
    /// The etcd to keep it in: an etcd client configuration, as for peers.
    #[arg(long, value_name = "FILE", required_if_eq("store", "etcd"))]
    etcd_config: Option<PathBuf>,

    /// Where /healthz, /readyz and /v1/status answer. Plain text, so on loopback alone.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:9880")]
    health_address: LoopbackAddr,
    /// Where /metrics answers. Plain text, so on loopback alone.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:9962")]
    metrics_address: LoopbackAddr,
    /// A unix socket for `isthmus status`: GET /v1/status.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,

    /// How log lines look.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// What is logged: error, warn, info, debug or trace, or a list such as `info,clustermesh_apiserver=debug`.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LogLevel,
}

/// Where pods, nodes and identities come from.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum SourceFlag {
    /// Pods and Nodes; identities are allocated and kept as CiliumIdentity objects.
    #[default]
    Kubernetes,
    /// Cilium's own CiliumEndpoints, CiliumNodes and CiliumIdentities.
    Cilium,
}

/// Where the state is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum StoreFlag {
    /// In this process: everything is derived from Kubernetes and from peers, so nothing needs a disk.
    #[default]
    Memory,
    /// In etcd.
    Etcd,
}

/// Who issues the certificates in Secrets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum IssuerFlag {
    /// We do, by an authority of the cluster's own in the Secret isthmus-ca, made if there is none.
    #[default]
    Isthmus,
    /// cert-manager, or a person. They are only read.
    External,
}

impl Flags {
    /// What the flags ask for.
    ///
    /// # Errors
    /// One line about flags that do not fit each other.
    pub fn config(self) -> Result<DaemonConfig, String> {
        if self.cluster_name.is_default() {
            return Err(
                "--cluster-name: \"default\" is refused by every peer; give the cluster a name of its own"
                    .into(),
            );
        }
        self.max_connected_clusters.admit(self.cluster_id).map_err(|error| {
            format!("--cluster-id: {error}; choose a lower one or set --max-connected-clusters 511")
        })?;
        let engine = match (self.store, self.etcd_config) {
            (StoreFlag::Etcd, Some(file)) => Engine::Etcd(file),
            (StoreFlag::Memory, None) => Engine::Memory,
            (StoreFlag::Memory, Some(_)) => {
                return Err(
                    "--etcd-config is given, but --store is memory; add --store etcd or leave it out".into(),
                );
            }
            (StoreFlag::Etcd, None) => return Err("--store etcd needs --etcd-config FILE".into()),
        };
        let tls = match (self.tls_cert, self.tls_key, self.tls_client_ca, &self.namespace) {
            (Some(certificate), Some(key), Some(client_ca), _) => {
                Tls::Files(TlsFiles { certificate, key, client_ca })
            }
            (.., None) => {
                return Err("no certificates: give --namespace to have them in Secrets there, or --tls-cert, --tls-key \
                            and --tls-client-ca to have them in files"
                    .into());
            }
            (.., Some(namespace)) => Tls::Secrets {
                namespace: namespace.clone(),
                issuer: match self.certificates {
                    IssuerFlag::Isthmus => Issuer::Isthmus,
                    IssuerFlag::External => Issuer::External,
                },
                validity: self.certificate_validity,
                gateway_names: self.gateway_san,
                timing: certificates::Timing { settle: self.ca_rotation_settle },
            },
        };
        if !(SHORTEST_VALIDITY..=LONGEST_VALIDITY).contains(&self.certificate_validity) {
            return Err(format!(
                "--certificate-validity: at least {}s, and hours where files are to follow; at most {}h",
                SHORTEST_VALIDITY.as_secs(),
                LONGEST_VALIDITY.as_secs() / 3600
            ));
        }
        let lease = self.leader_elect_lease_duration;
        if lease < Duration::from_secs(1) || lease > Duration::from_secs(3600) || lease.subsec_nanos() != 0 {
            return Err("--leader-elect-lease-duration: 1s to 1h, in whole seconds".into());
        }
        let election = match (self.leader_elect, &self.namespace) {
            (Some(true), None) => {
                return Err("--leader-elect true needs --namespace, where the Lease is".into());
            }
            (Some(false), _) | (None, None) => None,
            (Some(true) | None, Some(_)) => Some(election::Timing::of_lease(lease)),
        };
        let replica = match self.replica_name {
            Some(name) if !name.is_empty() => name,
            Some(_) | None => hostname()?,
        };
        Ok(DaemonConfig {
            namespace: self.namespace,
            replica,
            election,
            cluster: self.cluster_name,
            cluster_id: self.cluster_id,
            max_connected_clusters: self.max_connected_clusters,
            kubeconfig: self.kubeconfig,
            source: match self.source {
                SourceFlag::Kubernetes => Source::Kubernetes,
                SourceFlag::Cilium => Source::Cilium,
            },
            namespaces_are_global: self.clustermesh_default_global_namespace,
            peers_dir: self.peers_dir,
            timing: Timing {
                drain_grace: self.peer_drain_grace,
                cache_ttl: (!self.clustermesh_cache_ttl.is_zero()).then_some(self.clustermesh_cache_ttl),
                peer_ready_timeout: self.per_cluster_ready_timeout,
                ready_timeout: self.global_ready_timeout,
            },
            listen: self.listen,
            tls,
            engine,
            health_address: self.health_address,
            metrics_address: self.metrics_address,
            api_socket: self.api_socket,
        })
    }
}

fn hostname() -> Result<String, String> {
    let name = nix::unistd::gethostname().map_err(|error| error.to_string());
    name.and_then(|name| name.into_string().map_err(|_| "it is not text".to_owned()))
        .map_err(|error| format!("the hostname cannot be read ({error}); give --replica-name"))
}

/// A DNS name, with a wildcard in front at most, or an address.
fn gateway_name(text: &str) -> Result<String, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        // One form of each: names are compared with those in the certificate.
        return Ok(address.to_string());
    }
    match DnsName::try_from(text.strip_prefix("*.").unwrap_or(text)) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err(format!("{text:?} is neither a DNS name nor an address")),
    }
}

/// A duration as Go writes it: `1h30m`, `90s`, `250ms`, `0`.
fn duration(text: &str) -> Result<Duration, String> {
    let invalid = || format!("{text:?} is not a duration: write it like 90s, 10m or 1h30m");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(invalid)?;
        let number: u64 = rest[..digits].parse().map_err(|_| invalid())?;
        let after = &rest[digits..];
        let unit = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let millis: u64 = match &after[..unit] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(invalid()),
        };
        let part = number.checked_mul(millis).map(Duration::from_millis).ok_or_else(invalid)?;
        total = total.checked_add(part).ok_or_else(invalid)?;
        rest = &after[unit..];
    }
    if text.is_empty() { Err(invalid()) } else { Ok(total) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: [&str; 9] = [
        "clustermesh-apiserver",
        "--tls-cert=c",
        "--tls-key=k",
        "--tls-client-ca=a",
        "--cluster-name=alpha",
        "--cluster-id=1",
        "--source=kubernetes",
        "--store=memory",
        "--log-format=json",
    ];

    fn parse(more: &[&str]) -> Result<DaemonConfig, String> {
        let replaced = |flag: &&&str| !more.iter().any(|new| flag.split('=').next() == new.split('=').next());
        let arguments = BASE.iter().filter(replaced).chain(more);
        Flags::try_parse_from(arguments).map_err(|error| error.to_string())?.config()
    }

    #[test]
    fn the_defaults_are_cilium_s() {
        let config = parse(&[]).unwrap();
        assert_eq!(config.listen.to_string(), "[::]:2379");
        assert_eq!(config.health_address.to_string(), "127.0.0.1:9880");
        assert_eq!(config.metrics_address.to_string(), "127.0.0.1:9962");
        assert_eq!(config.timing.cache_ttl, None);
        assert_eq!(config.timing.drain_grace, Duration::from_secs(180));
        assert_eq!(config.engine, Engine::Memory);
        assert!(config.namespaces_are_global);
    }

    #[test]
    fn what_is_wrong_is_told_with_the_flag_that_is_wrong() {
        for (flags, says) in [
            (&["--cluster-id=0"][..], "--cluster-id"),
            (&["--cluster-id=300"], "--max-connected-clusters 511"),
            (&["--cluster-name=Alpha"], "--cluster-name"),
            (&["--cluster-name=default"], "--cluster-name"),
            (&["--max-connected-clusters=128"], "--max-connected-clusters"),
            (&["--health-address=0.0.0.0:9880"], "plain text"),
            (&["--metrics-address=[::]:9962"], "plain text"),
            (&["--store=etcd"], "--etcd-config"),
            (&["--etcd-config=x"], "--store etcd"),
            (&["--listen=2379"], "--listen"),
            (&["--peer-drain-grace=3"], "10m"),
            (&["--leader-elect=true"], "--namespace"),
            (&["--certificates=external"], "--tls-cert"),
            (&["--gateway-san=a b"], "neither a DNS name nor an address"),
            (&["--leader-elect-lease-duration=1500ms"], "whole seconds"),
            (&["--certificate-validity=1s"], "--certificate-validity"),
            (&["--certificate-validity=100000000h"], "at most"),
        ] {
            let error = parse(flags).unwrap_err();
            assert!(error.contains(says), "{flags:?}: {error}");
        }
        parse(&["--cluster-id=300", "--max-connected-clusters=511"]).unwrap();
        parse(&["--store=etcd", "--etcd-config=x"]).unwrap();
    }

    #[test]
    fn certificates_are_in_three_files_or_in_secrets_of_a_namespace() {
        let bare = |more: &[&str]| {
            let base = ["clustermesh-apiserver", "--cluster-name=alpha", "--cluster-id=1"];
            let flags = Flags::try_parse_from(base.iter().chain(more)).map_err(|error| error.to_string())?;
            flags.config()
        };
        assert!(bare(&[]).unwrap_err().contains("--namespace"));
        assert!(bare(&["--tls-cert=c", "--tls-key=k"]).unwrap_err().contains("--tls-client-ca"));
        let config =
            bare(&["--namespace=mesh", "--gateway-san=2001:DB8::1", "--gateway-san=*.example.org"]).unwrap();
        let Tls::Secrets { namespace, issuer, validity, gateway_names, .. } = config.tls else {
            panic!("in Secrets")
        };
        assert_eq!((namespace.as_str(), issuer), ("mesh", Issuer::Isthmus));
        assert_eq!(validity, certificates::DEFAULT_VALIDITY);
        assert_eq!(gateway_names, ["2001:db8::1", "*.example.org"]);
        assert_eq!(config.election, Some(election::Timing::default()));
        assert!(!config.replica.is_empty());
        assert_eq!(bare(&["--namespace=mesh", "--leader-elect=false"]).unwrap().election, None);
    }

    #[test]
    fn without_a_namespace_nobody_is_elected() {
        let config = parse(&[]).unwrap();
        assert_eq!((config.election, config.namespace), (None, None));
        assert!(matches!(config.tls, Tls::Files(_)));
    }

    #[test]
    fn durations_are_go_s() {
        for (text, seconds) in [("0", 0.0), ("0s", 0.0), ("90s", 90.0), ("1h30m", 5400.0), ("250ms", 0.25)] {
            assert_eq!(duration(text).unwrap().as_secs_f64(), seconds, "{text}");
        }
        for bad in ["", "3", "s", "1d", "-1s", "1.5h", "99999999999999999999s", "18446744073709551615h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
