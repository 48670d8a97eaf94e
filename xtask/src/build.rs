//! Building the binary, and what is generated from it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Builds the release binary: one static file for this machine's Linux, glibc and all.
pub fn release() -> Result<PathBuf> {
    static_release("selvedge", "selvedge")
}

/// Builds one program of the workspace as [`release`] does.
pub fn static_release(package: &str, program: &str) -> Result<PathBuf> {
    let target = host()?;
    // Named by --target, so that the flags do not reach build scripts and procedural macros, which cannot be static.
    let flags = format!("{} -C target-feature=+crt-static", env::var("RUSTFLAGS").unwrap_or_default());
    let mut command = cargo();
    command.args(["build", "--release", "--locked", "--package", package, "--bin", program, "--target", &target]);
    run(command.env("RUSTFLAGS", flags.trim()))?;
    Ok(target_directory().join(target).join("release").join(program))
}

/// Where [`release`] leaves the binary.
pub fn release_path() -> Result<PathBuf> {
    Ok(target_directory().join(host()?).join("release/selvedge"))
}

/// Builds the program with the bench's relay and load. In release: it must not be what is slow.
pub fn load() -> Result<PathBuf> {
    run(cargo().args(["build", "--quiet", "--release", "--locked", "--package", "selvedge-load"]))?;
    Ok(load_path())
}

/// Where [`load`] leaves the program.
pub fn load_path() -> PathBuf {
    target_directory().join("release/selvedge-load")
}

/// Writes `crd/` from the types in `src/api`.
pub fn write_crds() -> Result<()> {
    let mut command = cargo();
    run(command.args(["run", "--quiet", "--package", "selvedge", "--", "crd", "--out"]).arg(root().join("crd")))
}

/// The cargo that runs us, in the project's root.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The project's root.
pub fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !status.success() {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        bail!("cargo {} failed", arguments.join(" "));
    }
    Ok(())
}

/// Where cargo builds.
pub fn target_directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn host() -> Result<String> {
    let output = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())).arg("-vV").output();
    let output = output.context("cannot run rustc: install Rust from https://rustup.rs")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}
