//! Where daemons are asked: on a socket of this machine, or in a pod, through the Kubernetes API.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use isthmus_crds::names;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::mesh::MeshError;
use crate::mesh::contexts::Contexts;
use crate::mesh::error::Refusal;

/// Longest answer that is read.
const MOST: u64 = 16 << 20;
/// A probe of one peer takes half a minute at most, of a whole mesh some minutes.
const DEADLINE: Duration = Duration::from_secs(300);
/// How long a connection to a daemon may take.
const CONNECT: Duration = Duration::from_secs(10);
/// The most node-agents of a cluster that are asked. All are asked at once, each by a connection through its API server, and
/// each sends handshakes to hundreds of nodes.
const MOST_AGENTS: usize = 64;
/// The label that tells our pods apart.
const NAME_LABEL: &str = "app.kubernetes.io/name";
/// Where an apiserver answers on its loopback address.
const APISERVER_PORT: u16 = 9880;
/// Where a node-agent does.
const AGENT_PORT: u16 = 9879;

/// A daemon that can be asked.
#[derive(Debug, Clone)]
pub(super) struct Daemon {
    /// As people know it.
    pub(super) name: String,
    /// Its cluster, where that is known before it is asked.
    pub(super) cluster: Option<String>,
    pub(super) place: Place,
}

/// Where it answers.
#[derive(Clone)]
pub(super) enum Place {
    /// On this machine.
    Socket(PathBuf),
    /// On the loopback address of a pod.
    Pod { pods: Box<Api<Pod>>, pod: String, port: u16 },
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => f.debug_tuple("Socket").field(path).finish(),
            Self::Pod { pod, port, .. } => f.debug_tuple("Pod").field(pod).field(port).finish(),
        }
    }
}

