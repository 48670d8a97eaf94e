//! Puts the plugin and its entry on the node, mends the entry when another tool rewrites the list, and takes both away
//! at uninstall: the entry first, for a list that names a plugin which is not there fails every pod.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::PLUGIN;
use super::conflist::{with_entry, without_entry};

/// Where things are, as this process sees them.
#[derive(Clone, Debug)]
pub struct Places {
    /// Where the container runtime looks for plugins.
    pub bin_dir: PathBuf,
    /// Where it looks for their configuration.
    pub conf_dir: PathBuf,
    /// The folder that plugin and agent share, at the same path on the node and here.
    pub shared: PathBuf,
}

/// Keeps the node's CNI configuration with our plugin in it.
#[derive(Debug)]
pub struct Installer {
    places: Places,
    /// What the list said when it could not be mended, so that it is said once.
    told: Option<String>,
}

/// What stands in the way.
#[derive(Debug, thiserror::Error)]
pub enum InstallerError {
    #[error("{}: {cause}", path.display())]
    File {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("there is no list of plugins in {} yet: the cluster's CNI has not been installed, or keeps it elsewhere", .0.display())]
    NoList(PathBuf),
    #[error("{}: selvedge cannot be put into this list of plugins: {cause}", path.display())]
    NotAList { path: PathBuf, cause: String },
}

impl Installer {
    pub fn new(places: Places) -> Self {
        Self { places, told: None }
    }

    /// Installs, and goes on mending until SIGTERM, or until the agent says that it is being uninstalled: then it takes
    /// everything away.
    ///
    /// # Errors
    /// The plugin cannot be written, or not be removed.
    pub async fn run(mut self) -> Result<(), InstallerError> {
        let mut terminate = signal(SignalKind::terminate()).map_err(|cause| self.about(&self.places.shared, cause))?;
        let farewell = self.places.shared.join(FAREWELL);
        // That of an earlier installation: this one is alive.
        remove_if_there(&farewell)?;
        self.install_plugin()?;
        let changed = Arc::new(Notify::new());
        let _watcher = self.watch(&changed);
        loop {
            if farewell.exists() {
                return self.uninstall();
            }
            self.mend();
            tokio::select! {
                () = changed.notified() => {}
                () = tokio::time::sleep(LOOK) => {}
                _ = terminate.recv() => break,
            }
        }
        // The agent of this pod is told to end at the same moment, and may find out only now that it is for good.
        let found_out = async {
            while !farewell.exists() {
                tokio::select! {
                    () = changed.notified() => {}
                    () = tokio::time::sleep(AT_END_LOOK) => {}
                }
            }
        };
        match tokio::time::timeout(AT_END, found_out).await {
            Ok(()) => self.uninstall(),
            Err(_) => Ok(()),
        }
    }

    /// Whether plugin and entry are in their places.
    ///
    /// # Errors
    /// What is missing.
    pub fn check(&self) -> Result<(), InstallerError> {
        let plugin = self.plugin();
        fs::metadata(&plugin).map_err(|cause| self.about(&plugin, cause))?;
        let (path, text) = self.list()?;
        match with_entry(&text, &self.places.shared.to_string_lossy()) {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(InstallerError::NotAList { path, cause: "the entry of selvedge is missing".to_owned() }),
            Err(cause) => Err(InstallerError::NotAList { path, cause: cause.to_string() }),
        }
    }

