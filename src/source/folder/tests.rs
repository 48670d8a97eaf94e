use proptest::prelude::*;

use super::*;
use crate::authorizer;
use crate::mesh::{self, Object};
use crate::policy::{self, PolicyObject, Selection};
use crate::route::{self, traffic};

/// A folder whose clock and files the test holds.
struct Bench {
    folder: Folder,
    now: Instant,
    files: BTreeMap<&'static str, (u64, String)>,
    writes: u64,
    objects: BTreeSet<String>,
    problems: Vec<String>,
    synced: bool,
    /// Every object that was ever deleted.
    deleted: Vec<String>,
}

impl Bench {
    fn new() -> Self {
        Self {
            folder: Folder::default(),
            now: Instant::now(),
            files: BTreeMap::new(),
            writes: 0,
            objects: BTreeSet::new(),
            problems: Vec::new(),
            synced: false,
            deleted: Vec::new(),
        }
    }

    fn write(&mut self, name: &'static str, text: impl Into<String>) {
        self.writes += 1;
        self.files.insert(name, (self.writes, text.into()));
        self.look();
    }

    fn remove(&mut self, name: &'static str) {
        self.files.remove(name);
        self.look();
    }

    fn wait(&mut self, millis: u64) {
        for _ in 0..millis / 20 {
            self.now += Duration::from_millis(20);
            self.look();
        }
    }

    fn look(&mut self) {
        let stamp = |inode: u64| Stamp { inode, ..Stamp::default() };
        let seen = |(name, (inode, _)): (&&str, &(u64, String))| Seen {
            path: PathBuf::from(*name),
            stamp: stamp(*inode),
            age: Duration::ZERO,
        };
        let scan = Scan { files: self.files.iter().map(seen).collect(), ..Scan::default() };
        self.folder.scan(scan, self.now);
        for (path, stamp) in self.folder.due(self.now) {
            let text = &self.files[path.to_str().unwrap()].1;
            self.folder.read(&path, stamp, Ok(text.as_bytes()), self.now);
        }
        let step = self.folder.settle(self.now);
        for delta in step.deltas {
            match delta {
                Delta::Mesh(mesh::Delta::Apply(object)) => drop(self.objects.insert(label(&object))),
                Delta::Mesh(mesh::Delta::Delete(object)) => {
                    self.objects.retain(|other| !other.starts_with(&format!("{}=", object.name.name)));
                    self.deleted.push(object.name.name.to_string());
                }
                Delta::Policy(policy::Delta::Apply(object)) => {
                    let state = match &object {
                        PolicyObject::Malformed(policy) if matches!(policy.scope.selection, Selection::Services(_)) => {
                            "denies endpoints"
                        }
                        PolicyObject::Malformed(_) => "denies",
                        PolicyObject::Authorization(policy) if policy.opaque => "closed",
                        _ => "",
                    };
                    let name = object.reference().name.name;
                    self.objects.retain(|other| !other.starts_with(&format!("{name}=")));
                    self.objects.insert(format!("{name}={state}"));
                }
                Delta::Policy(policy::Delta::Delete(reference)) => {
                    self.objects.retain(|other| !other.starts_with(&format!("{}=", reference.name.name)));
                    self.deleted.push(reference.name.name.to_string());
                }
                Delta::Authorizer(authorizer::Delta::Apply(authorizer)) => {
                    self.objects.insert(format!("{}=authorizer", authorizer.name.name));
                }
                Delta::Authorizer(authorizer::Delta::Delete(name)) => {
                    self.objects.retain(|other| !other.starts_with(&format!("{}=", name.name)));
                    self.deleted.push(name.name.to_string());
                }
                Delta::Route(route::Delta::Apply(route)) => {
                    self.objects.insert(format!("{}=route", route.name.name));
                }
                Delta::Traffic(traffic::Delta::Apply(policy)) => {
                    self.objects.insert(format!("{}=traffic", policy.name.name.name));
                }
                Delta::Traffic(traffic::Delta::Delete(reference)) => {
                    self.objects.retain(|other| !other.starts_with(&format!("{}=", reference.name.name)));
                    self.deleted.push(reference.name.name.to_string());
                }
                Delta::Route(route::Delta::Delete(reference)) => {
                    self.objects.retain(|other| !other.starts_with(&format!("{}=", reference.name.name)));
                    self.deleted.push(reference.name.name.to_string());
                }
            }
        }
        self.problems = step.problems.iter().map(Problem::to_string).collect();
        self.synced = step.synced;
    }