/// The apiservers and node-agents of the cluster that a kubeconfig context names.
///
/// # Errors
/// The kubeconfig has no such context, or one that leads nowhere. That the cluster does not answer is in [`Found::missing`].
pub(super) async fn in_cluster(contexts: &Contexts, context: &str) -> std::result::Result<Found, MeshError> {
    let api = contexts.open(context).await?;
    // A forwarded port is silent for as long as a probe takes.
    let patient = contexts.open_within(context, DEADLINE).await?;
    let running = async |app: &str, port: u16| {
        let of_app = ListParams::default().labels(&format!("{NAME_LABEL}={app}"));
        let found = api.namespaced::<Pod>().list(&of_app).await;
        let found = found.map_err(|error| {
            api.refused(format!("list Pods of {app} in namespace {}", api.namespace), error)
        })?;
        let running = found
            .into_iter()
            .filter(|pod| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running"));
        let daemons = running.map(|pod| Daemon {
            name: format!("{context}: {}", pod.name_any()),
            // The daemon's own answer says what its cluster is called; a context may be called anything.
            cluster: None,
            place: Place::Pod { pods: Box::new(patient.namespaced()), pod: pod.name_any(), port },
        });
        Ok::<_, Refusal>(daemons.collect::<Vec<_>>())
    };
    let (apiservers, agents) =
        tokio::join!(running(names::APISERVER, APISERVER_PORT), running(names::NODE_AGENT, AGENT_PORT));
    let mut found = Found::default();
    match apiservers {
        Ok(apiservers) if apiservers.is_empty() => found.missing.push(format!(
            "context {context}: no {} runs in the namespace {namespace}; look at `kubectl --context {context} -n \
             {namespace} get pods`, or give --namespace{}",
            names::APISERVER,
            // Whose context may be one of a lab's.
            match isthmus_lab::state::labs().is_empty() {
                true => "",
                false => "; the daemons of a lab are in no pods: leave out --context",
            },
            namespace = api.namespace
        )),
        Ok(apiservers) => found.apiservers = apiservers,
        Err(refusal) => found.missing.push(refusal.to_string()),
    }
    match agents {
        Ok(agents) => (found.agents, found.left_out) = some_of(agents),
        // Why the cluster does not answer is told once.
        Err(refusal) if found.missing.is_empty() => found.missing.push(refusal.to_string()),
        Err(_) => {}
    }
    Ok(found)
}

/// As many node-agents as are asked, from all over the list, and how many are left out.
fn some_of<T>(all: Vec<T>) -> (Vec<T>, usize) {
    let count = all.len();
    let some: Vec<T> = all.into_iter().step_by(count.div_ceil(MOST_AGENTS).max(1)).collect();
    let left_out = count - some.len();
    (some, left_out)
}

/// The daemons to ask.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) apiservers: Vec<Daemon>,
    pub(super) agents: Vec<Daemon>,
    /// How many node-agents are not to be asked, for there are many.
    pub(super) left_out: usize,
    /// Those that should be there, and why they cannot be asked.
    pub(super) missing: Vec<String>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NoAnswer {
    /// It has nothing to say now, and another replica has.
    pub(super) standby: bool,
    /// Names the daemon, and says what to look at.
    pub(super) reason: String,
}

impl Daemon {
    /// What it answers to `GET path`.
    ///
    /// # Errors
    /// It does not answer, or with something else.
    pub(super) async fn ask<T: DeserializeOwned>(&self, path: &str) -> std::result::Result<T, NoAnswer> {
        let refused = |what: String| NoAnswer { standby: false, reason: format!("{}: {what}", self.name) };
        let asked = async {
            let stream = tokio::time::timeout(CONNECT, self.connect())
                .await
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
            get(stream, path).await
        };
        let answer = tokio::time::timeout(DEADLINE, asked)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let (status, body) = answer.map_err(|error| {
            refused(match error.kind() {
                io::ErrorKind::PermissionDenied => format!("{error}: run this as root"),
                _ => format!("no answer ({error}); is it running?"),
            })
        })?;
        match status {
            200 => serde_json::from_str(&body)
                .map_err(|error| refused(format!("the answer is of another version ({error})"))),
            503 => Err(NoAnswer { standby: true, ..refused(body.trim().to_owned()) }),
            404 => Err(refused("it is of an older version".to_owned())),
            _ => Err(refused(format!("it answers {status}: {}", body.trim()))),
        }
    }

    async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        match &self.place {
            Place::Socket(path) => Ok(Box::new(UnixStream::connect(path).await?)),
            Place::Pod { pods, pod, port } => {
                let mut forwarded = pods.portforward(pod, &[*port]).await.map_err(io::Error::other)?;
                let stream = forwarded.take_stream(*port).ok_or(io::ErrorKind::NotConnected)?;
                Ok(Box::new(stream))
            }
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

async fn get(mut stream: Box<dyn Stream>, path: &str) -> io::Result<(u16, String)> {
    // 1.0, so that the answer is not cut into chunks and ends with the connection.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes()).await?;
    let mut bytes = Vec::new();
    stream.take(MOST).read_to_end(&mut bytes).await?;
    let answer = String::from_utf8_lossy(&bytes);
    let not_http = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP");
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(not_http)?;
    let status =
        head.strip_prefix("HTTP/1.").and_then(|head| head.split(' ').nth(1)).and_then(|s| s.parse().ok());
    Ok((status.ok_or_else(not_http)?, body.to_owned()))
}

/// As it may stand in a query.
pub(super) fn quoted(text: &str) -> String {
    text.bytes().fold(String::new(), |mut quoted, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => quoted.push(byte.into()),
            other => {
                let _ = write!(quoted, "%{other:02X}");
            }
        }
        quoted
    })
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    /// A daemon that gives this answer, once.
    async fn daemon(folder: &tempfile::TempDir, answer: &'static str) -> Daemon {
        let path = folder.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 1024];
            let _ = stream.read(&mut head).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        Daemon { name: "it".into(), cluster: None, place: Place::Socket(path) }
    }

    #[tokio::test]
    async fn a_daemon_that_is_old_busy_or_gone_is_told_apart() {
        let old = tempfile::tempdir().unwrap();
        let old = daemon(&old, "HTTP/1.0 404 Not Found\r\n\r\n").await.ask::<u32>("/").await.unwrap_err();
        assert_eq!(old.reason, "it: it is of an older version");
        let busy = tempfile::tempdir().unwrap();
        let busy = daemon(&busy, "HTTP/1.0 429 Too Many\r\n\r\nask again\n").await;
        assert_eq!(busy.ask::<u32>("/").await.unwrap_err().reason, "it: it answers 429: ask again");
        let standby = tempfile::tempdir().unwrap();
        let standby = daemon(&standby, "HTTP/1.0 503 No\r\n\r\nask the one that leads\n").await;
        assert!(standby.ask::<u32>("/").await.unwrap_err().standby);
        let gone = Daemon { name: "it".into(), cluster: None, place: Place::Socket("/nonexistent".into()) };
        assert!(gone.ask::<u32>("/").await.unwrap_err().reason.contains("is it running?"));
        let well = tempfile::tempdir().unwrap();
        let well = daemon(&well, "HTTP/1.0 200 OK\r\n\r\n7").await;
        assert_eq!(well.ask::<u32>("/").await, Ok(7));
    }

    #[test]
    fn of_many_nodes_some_from_everywhere_are_asked() {
        assert_eq!(some_of(Vec::<u8>::new()), (vec![], 0));
        assert_eq!(some_of((0..MOST_AGENTS).collect()), ((0..MOST_AGENTS).collect(), 0));
        for count in [MOST_AGENTS + 1, 10_000] {
            let (some, left_out) = some_of((0..count).collect());
            assert!(some.len() <= MOST_AGENTS && some.len() > MOST_AGENTS / 3, "{}", some.len());
            assert_eq!(some.len() + left_out, count);
            assert!(some[0] == 0 && some[some.len() - 1] > count * 9 / 10, "{some:?}");
        }
    }

    #[test]
    fn what_is_typed_cannot_leave_its_place_in_the_query() {
        assert_eq!(quoted("beta-2"), "beta-2");
        assert_eq!(quoted("a&b=c d/ä"), "a%26b%3Dc%20d%2F%C3%A4");
    }
}