    /// Takes the entry out of every list, then the plugin away. Goes on past an error, and returns the first.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn uninstall(&self) -> Result<(), InstallerError> {
        let mut result = Ok(());
        for path in self.lists()? {
            let without = fs::read_to_string(&path).map(|text| without_entry(&text));
            let written = without.and_then(|text| text.map_or(Ok(()), |text| replace(&path, text.as_bytes(), None)));
            result = result.and(written.map_err(|cause| self.about(&path, cause)));
        }
        // A list that still names it would fail every pod without it.
        if result.is_ok() {
            result = remove_if_there(&self.plugin());
        }
        if result.is_ok() {
            tracing::info!("The CNI plugin is removed, and its entry in the node's list.");
            result = remove_if_there(&self.places.shared.join(FAREWELL));
        }
        result
    }

    /// Where the plugin is.
    fn plugin(&self) -> PathBuf {
        self.places.bin_dir.join(PLUGIN)
    }

    fn install_plugin(&self) -> Result<(), InstallerError> {
        let path = self.plugin();
        let own = fs::read("/proc/self/exe").map_err(|cause| self.about(Path::new("/proc/self/exe"), cause))?;
        if fs::read(&path).is_ok_and(|there| there == own) {
            return Ok(());
        }
        replace(&path, &own, Some(0o755)).map_err(|cause| self.about(&path, cause))?;
        tracing::info!(path = %path.display(), "The CNI plugin is installed.");
        Ok(())
    }

    /// Puts our entry into the list where it is missing.
    fn mend(&mut self) {
        let mended = self.list().and_then(|(path, text)| {
            let wanted = with_entry(&text, &self.places.shared.to_string_lossy());
            match wanted {
                Ok(None) => Ok(None),
                Ok(Some(text)) => {
                    replace(&path, text.as_bytes(), None).map_err(|cause| self.about(&path, cause))?;
                    Ok(Some(path))
                }
                Err(cause) => Err(InstallerError::NotAList { path, cause: cause.to_string() }),
            }
        });
        match mended {
            Ok(path) => {
                self.told = None;
                if let Some(path) = path {
                    tracing::info!(list = %path.display(), "The node's list of CNI plugins has the entry of selvedge.");
                }
            }
            Err(error) => {
                let words = error.to_string();
                if self.told.as_ref() != Some(&words) {
                    tracing::error!(error = %words, "Pods that start are not handed over; they are captured once they run.");
                    self.told = Some(words);
                }
            }
        }
    }

    /// The list that the container runtime takes: the first by name.
    fn list(&self) -> Result<(PathBuf, String), InstallerError> {
        let first = self.lists()?.into_iter().next();
        let path = first.ok_or_else(|| InstallerError::NoList(self.places.conf_dir.clone()))?;
        let text = fs::read_to_string(&path).map_err(|cause| self.about(&path, cause))?;
        Ok((path, text))
    }

    fn lists(&self) -> Result<Vec<PathBuf>, InstallerError> {
        let dir = &self.places.conf_dir;
        let entries = fs::read_dir(dir).map_err(|cause| self.about(dir, cause))?;
        let mut lists: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        lists
            .retain(|path| path.extension().is_some_and(|kind| kind == "conflist" || kind == "conf" || kind == "json"));
        lists.sort();
        Ok(lists)
    }

    fn watch(&self, changed: &Arc<Notify>) -> Option<RecommendedWatcher> {
        let told = changed.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading is no change, and we read at every one.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                told.notify_one();
            }
        })
        .ok()?;
        for dir in [&self.places.conf_dir, &self.places.shared] {
            if let Err(error) = watcher.watch(dir, RecursiveMode::NonRecursive) {
                tracing::warn!(dir = %dir.display(), %error, "The folder cannot be watched; it is looked at now and then.");
            }
        }
        Some(watcher)
    }

    fn about(&self, path: &Path, cause: io::Error) -> InstallerError {
        InstallerError::File { path: path.to_owned(), cause }
    }
}

/// Says to the installer of this node that it is being uninstalled.
pub fn say_farewell(shared: &Path) -> io::Result<()> {
    File::create(shared.join(FAREWELL)).map(drop)
}

/// Whether the installer has not yet done what it was told.
pub(super) fn farewell_stands(shared: &Path) -> bool {
    shared.join(FAREWELL).exists()
}

