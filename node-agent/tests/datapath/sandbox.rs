//! A place of its own for each test: a thread in fresh network and mount namespaces, with a BPF file system, and in a
//! cgroup that no other test is in.
//!
//! Cgroups hold processes, not threads, except for threaded ones: the test process moves into one cgroup, and each test
//! has a threaded child of it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use isthmus_node_agent::datapath::{Datapath, DatapathConfig, MapSizes};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// How long a condition may take to come true. Only a failing test waits for it.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Sandbox {
    pub(crate) cgroup: PathBuf,
    pub(crate) pin_dir: PathBuf,
}

/// Small maps: most tests need few entries, and the kernel clears what it allocates.
pub(crate) const SIZES: MapSizes = MapSizes {
    services: 64,
    backends: 512,
    ipcache: 64,
    flows: 1024,
    sockets: 1024,
    affinity: 64,
    endpoints: 16,
    policy_entries: 256,
    policy_flows: 1024,
};

/// Runs `test` in a sandbox.
pub(crate) fn sandbox(test: impl FnOnce(&Sandbox) + Send) {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root (eBPF, namespaces, cgroups): run it with sudo"
    );
    let _process = ProcessCgroup::enter();
    let cgroup = TestCgroup::new();
    let files = tempfile::tempdir().expect("a directory for the BPF file system");
    let outcome = thread::scope(|scope| {
        scope
            .spawn(|| {
                cgroup.enter();
                unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("new namespaces");
                let none = None::<&str>;
                mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
                mount(Some("bpf"), files.path(), Some("bpf"), MsFlags::empty(), none)
                    .expect("a BPF file system");
                ip("link set lo up");
                test(&Sandbox { cgroup: cgroup.dir.clone(), pin_dir: files.path().join("isthmus") });
            })
            .join()
    });
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}

impl Sandbox {
    /// A datapath with small maps; nothing is attached yet.
    pub(crate) fn datapath(&self) -> Datapath {
        self.datapath_with(|_| {})
    }

    pub(crate) fn datapath_with(&self, adjust: impl FnOnce(&mut DatapathConfig)) -> Datapath {
        let mut config = DatapathConfig::new(&self.pin_dir);
        config.sizes = SIZES;
        adjust(&mut config);
        match Datapath::open(config) {
            Ok(datapath) => datapath,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Runs `ip` in the calling thread's network namespace.
pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip (package iproute2)");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until an IPv6 address that was added without duplicate address detection can be spoken to. The kernel makes its
/// local route a moment later, in a thread of its own and not before the link has a carrier, and drops what comes for
/// it before.
pub(crate) fn until_local(address: &str) {
    let route = format!("local {address} ");
    eventually(&format!("a local route to {address}"), || {
        let shown = Command::new("ip").args(["-6", "route", "show", "table", "local"]).output();
        String::from_utf8_lossy(&shown.expect("ip (package iproute2)").stdout).contains(&route)
    });
}

/// Waits for a condition.
#[expect(clippy::disallowed_methods, reason = "between two looks at the condition")]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A network namespace besides the test's own: a pod.
pub(crate) struct Namespace {
    file: File,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let file = thread::scope(|scope| {
            let file = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
                ip("link set lo up");
                File::open("/proc/thread-self/ns/net").expect("the namespace's file")
            });
            file.join().expect("a namespace")
        });
        Self { file }
    }

    /// For `ip link set ... netns PATH`.
    pub(crate) fn path(&self) -> String {
        use std::os::fd::AsRawFd;
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs `inside` in it. Threads that it starts stay there.
    pub(crate) fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let outcome = thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                    inside()
                })
                .join()
        });
        match outcome {
            Ok(value) => value,
            Err(panic) => resume_unwind(panic),
        }
    }
}

/// Where the process was before, and how many tests are inside now.
static PROCESS: Mutex<Option<(PathBuf, u32)>> = Mutex::new(None);

struct ProcessCgroup;

impl ProcessCgroup {
    /// Not named as labs are: what a killed test leaves is no lab, and no lab is removed with it.
    fn dir() -> PathBuf {
        mount_point().join(format!("test-of-isthmus-{}", std::process::id()))
    }

    fn enter() -> Self {
        let mut state = PROCESS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &mut *state {
            Some((_, tests)) => *tests += 1,
            None => {
                let original = mount_point().join(own_cgroup().trim_start_matches('/'));
                let dir = Self::dir();
                fs::create_dir(&dir).expect("a cgroup for the test process");
                fs::write(dir.join("cgroup.procs"), std::process::id().to_string())
                    .expect("move the test process");
                *state = Some((original, 1));
            }
        }
        Self
    }
}

impl Drop for ProcessCgroup {
    fn drop(&mut self) {
        let mut state = PROCESS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some((original, tests)) = &mut *state else { return };
        *tests -= 1;
        if *tests == 0 {
            let _ = fs::write(original.join("cgroup.procs"), std::process::id().to_string());
            let _ = remove_cgroup(&Self::dir());
            *state = None;
        }
    }
}

struct TestCgroup {
    dir: PathBuf,
}

impl TestCgroup {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let dir = ProcessCgroup::dir().join(format!("test-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&dir).expect("a cgroup for the test");
        fs::write(dir.join("cgroup.type"), "threaded").expect("a threaded cgroup");
        Self { dir }
    }

    /// Moves the calling thread.
    fn enter(&self) {
        let thread = nix::unistd::gettid().to_string();
        fs::write(self.dir.join("cgroup.threads"), thread).expect("move the test's thread");
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        if let Err(error) = remove_cgroup(&self.dir) {
            assert!(thread::panicking(), "{} stays behind: {error}", self.dir.display());
        }
    }
}

/// Threads that have just ended are still counted for a moment.
#[expect(clippy::disallowed_methods, reason = "between two tries")]
fn remove_cgroup(dir: &Path) -> io::Result<()> {
    let started = Instant::now();
    loop {
        match fs::remove_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && started.elapsed() < DEADLINE => {
                thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

fn mount_point() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("the list of mounts");
    let point = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let point = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(point))
    });
    point.expect("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

fn own_cgroup() -> String {
    let cgroups = fs::read_to_string("/proc/self/cgroup").expect("the process's cgroups");
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    own.expect("the process is in a cgroup2").to_owned()
}
