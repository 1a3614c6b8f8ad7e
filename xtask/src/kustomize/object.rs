//! What was rendered, and the pods in it.

use anyhow::Context;
use serde::Deserialize;
use serde_json::Value;

/// The objects of one composition.
pub(super) struct Objects(Vec<Value>);

/// A pod that one of them makes.
pub(super) struct Pod<'a> {
    /// Kind and name of what makes it.
    pub(super) at: String,
    pub(super) spec: &'a Value,
    pub(super) labels: &'a Value,
    /// Secrets and volumes that come with it are not named in its specification.
    owner: &'a Value,
}

/// One of a pod's containers.
pub(super) struct Container<'a> {
    /// The pod's place and the container's name.
    pub(super) at: String,
    pub(super) value: &'a Value,
}

impl Objects {
    /// Reads YAML documents.
    pub(super) fn parse(yaml: &str) -> anyhow::Result<Self> {
        let mut objects = Vec::new();
        for document in serde_norway::Deserializer::from_str(yaml) {
            let object = Value::deserialize(document).context("what was rendered is no YAML")?;
            if !object.is_null() {
                objects.push(object);
            }
        }
        Ok(Self(objects))
    }

    /// All of a kind.
    pub(super) fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |object| object["kind"] == kind)
    }

    /// The one of this kind and name.
    pub(super) fn find(&self, kind: &str, name: &str) -> Option<&Value> {
        self.0.iter().find(|object| object["kind"] == kind && self::name(object) == name)
    }

    pub(super) fn pods(&self) -> Vec<Pod<'_>> {
        let made = |kind| ["Deployment", "DaemonSet", "StatefulSet"].contains(&kind);
        let makers = self.0.iter().filter(|object| object["kind"].as_str().is_some_and(made));
        makers
            .map(|owner| {
                let template = &owner["spec"]["template"];
                let labels = &template["metadata"]["labels"];
                Pod { at: at(owner), spec: &template["spec"], labels, owner }
            })
            .collect()
    }
}

impl<'a> Pod<'a> {
    /// Those that run first and those that stay.
    pub(super) fn containers(&self) -> Vec<Container<'a>> {
        let lists = [&self.spec["initContainers"], &self.spec["containers"]];
        let all = lists.into_iter().flat_map(list);
        all.map(|value| Container { at: format!("{}/{}", self.at, text(&value["name"])), value }).collect()
    }

    /// Where it is made.
    pub(super) fn namespace(&self) -> &'a str {
        text(&self.owner["metadata"]["namespace"])
    }

    /// The names that a container may mount.
    pub(super) fn volumes(&self) -> Vec<&'a str> {
        let claimed = list(&self.owner["spec"]["volumeClaimTemplates"]).map(name);
        list(&self.spec["volumes"]).map(|volume| text(&volume["name"])).chain(claimed).collect()
    }

    /// Whether a selector with these `matchLabels` selects it.
    pub(super) fn has_labels(&self, wanted: &Value) -> bool {
        let Some(wanted) = wanted.as_object() else { return false };
        wanted.iter().all(|(key, value)| self.labels[key] == *value)
    }

    /// Whether one of its containers has a port of this name.
    pub(super) fn has_port(&self, name: &str) -> bool {
        self.containers().iter().flat_map(|c| list(&c.value["ports"])).any(|port| port["name"] == name)
    }
}

/// The items of a list; none where there is none.
pub(super) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A string; empty where there is none.
pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// An object's name.
pub(super) fn name(object: &Value) -> &str {
    text(&object["metadata"]["name"])
}

/// Kind and name, for people.
pub(super) fn at(object: &Value) -> String {
    format!("{} {}", text(&object["kind"]), name(object))
}
