//! One pod's capture: makes it true, sees whether it still is, and takes it away. Blocking; runs off the runtime.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use super::address;
use super::fingerprint::Fingerprint;
use super::hold::HoldQueue;
use super::iptables::{Chosen, Found};
use super::keeper::ListenerKeeper;
use super::netns::NetNs;
use super::probe::ProbeQueue;
use super::routes::{Routing, Timeouts, raise_timeouts};
use super::rules::{IpVersion, Marks, Mode, OtherMesh, Phase, Ports, Probes, RuleSet};
use super::socket::{self, ListenAddr};
use crate::handover::{Family, ListenerKey, Role};
use crate::mesh::{Connect, Exclusions, Membership, PodUid, Workload};

/// A pod whose connections are taken: what the proxy needs to serve it.
#[derive(Debug)]
pub struct CapturedPod {
    pub workload: Arc<Workload>,
    pub netns: NetNs,
    pub marks: Marks,
    pub mode: Mode,
    pub ports: Ports,
    pub listeners: Listeners,
    /// The SYNs that wait for an answer; none where `connect()` is answered at once.
    pub hold: Option<Arc<HoldQueue>>,
}

/// Nonblocking listeners in the pod's namespace, one of each family that lives there.
#[derive(Debug, Default)]
pub struct Listeners {
    pub outbound: Vec<TcpListener>,
    pub plaintext: Vec<TcpListener>,
    pub tunnel: Vec<TcpListener>,
}

/// What all pods share.
pub(super) struct Kernel {
    pub chosen: Chosen,
    pub node: NetNs,
    pub ports: Ports,
    /// Where neither the pod nor its namespace says it.
    pub connect: Connect,
    pub keeper: Arc<dyn ListenerKeeper>,
    pub inherited: Mutex<HashMap<ListenerKey, OwnedFd>>,
    pub runtime: tokio::runtime::Handle,
}

/// What of a pod's capture was mended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Drift {
    Rules,
    Routes,
    Listener,
    Queue,
    Timeouts,
}

/// Why a pod cannot be captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(
        "rules of {} are in the pod (chain {}); take the pod out of that mesh and restart it, for two meshes would \
         capture each connection twice", .0.mesh, .0.chain
    )]
    OtherMesh(OtherMesh),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl CaptureError {
    /// Whether the pod's loopback is down.
    pub fn is_network_down(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::NetworkDown)
    }
}

#[derive(Debug)]
pub(super) struct PodCapture {
    pub workload: Arc<Workload>,
    pub netns: NetNs,
    pub cookie: Option<u64>,
    pub phase: Phase,
    pub captured: Option<Arc<CapturedPod>>,
    pub programmed: Option<Programmed>,
    pub versions: Vec<IpVersion>,
    pub marks: Option<Marks>,
    queue: Option<ProbeQueue>,
    timeouts: Timeouts,
}

/// The rules as they were last put in, and as the kernel then showed them.
#[derive(Clone, Debug)]
pub(super) struct Programmed {
    pub rules: RuleSet,
    pub found: Found,
    fingerprint: Fingerprint,
}

impl PodCapture {
    pub fn new(workload: Arc<Workload>, netns: NetNs) -> Self {
        let cookie = netns.enter(|| Ok(address::namespace_cookie())).ok().flatten();
        Self {
            workload,
            netns,
            cookie,
            phase: Phase::Capturing,
            captured: None,
            programmed: None,
            versions: Vec::new(),
            marks: None,
            queue: None,
            timeouts: Timeouts::DEFAULT,
        }
    }

    pub fn uid(&self) -> &PodUid {
        self.workload.uid()
    }

