//! A run of a scenario as a short story: a line per step as it happens, then who answered, and how fast.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::Duration;

use crate::report::{Report, StepReport};
use crate::runner::Audience;

/// Tells the story to a terminal, or to anything that takes text.
pub struct Story<W> {
    to: W,
    shown: Shown,
}

/// What a story is told to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// A file, a pipe.
    Text,
    /// A terminal: a line is written over once its step has ended.
    Terminal,
    /// The same, of somebody who likes colours.
    Colours,
}

/// Columns of a line that is to be written over: one that wraps cannot be.
const LIVE: usize = 76;

impl<W: Write + Send> Story<W> {
    /// One that has not begun.
    pub fn new(to: W, shown: Shown) -> Self {
        Self { to, shown }
    }

    /// A line by itself.
    pub fn line(&mut self, text: &str) {
        // There is nobody to tell when standard output is closed.
        let _ = writeln!(self.to, "{text}");
        let _ = self.to.flush();
    }

    fn mark(&self, passed: bool) -> &'static str {
        match (passed, self.shown) {
            (true, Shown::Colours) => "\x1b[32m✔\x1b[0m",
            (false, Shown::Colours) => "\x1b[31m✘\x1b[0m",
            (true, Shown::Text | Shown::Terminal) => "✔",
            (false, Shown::Text | Shown::Terminal) => "✘",
        }
    }
}

impl<W: Write + Send> Audience for Story<W> {
    fn stage(&mut self, what: &str) {
        self.line(&format!("  · {what}"));
    }

    fn raised(&mut self, took: Duration) {
        let mark = self.mark(true);
        self.line(&format!("  {mark} everything is up and ready ({})\n", seconds(took.as_secs_f64() * 1e3)));
    }

    fn begins(&mut self, _: usize, say: &str) {
        if self.shown != Shown::Text {
            let mut line = format!("  … {say}");
            if line.chars().count() > LIVE {
                line = line.chars().take(LIVE - 1).chain(['…']).collect();
            }
            let _ = write!(self.to, "{line}");
            let _ = self.to.flush();
        }
    }

    fn ended(&mut self, step: &StepReport) {
        let over = if self.shown == Shown::Text { "" } else { "\r\x1b[K" };
        let mark = self.mark(step.passed);
        let shown = match step.shown_after_ms {
            Some(ms) => format!(" — shown after {}", seconds(ms)),
            None => format!(" ({})", seconds(step.took_ms)),
        };
        self.line(&format!("{over}  {mark} {}{shown}", step.say));
        if let Some(requests) = &step.requests {
            let answers: Vec<String> = requests.answers.iter().map(|(c, n)| format!("{c} {n}")).collect();
            let answers = if answers.is_empty() { "nobody".to_owned() } else { answers.join(", ") };
            self.line(&format!("      answered: {answers}; failed: {}", requests.failed));
        }
        if let Some(seen) = &step.captured {
            self.line(&format!(
                "      on the wire: {} in the clear, {} encrypted",
                seen.plain.max(seen.requests + seen.answers),
                seen.encrypted
            ));
        }
        if let Some(failure) = &step.failure {
            self.line(&format!("      {}", failure.replace('\n', "\n      ")));
        }
    }

    fn finished(&mut self, report: &Report) {
        for log in &report.logs {
            self.line(&format!("\n  The last lines of {}:\n{}", log.process, log.lines));
        }
        let table = table(report);
        if !table.is_empty() {
            self.line(&format!("\n{table}"));
        }
        let verdict = if report.passed { "Every expectation held" } else { "An expectation did not hold" };
        let took = seconds(report.raised_ms + report.steps_ms);
        self.line(&format!(
            "\n{verdict} ({took}, store: {}, Kubernetes API: {}).",
            report.store, report.kubernetes
        ));
    }
}

