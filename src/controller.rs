//! Wires the controller: the CA in every replica, and what the leader alone does.

#![forbid(unsafe_code)]

mod authorization;
mod leader;
mod lease;
mod metrics;
mod pods;
pub mod root;
mod service;
mod tls;
mod tokens;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ::kube::Client;
use ::kube::api::Api;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Server;
use tracing::{error, info, warn};

use crate::admin::{Admin, AdminSettings, Control, Dump, Readiness, Sources, on_port};
use crate::cli::{ControllerArgs, Failure};
use crate::identity::anchors::ConfigMapAnchors;
use crate::source::kube::{self, Access};
use crate::telemetry::{LogControl, Metrics, MetricsSettings};
use authorization::AgentRules;
use leader::Leader;
use leader::keys::Tunnels;
use lease::{Elector, Leadership};
use pods::Pods;
use root::{Keeper, Root};
use service::{CaServer, CaService};
use tls::ServerCertificate;
use tokens::Tokens;

pub use metrics::describe_metrics;

/// Runs the controller until it is asked to end.
///
/// # Errors
/// What a person must mend before the controller can run.
pub fn run(args: ControllerArgs) -> Result<ExitCode, Failure> {
    let log = LogControl::install(args.log_format, &args.log).map_err(Failure::usage)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    runtime.block_on(serve(args, log))
}

async fn serve(args: ControllerArgs, log: LogControl) -> Result<ExitCode, Failure> {
    let metrics = Metrics::install(&MetricsSettings::default()).map_err(Failure::configuration)?;
    describe_metrics();
    let access = args.kubeconfig.clone().map_or(Access::InCluster, Access::File);
    let client = kube::client(&access).await.map_err(Failure::configuration)?;
    let namespace = args.namespace.as_str();

    let (elector, leadership) = Elector::new(client.clone(), namespace, &args.name);
    let root = Root::new();
    let longest = args.certificate_lifetime;
    let keeper =
        Keeper::new(client.clone(), namespace, args.trust_domain.clone(), longest, root.clone(), leadership.clone());
    let pods = Pods::new(client.clone());
    let rules = AgentRules {
        namespace: namespace.to_owned(),
        service_account: args.agent_service_account.clone(),
        daemon_set: args.agent_daemon_set.clone(),
        audience: args.audience.clone(),
        trust_domain: args.trust_domain.clone(),
    };
    let tokens = Tokens::new(client.clone(), &args.audience);
    let service = CaService { rules, tokens, pods: pods.clone(), root: root.clone(), longest };

    let certificate = Arc::new(ServerCertificate::default());
    let acceptor = tls::acceptor(certificate.clone()).map_err(Failure::new)?;
    let listeners = tls::bind(&on_port(args.bind, args.ca_port)).await.map_err(Failure::configuration)?;
    let stopping = watch::Sender::new(false);
    let state = Arc::new(State {
        name: args.name.clone(),
        root: root.clone(),
        pods: pods.clone(),
        leadership: leadership.clone(),
        stopping: stopping.clone(),
    });
    let servers = AdminSettings::new(args.bind, args.admin_port, args.metrics_port, args.readiness_port);
    let admin = Admin::bind(&servers).await.map_err(Failure::configuration)?;
    let admin = tokio::spawn(admin.run(Sources { metrics: metrics.clone(), log, dump: state.clone(), control: state }));

    let mut essential = JoinSet::new();
    essential.spawn(metrics.upkeep());
    essential.spawn(pods.clone().run());
    essential.spawn(keeper.run());
    let names = server_names(namespace, &args.service_name);
    let (signer, root_of_tunnels) = (root.clone(), root.clone());
    essential.spawn(async move { certificate.keep(&signer, &names).await });
    essential.spawn(housekeeping(root));
    let anchors = ConfigMapAnchors::new(client.clone(), namespace);
    let authority = (root_of_tunnels, anchors.trust());
    let tunnels = Tunnels::new(client.clone(), pods.clone(), authority, &args.trust_domain, (namespace, &args.name));
    essential.spawn(anchors.follow());
    let leader = Leader {
        client: client.clone(),
        name: args.name.clone(),
        namespace: args.namespace.clone(),
        daemon_set: args.agent_daemon_set.clone(),
        pods,
        tunnels,
        waypoints: WaypointSettings::of(&args, &client).await,
    };
    essential.spawn(leader.run(leadership));
    let mut asked = stopping.subscribe();
    let election = tokio::spawn(elector.run(async move { drop(asked.wait_for(|asked| *asked).await) }));
    let mut asked = stopping.subscribe();
    let server = Server::builder()
        .max_concurrent_streams(256)
        .max_connection_age(CONNECTION_LIFE)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .timeout(ANSWER)
        .add_service(CaServer(Arc::new(service)))
        .serve_with_incoming_shutdown(tls::connections(listeners, acceptor), async move {
            drop(asked.wait_for(|asked| *asked).await);
            // Until nobody is sent here any more.
            tokio::time::sleep(LINGER).await;
        });
    let server = tokio::spawn(server);
    info!(name = %args.name, version = env!("CARGO_PKG_VERSION"), "The controller runs.");

    let mut asked = stopping.subscribe();
    tokio::select! {
        () = signalled() => {}
        _ = asked.wait_for(|asked| *asked) => {}
        Some(ended) = essential.join_next() => {
            let how = ended.err().map_or_else(|| "it returned".to_owned(), |cause| cause.to_string());
            return Err(Failure::new(format!("a part of the controller has ended: {how}")));
        }
    }
    // Not ready from here on: whoever asks next finds another replica. Requests under way are answered.
    info!("The controller ends.");
    stopping.send_replace(true);
    if !matches!(tokio::time::timeout(LINGER + FAREWELL, server).await, Ok(Ok(Ok(())))) {
        warn!("Some requests were not answered in time.");
    }
    let _ = tokio::time::timeout(FAREWELL, election).await;
    admin.abort();
    Ok(ExitCode::SUCCESS)
}

