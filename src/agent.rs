//! Wires the rooms together, nothing else.

#![forbid(unsafe_code)]

mod dump;
mod metrics;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::admin::{Admin, AdminSettings, Control, Readiness, Sources};
use crate::capture::show::{CaptureStatus, PodState};
use crate::capture::{CaptureSettings, Event, NetNs, OnExit, Ports, Reconciler};
use crate::cli::{AgentArgs, Failure};
use crate::handover::{self, Keeper, ListenerKey};
use crate::identity::{EmbeddedCa, Identities, IdentitySettings};
use crate::memory::{self, GivingBack};
use crate::mesh::MeshSettings;
use crate::model::Model;
use crate::proxy::{Connections, Limits, Proxy, ProxySettings, Workers, follow};
use crate::source::{Report, directory};
use crate::telemetry::{AccessLog, AccessLogWriter, LogControl, Metrics, MetricsSettings, Telemetry};
use crate::transport::fast;
use crate::transport::hbone::PoolSettings;
use crate::transport::tls::Tls;
use dump::AgentDump;

/// Runs the agent: as the small parent that keeps the listeners, or as its worker.
///
/// # Errors
/// What a person must mend before the agent can run.
pub fn run(args: AgentArgs) -> Result<ExitCode, Failure> {
    memory::tune();
    let log = LogControl::install(args.log_format, &args.log).map_err(Failure::usage)?;
    if !handover::is_worker() {
        // Before anything is made: a folder of that name is most likely a slip of the hand.
        directory::check_readable(&args.manifests).map_err(Failure::configuration)?;
        return Ok(handover::supervise(std::env::args_os().skip(1)));
    }
    let (keeper, inherited) =
        Keeper::inherit().map_err(|cause| Failure::new(format!("the parent process: {cause}")))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    runtime.block_on(worker(args, log, keeper, inherited))
}