/// Who answered, step by step.
fn table(report: &Report) -> String {
    let steps: Vec<&StepReport> = report.steps.iter().filter(|s| s.requests.is_some()).collect();
    let clusters: BTreeSet<&String> =
        steps.iter().filter_map(|s| s.requests.as_ref()).flat_map(|r| r.answers.keys()).collect();
    let mut header = vec!["step".to_owned()];
    header.extend(clusters.iter().map(|c| format!("from {c}")));
    header.extend(["failed".to_owned(), "shown after".to_owned()]);
    let mut rows = vec![header];
    for step in &steps {
        let Some(requests) = &step.requests else { continue };
        let mut row = vec![step.say.clone()];
        row.extend(clusters.iter().map(|c| requests.answers.get(*c).copied().unwrap_or(0).to_string()));
        row.push(requests.failed.to_string());
        row.push(step.shown_after_ms.map(seconds).unwrap_or_default());
        rows.push(row);
    }
    if rows.len() == 1 { String::new() } else { align(&rows) }
}

fn align(rows: &[Vec<String>]) -> String {
    let columns = rows[0].len();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let mut cells = Vec::with_capacity(columns);
        for (column, cell) in row.iter().enumerate() {
            // Words to the left, numbers to the right.
            let padding = " ".repeat(widths[column] - cell.chars().count());
            cells.push(if column == 0 { format!("{cell}{padding}") } else { format!("{padding}{cell}") });
        }
        format!("  {}", cells.join("   ")).trim_end().to_owned()
    };
    let mut lines: Vec<String> = rows.iter().map(line).collect();
    let rule = widths.iter().sum::<usize>() + 3 * (columns - 1);
    lines.insert(1, format!("  {}", "─".repeat(rule)));
    lines.join("\n")
}

fn seconds(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.0} ms") } else { format!("{:.1} s", ms / 1000.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Tally;

    #[test]
    fn the_story_says_who_answered_and_what_failed() {
        let mut text = Vec::new();
        let mut story = Story::new(&mut text, Shown::Text);
        let requests = Tally { answers: [("beta".to_owned(), 7)].into(), failed: 1, ..Tally::default() };
        let step = StepReport {
            say: "scale alpha to none".into(),
            passed: false,
            failure: Some("1 request failed".into()),
            shown_after_ms: Some(12.3),
            requests: Some(requests),
            ..StepReport::default()
        };
        story.ended(&step);
        let report = Report {
            title: "t".into(),
            lab: "l".into(),
            store: "memory".into(),
            kubernetes: "stand-in".into(),
            started: String::new(),
            raised_ms: 1.0,
            steps_ms: 2000.0,
            passed: false,
            steps: vec![step],
            logs: Vec::new(),
        };
        story.finished(&report);
        let text = String::from_utf8(text).unwrap();
        for part in [
            "✘ scale alpha to none",
            "shown after 12 ms",
            "beta 7; failed: 1",
            "1 request failed",
            "from beta",
            "did not hold",
        ] {
            assert!(text.contains(part), "{part} is missing:\n{text}");
        }
    }

    fn told(shown: Shown, say: &str) -> String {
        let mut text = Vec::new();
        let mut story = Story::new(&mut text, shown);
        story.begins(0, say);
        story.raised(Duration::from_millis(7));
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn colours_are_for_terminals_of_those_who_like_them() {
        assert_eq!(told(Shown::Text, "a"), "  ✔ everything is up and ready (7 ms)\n\n");
        assert_eq!(told(Shown::Terminal, "a"), "  … a  ✔ everything is up and ready (7 ms)\n\n");
        assert!(told(Shown::Colours, "a").contains("\x1b[32m✔"));
    }

    #[test]
    fn what_is_written_over_does_not_wrap() {
        let told = told(Shown::Terminal, &"long ".repeat(40));
        let first = told.split("  ✔").next().unwrap();
        assert_eq!(first.chars().count(), LIVE, "{first}");
    }
}
