//! What we depend on, held against `deny.toml`: sources, licences, bans and duplicates.
//!
//! The file is cargo-deny's, and `cargo deny check` reads it too; this reads the part of it that can be checked without
//! the network and without installing anything. Advisories are not checked here: they need a fresh database.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use spdx::{Expression, ParseMode};

use crate::build::{cargo, root};
use crate::test::runner::{Excerpt, Tally};

pub fn check() -> Result<Tally> {
    let rules = fs::read_to_string(root().join("deny.toml")).context("cannot read deny.toml")?;
    let rules: Rules = toml::from_str(&rules).context("deny.toml")?;
    let packages = packages(&rules)?;
    let mut tally = Tally::default();
    let checks = [
        ("sources", sources(&rules, &packages)),
        ("licences", licences(&rules, &packages)),
        ("bans", bans(&rules, &packages)),
        ("duplicates", duplicates(&rules, &packages)),
    ];
    for (name, problems) in checks {
        println!("{name}: {} packages, {} problems", packages.len(), problems.len());
        match problems.is_empty() {
            true => tally.passed += 1,
            false => tally.fail(format!("{name}:\n      {}", problems.join("\n      ")), Excerpt::default()),
        }
    }
    println!("advisories: not checked, for that needs the network (cargo deny check advisories)");
    Ok(tally)
}

/// The part of cargo-deny's configuration that we check.
#[derive(Deserialize)]
struct Rules {
    graph: Graph,
    licenses: Licences,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
struct Graph {
    targets: Vec<String>,
}

#[derive(Deserialize)]
struct Licences {
    allow: BTreeSet<String>,
    #[serde(default)]
    exceptions: Vec<Exception>,
}

#[derive(Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    #[serde(default)]
    deny: Vec<Named>,
    #[serde(default)]
    skip: Vec<Named>,
}

/// A package, by name or `name@version`, and why it stands here.
#[derive(Deserialize)]
struct Named {
    #[serde(rename = "crate")]
    name: String,
    #[serde(default)]
    reason: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

impl Package {
    fn words(&self) -> String {
        format!("{}@{}", self.name, self.version)
    }

    fn is(&self, named: &Named) -> bool {
        named.name == self.name || named.name == self.words()
    }
}

/// Every package that is built for the targets we name. `cargo metadata` knows licences and sources, but resolves
/// optional dependencies that nobody turns on; `cargo tree` knows what is built.
fn packages(rules: &Rules) -> Result<Vec<Package>> {
    // By target here too: what is built for others need not be on this machine.
    let targets = rules.graph.targets.iter().flat_map(|target| ["--filter-platform", target]);
    let arguments = ["metadata", "--format-version", "1", "--locked"].into_iter().chain(targets);
    let metadata = output(&arguments.collect::<Vec<_>>())?;
    let metadata: Metadata = serde_json::from_str(&metadata).context("cargo metadata")?;
    let mut built = BTreeSet::new();
    for target in &rules.graph.targets {
        let tree = ["tree", "--workspace", "--locked", "--edges", "normal,build,dev", "--prefix", "none"];
        let tree = output(&[&tree[..], &["--format", "{p}", "--target", target]].concat())?;
        // `name v1.2.3`, then the path of our own, then (*) where it was listed before.
        built.extend(tree.lines().filter_map(|line| {
            let (name, rest) = line.split_once(" v")?;
            Some((name.to_owned(), rest.split(' ').next()?.to_owned()))
        }));
    }
    let is_built = |package: &Package| built.contains(&(package.name.clone(), package.version.clone()));
    Ok(metadata.packages.into_iter().filter(is_built).collect())
}

fn output(arguments: &[&str]) -> Result<String> {
    let output = cargo().args(arguments).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo {} failed", arguments.join(" "));
    String::from_utf8(output.stdout).context("cargo printed no text")
}

fn sources(rules: &Rules, packages: &[Package]) -> Vec<String> {
    let allowed = |source: &str| {
        let registry = source.strip_prefix("registry+");
        registry.is_some_and(|url| rules.sources.allow_registry.iter().any(|allowed| allowed == url))
    };
    let foreign = packages.iter().filter_map(|package| Some((package, package.source.as_deref()?)));
    foreign
        .filter(|(_, source)| !allowed(source))
        .map(|(package, source)| format!("{} is from {source}", package.words()))
        .collect()
}

fn licences(rules: &Rules, packages: &[Package]) -> Vec<String> {
    packages.iter().filter_map(|package| licence_problem(rules, package)).collect()
}

fn licence_problem(rules: &Rules, package: &Package) -> Option<String> {
    let Some(licence) = &package.license else {
        return Some(format!("{} names no licence", package.words()));
    };
    let expression = match Expression::parse_mode(licence, ParseMode::LAX) {
        Ok(expression) => expression,
        Err(error) => return Some(format!("{}: {licence:?} is no SPDX expression: {error}", package.words())),
    };
    let exceptions = rules.licenses.exceptions.iter().filter(|exception| exception.name == package.name);
    let allowed: BTreeSet<&str> =
        exceptions.flat_map(|exception| &exception.allow).chain(&rules.licenses.allow).map(String::as_str).collect();
    let held = expression.evaluate(|requirement| allowed.contains(requirement.to_string().as_str()));
    (!held).then(|| format!("{} is under {licence}, which deny.toml does not allow", package.words()))
}

fn bans(rules: &Rules, packages: &[Package]) -> Vec<String> {
    let banned =
        |package: &Package| rules.bans.deny.iter().find(|named| package.is(named)).map(|named| named.reason.clone());
    packages.iter().filter_map(|package| Some(format!("{}: {}", package.words(), banned(package)?))).collect()
}

fn duplicates(rules: &Rules, packages: &[Package]) -> Vec<String> {
    let mut by_name: BTreeMap<&str, Vec<&Package>> = BTreeMap::new();
    for package in packages.iter().filter(|package| !rules.bans.skip.iter().any(|named| package.is(named))) {
        by_name.entry(&package.name).or_default().push(package);
    }
    let several = by_name.into_values().filter(|versions| versions.len() > 1);
    let mut problems: Vec<String> = several
        .map(|versions| versions.iter().map(|package| package.words()).collect::<Vec<_>>().join(" and "))
        .collect();
    let idle = rules.bans.skip.iter().filter(|named| !packages.iter().any(|package| package.is(named)));
    problems.extend(idle.map(|named| format!("deny.toml skips {}, which is not there any more", named.name)));
    problems
}
