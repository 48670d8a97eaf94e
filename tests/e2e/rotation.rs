//! The root is replaced by one command, in phases that outlive the controller, and nobody is ever without a certificate.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge::identity::{certificates_from_pem, hash_of};
use selvedge_lab::eventually;

use crate::cluster::{agent_image, apply, get, kubectl, selvedge};
use crate::controller::{Ca, account_and_pod, two_nodes};
use crate::mesh::{STRICT, SYSTEM, install as install_mesh, join, roll_out, set_lifetime, uninstall, wait_captured};
use crate::policies::install;
use crate::scene::{BOUND, Scene, trial_alone};
use crate::traffic::under_load;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_alone("ca: the root is rotated through all phases, with the controller killed in each", rotated),
        trial_alone("ca: the root of a mesh is rotated by one command under load without a failed request", under_way),
    ]
}

fn rotated(scene: &Scene) -> Result<()> {
    install()?;
    // Agents that trust another root would be waited for.
    uninstall()?;
    // The old root goes a minute after the last certificate under it.
    let ca = Ca::open_with(scene, 2, "1s")?;
    let [first, _] = two_nodes()?;
    scene.apply(&account_and_pod("cart", &first))?;
    let token = ca.agent_token(&first)?;
    let mut asked = 0;
    let mut ask = || -> Result<String> {
        asked += 1;
        let signed = ca.ask(&token, "cart", &format!("asks-{asked}"))?;
        Ok(signed["issuer"].as_str().context("no issuer")?.to_owned())
    };
    let node = MeshNode { name: scene.namespace.clone() };
    node.tell(&ca.bundle()?)?;
    let old = ask()?;

    scene.apply(&command(&scene.namespace)?)?;
    let both = || ca.bundle().ok().filter(|bundle| bundle.matches("BEGIN CERTIFICATE").count() == 2);
    let both = eventually("the new root stands beside the old one", BOUND, both)?;
    ensure!(ask()? == old, "the new root signs, and a node does not hold it");
    ca.restart()?;
    ca.wait_until_ready()?;
    ensure!(ask()? == old, "a controller that was killed signs by the new root, and a node does not hold it");

    node.tell(&both)?;
    let new = || ask().ok().filter(|issuer| *issuer != old);
    let new = eventually("the new root signs", BOUND, new)?;
    ca.restart()?;
    ca.wait_until_ready()?;
    ensure!(ask()? == new, "a controller that was killed went back to the old root");
    ensure!(ca.bundle()? == both, "the old root went too early");

    let one = || ca.bundle().ok().filter(|bundle| bundle.matches("BEGIN CERTIFICATE").count() == 1);
    let one = eventually("the old root is gone", BOUND, one)?;
    ensure!(both.contains(one.trim()) && ask()? == new, "another root than the new one stays");
    let forgotten = || {
        let secret = get(&["--namespace", &scene.namespace, "secret", "selvedge-ca"]).ok()?;
        secret["data"]["previous.key"].is_null().then_some(())
    };
    eventually("the old root's key is gone", BOUND, forgotten)?;
    scene.wait_for("jsonpath={.status.phase}=Succeeded", "rotates")?;
    let said = scene.logs("rotates")?;
    let phases = ["asked for a new root", "introducing", "retiring", "stable"];
    ensure!(phases.iter().all(|phase| said.contains(phase)), "the command said {said}");
    Ok(())
}

fn under_way(scene: &Scene) -> Result<()> {
    install_mesh()?;
    // The old root goes a minute after the last certificate under it.
    set_lifetime("=30s")?;
    let result = roll_out().and_then(|()| rotated_under_load(scene));
    set_lifetime("-")?;
    roll_out()?;
    result
}

