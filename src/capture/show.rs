//! What is in place and what should be, for `selvedge capture show` and the state dump.

use std::fmt::{self, Write};
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::iptables::{BackEnd, Chosen, Found};
use super::netns::NetNs;
use super::pod::PodCapture;
use super::proof::Impostor;
use super::routes::{Routing, Timeouts};
use super::rules::{IpVersion, Mode, Phase};
use crate::mesh::{Connect, Workload};

/// The state of every pod that is joined or leaving, shared.
#[derive(Clone, Debug)]
pub struct CaptureStatus(Arc<RwLock<Snapshot>>, watch::Sender<Looks>);

/// How often every pod has been looked at, and whether it is this agent that does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Looks {
    pub count: u64,
    /// Another agent of this node programs the rules: what this one knows of them may be of yesterday.
    pub resting: bool,
}

/// One moment of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    pub mode: Mode,
    pub back_end: BackEnd,
    /// Whether probes wait in a queue for proof; without it they are ordinary plaintext under policy.
    pub honest_probes: bool,
    /// When connect() is answered, where neither a pod nor its namespace says it.
    pub connect: Connect,
    /// Ways to capture that are preferred and do not work here, and why.
    pub refused: Vec<String>,
    pub pods: Vec<PodStatus>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodState {
    Captured,
    Pending,
    Failed,
    Leaving,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodStatus {
    pub pod: String,
    pub uid: String,
    pub ips: Vec<IpAddr>,
    pub state: PodState,
    /// Why it is pending or failed.
    pub reason: Option<String>,
    pub netns: Option<String>,
    pub listeners: Vec<String>,
    /// When the pod's connect() is answered; none before it is captured.
    pub connect: Option<Connect>,
    /// Ports on which probes of the node are recognised.
    pub probe_ports: Vec<u16>,
    /// The rules that should be, as the kernel showed them when they were put in.
    pub rules: Option<Found>,
    /// The routing that should be, in each of `families`.
    pub routing: Option<Routing>,
    pub families: Vec<IpVersion>,
    /// By which a process on this node can open the namespace.
    pub handle: Option<PathBuf>,
    /// What is in place, as the kernel shows it to [`PodStatus::look`].
    pub actual: Option<Actual>,
    /// In what it differs from what should be.
    pub drift: Vec<String>,
    /// Others that hold the pod's address.
    pub impostors: Vec<Impostor>,
}

/// What is in place of ours in one namespace, read from the kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Actual {
    pub netns: String,
    pub rules: Found,
    pub routing_v4: Routing,
    pub routing_v6: Routing,
    /// conntrack's time-outs of half-closed connections; none where conntrack is not in use.
    pub timeouts: Option<Timeouts>,
}

impl CaptureStatus {
    pub(super) fn new(chosen: &Chosen, connect: Connect) -> Self {
        let (mode, back_end) = (chosen.mode.name(), chosen.back_end.name());
        let probes = if chosen.queue { "queued" } else { "plaintext" };
        metrics::gauge!(
            "selvedge_capture_info",
            "mode" => mode, "back_end" => back_end, "probes" => probes, "connect" => connect.name()
        )
        .set(1.0);
        let snapshot = Snapshot {
            mode: chosen.mode,
            back_end: chosen.back_end,
            honest_probes: chosen.queue,
            connect,
            refused: chosen.refused.clone(),
            pods: Vec::new(),
        };
        Self(Arc::new(RwLock::new(snapshot)), watch::Sender::default())
    }

    /// Moves whenever every pod has been looked at once more, and when another agent of the node has its turn.
    pub fn subscribe(&self) -> watch::Receiver<Looks> {
        self.1.subscribe()
    }

