//! A controller that a test has for itself, and agents that ask it.

use anyhow::{Context, Result};
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{agent_image, apply, get, kubectl, nodes, test_image};
use crate::scene::{BOUND, Scene};

/// A controller in a namespace of its own, with agents' pods on every node.
pub struct Ca<'a> {
    scene: &'a Scene,
}

impl<'a> Ca<'a> {
    pub fn open(scene: &'a Scene, replicas: usize) -> Result<Self> {
        Self::open_with(scene, replicas, "1h")
    }

    /// One whose certificates live no longer than this.
    pub fn open_with(scene: &'a Scene, replicas: usize, longest: &str) -> Result<Self> {
        let namespace = &scene.namespace;
        apply(namespace, &rights(namespace))?;
        apply(namespace, &agents()?)?;
        apply(namespace, &controller(namespace, replicas, longest)?)?;
        let ca = Self { scene };
        ca.wait_until_ready()?;
        let rolled = ["rollout", "status", "daemonset/selvedge-agent", "--namespace", namespace, "--timeout=120s"];
        kubectl(&rolled)?;
        Ok(ca)
    }

    pub fn identity(&self, account: &str) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{account}", self.scene.namespace)
    }

    /// The token that the agent of a node brings.
    pub fn agent_token(&self, node: &str) -> Result<String> {
        let pod = self.agent_pod(node)?;
        let namespace = self.scene.namespace.as_str();
        let token = kubectl(&[
            "create",
            "token",
            "selvedge-agent",
            "--namespace",
            namespace,
            "--audience",
            AUDIENCE,
            "--bound-object-kind",
            "Pod",
            "--bound-object-name",
            &pod,
        ])?;
        Ok(token.trim().to_owned())
    }

    pub fn agent_pod(&self, node: &str) -> Result<String> {
        let selector = format!("--field-selector=spec.nodeName={node}");
        let pods = get(&["--namespace", &self.scene.namespace, "pods", "--selector=app=agent", &selector])?;
        let name = pods["items"][0]["metadata"]["name"].as_str();
        Ok(name.with_context(|| format!("no agent on {node}"))?.to_owned())
    }

    /// What is signed for a service account of this namespace.
    pub fn ask(&self, token: &str, account: &str, pod: &str) -> Result<Value> {
        let said = self.run(token, &self.identity(account), pod)?;
        let said = said.map_err(|refusal| anyhow::anyhow!("nothing was signed for {account}: {refusal}"))?;
        Ok(serde_json::from_str(&said)?)
    }

    pub fn refusal(&self, token: &str, account: &str, pod: &str) -> Result<String> {
        let said = self.run(token, &self.identity(account), pod)?;
        said.err().with_context(|| format!("{account} was signed for"))
    }

    /// A pod that asks, to its end: what it printed, or why it got nothing.
    pub fn run(&self, token: &str, identity: &str, pod: &str) -> Result<Result<String, String>> {
        let namespace = &self.scene.namespace;
        self.scene.apply(&format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: {pod}}}\nstringData: {{token: \"{token}\"}}\n---\n\
             apiVersion: v1\n\
             kind: Pod\n\
             metadata: {{name: {pod}}}\n\
             spec:\n  \
               restartPolicy: Never\n  \
               serviceAccountName: asker\n  \
               containers:\n  \
               - name: main\n    \
                 image: \"{}\"\n    \
                 imagePullPolicy: Never\n    \
                 args: [certificate, \"{identity}\", -o, json, --ca-root, /roots/ca.crt, --ca-token, /token/token,\n           \
                        --ca-address, \"https://selvedge-controller.{namespace}.svc:15012\"]\n    \
                 volumeMounts:\n    \
                 - {{name: roots, mountPath: /roots}}\n    \
                 - {{name: token, mountPath: /token}}\n  \
               volumes:\n  \
               - {{name: roots, configMap: {{name: selvedge-trust-bundle}}}}\n  \
               - {{name: token, secret: {{secretName: {pod}}}}}\n",
            agent_image()?
        ))?;
        let phase = || {
            let pod = get(&["--namespace", namespace, "pod", pod]).ok()?;
            let phase = pod["status"]["phase"].as_str()?.to_owned();
            ["Succeeded", "Failed"].contains(&phase.as_str()).then_some(phase)
        };
        let phase = eventually(&format!("{pod} has asked"), BOUND, phase)?;
        let said = self.scene.logs(pod)?;
        Ok(if phase == "Succeeded" { Ok(said) } else { Err(said) })
    }

    pub fn bundle(&self) -> Result<String> {
        let map = get(&["--namespace", &self.scene.namespace, "configmap", "selvedge-trust-bundle"])?;
        Ok(map["data"]["ca.crt"].as_str().context("no ca.crt")?.to_owned())
    }

    pub fn logs(&self) -> Result<String> {
        let front = ["logs", "--namespace", &self.scene.namespace, "--selector=app=controller"];
        kubectl(&[&front[..], &["--tail=-1", "--max-log-requests=10"]].concat())
    }

    pub fn says(&self, text: &str) -> Result<()> {
        let said = || self.logs().ok()?.contains(text).then_some(());
        eventually(&format!("the controller says {text:?}"), BOUND, said)
    }

    /// What one controller's metrics say, read from beside it.
    pub fn metrics(&self) -> Result<String> {
        let pods = get(&["--namespace", &self.scene.namespace, "pods", "--selector=app=controller"])?;
        let ip = pods["items"][0]["status"]["podIP"].as_str().context("a controller without an address")?;
        let agent = self.agent_pod(&two_nodes()?[0])?;
        self.scene.run(&agent, &["get", &format!("{ip}:15020"), "/metrics"])
    }

    pub fn restart(&self) -> Result<()> {
        let namespace = self.scene.namespace.as_str();
        kubectl(&["delete", "pods", "--namespace", namespace, "--selector=app=controller", "--wait=true"]).map(drop)
    }

    fn ready(&self) -> Option<(u64, u64)> {
        let deployment = get(&["--namespace", &self.scene.namespace, "deployment", "selvedge-controller"]).ok()?;
        Some((deployment["status"]["readyReplicas"].as_u64().unwrap_or(0), deployment["spec"]["replicas"].as_u64()?))
    }

    pub fn wait_until_ready(&self) -> Result<()> {
        eventually("every controller is ready", BOUND, || self.ready().filter(|(ready, all)| ready == all).map(drop))
    }

    pub fn wait_until_not_ready(&self) -> Result<()> {
        eventually("no controller is ready", BOUND, || self.ready().filter(|(ready, _)| *ready == 0).map(drop))
    }
}