fn rotated_under_load(scene: &Scene) -> Result<()> {
    let [first, second] = two_nodes()?;
    join(scene, true)?;
    scene.apply(STRICT)?;
    scene.pod("server", &second, &["serve", "http:8080"])?;
    scene.pod("client", &first, &["pause"])?;
    wait_captured(scene, "server")?;
    wait_captured(scene, "client")?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    let bundle = || -> Result<String> {
        let map = get(&["--namespace", SYSTEM, "configmap", "selvedge-trust-bundle"])?;
        Ok(map["data"]["ca.crt"].as_str().context("no ca.crt")?.to_owned())
    };
    let old = bundle()?;
    let mut said = String::new();
    let told = under_load(scene, "client", &to, || {
        said = selvedge(&["rotate-root", "--to-the-end"])?;
        Ok(())
    })?;
    let new = bundle()?;
    ensure!(new.matches("BEGIN CERTIFICATE").count() == 1 && new != old, "{said}\nleft {new}");
    // Agents that are quick are done with `introducing` between two looks of the command.
    ensure!(["retiring", "stable"].iter().all(|phase| said.contains(phase)), "the command said {said}");
    ensure!(told.failures.is_empty() && told.answered > 100, "{told:?}");
    let certificates = certificates_from_pem(new.as_bytes()).map_err(|error| anyhow::anyhow!("{error}"))?;
    let hash = hash_of(&certificates);
    for node in [first, second] {
        let knows = || (get(&["meshnode", &node]).ok()?["status"]["trustBundleHash"] == hash).then_some(());
        eventually(&format!("{node} trusts the new root alone"), BOUND, knows)?;
    }
    scene.run("client", &["get", &to, "/"]).map(drop)
}

/// What a node's agent says of the bundle that it holds.
struct MeshNode {
    name: String,
}

impl MeshNode {
    /// Written as the agent of that node, for nobody else may.
    fn tell(&self, bundle: &str) -> Result<()> {
        let certificates = certificates_from_pem(bundle.as_bytes()).map_err(|error| anyhow::anyhow!("{error}"))?;
        let Self { name } = self;
        apply(
            "default",
            &format!(
                "apiVersion: rbac.authorization.k8s.io/v1\n\
                 kind: ClusterRole\n\
                 metadata: {{name: {name}-node}}\n\
                 rules: [{{apiGroups: [selvedge.dev], resources: [meshnodes], verbs: [get, create, patch]}}]\n---\n\
                 apiVersion: rbac.authorization.k8s.io/v1\n\
                 kind: ClusterRoleBinding\n\
                 metadata: {{name: {name}-node}}\n\
                 roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {name}-node}}\n\
                 subjects: [{{kind: ServiceAccount, name: selvedge-agent, namespace: selvedge-system}}]\n"
            ),
        )?;
        let object = format!(
            "apiVersion: selvedge.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {name}}}\n\
             status: {{trustBundleHash: {}}}\n",
            hash_of(&certificates)
        );
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("node.yaml");
        std::fs::write(&file, object)?;
        let extra = format!("--as-user-extra=authentication.kubernetes.io/node-name={name}");
        kubectl(&[
            "apply",
            "--server-side",
            "--field-manager=selvedge-agent",
            "--as=system:serviceaccount:selvedge-system:selvedge-agent",
            &extra,
            "--filename",
            &file.to_string_lossy(),
        ])
        .map(drop)
    }
}

impl Drop for MeshNode {
    fn drop(&mut self) {
        let role = format!("{}-node", self.name);
        let _ = kubectl(&["delete", "meshnode", &self.name, "--ignore-not-found"]);
        let _ = kubectl(&["delete", "clusterrolebinding,clusterrole", &role, "--ignore-not-found"]);
    }
}

/// `selvedge rotate-root`, by somebody who may.
fn command(namespace: &str) -> Result<String> {
    Ok(format!(
        "apiVersion: v1\n\
         kind: Pod\n\
         metadata: {{name: rotates}}\n\
         spec:\n  \
           restartPolicy: Never\n  \
           serviceAccountName: selvedge-controller\n  \
           containers:\n  \
           - name: main\n    \
             image: \"{}\"\n    \
             imagePullPolicy: Never\n    \
             args: [rotate-root, --namespace, {namespace}, --to-the-end]\n",
        agent_image()?
    ))
}
