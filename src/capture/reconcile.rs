//! Desired (the joined pods of this node) against actual (rules, listeners, routes), on events and on a timer.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::oneshot;
use tokio::time::Instant;

use self::leaving::Departure;
use self::proving::wanted;
use super::handed::HandedOver;
use super::iptables::{BackEnd, CaptureUnavailable, Chosen};
use super::keeper::ListenerKeeper;
use super::netns::NetNs;
use super::pod::{CaptureError, CapturedPod, Drift, Kernel, PodCapture, remove_all};
use super::proof::{Evidence, Impostor, Wanted};
use super::rules::{Mode, Phase, Ports};
use super::show::{CaptureStatus, PodStatus, WITHOUT_QUEUE};
use crate::handover::ListenerKey;
use crate::mesh::{Connect, PodUid, Workload};
use crate::model::Model;

mod leaving;
mod proving;
mod turns;

/// What the proxy hears.
#[derive(Clone, Debug)]
pub enum Event {
    /// Everything is in place: serve these listeners. Comes again when the pod joined anew while it was leaving, and
    /// with new listeners when one was lost; it takes the place of what came before.
    Captured(Arc<CapturedPod>),
    /// Nothing new is captured; flows drain.
    Leaving(PodUid),
    /// Nothing of it is left.
    Gone(PodUid),
}

/// What an agent that is not alone on its node is told to do.
#[derive(Debug)]
pub enum Order {
    /// It is its turn, with the listeners of the agent before it.
    Work(Vec<(ListenerKey, OwnedFd)>),
    /// Its turn is over: it leaves everything in place, and tells its listeners, which go on accepting.
    Rest(oneshot::Sender<Vec<(ListenerKey, OwnedFd)>>),
    /// The next agent let a pod leave: its listeners are to be closed here too.
    Forget(PodUid),
}

/// The flows that the proxy carries.
pub trait Flows: Send + Sync {
    fn live(&self, pod: &PodUid) -> usize;
    fn reset(&self, pod: &PodUid);
}

/// What becomes of capture when the agent ends in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnExit {
    /// Rules stay: the pods' connections wait for the next agent, and nothing is in clear.
    Keep,
    /// Every pod leaves, as if it had left the mesh.
    Remove,
}

#[derive(Debug)]
pub struct CaptureSettings {
    pub node: Arc<str>,
    /// `None`: whatever works best here.
    pub mode: Option<Mode>,
    pub back_end: Option<BackEnd>,
    /// The runtime's root-only directory of named network namespaces.
    pub netns_dir: PathBuf,
    /// The node's network namespace; the agent's own unless given.
    pub node_netns: Option<PathBuf>,
    pub ports: Ports,
    /// Where neither a pod nor its namespace says it.
    pub connect: Connect,
    /// How often everything is looked at, at least.
    pub interval: Duration,
    /// How long flows of a pod that leaves may go on.
    pub drain: Duration,
    /// How long a pod that leaves is still served, though no flow is left.
    pub linger: Duration,
    pub on_exit: OnExit,
    /// Where other agents of this node may have their turn: nothing is done before it is told. None: at once.
    pub orders: Option<UnboundedReceiver<Order>>,
    /// Namespaces that the container runtime hands over as pods start.
    pub handed: HandedOver,
    /// Listeners that a worker before this one left.
    pub inherited: Vec<(ListenerKey, OwnedFd)>,
}

/// Makes desired and actual one.
pub struct Reconciler {
    settings: CaptureSettings,
    kernel: Arc<Kernel>,
    model: Arc<Model>,
    flows: Arc<dyn Flows>,
    events: UnboundedSender<Event>,
    status: CaptureStatus,
    pods: HashMap<PodUid, Tracked>,
    /// Namespaces of pods that are gone, by cookie, with the addresses that they had.
    former: HashMap<u64, (PodUid, Vec<IpAddr>)>,
    node_addresses: Vec<IpAddr>,
    evidence: Option<(Instant, Arc<Evidence>)>,
    reported: HashSet<(PodUid, Impostor)>,
    first_pass: bool,
    closing: bool,
    /// Another agent of the node programs the rules.
    resting: bool,
}

