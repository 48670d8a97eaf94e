//! The joined namespaces, kept on the node's disk: what the plugin goes by while no agent is there.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::mesh::{Membership, MeshMode, NamespacedName, Settings};
use crate::model::Model;

/// What the agent knew last. None of it decides anything while an agent is there.
#[derive(Serialize, Deserialize, PartialEq, Eq, Debug, Default)]
pub(super) struct Roster {
    namespaces: BTreeMap<String, Standing>,
}

#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
enum Standing {
    Enabled,
    Required,
}

impl Roster {
    fn of(model: &Model) -> Self {
        let state = model.read();
        let joined = state.mesh.namespaces().filter_map(|(name, namespace)| {
            let standing = match namespace.settings.mesh? {
                MeshMode::Disabled => return None,
                MeshMode::Enabled => Standing::Enabled,
                MeshMode::Required => Standing::Required,
            };
            Some((name.to_string(), standing))
        });
        Self { namespaces: joined.collect() }
    }

    /// Reads it; one that was never written is empty.
    pub fn read(shared: &Path) -> io::Result<Self> {
        match std::fs::read(roster_path(shared)) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// Whole or not at all, on disk before it is in its place: a node may lose power at any moment.
    fn write(&self, shared: &Path) -> io::Result<()> {
        let path = roster_path(shared);
        let beside = path.with_extension("new");
        let file = std::fs::File::create(&beside)?;
        serde_json::to_writer(&file, self)?;
        file.sync_all()?;
        std::fs::rename(beside, path)
    }

    /// Whether a pod is to join, by its namespace and its own annotations.
    pub fn joins(&self, pod: &NamespacedName, annotations: &BTreeMap<String, String>) -> bool {
        let mode = self.namespaces.get(&*pod.namespace).map(|standing| match standing {
            Standing::Enabled => MeshMode::Enabled,
            Standing::Required => MeshMode::Required,
        });
        let namespace = Settings { mesh: mode, ..Settings::default() };
        let (own, _) = Settings::read(annotations, &BTreeMap::new());
        Membership::of(pod, false, Some(&namespace), &own).is_joined()
    }
}

/// Keeps the list as the model is. Ends with the model.
pub async fn keep_roster(shared: PathBuf, model: Arc<Model>) {
    let mut moved = model.subscribe();
    model.synced().await;
    let mut written = None;
    loop {
        moved.borrow_and_update();
        let roster = Roster::of(&model);
        if written.as_ref() != Some(&roster) {
            match roster.write(&shared) {
                Ok(()) => written = Some(roster),
                Err(error) => tracing::warn!(
                    dir = %shared.display(), %error,
                    "The list of joined namespaces cannot be written; without an agent, new pods of this node go by an \
                     older one."
                ),
            }
        }
        if moved.changed().await.is_err() {
            return;
        }
    }
}

pub fn roster_path(shared: &Path) -> PathBuf {
    shared.join("joined.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_joins_by_its_namespace_or_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Roster::read(dir.path()).unwrap(), Roster::default(), "never written");
        let standing = [("shop".into(), Standing::Enabled), ("bank".into(), Standing::Required)];
        Roster { namespaces: BTreeMap::from(standing) }.write(dir.path()).unwrap();
        let roster = Roster::read(dir.path()).unwrap();
        let joins = |namespace: &str, mesh: Option<&str>| {
            let own = mesh.map(|mesh| ("selvedge.dev/mesh".to_owned(), mesh.to_owned())).into_iter().collect();
            roster.joins(&NamespacedName::new(namespace, "web"), &own)
        };
        assert!(joins("shop", None) && joins("bank", Some("disabled")) && joins("other", Some("enabled")));
        assert!(!joins("shop", Some("disabled")) && !joins("other", None));
        assert!(!joins("kube-system", Some("enabled")) && !joins("selvedge-system", Some("enabled")));
    }

    #[test]
    fn a_broken_list_is_an_error_and_not_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(roster_path(dir.path()), "{").unwrap();
        assert!(Roster::read(dir.path()).is_err());
    }
}