    /// Reads it without a copy.
    pub fn read<T>(&self, read: impl FnOnce(&Snapshot) -> T) -> T {
        read(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_resting(&self, resting: bool) {
        self.1.send_modify(|looks| looks.resting = resting);
    }

    pub fn snapshot(&self) -> Snapshot {
        self.read(Snapshot::clone)
    }

    pub(super) fn publish(&self, mut pods: Vec<PodStatus>) {
        pods.sort_by(|one, other| one.pod.cmp(&other.pod));
        for (state, label) in
            [(PodState::Captured, "captured"), (PodState::Pending, "pending"), (PodState::Failed, "failed")]
        {
            let count = pods.iter().filter(|pod| pod.state == state).count();
            metrics::gauge!("selvedge_pods", "state" => label).set(count as f64);
        }
        self.0.write().unwrap_or_else(PoisonError::into_inner).pods = pods;
        self.1.send_modify(|looks| looks.count += 1);
    }
}

impl Actual {
    /// Reads a namespace, with or without an agent.
    pub fn read(netns: &NetNs) -> io::Result<Self> {
        let rules = Found::look(netns)?;
        netns.enter(|| {
            Ok(Self {
                netns: netns.id().to_string(),
                rules,
                routing_v4: Routing::read(IpVersion::V4)?,
                routing_v6: Routing::read(IpVersion::V6).unwrap_or_default(),
                timeouts: Timeouts::read().ok(),
            })
        })
    }
}

impl PodStatus {
    pub(super) fn of(capture: &PodCapture, failure: Option<String>, impostors: Vec<Impostor>) -> Self {
        let state = match (&failure, capture.phase) {
            (Some(_), _) => PodState::Failed,
            (None, Phase::Leaving) => PodState::Leaving,
            (None, Phase::Capturing) if capture.programmed.is_some() => PodState::Captured,
            (None, Phase::Capturing) => PodState::Pending,
        };
        let listeners = capture.captured.iter().flat_map(|captured| {
            captured.listeners.iter().map(|(role, listener)| match listener.local_addr() {
                Ok(addr) => format!("{role} {addr}"),
                Err(error) => format!("{role}: {error}"),
            })
        });
        let rules = capture.programmed.as_ref();
        let probes = rules.and_then(|programmed| programmed.rules.probes.as_ref());
        Self {
            netns: Some(capture.netns.id().to_string()),
            listeners: listeners.collect(),
            connect: rules.map(|programmed| if programmed.rules.hold { Connect::Truthful } else { Connect::Eager }),
            probe_ports: probes.map(|probes| probes.ports.iter().copied().collect()).unwrap_or_default(),
            rules: rules.map(|programmed| programmed.found.clone()),
            routing: capture.marks.filter(|_| rules.is_some()).map(|marks| Routing::wanted(&marks)),
            families: capture.versions.clone(),
            handle: Some(capture.netns.handle()),
            ..Self::bare(&capture.workload, state, failure, impostors)
        }
    }

    pub(super) fn pending(workload: &Workload, why: String, impostors: Vec<Impostor>) -> Self {
        Self::bare(workload, PodState::Pending, Some(why), impostors)
    }

    /// Reads the pod's namespace from the kernel, and compares.
    pub fn look(&mut self) -> io::Result<()> {
        let Some(handle) = &self.handle else { return Ok(()) };
        let actual = Actual::read(&NetNs::open(handle)?)?;
        self.drift = self.rules.iter().flat_map(|wanted| differences(wanted, &actual.rules)).collect();
        for (version, routing) in [(IpVersion::V4, &actual.routing_v4), (IpVersion::V6, &actual.routing_v6)] {
            if let Some(wanted) = self.routing.as_ref().filter(|_| self.families.contains(&version))
                && wanted != routing
            {
                let counts = |routing: &Routing| format!("{} rules, {} routes", routing.rules.len(), routing.routes);
                let (wanted, found) = (counts(wanted), counts(routing));
                self.drift.push(format!("changed  {} routing: {found}; it should be {wanted}", version.name()));
            }
        }
        self.actual = Some(actual);
        Ok(())
    }

    fn bare(workload: &Workload, state: PodState, reason: Option<String>, impostors: Vec<Impostor>) -> Self {
        Self {
            pod: workload.name().to_string(),
            uid: workload.uid().to_string(),
            ips: workload.pod.ips.clone(),
            state,
            reason,
            netns: None,
            listeners: Vec::new(),
            connect: None,
            probe_ports: Vec::new(),
            rules: None,
            routing: None,
            families: Vec::new(),
            handle: None,
            actual: None,
            drift: Vec::new(),
            impostors,
        }
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let probes = if self.honest_probes { "recognised" } else { WITHOUT_QUEUE };
        let (mode, back_end, connect) = (self.mode.name(), self.back_end.name(), self.connect.name());
        writeln!(f, "mode {mode}, back end {back_end}, connect() {connect}, probes {probes}")?;
        self.refused.iter().try_for_each(|refused| writeln!(f, "not used: {refused}"))?;
        self.pods.iter().try_for_each(|pod| write!(f, "\n{pod}"))
    }
}

impl fmt::Display for PodStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: &[String]| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
        writeln!(f, "{}: {}", self.pod, format!("{:?}", self.state).to_lowercase())?;
        if let Some(reason) = &self.reason {
            row(f, "because", reason)?;
        }
        row(f, "addresses", &list(&self.ips.iter().map(IpAddr::to_string).collect::<Vec<_>>()))?;
        row(f, "namespace", self.netns.as_deref().unwrap_or("not proven"))?;
        row(f, "listeners", &list(&self.listeners))?;
        row(f, "connect()", self.connect.map_or("not captured yet", Connect::name))?;
        row(f, "probe ports", &list(&self.probe_ports.iter().map(u16::to_string).collect::<Vec<_>>()))?;
        for impostor in &self.impostors {
            row(f, "impostor", &format!("{} ({}) holds {}", impostor.place.display(), impostor.netns, impostor.ip))?;
        }
        if self.actual.is_some() && self.rules.is_some() {
            match self.drift.is_empty() {
                true => row(f, "in place", "as it should be")?,
                false => row(f, "in place", "not as it should be; the agent mends it")?,
            }
            self.drift.iter().try_for_each(|part| writeln!(f, "    {part}"))?;
        }
        match &self.rules {
            Some(rules) => write!(f, "{rules}"),
            None => row(f, "rules", "none"),
        }
    }
}

