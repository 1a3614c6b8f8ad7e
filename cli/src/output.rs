//! What all commands print alike.

use std::io::Write;
use std::time::Duration;

use clap::ValueEnum;
use clustermesh_apiserver::troubleshoot::Signs;
use comfy_table::{Table, presets};
use serde::Serialize;

/// A table without lines, for people and for `awk`.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// How a command prints what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// For whom a command prints on standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Printed {
    /// People.
    Text,
    /// A program that reads one JSON document.
    Json,
    /// A program that reads one of them per line.
    JsonLines,
}

/// A command that ended without a report.
#[derive(Serialize)]
struct Failed<'a> {
    /// What is wrong, and what to do.
    error: &'a str,
}

/// Hands a program a document also where there is nothing to report, so that what it reads is JSON in every case. People read
/// standard error.
pub(crate) fn failure(printed: Printed, error: &str) {
    match printed {
        Printed::Text => {}
        Printed::Json => json(&Failed { error }),
        Printed::JsonLines => say!("{}", serde_json::json!({"error": error})),
    }
}

/// One JSON document on standard output.
pub(crate) fn json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => say!("{text}"),
        Err(error) => note(&format!("isthmus: {error}")),
    }
}

/// A line of progress, on standard error. Nobody reading it is no reason to stop.
pub(crate) fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Whether colours are liked where there is a terminal: <https://no-color.org>.
pub(crate) fn colours() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Signs that the terminal can show, as far as it says so.
pub(crate) fn signs() -> Signs {
    let variables = ["LC_ALL", "LC_CTYPE", "LANG"].map(|name| std::env::var(name).ok());
    Signs::of_locale(variables.iter().map(Option::as_deref))
}

/// One of two words.
pub(crate) fn word(holds: bool, yes: &str, no: &str) -> String {
    if holds { yes } else { no }.to_owned()
}

/// Seconds since all was last known to be complete.
pub(crate) fn age(seconds: Option<f64>) -> String {
    match seconds {
        None => "never".into(),
        Some(s) if s < 1.0 => format!("{:.0}ms", s.max(0.0) * 1e3),
        Some(s) if s < 120.0 => format!("{s:.0}s"),
        Some(s) if s < 7200.0 => format!("{:.0}m", s / 60.0),
        Some(s) if s < 172_800.0 => format!("{:.0}h", s / 3600.0),
        Some(s) => format!("{:.0}d", s / 86_400.0),
    }
}

/// A time as people write it.
///
/// # Errors
/// In words.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a time: write 30s, 5m or 1h");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let seconds = match &text[digits.len()..] {
        "ms" => return Ok(Duration::from_millis(number)),
        "" | "s" => Some(number),
        "m" => number.checked_mul(60),
        "h" => number.checked_mul(3600),
        _ => None,
    };
    // Longer than anybody waits, and no clock overflows.
    seconds.filter(|seconds| *seconds <= 366 * 24 * 3600).map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        assert_eq!(age(None), "never");
        assert_eq!(age(Some(0.012)), "12ms");
        assert_eq!(age(Some(61.0)), "61s");
        assert_eq!(age(Some(600.0)), "10m");
        assert_eq!(age(Some(7200.0)), "2h");
        assert_eq!(age(Some(864_000.0)), "10d");
    }

    #[test]
    fn times_are_as_people_write_them() {
        for (text, seconds) in [("30s", 30), ("5m", 300), ("2h", 7200), ("7", 7)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "s", "1d", "-1s", "99999999999h", "18446744073709551615m"] {
            duration(text).expect_err(text);
        }
    }
}
