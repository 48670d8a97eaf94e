//! Whether `crd/` is what the types make of it, and the Helm charts what they make of it and of `daemonset/base`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::build::root;
use crate::install;
use crate::test::runner::{Excerpt, Tally};
use crate::test::unprivileged::tested_program;

pub fn check() -> Result<Tally> {
    let fresh = tempfile::tempdir().context("cannot make a temporary folder")?;
    let mut command = Command::new(tested_program()?);
    let status = command.args(["crd", "--out"]).arg(fresh.path()).status().context("cannot run selvedge crd")?;
    ensure!(status.success(), "selvedge crd ended with {status}");
    let (wanted, mut kept) = (read(fresh.path())?, read(&root().join("crd"))?);
    // Among what is made below.
    kept.remove(install::KUSTOMIZATION);
    let mut tally = Tally::default();
    for name in wanted.keys().chain(kept.keys().filter(|name| !wanted.contains_key(*name))) {
        match wanted.get(name) == kept.get(name) {
            true => tally.passed += 1,
            false => {
                let said = format!("crd/{name} is not what src/api makes of it: cargo xtask crd");
                println!("{said}");
                tally.fail(said, Excerpt::default());
            }
        }
    }
    for (path, wanted) in install::generated()? {
        match fs::read_to_string(root().join(&path)).is_ok_and(|kept| kept == wanted) {
            true => tally.passed += 1,
            false => {
                let said = format!("{path} is not what crd/ and daemonset/ make of it: cargo xtask crd");
                println!("{said}");
                tally.fail(said, Excerpt::default());
            }
        }
    }
    Ok(tally)
}

fn read(folder: &Path) -> Result<BTreeMap<String, String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let file = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry?;
        Ok((entry.file_name().to_string_lossy().into_owned(), fs::read_to_string(entry.path())?))
    };
    entries.map(file).collect()
}
