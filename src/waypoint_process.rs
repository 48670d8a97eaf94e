//! Wires a waypoint of its own: a proxy that serves one pod, the one that it runs in, and captures nothing.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::admin::{Admin, AdminSettings, Control, Dump, Readiness, Sources};
use crate::agent::{self, Ca, CaChoice};
use crate::capture::{CapturedPod, NetNs};
use crate::cli::{Failure, WaypointArgs};
use crate::identity::{Identities, IdentitySettings};
use crate::memory;
use crate::mesh::{MeshSettings, NamespacedName, OwnWaypoint, TUNNEL_PORT, Workload};
use crate::model::Model;
use crate::proxy::{
    ConnectionStatus, Connections, Limits, PortRanges, Proxy, ProxySettings, SameNode, Workers, follow,
};
use crate::source::{Origin, Report, directory};
use crate::telemetry::{AccessLog, Exporter, LogControl, Metrics, MetricsSettings, Observer, Telemetry};
use crate::transport::hbone::PoolSettings;
use crate::transport::tls::Tls;
use crate::upkeep;

/// Runs the waypoint until it is asked to end, and has drained.
///
/// # Errors
/// What a person must mend before it can run.
pub fn run(args: WaypointArgs) -> Result<ExitCode, Failure> {
    memory::tune();
    let log = LogControl::install(args.log_format, &args.log).map_err(Failure::usage)?;
    if let Some(manifests) = &args.manifests {
        directory::check_readable(manifests).map_err(Failure::configuration)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    runtime.block_on(serve(args, log))
}

async fn serve(args: WaypointArgs, log: LogControl) -> Result<ExitCode, Failure> {
    let metrics_settings = MetricsSettings { idle_timeout: args.metrics_idle };
    let metrics = Metrics::install(&metrics_settings).map_err(Failure::configuration)?;
    agent::describe_metrics();
    let (access_log, access_log_writer) = AccessLog::start(args.access_log, io::stdout())
        .map_err(|cause| Failure::new(format!("access log: {cause}")))?;
    let gateway = args.gateway_name();
    let (traces, exporter) = args.tracing.start(Observer::Waypoint(gateway.clone()))?;
    let exporting = exporter.map(Exporter::spawn);
    let telemetry = Telemetry::new(&metrics_settings, upkeep::LABEL_SETS, access_log, traces);
    let own = OwnWaypoint::of(&gateway, &args.trust_domain)
        .ok_or_else(|| Failure::usage(format!("--gateway {gateway}: no identity can have this name")))?;
    let origin = Origin::open(args.manifests.clone(), args.kubeconfig.clone()).await;
    let origin = origin.map_err(Failure::configuration)?;
    let cluster = origin.cluster().cloned();
    let ca = Ca::open(&ca_choice(&args), cluster.as_ref()).await?;
    let settings = IdentitySettings { validity: args.certificate_lifetime, ..IdentitySettings::default() };
    let identities = Identities::new(args.trust_domain.clone(), ca.authority, ca.trust, settings);
    // Its own, and nobody else's.
    identities.retain(HashSet::from([own.identity.clone()]));

    let settings = MeshSettings { trust_domain: args.trust_domain.clone(), cluster_cidrs: args.cluster_cidr.clone() };
    let model = Arc::new(Model::new(settings));
    let report = Report::new();
    if cluster.is_some() {
        model.update(|state| state.mesh.believe_mesh_nodes());
    }
    let connections = Arc::new(Connections::default());
    let most = args.max_connections.unwrap_or_else(upkeep::descriptor_share);
    let threads = args.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let workers =
        Workers::start(threads, &PoolSettings::default(), &upkeep::fast_pool(most, threads)).map_err(Failure::new)?;
    let settings = ProxySettings {
        node: "".into(),
        cluster: args.cluster.clone(),
        source_ports: PortRanges::default(),
        node_netns: NetNs::current().map_err(Failure::new)?,
        tunnel: args.tunnel.offer(),
        // What comes from it crosses interfaces, whoever its neighbours are.
        same_node: SameNode::Tunnel,
        gateway: Some(gateway.clone()),
        tunnel_idle: args.tunnel_idle,
    };
    let proxy = Proxy::new(
        settings,
        model.clone(),
        identities.clone(),
        Tls::new(identities.clone()),
        telemetry,
        connections.clone(),
        Limits::new(most, connections.clone()),
        workers,
    );

    let state = Arc::new(State {
        own,
        pod: args.pod_name(),
        proxy: proxy.clone(),
        report: report.clone(),
        serves: AtomicBool::new(false),
        stopping: watch::Sender::new(false),
    });
    let servers = AdminSettings::new(args.bind, args.admin_port, args.metrics_port, args.readiness_port);
    let admin = Admin::bind(&servers).await.map_err(Failure::configuration)?;
    let admin =
        tokio::spawn(admin.run(Sources { metrics: metrics.clone(), log, dump: state.clone(), control: state.clone() }));
    // None of these ends by itself. A waypoint that lacks one of them would go on with policy or certificates of
    // yesterday: better a new one.
    let mut essential = JoinSet::new();
    essential.spawn(metrics.upkeep());
    essential.spawn(identities.run());
    essential.spawn(ca.upkeep);
    essential.spawn(follow(proxy.clone()));
    essential.spawn(upkeep::housekeeping(proxy.clone(), report.clone()));
    essential.spawn(upkeep::keep_small(proxy.clone()));
    let mut source = tokio::spawn(origin.follow(None, model, report));
    let mut serving = tokio::spawn(serve_own_pod(state.clone(), args.bind));
    info!(%gateway, connections = most, threads, version = env!("CARGO_PKG_VERSION"), "The waypoint runs.");

    let mut asked = state.stopping.subscribe();
    let ending = async {
        tokio::select! {
            () = signalled() => {}
            _ = asked.wait_for(|asked| *asked) => {}
        }
    };
    let mut ending = Box::pin(ending);
    loop {
        tokio::select! {
            () = &mut ending => break,
            served = &mut serving, if !state.serves.load(Ordering::Relaxed) => match served {
                Ok(Ok(())) => state.serves.store(true, Ordering::Relaxed),
                Ok(Err(cause)) => return Err(Failure::new(cause)),
                Err(cause) => return Err(Failure::new(format!("what serves the pod failed: {cause}"))),
            },
            failed = &mut source => {
                return Err(match failed {
                    Ok(cause) => Failure::configuration(cause),
                    Err(cause) => Failure::new(format!("what follows the objects failed: {cause}")),
                });
            }
            Some(ended) = essential.join_next() => {
                let how = ended.err().map_or_else(|| "it returned".to_owned(), |cause| cause.to_string());
                return Err(Failure::new(format!("a part of the waypoint has ended: {how}")));
            }
        }
    }
    state.stopping.send_replace(true);
    info!(connections = connections.total(), linger = ?args.linger, limit = ?args.drain, "Draining.");
    // Not ready from here on: clients' agents choose other pods, and those that have not heard of it are still served.
    tokio::time::sleep(args.linger).await;
    proxy.drain();
    let began = Instant::now();
    match tokio::time::timeout(args.drain, connections.none_left()).await {
        Ok(()) => drop(tokio::time::timeout(FAREWELL, proxy.workers.settle()).await),
        Err(_) => warn!(connections = connections.total(), "Some connections outlived the drain and are reset."),
    }
    info!(seconds = began.elapsed().as_secs_f64(), "The waypoint ends.");
    admin.abort();
    if let Some(exporting) = exporting {
        exporting.finish().await;
    }
    upkeep::finish(access_log_writer).await;
    Ok(ExitCode::SUCCESS)
}

/// Serves once the model has this very pod, and the pod is what it is taken for.
async fn serve_own_pod(state: Arc<State>, bind: Option<IpAddr>) -> Result<(), String> {
    let model = &state.proxy.model;
    model.synced().await;
    let mut moves = model.subscribe();
    let workload = loop {
        moves.borrow_and_update();
        if let Ok(workload) = state.own_pod() {
            break workload;
        }
        if moves.changed().await.is_err() {
            return Err("the model has ended".to_owned());
        }
    };
    let captured = CapturedPod::own(workload, bind, TUNNEL_PORT).map_err(|cause| cause.to_string())?;
    state.proxy.serve(Arc::new(captured));
    Ok(())
}

async fn signalled() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        error!("Signals cannot be caught; the waypoint runs until it is killed.");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn ca_choice(args: &WaypointArgs) -> CaChoice<'_> {
    CaChoice {
        address: args.ca_address.as_ref(),
        folder: args.ca_dir.as_deref(),
        root: &args.ca_root,
        token: &args.ca_token,
        namespace: &args.namespace,
        trust_domain: &args.trust_domain,
    }
}

