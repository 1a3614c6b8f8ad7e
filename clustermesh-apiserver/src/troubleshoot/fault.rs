//! What can be wrong, and what is to be said about it. Pure: a [`Fault`] goes in as it was found, a [`Finding`] comes out.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};
use isthmus_kvstore::Certificate;

use super::report::{Finding, Next, Outcome};

/// Where a peer's configuration comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// A Secret of type `isthmus.io/peer`.
    Secret {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A client configuration in the directory of peers, or one that was named on the command line.
    File(PathBuf),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Secret { namespace, name } => write!(f, "Secret {namespace}/{name}"),
            Self::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

/// About whom a fault was found, for the commands that go with it.
#[derive(Clone, Debug)]
pub struct Circumstances {
    /// The own cluster.
    pub own: String,
    /// The peer.
    pub peer: String,
    /// Where it is configured.
    pub source: Source,
    /// The namespace that the daemons of both run in.
    pub namespace: String,
    /// The common name that we show ourselves with.
    pub common_name: Option<String>,
}

/// Something that is wrong, as it was found.
#[derive(Clone, PartialEq, Debug)]
#[expect(missing_docs, reason = "the sentences in `describe` say what each field is")]
pub enum Fault {
    // Configuration
    NotConfigured { known: Vec<String> },
    Unusable { reason: String },
    Material { field: &'static str, place: String, reason: String },
    KeyMismatch { reason: String },
    NoIdentity,
    OwnExpired { certificate: Certificate, now: DateTime<Utc> },
    OwnNotYetValid { certificate: Certificate, now: DateTime<Utc> },
    OwnExpiresSoon { certificate: Certificate, now: DateTime<Utc> },
    AuthorityExpired { certificate: Certificate, now: DateTime<Utc> },
    PlainText { endpoint: String },

    // DNS
    NoSuchName { host: String, asked: String },
    NoAddress { host: String },
    DnsSilent { host: String, asked: String },
    DnsFailed { host: String, reason: String },

    // TCP
    Refused { address: SocketAddr },
    Dropped { address: SocketAddr, after: Duration },
    NoRoute { address: SocketAddr, reason: String },
    TcpFailed { address: SocketAddr, reason: String },

    // TLS
    ServerExpired { certificate: Certificate, now: DateTime<Utc> },
    ServerNotYetValid { certificate: Certificate, now: DateTime<Utc> },
    WrongAuthority { certificate: Certificate, trusted: Vec<String> },
    WrongName { wanted: String, names: Vec<String> },
    BadCertificate { reason: String },
    CertificateRefused { says: &'static str, own: Option<Certificate> },
    NotTls { address: SocketAddr, answer: Option<String> },
    TlsSilent { address: SocketAddr, after: Duration },
    TlsFailed { reason: String },

    // Gateway
    NotEtcd { answer: String },
    HttpServer { answer: String },
    GatewaySilent { after: Duration },
    GatewayFailed { reason: String },
    OldEtcd { version: String },
    Alarm { errors: Vec<String> },

    // Permissions
    Denied { ranges: Vec<String> },
    OtherCluster { names: Vec<String> },

    // Cluster configuration
    ConfigMissing,
    ConfigMalformed { reason: String },
    IdIsOurs { id: u16 },
    IdTaken { id: u16, other: String },
    MeshSize { ours: u32, theirs: u32 },
    Incompatible { reason: String },

    // Store
    StoreExchanged { was: u64, is: u64 },

    // Canaries
    CanaryMissing { prefixes: Vec<String> },
    NoCanaries,

    // Heartbeat
    HeartbeatMissing { started: Option<DateTime<Utc>> },
    HeartbeatOld { at: DateTime<Utc>, now: DateTime<Utc> },
    HeartbeatAhead { at: DateTime<Utc>, now: DateTime<Utc> },
    HeartbeatMalformed { value: String },

    // Relay
    RelayNotReady { state: String, reason: String },
    RelayLags { revision: i64, theirs: i64, age: Option<f64> },
    Rejected { count: u64, reasons: Vec<String> },
    RelayUnaware,

    // WireGuard
    Encryption { node: String, problem: String },
    KeyMissing { node: String, of: String, strict: bool },
    KeyRefused { node: String, of: String, reason: String },
    KeyUnpublished { node: String },
    Unanswered { node: String, of: String, endpoint: Option<String>, last: Option<f64>, waited: f64 },
    AgentSilent { agent: String, reason: String },
}

/// What is said about a fault.
struct Told {
    kind: &'static str,
    severity: Outcome,
    problem: String,
    cause: String,
    next: (At, String),
}

/// Whose machines a command is for.
enum At {
    Own,
    Peer,
}

impl Fault {
    /// The finding for people and programs.
    pub fn finding(&self, of: &Circumstances) -> Finding {
        let told = self.describe(of);
        let (at, command) = told.next;
        Finding {
            kind: told.kind.to_owned(),
            severity: told.severity,
            problem: one_line(&told.problem),
            cause: told.cause,
            next: Next {
                cluster: match at {
                    At::Own => of.own.clone(),
                    At::Peer => of.peer.clone(),
                },
                command,
            },
        }
    }

    fn describe(&self, of: &Circumstances) -> Told {
        let peer = &of.peer;
        let kubectl = |rest: &str| format!("kubectl -n {} {rest}", of.namespace);
        let edit = || match &of.source {
            Source::Secret { namespace, name } => format!("kubectl -n {namespace} edit secret {name}"),
            Source::File(path) => format!("cat {}", path.display()),
        };
        let renew = || match &of.source {
            // What is wrong is in the Secret, and connecting again writes it anew. A context may be called anything, and is known
            // to whoever reads this alone.
            Source::Secret { .. } => format!(
                "isthmus connect --context '<context of {}>' --destination-context '<context of {peer}>'",
                of.own
            ),
            Source::File(path) => format!("cat {}", path.display()),
        };
        let logs = || {
            kubectl("logs -l app.kubernetes.io/name=clustermesh-apiserver -c clustermesh-apiserver --tail=50")
        };
        let clock = || (At::Own, "date -u".to_owned());
        let service = || kubectl("get service clustermesh-apiserver -o wide");
        let me = || of.common_name.as_ref().map_or_else(|| "without a name".into(), |n| format!("CN={n}"));
        let failed = |kind, problem: String, cause: &str, next| Told {
            kind,
            severity: Outcome::Failed,
            problem,
            cause: cause.to_owned(),
            next,
        };
        let warning = |kind, problem: String, cause: &str, next| Told {
            kind,
            severity: Outcome::Warning,
            problem,
            cause: cause.to_owned(),
            next,
        };
        match self {
            Self::NotConfigured { known } => failed(
                "not-configured",
                format!("{peer} is not configured as a peer; configured are: {}", listed(known)),
                "the name is misspelt, or there is neither a Secret of type isthmus.io/peer that connects it nor a file for it",
                (At::Own, kubectl("get secrets --field-selector type=isthmus.io/peer")),
            ),
            Self::Unusable { reason } => failed(
                "configuration-unusable",
                format!("{} cannot be used: {reason}", of.source),
                "a field is missing or malformed",
                (At::Own, edit()),
            ),
            Self::Material { field, place, reason } => failed(
                "certificate-unreadable",
                format!("{field} {place}: {reason}"),
                "the file was not mounted, may not be read by this process, or holds something else",
                (
                    At::Own,
                    match &of.source {
                        Source::Secret { namespace, name } => {
                            format!("kubectl -n {namespace} describe secret {name}")
                        }
                        Source::File(_) => format!("ls -lL {place}"),
                    },
                ),
            ),
            Self::KeyMismatch { reason } => failed(
                "key-mismatch",
                format!("our certificate and its key cannot be used together: {reason}"),
                "one of the two was replaced without the other",
                (At::Own, edit()),
            ),
            Self::NoIdentity => warning(
                "no-client-certificate",
                "no client certificate is configured".into(),
                "the peer will take us for nobody, unless it asks for no certificate",
                (At::Own, edit()),
            ),
            Self::OwnExpired { certificate, now } => failed(
                "own-certificate-expired",
                format!(
                    "our certificate {} has expired at {}; the clock here says {}",
                    certificate.subject,
                    instant(certificate.not_after),
                    instant(*now)
                ),
                "nothing renews it, or the clock here is ahead",
                (
                    At::Own,
                    match &of.source {
                        Source::Secret { .. } => logs(),
                        Source::File(_) => edit(),
                    },
                ),
            ),
            Self::OwnNotYetValid { certificate, now } => failed(
                "own-certificate-not-yet-valid",
                format!(
                    "our certificate {} is valid from {} on; the clock here says {}",
                    certificate.subject,
                    instant(certificate.not_before),
                    instant(*now)
                ),
                "the clock here, or of who issued it, is wrong",
                clock(),
            ),
            Self::OwnExpiresSoon { certificate, now } => warning(
                "own-certificate-expires-soon",
                format!(
                    "our certificate {} expires at {}; the clock here says {}",
                    certificate.subject,
                    instant(certificate.not_after),
                    instant(*now)
                ),
                "it should have been renewed at two thirds of its life",
                (At::Own, logs()),
            ),
            Self::AuthorityExpired { certificate, now } => warning(
                "authority-expired",
                format!(
                    "the authority {} that is trusted for {peer} is {}; the clock here says {}",
                    certificate.subject,
                    period(certificate),
                    instant(*now)
                ),
                "the peer has another one by now, or the clock here is wrong; we go on trusting it, other programs do not",
                (At::Own, renew()),
            ),
            Self::PlainText { endpoint } => warning(
                "plain-text",
                format!("{endpoint} is not encrypted, and nobody proves who he is"),
                "the endpoint is http:// where https:// is meant",
                (At::Own, edit()),
            ),

            Self::NoSuchName { host, asked } => failed(
                "name-not-found",
                format!("there is no name {host} (NXDOMAIN; {asked})"),
                "the name is misspelt, has not been published, or is to be given by `addresses` in the Secret (`hostAliases` with Cilium)",
                (At::Own, format!("getent ahosts {host} || {}", edit())),
            ),
            Self::NoAddress { host } => failed(
                "name-without-address",
                format!("the name {host} exists and has no address"),
                "its load balancer has not been given an address yet",
                (At::Peer, service()),
            ),
            Self::DnsSilent { host, asked } => failed(
                "dns-server-silent",
                format!("no DNS server answers for {host} ({asked})"),
                "the DNS server is down, or a NetworkPolicy or firewall drops port 53",
                (At::Own, "kubectl -n kube-system get pods -l k8s-app=kube-dns -o wide".into()),
            ),
            Self::DnsFailed { host, reason } => failed(
                "dns-failed",
                format!("{host} cannot be resolved: {reason}"),
                "the DNS server is not well, or refuses this name",
                (At::Own, "kubectl -n kube-system logs -l k8s-app=kube-dns --tail=20".into()),
            ),

            Self::Refused { address } => failed(
                "connection-refused",
                format!("{address} refuses the connection"),
                "the machine is there and nothing listens on that port: the apiserver does not run, or the port is another",
                (
                    At::Peer,
                    kubectl("get pods,service -l app.kubernetes.io/name=clustermesh-apiserver -o wide"),
                ),
            ),
            Self::Dropped { address, after } => failed(
                "packets-dropped",
                format!("{address} does not answer within {}s", seconds(*after)),
                "packets are dropped on the way: a firewall, a security group, a NetworkPolicy, or the machine is down",
                (At::Own, format!("nc -vz -w 3 {} {}", address.ip(), address.port())),
            ),
            Self::NoRoute { address, reason } => failed(
                "no-route",
                format!("{address} cannot be reached: {reason}"),
                "there is no route to that network, or a firewall on the way says so",
                (At::Own, format!("ip route get {}", address.ip())),
            ),
            Self::TcpFailed { address, reason } => failed(
                "connection-failed",
                format!("{address}: {reason}"),
                "the connection ended before it was used",
                (At::Own, format!("nc -vz -w 3 {} {}", address.ip(), address.port())),
            ),

            Self::ServerExpired { certificate, now } => failed(
                "server-certificate-expired",
                format!(
                    "{peer}'s certificate {}, issued by {}, has expired at {}; the clock here says {}",
                    certificate.subject,
                    certificate.issuer,
                    instant(certificate.not_after),
                    instant(*now)
                ),
                "nothing renews it, or the clock here is ahead",
                (At::Peer, kubectl("describe secret clustermesh-apiserver-server-cert")),
            ),
            Self::ServerNotYetValid { certificate, now } => failed(
                "server-certificate-not-yet-valid",
                format!(
                    "{peer}'s certificate {}, issued by {}, is valid from {} on; the clock here says {}",
                    certificate.subject,
                    certificate.issuer,
                    instant(certificate.not_before),
                    instant(*now)
                ),
                "the clock here is behind, or that of who issued it is ahead",
                clock(),
            ),
            Self::WrongAuthority { certificate, trusted } => failed(
                "wrong-authority",
                format!(
                    "{peer}'s certificate {} comes from {}, which is not trusted; trusted are: {}",
                    certificate.subject,
                    certificate.issuer,
                    listed(trusted)
                ),
                "the peer has another authority than when it was connected (also one of the same name with another key), or something else answers at that address",
                (At::Own, renew()),
            ),
            Self::WrongName { wanted, names } => failed(
                "wrong-name",
                format!(
                    "{peer}'s certificate is not valid for {wanted}, which it is asked for; it is for: {}",
                    listed(names)
                ),
                "the endpoint's name is another than the gateway's, or another gateway answers; `server-name` says which name is verified",
                (At::Own, edit()),
            ),
            Self::BadCertificate { reason } => failed(
                "server-certificate-unusable",
                format!("{peer}'s certificate cannot be used: {reason}"),
                "it was not made for a server, or something on the way answers in its place",
                (At::Peer, kubectl("describe secret clustermesh-apiserver-server-cert")),
            ),
            Self::CertificateRefused { says, own } => failed(
                "our-certificate-refused",
                match own {
                    Some(own) => format!(
                        "{peer} refuses our certificate {} (issued by {}, {}): {says}",
                        own.subject,
                        own.issuer,
                        period(own)
                    ),
                    None => format!("{peer} wants a client certificate, and none is configured: {says}"),
                },
                "the peer does not admit us: it has no Secret about us with our authority that is annotated isthmus.io/connect or isthmus.io/admit, or its clock is off",
                match &of.source {
                    // It writes what is missing there, and leaves alone whether the peer reads from us.
                    Source::Secret { .. } => (At::Own, format!("{} --connection-mode unicast", renew())),
                    Source::File(_) => {
                        (At::Peer, kubectl("get secrets --field-selector type=isthmus.io/peer"))
                    }
                },
            ),
            Self::NotTls { address, answer } => failed(
                "not-tls",
                match answer {
                    Some(answer) => format!("{address} does not speak TLS; it says {answer:?}"),
                    None => format!("{address} does not speak TLS"),
                },
                "the port belongs to something else, or a load balancer ends TLS before the gateway",
                (At::Peer, service()),
            ),
            Self::TlsSilent { address, after } => failed(
                "tls-silent",
                format!("{address} takes the connection and says nothing for {}s", seconds(*after)),
                "a load balancer without a backend that lives, or large packets are lost on the way (MTU)",
                (At::Peer, kubectl("get endpointslices -l kubernetes.io/service-name=clustermesh-apiserver")),
            ),
            Self::TlsFailed { reason } => failed(
                "tls-failed",
                format!("TLS: {reason}"),
                "both sides must speak TLS 1.2 or 1.3 with certificates that the other knows",
                (At::Peer, logs()),
            ),

            Self::NotEtcd { answer } => failed(
                "not-etcd",
                format!("what answers speaks gRPC and is no etcd v3: {answer}"),
                "another service has that address",
                (At::Peer, service()),
            ),
            Self::HttpServer { answer } => failed(
                "http-server",
                format!("what answers is an HTTP server and no etcd v3: {answer:?}"),
                "an ingress or a proxy has that address, or the port is another service's",
                (At::Peer, service()),
            ),
            Self::GatewaySilent { after } => failed(
                "gateway-silent",
                format!("the gateway does not answer within {}s", seconds(*after)),
                "it is overloaded, its etcd has no leader, or packets are lost on the way",
                (At::Peer, logs()),
            ),
            Self::GatewayFailed { reason } => failed(
                "gateway-failed",
                format!("the gateway: {reason}"),
                "it is not well",
                (At::Peer, logs()),
            ),
            Self::OldEtcd { version } => warning(
                "old-etcd",
                format!("it is etcd {version}"),
                "Cluster Mesh needs 3.1, and 3.5 where watches are to say how far they are",
                (
                    At::Peer,
                    kubectl("get pods -l app.kubernetes.io/name=clustermesh-apiserver -o jsonpath={..image}"),
                ),
            ),
            Self::Alarm { errors } => warning(
                "etcd-alarm",
                format!("its etcd reports: {}", listed(errors)),
                "it takes no writes until somebody has looked after it",
                (At::Peer, logs()),
            ),

            Self::Denied { ranges } => failed(
                "permission-denied",
                format!("{} may not read: {}", me(), listed(ranges)),
                "the peer gives that user another role, or does not know it",
                (At::Peer, "kubectl -n kube-system get configmap clustermesh-remote-users -o yaml".into()),
            ),
            Self::OtherCluster { names } => failed(
                "other-cluster",
                format!("the gateway is that of {}, not of {peer}", listed(names)),
                "the cluster was given another name, or the endpoint is another cluster's",
                (At::Own, edit()),
            ),

            Self::ConfigMissing => failed(
                "cluster-config-missing",
                format!("cilium/cluster-config/{peer} is not there"),
                "its exporter does not run, cannot reach its Kubernetes API, or has only just started",
                (At::Peer, logs()),
            ),
            Self::ConfigMalformed { reason } => failed(
                "cluster-config-malformed",
                format!("cilium/cluster-config/{peer} cannot be understood: {reason}"),
                "its exporter is of a version that is not known here",
                (At::Peer, logs()),
            ),
            Self::IdIsOurs { id } => failed(
                "id-conflict",
                format!("{peer} has the cluster id {id}, which is ours"),
                "both were set up with the same id: one of them has to be given another, while it is not connected",
                (At::Peer, kubectl("get configmap isthmus-config -o yaml")),
            ),
            Self::IdTaken { id, other } => failed(
                "id-conflict",
                format!("{peer} has the cluster id {id}, which is that of the peer {other}"),
                "both were set up with the same id: one of them has to be given another, while it is not connected",
                (At::Peer, kubectl("get configmap isthmus-config -o yaml")),
            ),
            Self::MeshSize { ours, theirs } => failed(
                "max-connected-clusters-differ",
                format!("{peer} is set up for {theirs} connected clusters, we for {ours}"),
                "maxConnectedClusters must be alike everywhere, since it splits the identities",
                (At::Peer, kubectl("get configmap isthmus-config -o yaml")),
            ),
            Self::Incompatible { reason } => failed(
                "cluster-config-incompatible",
                format!("{peer} cannot be a peer: {reason}"),
                "name or id of the cluster are not ones that a mesh can have",
                (At::Peer, kubectl("get configmap isthmus-config -o yaml")),
            ),

            Self::StoreExchanged { was, is } => failed(
                "store-exchanged",
                format!("on one connection first the store {was:x} answered, then {is:x}"),
                "a proxy that hands out single requests is in between, or the etcd was replaced under the gateway",
                (At::Peer, service()),
            ),

            Self::CanaryMissing { prefixes } => failed(
                "canary-missing",
                format!("{peer} has not said yet that these are complete: {}", listed(prefixes)),
                "its exporter is still reading its Kubernetes API, or may not read these objects",
                (At::Peer, logs()),
            ),
            Self::NoCanaries => warning(
                "no-canaries",
                format!("{peer} writes no canaries, so nobody can tell when it is complete"),
                "its exporter is older than Cilium 1.14",
                (
                    At::Peer,
                    kubectl("get pods -l app.kubernetes.io/name=clustermesh-apiserver -o jsonpath={..image}"),
                ),
            ),

            Self::HeartbeatMissing { started } => {
                let problem = format!("cilium/.heartbeat of {peer} is not there");
                match started {
                    Some(at) => warning(
                        "heartbeat-missing",
                        problem,
                        &format!(
                            "it has run since {} only, and an exporter writes it first after a minute",
                            instant(*at)
                        ),
                        (At::Own, format!("isthmus troubleshoot {peer}")),
                    ),
                    None => failed(
                        "heartbeat-missing",
                        problem,
                        "its exporter does not write one, and connections are given up every two minutes",
                        (At::Peer, logs()),
                    ),
                }
            }
            Self::HeartbeatOld { at, now } => failed(
                "heartbeat-old",
                format!(
                    "the last heartbeat of {peer} is of {}, {}s ago by the clock here",
                    instant(*at),
                    (*now - *at).num_seconds()
                ),
                "its exporter does not run any more while its store still answers, or the clocks differ",
                (At::Peer, kubectl("get pods -l app.kubernetes.io/name=clustermesh-apiserver")),
            ),
            Self::HeartbeatAhead { at, now } => warning(
                "clocks-differ",
                format!(
                    "the last heartbeat of {peer} is of {}, and the clock here says {}",
                    instant(*at),
                    instant(*now)
                ),
                "the clocks differ, which makes certificates seem expired or not yet valid",
                clock(),
            ),
            Self::HeartbeatMalformed { value } => warning(
                "heartbeat-malformed",
                format!("the heartbeat of {peer} is no time: {value:?}"),
                "something else than an exporter writes it",
                (At::Peer, logs()),
            ),

            Self::RelayNotReady { state, reason } => failed(
                "relay-not-ready",
                format!("the relay's own connection is {state}: {reason}"),
                "what the steps above found, or that the relay has not tried again since",
                (At::Own, logs()),
            ),
            Self::RelayLags { revision, theirs, age } => failed(
                "relay-lags",
                match age {
                    Some(age) => format!(
                        "the relay has mirrored up to revision {revision} of {theirs}, and was last complete {age:.0}s ago"
                    ),
                    None => {
                        format!("the relay has mirrored up to revision {revision} of {theirs}, and never all")
                    }
                },
                "the connection is too slow for what changes, this apiserver is short of CPU, or its etcd does not take the writes",
                (At::Own, kubectl("top pods -l app.kubernetes.io/name=clustermesh-apiserver")),
            ),
            Self::Rejected { count, reasons } => warning(
                "entries-rejected",
                format!("{count} entries of {peer} were not taken: {}", listed(reasons)),
                "it exports what does not belong to it, or is of a version that is not known here",
                (At::Own, logs()),
            ),
            Self::RelayUnaware => failed(
                "relay-unaware",
                format!("the relay has no connection to {peer} under way"),
                "its configuration was refused, or it is being removed",
                (At::Own, format!("isthmus status; kubectl describe clusterpeer {peer}")),
            ),

            Self::Encryption { node, problem } => failed(
                "encryption-not-ready",
                format!("node {node}: traffic cannot be encrypted: {problem}"),
                "its WireGuard device does not run or is not set up",
                (At::Own, kubectl("get pods -l app.kubernetes.io/name=isthmus-node-agent -o wide")),
            ),
            Self::KeyMissing { node, of: other, strict } => {
                let problem = format!("node {node}: node {other} of {peer} publishes no WireGuard key");
                let next = (At::Peer, format!("kubectl get node {other} -o yaml | grep wg-pub-key"));
                match strict {
                    true => failed(
                        "wireguard-key-missing",
                        problem + ", so nothing is sent to its pods",
                        "encryption is off there, its agent does not run, or its device does not work",
                        next,
                    ),
                    false => warning(
                        "wireguard-key-missing",
                        problem + ", so what is sent to its pods is not encrypted",
                        "encryption is off there, its agent does not run, or its device does not work",
                        next,
                    ),
                }
            }
            Self::KeyRefused { node, of: other, reason } => failed(
                "wireguard-key-refused",
                format!("node {node}: the WireGuard key of node {other} of {peer} is not used: {reason}"),
                "a node's disk was copied together with its key, or what it publishes is no key",
                (At::Peer, format!("kubectl get node {other} -o yaml | grep wg-pub-key")),
            ),
            Self::KeyUnpublished { node } => failed(
                "wireguard-key-unpublished",
                format!("node {node}: its own WireGuard key is not published yet, so nobody answers it"),
                "its agent may not change its Node object, or has only just started",
                (
                    At::Own,
                    format!(
                        "kubectl auth can-i patch nodes --as system:serviceaccount:{}:isthmus-node-agent",
                        of.namespace
                    ),
                ),
            ),
            Self::Unanswered { node, of: other, endpoint, last, waited } => failed(
                "wireguard-unreachable",
                format!(
                    "node {node}: node {other} of {peer}{} does not answer a WireGuard handshake within {waited:.0}s; the last one was {}",
                    endpoint.as_ref().map(|at| format!(" at {at}")).unwrap_or_default(),
                    last.map_or_else(|| "never".to_owned(), |age| format!("{age:.0}s ago")),
                ),
                "UDP port 51871 is blocked between these two nodes in one of the directions, or the device there does not run",
                (
                    At::Own,
                    match endpoint.as_deref().and_then(|at| at.parse::<SocketAddr>().ok()) {
                        Some(at) => format!("tcpdump -ni any host {} and udp port {}", at.ip(), at.port()),
                        None => "tcpdump -ni any udp port 51871".to_owned(),
                    },
                ),
            ),
            Self::AgentSilent { agent, reason } => warning(
                "agent-silent",
                format!("the node-agent {agent} was not asked: {reason}"),
                "it does not run, or is of an older version",
                (At::Own, kubectl("get pods -l app.kubernetes.io/name=isthmus-node-agent -o wide")),
            ),
        }
    }
}

/// Names after each other, and how many more there are.
fn listed(names: &[String]) -> String {
    const MOST: usize = 12;
    match names {
        [] => "none".to_owned(),
        few if few.len() <= MOST => few.join(", "),
        many => format!("{} and {} more", many[..MOST].join(", "), many.len() - MOST),
    }
}

fn seconds(duration: Duration) -> String {
    format!("{}", (duration.as_secs_f64() * 10.0).round() / 10.0)
}

/// A moment as it is written everywhere here, so that two clocks can be compared by eye.
pub(super) fn instant(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// When a certificate is valid.
pub(super) fn period(certificate: &Certificate) -> String {
    format!("valid from {} to {}", instant(certificate.not_before), instant(certificate.not_after))
}

/// What somebody else sent, bounded, and without anything that a terminal would obey.
pub(super) fn printable(text: &str) -> String {
    const LONGEST: usize = 200;
    isthmus_wire::printable(text, LONGEST)
}

/// What is told, without anything that a terminal would obey: some of it came from the other side.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Addresses as people read them.
pub(super) fn addresses(all: &[IpAddr]) -> String {
    listed(&all.iter().map(ToString::to_string).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_not_taken_to_be_called_like_clusters() {
        let certificate = Certificate {
            subject: "CN=clustermesh-apiserver.cilium.io".to_owned(),
            issuer: "CN=Cilium CA".to_owned(),
            names: Vec::new(),
            not_before: DateTime::UNIX_EPOCH,
            not_after: DateTime::UNIX_EPOCH,
        };
        let of = Circumstances {
            own: "alpha".to_owned(),
            peer: "beta".to_owned(),
            source: Source::Secret { namespace: "isthmus-system".to_owned(), name: "peer-beta".to_owned() },
            namespace: "isthmus-system".to_owned(),
            common_name: None,
        };
        let finding = Fault::WrongAuthority { certificate, trusted: Vec::new() }.finding(&of);
        assert_eq!(
            finding.next.command,
            "isthmus connect --context '<context of alpha>' --destination-context '<context of beta>'"
        );
    }
}
