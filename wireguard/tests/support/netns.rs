//! Network namespaces without names.

use std::fs::File;
use std::io::{self, Write};
use std::net::Ipv6Addr;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace, for as long as this or a process in it lives.
#[derive(Debug, Clone)]
pub(crate) struct Namespace(Arc<File>);

impl Namespace {
    /// A new one, with `lo` up.
    pub(crate) fn new() -> Self {
        let file = in_new_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let namespace = Self(Arc::new(file.expect("network namespaces, which root may make")));
        namespace.ip("link set lo up");
        namespace
    }

    /// Where it can be opened, as long as this process lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// A command that will run in here, and end when the thread that starts it ends.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nsenter", &format!("--net={}", self.path()), program]);
        command
    }

    /// Runs `ip` with these words.
    pub(crate) fn ip(&self, words: &str) {
        self.ip_batch(&[words.to_owned()]);
    }

    /// Runs `ip` once with all these lines.
    pub(crate) fn ip_batch(&self, lines: &[String]) {
        let mut child = self
            .command("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ip");
        let text = lines.join("\n") + "\n";
        child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("ip reads");
        success(&text, child.wait_with_output().expect("ip"));
        self.wait_until_local(&text);
    }

    /// Waits until the IPv6 addresses that these lines add without duplicate address detection can be spoken to. The
    /// kernel makes their local routes a moment later, in a thread of its own, and drops what comes for them before.
    fn wait_until_local(&self, lines: &str) {
        let added = lines.lines().filter(|line| line.ends_with(" nodad"));
        let address = |line: &str| line.split([' ', '/']).find_map(|word| word.parse::<Ipv6Addr>().ok());
        let mut missing: Vec<Ipv6Addr> = added.filter_map(address).collect();
        let begun = Instant::now();
        while !missing.is_empty() {
            let local = self.run("ip", &["-6", "route", "show", "table", "local"]);
            missing
                .retain(|address| !local.lines().any(|line| line.starts_with(&format!("local {address} "))));
            assert!(begun.elapsed() < Duration::from_secs(30), "no local route to {missing:?}:\n{local}");
        }
    }

    /// Runs a program to its end, which must be a good one; its output.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().expect(program);
        success(program, output)
    }

    /// Runs `f` on a thread in here. A socket belongs for ever to the namespace in which it was opened.
    pub(crate) fn enter<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let file = self.0.clone();
        in_new_thread(move || {
            setns(&*file, CloneFlags::CLONE_NEWNET)?;
            f()
        })
    }
}

/// Joins two namespaces by a veth pair called `eth0` on both sides, with the addresses of each side and no wait for
/// duplicate address detection.
pub(crate) fn join(one: (&Namespace, &[&str]), other: (&Namespace, &[&str])) {
    one.0.ip(&format!("link add eth0 type veth peer name eth0 netns {}", other.0.path()));
    for (namespace, addresses) in [one, other] {
        let mut lines: Vec<String> = addresses.iter().map(|address| add_address("eth0", address)).collect();
        lines.push("link set eth0 up".to_owned());
        namespace.ip_batch(&lines);
    }
}

/// The words for `ip` that add an address, which is good at once, or leave it.
pub(crate) fn add_address(interface: &str, address: &str) -> String {
    let nodad = if address.contains(':') { " nodad" } else { "" };
    format!("address replace {address} dev {interface}{nodad}")
}

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Process(pub(crate) Child);

impl Process {
    /// Kills it, and waits until it is gone.
    pub(crate) fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

fn success(what: &str, output: Output) -> String {
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A thread's namespace is its own, so whatever is done in another one happens on a thread that then ends.
fn in_new_thread<T: Send + 'static>(f: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    std::thread::spawn(f).join().expect("no panic in the namespace")
}
