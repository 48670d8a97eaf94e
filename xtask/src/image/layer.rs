//! A file system to be: names and contents in order, as a tar whose bytes depend on nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// Everything that an image holds, by path without a leading slash. Folders above are made as they are needed.
#[derive(Default)]
pub struct Layer(BTreeMap<String, Entry>);

enum Entry {
    Folder { mode: u32 },
    File { mode: u32, content: Vec<u8> },
    Link { to: String },
}

impl Layer {
    pub fn folder(&mut self, path: &str, mode: u32) {
        self.put(path, Entry::Folder { mode });
    }

    /// A copy of a file of this machine, found through links.
    pub fn file(&mut self, path: &str, from: &Path, mode: u32) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.put(path, Entry::File { mode, content });
        Ok(())
    }

    pub fn link(&mut self, path: &str, to: &str) {
        self.put(path, Entry::Link { to: to.to_owned() });
    }

    pub fn contains(&self, path: &str) -> bool {
        self.0.contains_key(relative(path))
    }

    /// As a tar of the `ustar` kind (POSIX.1-1988), uid and gid 0, times 0, in the order of the names.
    pub fn tar(&self) -> Result<Vec<u8>> {
        let mut tar = Tar::default();
        for (path, entry) in &self.0 {
            match entry {
                Entry::Folder { mode } => tar.append(&format!("{path}/"), *mode, b'5', "", &[])?,
                Entry::File { mode, content } => tar.append(path, *mode, b'0', "", content)?,
                Entry::Link { to } => tar.append(path, 0o777, b'2', to, &[])?,
            }
        }
        Ok(tar.finish())
    }

    /// As files in a folder, which must be empty.
    pub fn unpack(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        ensure!(fs::read_dir(folder)?.next().is_none(), "{} is not empty", folder.display());
        for (path, entry) in &self.0 {
            let at = folder.join(path);
            let written = match entry {
                Entry::Folder { .. } => fs::create_dir_all(&at),
                Entry::File { content, .. } => fs::write(&at, content),
                Entry::Link { to } => symlink(to, &at),
            };
            written.with_context(|| format!("cannot write {}", at.display()))?;
            if let Entry::Folder { mode } | Entry::File { mode, .. } = entry {
                fs::set_permissions(&at, fs::Permissions::from_mode(*mode))?;
            }
        }
        Ok(())
    }

    fn put(&mut self, path: &str, entry: Entry) {
        let path = relative(path);
        for (end, _) in path.match_indices('/') {
            self.0.entry(path[..end].to_owned()).or_insert(Entry::Folder { mode: 0o755 });
        }
        self.0.insert(path.to_owned(), entry);
    }
}

fn relative(path: &str) -> &str {
    path.trim_matches('/')
}

/// The bytes of a tar.
#[derive(Default)]
pub struct Tar(Vec<u8>);

impl Tar {
    pub fn append(&mut self, name: &str, mode: u32, kind: u8, link: &str, content: &[u8]) -> Result<()> {
        // A name of more than 100 bytes is cut at a slash.
        let (prefix, short) = match name.len() {
            ..=100 => ("", name),
            _ => {
                let mut cuts = name.match_indices('/').map(|(at, _)| (&name[..at], &name[at + 1..]));
                cuts.find(|(prefix, rest)| prefix.len() <= 155 && rest.len() <= 100)
                    .with_context(|| format!("{name}: too long a name for a tar"))?
            }
        };
        ensure!(link.len() <= 100, "{link}: too long a link for a tar");
        let mut header = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, short.as_bytes());
        put(100, format!("{mode:07o}").as_bytes());
        // Owner and group: root.
        put(108, b"0000000");
        put(116, b"0000000");
        if content.len() >= 1 << 33 {
            bail!("{name}: too large for a tar");
        }
        put(124, format!("{:011o}", content.len()).as_bytes());
        // When: the epoch.
        put(136, b"00000000000");
        put(148, b"        ");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        put(345, prefix.as_bytes());
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        Ok(())
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }
}

const BLOCK: usize = 512;

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_same_files_give_the_same_bytes_in_any_order_and_at_any_age() {
        let folder = tempfile::tempdir().unwrap();
        let (young, old) = (folder.path().join("young"), folder.path().join("old"));
        fs::write(&young, "content").unwrap();
        fs::write(&old, "content").unwrap();
        fs::File::open(&old).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let mut one = Layer::default();
        one.file("/usr/bin/program", &young, 0o755).unwrap();
        one.link("/usr/bin/alias", "program");
        one.folder("/tmp", 0o1777);
        let mut other = Layer::default();
        other.folder("/tmp", 0o1777);
        other.link("/usr/bin/alias", "program");
        other.file("/usr/bin/program", &old, 0o755).unwrap();
        assert_eq!(one.tar().unwrap(), other.tar().unwrap());
    }

    #[test]
    fn tar_reads_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, vec![b'x'; 700]).unwrap();
        let long = format!("{}/{}", "d".repeat(60), "f".repeat(60));
        let mut layer = Layer::default();
        layer.file("/etc/file", &file, 0o640).unwrap();
        layer.file(&long, &file, 0o644).unwrap();
        layer.link("/etc/link", "file");
        fs::write(folder.path().join("layer.tar"), layer.tar().unwrap()).unwrap();
        let mut tar = Command::new("tar");
        tar.args(["--list", "--verbose", "--numeric-owner", "--utc", "--full-time", "--file", "layer.tar"]);
        let output = tar.current_dir(folder.path()).stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success());
        let listed = String::from_utf8(output.stdout).unwrap();
        for line in [
            "-rw-r----- 0/0             700 1970-01-01 00:00:00 etc/file",
            "lrwxrwxrwx 0/0               0 1970-01-01 00:00:00 etc/link -> file",
            &format!("-rw-r--r-- 0/0             700 1970-01-01 00:00:00 {long}"),
        ] {
            assert!(listed.lines().any(|listed| listed == line), "no {line:?} in\n{listed}");
        }
    }
}
