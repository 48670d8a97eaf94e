//! What a large cluster costs one agent: thousands of pods that kwok pretends to run, and a steady stream of changes.
//!
//! Not among the others: it takes minutes, and `cargo xtask e2e --scale` runs it alone.

use std::collections::BTreeMap;
use std::env;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use libtest_mimic::Trial;
use selvedge_lab::{Metrics, eventually};
use serde_json::json;
use tempfile::NamedTempFile;

use crate::cluster::{agent_image, get, kubectl};
use crate::scene::{Scene, trial_alone};

pub fn trials() -> Vec<Trial> {
    vec![trial_alone("an agent among ten thousand pods stays small", stays_small)]
}

fn stays_small(scene: &Scene) -> Result<()> {
    let crd = concat!(env!("CARGO_MANIFEST_DIR"), "/../../crd");
    kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", crd])?;
    let _kwok = Kwok::start()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let world = Arc::new(runtime.block_on(World::connect())?);
    runtime.block_on(world.clone().populate())?;
    let running = || {
        let pods = runtime.block_on(world.running()).ok()?;
        (pods >= PODS).then_some(())
    };
    eventually("every pod is Running", Duration::from_secs(900), running)?;
    agent(scene)?;
    scene.pod("looker", "node-2", &["serve", "http:8080"])?;
    let address = format!("{}:15020", scene.pod_ip("agent")?);
    let metrics = || Metrics::parse(&scene.run("looker", &["get", &address, "/metrics"])?);
    let began = Instant::now();
    let read = |metrics: &Metrics| metrics.sum("selvedge_kubernetes_read_bytes_total", &[]);
    let synced = || {
        let ready = get(&["--namespace", &scene.namespace, "pod", "agent"]).ok()?;
        let mut conditions = ready["status"]["conditions"].as_array()?.iter();
        conditions.any(|condition| condition["type"] == "Ready" && condition["status"] == "True").then_some(())
    };
    eventually("the agent has read the cluster", Duration::from_secs(300), synced)?;
    let first = metrics()?;
    println!("listed in {:.1} s at most: {:.1} MB read", began.elapsed().as_secs_f64(), read(&first) / 1e6);
    let memory = |metrics: &Metrics| metrics.sum("selvedge_process_resident_memory_bytes", &[]) / 1e6;
    let cpu = |metrics: &Metrics| metrics.sum("selvedge_process_cpu_seconds", &[]);
    println!("after the listing: {:.1} MB resident, {:.2} s of CPU", memory(&first), cpu(&first));
    let (from, start) = (metrics()?, Instant::now());
    let changes = runtime.block_on(world.clone().churn(CHURN))?;
    let (until, seconds) = (metrics()?, start.elapsed().as_secs_f64());
    let rate = changes as f64 / seconds;
    let cores = (cpu(&until) - cpu(&from)) / seconds;
    println!(
        "{rate:.0} pod changes a second for {seconds:.0} s: {:.2} MB/s read",
        (read(&until) - read(&from)) / 1e6 / seconds
    );
    println!("{:.3} of a core, {:.1} MB resident", cores, memory(&until));
    ensure!(rate > 60.0, "the API server took {rate:.0} changes a second only: nothing is proven");
    ensure!(memory(&until) < 60.0, "{:.1} MB are resident", memory(&until));
    ensure!(cores < 0.1, "{cores:.3} of a core is used");
    Ok(())
}

