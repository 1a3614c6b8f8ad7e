//! `isthmus lab`.

mod kind;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Subcommand, ValueEnum};
use isthmus_lab::names::LabName;
use isthmus_lab::report::Report;
use isthmus_lab::scenario::{PodRef, Scenario};
use isthmus_lab::spec::{Encryption, Store};
use isthmus_lab::state::{self, StateDir, read_json};
use isthmus_lab::story::{Shown, Story};
use isthmus_lab::{Audience, Lab, LabError, PodRecord, Result, cleanup, preflight};
use tokio::signal::unix::{SignalKind, signal};

use crate::keep::{self, Keeper};
use crate::output::colours;

/// What can be done with labs.
#[derive(Debug, Subcommand)]
pub(crate) enum LabCommand {
    /// Raise a scenario's clusters, go through its steps, and remove everything
    #[command(after_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Raise a scenario's clusters, apply its manifests, and leave them running
    #[command(after_help = "Examples:\n  isthmus lab up kind-scenarios/global-service --name mine")]
    Up(UpArgs),
    /// Remove a lab, or whatever one left behind
    #[command(
        after_help = "Examples:\n  isthmus lab down\n  isthmus lab down mine\n  isthmus lab down --all"
    )]
    Down(DownArgs),
    /// The labs on this machine
    List,
    /// Run a command in a pod
    #[command(after_help = "Examples:\n  isthmus lab exec alpha/client -- curl -s http://10.101.0.10/")]
    Exec(ExecArgs),
    /// Where the kubeconfig is that has a context for each cluster
    #[command(
        after_help = "Examples:\n  export KUBECONFIG=$(isthmus lab kubeconfig)\n  kubectl --context alpha get pods"
    )]
    Kubeconfig(KubeconfigArgs),
    /// What the daemons and pods of a lab wrote
    #[command(after_help = "Examples:\n  isthmus lab logs\n  isthmus lab logs alpha/clustermesh-apiserver")]
    Logs(LogsArgs),
}

impl LabCommand {
    /// Whether a program reads what it prints.
    pub(crate) fn prints_json(&self) -> bool {
        matches!(self, Self::Run(RunArgs { report: Some(ReportFormat::Json), .. }))
    }
}

const RUN_EXAMPLES: &str = "Examples:
  isthmus lab run kind-scenarios/global-service
  isthmus lab run kind-scenarios/global-service --store etcd
  isthmus lab run kind-scenarios/global-service --report json > report.json
  isthmus lab run kind-scenarios/global-service --on kind
  sudo isthmus lab run kind-scenarios/encryption --on kind
  KUBEBUILDER_ASSETS=/usr/local/kubebuilder/bin isthmus lab run kind-scenarios/global-service";

