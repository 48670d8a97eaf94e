//! Wires the rooms together, nothing else.

#![forbid(unsafe_code)]

mod ca;
mod dump;
mod mesh_node;
mod metrics;
mod turns;
mod uninstall;

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::admin::{Admin, AdminSettings, Control, Readiness, Sources};
use crate::capture::show::{CaptureStatus, PodState};
use crate::capture::{CaptureSettings, Event, HandedOver, NetNs, OnExit, Ports, Reconciler};
use crate::cli::{AgentArgs, Failure};
use crate::cni::{self, ServerSettings, keep_roster};
use crate::handover::{self, Keeper, ListenerKey, Succession};
use crate::identity::{Identities, IdentitySettings};
use crate::memory::{self, GivingBack};
use crate::mesh::{MeshSettings, PodUid};
use crate::model::Model;
use crate::policy::{self, Problem};
use crate::proxy::{Connections, Limits, Proxy, ProxySettings, Workers, follow};
use crate::source::{Origin, Report, directory};
use crate::telemetry::{
    AccessLog, AccessLogWriter, Exporter, LogControl, Metrics, MetricsSettings, Observer, Telemetry,
};
use crate::transport::fast;
use crate::transport::hbone::PoolSettings;
use crate::transport::tls::Tls;
pub use ca::{Ca, CaChoice};
use dump::AgentDump;
use mesh_node::{Captured, Publisher};
pub use metrics::describe as describe_metrics;
use turns::{Standing, Turns};
use uninstall::Uninstall;