/// The agent as a pod: as its own service account, on a node of its own.
fn agent(scene: &Scene) -> Result<()> {
    let namespace = &scene.namespace;
    scene.apply(&format!(
        "apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: {namespace}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}}
subjects:
- {{kind: ServiceAccount, name: default, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: agent}}
spec:
  nodeName: node-1
  terminationGracePeriodSeconds: 1
  containers:
  - name: agent
    image: \"{}\"
    imagePullPolicy: Never
    args: [agent, --ca-dir, /run/ca]
    env: [{{name: SELVEDGE_NODE, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}]
    securityContext: {{capabilities: {{add: [NET_ADMIN, NET_RAW, SYS_ADMIN, SYS_PTRACE]}}}}
    readinessProbe: {{httpGet: {{port: 15021, path: /ready}}, periodSeconds: 1}}
    volumeMounts: [{{name: run, mountPath: /run}}]
  volumes: [{{name: run, emptyDir: {{}}}}]
",
        agent_image()?
    ))?;
    scene.wait_for("jsonpath={.status.phase}=Running", "agent")
}

/// Pods, their nodes, namespaces and Services, in the API server alone.
struct World {
    client: Client,
    count: AtomicUsize,
}

impl World {
    async fn connect() -> Result<Self> {
        let file = kubectl(&["config", "view", "--raw", "--output", "yaml"])?;
        let written = kube::config::Kubeconfig::from_yaml(&file)?;
        let config = kube::Config::from_custom_kubeconfig(written, &Default::default()).await?;
        Ok(Self { client: Client::try_from(config)?, count: AtomicUsize::new(0) })
    }

    async fn populate(self: Arc<Self>) -> Result<()> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        for number in 0..NODES {
            create(
                &nodes,
                json!({
                    "metadata": {"name": node_name(number), "annotations": {"kwok.x-k8s.io/node": "fake"}},
                    "spec": {"taints": [{"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}]},
                }),
            )
            .await?;
        }
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        for number in 0..NAMESPACES {
            let name = namespace_name(number);
            create(&namespaces, json!({"metadata": {"name": name, "annotations": {"selvedge.dev/mesh": "enabled"}}}))
                .await?;
            let services: Api<Service> = Api::namespaced(self.client.clone(), &name);
            for app in 0..APPS {
                create(&services, json!({
                    "metadata": {"name": format!("app-{app}")},
                    "spec": {"selector": {"app": format!("app-{app}")}, "ports": [{"port": 80, "targetPort": 8080}]},
                })).await?;
            }
        }
        // The service account controller is behind by now, and pods need one.
        tokio::time::sleep(Duration::from_secs(5)).await;
        let each = |world: Arc<Self>| async move {
            loop {
                let number = world.count.fetch_add(1, Ordering::Relaxed);
                if number >= PODS {
                    return Ok::<_, anyhow::Error>(());
                }
                let pods: Api<Pod> = Api::namespaced(world.client.clone(), &namespace_name(number % NAMESPACES));
                create(&pods, pod(number, 0)).await?;
            }
        };
        let mut tasks: Vec<_> = (0..WRITERS).map(|_| tokio::spawn(each(self.clone()))).collect();
        for task in tasks.drain(..) {
            task.await??;
        }
        Ok(())
    }

    /// Looks every few seconds: a look is ten pages of names.
    async fn running(&self) -> Result<usize> {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let pods: Api<Pod> = Api::all(self.client.clone());
        let mut parameters = kube::api::ListParams::default().fields("status.phase=Running").limit(1000);
        let mut count = 0;
        loop {
            let page = pods.list_metadata(&parameters).await?;
            count += page.items.len();
            match page.metadata.continue_.filter(|next| !next.is_empty()) {
                Some(next) => parameters.continue_token = Some(next),
                None => return Ok(count),
            }
        }
    }

    /// Changes pods, evenly over the time: nine of ten get another label, one of ten makes place for another pod.
    async fn churn(self: Arc<Self>, time: Duration) -> Result<usize> {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / CHANGES_A_SECOND);
        let (end, done) = (Instant::now() + time, Arc::new(AtomicUsize::new(0)));
        let mut tasks = tokio::task::JoinSet::new();
        let mut turn = 0;
        while Instant::now() < end {
            ticks.tick().await;
            turn += 1;
            let (client, done, number) = (self.client.clone(), done.clone(), (turn * 7919) % PODS);
            tasks.spawn(async move {
                let pods: Api<Pod> = Api::namespaced(client, &namespace_name(number % NAMESPACES));
                let changed = match turn % 10 {
                    0 => {
                        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
                        match pods.delete(&pod_name(number), &now).await {
                            Ok(_) => create(&pods, pod(number, turn)).await,
                            Err(error) => Err(error.into()),
                        }
                    }
                    _ => {
                        let patch = json!({"metadata": {"labels": {"turn": format!("{turn}")}}});
                        let patched =
                            pods.patch(&pod_name(number), &PatchParams::default(), &Patch::Merge(patch)).await;
                        patched.map(drop).map_err(Into::into)
                    }
                };
                if changed.is_ok() {
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while tasks.join_next().await.is_some() {}
        Ok(done.load(Ordering::Relaxed))
    }
}

async fn create<K>(api: &Api<K>, object: serde_json::Value) -> Result<()>
where
    K: Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    let object = serde_json::from_value(object)?;
    match api.create(&PostParams::default(), &object).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Of 8 KB, as pods of real clusters are: most of it is nothing that an agent needs.
fn pod(number: usize, turn: usize) -> serde_json::Value {
    let env: Vec<_> = (0..40).map(|n| json!({"name": format!("SETTING_{n}"), "value": "x".repeat(120)})).collect();
    let labels: BTreeMap<_, _> = [
        ("app", format!("app-{}", number / NAMESPACES % APPS)),
        ("turn", format!("{turn}")),
        ("app.kubernetes.io/part-of", "scale".to_owned()),
    ]
    .into();
    json!({
        "metadata": {"name": pod_name(number), "labels": labels, "annotations": {"example.com/config": "y".repeat(500)}},
        "spec": {
            "nodeName": node_name(number % NODES),
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{
                "name": "main", "image": "example.com/app:1", "env": env,
                "ports": [{"name": "http", "containerPort": 8080}],
                "readinessProbe": {"httpGet": {"port": "http", "path": "/ready"}},
            }],
        },
    })
}

fn pod_name(number: usize) -> String {
    format!("pod-{number}")
}

fn node_name(number: usize) -> String {
    format!("kwok-{number}")
}

fn namespace_name(number: usize) -> String {
    format!("scale-{number}")
}

/// Pretends to be the kubelets of the nodes that are annotated for it.
struct Kwok {
    program: Child,
    #[expect(dead_code, reason = "it is removed with this")]
    kubeconfig: NamedTempFile,
}

impl Kwok {
    fn start() -> Result<Self> {
        let program =
            env::var("SELVEDGE_KWOK").context("SELVEDGE_KWOK is not set: this runs as cargo xtask e2e --scale")?;
        let kubeconfig = NamedTempFile::new()?;
        std::fs::write(&kubeconfig, kubectl(&["config", "view", "--raw"])?)?;
        let mut command = Command::new(program);
        command
            .arg("--kubeconfig")
            .arg(kubeconfig.path())
            .arg("--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake");
        // Addresses that no other node hands out.
        command.args(["--cidr=10.250.0.0/16", "--node-ip=10.251.0.1", "--node-lease-duration-seconds=40"]);
        command.arg("--config").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/scale-stages.yaml"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut program = command.spawn().context("cannot run kwok")?;
        let ended = program.try_wait()?;
        ensure!(ended.is_none(), "kwok ended at once");
        Ok(Self { program, kubeconfig })
    }
}

impl Drop for Kwok {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

const PODS: usize = 10_000;
const NODES: usize = 200;
const NAMESPACES: usize = 50;
const APPS: usize = 4;
const CHANGES_A_SECOND: u32 = 100;
const CHURN: Duration = Duration::from_secs(120);
const WRITERS: usize = 16;