impl Drop for Ca<'_> {
    fn drop(&mut self) {
        let name = self.scene.namespace.as_str();
        let _ = kubectl(&["delete", "clusterrolebinding,clusterrole", name, "--ignore-not-found"]);
    }
}

pub fn two_nodes() -> Result<[String; 2]> {
    nodes()?.into_iter().take(2).collect::<Vec<_>>().try_into().map_err(|_| anyhow::anyhow!("this needs two nodes"))
}

pub fn account_and_pod(name: &str, node: &str) -> String {
    let account = format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}}}\n---\n");
    account + &pod_of(name, name, node).unwrap_or_default()
}

pub fn pod_of(name: &str, account: &str, node: &str) -> Result<String> {
    Ok(format!(
        "apiVersion: v1\n\
         kind: Pod\n\
         metadata: {{name: {name}, labels: {{app: {name}}}}}\n\
         spec:\n  \
           nodeName: {node}\n  \
           serviceAccountName: {account}\n  \
           terminationGracePeriodSeconds: 1\n  \
           containers:\n  \
           - {{name: main, image: \"{}\", imagePullPolicy: Never, args: [pause]}}\n",
        test_image()?
    ))
}

/// An object as it was, without what only the API server writes.
pub fn restore(namespace: &str, object: &Value) -> Result<()> {
    let mut object = object.clone();
    for field in ["resourceVersion", "uid", "creationTimestamp", "managedFields"] {
        object["metadata"].as_object_mut().map(|metadata| metadata.remove(field));
    }
    apply(namespace, &object.to_string())
}

/// Pods that are agents as far as the CA can tell: of the DaemonSet, on each node.
fn agents() -> Result<String> {
    Ok(format!(
        "apiVersion: apps/v1\n\
         kind: DaemonSet\n\
         metadata: {{name: selvedge-agent}}\n\
         spec:\n  \
           selector: {{matchLabels: {{app: agent}}}}\n  \
           template:\n    \
             metadata: {{labels: {{app: agent}}}}\n    \
             spec:\n      \
               serviceAccountName: selvedge-agent\n      \
               terminationGracePeriodSeconds: 1\n      \
               containers:\n      \
               - {{name: agent, image: \"{}\", imagePullPolicy: Never, args: [pause]}}\n",
        test_image()?
    ))
}