/// A pod between joining and gone.
struct Tracked {
    capture: PodCapture,
    leaving: Option<Departure>,
    /// In how many looks its namespace was not to be seen.
    missing: u8,
    failure: Option<String>,
    /// Since when its loopback is down.
    down: Option<Instant>,
}

impl Tracked {
    fn new(workload: Arc<Workload>, netns: NetNs) -> Self {
        let capture = PodCapture::new(workload, netns);
        Self { capture, leaving: None, missing: 0, failure: None, down: None }
    }
}

impl Reconciler {
    /// Finds out what works here, by trying it for real. Blocking. Call within a runtime.
    pub fn new(
        mut settings: CaptureSettings,
        model: Arc<Model>,
        flows: Arc<dyn Flows>,
        keeper: Arc<dyn ListenerKeeper>,
        events: UnboundedSender<Event>,
    ) -> Result<Self, ReconcilerError> {
        let chosen = Chosen::detect(settings.mode, settings.back_end)?;
        for refused in &chosen.refused {
            tracing::warn!(cause = %refused, "A way to capture does not work here.");
        }
        let connect = if chosen.hold { settings.connect } else { Connect::Eager };
        if connect != settings.connect {
            tracing::warn!(
                "SYNs cannot wait here, so connect() is answered before it is known whether the server is there."
            );
        }
        tracing::info!(
            mode = chosen.mode.name(),
            back_end = chosen.back_end.name(),
            queue = chosen.queue,
            connect = connect.name(),
            "Capture works."
        );
        if !chosen.queue {
            tracing::warn!(probes = WITHOUT_QUEUE, "The kubelet's TCP probes cannot see dead ports on this node.");
        }
        let node = match &settings.node_netns {
            Some(path) => NetNs::open(path).map_err(|error| ReconcilerError::NodeNetns(path.clone(), error))?,
            None => NetNs::current().map_err(|error| ReconcilerError::NodeNetns("its own".into(), error))?,
        };
        let inherited = std::mem::take(&mut settings.inherited).into_iter().collect();
        let status = CaptureStatus::new(&chosen, connect);
        status.set_resting(settings.orders.is_some());
        let kernel = Kernel {
            chosen,
            node,
            ports: settings.ports,
            connect: settings.connect,
            keeper,
            inherited: Mutex::new(inherited),
            runtime: tokio::runtime::Handle::current(),
        };
        Ok(Self {
            resting: settings.orders.is_some(),
            settings,
            kernel: Arc::new(kernel),
            model,
            flows,
            events,
            status,
            pods: HashMap::new(),
            former: HashMap::new(),
            node_addresses: Vec::new(),
            evidence: None,
            reported: HashSet::new(),
            first_pass: true,
            closing: false,
        })
    }

    /// What is in place and what should be, kept up to date.
    pub fn status(&self) -> CaptureStatus {
        self.status.clone()
    }

