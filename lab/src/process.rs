//! Processes of a lab: started in a namespace and a cgroup, ended with the lab, watched meanwhile.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

use crate::error::{Doing, LabError, Result};
use crate::{capabilities, programs};

/// What to run, and where.
#[derive(Debug, Clone)]
pub struct Launch {
    /// `<cluster>/<program>`, `<cluster>/<node>/<program>` or `<cluster>/<namespace>/<pod>`.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Added to the environment.
    pub env: BTreeMap<String, String>,
    /// A named network namespace's path.
    pub netns: PathBuf,
    /// The cgroup it joins before it starts; made if need be.
    pub cgroup: PathBuf,
    /// A UTS namespace of its own, with this hostname.
    pub hostname: Option<String>,
    /// What it writes goes to the end of this file.
    pub log: PathBuf,
}

impl Launch {
    /// As a command line through the shim. `die_with_parent` ends it when the starting thread ends.
    fn command(&self, die_with_parent: bool) -> Result<Command> {
        let mut command = Command::new(programs::ours(programs::LAB_POD)?);
        command.arg("run").arg("--netns").arg(&self.netns).arg("--cgroup").arg(&self.cgroup);
        if let Some(hostname) = &self.hostname {
            command.arg("--hostname").arg(hostname);
        }
        if die_with_parent {
            command.arg("--parent").arg(std::process::id().to_string());
        }
        command
            .arg("--")
            .args(capabilities::confine(&self.program)?)
            .arg(&self.program)
            .args(&self.args)
            .envs(&self.env);
        command.stdin(Stdio::null());
        Ok(command)
    }

    /// Starts it with its standard output for the caller to read. Ends with the answer.
    ///
    /// # Errors
    /// When the process cannot be made.
    pub(crate) async fn piped(self, stderr: Stdio) -> Result<tokio::process::Child> {
        let mut command = self.command(true)?;
        command.stdout(Stdio::piped()).stderr(stderr).kill_on_drop(true);
        spawn(command).await.doing(|| format!("starting {}", self.name))
    }

    /// Starts it.
    ///
    /// # Errors
    /// When the log cannot be opened or the process not be made.
    pub async fn start(self) -> Result<Process> {
        crate::cgroup::create(&self.cgroup)?;
        let log = File::options().append(true).create(true).open(&self.log);
        let log = log.doing(|| format!("opening {}", self.log.display()))?;
        let mut command = self.command(true)?;
        command.stderr(log.try_clone().doing(|| "sharing a log")?).stdout(log).kill_on_drop(true);
        let child = spawn(command).await.doing(|| format!("starting {}", self.name))?;
        Ok(Process::watch(self, child))
    }

    /// Runs it to its end and returns what it wrote to standard output and standard error.
    ///
    /// # Errors
    /// When the process cannot be made, or does not end within `deadline`.
    pub async fn output(self, deadline: Duration) -> Result<std::process::Output> {
        let mut command = self.command(true)?;
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let child = spawn(command).await.doing(|| format!("starting {}", self.name))?;
        match tokio::time::timeout(deadline, child.wait_with_output()).await {
            Ok(output) => output.doing(|| format!("running {}", self.name)),
            Err(_) => Err(LabError::Deadline {
                what: format!("{} {} to end", self.name, self.program.display()),
                within: deadline,
                last: "still running; ended".into(),
            }),
        }
    }

    /// Becomes the process: replaces the calling one.
    pub fn exec(self) -> LabError {
        use std::os::unix::process::CommandExt;
        match self.command(false) {
            Ok(mut command) => {
                let source = command.stdin(Stdio::inherit()).as_std_mut().exec();
                LabError::Io { doing: format!("starting {}", self.name), source }
            }
            Err(e) => e,
        }
    }
}

/// A running process of the lab, or one that has ended.
#[derive(Debug, Clone)]
pub struct Process {
    launch: Launch,
    pid: Pid,
    signals: mpsc::UnboundedSender<Signal>,
    exit: watch::Receiver<Option<ExitStatus>>,
}