    /// Makes everything true in order: listeners, the queue, routes, and last the rules that lead there. Returns
    /// what had to be mended of what was true before.
    pub fn converge(&mut self, kernel: &Kernel, node_addresses: &[IpAddr]) -> Result<Vec<Drift>, CaptureError> {
        let was_true = self.programmed.is_some();
        let mut drift = Vec::new();
        if !was_true {
            let found = self.netns.run(|| kernel.chosen.found())?;
            if let Some(other) = found.other_mesh {
                return Err(CaptureError::OtherMesh(other));
            }
            self.versions = self.netns.enter(|| Ok(kernel.chosen.versions()))?;
            self.marks = Some(found.marks().unwrap_or_else(|| Marks::draw(rand::random)));
        }
        let marks = *self.marks.get_or_insert_with(|| Marks::draw(rand::random));

        let lost = self.captured.as_ref().is_some_and(|captured| !captured.listeners.all_listen());
        let hold = self.hold_queue(kernel, &mut drift)?;
        let before = self.captured.as_ref();
        if lost || !before.is_some_and(|before| same(before.hold.as_ref(), hold.as_ref())) {
            let listeners = self.listen(kernel, marks, before.map(|before| &before.listeners))?;
            self.captured = Some(Arc::new(CapturedPod {
                workload: self.workload.clone(),
                netns: self.netns.clone(),
                marks,
                mode: kernel.chosen.mode,
                ports: kernel.ports,
                listeners,
                hold,
            }));
        }
        if lost {
            drift.push(Drift::Listener);
        }

        let rules = self.rules(kernel, marks, node_addresses);
        self.keep_queue(kernel, &rules, &mut drift)?;
        let mut routes_changed = false;
        for version in &self.versions {
            routes_changed |= self.netns.enter(|| Routing::ensure(*version, &marks))?;
        }
        if routes_changed && was_true {
            drift.push(Drift::Routes);
        }
        if self.program(kernel, rules)? {
            drift.push(Drift::Rules);
        }
        let raised = self.netns.enter(|| Ok(Timeouts::read().is_ok_and(Timeouts::are_raised)))?;
        if !raised || !was_true {
            self.timeouts = self.netns.enter(raise_timeouts)?;
            if was_true {
                drift.push(Drift::Timeouts);
            }
        }
        Ok(drift)
    }

    /// Puts the rules in if they are not as wanted. Returns whether they had been changed by somebody else.
    fn program(&mut self, kernel: &Kernel, rules: RuleSet) -> Result<bool, CaptureError> {
        let fingerprint = self.netns.enter(|| Ok(Fingerprint::take()))?;
        let mut drifted = false;
        if let Some(programmed) = self.programmed.as_mut().filter(|programmed| programmed.rules == rules) {
            if programmed.fingerprint == fingerprint {
                return Ok(false);
            }
            let found = self.netns.run(|| kernel.chosen.found())?;
            if let Some(other) = found.other_mesh {
                return Err(CaptureError::OtherMesh(other));
            }
            if found == programmed.found {
                programmed.fingerprint = fingerprint;
                return Ok(false);
            }
            drifted = true;
        }
        let found = self.netns.run(|| kernel.chosen.program(&rules))?;
        let fingerprint = self.netns.enter(|| Ok(Fingerprint::take()))?;
        self.programmed = Some(Programmed { rules, found, fingerprint });
        Ok(drifted)
    }

    fn rules(&self, kernel: &Kernel, marks: Marks, node_addresses: &[IpAddr]) -> RuleSet {
        let exclusions = match &self.workload.membership {
            Membership::Joined(exclusions) => exclusions.clone(),
            Membership::Outside(_) => Exclusions::default(),
        };
        let ports = self.workload.pod.probes.iter().map(|probe| probe.port);
        let ports = ports.filter(|port| !exclusions.inbound_ports.contains(port)).collect();
        let probes = Probes { queue: PROBE_QUEUE, ports, node_addresses: node_addresses.iter().copied().collect() };
        let wanted = kernel.chosen.queue && !probes.ports.is_empty() && self.phase == Phase::Capturing;
        RuleSet {
            mode: kernel.chosen.mode,
            phase: self.phase,
            marks,
            ports: kernel.ports,
            exclusions,
            probes: wanted.then_some(probes),
            hold: self.holds(kernel),
        }
    }

    /// Whether SYNs of the pod wait for an answer.
    pub fn holds(&self, kernel: &Kernel) -> bool {
        kernel.chosen.hold && self.workload.connect.unwrap_or(kernel.connect) == Connect::Truthful
    }

