//! The same again without root: in a user namespace, as an ordinary user has one.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::build::{cargo, release, root};
use crate::test::runner::{Tally, count_tests};
use crate::test::{count_expectations, is_root};

/// The lab's own tests and the network tests: all of them, for any may come to depend on a right that only root has.
pub fn network(retries: u32) -> Result<Tally> {
    if !is_root() {
        println!("the sections before ran without root");
        return Ok(Tally::passed_check());
    }
    let place = Place::make()?;
    let lab = place.put(&test_program("lab", "lab")?)?;
    let tally = count_tests(&mut place.command(&lab), retries)?;
    let network = place.put(&test_program("network", "network")?)?;
    let selvedge = place.put(&tested_program()?)?;
    Ok(tally + &count_tests(place.command(&network).env("SELVEDGE_BIN", &selvedge), retries)?)
}

/// The demo with the release binary.
pub fn demo() -> Result<Tally> {
    if !is_root() {
        println!("the section before ran without root");
        return Ok(Tally::passed_check());
    }
    let place = Place::make()?;
    let (xtask, selvedge) = (place.put(&env::current_exe()?)?, place.put(&release()?)?);
    let manifests = place.put_folder(&root().join("xtask/demo/manifests"))?;
    let mut command = place.command(&xtask);
    command.args(["demo", "--json", "--manifests"]).arg(manifests).env("SELVEDGE_BIN", selvedge);
    count_expectations(&mut command)
}

/// A folder that any user may read: the project may lie where only root may.
struct Place(TempDir);

impl Place {
    fn make() -> Result<Self> {
        let place = tempfile::tempdir().context("cannot make a temporary folder")?;
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755))?;
        Ok(Self(place))
    }

    fn put(&self, program: &Path) -> Result<PathBuf> {
        let to = self.0.path().join(program.file_name().context("a program without a name")?);
        fs::copy(program, &to).with_context(|| format!("cannot copy {}", program.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
        Ok(to)
    }

    fn put_folder(&self, folder: &Path) -> Result<PathBuf> {
        let to = self.0.path().join("manifests");
        fs::create_dir(&to)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let file = to.join(entry.file_name());
            fs::copy(entry.path(), &file)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
        }
        Ok(to)
    }

    /// A command as the user `nobody`, with no capability left.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            NOBODY,
            "--regid",
            NOBODY,
            "--clear-groups",
            "--inh-caps=-all",
            "--bounding-set=-all",
        ]);
        command.arg("--no-new-privs").arg(program).current_dir(self.0.path());
        command.env_remove("SELVEDGE_BIN");
        command
    }
}

/// The program that the network tests run. Built as they build it: another choice of features would be another build.
pub fn tested_program() -> Result<PathBuf> {
    test_program("network", "selvedge")
}

/// Builds one test target, and returns where cargo put the program of this name, which is it or what it needs.
fn test_program(target: &str, name: &str) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["test", "--no-run", "--workspace", "--test", target, "--locked", "--message-format", "json"]);
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cargo could not build {name}");
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut artifacts = messages.filter(|message| message["target"]["name"] == name);
    let executable = artifacts.find_map(|message| message["executable"].as_str().map(PathBuf::from));
    executable.with_context(|| format!("cargo named no executable for {name}"))
}

const NOBODY: &str = "65534";
