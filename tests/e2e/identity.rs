//! The CA: who gets which certificate, how the root comes to be, and how it is replaced.
//!
//! Each test has a controller of its own, in its own namespace, and asks it with the tokens of agents: pods of a
//! DaemonSet that bears the agent's name.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;

use crate::cluster::{get, kubectl, run_on, test_image};
use crate::controller::{AUDIENCE, Ca, account_and_pod, pod_of, restore, two_nodes};
use crate::scene::{BOUND, Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("ca: a node gets certificates of its own pods and of no others", own_pods_only),
        trial("ca: a pod younger than the watch gets its certificate at once", new_pod_at_once),
        trial("ca: a mirror pod, which has no service account, proves nobody", mirror_pod),
        trial("ca: tokens that are no agent's are refused", foreign_tokens),
        trial("ca: two replicas that start at once make one root", one_root),
        trial("ca: a Secret without its ConfigMap, and the other way round, is an alarm", half_is_alarm),
        trial("ca: an own root is taken as cert-manager writes it", own_root),
    ]
}

fn own_pods_only(scene: &Scene) -> Result<()> {
    let ca = Ca::open(scene, 1)?;
    let [first, second] = two_nodes()?;
    scene.apply(&account_and_pod("cart", &first))?;
    scene.apply(&account_and_pod("till", &second))?;
    scene.wait_for("condition=Ready", "cart")?;
    scene.wait_for("condition=Ready", "till")?;
    let stolen = ca.agent_token(&first)?;
    let signed = ca.ask(&stolen, "cart", "own")?;
    ensure!(signed["identity"] == ca.identity("cart"), "it signed {signed}");
    let refused = ca.refusal(&stolen, "till", "others")?;
    ensure!(refused.contains(&format!("no live pod on {first} runs as")), "{refused}");
    // An account as which nobody runs.
    kubectl(&["create", "serviceaccount", "idle", "--namespace", &scene.namespace])?;
    let refused = ca.refusal(&stolen, "idle", "idle-account")?;
    ensure!(refused.contains(&format!("no live pod on {first} runs as")), "{refused}");
    // The other node's agent gets it.
    ca.ask(&ca.agent_token(&second)?, "till", "rightful")?;
    let metrics = ca.metrics()?;
    ensure!(metrics.contains(r#"selvedge_ca_requests_total{outcome="denied"} 2"#), "not counted: {metrics}");
    ca.says("No certificate was signed")
}

fn new_pod_at_once(scene: &Scene) -> Result<()> {
    let ca = Ca::open(scene, 1)?;
    let [first, _] = two_nodes()?;
    let token = ca.agent_token(&first)?;
    // Asked in the moment after the pod was made, again and again: each is a race that the watch may lose.
    for number in 0..5 {
        let name = format!("young-{number}");
        scene.apply(&account_and_pod(&name, &first))?;
        ca.ask(&token, &name, &format!("asks-{number}"))?;
    }
    Ok(())
}

fn mirror_pod(scene: &Scene) -> Result<()> {
    let ca = Ca::open(scene, 1)?;
    let [first, _] = two_nodes()?;
    let token = ca.agent_token(&first)?;
    let manifest = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: mirrored, namespace: {}}}\nspec:\n  \
         hostNetwork: true\n  containers:\n  - {{name: main, image: \"{}\", imagePullPolicy: Never, args: [pause]}}\n",
        scene.namespace,
        test_image()?
    );
    let path = format!("/etc/kubernetes/manifests/{}.yaml", scene.namespace);
    let script = format!("mkdir -p /etc/kubernetes/manifests && printf '%s' '{manifest}' > {path}");
    run_on(&first, &["sh", "-c", &script])?;
    let mirrored = format!("mirrored-{first}");
    let there = || get(&["--namespace", &scene.namespace, "pod", &mirrored]).ok();
    let pod = eventually("the mirror pod is there", BOUND, there);
    let refused = pod.and_then(|pod| {
        ensure!(pod["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_string(), "no mirror: {pod}");
        ca.refusal(&token, "default", "mirror")
    });
    let _ = run_on(&first, &["rm", "-f", &path]);
    ensure!(refused?.contains("no live pod on"), "a mirror pod proved an identity");
    Ok(())
}

fn foreign_tokens(scene: &Scene) -> Result<()> {
    let ca = Ca::open(scene, 1)?;
    let [first, _] = two_nodes()?;
    scene.apply(&account_and_pod("cart", &first))?;
    scene.wait_for("condition=Ready", "cart")?;
    let namespace = &scene.namespace;
    let create = |arguments: &[&str]| kubectl(&[&["create", "token", "--namespace", namespace], arguments].concat());
    let agent = ca.agent_pod(&first)?;
    let to_pod = ["--bound-object-kind", "Pod", "--bound-object-name"];
    for (what, token, wanted) in [
        ("made-up", "made.up.token".to_owned(), "does not accept the token"),
        ("audience", create(&[&["selvedge-agent"], &to_pod[..], &[&agent]].concat())?, "does not accept the token"),
        ("unbound", create(&["selvedge-agent", "--audience", AUDIENCE])?, "bound to no pod on a node"),
        (
            "workload",
            create(&[&["cart", "--audience", AUDIENCE], &to_pod[..], &["cart"]].concat())?,
            "only system:serviceaccount",
        ),
    ] {
        let refused = ca.refusal(token.trim(), "cart", what)?;
        ensure!(refused.contains(wanted), "{what}: {refused}");
    }
    // A pod that runs as the agent, and is none.
    scene.apply(&pod_of("impostor", "selvedge-agent", &first)?)?;
    scene.wait_for("condition=Ready", "impostor")?;
    let token = create(&[&["selvedge-agent", "--audience", AUDIENCE], &to_pod[..], &["impostor"]].concat())?;
    let refused = ca.refusal(token.trim(), "cart", "of-no-daemon-set")?;
    ensure!(refused.contains("it is not one of DaemonSet"), "{refused}");
    Ok(())
}

fn one_root(scene: &Scene) -> Result<()> {
    // Four, so that the race is a race.
    let ca = Ca::open(scene, 4)?;
    let logs = ca.logs()?;
    ensure!(logs.matches("Made a new root").count() == 1, "not one root was made: {logs}");
    ensure!(logs.matches("Made the trust bundle").count() == 1, "not one bundle was made: {logs}");
    ca.says("This replica leads.")?;
    let leaders = ca.logs()?.matches("This replica leads.").count();
    ensure!(leaders == 1, "{leaders} replicas lead");
    let bundle = ca.bundle()?;
    ensure!(bundle.matches("BEGIN CERTIFICATE").count() == 1, "{bundle}");
    Ok(())
}

fn half_is_alarm(scene: &Scene) -> Result<()> {
    let ca = Ca::open(scene, 1)?;
    let namespace = &scene.namespace;
    let bundle = get(&["--namespace", namespace, "configmap", "selvedge-trust-bundle"])?;
    kubectl(&["delete", "--namespace", namespace, "configmap", "selvedge-trust-bundle"])?;
    ca.wait_until_not_ready()?;
    ca.says("had been made of it, is not")?;
    ensure!(ca.metrics()?.contains(r#"selvedge_ca_alarm{reason="bundle-missing"} 1"#), "{}", ca.metrics()?);
    // A new controller makes none either.
    ca.restart()?;
    ca.says("had been made of it, is not")?;
    restore(namespace, &bundle)?;
    ca.wait_until_ready()?;
    let secret = get(&["--namespace", namespace, "secret", "selvedge-ca"])?;
    kubectl(&["delete", "--namespace", namespace, "secret", "selvedge-ca"])?;
    ca.wait_until_not_ready()?;
    ca.restart()?;
    ca.says("is there and Secret selvedge-ca is not")?;
    let there = kubectl(&["get", "secrets", "--namespace", namespace, "--output", "name"])?;
    ensure!(!there.contains("selvedge-ca"), "a root was made up: {there}");
    restore(namespace, &secret)?;
    ca.wait_until_ready()?;
    let after = get(&["--namespace", namespace, "configmap", "selvedge-trust-bundle"])?;
    ensure!(after["data"] == bundle["data"], "the bundle is another");
    Ok(())
}

fn own_root(scene: &Scene) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let openssl = |script: &str| -> Result<()> {
        let output = std::process::Command::new("sh").args(["-ec", script]).current_dir(dir.path()).output()?;
        ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    // An RSA root and an intermediate with its key in the old form, as cert-manager writes it by default.
    openssl(
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout root.key -out root.crt -days 30 -subj '/CN=own root' \
           -addext 'basicConstraints=critical,CA:TRUE' -addext 'keyUsage=critical,keyCertSign'\n\
         openssl ecparam -name prime256v1 -genkey -noout -out tls.key\n\
         openssl req -new -key tls.key -subj '/CN=own intermediate' -out tls.csr\n\
         printf 'basicConstraints=critical,CA:TRUE\\nkeyUsage=critical,keyCertSign\\n' > ext\n\
         openssl x509 -req -in tls.csr -CA root.crt -CAkey root.key -CAcreateserial -days 20 -extfile ext -out tls.crt\n",
    )?;
    let file = |key: &str, name: &str| format!("--from-file={key}={}", dir.path().join(name).display());
    kubectl(&[
        "create",
        "secret",
        "generic",
        "selvedge-ca",
        "--namespace",
        &scene.namespace,
        "--type=kubernetes.io/tls",
        &file("tls.crt", "tls.crt"),
        &file("tls.key", "tls.key"),
        &file("ca.crt", "root.crt"),
    ])?;
    let ca = Ca::open(scene, 2)?;
    ensure!(ca.bundle()?.trim() == std::fs::read_to_string(dir.path().join("root.crt"))?.trim(), "another root");
    let [first, _] = two_nodes()?;
    scene.apply(&account_and_pod("cart", &first))?;
    let signed = ca.ask(&ca.agent_token(&first)?, "cart", "own-root")?;
    ensure!(signed["issuer"] == "CN=own intermediate", "{signed}");
    Ok(())
}