    fn objects(&self) -> Vec<&str> {
        self.objects.iter().map(String::as_str).collect()
    }
}

fn label(object: &Object) -> String {
    format!("{}=", object.reference().name.name)
}

fn namespaces(names: &[&str]) -> String {
    names.iter().map(|name| format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n")).collect()
}

#[test]
fn a_whole_file_counts_after_the_quiet_time_and_syncs() {
    let mut bench = Bench::new();
    bench.write("a.yaml", namespaces(&["a", "b"]));
    assert!(bench.objects.is_empty() && !bench.synced);
    bench.wait(100);
    assert_eq!(bench.objects(), ["a=", "b="]);
    assert!(bench.synced);
}

#[test]
fn an_empty_folder_is_synced_at_once() {
    let mut bench = Bench::new();
    bench.look();
    assert!(bench.synced);
}

#[test]
fn a_pod_copied_with_its_uid_puts_nobody_out_of_the_mesh() {
    let pod = |name: &str| format!("---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, uid: u-1}}\n");
    let mut bench = Bench::new();
    bench.write("b.yaml", pod("b"));
    bench.wait(200);
    bench.write("a.yaml", pod("a"));
    bench.wait(200);
    assert_eq!(bench.objects(), ["b="], "whoever is in force stays");
    assert!(
        bench.problems[0].starts_with("a.yaml:4: Pod default/a: metadata.uid: Pod default/b has this UID"),
        "{:?}",
        bench.problems
    );
    bench.remove("b.yaml");
    bench.wait(600);
    assert_eq!(bench.objects(), ["a="]);
    assert!(bench.problems.is_empty());
}

#[test]
fn emptied_cut_short_or_gone_for_a_moment_deletes_nothing() {
    let mut bench = Bench::new();
    bench.write("a.yaml", namespaces(&["a", "b"]));
    bench.wait(200);
    for moment in ["", "# soon\n", "apiVersion: v1\nkind: Names", &namespaces(&["a"]), "kind: [\n"] {
        bench.write("a.yaml", moment);
        bench.wait(300);
        bench.write("a.yaml", namespaces(&["a", "b"]));
        bench.wait(300);
    }
    bench.remove("a.yaml");
    bench.wait(300);
    bench.write("a.yaml", namespaces(&["a", "b"]));
    bench.wait(600);
    assert_eq!(bench.deleted, [""; 0]);
    assert_eq!(bench.problems, [""; 0]);
}

#[test]
fn a_real_deletion_counts_within_a_second() {
    let mut bench = Bench::new();
    bench.write("a.yaml", namespaces(&["a", "b"]));
    bench.write("b.yaml", namespaces(&["c"]));
    bench.wait(200);
    bench.write("a.yaml", namespaces(&["b"]));
    bench.remove("b.yaml");
    bench.wait(500);
    assert_eq!(bench.objects(), ["b="]);
}

#[test]
fn a_broken_object_keeps_its_last_good_version_until_it_is_mended_or_removed() {
    let mut bench = Bench::new();
    bench.write("a.yaml", namespaces(&["a", "b"]));
    bench.wait(200);
    bench
        .write("a.yaml", namespaces(&["a"]) + "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: b, labels: 3}\n");
    bench.wait(600);
    assert_eq!(bench.objects(), ["a=", "b="]);
    assert!(bench.problems[0].contains("Namespace b: metadata.labels: ") && bench.problems[0].contains("last good"));
    bench.write("a.yaml", namespaces(&["a"]) + "---\nkind: [\n");
    bench.wait(600);
    assert_eq!(bench.objects(), ["a=", "b="], "what is not YAML may hold anything that the file held");
    bench.write("a.yaml", namespaces(&["a"]));
    bench.wait(600);
    assert_eq!(bench.objects(), ["a="]);
    assert_eq!(bench.problems, [""; 0]);
}

#[test]
fn a_policy_without_a_last_good_version_denies_and_one_with_it_stays() {
    let policy = |rest: &str| {
        format!("apiVersion: selvedge.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n{rest}")
    };
    let mut bench = Bench::new();
    for broken in ["spec: {action: PERHAPS}\n", "spec: [\n"] {
        bench.write("a.yaml", policy(broken));
        bench.wait(600);
        assert_eq!(bench.objects(), ["p=denies"], "{:?}", bench.problems);
        assert!(bench.problems[0].contains("it denies what it might stand over"), "{:?}", bench.problems);
    }
    bench.write("a.yaml", policy("spec: {action: ALLOW, rules: [{}]}\n"));
    bench.wait(600);
    assert_eq!(bench.objects(), ["p="], "{:?}", bench.problems);
    bench.write("a.yaml", policy("spec: {action: PERHAPS}\n"));
    bench.wait(600);
    assert_eq!(bench.objects(), ["p="]);
    bench.remove("a.yaml");
    bench.wait(600);
    assert!(bench.objects.is_empty() && bench.problems.is_empty());
}

#[test]
fn a_policy_over_a_service_that_is_not_there_fails_closed_until_it_is() {
    let service = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{clusterIP: None}}\n"
        )
    };
    let policy = "apiVersion: selvedge.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n  namespace: shop\n\
                  spec:\n  targetRefs:\n  - {kind: Service, name: cart}\n  - kind: Service\n    name: web\n  rules: [{}]\n";
    let problem = "p.yaml:10: AuthorizationPolicy shop/p: spec.targetRefs[1].name: there is no Service shop/web";
    let mut bench = Bench::new();
    bench.write("p.yaml", policy);
    bench.write("cart.yaml", service("cart"));
    bench.wait(600);
    assert_eq!(bench.objects(), ["cart=", "p=closed"]);
    assert!(bench.problems.len() == 1 && bench.problems[0].starts_with(problem), "{:?}", bench.problems);
    bench.write("web.yaml", service("web"));
    bench.wait(600);
    assert_eq!((bench.objects(), &bench.problems), (vec!["cart=", "p=", "web="], &vec![]), "it heals");
    bench.write("p.yaml", "apiVersion: selvedge.dev/v1alpha1\nkind: [\n");
    bench.remove("web.yaml");
    bench.wait(600);
    assert_eq!(bench.objects(), ["cart=", "p=closed"], "the last good version fails closed too");
    assert_eq!(bench.problems.len(), 2, "{:?}", bench.problems);
    bench.write("web.yaml", service("web"));
    bench.wait(600);
    assert_eq!(bench.objects(), ["cart=", "p=", "web="]);
    bench.write("p.yaml", policy.replace("rules: [{}]", "rules: 7").replace("name: p\n", "name: q\n"));
    bench.remove("web.yaml");
    bench.wait(600);
    assert_eq!(bench.objects(), ["cart=", "q=denies"], "one that is malformed too denies in all of its namespace");
}