/// The whole file at once, by rename; with the mode of the one before unless another is given.
fn replace(path: &Path, bytes: &[u8], mode: Option<u32>) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // A name that no container runtime takes for a list, and none runs.
    let beside = path.with_file_name(format!(".{name}.selvedge-new"));
    let mode = mode.or_else(|| fs::metadata(path).ok().map(|meta| meta.permissions().mode())).unwrap_or(0o644);
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&beside)?;
        io::Write::write_all(&mut file, bytes)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&beside, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

fn remove_if_there(path: &Path) -> Result<(), InstallerError> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(InstallerError::File { path: path.to_owned(), cause })
        }
        _ => Ok(()),
    }
}

/// In the shared folder while the agent waits for the installer to have removed everything.
const FAREWELL: &str = "uninstall";
const LOOK: Duration = Duration::from_secs(5);
const AT_END: Duration = Duration::from_secs(10);
const AT_END_LOOK: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        dir: tempfile::TempDir,
        installer: Installer,
    }

    fn node(lists: &[(&str, &str)]) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let places = Places {
            bin_dir: dir.path().join("bin"),
            conf_dir: dir.path().join("net.d"),
            shared: dir.path().join("shared"),
        };
        for dir in [&places.bin_dir, &places.conf_dir, &places.shared] {
            fs::create_dir(dir).unwrap();
        }
        lists.iter().for_each(|(name, text)| fs::write(places.conf_dir.join(name), text).unwrap());
        Node { dir, installer: Installer::new(places) }
    }

    impl Node {
        fn list(&self, name: &str) -> String {
            fs::read_to_string(self.dir.path().join("net.d").join(name)).unwrap()
        }
    }

    const LIST: &str = r#"{"name": "c", "plugins": [{"type": "ptp"}]}"#;

    #[test]
    fn the_first_list_gets_the_entry_and_gets_it_again() {
        let mut node = node(&[("10-a.conflist", LIST), ("20-b.conflist", LIST)]);
        node.installer.install_plugin().unwrap();
        node.installer.mend();
        assert!(node.installer.check().is_ok());
        assert!(node.list("10-a.conflist").contains("selvedge") && !node.list("20-b.conflist").contains("selvedge"));
        fs::write(node.dir.path().join("net.d/10-a.conflist"), LIST).unwrap();
        assert!(node.installer.check().is_err(), "another tool has rewritten it");
        node.installer.mend();
        assert!(node.installer.check().is_ok());
        // A list of another CNI comes first.
        fs::write(node.dir.path().join("net.d/05-c.conflist"), LIST).unwrap();
        assert!(node.installer.check().is_err());
        node.installer.mend();
        assert!(node.list("05-c.conflist").contains("selvedge"));
        node.installer.uninstall().unwrap();
        assert!(!node.list("05-c.conflist").contains("selvedge") && !node.list("10-a.conflist").contains("selvedge"));
        assert!(!node.dir.path().join("bin/selvedge").exists());
    }

    #[test]
    fn a_plugin_stays_while_a_list_may_name_it() {
        let mut node = node(&[("10-a.conflist", LIST)]);
        node.installer.install_plugin().unwrap();
        node.installer.mend();
        fs::create_dir(node.dir.path().join("net.d/20-b.conflist")).unwrap();
        assert!(node.installer.uninstall().is_err(), "a list that cannot be read");
        assert!(node.dir.path().join("bin/selvedge").exists());
        assert!(!node.list("10-a.conflist").contains("selvedge"), "it goes on past the error");
    }

    #[test]
    fn a_node_without_a_list_of_plugins_is_told_of() {
        let single = node(&[("10-a.conf", r#"{"type": "ptp"}"#)]);
        single.installer.install_plugin().unwrap();
        assert!(single.installer.check().unwrap_err().to_string().contains("conflist"));
        let none = node(&[]);
        none.installer.install_plugin().unwrap();
        assert!(matches!(none.installer.check(), Err(InstallerError::NoList(_))));
    }
}