impl fmt::Display for Actual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        row(f, "namespace", &self.netns)?;
        for (name, routing) in [("IPv4 routing", &self.routing_v4), ("IPv6 routing", &self.routing_v6)] {
            row(f, name, &format!("{} rules, {} routes", routing.rules.len(), routing.routes))?;
        }
        if let Some(timeouts) = self.timeouts {
            let Timeouts { close_wait, fin_wait } = timeouts;
            row(f, "half-closed", &format!("remembered for {close_wait} s (close_wait), {fin_wait} s (fin_wait)"))?;
        }
        write!(f, "{}", self.rules)
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(other) = &self.other_mesh {
            row(f, "other mesh", &format!("{} (chain {})", other.mesh, other.chain))?;
        }
        if self.is_empty() {
            return row(f, "rules", "none");
        }
        let mut text = String::new();
        for place in &self.places {
            for table in &place.in_place.tables {
                let first = if table.jumps_first { "" } else { ", not first in its chain" };
                writeln!(text, "  {} {} {}{first}", place.version.name(), place.back_end.name(), table.table)?;
                for rule in &table.rules {
                    writeln!(text, "    {rule}")?;
                }
            }
        }
        f.write_str(&text)
    }
}

/// What is missing of the rules that should be, what is there beside them, and what stands elsewhere than it should.
fn differences(wanted: &Found, actual: &Found) -> Vec<String> {
    let lines = |found: &Found| -> Vec<String> {
        let tables =
            found.places.iter().flat_map(|place| place.in_place.tables.iter().map(move |table| (place, table)));
        let lines = tables.flat_map(|(place, table)| {
            let name = format!("{} {} {}", place.version.name(), place.back_end.name(), table.table);
            table.rules.iter().map(move |rule| format!("{name}: {rule}"))
        });
        lines.collect()
    };
    let (wanted_lines, actual_lines) = (lines(wanted), lines(actual));
    let beyond = |these: &[String], those: &[String], word: &str| -> Vec<String> {
        let mut those = those.to_vec();
        let rest = these.iter().filter(|line| match those.iter().position(|other| other == *line) {
            Some(position) => {
                those.swap_remove(position);
                false
            }
            None => true,
        });
        rest.map(|line| format!("{word}  {line}")).collect()
    };
    let mut differences = beyond(&wanted_lines, &actual_lines, "missing");
    differences.extend(beyond(&actual_lines, &wanted_lines, "extra  "));
    if differences.is_empty() && wanted.places != actual.places {
        differences.push("changed  the order of the rules".to_owned());
    }
    if let Some(other) = &actual.other_mesh {
        differences.push(format!("extra    rules of {} (chain {})", other.mesh, other.chain));
    }
    differences
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, value: &str) -> fmt::Result {
    writeln!(f, "  {name:<14}{value}")
}

/// What becomes of probes where no SYN can wait for its verdict.
pub(super) const WITHOUT_QUEUE: &str = "recognised once connected, for the kernel has no NFQUEUE: \
    a TCP probe of a port where nothing listens succeeds, and is reset after that";
