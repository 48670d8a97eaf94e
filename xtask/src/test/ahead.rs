//! Building ahead what later sections need, while the ones before them wait for packets and clocks.
//!
//! Tests on a real network leave most of the processor idle. What is built meanwhile gets only that: under SCHED_IDLE
//! (sched(7)) it runs where nothing else would.

use std::env;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::build::{load, release, target_directory};
use crate::cluster;
use crate::conformance;
use crate::image;
use crate::style::dim;

/// `cargo xtask prepare`: everything that takes long to build and that tests need.
pub fn prepare() -> Result<ExitCode> {
    release()?;
    load()?;
    image::for_tests()?;
    cluster::build_programs()?;
    conformance::prepare()?;
    Ok(ExitCode::SUCCESS)
}

/// A build that is under way.
pub struct Ahead {
    child: Child,
    log: PathBuf,
}

impl Ahead {
    pub fn start() -> Result<Self> {
        let log = target_directory().join("prepare.log");
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new("chrt");
        command.args(["--idle", "0"]).arg(env::current_exe()?).arg("prepare");
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().context("cannot run chrt, of Debian's package util-linux")?;
        Ok(Self { child, log })
    }

    /// Waits for the end. That it failed is told here; what needs it tries again, and fails with its own words.
    pub fn wait(mut self) -> Result<()> {
        let began = Instant::now();
        let status = self.child.wait().context("cannot wait for what is built ahead")?;
        println!("{}", dim(format!("waited {:.1} s for what was built ahead", began.elapsed().as_secs_f64())));
        if !status.success() {
            let said = fs::read_to_string(&self.log).unwrap_or_default();
            println!("what was built ahead ended with {status}:\n{said}");
        }
        Ok(())
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // Ended already where it was waited for.
        let _ = self.child.kill();
    }
}
