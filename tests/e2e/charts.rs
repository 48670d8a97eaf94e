//! The Helm charts make what `kubectl apply -k` makes, on every platform that has an overlay.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::cluster::{helm, kubectl};
use crate::scene::{Scene, trial};

pub fn trials() -> Vec<Trial> {
    let equal = |preset: Option<&'static str>| move |_: &Scene| same_objects(preset);
    vec![
        trial("the chart makes what the base makes", equal(None)),
        trial("the chart makes what the overlay makes for k3s", equal(Some("k3s"))),
        trial("the chart makes what the overlay makes for MicroK8s", equal(Some("microk8s"))),
        trial("the chart makes what the overlay makes for GKE", equal(Some("gke"))),
        trial("the chart makes what the overlay makes for OpenShift", equal(Some("openshift"))),
        trial("the chart of the kinds makes what crd makes, and keeps it at uninstall", same_kinds),
        trial("the chart goes into its own namespace alone", own_namespace_alone),
    ]
}

fn same_objects(preset: Option<&str>) -> Result<()> {
    let source = match preset {
        Some(preset) => root().join("daemonset/overlays").join(preset),
        None => root().join("daemonset/base"),
    };
    let mut wanted = objects(&kubectl(&["kustomize", &source.to_string_lossy()])?)?;
    // Helm makes the namespace by itself, and needs it before everything else.
    wanted.remove("Namespace/selvedge-system").context("no Namespace")?;
    let chart = chart("selvedge");
    let mut arguments = vec!["template", "selvedge", &*chart, "--namespace", "selvedge-system"];
    let values = preset.map(|preset| format!("{chart}/presets/{preset}.yaml"));
    arguments.extend(values.iter().flat_map(|values| ["--values", values]));
    compare(&wanted, &objects(&helm(&arguments)?)?)
}

fn same_kinds(_: &Scene) -> Result<()> {
    let wanted = objects(&kubectl(&["kustomize", &root().join("crd").to_string_lossy()])?)?;
    let mut made = objects(&helm(&["template", "selvedge-crds", &chart("selvedge-crds")])?)?;
    for (name, object) in &mut made {
        let annotations = object["metadata"]["annotations"].as_object_mut().with_context(|| name.clone())?;
        ensure!(annotations.remove("helm.sh/resource-policy") == Some("keep".into()), "{name} would go at uninstall");
        if annotations.is_empty() {
            object["metadata"].as_object_mut().with_context(|| name.clone())?.remove("annotations");
        }
    }
    compare(&wanted, &made)
}

fn own_namespace_alone(_: &Scene) -> Result<()> {
    let refused = helm(&["template", "selvedge", &chart("selvedge"), "--namespace", "other"]);
    let words = refused.err().context("it was made for another namespace")?.to_string();
    ensure!(words.contains("--namespace selvedge-system --create-namespace"), "{words}");
    Ok(())
}

fn compare(wanted: &BTreeMap<String, Value>, made: &BTreeMap<String, Value>) -> Result<()> {
    ensure!(wanted.keys().eq(made.keys()), "{:?} are not {:?}", made.keys(), wanted.keys());
    for (name, wanted) in wanted {
        let made = &made[name];
        ensure!(made == wanted, "{name}:\n{made:#}\nis not\n{wanted:#}");
    }
    Ok(())
}

/// By kind and name.
fn objects(text: &str) -> Result<BTreeMap<String, Value>> {
    let mut objects = BTreeMap::new();
    for document in text.split("\n---\n") {
        let object = normal(serde_yaml::from_str(document).with_context(|| document.to_owned())?);
        if let (Some(kind), Some(name)) = (object["kind"].as_str(), object["metadata"]["name"].as_str()) {
            objects.insert(format!("{kind}/{name}"), object);
        }
    }
    ensure!(!objects.is_empty(), "there is no object in {text:?}");
    Ok(objects)
}

/// Without what means nothing: the order of things that have names, and how a number is written.
fn normal(value: Value) -> Value {
    match value {
        Value::Array(items) => {
            let mut items: Vec<Value> = items.into_iter().map(normal).collect();
            if items.iter().all(|item| item["name"].is_string()) {
                items.sort_by_key(|item| item["name"].to_string());
            }
            items.into()
        }
        Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, normal(value))).collect(),
        Value::Number(number) => number.as_f64().map_or(Value::Null, Value::from),
        other => other,
    }
}

fn chart(name: &str) -> String {
    root().join("daemonset/helm").join(name).to_string_lossy().into_owned()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