impl Process {
    /// Only this task reaps the child, so a signal it sends can never reach a stranger that was given the same pid.
    fn watch(launch: Launch, mut child: Child) -> Self {
        let pid = Pid::from_raw(child.id().map_or(0, |id| id as i32));
        let (signals, mut requests) = mpsc::unbounded_channel();
        let (tell, exit) = watch::channel(None);
        tokio::spawn(async move {
            let mut open = true;
            loop {
                tokio::select! {
                    status = child.wait() => {
                        tell.send_replace(status.ok().or(Some(ExitStatus::default())));
                        return;
                    }
                    request = requests.recv(), if open => match request {
                        Some(signal) => { let _ = kill(pid, signal); }
                        None => open = false,
                    },
                }
            }
        });
        Self { launch, pid, signals, exit }
    }

    /// `<cluster>/<program>` and so on.
    pub fn name(&self) -> &str {
        &self.launch.name
    }

    /// What it was started with: starting that again makes the same process anew.
    pub fn launch(&self) -> &Launch {
        &self.launch
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<i32> {
        self.running().then_some(self.pid.as_raw())
    }

    /// Whether it has not ended.
    pub fn running(&self) -> bool {
        self.exit.borrow().is_none()
    }

    /// Sends a signal; to one that has ended, nothing.
    pub fn signal(&self, signal: Signal) {
        let _ = self.signals.send(signal);
    }

    /// Waits until it has ended.
    pub async fn ended(&self) -> ExitStatus {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_default(),
            Err(_) => ExitStatus::default(),
        }
    }

    /// Asks it to end, and ends it if it has not within `grace`.
    pub async fn stop(&self, grace: Duration) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        // A paused process would not even see it.
        self.signal(Signal::SIGCONT);
        match tokio::time::timeout(grace, self.ended()).await {
            Ok(status) => status,
            Err(_) => {
                self.signal(Signal::SIGKILL);
                self.ended().await
            }
        }
    }

    /// That it has ended, as an error with its last words.
    pub fn died(&self) -> LabError {
        LabError::Died {
            process: self.launch.name.clone(),
            status: self.exit.borrow().map_or_else(|| "running".into(), |s| s.to_string()),
            log: self.launch.log.display().to_string(),
            tail: tail(&self.launch.log, 20),
        }
    }
}

/// The last lines of a log, at most 16 KiB of them.
pub fn tail(path: &Path, lines: usize) -> String {
    const MOST: u64 = 16 << 10;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    match read() {
        Ok(text) => {
            let all: Vec<&str> = text.lines().collect();
            let last: Vec<String> =
                all[all.len().saturating_sub(lines)..].iter().map(|l| format!("  {l}")).collect();
            last.join("\n")
        }
        Err(e) => format!("  (cannot be read: {e})"),
    }
}

/// Asks a child of the calling process to end.
pub fn terminate(child: i32) {
    let _ = kill(Pid::from_raw(child), Signal::SIGTERM);
}

/// Leaves the session and the terminal of whoever started this process.
///
/// # Errors
/// When the kernel refuses.
pub fn detach() -> Result<()> {
    match nix::unistd::setsid() {
        // The leader of a process group cannot; it has no terminal's group to leave either.
        Ok(_) | Err(nix::Error::EPERM) => Ok(()),
        Err(e) => Err(e).doing(|| "leaving the terminal"),
    }
}

/// From here on standard output and standard error go nowhere.
pub fn silence() {
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
    }
}

/// Starts a command on a thread that lives as long as this process: the kernel's "end with the parent" means the
/// thread that started the child, and threads of a runtime come and go.
async fn spawn(command: Command) -> std::io::Result<Child> {
    type Job = (Command, tokio::runtime::Handle, tokio::sync::oneshot::Sender<std::io::Result<Child>>);
    static STARTER: OnceLock<std::sync::mpsc::Sender<Job>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (jobs, queue) = std::sync::mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("starter".into())
            .spawn(move || {
                for (mut command, runtime, answer) in queue {
                    let _reactor = runtime.enter();
                    let _ = answer.send(command.spawn());
                }
            })
            .map(|_| jobs)
            .unwrap_or_else(|_| std::sync::mpsc::channel().0)
    });
    let (answer, child) = tokio::sync::oneshot::channel();
    let gone = || std::io::Error::other("the thread that starts processes is gone");
    starter.send((command, tokio::runtime::Handle::current(), answer)).map_err(|_| gone())?;
    child.await.map_err(|_| gone())?
}