#[test]
fn a_policy_without_a_name_denies_in_its_namespace_until_it_has_one() {
    let policy = |metadata: &str| {
        format!(
            "apiVersion: selvedge.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {metadata}\nspec: {{rules: [{{}}]}}\n"
        )
    };
    let mut bench = Bench::new();
    for (metadata, key, said) in [
        ("{namespace: shop}", "shop/(unnamed in a.yaml:", "metadata.name: every object needs a name"),
        ("{namespace: shop, name: [a]}", "shop/(unnamed in a.yaml:", "metadata.name: every object needs a name"),
        ("{namespace: shop, name: ''}", "shop/(unnamed in a.yaml:", "metadata.name: every object needs a name"),
        ("{namespace: 7}", "7/(unnamed in a.yaml:", "metadata.name: every object needs a name"),
        ("a", "default/(unnamed in a.yaml:", "metadata: it is no object"),
        ("", "default/(unnamed in a.yaml:", "metadata.name: every object needs a name"),
        ("{namespace: shop, name: 7}", "shop/7", "metadata.name: the number 7 is not text"),
        ("{namespace: [a], name: p}", "default/p", "metadata.namespace: a list is not text"),
        ("{namespace: 12, name: p}", "12/p", "metadata.namespace: the number 12 is not text"),
        ("{namespace: shop, name: p, annotations: 3}", "shop/p", "metadata.annotations: the number 3"),
    ] {
        bench.write("a.yaml", policy(metadata));
        bench.wait(600);
        let [object] = bench.objects()[..] else { panic!("{metadata}: {:?}", bench.objects) };
        assert!(object.ends_with("=denies"), "{metadata}: {object}");
        let [problem] = &bench.problems[..] else { panic!("{metadata}: {:?}", bench.problems) };
        assert!(
            problem.starts_with("a.yaml:") && problem.contains(&format!(": AuthorizationPolicy {key}")),
            "{problem}"
        );
        assert!(problem.contains(said) && problem.ends_with("it denies what it might stand over"), "{problem}");
        bench.remove("a.yaml");
        bench.wait(600);
        assert!(bench.objects.is_empty() && bench.problems.is_empty());
    }
    bench.write("a.yaml", policy("{namespace: shop, name: p}"));
    bench.wait(600);
    bench.write("a.yaml", policy("{namespace: shop}"));
    bench.wait(600);
    assert_eq!(bench.objects(), ["p="], "the last good version of it stays");
    assert!(bench.problems[0].ends_with("what its file held before stays in force"), "{:?}", bench.problems);
    bench.write("a.yaml", policy("{namespace: shop}") + "---\n" + &policy("{namespace: shop}"));
    bench.wait(600);
    assert_eq!(bench.objects().len(), 3, "of two without a name one at least is new: {:?}", bench.objects);
    bench.write("a.yaml", "# a line more\n".to_owned() + &policy("{namespace: shop, name: q}"));
    bench.wait(600);
    assert_eq!((bench.objects(), &bench.problems), (vec!["q="], &vec![]));
}

