//! The Helm charts, made from the same manifests that `kubectl apply -k` takes: `daemonset/base` and `crd/`.
//!
//! What a chart has in place of a manifest's own words stands in the manifest, as a comment:
//!
//! | in the manifest | in the chart |
//! | --- | --- |
//! | `replicas: 2 # chart: {{ toJson .Values.controller.replicas }}` | `replicas: {{ toJson .Values.controller.replicas }}` |
//! | `# chart: {{- if .Values.openshift }}`, on a line of its own | `{{- if .Values.openshift }}` |
//!
//! The chart's `values.yaml` has the manifests' own words as its defaults. A test here compares them one by one, and one
//! of `cargo xtask e2e` compares what helm and kustomize make.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::build::root;

/// Writes what is made here.
pub fn write() -> Result<()> {
    for (path, text) in generated()? {
        let path = root().join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Every file that is made here, by its path in the project.
pub fn generated() -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for part in &PARTS {
        let chart = in_chart(&read(&format!("daemonset/{}", part.source))?);
        let chart = match part.only_if {
            Some(value) => format!("{{{{- if .Values.{value} }}}}\n{chart}{{{{- end }}}}\n"),
            None => chart,
        };
        files.insert(format!("{TEMPLATES}/{}", part.template), format!("{}{chart}", notice(part.source)));
    }
    let kinds = kinds()?;
    for name in &kinds {
        let text = kept(&escaped(&read(&format!("crd/{name}"))?));
        let path = format!("daemonset/helm/selvedge-crds/templates/{name}");
        files.insert(path, format!("{}{text}", notice(&format!("../crd/{name}"))));
    }
    let mut list = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n".to_owned();
    kinds.iter().for_each(|name| list.push_str(&format!("- {name}\n")));
    files.insert(format!("crd/{KUSTOMIZATION}"), list);
    Ok(files)
}

/// Without the ending of a manifest, so that `kubectl apply --filename crd` passes it over.
pub const KUSTOMIZATION: &str = "Kustomization";

/// One manifest and the template that is made of it.
struct Part {
    source: &'static str,
    template: &'static str,
    only_if: Option<&'static str>,
}

const PARTS: [Part; 6] = [
    Part { source: "base/rbac.yaml", template: "rbac.yaml", only_if: None },
    Part { source: "base/waypoints.yaml", template: "waypoints.yaml", only_if: None },
    Part { source: "base/agent.yaml", template: "agent.yaml", only_if: None },
    Part { source: "base/controller.yaml", template: "controller.yaml", only_if: None },
    Part { source: "overlays/gke/quota.yaml", template: "quota.yaml", only_if: Some("systemQuota") },
    Part { source: "overlays/openshift/scc.yaml", template: "scc.yaml", only_if: Some("openshift") },
];
const TEMPLATES: &str = "daemonset/helm/selvedge/templates";

fn notice(source: &str) -> String {
    format!("{{{{- /* Made of daemonset/{source} by cargo xtask crd. */ -}}}}\n").replace("daemonset/../", "")
}

/// The files of `crd/` that are objects.
fn kinds() -> Result<Vec<String>> {
    let entries = fs::read_dir(root().join("crd")).context("cannot read crd/")?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = names.collect::<Result<_>>()?;
    names.retain(|name| name.ends_with(".yaml"));
    names.sort();
    Ok(names)
}

fn in_chart(manifest: &str) -> String {
    let mut chart = String::new();
    for line in manifest.lines() {
        let written = match line.split_once(MARK) {
            Some((before, instead)) if before.trim().is_empty() => format!("{before}{instead}"),
            Some((before, instead)) => format!("{}{instead}", key(before)),
            None => escaped(line),
        };
        chart.push_str(written.trim_end());
        chart.push('\n');
    }
    chart
}

/// The part of a line before its value.
fn key(line: &str) -> &str {
    line.find(": ").map_or(line, |colon| &line[..colon + 2])
}

fn escaped(text: &str) -> String {
    text.replace("{{", "{{ \"{{\" }}")
}

/// Marks every object as one that helm leaves at uninstall.
fn kept(manifest: &str) -> String {
    let annotation = "    helm.sh/resource-policy: keep\n";
    if manifest.contains("\nmetadata:\n  annotations:\n") {
        return manifest
            .replace("\nmetadata:\n  annotations:\n", &format!("\nmetadata:\n  annotations:\n{annotation}"));
    }
    manifest.replace("\nmetadata:\n", &format!("\nmetadata:\n  annotations:\n{annotation}"))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(root().join(Path::new(path))).with_context(|| format!("cannot read {path}"))
}

const MARK: &str = "# chart: ";

#[cfg(test)]
mod tests {
    use serde_yaml::Value;

    use super::*;

    #[test]
    fn what_the_chart_has_instead_stands_in_the_manifest() {
        let manifest = "a:\n  b: 2 # chart: {{ toJson .Values.b }}\n  # chart: {{- if .Values.c }}\n  c: '{{'\n";
        let chart = "a:\n  b: {{ toJson .Values.b }}\n  {{- if .Values.c }}\n  c: '{{ \"{{\" }}'\n";
        assert_eq!(in_chart(manifest), chart);
        assert_eq!(kept("a: 1\nmetadata:\n  name: n\n").matches("keep\n  name").count(), 1);
        assert_eq!(kept("a: 1\nmetadata:\n  annotations:\n    b: c\n").matches("keep\n    b").count(), 1);
    }

    #[test]
    fn the_charts_values_are_the_manifests_own_words() {
        let values: Value = serde_yaml::from_str(&read("daemonset/helm/selvedge/values.yaml").unwrap()).unwrap();
        let mut compared = 0;
        for part in PARTS.iter().filter(|part| part.only_if.is_none()) {
            for line in read(&format!("daemonset/{}", part.source)).unwrap().lines() {
                let Some((written, instead)) = line.split_once(MARK) else { continue };
                let path = instead.strip_prefix("{{ toJson .Values.").and_then(|path| path.strip_suffix(" }}"));
                let (Some(path), false) = (path, written.trim().is_empty()) else { continue };
                let own: Value = serde_yaml::from_str(written[key(written).len()..].trim()).unwrap();
                let default = path.split('.').fold(&values, |value, step| &value[step]);
                assert_eq!(&own, default, "{}: {line}", part.source);
                compared += 1;
            }
        }
        assert!(compared > 15, "only {compared} values were found");
    }

    #[test]
    fn the_manifests_name_this_version() {
        let (image, version) = (crate::image::AGENT, env!("CARGO_PKG_VERSION"));
        let of_agent = read("daemonset/base/agent.yaml").unwrap();
        assert_eq!(of_agent.matches(&format!("image: {image} ")).count(), of_agent.matches("image: ").count());
        for chart in ["selvedge", "selvedge-crds"] {
            let text = read(&format!("daemonset/helm/{chart}/Chart.yaml")).unwrap();
            assert_eq!(text.matches(&format!("ersion: {version}\n")).count(), 2, "{chart}");
        }
    }
}
