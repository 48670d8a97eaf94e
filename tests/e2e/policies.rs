//! What `kubectl apply` refuses of our own kinds, in words that name the cure.

use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;

use crate::cluster::{apply, get, kubectl, nodes, test_image};
use crate::scene::{BOUND, Scene, trial, trial_alone};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a misspelt field of a policy is refused by its name", refuses_misspelt),
        trial("entries of a policy that say nothing are refused", refuses_empty),
        trial("what a schema can judge is refused with its cure", refuses_malformed),
        trial("a policy that is right is taken with all its fields", takes_right),
        trial("a policy is shown by its short name and its category", shows_policies),
        trial_alone("a stolen agent token of one node writes no other node's MeshNode", guards_mesh_nodes),
    ]
}

fn refuses_misspelt(scene: &Scene) -> Result<()> {
    install()?;
    for (kind, spec, wanted) in [
        (
            "AuthorizationPolicy",
            "{selektor: {matchLabels: {app: a}}}",
            "spec has no field selektor; correct the spelling",
        ),
        (
            "AuthorizationPolicy",
            "{rules: [{from: [{source: {namespaces: [a]}}], form: []}]}",
            "spec.rules[] has no field form",
        ),
        (
            "AuthorizationPolicy",
            "{rules: [{from: [{source: {namespaces: [a], principal: [b]}}]}]}",
            "spec.rules[].from[].source has no field principal;",
        ),
        (
            "AuthorizationPolicy",
            "{rules: [{to: [{operation: {ports: ['80'], port: 80, path: /}}]}]}",
            "spec.rules[].to[].operation has no field",
        ),
        (
            "AuthorizationPolicy",
            "{rules: [{when: [{key: source.ip, values: [10.0.0.1], value: x}]}]}",
            "spec.rules[].when[] has no field value;",
        ),
        ("AuthorizationPolicy", "{selector: {matchLabel: {app: a}}}", "spec.selector has no field matchLabel;"),
        (
            "AuthorizationPolicy",
            "{targetRefs: [{kind: Service, name: a, sectionName: b}]}",
            "spec.targetRefs[] has no field sectionName;",
        ),
        ("PeerAuthentication", "{mtls: {mood: STRICT}}", "spec.mtls has no field mood; correct the spelling"),
        (
            "PeerAuthentication",
            "{portLevelMtls: {'8080': {mode: STRICT, strict: true}}}",
            "spec.portLevelMtls.* has no field strict;",
        ),
    ] {
        refused(scene, kind, spec, wanted)?;
    }
    Ok(())
}

fn refuses_empty(scene: &Scene) -> Result<()> {
    install()?;
    for (rule, wanted) in [
        ("{from: [{}]}", "an entry of from without a source says nothing: give it one"),
        ("{from: [{source: {}}]}", "a source without a field that is known says nothing: give it at least one"),
        ("{to: [{}]}", "an entry of to without an operation says nothing: give it one"),
        ("{to: [{operation: {}}]}", "an operation without a field that is known says nothing: give it at least one"),
        ("{when: [{key: source.ip}]}", "a condition without values says nothing: give values or notValues"),
    ] {
        refused(scene, "AuthorizationPolicy", &format!("{{rules: [{rule}]}}"), wanted)?;
    }
    for (rule, field) in [
        ("{from: []}", "from"),
        ("{to: []}", "to"),
        ("{when: []}", "when"),
        ("{from: [{source: {namespaces: []}}]}", "from[0].source.namespaces"),
        ("{to: [{operation: {notPorts: []}}]}", "to[0].operation.notPorts"),
    ] {
        let wanted = format!("spec.rules[0].{field}: Invalid value:");
        refused(scene, "AuthorizationPolicy", &format!("{{rules: [{rule}]}}"), &wanted)?;
        let cure = "give it at least one entry, or leave the field out";
        refused(scene, "AuthorizationPolicy", &format!("{{rules: [{rule}]}}"), cure)?;
    }
    Ok(())
}