    /// Runs until `shutdown`, and then until every pod has left if so set.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        let model = self.model.clone();
        let mut orders = self.settings.orders.take();
        let mut moved = model.subscribe();
        tokio::select! {
            () = model.synced() => {}
            () = &mut shutdown => return,
        }
        loop {
            moved.mark_unchanged();
            let seen = self.desired();
            if !self.resting {
                self.pass().await;
            }
            if self.closing && self.pods.is_empty() {
                return;
            }
            let busy = self.pods.values().any(|pod| pod.leaving.is_some());
            let pause = if busy { self.settings.interval.min(LEAVING_INTERVAL) } else { self.settings.interval };
            let mut pause = std::pin::pin!(tokio::time::sleep(pause.mul_f64(rand::random_range(0.9..1.1))));
            loop {
                tokio::select! {
                    () = &mut shutdown, if !self.closing => match self.settings.on_exit {
                        _ if self.resting => return,
                        OnExit::Keep => return,
                        OnExit::Remove => self.closing = true,
                    },
                    // Most of what moves in a cluster is none of this node's.
                    _ = moved.changed() => if !self.closing && !self.is_concerned(&seen) { continue },
                    () = self.settings.handed.moved() => {}
                    order = next(&mut orders) => self.obey(order).await,
                    () = &mut pause => {}
                }
                break;
            }
        }
    }

    fn is_concerned(&self, (desired, present): &(HashMap<PodUid, Arc<Workload>>, HashSet<PodUid>)) -> bool {
        let (desired_now, present_now) = self.desired();
        let same = |(uid, workload): (&PodUid, &Arc<Workload>)| {
            desired.get(uid).is_some_and(|before| Arc::ptr_eq(before, workload))
        };
        *present != present_now || desired.len() != desired_now.len() || !desired_now.iter().all(same)
    }

    async fn pass(&mut self) {
        let (desired, present) = self.desired();
        self.depart(&desired, &present).await;
        self.gather(&desired).await;
        let pending = self.prove(&desired);
        self.converge(&desired).await;
        if self.first_pass && !self.closing {
            self.first_pass = false;
            self.clean_up(&desired).await;
        }
        self.publish(&desired, pending);
    }

    /// The joined pods of this node, and all that are still there.
    fn desired(&self) -> (HashMap<PodUid, Arc<Workload>>, HashSet<PodUid>) {
        let state = self.model.read();
        let live = || {
            let here = state.mesh.workloads_on(&self.settings.node);
            here.filter(|workload| workload.pod.is_live() && !workload.pod.ips.is_empty())
        };
        let present = live().map(|workload| workload.uid().clone()).collect();
        if self.closing {
            return (HashMap::new(), present);
        }
        let joined = live().filter(|workload| workload.membership.is_joined());
        (joined.map(|workload| (workload.uid().clone(), workload.clone())).collect(), present)
    }

    async fn converge(&mut self, desired: &HashMap<PodUid, Arc<Workload>>) {
        let mut jobs = Vec::new();
        for (uid, workload) in desired {
            let Some(mut pod) = self.pods.remove(uid) else { continue };
            if pod.missing >= MISSING_LOOKS {
                self.pods.insert(uid.clone(), pod);
                continue;
            }
            pod.capture.workload = workload.clone();
            let rejoins = pod.leaving.take().is_some();
            pod.capture.phase = Phase::Capturing;
            let before = pod.capture.captured.clone().filter(|_| !rejoins && pod.failure.is_none());
            jobs.push((pod, (self.node_addresses.clone(), before)));
        }
        let done = self
            .on_threads(jobs, |pod, kernel, (addresses, before)| (pod.capture.converge(kernel, &addresses), before))
            .await;
        for (mut pod, (result, before)) in done {
            self.settle(&mut pod, result, before.as_ref());
            self.pods.insert(pod.capture.uid().clone(), pod);
        }
    }

    fn settle(&self, pod: &mut Tracked, result: Result<Vec<Drift>, CaptureError>, before: Option<&Arc<CapturedPod>>) {
        let name = pod.capture.workload.name().to_string();
        match result {
            Ok(drift) => {
                for what in drift {
                    let label = format!("{what:?}").to_lowercase();
                    tracing::warn!(pod = %name, what = %label, "Capture had been changed by somebody else; it is mended.");
                    metrics::counter!("selvedge_capture_drift_repaired_total", "what" => label).increment(1);
                }
                (pod.failure, pod.down) = (None, None);
                let Some(captured) = &pod.capture.captured else { return };
                if !before.is_some_and(|before| Arc::ptr_eq(before, captured)) {
                    tracing::info!(pod = %name, netns = %pod.capture.netns.id(), "The pod is captured.");
                    let _ = self.events.send(Event::Captured(captured.clone()));
                }
            }
            // The runtime takes a pod's loopback down first when the pod has ended, which the API server tells later.
            Err(error) if error.is_network_down() && pod.down.get_or_insert_with(Instant::now).elapsed() < ENDING => {
                pod.failure = None;
            }
            Err(error) => {
                let words = error.to_string();
                if pod.failure.as_ref() != Some(&words) {
                    tracing::error!(pod = %name, error = %words, "The pod cannot be captured.");
                }
                pod.failure = Some(words);
            }
        }
    }

    /// Once, after the first pass: what an agent before us left in pods that are not joined any more, and listeners
    /// of pods that are gone.
    async fn clean_up(&self, desired: &HashMap<PodUid, Arc<Workload>>) {
        let stale: Vec<ListenerKey> = {
            let mut inherited = self.kernel.inherited.lock().unwrap_or_else(PoisonError::into_inner);
            let stale: Vec<_> = inherited.keys().filter(|key| !desired.contains_key(&key.pod)).cloned().collect();
            stale.iter().for_each(|key| drop(inherited.remove(key)));
            stale
        };
        let outside: Vec<Wanted> = {
            let state = self.model.read();
            let here = state.mesh.workloads_on(&self.settings.node);
            here.filter(|w| !w.membership.is_joined() && !w.pod.host_network && w.pod.is_live())
                .map(|w| wanted(w))
                .collect()
        };
        let (directory, kernel, held) = (self.settings.netns_dir.clone(), self.kernel.clone(), self.held());
        let cleaned = tokio::task::spawn_blocking(move || {
            stale.iter().for_each(|key| kernel.keeper.forget(key));
            if outside.is_empty() {
                return Ok(());
            }
            let evidence = Evidence::gather(&directory, &kernel.node)?;
            for pod in outside {
                let Ok(netns) = evidence.prove(&pod, &held) else { continue };
                if !netns.run(|| kernel.chosen.found())?.is_empty() {
                    tracing::info!(pod = %pod.uid, "Rules of an agent before this one are in a pod that is not joined; they go.");
                    remove_all(&netns, &kernel.chosen)?;
                }
            }
            Ok::<_, io::Error>(())
        });
        match cleaned.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "What an agent before this one left could not all be removed."),
            Err(error) => tracing::warn!(%error, "Removing what an agent before this one left failed."),
        }
    }

    /// Runs one blocking step a pod, a few pods at a time.
    async fn on_threads<A, R>(
        &self,
        jobs: Vec<(Tracked, A)>,
        step: impl Fn(&mut Tracked, &Kernel, A) -> R + Copy + Send + 'static,
    ) -> Vec<(Tracked, R)>
    where
        A: Send + 'static,
        R: Send + 'static,
    {
        let done = stream::iter(jobs).map(|(mut pod, argument)| {
            let kernel = self.kernel.clone();
            tokio::task::spawn_blocking(move || {
                let result = step(&mut pod, &kernel, argument);
                (pod, result)
            })
        });
        // A step that panicked takes its pod with it; the pod is proven and captured anew in the next pass.
        done.buffer_unordered(CONCURRENT).filter_map(|done| async { done.ok() }).collect().await
    }

    fn publish(
        &mut self,
        desired: &HashMap<PodUid, Arc<Workload>>,
        pending: BTreeMap<PodUid, (Arc<Workload>, String)>,
    ) {
        let mut pods: Vec<PodStatus> = Vec::new();
        for pod in self.pods.values() {
            let impostors = self.reported.iter().filter(|(uid, _)| uid == pod.capture.uid()).map(|(_, i)| i.clone());
            pods.push(PodStatus::of(&pod.capture, pod.failure.clone(), impostors.collect()));
        }
        for (uid, (workload, why)) in pending {
            let impostors = self.reported.iter().filter(|(of, _)| *of == uid).map(|(_, i)| i.clone());
            pods.push(PodStatus::pending(&workload, why, impostors.collect()));
        }
        let known: HashSet<String> = pods.iter().map(|pod| pod.uid.clone()).collect();
        for workload in desired.values().filter(|workload| !known.contains(workload.uid().as_str())) {
            pods.push(PodStatus::pending(workload, "not looked at yet".to_owned(), Vec::new()));
        }
        self.status.publish(pods);
    }
}

/// The next order; none ever where nobody gives any.
async fn next(orders: &mut Option<UnboundedReceiver<Order>>) -> Order {
    match orders {
        Some(orders) => match orders.recv().await {
            Some(order) => order,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// Why capture cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ReconcilerError {
    #[error(transparent)]
    Unavailable(#[from] CaptureUnavailable),
    #[error("the node's network namespace ({0:?}) cannot be opened: {1}")]
    NodeNetns(PathBuf, #[source] io::Error),
}

const CONCURRENT: usize = 8;
/// How often flows of leaving pods are counted.
const LEAVING_INTERVAL: Duration = Duration::from_millis(200);
const MISSING_LOOKS: u8 = 2;
/// How long a pod may be on its way out before it is one that somebody has cut off.
const ENDING: Duration = Duration::from_secs(10);
