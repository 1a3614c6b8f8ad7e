//! A lab that outlives the command: a detached process of the same program tells its story to the one at the terminal
//! and, when that has been told, stays as the lab's supervisor.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{ExitCode, Stdio};

use isthmus_lab::spec::Peering;
use isthmus_lab::{Lab, LabError, Result};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};

/// What the supervisor writes last: everything before it is the story. No story contains it.
const DONE: &[u8] = b"\0kept\0";

/// Starts the supervisor with this command's own arguments and passes on what it writes, until it says that the lab
/// stays or ends without.
pub(crate) async fn hand_over() -> Result<ExitCode> {
    let failed = |source| LabError::Io { doing: "starting the lab's supervisor".into(), source };
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = std::process::Command::new(program);
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if arguments.get(1).is_some_and(|verb| verb == "up") {
        arguments[1] = "run".into();
        arguments.push("--no-steps".into());
    }
    command.args(arguments).arg("--supervise");
    // A group of its own: an interrupt at the terminal reaches it through us alone, and none once it stays.
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut supervisor = tokio::process::Command::from(command).spawn().map_err(failed)?;
    let mut story = supervisor.stdout.take().ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return Err(LabError::invalid("signals cannot be watched"));
    };
    let mut buffer = vec![0; 16 << 10];
    let mut pending: Vec<u8> = Vec::new();
    loop {
        tokio::select! {
            read = story.read(&mut buffer) => {
                let length = read.unwrap_or(0);
                if length == 0 {
                    break;
                }
                pending.extend_from_slice(&buffer[..length]);
                if let Some(at) = pending.windows(DONE.len()).position(|w| w == DONE) {
                    print(&pending[..at]);
                    return Ok(ExitCode::SUCCESS);
                }
                // Keeps back what may be the beginning of the mark.
                let keep = (1..DONE.len()).rev().find(|n| pending.ends_with(&DONE[..*n])).unwrap_or(0);
                let ready = pending.len() - keep;
                print(&pending[..ready]);
                pending.drain(..ready);
            }
            _ = term.recv() => interrupt(&supervisor),
            _ = int.recv() => interrupt(&supervisor),
        }
    }
    print(&pending);
    let status = supervisor.wait().await.map_err(failed)?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn interrupt(supervisor: &tokio::process::Child) {
    if let Some(pid) = supervisor.id() {
        isthmus_lab::process::terminate(pid as i32);
    }
}

fn print(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

/// The supervisor's side.
pub(crate) struct Keeper(());

impl Keeper {
    /// Leaves the terminal's session.
    pub(crate) fn new() -> Result<Self> {
        isthmus_lab::process::detach()?;
        Ok(Self(()))
    }

    /// Says how to use the lab, that the story is over, and nothing more.
    pub(crate) async fn kept(self, lab: &Lab, quiet: bool) {
        if !quiet {
            print(usage(lab).await.as_bytes());
        }
        print(DONE);
        // Whoever reads this pipe has gone; logs have nowhere to go either.
        isthmus_lab::process::silence();
    }
}

async fn usage(lab: &Lab) -> String {
    let mut text = format!("\nLab {} stays. Try:\n\n", lab.name());
    let (isthmus, name, first) = (own_command(), lab.name(), lab.clusters()[0].name());
    text += &format!("  export KUBECONFIG={}\n", lab.state().all_kubeconfig().display());
    for cluster in lab.clusters() {
        text += &format!("  kubectl --context {} get services,pods,endpointslices\n", cluster.name());
    }
    if lab.spec().peering == Peering::Secrets {
        text += &format!("  {isthmus} peers\n");
    }
    let apiserver = lab.clusters()[0].apiservers().swap_remove(0);
    text += &format!("\n  {isthmus} status --lab {name}\n  {isthmus} lab logs --lab {name} {apiserver}\n");
    if let Some((pod, address)) = lab.example().await {
        text += &format!("  {isthmus} lab exec --lab {name} {pod} -- curl -s http://{address}/\n");
    }
    let pki = lab.state().admin_certificate(first);
    text += &format!(
        "\n  nsenter --net={} etcdctl --endpoints https://127.0.0.1:2379 --cacert {pki}/ca.crt \\\n    --cert {pki}/tls.crt --key {pki}/tls.key get --prefix cilium/ --keys-only\n",
        lab.clusters()[0].net().control_plane.path().display(),
        pki = pki.display(),
    );
    text += &format!("\n  {isthmus} lab down {name}\n");
    text
}

/// How to call this program again: by its name if the shell finds it so, else by its path.
fn own_command() -> String {
    const NAME: &str = "isthmus";
    let Ok(program) = std::env::current_exe() else { return NAME.to_owned() };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(NAME)).find(|candidate| candidate.is_file());
    match found.and_then(|found| found.canonicalize().ok()) {
        Some(found) if found == program => NAME.to_owned(),
        _ => program.display().to_string(),
    }
}