/// What `run` and `up` share.
#[derive(Debug, Args)]
pub(crate) struct ScenarioArgs {
    /// A scenario's folder
    path: PathBuf,
    /// What is behind each clustermesh-apiserver; the scenario's choice when left out
    #[arg(long, value_enum)]
    store: Option<StoreArg>,
    /// The lab's name, so that several can run side by side; after the scenario when left out
    #[arg(long)]
    name: Option<LabName>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    scenario: ScenarioArgs,
    /// Where the clusters are
    #[arg(long, value_enum, default_value_t = On::Lab)]
    on: On,
    /// Leave everything running at the end, and print how to use it
    #[arg(long)]
    keep: bool,
    /// Print a machine-readable report on standard output, and the story on standard error
    #[arg(long, value_enum)]
    report: Option<ReportFormat>,
    /// Set by `isthmus` itself: this process stays and plays the kubelets
    #[arg(long, hide = true)]
    supervise: bool,
    /// Set by `isthmus lab up`: apply the manifests and skip the steps
    #[arg(long, hide = true)]
    no_steps: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    scenario: ScenarioArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    /// Which; the only one there is when left out
    #[arg(conflicts_with = "all")]
    name: Option<LabName>,
    /// Every lab on this machine
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// CLUSTER/POD or CLUSTER/NAMESPACE/POD
    pod: PodRef,
    /// Which lab; the only one there is when left out
    #[arg(long)]
    lab: Option<LabName>,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct KubeconfigArgs {
    /// Which lab; the only one there is when left out
    #[arg(long)]
    lab: Option<LabName>,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// CLUSTER/clustermesh-apiserver, CLUSTER/NODE/node-agent, CLUSTER/NAMESPACE/POD...; a list of them when left out
    process: Option<String>,
    /// Which lab; the only one there is when left out
    #[arg(long)]
    lab: Option<LabName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum On {
    /// This machine's network namespaces, with real daemons and real eBPF
    Lab,
    /// Kubernetes in Docker: needs kind, docker and kubectl, and builds the images; with the steps capture and forge also root,
    /// on the machine on which Docker runs
    Kind,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum StoreArg {
    /// The apiserver's own memory
    Memory,
    /// A real etcd
    Etcd,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ReportFormat {
    /// One JSON object
    Json,
}

impl From<StoreArg> for Store {
    fn from(store: StoreArg) -> Self {
        match store {
            StoreArg::Memory => Self::Memory,
            StoreArg::Etcd => Self::Etcd,
        }
    }
}

/// Does what was asked for.
pub(crate) async fn run(command: LabCommand) -> Result<ExitCode> {
    match command {
        LabCommand::Run(args) if args.on == On::Kind => kind::play(args).await,
        LabCommand::Run(args) if args.supervise => supervise(args).await,
        LabCommand::Run(args) if args.keep => keep::hand_over().await,
        LabCommand::Run(args) => play(args).await,
        LabCommand::Up(_) => keep::hand_over().await,
        LabCommand::Down(args) => down(args).await,
        LabCommand::List => Ok(list()),
        LabCommand::Exec(args) => exec(args),
        LabCommand::Kubeconfig(args) => {
            say!("{}", StateDir::of(&choose(args.lab)?).all_kubeconfig().display());
            Ok(ExitCode::SUCCESS)
        }
        LabCommand::Logs(args) => logs(args),
    }
}

/// A run from beginning to end in this process.
async fn play(args: RunArgs) -> Result<ExitCode> {
    let (scenario, name) = prepare(&args)?;
    let interrupted = interrupted();
    let told = tell(&args, &scenario, name);
    tokio::select! {
        played = told => {
            let (lab, report) = played?;
            remove(lab, args.report.is_none()).await?;
            print_report(&args, &report);
            Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        // Dropping the other branch removes what there is.
        () = interrupted => Err(LabError::Interrupted),
    }
}

/// The detached process of a lab that is kept: tells the story to whoever started it, then stays.
async fn supervise(args: RunArgs) -> Result<ExitCode> {
    let (scenario, name) = prepare(&args)?;
    let interrupted = interrupted();
    let keeper = Keeper::new()?;
    let told = tell(&args, &scenario, name);
    let lab = tokio::select! {
        played = told => {
            let (lab, report) = played?;
            print_report(&args, &report);
            if !report.passed {
                remove(lab, args.report.is_none()).await?;
                return Ok(ExitCode::FAILURE);
            }
            lab
        }
        () = interrupted => return Err(LabError::Interrupted),
    };
    lab.mark_kept()?;
    keeper.kept(&lab, args.report.is_some()).await;
    self::interrupted().await;
    lab.down().await?;
    Ok(ExitCode::SUCCESS)
}

fn prepare(args: &RunArgs) -> Result<(Scenario, LabName)> {
    let mut scenario = Scenario::load(&args.scenario.path)?;
    if args.no_steps {
        scenario.steps.clear();
    }
    let store = args.scenario.store.map_or(scenario.store, Store::from);
    preflight::check(preflight::Needs {
        etcd: store == Store::Etcd,
        curl: scenario.needs_curl(),
        encryption: scenario.encryption != Encryption::Off,
    })?;
    let name = args.scenario.name.clone().unwrap_or_else(|| scenario.lab_name());
    Ok((scenario, name))
}

async fn tell(args: &RunArgs, scenario: &Scenario, name: LabName) -> Result<(Lab, Report)> {
    let mut story = told_by(args);
    story.line(&format!("\n{}\n", scenario.title));
    let clusters: Vec<String> =
        scenario.clusters.iter().map(|c| format!("{} ({})", c.name, nodes(c.nodes.len()))).collect();
    story.line(&format!("  Raising {} in lab {name}:", clusters.join(" and ")));
    let begun = Instant::now();
    let spec = scenario.lab(name, args.scenario.store.map(Into::into));
    let lab = Lab::up(spec, &mut |stage| story.stage(stage)).await?;
    let raised = begun.elapsed();
    story.raised(raised);
    let report = isthmus_lab::run(&lab, scenario, raised, &mut story).await;
    Ok((lab, report))
}

/// With a report, standard output is the report's.
fn told_by(args: &RunArgs) -> Story<Box<dyn Write + Send>> {
    match args.report {
        None => Story::new(Box::new(std::io::stdout()), shown(std::io::stdout().is_terminal())),
        Some(ReportFormat::Json) => {
            Story::new(Box::new(std::io::stderr()), shown(std::io::stderr().is_terminal()))
        }
    }
}

fn shown(terminal: bool) -> Shown {
    match (terminal, colours()) {
        (true, true) => Shown::Colours,
        (true, false) => Shown::Terminal,
        (false, _) => Shown::Text,
    }
}

fn nodes(count: usize) -> String {
    if count == 1 { "1 node".to_owned() } else { format!("{count} nodes") }
}

async fn remove(lab: Lab, say: bool) -> Result<()> {
    let name = lab.name().clone();
    lab.down().await?;
    if say {
        say!("Lab {name} is removed: no namespace, process, mount, cgroup or pin is left.");
    }
    Ok(())
}

fn print_report(args: &RunArgs, report: &Report) {
    if args.report.is_some()
        && let Ok(text) = serde_json::to_string_pretty(report)
    {
        say!("{text}");
    }
}

/// Is done at SIGINT or SIGTERM.
async fn interrupted() {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
}

async fn down(args: DownArgs) -> Result<ExitCode> {
    root()?;
    let names = match (args.name, args.all) {
        (Some(name), _) => vec![name],
        (None, true) => cleanup::leftovers(),
        (None, false) => match cleanup::leftovers().as_slice() {
            [] => vec![],
            [only] => vec![only.clone()],
            several => {
                return Err(LabError::invalid(format!(
                    "there are several labs ({}): name one, or --all",
                    join(several)
                )));
            }
        },
    };
    if names.is_empty() {
        say!("No lab is there.");
    }
    for name in names {
        let found = cleanup::down(&name).await?;
        match found.none() {
            true => say!("There is no lab {name}, and nothing is left of one."),
            false => say!(
                "Lab {name} is removed: {} processes, {} namespaces, {} cgroups, {} mounts.",
                found.processes.len(),
                found.namespaces.len(),
                found.cgroups.len(),
                found.mounts.len()
            ),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list() -> ExitCode {
    let names = cleanup::leftovers();
    if names.is_empty() {
        say!("No lab is there. `isthmus lab run kind-scenarios/global-service --keep` makes one.");
    }
    for name in names {
        let line = match StateDir::of(&name).read() {
            Ok(state) => {
                let clusters: Vec<&str> = state.clusters.iter().map(|c| c.name.as_str()).collect();
                let what = match (state.supervisor.alive(), state.kept) {
                    (true, true) => "running",
                    (true, false) => "in a run",
                    (false, _) => "dead; `isthmus lab down` removes what it left",
                };
                format!("{name}: {what}; clusters {}; from {}", clusters.join(", "), state.scenario.display())
            }
            Err(_) => format!("{name}: remains; `isthmus lab down {name}` removes them"),
        };
        say!("{line}");
    }
    ExitCode::SUCCESS
}

fn exec(args: ExecArgs) -> Result<ExitCode> {
    root()?;
    let lab = choose(args.lab)?;
    let path = StateDir::of(&lab).pod(&args.pod.cluster, &args.pod.namespace, &args.pod.name);
    let record: PodRecord = read_json(&path).map_err(|_| {
        LabError::invalid(format!(
            "no pod {} runs in lab {lab}: is it spelled right, and has it started by now? Its pods: {}",
            args.pod,
            pods(&lab).join(", ")
        ))
    })?;
    Err(record.launch(&args.command)?.exec())
}

fn logs(args: LogsArgs) -> Result<ExitCode> {
    let lab = choose(args.lab)?;
    let state = StateDir::of(&lab);
    match args.process {
        None => {
            let dir = state.path().join("logs");
            let mut names: Vec<String> = std::fs::read_dir(&dir)
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|e| {
                    e.file_name().to_str().and_then(|n| n.strip_suffix(".log")).map(str::to_owned)
                })
                .collect();
            names.sort();
            for name in names {
                say!("{}", name.replace('.', "/"));
            }
        }
        Some(process) => {
            let path = state.log(&process);
            let mut file = std::fs::File::open(&path).map_err(|_| {
                LabError::invalid(format!("there is no log of {process}; `isthmus lab logs` lists them"))
            })?;
            // A closed pipe (`| head`) is no error.
            let _ = std::io::copy(&mut file, &mut std::io::stdout());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The lab that is meant: the one named, or the only one.
pub(crate) fn choose(named: Option<LabName>) -> Result<LabName> {
    let labs = state::labs();
    match (named, labs.as_slice()) {
        (Some(name), all) if all.contains(&name) => Ok(name),
        (Some(name), []) => Err(LabError::invalid(format!("there is no lab {name}, and no other"))),
        (Some(name), all) => Err(LabError::invalid(format!("there is no lab {name}, only {}", join(all)))),
        (None, [only]) => Ok(only.clone()),
        (None, []) => Err(LabError::invalid("no lab is there: `isthmus lab run PATH --keep` makes one")),
        (None, several) => {
            Err(LabError::invalid(format!("there are several labs ({}): name one with --lab", join(several))))
        }
    }
}

fn pods(lab: &LabName) -> Vec<String> {
    let Ok(lab_state) = StateDir::of(lab).read() else { return Vec::new() };
    let mut pods = Vec::new();
    for cluster in lab_state.clusters {
        let dir = StateDir::of(lab).cluster(&cluster.name).join("pods");
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if let Ok(record) = read_json::<PodRecord>(&entry.path()) {
                pods.push(format!("{}/{}/{}", record.cluster, record.namespace, record.name));
            }
        }
    }
    pods.sort();
    pods
}

fn root() -> Result<()> {
    match state::is_root() {
        true => Ok(()),
        false => Err(LabError::Missing("  labs belong to root: run it with sudo".into())),
    }
}

fn join(labs: &[LabName]) -> String {
    labs.iter().map(LabName::as_str).collect::<Vec<_>>().join(", ")
}
