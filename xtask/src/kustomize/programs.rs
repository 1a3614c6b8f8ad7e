//! The programs themselves read the flags that were rendered.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::Value;

use super::Finding;
use super::object::{Container, Objects, list, text};

/// Images of ours, and the program that one starts if it is not told which.
const IMAGES: [(&str, &str); 2] =
    [("isthmus.io/clustermesh-apiserver", "clustermesh-apiserver"), ("isthmus.io/node-agent", "node-agent")];
/// Programs in them.
const PROGRAMS: [&str; 3] = ["clustermesh-apiserver", "node-agent", "isthmus-wireguard"];
/// Where images have their programs.
const PREFIX: &str = "/usr/local/bin/";
/// A flag that nobody is asked to set.
const NAMED_BY: &str = "--cluster-name=";

/// Our programs, built.
pub(super) struct Programs {
    folder: PathBuf,
}

/// A command line in a container.
struct Line {
    program: String,
    arguments: Vec<String>,
}

impl Programs {
    pub(super) fn in_folder(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Command lines that their programs do not understand.
    pub(super) fn check(&self, objects: &Objects) -> anyhow::Result<Vec<Finding>> {
        let mut findings = Vec::new();
        for container in ours(objects) {
            for line in lines(objects, &container) {
                match line {
                    Ok(line) => {
                        findings.extend(self.refusal(&line)?.map(|why| Finding::new(&container.at, why)))
                    }
                    Err(why) => findings.push(Finding::new(&container.at, why)),
                }
            }
        }
        Ok(findings)
    }

    /// Programs that start although the cluster has no name and no id yet.
    pub(super) fn accepts_unnamed(&self, objects: &Objects) -> anyhow::Result<Vec<Finding>> {
        let mut findings = Vec::new();
        let mut asked = 0;
        for container in ours(objects) {
            let Some(Ok(line)) = lines(objects, &container).into_iter().next() else { continue };
            if line.arguments.iter().any(|argument| argument.starts_with(NAMED_BY)) {
                asked += 1;
                let refusal = self.refusal(&line)?.unwrap_or_default();
                if !refusal.contains("cluster-name") && !refusal.contains("cluster-id") {
                    findings.push(Finding::new(
                        &container.at,
                        "it starts without a name and an id of the cluster",
                    ));
                }
            }
        }
        if asked == 0 {
            findings.push(Finding::new("base", format!("no program is given {NAMED_BY}")));
        }
        Ok(findings)
    }

    /// What the program says about its command line, if it does not understand it. Every argument is read before the last one,
    /// which asks for help instead of a daemon.
    fn refusal(&self, line: &Line) -> anyhow::Result<Option<String>> {
        if !PROGRAMS.contains(&line.program.as_str()) {
            return Ok(Some(format!("{} is in no image of ours", line.program)));
        }
        let program = self.folder.join(&line.program);
        let output = Command::new(&program)
            .args(&line.arguments)
            .arg("--help")
            .output()
            .with_context(|| format!("{} does not start: build all programs first", program.display()))?;
        if output.status.success() {
            return Ok(None);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let first = said.lines().next().unwrap_or_default();
        Ok(Some(format!("{} does not understand its flags: {first}", line.program)))
    }

    /// That they are all there.
    pub(super) fn require(&self) -> anyhow::Result<()> {
        match PROGRAMS.iter().find(|program| !self.folder.join(program).is_file()) {
            Some(missing) => bail!("{missing} is not in {}: build all programs first", self.folder.display()),
            None => Ok(()),
        }
    }
}

fn ours(objects: &Objects) -> Vec<Container<'_>> {
    let containers = objects.pods().into_iter().flat_map(|pod| pod.containers());
    containers.filter(|container| text(&container.value["image"]).starts_with("isthmus.io/")).collect()
}

/// What the container runs, then what its probes run.
fn lines(objects: &Objects, container: &Container<'_>) -> Vec<Result<Line, String>> {
    let value = container.value;
    let main = words(&value["command"]).chain(words(&value["args"])).collect();
    let started = if value["command"].is_null() { entry_point(value) } else { Ok(None) };
    let probes =
        ["startupProbe", "livenessProbe", "readinessProbe"].map(|probe| &value[probe]["exec"]["command"]);
    let probes = probes.into_iter().filter(|command| !command.is_null());
    let mut lines = vec![started.and_then(|program| line(objects, value, program, main))];
    lines.extend(probes.map(|command| line(objects, value, None, words(command).collect())));
    lines
}

/// The program that the image starts.
fn entry_point(container: &Value) -> Result<Option<String>, String> {
    let image = text(&container["image"]).split(['@', ':']).next().unwrap_or_default();
    let found = IMAGES.iter().find(|(name, _)| *name == image);
    found.map(|(_, program)| Some((*program).to_owned())).ok_or(format!("{image} is no image of ours"))
}

fn line(
    objects: &Objects,
    container: &Value,
    program: Option<String>,
    mut words: Vec<String>,
) -> Result<Line, String> {
    let program = match program {
        Some(program) => program,
        None if words.is_empty() => return Err("it runs nothing".to_owned()),
        None => {
            let path = words.remove(0);
            path.strip_prefix(PREFIX).ok_or(format!("{path} is not in {PREFIX}"))?.to_owned()
        }
    };
    let arguments = words.iter().map(|word| expand(objects, container, word)).collect::<Result<_, _>>()?;
    Ok(Line { program, arguments })
}

fn words(command: &Value) -> impl Iterator<Item = String> {
    list(command).map(|word| text(word).to_owned())
}

/// Puts in the variables, as the kubelet does.
pub(super) fn expand(objects: &Objects, container: &Value, word: &str) -> Result<String, String> {
    let mut expanded = String::new();
    let mut rest = word;
    while let Some((before, after)) = rest.split_once("$(") {
        let (name, after) = after.split_once(')').ok_or(format!("{word}: a variable does not end"))?;
        let variable = list(&container["env"]).find(|variable| variable["name"] == name);
        let variable = variable.ok_or(format!("{word}: there is no variable {name}"))?;
        expanded += before;
        expanded += &value_of(objects, variable);
        rest = after;
    }
    Ok(expanded + rest)
}

fn value_of(objects: &Objects, variable: &Value) -> String {
    let from = &variable["valueFrom"];
    if let Some(key) = from["configMapKeyRef"]["key"].as_str() {
        let map = objects.find("ConfigMap", text(&from["configMapKeyRef"]["name"]));
        return map.map(|map| text(&map["data"][key]).to_owned()).unwrap_or_default();
    }
    match text(&from["fieldRef"]["fieldPath"]) {
        "metadata.namespace" => "isthmus-system".to_owned(),
        "metadata.name" => "clustermesh-apiserver-6d4b75cb6d-hx4rt".to_owned(),
        _ => text(&variable["value"]).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
kind: ConfigMap
metadata: {name: c}
data: {k: alpha}
---
kind: Deployment
metadata: {name: x}
spec:
  template:
    spec:
      containers:
      - name: x
        image: isthmus.io/node-agent:1
        env:
        - {name: K, valueFrom: {configMapKeyRef: {name: c, key: k}}}
        args: [--cluster-name=$(K), run]
        livenessProbe: {exec: {command: [/usr/local/bin/node-agent, probe]}}
";

    fn read(yaml: &str) -> Vec<Result<(String, Vec<String>), String>> {
        let objects = Objects::parse(yaml).expect("YAML");
        let all = ours(&objects);
        assert_eq!(all.len(), 1);
        lines(&objects, &all[0]).into_iter().map(|l| l.map(|l| (l.program, l.arguments))).collect()
    }

    #[test]
    fn variables_are_put_in_and_probes_are_read_too() {
        let agent = || "node-agent".to_owned();
        let main = (agent(), vec!["--cluster-name=alpha".to_owned(), "run".to_owned()]);
        assert_eq!(read(GOOD), [Ok(main), Ok((agent(), vec!["probe".to_owned()]))]);
    }

    #[test]
    fn what_cannot_be_run_is_said() {
        for (from, to, says) in [
            ("isthmus.io/node-agent:1", "isthmus.io/node:1", "no image of ours"),
            ("$(K)", "$(L)", "no variable L"),
            ("$(K)", "$(K", "does not end"),
            ("/usr/local/bin/node-agent", "/bin/node-agent", "is not in"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let lines = read(&GOOD.replace(from, to));
            assert!(lines.iter().any(|l| l.as_ref().is_err_and(|e| e.contains(says))), "{to}: {lines:?}");
        }
    }
}