fn controller(namespace: &str, replicas: usize, longest: &str) -> Result<String> {
    Ok(format!(
        "apiVersion: apps/v1\n\
         kind: Deployment\n\
         metadata: {{name: selvedge-controller}}\n\
         spec:\n  \
           replicas: {replicas}\n  \
           selector: {{matchLabels: {{app: controller}}}}\n  \
           template:\n    \
             metadata: {{labels: {{app: controller}}}}\n    \
             spec:\n      \
               serviceAccountName: selvedge-controller\n      \
               terminationGracePeriodSeconds: 10\n      \
               containers:\n      \
               - name: controller\n        \
                 image: \"{}\"\n        \
                 imagePullPolicy: Never\n        \
                 args: [controller, --namespace, {namespace}, --certificate-lifetime, {longest}]\n        \
                 env:\n        \
                 - {{name: SELVEDGE_POD, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}\n        \
                 readinessProbe: {{httpGet: {{path: /ready, port: 15021}}, periodSeconds: 1, failureThreshold: 1}}\n\
         ---\n\
         apiVersion: v1\n\
         kind: Service\n\
         metadata: {{name: selvedge-controller}}\n\
         spec: {{selector: {{app: controller}}, ports: [{{name: grpc-ca, port: 15012}}]}}\n",
        agent_image()?
    ))
}

/// What a controller may do, as its manifests grant it.
fn rights(namespace: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: selvedge-agent}}\n---\n\
         apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: selvedge-controller}}\n---\n\
         apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: asker}}\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\n\
         kind: ClusterRole\n\
         metadata: {{name: {namespace}}}\n\
         rules:\n\
         - {{apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}}\n\
         - {{apiGroups: [\"\"], resources: [pods], verbs: [get, list, watch]}}\n\
         - {{apiGroups: [\"\"], resources: [nodes], verbs: [get, list, watch, patch]}}\n\
         - {{apiGroups: [\"\", events.k8s.io], resources: [events], verbs: [create, patch]}}\n\
         - {{apiGroups: [selvedge.dev], resources: [authorizationpolicies, peerauthentications, trafficpolicies, meshnodes], verbs: [get, list, watch]}}\n\
         - {{apiGroups: [selvedge.dev], resources: [authorizationpolicies/status, peerauthentications/status, trafficpolicies/status], verbs: [update, patch]}}\n\
         - {{apiGroups: [gateway.networking.k8s.io], resources: [httproutes, grpcroutes], verbs: [get, list, watch]}}\n\
         - {{apiGroups: [gateway.networking.k8s.io], resources: [httproutes/status, grpcroutes/status], verbs: [update, patch]}}\n\
         - {{apiGroups: [\"\"], resources: [services, namespaces], verbs: [get, list, watch]}}\n\
         ---\n\
         apiVersion: rbac.authorization.k8s.io/v1\n\
         kind: ClusterRoleBinding\n\
         metadata: {{name: {namespace}}}\n\
         roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {namespace}}}\n\
         subjects: [{{kind: ServiceAccount, name: selvedge-controller, namespace: {namespace}}}]\n\
         ---\n\
         apiVersion: rbac.authorization.k8s.io/v1\n\
         kind: Role\n\
         metadata: {{name: selvedge-controller}}\n\
         rules:\n\
         - {{apiGroups: [\"\"], resources: [secrets], resourceNames: [selvedge-ca], verbs: [get, list, watch, update, patch]}}\n\
         - {{apiGroups: [\"\"], resources: [configmaps], resourceNames: [selvedge-trust-bundle], verbs: [get, list, watch, update, patch]}}\n\
         - {{apiGroups: [\"\"], resources: [secrets, configmaps], verbs: [create]}}\n\
         - {{apiGroups: [coordination.k8s.io], resources: [leases], resourceNames: [selvedge-controller], verbs: [get, update, patch]}}\n\
         - {{apiGroups: [coordination.k8s.io], resources: [leases], verbs: [create]}}\n\
         ---\n\
         apiVersion: rbac.authorization.k8s.io/v1\n\
         kind: RoleBinding\n\
         metadata: {{name: selvedge-controller}}\n\
         roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: selvedge-controller}}\n\
         subjects: [{{kind: ServiceAccount, name: selvedge-controller}}]\n"
    )
}

/// Of the tokens that agents bring.
pub const AUDIENCE: &str = "selvedge-ca";