#[test]
fn of_two_with_one_name_the_first_wins_and_both_places_are_named() {
    let mut bench = Bench::new();
    bench.write("b.yaml", namespaces(&["a"]));
    bench.write("a.yaml", namespaces(&["x", "a"]));
    bench.wait(200);
    assert!(bench.problems[0].starts_with("b.yaml:4: Namespace a: ") && bench.problems[0].contains("a.yaml:8"));
    bench.remove("a.yaml");
    bench.wait(600);
    assert_eq!(bench.objects(), ["a="]);
    assert_eq!(bench.problems, [""; 0]);
}

#[test]
fn an_object_moves_between_files_without_a_gap_or_a_complaint() {
    let mut bench = Bench::new();
    bench.write("a.yaml", namespaces(&["a", "b"]));
    bench.wait(200);
    bench.write("a.yaml", namespaces(&["a"]));
    bench.write("b.yaml", namespaces(&["b"]));
    for _ in 0..40 {
        bench.wait(20);
        // Until the shorter file has been read, nobody can know that the object is on its way.
        assert_eq!(bench.problems, [""; 0]);
    }
    assert_eq!(bench.deleted, [""; 0]);
    assert_eq!(bench.objects(), ["a=", "b="]);
}

#[test]
fn what_lay_there_before_the_start_is_read_at_once() {
    let mut folder = Folder::default();
    let now = Instant::now();
    let stamp = Stamp { inode: 1, ..Stamp::default() };
    let seen = Seen { path: "a.yaml".into(), stamp, age: Duration::from_secs(60) };
    folder.scan(Scan { files: vec![seen], ..Scan::default() }, now);
    folder.read(Path::new("a.yaml"), stamp, Ok(b"kind: [".as_slice()), now);
    assert!(folder.settle(now).synced);
}