async fn worker(
    args: AgentArgs,
    log: LogControl,
    keeper: Keeper,
    inherited: Vec<(ListenerKey, std::os::fd::OwnedFd)>,
) -> Result<ExitCode, Failure> {
    let metrics_settings = MetricsSettings { idle_timeout: args.metrics_idle };
    let metrics = Metrics::install(&metrics_settings).map_err(Failure::configuration)?;
    metrics::describe();
    handover::record_restarts();
    let (access_log, access_log_writer) = AccessLog::start(args.access_log, io::stdout())
        .map_err(|cause| Failure::new(format!("access log: {cause}")))?;
    let telemetry = Telemetry::new(&metrics_settings, LABEL_SETS, access_log);

    let ca = EmbeddedCa::open(&args.ca_dir, &args.trust_domain).map_err(Failure::configuration)?;
    let settings = IdentitySettings { validity: args.certificate_lifetime, ..IdentitySettings::default() };
    let identities = Identities::new(args.trust_domain.clone(), ca.clone(), ca.trust(), settings);

    let settings = MeshSettings { trust_domain: args.trust_domain.clone(), cluster_cidrs: args.cluster_cidr.clone() };
    let model = Arc::new(Model::new(settings));
    let report = Report::new();

    let node_netns = match &args.node_netns {
        Some(path) => {
            NetNs::open(path).map_err(|cause| Failure::configuration(format!("{}: {cause}", path.display())))?
        }
        None => NetNs::current().map_err(Failure::new)?,
    };
    let connections = Arc::new(Connections::default());
    let most = args.max_connections.unwrap_or_else(descriptor_share);
    let threads = args.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let workers = Workers::start(threads, &PoolSettings::default(), &fast_pool(most, threads)).map_err(Failure::new)?;
    let settings = ProxySettings {
        node: args.node.as_str().into(),
        cluster: args.cluster.clone(),
        source_ports: args.source_ports.clone(),
        node_netns,
        tunnel: args.tunnel.offer(),
        same_node: args.same_node,
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

    let (events, captured) = mpsc::unbounded_channel();
    let settings = CaptureSettings {
        node: args.node.as_str().into(),
        mode: args.capture.mode(),
        back_end: args.iptables.back_end(),
        netns_dir: args.netns_dir.clone(),
        node_netns: args.node_netns.clone(),
        ports: Ports::default(),
        connect: args.connect.connect(),
        interval: RECONCILE,
        drain: args.drain,
        on_exit: if args.keep_capture { OnExit::Keep } else { OnExit::Remove },
        inherited,
    };
    let reconciler = Reconciler::new(settings, model.clone(), proxy.clone(), Arc::new(keeper), events)
        .map_err(Failure::configuration)?;

    let stopping = Arc::new(Stopping::default());
    let state = Arc::new(AgentState {
        node: args.node.clone(),
        model: model.clone(),
        capture: reconciler.status(),
        stopping: stopping.clone(),
        connections: connections.clone(),
    });
    let admin = Admin::bind(&admin_settings(&args)).await.map_err(Failure::configuration)?;
    let dump = AgentDump::new(&args.node, proxy.clone(), reconciler.status(), report.clone());
    let admin = tokio::spawn(admin.run(Sources {
        metrics: metrics.clone(),
        log,
        dump: Arc::new(dump),
        control: state.clone(),
    }));
    // None of these ends by itself. An agent that lacks one of them would go on with policy, certificates or rules of
    // yesterday: better a new worker.
    let mut essential = JoinSet::new();
    essential.spawn(metrics.upkeep());
    essential.spawn(identities.clone().run());
    essential.spawn(async move { ca.watch().await });
    essential.spawn(follow(proxy.clone()));
    essential.spawn(serve_captured(proxy.clone(), captured));
    essential.spawn(retain_identities(args.node.clone(), model.clone(), identities.clone()));
    essential.spawn(housekeeping(proxy.clone(), report.clone()));
    essential.spawn(keep_small(proxy.clone()));
    let source = tokio::spawn(directory::run(args.manifests.clone(), model.clone(), report.clone()));
    let shutdown = stopping.clone();
    let mut reconciler = tokio::spawn(reconciler.run(async move { shutdown.asked().await }));
    info!(node = %args.node, connections = most, threads, version = env!("CARGO_PKG_VERSION"), "The agent runs.");

    tokio::select! {
        // First, because a drain ends the reconciler too.
        biased;
        () = stopping.wait(&connections) => {}
        result = source => {
            return Err(match result {
                Ok(Err(cause)) => Failure::configuration(cause),
                Err(cause) => Failure::new(format!("what follows the manifests failed: {cause}")),
            });
        }
        _ = &mut reconciler => return Err(Failure::new("what keeps the capture true has ended")),
        Some(ended) = essential.join_next() => {
            let how = ended.err().map_or_else(|| "it returned".to_owned(), |cause| cause.to_string());
            return Err(Failure::new(format!("a part of the agent has ended: {how}")));
        }
    }
    info!(connections = connections.total(), limit = ?args.drain, "Draining: open connections go on, up to the limit.");
    proxy.drain();
    let began = Instant::now();
    let drained = async {
        let _ = reconciler.await;
        connections.none_left().await;
    };
    // The reconciler resets what outlives the limit and then needs a moment to take its rules away; where the rules
    // stay, the end of the process resets it.
    let limit = if args.keep_capture { args.drain } else { args.drain + TEARDOWN };
    match tokio::time::timeout(limit, drained).await {
        // A connection's last words may still be on their way into its tunnel.
        Ok(()) => drop(tokio::time::timeout(FAREWELL, proxy.workers.settle()).await),
        Err(_) => warn!(connections = connections.total(), "Some connections outlived the drain and are reset."),
    }
    info!(seconds = began.elapsed().as_secs_f64(), "The agent ends.");
    admin.abort();
    finish(access_log_writer).await;
    Ok(ExitCode::SUCCESS)
}

/// Hands captured pods to the proxy, and takes back those that are gone.
async fn serve_captured(proxy: Arc<Proxy>, mut events: mpsc::UnboundedReceiver<Event>) {
    while let Some(event) = events.recv().await {
        match event {
            Event::Captured(pod) => proxy.serve(pod),
            Event::Leaving(pod) => proxy.evict(&pod),
            Event::Gone(pod) => proxy.forget(&pod),
        }
    }
}

/// Keeps certificates ready for whom this node's joined pods run as, and for nobody else.
async fn retain_identities(node: String, model: Arc<Model>, identities: Arc<Identities>) {
    let mut moved = model.subscribe();
    loop {
        moved.borrow_and_update();
        let wanted = {
            let state = model.read();
            let joined = state.mesh.workloads_on(&node).filter(|w| w.membership.is_joined() && w.pod.is_live());
            joined.filter_map(|workload| workload.identity.clone()).collect()
        };
        identities.retain(wanted);
        if moved.changed().await.is_err() {
            return;
        }
    }
}

/// What is done now and then: bytes of long connections are counted, and the age of the model.
async fn housekeeping(proxy: Arc<Proxy>, report: Arc<Report>) {
    let mut ticks = tokio::time::interval(HOUSEKEEPING);
    loop {
        ticks.tick().await;
        proxy.tick();
        report.record_metrics();
    }
}

/// What a load needed of memory is given back once most of it has gone.
async fn keep_small(proxy: Arc<Proxy>) {
    let mut ticks = tokio::time::interval(LOOKING_AT_MEMORY);
    let mut giving_back = GivingBack::default();
    loop {
        ticks.tick().await;
        giving_back.look(proxy.connections.total());
    }
}

async fn finish(writer: AccessLogWriter) {
    let flushed = tokio::task::spawn_blocking(move || writer.finish(FLUSH)).await;
    if !matches!(flushed, Ok(true)) {
        error!("The access log's last lines could not be written in time.");
    }
}

fn admin_settings(args: &AgentArgs) -> AdminSettings {
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    let everywhere = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
    let open: Vec<IpAddr> = args.bind.map_or_else(|| everywhere.to_vec(), |ip| vec![ip]);
    let on = |ips: &[IpAddr], port| ips.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
    AdminSettings {
        admin: on(&loopback, args.admin_port),
        metrics: on(&open, args.metrics_port),
        readiness: on(&open, args.readiness_port),
    }
}

/// Tunnels that wait for their next flow hold a descriptor each: an eighth of what connections may have, in all.
fn fast_pool(connections: usize, threads: usize) -> fast::PoolSettings {
    let defaults = fast::PoolSettings::default();
    let share = (connections / 8 / threads.max(1)).max(1);
    fast::PoolSettings { idle_total: defaults.idle_total.min(share), ..defaults }
}

fn descriptor_share() -> usize {
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    Limits::from_descriptors(soft)
}

/// Whether the agent was asked to end, by a signal or through its admin port.
#[derive(Debug)]
struct Stopping(watch::Sender<bool>);

impl Default for Stopping {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Stopping {
    fn ask(&self) {
        self.0.send_replace(true);
    }

    async fn asked(&self) {
        // The sender is ours and lives.
        let _ = self.0.subscribe().wait_for(|asked| *asked).await;
    }

    /// Completes at SIGTERM, SIGINT or a request to drain.
    async fn wait(&self, connections: &Connections) {
        let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
        else {
            error!(connections = connections.total(), "Signals cannot be caught; the agent runs until it is killed.");
            return std::future::pending().await;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = self.asked() => {}
        }
        self.ask();
    }
}

/// What the admin servers ask and tell.
struct AgentState {
    node: String,
    model: Arc<Model>,
    capture: CaptureStatus,
    stopping: Arc<Stopping>,
    connections: Arc<Connections>,
}

impl Control for AgentState {
    fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        if !self.model.is_synced() {
            reasons.push("the manifests have not all been read yet".to_owned());
        }
        if *self.stopping.0.borrow() {
            reasons.push(format!("the agent drains; {} connections are left", self.connections.total()));
        }
        let snapshot = self.capture.snapshot();
        let state = self.model.read();
        let joined = state.mesh.workloads_on(&self.node);
        for workload in joined.filter(|w| w.membership.is_joined() && w.pod.is_live() && !w.pod.ips.is_empty()) {
            let status = snapshot.pods.iter().find(|status| status.uid == workload.uid().as_str());
            // A pod whose capture failed is named in metrics and by `selvedge capture show`; it must not take the
            // readiness of all others with it.
            if !status.is_some_and(|status| matches!(status.state, PodState::Captured | PodState::Failed)) {
                let why = status.and_then(|status| status.reason.as_deref()).unwrap_or("under way");
                reasons.push(format!("pod {} is not captured yet: {why}", workload.name()));
            }
        }
        Readiness { reasons }
    }

    fn drain(&self) {
        self.stopping.ask();
    }
}

const RECONCILE: Duration = Duration::from_secs(2);
const HOUSEKEEPING: Duration = Duration::from_secs(5);
const LOOKING_AT_MEMORY: Duration = Duration::from_secs(1);
const TEARDOWN: Duration = Duration::from_secs(10);
const FAREWELL: Duration = Duration::from_secs(1);
const FLUSH: Duration = Duration::from_secs(2);
const LABEL_SETS: usize = 2000;