fn refuses_malformed(scene: &Scene) -> Result<()> {
    install()?;
    for (kind, spec, wanted) in [
        (
            "AuthorizationPolicy",
            "{selector: {matchLabels: {a: b}}, targetRefs: [{kind: Service, name: a}]}",
            "selector and targetRefs exclude each other: split the policy in two",
        ),
        ("AuthorizationPolicy", "{action: PERMIT}", "supported values: \"ALLOW\", \"DENY\""),
        ("AuthorizationPolicy", "{action: CUSTOM}", "action CUSTOM needs a provider: name it"),
        ("PeerAuthentication", "{mtls: {mode: DISABLE}}", "supported values: \"UNSET\", \"STRICT\", \"PERMISSIVE\""),
        ("PeerAuthentication", "{portLevelMtls: {'70000': {mode: STRICT}}}", "a port is a number from 1 to 65535"),
        ("PeerAuthentication", "{portLevelMtls: {}}", "give it at least one entry, or leave the field out"),
        (
            "AuthorizationPolicy",
            "{rules: [{from: [{source: {principals: ['spiffe://cluster.local/ns/shop/sa/web', 'a/ns/b/sa/c']}}]}]}",
            "spec.rules[].from[].source.principals: spiffe://cluster.local/ns/shop/sa/web is not an identity such as \
             cluster.local/ns/shop/sa/web: write it without spiffe://",
        ),
        (
            "AuthorizationPolicy",
            "{rules: [{from: [{source: {notServiceAccounts: ['shop/*']}}]}]}",
            "shop/* is not a service account such as web or shop/web: write namespace/name without a *",
        ),
        (
            "AuthorizationPolicy",
            "{rules: [{from: [{source: {ipBlocks: [everything]}}]}]}",
            "everything is not an address or a range of addresses: write 10.1.2.3, 10.0.0.0/8",
        ),
        (
            "AuthorizationPolicy",
            "{rules: [{to: [{operation: {ports: ['https']}}]}]}",
            "https is not a port: write a number from 1 to 65535 in quotes",
        ),
    ] {
        refused(scene, kind, spec, wanted)?;
    }
    Ok(())
}

fn takes_right(scene: &Scene) -> Result<()> {
    install()?;
    let spec = "{selector: {matchLabels: {app: a}}, action: ALLOW, rules: [{from: [{source: {namespaces: [a], \
                notIpBlocks: [10.0.0.0/8]}}], to: [{operation: {ports: ['80']}}], when: [{key: source.ip, values: [10.1.0.1]}]}]}";
    scene.apply(&policy("AuthorizationPolicy", spec))?;
    let stored = get(&["--namespace", &scene.namespace, "authorizationpolicy", "tried"])?;
    ensure!(stored["spec"]["rules"][0]["from"][0]["source"]["notIpBlocks"][0] == "10.0.0.0/8", "{stored:#}");
    // One that is stored may be labelled and deleted whatever it says.
    kubectl(&["label", "--namespace", &scene.namespace, "authorizationpolicy", "tried", "a=b"])?;
    kubectl(&["delete", "--namespace", &scene.namespace, "authorizationpolicy", "tried"]).map(drop)
}

fn shows_policies(scene: &Scene) -> Result<()> {
    install()?;
    scene.apply(&policy("AuthorizationPolicy", "{action: DENY}"))?;
    scene.apply(&policy("PeerAuthentication", "{mtls: {mode: STRICT}}"))?;
    for (what, wanted) in [("sap", "DENY"), ("spa", "STRICT"), ("selvedge", "tried")] {
        let shown = kubectl(&["get", "--namespace", &scene.namespace, what])?;
        ensure!(shown.contains(wanted), "kubectl get {what} shows no {wanted}: {shown}");
    }
    Ok(())
}

fn guards_mesh_nodes(_: &Scene) -> Result<()> {
    install()?;
    let nodes = nodes()?;
    let (own, other) = (nodes.first().context("no node")?, nodes.get(1).context("no second node")?);
    apply("default", RIGHTS)?;
    apply(SYSTEM, ACCOUNT)?;
    apply(
        SYSTEM,
        &format!(
            "apiVersion: v1\n\
             kind: Pod\n\
             metadata: {{name: stolen-from}}\n\
             spec:\n  \
               nodeName: {own}\n  \
               serviceAccountName: selvedge-agent\n  \
               terminationGracePeriodSeconds: 1\n  \
               containers:\n  \
               - {{name: main, image: \"{}\", imagePullPolicy: Never, args: [pause]}}\n",
            test_image()?
        ),
    )?;
    let result = as_stolen(own, other);
    kubectl(&["delete", "pod", "stolen-from", "--namespace", SYSTEM])?;
    result
}