/// What the admin servers ask and tell.
struct State {
    own: OwnWaypoint,
    pod: NamespacedName,
    proxy: Arc<Proxy>,
    report: Arc<Report>,
    serves: AtomicBool,
    stopping: watch::Sender<bool>,
}

impl State {
    /// The pod that this process runs in, if it is one of the waypoint's.
    fn own_pod(&self) -> Result<Arc<Workload>, String> {
        let state = self.proxy.model.read();
        let pod = &self.pod;
        let Some(workload) = state.mesh.workload_by_name(pod) else { return Err(format!("there is no Pod {pod}")) };
        if workload.pod.ips.is_empty() {
            return Err(format!("Pod {pod} has no address yet"));
        }
        if workload.identity.as_ref() != Some(&self.own.identity) {
            let account = &self.own.service.name;
            return Err(format!("Pod {pod} does not run as service account {account}"));
        }
        if state.mesh.gateway_of(&workload.pod).as_ref() != Some(&self.own.gateway) {
            let gateway = &self.own.gateway;
            return Err(format!(
                "Pod {pod} is no waypoint of Gateway {gateway}: it needs the label {}={}, and the Gateway must be there, of \
                 class {}",
                crate::mesh::GATEWAY_LABEL,
                gateway.name,
                crate::mesh::WAYPOINT_CLASS
            ));
        }
        Ok(workload.clone())
    }
}

