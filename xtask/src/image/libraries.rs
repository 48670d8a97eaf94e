//! The shared libraries that a program of this machine needs, each where the program will look for it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Asks the dynamic linker.
pub fn of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd; type: apt-get install libc-bin")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "ldd {}: {}", program.display(), said.trim());
    let missing = said.lines().find(|line| line.contains("not found"));
    ensure!(
        missing.is_none(),
        "{} needs a library that is not here: {}",
        program.display(),
        missing.unwrap_or_default().trim()
    );
    Ok(said.lines().filter_map(parse).collect())
}

/// Reads `libmnl.so.0 => /lib/libmnl.so.0 (0x7fe5)` and `/lib64/ld-linux-x86-64.so.2 (0x7fe5)`.
fn parse(line: &str) -> Option<PathBuf> {
    let line = line.split_once("=>").map_or(line, |(_, path)| path);
    let path = line.split_whitespace().next()?;
    path.starts_with('/').then(|| path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_linkers_words_are_read() {
        assert_eq!(parse("\tlibmnl.so.0 => /lib/libmnl.so.0 (0x7fe5)"), Some("/lib/libmnl.so.0".into()));
        assert_eq!(parse("\t/lib64/ld-linux.so.2 (0x7fe5)"), Some("/lib64/ld-linux.so.2".into()));
        assert_eq!(parse("\tlinux-vdso.so.1 (0x7fe5)"), None);
        assert_eq!(parse("\tstatically linked"), None);
    }
}