/// Runs the agent: as the small parent that keeps the listeners, or as its worker.
///
/// # Errors
/// What a person must mend before the agent can run.
pub fn run(args: AgentArgs) -> Result<ExitCode, Failure> {
    memory::tune();
    let log = LogControl::install(args.log_format, &args.log).map_err(Failure::usage)?;
    if !handover::is_worker() {
        // Before anything is made: a folder of that name is most likely a slip of the hand.
        if let Some(manifests) = &args.manifests {
            directory::check_readable(manifests).map_err(Failure::configuration)?;
        }
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
    let (traces, exporter) = args.tracing.start(Observer::Agent { node: args.node.clone() })?;
    let exporting = exporter.map(Exporter::spawn);
    let telemetry = Telemetry::new(&metrics_settings, LABEL_SETS, access_log, traces);

    let origin = Origin::open(args.manifests.clone(), args.kubeconfig.clone()).await;
    let origin = origin.map_err(Failure::configuration)?;
    let cluster = origin.cluster().cloned();
    let ca = Ca::open(&CaChoice::from(&args), cluster.as_ref()).await?;
    let settings = IdentitySettings { validity: args.certificate_lifetime, ..IdentitySettings::default() };
    let identities = Identities::new(args.trust_domain.clone(), ca.authority, ca.trust, settings);

    let settings = MeshSettings { trust_domain: args.trust_domain.clone(), cluster_cidrs: args.cluster_cidr.clone() };
    let model = Arc::new(Model::new(settings));
    let report = Report::new();
    if cluster.is_some() {
        model.update(|state| state.mesh.believe_mesh_nodes());
    }

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
        gateway: None,
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

    if let Some(shared) = &args.shared_dir {
        cni::prepare_shared(shared)
            .map_err(|cause| Failure::configuration(format!("--shared-dir {}: {cause}", shared.display())))?;
    }
    let uninstall = match &args.daemonset {
        Some(daemonset) => {
            let client = match &cluster {
                Some(client) => client.clone(),
                None => ::kube::Client::try_default().await.map_err(Failure::new)?,
            };
            Some(Uninstall::new(client, daemonset).map_err(Failure::usage)?)
        }
        None => None,
    };
    let handed = HandedOver::default();
    let keeper = Arc::new(keeper);
    let (orders, obeyed) = mpsc::unbounded_channel();
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
        linger: if cluster.is_some() { LINGER } else { Duration::ZERO },
        on_exit: OnExit::Remove,
        orders: args.shared_dir.is_some().then_some(obeyed),
        handed: handed.clone(),
        inherited,
    };
    let reconciler = Reconciler::new(settings, model.clone(), proxy.clone(), keeper.clone(), events)
        .map_err(Failure::configuration)?;

    let stopping = Arc::new(Stopping::default());
    let standing = match args.shared_dir {
        Some(_) => watch::Sender::new(Standing::Waits),
        None => watch::Sender::new(Standing::Works),
    };
    let state = Arc::new(AgentState {
        node: args.node.clone(),
        model: model.clone(),
        capture: reconciler.status(),
        report: report.clone(),
        stopping: stopping.clone(),
        connections: connections.clone(),
        standing: standing.subscribe(),
    });
    let servers = AdminSettings::new(args.bind, args.admin_port, args.metrics_port, args.readiness_port);
    let admin = Admin::bind(&servers).await.map_err(Failure::configuration)?;
    let own = cluster.as_ref().map(|_| Arc::new(Captured::new(&args.node, model.clone())));
    let publisher = cluster.clone().zip(own.clone()).map(|(client, captured)| Publisher {
        client,
        node: args.node.clone(),
        captured,
        capture: reconciler.status(),
        model: model.clone(),
        identities: identities.clone(),
        report: report.clone(),
        standing: standing.subscribe(),
    });
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
    essential.spawn(ca.upkeep);
    essential.spawn(follow(proxy.clone()));
    let (left, gone) = mpsc::unbounded_channel();
    essential.spawn(serve_captured(proxy.clone(), captured, own, left));
    essential.spawn(retain_identities(args.node.clone(), model.clone(), identities.clone()));
    essential.spawn(housekeeping(proxy.clone(), report.clone()));
    essential.spawn(keep_small(proxy.clone()));
    if let Some(publisher) = publisher {
        essential.spawn(publisher.run());
    }
    let source = tokio::spawn(origin.follow(Some(args.node.as_str().into()), model.clone(), report.clone()));
    if let Some(shared) = &args.shared_dir {
        let cni = ServerSettings { shared: shared.clone(), model: model.clone(), handed, status: reconciler.status() };
        let seen = state.clone();
        let turns = Turns {
            succession: Succession::new(shared),
            cni,
            keeper,
            proxy: proxy.clone(),
            orders,
            gone,
            standing,
            all_captured: Arc::new(move || seen.not_captured().is_empty()),
        };
        essential.spawn(async move {
            if let Err(cause) = turns.run().await {
                error!(%cause, "The agents of this node cannot take turns.");
            }
        });
        essential.spawn(keep_roster(shared.clone(), model.clone()));
    }
    if let Some(uninstall) = uninstall.clone() {
        essential.spawn(uninstall.run());
    }
    let shutdown = stopping.clone();
    // Where the rules stay, they are kept true to the last moment: connections are accepted until the next agent does.
    let mut reconciler = tokio::spawn(reconciler.run(async move { shutdown.asked_for_good().await }));
    info!(node = %args.node, connections = most, threads, version = env!("CARGO_PKG_VERSION"), "The agent runs.");

    tokio::select! {
        // First, because a drain ends the reconciler too.
        biased;
        () = stopping.wait(&connections, args.keep_capture, uninstall.as_deref()) => {}
        result = source => {
            return Err(match result {
                Ok(cause) => Failure::configuration(cause),
                Err(cause) => Failure::new(format!("what follows the objects failed: {cause}")),
            });
        }
        _ = &mut reconciler => return Err(Failure::new("what keeps the capture true has ended")),
        Some(ended) = essential.join_next() => {
            let how = ended.err().map_or_else(|| "it returned".to_owned(), |cause| cause.to_string());
            return Err(Failure::new(format!("a part of the agent has ended: {how}")));
        }
    }
    let for_good = stopping.is_for_good();
    info!(
        connections = connections.total(), limit = ?args.drain, rules = if for_good { "go" } else { "stay" },
        "Draining: open connections go on, up to the limit."
    );
    if let (Some(shared), Some(_), true) = (&args.shared_dir, &uninstall, for_good)
        && let Err(error) = cni::say_farewell(shared)
    {
        error!(%error, "The CNI plugin's installer cannot be told to remove it.");
    }
    proxy.drain();
    let began = Instant::now();
    let drained = async {
        if for_good {
            let _ = reconciler.await;
        }
        connections.none_left().await;
    };
    // The reconciler resets what outlives the limit and then needs a moment to take its rules away; where the rules
    // stay, the end of the process resets it.
    let limit = if for_good { args.drain + TEARDOWN } else { args.drain };
    match tokio::time::timeout(limit, drained).await {
        // A connection's last words may still be on their way into its tunnel.
        Ok(()) => drop(tokio::time::timeout(FAREWELL, proxy.workers.settle()).await),
        Err(_) => warn!(connections = connections.total(), "Some connections outlived the drain and are reset."),
    }
    if let (Some(shared), Some(_), true) = (&args.shared_dir, &uninstall, for_good) {
        cni::clear_shared(shared).await;
    }
    info!(seconds = began.elapsed().as_secs_f64(), "The agent ends.");
    admin.abort();
    if let Some(exporting) = exporting {
        exporting.finish().await;
    }
    finish(access_log_writer).await;
    Ok(ExitCode::SUCCESS)
}

