//! `--stay`: everything goes on, and a person looks around.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;

use selvedge_lab::{Namespace, World};

use crate::demo::Stage;
use crate::style::{bold, dim};

/// Prints what to type, and waits for a signal.
pub fn stay(stage: &Stage, world: &World, binary: &Path) -> ! {
    let pods = stage.pods.values().map(|pod| (pod.full_name(), pod.network()));
    let nodes = stage.lab.nodes().iter().map(|node| (node.name().to_owned(), &**node));
    for (name, namespace) in pods.chain(nodes) {
        if let Err(error) = name_namespace(&name, namespace) {
            eprintln!("{name} cannot be entered by its name: {error}");
        }
    }
    let user = if world.user_namespace { " --user --preserve-credentials" } else { "" };
    let enter = format!("nsenter --target {}{user} --mount --pid", world.pid);
    let (binary, manifests) = (binary.display(), stage.lab.manifests().display());
    println!("\n{} In another terminal, for a command inside a pod or on a node:\n", bold("Everything goes on."));
    println!("  lab() {{ {enter} nsenter --net={NAMES}/\"$1\" \"${{@:2}}\"; }}\n");
    let service = stage.services.get("shop/catalog").map_or("", String::as_str);
    let try_this = [
        ("a call that is allowed", format!("lab shop/web curl -s http://{service}/hello")),
        ("and one that is not", format!("lab shop/reports curl -sv http://{service}/hello")),
        ("why", format!("{binary} explain --manifests {manifests} shop/reports shop/catalog --port 8080")),
        ("change that: save this file, ask again", format!("$EDITOR {manifests}/50-policies.yaml")),
        ("what is captured, and how", format!("lab node-1 {binary} capture show")),
        ("what the agent counts", "lab node-1 curl -s http://127.0.0.1:15020/metrics".to_owned()),
        ("what the agent knows", "lab node-1 curl -s http://127.0.0.1:15000/dump".to_owned()),
        ("what crosses the link", "lab node-1 tcpdump -ni eth0 -A tcp".to_owned()),
    ];
    for (what, command) in try_this {
        println!("  {}\n  {command}\n", dim(format!("# {what}")));
    }
    println!("Ctrl-C ends it all.");
    loop {
        thread::park();
    }
}

fn name_namespace(name: &str, namespace: &Namespace) -> std::io::Result<()> {
    let link = Path::new(NAMES).join(name);
    if let Some(folder) = link.parent() {
        fs::create_dir_all(folder)?;
    }
    symlink(namespace.path(), link)
}

const NAMES: &str = "/run/lab";