    /// The queue of SYNs that wait: the one there is, or a new one where there is none that works.
    fn hold_queue(&self, kernel: &Kernel, drift: &mut Vec<Drift>) -> io::Result<Option<Arc<HoldQueue>>> {
        let key = self.key(Role::Hold, Family::Both);
        let before = self.captured.as_ref().and_then(|captured| captured.hold.clone());
        let inherited = kernel.inherited.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        if !self.holds(kernel) {
            (before.is_some() || inherited.is_some()).then(|| kernel.keeper.forget(&key));
            return Ok(None);
        }
        match (before, inherited) {
            (Some(queue), _) if !queue.has_failed() => return Ok(Some(queue)),
            (Some(queue), _) => {
                drift.push(Drift::Queue);
                queue.close()?;
            }
            (None, Some(inherited)) => match HoldQueue::adopt(&self.netns, inherited) {
                Ok(queue) => return Ok(Some(Arc::new(queue))),
                Err(error) => tracing::debug!(%error, "A queue of SYNs cannot be gone on with; another is opened."),
            },
            (None, None) => {}
        }
        // The parent's copy would keep its number.
        kernel.keeper.forget(&key);
        let queue = HoldQueue::open(&self.netns)?;
        kernel.keeper.keep(&key, queue.as_fd())?;
        Ok(Some(Arc::new(queue)))
    }

    fn keep_queue(&mut self, kernel: &Kernel, rules: &RuleSet, drift: &mut Vec<Drift>) -> io::Result<()> {
        if rules.probes.is_none() {
            // Rules that still lead to a queue are replaced right after this, and a SYN dropped meanwhile is repeated.
            self.queue = None;
            return Ok(());
        }
        let died = self.queue.as_ref().is_some_and(|queue| !queue.is_alive());
        if died {
            self.queue = None;
            drift.push(Drift::Queue);
        }
        if self.queue.is_none() {
            self.queue = Some(ProbeQueue::serve(&self.netns, &kernel.node, PROBE_QUEUE, &kernel.runtime)?);
        }
        Ok(())
    }

    /// Takes over what still listens, of `before` or of a worker before this one, and makes the rest.
    fn listen(&self, kernel: &Kernel, marks: Marks, before: Option<&Listeners>) -> io::Result<Listeners> {
        let mut listeners = Listeners::default();
        let near = if kernel.chosen.mode == Mode::Tproxy { ListenAddr::Loopback } else { ListenAddr::Any };
        let roles = [
            (Role::Outbound, kernel.ports.outbound, near),
            (Role::Plaintext, kernel.ports.plaintext, near),
            (Role::Tunnel, kernel.ports.tunnel, ListenAddr::Any),
        ];
        for version in &self.versions {
            for (role, port, addr) in roles {
                let key = self.key(role, family(*version));
                let inherited =
                    kernel.inherited.lock().unwrap_or_else(PoisonError::into_inner).remove(&key).map(TcpListener::from);
                let inherited = inherited.filter(|listener| {
                    let as_wanted = listener.local_addr().is_ok_and(|local| {
                        local.port() == port && local.ip().is_loopback() == (addr == ListenAddr::Loopback)
                    });
                    as_wanted && socket::is_listening(listener)
                });
                let still = before.and_then(|before| before.listening(role, *version));
                let listener = match inherited.or(still) {
                    Some(listener) => listener,
                    None => {
                        kernel.keeper.forget(&key);
                        let made = self.netns.enter(|| socket::listener(*version, addr, port, marks.own))?;
                        kernel.keeper.keep(&key, made.as_fd())?;
                        made
                    }
                };
                socket::adopt_listener(&listener, marks.own, role != Role::Tunnel)?;
                match role {
                    Role::Outbound => listeners.outbound.push(listener),
                    Role::Plaintext => listeners.plaintext.push(listener),
                    Role::Tunnel => listeners.tunnel.push(listener),
                    Role::Hold => {} // No listener.
                }
            }
        }
        Ok(listeners)
    }

    /// Takes only what captures new connections away.
    pub fn begin_leaving(&mut self, kernel: &Kernel) -> Result<(), CaptureError> {
        self.phase = Phase::Leaving;
        let Some(marks) = self.marks.filter(|_| self.programmed.is_some()) else { return Ok(()) };
        let rules = self.rules(kernel, marks, &[]);
        self.program(kernel, rules)?;
        self.queue = None;
        Ok(())
    }