fn as_stolen(own: &str, other: &str) -> Result<()> {
    let server = kubectl(&["config", "view", "--minify", "--output", "jsonpath={.clusters[0].cluster.server}"])?;
    let token = |bound: &[&str]| {
        let front = ["create", "token", "selvedge-agent", "--namespace", SYSTEM];
        kubectl(&[&front[..], bound].concat())
    };
    let bound = ["--bound-object-kind", "Pod", "--bound-object-name", "stolen-from"];
    let stolen = eventually("the pod has a token", BOUND, || token(&bound).ok())?;
    let write = |token: &str, node: &str| {
        let object = format!(
            "apiVersion: selvedge.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {node}}}\nstatus: {{captured: [a]}}\n"
        );
        let file = std::env::temp_dir().join(format!("selvedge-mesh-node-{}-{node}.yaml", std::process::id()));
        std::fs::write(&file, object)?;
        let file_name = file.display().to_string();
        let access = [
            "--kubeconfig=/dev/null",
            "--insecure-skip-tls-verify",
            "--server",
            server.trim(),
            "--token",
            token.trim(),
        ];
        let verb = ["apply", "--server-side", "--force-conflicts", "--field-manager=stolen", "--filename", &file_name];
        let answer = kubectl(&[&access[..], &verb].concat());
        std::fs::remove_file(file)?;
        answer
    };
    eventually("the agent's own MeshNode is written", BOUND, || write(&stolen, own).ok())?;
    let refusal = write(&stolen, other).err().context("another node's MeshNode was written")?.to_string();
    ensure!(refusal.contains(&format!("this token is of node {own}")), "{refusal}");
    let unbound = write(&token(&[])?, own).err().context("a token of no node wrote a MeshNode")?.to_string();
    ensure!(unbound.contains("this token is bound to no node"), "{unbound}");
    let person = apply(
        "default",
        &format!(
            "apiVersion: selvedge.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {other}}}\nstatus: {{captured: [a]}}\n"
        ),
    );
    let person = person.err().context("a person wrote a MeshNode")?.to_string();
    ensure!(person.contains("written by nobody else"), "{person}");
    kubectl(&["delete", "meshnode", own]).map(drop)
}

pub fn refused(scene: &Scene, kind: &str, spec: &str, wanted: &str) -> Result<()> {
    let refusal = scene.apply(&policy(kind, spec)).err();
    let refusal = refusal.with_context(|| format!("{kind} {spec} was taken"))?.to_string();
    ensure!(refusal.contains(wanted), "{kind} {spec} was refused without {wanted:?}: {refusal}");
    Ok(())
}

fn policy(kind: &str, spec: &str) -> String {
    format!("apiVersion: selvedge.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: tried}}\nspec: {spec}\n")
}

/// Puts our kinds and their guards into the cluster, once.
pub fn install() -> Result<()> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    let result = INSTALLED.get_or_init(|| install_kinds().map_err(|error| format!("{error:#}")));
    result.clone().map_err(anyhow::Error::msg)
}

/// Puts them into the cluster, and waits until the guards are at work.
pub fn install_kinds() -> Result<()> {
    let crd = concat!(env!("CARGO_MANIFEST_DIR"), "/../../crd");
    kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", crd])?;
    kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinition", "--all"])?;
    // A policy of admission takes effect a moment after it was written.
    let misspelt = [
        policy("AuthorizationPolicy", "{selektor: {}}"),
        policy("PeerAuthentication", "{mode: STRICT}"),
        "apiVersion: selvedge.dev/v1alpha1\nkind: MeshNode\nmetadata: {name: nobody}\n".to_owned(),
    ];
    let try_once = |manifest: &String| {
        eventually("admission refuses what it should", BOUND, || {
            let refusal = apply("default", manifest).err().map(|error| error.to_string());
            refusal.filter(|refusal| refusal.contains("ValidatingAdmissionPolicy"))
        })
    };
    misspelt.iter().try_for_each(|manifest| try_once(manifest).map(drop))?;
    kubectl(&["delete", "--ignore-not-found", "--namespace=default", "sap/tried", "spa/tried"])?;
    kubectl(&["delete", "--ignore-not-found", "meshnode/nobody"]).map(drop)
}

const SYSTEM: &str = "selvedge-system";
const ACCOUNT: &str = "apiVersion: v1
kind: ServiceAccount
metadata: {name: selvedge-agent}
";
const RIGHTS: &str = "apiVersion: v1
kind: Namespace
metadata: {name: selvedge-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: stolen-token}
rules:
- {apiGroups: [selvedge.dev], resources: [meshnodes], verbs: [get, create, patch, delete]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: stolen-token}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: stolen-token}
subjects:
- {kind: ServiceAccount, name: selvedge-agent, namespace: selvedge-system}
";
