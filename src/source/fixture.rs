//! What tests write as manifests, read as a folder of them is.

use super::directory::{self, Loaded};
use crate::mesh::MeshSettings;
use crate::model::Model;

/// A model of manifests that are all well.
pub fn model(manifests: &str) -> Model {
    let loaded = load(manifests);
    assert_eq!(loaded.problems, []);
    model_of(loaded)
}

pub fn model_of(loaded: Loaded) -> Model {
    let trust_domain = "cluster.local".parse().expect("it is one");
    let model = Model::new(MeshSettings { trust_domain, cluster_cidrs: Vec::new() });
    model.apply(loaded.deltas);
    model
}

pub fn load(manifests: &str) -> Loaded {
    let dir = tempfile::tempdir().expect("a folder can be made");
    std::fs::write(dir.path().join("a.yaml"), manifests).expect("a file can be written");
    directory::load(dir.path()).expect("the folder can be read")
}

/// The manifests that a page of the documentation shows.
pub fn examples(page: &str) -> Vec<&str> {
    page.split("```yaml\n").skip(1).filter_map(|block| block.split("```").next()).collect()
}