/// What every waypoint that the controller deploys has in common.
#[derive(Clone, Debug)]
pub struct WaypointSettings {
    pub image: String,
    pub image_pull_policy: String,
    /// The controller's.
    pub namespace: String,
    pub trust_domain: String,
    /// Of the tokens that the CA is shown.
    pub audience: String,
}

impl WaypointSettings {
    /// The image is this program's own, unless a flag says otherwise; none where that cannot be known.
    async fn of(args: &ControllerArgs, client: &Client) -> Option<Self> {
        let own: Api<Pod> = Api::namespaced(client.clone(), &args.namespace);
        let own = match args.waypoint_image {
            Some(_) => None,
            None => own.get_opt(&args.name).await.ok().flatten(),
        };
        let container = own.and_then(|pod| pod.spec?.containers.into_iter().next());
        let (image, policy) = match (&args.waypoint_image, container) {
            (Some(image), _) => (image.clone(), None),
            (None, Some(container)) => (container.image?, container.image_pull_policy),
            (None, None) => return None,
        };
        Some(Self {
            image,
            image_pull_policy: policy.unwrap_or_else(|| "IfNotPresent".to_owned()),
            namespace: args.namespace.clone(),
            trust_domain: args.trust_domain.to_string(),
            audience: args.audience.clone(),
        })
    }
}

/// Gauges that grow old by themselves.
async fn housekeeping(root: Arc<Root>) {
    let mut ticks = tokio::time::interval(HOUSEKEEPING);
    loop {
        ticks.tick().await;
        metrics::record_expiry(root.not_after());
    }
}

async fn signalled() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        error!("Signals cannot be caught; the controller runs until it is killed.");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// The names by which agents ask for the CA.
fn server_names(namespace: &str, service: &str) -> Vec<String> {
    let short = format!("{service}.{namespace}.svc");
    vec![format!("{short}.cluster.local"), format!("{service}.{namespace}"), short]
}

/// What the admin servers ask and tell.
struct State {
    name: String,
    root: Arc<Root>,
    pods: Arc<Pods>,
    leadership: Leadership,
    stopping: watch::Sender<bool>,
}

impl Control for State {
    fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        if let Err(why) = self.root.signer() {
            reasons.push(format!("nothing can be signed: {why}"));
        } else if let Some(alarm) = self.root.alarm() {
            reasons.push(format!("the root needs a person: {alarm}"));
        }
        if !self.pods.is_synced() {
            reasons.push("the pods have not all been read yet".to_owned());
        }
        if *self.stopping.borrow() {
            reasons.push("the controller ends".to_owned());
        }
        Readiness { reasons }
    }

    fn drain(&self) {
        self.stopping.send_replace(true);
    }
}

impl Dump for State {
    fn dump(&self) -> Value {
        json!({
            "name": self.name,
            "version": env!("CARGO_PKG_VERSION"),
            "leads": self.leadership.is_leader(),
            "signs": self.root.signer().is_ok(),
            "alarm": self.root.alarm().map(|alarm| alarm.to_string()),
        })
    }
}

const HOUSEKEEPING: Duration = Duration::from_secs(5);
const CONNECTION_LIFE: Duration = Duration::from_secs(30 * 60);
const KEEPALIVE: Duration = Duration::from_secs(30);
const ANSWER: Duration = Duration::from_secs(10);
/// Endpoints take a moment to follow readiness.
const LINGER: Duration = Duration::from_secs(3);
const FAREWELL: Duration = Duration::from_secs(5);
