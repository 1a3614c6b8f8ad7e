//! A report for people.

use std::fmt::Write as _;

use super::HERE;
use super::fault::instant;
use super::report::{Finding, Origin, Outcome, PeerReport, Report, StepReport};

/// Which signs a terminal can show.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signs {
    /// ✓ ‼ ✗
    Unicode,
    /// Letters, for terminals that are not in UTF-8.
    Ascii,
}

impl Signs {
    /// What the locale that these variables set can show: the first that is not empty decides, as in POSIX. Given as
    /// `LC_ALL`, `LC_CTYPE`, `LANG`.
    pub fn of_locale<'a>(variables: impl IntoIterator<Item = Option<&'a str>>) -> Self {
        let locale = variables.into_iter().flatten().find(|value| !value.is_empty()).unwrap_or_default();
        let codeset = locale.to_ascii_lowercase();
        if codeset.contains("utf-8") || codeset.contains("utf8") { Self::Unicode } else { Self::Ascii }
    }

    /// The sign of how something ended.
    pub fn sign(self, outcome: Outcome) -> &'static str {
        match (self, outcome) {
            (Self::Unicode, Outcome::Passed) => "✓",
            (Self::Unicode, Outcome::Skipped) => "·",
            (Self::Unicode, Outcome::Warning) => "‼",
            (Self::Unicode, Outcome::Failed) => "✗",
            (Self::Ascii, Outcome::Passed) => "ok",
            (Self::Ascii, Outcome::Skipped) => "--",
            (Self::Ascii, Outcome::Warning) => "!!",
            (Self::Ascii, Outcome::Failed) => "XX",
        }
    }

    /// What leads from one thing to the next.
    pub fn arrow(self) -> &'static str {
        match self {
            Self::Unicode => "→",
            Self::Ascii => "->",
        }
    }

    fn width(self) -> usize {
        match self {
            Self::Unicode => 1,
            Self::Ascii => 2,
        }
    }
}

/// Columns that a step's name takes.
const NAME: usize = 16;

/// The whole report.
pub fn text(report: &Report, signs: Signs) -> String {
    let mut out = String::new();
    let from = match report.origin {
        Origin::Apiserver => "asked by the clustermesh-apiserver",
        Origin::Command => "asked from here, which may be another place in the network than the apiserver's",
    };
    if report.peers.is_empty() {
        let _ = writeln!(out, "{}: no peers are configured", report.cluster);
    }
    for peer in &report.peers {
        let _ = writeln!(out, "{} {} {}", report.cluster, signs.arrow(), peer.name);
        let _ = writeln!(out, "  {from} at {}, by {}", instant(report.taken), peer.source);
        peer.steps.iter().for_each(|report| step(&mut out, report, signs));
        let _ = writeln!(out, "  {}\n", verdict(peer));
    }
    out
}

/// One step: its sign and name, what was seen, and what is not right.
pub fn step(out: &mut String, report: &StepReport, signs: Signs) {
    let indent = 2 + signs.width() + 1 + NAME + 1;
    let mut seen = report.seen.iter();
    let first = seen.next().map(String::as_str).unwrap_or_default();
    let sign = signs.sign(report.outcome);
    let name = report.step.to_string();
    let line = format!("  {sign} {name:NAME$} {first}");
    let _ = writeln!(out, "{}", line.trim_end());
    seen.for_each(|line| {
        let _ = writeln!(out, "{:indent$}{line}", "");
    });
    report.findings.iter().for_each(|found| finding(out, found, signs));
}

fn finding(out: &mut String, finding: &Finding, signs: Signs) {
    let indent = 2 + signs.width() + 1;
    let _ = writeln!(out, "{:indent$}{} {}", "", signs.sign(finding.severity), finding.problem);
    let indent = indent + signs.width() + 1;
    let _ = writeln!(out, "{:indent$}likely cause: {}", "", finding.cause);
    let at = match finding.next.cluster.as_str() {
        HERE => HERE.to_owned(),
        cluster => format!("in {cluster}"),
    };
    let _ = writeln!(out, "{:indent$}run next, {at}: {}", "", finding.next.command);
}

fn verdict(peer: &PeerReport) -> String {
    let count = |severity| peer.findings().filter(|finding| finding.severity == severity).count();
    match (count(Outcome::Failed), count(Outcome::Warning)) {
        (0, 0) => "All is well.".to_owned(),
        (0, warnings) => format!("It works; {warnings} to look at."),
        (failures, 0) => format!("{failures} to be put right."),
        (failures, warnings) => format!("{failures} to be put right, {warnings} to look at."),
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::troubleshoot::report::{Next, Step};

    fn report() -> Report {
        let finding = Finding {
            kind: "connection-refused".into(),
            severity: Outcome::Failed,
            problem: "192.0.2.1:2379 refuses the connection".into(),
            cause: "nothing listens on that port".into(),
            next: Next { cluster: "beta".into(), command: "kubectl get pods".into() },
        };
        Report {
            cluster: "alpha".into(),
            origin: Origin::Apiserver,
            taken: DateTime::from_timestamp(1_800_000_000, 0).unwrap(),
            peers: vec![PeerReport {
                name: "beta".into(),
                source: "Secret isthmus-system/peer-beta".into(),
                steps: vec![
                    StepReport::new(
                        Step::Dns,
                        vec!["beta.example: 192.0.2.1".into(), "from `addresses`".into()],
                        vec![],
                    ),
                    StepReport::new(Step::Tcp, vec![], vec![finding]),
                    StepReport::skipped(Step::Tls, "no connection"),
                ],
            }],
        }
    }

    #[test]
    fn a_person_sees_what_failed_why_and_what_to_run_next() {
        let expected = "\
alpha → beta
  asked by the clustermesh-apiserver at 2027-01-15T08:00:00Z, by Secret isthmus-system/peer-beta
  ✓ DNS              beta.example: 192.0.2.1
                     from `addresses`
  ✗ TCP
    ✗ 192.0.2.1:2379 refuses the connection
      likely cause: nothing listens on that port
      run next, in beta: kubectl get pods
  · TLS              no connection
  1 to be put right.

";
        assert_eq!(text(&report(), Signs::Unicode), expected);
    }

    #[test]
    fn a_terminal_without_utf_8_gets_letters_alone() {
        let text = text(&report(), Signs::Ascii);
        assert!(text.is_ascii(), "{text}");
        for sign in ["ok DNS", "XX TCP", "-- TLS", "alpha -> beta"] {
            assert!(text.contains(sign), "{sign} in {text}");
        }
    }

    #[test]
    fn the_locale_decides_about_the_signs() {
        let of = |all: [Option<&str>; 3]| Signs::of_locale(all);
        assert_eq!(of([None, None, Some("en_US.UTF-8")]), Signs::Unicode);
        assert_eq!(of([Some(""), None, Some("C.utf8")]), Signs::Unicode);
        assert_eq!(of([Some("C"), None, Some("en_US.UTF-8")]), Signs::Ascii);
        assert_eq!(of([None, None, None]), Signs::Ascii);
    }
}