impl Control for State {
    fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        if !self.proxy.model.is_synced() {
            match &*self.report.waiting() {
                [] => reasons.push("the objects have not all been read yet".to_owned()),
                waiting => reasons.extend_from_slice(waiting),
            }
        } else if let Err(why) = self.own_pod() {
            reasons.push(why);
        } else if !self.serves.load(Ordering::Relaxed) {
            reasons.push("nothing is served yet".to_owned());
        }
        let certificates = self.proxy.identities.status();
        if certificates.iter().all(|status| status.serial.is_none()) {
            reasons.push(format!("there is no certificate for {} yet", self.own.identity));
        }
        if *self.stopping.borrow() {
            reasons.push(format!("the waypoint drains; {} connections are left", self.proxy.connections.total()));
        }
        Readiness { reasons }
    }

    fn drain(&self) {
        self.stopping.send_replace(true);
    }
}

impl Dump for State {
    fn dump(&self) -> Value {
        let connections = self.proxy.connections.all();
        let connections: Vec<_> = connections.iter().map(|one| ConnectionStatus::of(one, Some(&self.pod))).collect();
        json!({
            "gateway": self.own.gateway.to_string(),
            "pod": self.pod.to_string(),
            "identity": self.own.identity.to_string(),
            "version": env!("CARGO_PKG_VERSION"),
            "certificates": self.proxy.identities.status(),
            "connections": connections,
            "manifestProblems": self.report.problems(),
        })
    }
}

/// For the last words of tunnels.
const FAREWELL: Duration = Duration::from_secs(1);
