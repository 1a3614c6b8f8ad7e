//! The page about metrics and what the programs tell: each must have all that the other has.
//!
//! A row with the word "absent" is about a metric without series before something has happened, which a program does not tell
//! then: it must be registered somewhere in the sources.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Those that are told with `--store etcd` alone, which the page's lab has not: a test of the apiserver's has it.
const WITH_ETCD: &str = "isthmus_etcd_";

/// A metric by its series' name: counters end in `_total`.
#[derive(Debug)]
struct Metric {
    kind: String,
    /// Sorted, without `le`.
    labels: BTreeSet<String>,
    /// Whether there may be no series of it.
    absent: bool,
}

/// What is wrong between the page and what was `told`, and may be by sources that have all of `registered`; empty when they
/// agree.
pub(crate) fn disagreements(page: &str, told: &str, registered: &BTreeSet<String>) -> Vec<String> {
    let (before, rest) = page.split_once("## All metrics").expect("a section with all metrics");
    let (tables, _) = rest.split_once("\n## ").expect("a section after it");
    let (documented, told) = (documented(tables), told_by(told));
    let mut wrong = Vec::new();
    for (name, series) in &told {
        let Some(row) = documented.iter().find(|(row, _)| matches(row, name)).map(|(_, row)| row) else {
            wrong.push(format!("{name} is told, and has no row"));
            continue;
        };
        for metric in series {
            if metric.kind != row.kind {
                wrong.push(format!("{name} is a {} and not a {}", metric.kind, row.kind));
            }
            if metric.labels != row.labels {
                wrong.push(format!("{name} has the labels {:?} and not {:?}", metric.labels, row.labels));
            }
        }
    }
    for (name, row) in documented.iter().filter(|(name, _)| !name.starts_with(WITH_ETCD)) {
        let is_told = told.keys().any(|known| matches(name, known));
        let may_be = row.absent && registered.iter().any(|known| ends_in(name, known));
        if !is_told && !may_be {
            wrong.push(format!("{name} has a row, and nobody tells it"));
        }
    }
    for name in names(before).filter(|name| !documented.contains_key(*name)) {
        wrong.push(format!("{name} is spoken of, and has no row"));
    }
    wrong.sort();
    wrong.dedup();
    wrong
}

/// Whether `name` is what is registered as `known` under some prefix.
fn ends_in(name: &str, known: &str) -> bool {
    let name = name.strip_suffix("_total").unwrap_or(name);
    name.strip_suffix(known).is_some_and(|prefix| prefix.ends_with('_'))
}

/// What the sources below `root` register, without prefixes.
pub(crate) fn registered(root: &Path) -> BTreeSet<String> {
    let crates = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path().join("src"));
    let mut folders: Vec<_> = crates.filter(|path| path.is_dir()).collect();
    let mut registered = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = std::fs::read_to_string(path).unwrap();
                let calls = source.split(".register(").skip(1);
                let names = calls.filter_map(|call| call.trim_start().strip_prefix('"')?.split('"').next());
                registered.extend(names.map(str::to_owned));
            }
        }
    }
    registered
}

/// A row may stand for many that have a part of their names in common.
fn matches(row: &str, name: &str) -> bool {
    match row.split_once('*') {
        None => row == name,
        Some((begin, end)) => name.starts_with(begin) && name.ends_with(end),
    }
}

fn documented(tables: &str) -> BTreeMap<String, Metric> {
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [name, kind, labels, meaning] = cells.try_into().ok()?;
        let name = name.strip_prefix('`')?.strip_suffix('`')?.to_owned();
        let labels = labels.split(", ").map(|label| label.trim_matches('`').to_owned());
        let labels = labels.filter(|label| !label.is_empty()).collect();
        Some((name, Metric { kind: kind.to_owned(), labels, absent: meaning.contains("absent") }))
    };
    let rows: Vec<_> = tables.lines().filter_map(row).collect();
    let count = rows.len();
    let metrics: BTreeMap<_, _> = rows.into_iter().collect();
    assert_eq!(metrics.len(), count, "a metric has two rows");
    metrics
}

/// Each with every combination of labels that it was told with; none if it has no series at present.
fn told_by(text: &str) -> BTreeMap<String, Vec<Metric>> {
    let mut metrics: BTreeMap<String, (String, Vec<Metric>)> = BTreeMap::new();
    for line in text.lines() {
        if let Some(told) = line.strip_prefix("# TYPE ") {
            let (name, kind) = told.split_once(' ').unwrap();
            let series = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
            metrics.entry(series).or_insert((kind.to_owned(), Vec::new()));
        } else if !line.starts_with('#') && !line.is_empty() {
            let (series, _) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let parts = ["_bucket", "_sum", "_count"];
            let of_histogram = parts.iter().find_map(|part| name.strip_suffix(part));
            let name = of_histogram.filter(|name| metrics.contains_key(*name)).unwrap_or(name);
            let (kind, known) = metrics.get_mut(name).unwrap_or_else(|| panic!("{line} has no type"));
            known.push(Metric { kind: kind.clone(), labels: label_names(labels), absent: false });
        }
    }
    metrics.into_iter().map(|(name, (_, series))| (name, series)).collect()
}

/// The names in `a="x",b="y"}`. No value of ours has quotes or commas in it.
fn label_names(labels: &str) -> BTreeSet<String> {
    let names = labels.trim_end_matches('}').split(',').filter_map(|label| label.split_once('='));
    names.map(|(name, _)| name.to_owned()).filter(|name| name != "le").collect()
}

/// Everything in a text that is named like a metric.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("cilium_") || word.starts_with("isthmus_"))
        .filter(|word| !word.ends_with('_'))
}

#[test]
fn whatever_one_side_lacks_is_named() {
    let page = "Alert on isthmus_a, isthmus_gone_total.
## All metrics
| metric | type | labels | unit and meaning |
|---|---|---|---|
| `isthmus_a` | gauge |  | seconds |
| `isthmus_b_seconds` | histogram | `scope` | seconds |
| `isthmus_c_total` | counter |  | calls |
| `isthmus_d_*_total` | counter |  | calls |
| `isthmus_e_total` | counter |  | calls; absent before the first |
| `isthmus_f_total` | counter |  | calls; absent before the first |
| `isthmus_etcd_following` | gauge |  | with etcd |
## Others
cilium_none";
    let told = "# HELP isthmus_a A.
# TYPE isthmus_a counter
isthmus_a_total 1
# TYPE isthmus_b_seconds histogram
isthmus_b_seconds_sum{scope=\"x\"} 1
isthmus_b_seconds_bucket{le=\"+Inf\",scope=\"x\"} 1
isthmus_b_seconds_count{action=\"x\"} 1
# TYPE isthmus_d_x counter
isthmus_d_x_total 1
# EOF";
    let expected = [
        "isthmus_a has a row, and nobody tells it",
        "isthmus_a_total is told, and has no row",
        "isthmus_b_seconds has the labels {\"action\"} and not {\"scope\"}",
        "isthmus_c_total has a row, and nobody tells it",
        "isthmus_f_total has a row, and nobody tells it",
        "isthmus_gone_total is spoken of, and has no row",
    ];
    let registered = ["c", "e", "sthmus_f"].map(str::to_owned).into();
    assert_eq!(disagreements(page, told, &registered), expected);
}