    /// Takes everything away, to the last chain, rule and route. Goes on past an error and returns the first.
    pub fn finish_leaving(&mut self, kernel: &Kernel) -> io::Result<()> {
        let mut result = remove_all(&self.netns, &kernel.chosen);
        if self.programmed.take().is_some() {
            result = result.and(self.netns.enter(|| self.timeouts.write()));
        }
        self.queue = None;
        self.captured = None;
        self.forget_listeners(kernel);
        result
    }

    /// Has nobody keep the listeners any longer.
    pub fn forget_listeners(&self, kernel: &Kernel) {
        for version in [IpVersion::V4, IpVersion::V6] {
            for role in [Role::Outbound, Role::Plaintext, Role::Tunnel] {
                kernel.keeper.forget(&self.key(role, family(version)));
            }
        }
        kernel.keeper.forget(&self.key(Role::Hold, Family::Both));
    }

    /// Copies of the listeners, for the next agent of this node.
    pub fn listeners(&self) -> Vec<(ListenerKey, OwnedFd)> {
        let of_role = |role, listeners: &[TcpListener]| {
            let copies = listeners.iter().filter_map(|listener| {
                let family = if listener.local_addr().ok()?.is_ipv4() { Family::V4 } else { Family::V6 };
                Some((self.key(role, family), listener.as_fd().try_clone_to_owned().ok()?))
            });
            copies.collect::<Vec<_>>()
        };
        let Some(captured) = &self.captured else { return Vec::new() };
        let Listeners { outbound, plaintext, tunnel } = &captured.listeners;
        let mut all = of_role(Role::Outbound, outbound);
        all.extend(of_role(Role::Plaintext, plaintext));
        all.extend(of_role(Role::Tunnel, tunnel));
        all
    }

    /// Gives the queues' numbers back, for the next agent of this node.
    pub async fn close_queues(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.close().await;
        }
        let hold = self.captured.as_ref().and_then(|captured| captured.hold.as_ref());
        if let Some(Err(error)) = hold.map(|queue| queue.close()) {
            tracing::warn!(pod = %self.workload.name(), %error, "A queue of waiting SYNs could not be closed.");
        }
    }

    /// Has the queue of waiting SYNs opened anew.
    pub fn reopen_queue(&self) {
        if let Some(queue) = self.captured.as_ref().and_then(|captured| captured.hold.as_ref()) {
            queue.fail();
        }
    }

    fn key(&self, role: Role, family: Family) -> ListenerKey {
        let id = self.netns.id();
        ListenerKey { pod: self.uid().clone(), role, family, netns: (id.dev, id.ino) }
    }
}

impl Listeners {
    fn all_listen(&self) -> bool {
        self.iter().all(|(_, listener)| socket::is_listening(listener))
    }

    fn listening(&self, role: Role, version: IpVersion) -> Option<TcpListener> {
        let mut of_role = match role {
            Role::Outbound => &self.outbound,
            Role::Plaintext => &self.plaintext,
            Role::Tunnel => &self.tunnel,
            Role::Hold => return None,
        }
        .iter();
        let found = of_role.find(|listener| listener.local_addr().is_ok_and(|local| version.has(local.ip())))?;
        socket::is_listening(found).then(|| found.try_clone().ok()).flatten()
    }

    /// Every listener with its role's name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &TcpListener)> {
        let outbound = self.outbound.iter().map(|listener| ("outbound", listener));
        let plaintext = self.plaintext.iter().map(|listener| ("plaintext", listener));
        outbound.chain(plaintext).chain(self.tunnel.iter().map(|listener| ("tunnel", listener)))
    }
}

fn family(version: IpVersion) -> Family {
    match version {
        IpVersion::V4 => Family::V4,
        IpVersion::V6 => Family::V6,
    }
}

fn same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    }
}

/// Takes whatever is ours out of a namespace: rules of either back end, and routing.
pub(super) fn remove_all(netns: &NetNs, chosen: &Chosen) -> io::Result<()> {
    let mut result = netns.run(|| chosen.remove());
    for version in netns.enter(|| Ok(chosen.versions()))? {
        result = result.and(netns.enter(|| Routing::remove(version)));
    }
    result
}

/// Queues have numbers of their own in each namespace; this one is named after the port that it guards.
const PROBE_QUEUE: u16 = 15006;
