//! `isthmus lab run --on kind`.

use std::process::ExitCode;
use std::time::Instant;

use isthmus_lab::kind::{Tools, needs};
use isthmus_lab::report::Report;
use isthmus_lab::scenario::Scenario;
use isthmus_lab::{Audience, Kind, LabError, Result};

use super::{RunArgs, interrupted, print_report, told_by};

/// What a shell script knows as "used wrongly": nothing has been tried.
const NOTHING_TRIED: u8 = 2;

/// A run from beginning to end.
pub(super) async fn play(args: RunArgs) -> Result<ExitCode> {
    let mut scenario = Scenario::load(&args.scenario.path)?;
    if let Some(store) = args.scenario.store {
        scenario.store = store.into();
    }
    let ready = needs::fits(&scenario).and_then(|()| Tools::find(&scenario));
    let tools = match ready {
        Ok(tools) => tools,
        Err(e) => {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "isthmus: {e}");
            return Ok(ExitCode::from(NOTHING_TRIED));
        }
    };
    let name = args.scenario.name.clone().unwrap_or_else(|| scenario.lab_name());
    let kind = Kind::prepare(&scenario, name, tools)?;
    let interrupted = interrupted();
    let outcome = tokio::select! {
        told = tell(&args, &scenario, &kind) => told,
        () = interrupted => Err(LabError::Interrupted),
    };
    if args.keep && outcome.is_ok() {
        let mended = kind.mend().await;
        keep(&kind);
        mended?;
    } else {
        kind.down().await?;
    }
    let report = outcome?;
    print_report(&args, &report);
    Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn tell(args: &RunArgs, scenario: &Scenario, kind: &Kind) -> Result<Report> {
    let mut story = told_by(args);
    story.line(&format!(
        "\n{}\n\n  Raising {}:",
        scenario.title,
        kind.clusters().collect::<Vec<_>>().join(" and ")
    ));
    let begun = Instant::now();
    kind.up(scenario, &mut |stage| story.stage(stage)).await?;
    let raised = begun.elapsed();
    story.raised(raised);
    Ok(isthmus_lab::run_on_kind(kind, scenario, raised, &mut story).await)
}

fn keep(kind: &Kind) {
    let kubeconfig = kind.kubeconfig();
    say!("\nThe clusters stay. Try:\n");
    say!("  kubectl --kubeconfig {} config get-contexts", kubeconfig.display());
    say!("  isthmus peers --kubeconfig {}", kubeconfig.display());
    for cluster in kind.clusters() {
        say!("  kind delete cluster --name {cluster}");
    }
}