/// Hands captured pods to the proxy, and takes back those that are gone. Peers hear first of those that leave.
async fn serve_captured(
    proxy: Arc<Proxy>,
    mut events: mpsc::UnboundedReceiver<Event>,
    own: Option<Arc<Captured>>,
    gone: mpsc::UnboundedSender<PodUid>,
) {
    let mut batch = Vec::new();
    while events.recv_many(&mut batch, EVENTS).await > 0 {
        // Of pods that are captured together each knows the others when the first of them is served.
        if let Some(own) = &own {
            own.take(&batch);
        }
        for event in batch.drain(..) {
            match event {
                Event::Captured(pod) => proxy.serve(pod),
                Event::Leaving(pod) => proxy.evict(&pod),
                Event::Gone(pod) => {
                    proxy.forget(&pod);
                    // Nobody listens where there is no other agent.
                    let _ = gone.send(pod);
                }
            }
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
pub async fn housekeeping(proxy: Arc<Proxy>, report: Arc<Report>) {
    let mut ticks = tokio::time::interval(HOUSEKEEPING);
    let mut unread = Vec::new();
    loop {
        ticks.tick().await;
        proxy.tick();
        report.record_metrics();
        tell_unread(&proxy, &mut unread);
    }
}

/// Counts the policies that are not enforced as written, and says once which of them speak of requests that nobody reads.
fn tell_unread(proxy: &Proxy, told: &mut Vec<Problem>) {
    let state = proxy.model.read();
    policy::record_metrics(&state.not_enforced());
    let unread = state.unread();
    for Problem { policy, field, cause } in unread.iter().filter(|problem| !told.contains(problem)) {
        warn!(%policy, field, cause, "A policy is not in force as written.");
    }
    *told = unread;
}

/// What a load needed of memory is given back once most of it has gone.
pub async fn keep_small(proxy: Arc<Proxy>) {
    let mut ticks = tokio::time::interval(LOOKING_AT_MEMORY);
    let mut giving_back = GivingBack::default();
    loop {
        ticks.tick().await;
        if giving_back.look(proxy.connections.total()) {
            proxy.workers.give_back_buffers().await;
            memory::give_back();
        }
    }
}

pub async fn finish(writer: AccessLogWriter) {
    let flushed = tokio::task::spawn_blocking(move || writer.finish(FLUSH)).await;
    if !matches!(flushed, Ok(true)) {
        error!("The access log's last lines could not be written in time.");
    }
}

/// Tunnels that wait for their next flow hold a descriptor each: an eighth of what connections may have, in all.
pub fn fast_pool(connections: usize, threads: usize) -> fast::PoolSettings {
    let defaults = fast::PoolSettings::default();
    let share = (connections / 8 / threads.max(1)).max(1);
    fast::PoolSettings { idle_total: defaults.idle_total.min(share), ..defaults }
}

pub fn descriptor_share() -> usize {
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    Limits::from_descriptors(soft)
}

/// Whether the agent was asked to end, by a signal or through its admin port, and whether its rules go with it.
#[derive(Debug)]
struct Stopping(watch::Sender<Stop>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    No,
    Asked,
    RulesStay,
    ForGood,
}

impl Default for Stopping {
    fn default() -> Self {
        Self(watch::Sender::new(Stop::No))
    }
}

impl Stopping {
    fn ask(&self) {
        self.0.send_if_modified(|stop| *stop == Stop::No && std::mem::replace(stop, Stop::Asked) == Stop::No);
    }

    async fn asked(&self) {
        // The sender is ours and lives.
        let _ = self.0.subscribe().wait_for(|stop| *stop != Stop::No).await;
    }

    async fn asked_for_good(&self) {
        let _ = self.0.subscribe().wait_for(|stop| *stop == Stop::ForGood).await;
    }

    fn is_for_good(&self) -> bool {
        *self.0.borrow() == Stop::ForGood
    }

    /// Completes at SIGTERM, SIGINT or a request to drain, once it is known what becomes of the rules.
    async fn wait(&self, connections: &Connections, keep_capture: bool, uninstall: Option<&Uninstall>) {
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
        let for_good = match uninstall {
            Some(uninstall) => uninstall.is_for_good().await || !keep_capture,
            None => !keep_capture,
        };
        self.0.send_replace(if for_good { Stop::ForGood } else { Stop::RulesStay });
    }
}

/// What the admin servers ask and tell.
struct AgentState {
    node: String,
    model: Arc<Model>,
    capture: CaptureStatus,
    report: Arc<Report>,
    stopping: Arc<Stopping>,
    connections: Arc<Connections>,
    standing: watch::Receiver<Standing>,
}

impl AgentState {
    /// The joined pods of this node that are neither captured nor named as failed, and why.
    fn not_captured(&self) -> Vec<String> {
        let snapshot = self.capture.snapshot();
        let state = self.model.read();
        let joined = state.mesh.workloads_on(&self.node);
        let mut reasons = Vec::new();
        for workload in joined.filter(|w| w.membership.is_joined() && w.pod.is_live() && !w.pod.ips.is_empty()) {
            let status = snapshot.pods.iter().find(|status| status.uid == workload.uid().as_str());
            // A pod whose capture failed is named in metrics and by `selvedge capture show`; it must not take the
            // readiness of all others with it.
            if !status.is_some_and(|status| matches!(status.state, PodState::Captured | PodState::Failed)) {
                let why = status.and_then(|status| status.reason.as_deref()).unwrap_or("under way");
                reasons.push(format!("pod {} is not captured yet: {why}", workload.name()));
            }
        }
        reasons
    }
}

impl Control for AgentState {
    fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        if !self.model.is_synced() {
            match &*self.report.waiting() {
                [] => reasons.push("the objects have not all been read yet".to_owned()),
                waiting => reasons.extend_from_slice(waiting),
            }
        }
        if *self.stopping.0.borrow() != Stop::No {
            reasons.push(format!("the agent drains; {} connections are left", self.connections.total()));
        }
        match *self.standing.borrow() {
            Standing::Waits => reasons.push("another agent of this node has not handed over yet".to_owned()),
            Standing::Works => reasons.extend(self.not_captured()),
            // What it carries goes on; what is new is the next agent's.
            Standing::Succeeded => {}
        }
        Readiness { reasons }
    }

    fn drain(&self) {
        self.stopping.ask();
    }
}

/// How long a pod that leaves is still served through tunnels, for peers that have not heard of it.
const LINGER: Duration = Duration::from_secs(3);
const EVENTS: usize = 1024;
const RECONCILE: Duration = Duration::from_secs(2);
const HOUSEKEEPING: Duration = Duration::from_secs(5);
const LOOKING_AT_MEMORY: Duration = Duration::from_secs(1);
const TEARDOWN: Duration = Duration::from_secs(10);
const FAREWELL: Duration = Duration::from_secs(1);
const FLUSH: Duration = Duration::from_secs(2);
pub const LABEL_SETS: usize = 2000;