#[test]
fn a_file_that_cannot_be_read_holds_up_the_start_and_is_tried_again() {
    let mut folder = Folder::default();
    let now = Instant::now();
    let stamp = Stamp { inode: 1, ..Stamp::default() };
    let seen = Seen { path: "a.yaml".into(), stamp, age: Duration::from_secs(60) };
    folder.scan(Scan { files: vec![seen], ..Scan::default() }, now);
    folder.read(Path::new("a.yaml"), stamp, Err("no".to_owned()), now);
    let step = folder.settle(now);
    assert!(!step.synced && step.problems.len() == 1);
    let later = now + RETRY;
    assert_eq!(folder.due(later).len(), 1);
    folder.read(Path::new("a.yaml"), stamp, Ok(namespaces(&["a"]).as_bytes()), later);
    let step = folder.settle(later);
    assert!(step.synced && step.problems.is_empty() && step.deltas.len() == 1);
}

#[test]
fn services_without_slices_have_the_pods_that_they_select() {
    let pod = |name: &str, ip: &str, port: u16, more: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: cart}}}}\nspec: {{containers: [{{name: \
             m, ports: [{{name: web, containerPort: {port}}}]}}]}}\nstatus: {{podIP: {ip}{more}}}\n"
        )
    };
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec: {clusterIP: 10.96.0.1, selector: \
                   {app: cart}, ports: [{port: 80, targetPort: web}]}\n";
    let mut bench = Bench::new();
    let unready = ", conditions: [{type: Ready, status: 'False'}]";
    bench.write("a.yaml", service.to_owned() + &pod("a", "10.0.0.1", 8080, "") + &pod("b", "10.0.0.2", 8081, unready));
    bench.wait(200);
    assert_eq!(bench.objects(), ["a=", "b=", "cart/ipv4/8080=", "cart/ipv4/8081=", "cart="]);
    let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s, labels: \
                 {kubernetes.io/service-name: cart}}\naddressType: IPv4\n";
    bench.write("b.yaml", slice);
    bench.wait(200);
    assert_eq!(bench.objects(), ["a=", "b=", "cart=", "s="], "an EndpointSlice of the folder stands alone");
}

proptest! {
    /// However an editor goes about it, in the end the model has what the files say, and what every version had was
    /// never deleted.
    #[test]
    fn saves_of_any_manner_end_in_what_the_files_say(
        saves in prop::collection::vec((0usize..2, 0u8..6, prop::collection::vec(1usize..4, 0..3), 0u64..300), 1..12),
    ) {
        const NAMES: [&str; 5] = ["keep0", "b", "c", "d", "keep1"];
        const FILES: [&str; 2] = ["a.yaml", "b.yaml"];
        let mut bench = Bench::new();
        let text = |file: usize, names: &[usize]| {
            namespaces(&[&[NAMES[file * 4]][..], &names.iter().map(|n| NAMES[*n]).collect::<Vec<_>>()].concat())
        };
        bench.write(FILES[0], text(0, &[]));
        bench.write(FILES[1], text(1, &[]));
        bench.wait(600);
        let mut last = [text(0, &[]), text(1, &[])];
        for (file, manner, names, pause) in saves {
            let full = text(file, &names);
            match manner {
                0 => {}
                1 => bench.write(FILES[file], ""),
                2 => bench.remove(FILES[file]),
                3 => bench.write(FILES[file], &full[..full.len() / 2]),
                4 => bench.write(FILES[file], &full[..full.len() - 1]),
                _ => { bench.remove(FILES[file]); bench.wait(100); bench.write(FILES[file], "# t\n"); }
            }
            bench.wait(pause.min(280));
            bench.write(FILES[file], full.clone());
            bench.wait(pause);
            last[file] = full;
        }
        bench.wait(700);
        let wanted: BTreeSet<_> = last.iter().flat_map(|text| decode::file(Path::new("x"), text.as_bytes()).objects)
            .map(|found| format!("{}=", found.key.name.name)).collect();
        prop_assert_eq!(&bench.objects, &wanted);
        prop_assert!(!bench.deleted.iter().any(|name| name.starts_with("keep")), "{:?}", bench.deleted);
    }
}
