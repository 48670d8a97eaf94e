use std::fs;
use std::path::Path;

use serde_json::Value;

use super::crds;

#[test]
fn the_definitions_in_crd_are_those_of_the_types() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("crd");
    let generated = crds().unwrap();
    for file in &generated {
        let committed = fs::read_to_string(dir.join(&file.name)).unwrap_or_default();
        assert!(committed == file.yaml, "crd/{} is not what src/api says: run `cargo xtask crd`", file.name);
    }
    for entry in fs::read_dir(&dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_list = name == "Kustomization";
        assert!(
            is_list || generated.iter().any(|file| file.name == name),
            "crd/{name} has no type in src/api: remove it"
        );
    }
}

#[test]
fn every_level_of_a_spec_keeps_unknown_fields() {
    for file in crds().unwrap() {
        let crd: Value = serde_yaml::from_str(&file.yaml).unwrap();
        let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        let mut objects = 0;
        assert_keeps_unknown(spec, "spec", &mut objects);
        assert!(objects >= 3, "{}: the walk saw {objects} levels only", file.name);
    }
}

#[test]
fn every_field_is_described_and_none_is_a_reference() {
    for file in crds().unwrap() {
        assert!(!file.yaml.contains("$ref"), "{}: Kubernetes takes no $ref", file.name);
        let crd: Value = serde_yaml::from_str(&file.yaml).unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
        for part in ["spec", "status"] {
            assert_described(&schema[part], part);
        }
    }
}

fn assert_keeps_unknown(schema: &Value, path: &str, objects: &mut usize) {
    if let Some(properties) = schema["properties"].as_object() {
        *objects += 1;
        assert_eq!(schema["x-kubernetes-preserve-unknown-fields"], true, "{path} loses what it does not know");
        for (name, property) in properties {
            assert_keeps_unknown(property, &format!("{path}.{name}"), objects);
        }
    }
    for inner in ["items", "additionalProperties"] {
        assert_keeps_unknown_if_present(&schema[inner], path, objects);
    }
}

fn assert_keeps_unknown_if_present(schema: &Value, path: &str, objects: &mut usize) {
    if schema.is_object() {
        assert_keeps_unknown(schema, &format!("{path}[]"), objects);
    }
}

fn assert_described(schema: &Value, path: &str) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        assert!(property["description"].is_string(), "{path} has no description");
        assert_described(property, &path);
    }
    if schema["items"].is_object() {
        assert_described(&schema["items"], &format!("{path}[]"));
    }
}
