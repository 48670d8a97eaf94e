use std::os::unix::fs::symlink;

use super::*;
use crate::mesh::MeshSettings;

/// An agent's source on a folder of its own.
struct Bench {
    dir: tempfile::TempDir,
    model: Arc<Model>,
    report: Arc<Report>,
    task: tokio::task::JoinHandle<Result<Infallible, DirectoryError>>,
}

impl Bench {
    fn start(prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        let settings = MeshSettings { trust_domain: "cluster.local".parse().unwrap(), cluster_cidrs: Vec::new() };
        let (model, report) = (Arc::new(Model::new(settings)), Report::new());
        let task = tokio::spawn(run(dir.path().to_owned(), model.clone(), report.clone()));
        Self { dir, model, report, task }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn node(&self) -> Option<String> {
        self.model.read().mesh.node("n").and_then(|node| node.zone.as_deref().map(str::to_owned))
    }

    /// Waits until the node is in this zone; a second is what a save may take, the rest is for a busy machine.
    async fn zone_becomes(&self, zone: Option<&str>) {
        let mut generation = self.model.subscribe();
        let reached = async {
            while self.node().as_deref() != zone {
                generation.changed().await.unwrap();
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(10), reached).await;
        assert!(ended.is_ok(), "wanted {zone:?}, got {:?}; {:?}", self.node(), self.report.problems());
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn node(zone: &str) -> String {
    format!("apiVersion: v1\nkind: Node\nmetadata:\n  name: n\n  labels: {{topology.kubernetes.io/zone: {zone}}}\n")
}

#[tokio::test]
async fn saves_take_effect_however_they_are_made() {
    let bench = Bench::start(|dir| fs::write(dir.join("a.yaml"), node("z0")).unwrap());
    bench.model.synced().await;
    assert_eq!(bench.node().as_deref(), Some("z0"));
    let file = bench.path("a.yaml");

    fs::write(&file, node("z1")).unwrap();
    bench.zone_becomes(Some("z1")).await;

    fs::write(bench.path(".a.swp"), node("z2")).unwrap();
    fs::rename(bench.path(".a.swp"), &file).unwrap();
    bench.zone_becomes(Some("z2")).await;

    fs::rename(&file, bench.path("a.yaml~")).unwrap();
    fs::write(&file, node("z3")).unwrap();
    bench.zone_becomes(Some("z3")).await;

    fs::remove_file(&file).unwrap();
    fs::write(&file, node("z4")).unwrap();
    bench.zone_becomes(Some("z4")).await;

    fs::create_dir_all(bench.path("sub/deep")).unwrap();
    fs::write(
        bench.path("sub/deep/b.json"),
        serde_json::json!({"apiVersion": "v1", "kind": "Node", "metadata":
        {"name": "n", "labels": {"topology.kubernetes.io/zone": "z5"}}})
        .to_string(),
    )
    .unwrap();
    fs::remove_file(&file).unwrap();
    bench.zone_becomes(Some("z5")).await;

    fs::remove_file(bench.path("sub/deep/b.json")).unwrap();
    bench.zone_becomes(None).await;
    assert!(bench.report.age().is_some_and(|age| age < Duration::from_secs(10)));
}

#[tokio::test]
async fn a_swapped_symbolic_link_takes_effect_as_in_a_config_map_volume() {
    let bench = Bench::start(|dir| {
        for zone in ["z0", "z1"] {
            fs::create_dir(dir.join(format!("..{zone}"))).unwrap();
            fs::write(dir.join(format!("..{zone}/a.yaml")), node(zone)).unwrap();
        }
        symlink("..z0", dir.join("..data")).unwrap();
        symlink("..data/a.yaml", dir.join("a.yaml")).unwrap();
    });
    bench.zone_becomes(Some("z0")).await;
    symlink("..z1", bench.path("..tmp")).unwrap();
    fs::rename(bench.path("..tmp"), bench.path("..data")).unwrap();
    bench.zone_becomes(Some("z1")).await;
}

#[tokio::test]
async fn a_file_behind_a_link_out_of_the_folder_is_followed() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("x.yaml"), node("z0")).unwrap();
    let bench = Bench::start(|dir| symlink(outside.path().join("x.yaml"), dir.join("a.yaml")).unwrap());
    bench.zone_becomes(Some("z0")).await;
    fs::write(outside.path().join("x.yaml"), node("z1")).unwrap();
    bench.zone_becomes(Some("z1")).await;
}

#[tokio::test]
async fn a_folder_that_is_gone_deletes_nothing_and_is_found_again() {
    let bench = Bench::start(|dir| {
        fs::create_dir(dir.join("m")).unwrap();
        fs::write(dir.join("m/a.yaml"), node("z0")).unwrap();
    });
    let inner = bench.path("m");
    let (model, report) = (bench.model.clone(), Report::new());
    bench.zone_becomes(Some("z0")).await;
    let task = tokio::spawn(run(inner.clone(), model, report.clone()));
    tokio::time::timeout(Duration::from_secs(10), async {
        while report.age().is_none() {
            tokio::task::yield_now().await;
        }
        fs::rename(&inner, bench.path(".away")).unwrap();
        while report.problems().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(report.problems()[0].cause.contains("what it held stays in force"));
        fs::rename(bench.path(".away"), &inner).unwrap();
        while !report.problems().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    task.abort();
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_a_clear_error() {
    let missing = tempfile::tempdir().unwrap().path().join("none");
    let error = load(&missing).unwrap_err().to_string();
    assert!(error.contains("none: the folder of manifests cannot be read") && error.contains("make it"), "{error}");
    let settings = MeshSettings { trust_domain: "cluster.local".parse().unwrap(), cluster_cidrs: Vec::new() };
    assert!(run(missing, Arc::new(Model::new(settings)), Report::new()).await.is_err());
}

#[test]
fn a_folder_is_loaded_once_as_it_stands() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), node("z0") + "---\nkind: [\n").unwrap();
    fs::write(dir.path().join("ignored.txt"), "kind: [").unwrap();
    fs::write(dir.path().join("b.yml"), "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}").unwrap();
    let loaded = load(dir.path()).unwrap();
    assert_eq!((loaded.objects, loaded.ignored, loaded.problems.len(), loaded.deltas.len()), (1, 1, 1, 1));
    assert!(loaded.problems[0].to_string().contains("a.yaml:"), "{}", loaded.problems[0]);
}
