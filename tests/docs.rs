//! The documentation says what the code does: what can be compared, is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn every_reason_code_has_its_section_and_no_section_is_left_over() {
    let sections: BTreeSet<String> =
        page("troubleshooting.md").lines().filter_map(|line| line.strip_prefix("## ")).map(str::to_owned).collect();
    assert_eq!(sections, words_of_function("src/mesh/reason.rs", "pub fn code"));
}

#[test]
fn every_result_of_a_tls_handshake_is_explained() {
    let mut results = words_of_function("src/transport/tls.rs", "pub fn code");
    results.insert("ok".to_owned());
    let text = page("troubleshooting.md");
    let (_, table) = text.split_once("| result |").expect("the table of results");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let documented: BTreeSet<String> = rows.flat_map(|row| in_backticks(row.split('|').nth(1).unwrap())).collect();
    assert_eq!(documented, results);
}

#[test]
fn every_field_of_the_access_log_is_explained() {
    let written = [
        ("access_log/record.rs", "fn write(&self, format"),
        ("access_log/line.rs", "fn parties(&mut self"),
        ("request.rs", "fn write(&self, line"),
    ];
    let written = written.map(|(file, signature)| {
        let source = fs::read_to_string(root().join("src/telemetry").join(file)).unwrap();
        function(&source, signature).to_owned()
    });
    let quoted = written.iter().flat_map(|text| text.split('"').skip(1).step_by(2));
    let is_name = |text: &&str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let fields: BTreeSet<String> = quoted.filter(is_name).map(str::to_owned).collect();
    let text = page("standalone.md");
    let (_, table) = text.split_once("| field |").expect("the table of fields");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let documented: BTreeSet<String> = rows.flat_map(|row| in_backticks(row.split('|').nth(1).unwrap())).collect();
    assert_eq!(documented, fields);
}

#[test]
fn every_dependency_has_its_line_and_no_line_is_left_over() {
    let mut used = BTreeSet::new();
    let manifests = [
        "Cargo.toml",
        "xtask/Cargo.toml",
        "tests/e2e/Cargo.toml",
        "tests/echo/Cargo.toml",
        "tests/lab/Cargo.toml",
        "tests/load/Cargo.toml",
    ];
    for manifest in manifests {
        let text = fs::read_to_string(root().join(manifest)).unwrap();
        let mut within = false;
        for line in text.lines() {
            if line.starts_with('[') {
                within = line.ends_with("dependencies]");
            } else if let Some((name, what)) = line.split_once('=').filter(|_| within)
                && !what.contains("path =")
            {
                used.insert(name.trim().to_owned());
            }
        }
    }
    let text = page("dependencies.md");
    let documented: Vec<String> =
        text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).map(str::to_owned).collect();
    assert_eq!(documented.iter().cloned().collect::<BTreeSet<_>>(), used);
    assert_eq!(documented.len(), used.len(), "one line each");
}

#[test]
fn links_between_the_pages_lead_somewhere() {
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, section) = target.split_once('#').unwrap_or((target, ""));
            if target.contains("://") {
                continue;
            }
            let there = if file.is_empty() { path.clone() } else { root().join("docs").join(file) };
            let linked = fs::read_to_string(&there).unwrap_or_else(|_| panic!("{}: {target}", path.display()));
            let found = linked.lines().filter_map(|line| line.strip_prefix('#')).any(|title| {
                title.trim_start_matches('#').trim().to_lowercase().replace(' ', "-").replace([',', ':', '`'], "")
                    == section
            });
            assert!(section.is_empty() || found, "{}: there is no section {target}", path.display());
        }
    }
}

/// The words on the right of `=>` in a function: one for each variant, since the match is exhaustive.
fn words_of_function(file: &str, signature: &str) -> BTreeSet<String> {
    let source = fs::read_to_string(root().join(file)).unwrap();
    let words = function(&source, signature).split("=> \"").skip(1).filter_map(|rest| rest.split('"').next());
    words.map(str::to_owned).collect()
}

/// From a method's signature to its closing brace.
fn function<'a>(source: &'a str, signature: &str) -> &'a str {
    let (_, rest) = source.split_once(signature).unwrap_or_else(|| panic!("no {signature}"));
    rest.split("\n    }\n").next().unwrap_or(rest)
}

fn in_backticks(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn page(name: &str) -> String {
    fs::read_to_string(root().join("docs").join(name)).unwrap()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}
