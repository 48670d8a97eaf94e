//! Nodes, their link, and what hangs on them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::agent::{Agent, AgentOptions, log_tails};
use crate::manifest::{Manifests, ServiceSpec, authorization, policy, read_documents};
use crate::namespace::Namespace;
use crate::packets::Capture;
use crate::pod::{Pod, PodSpec};
use crate::wait::{BOUND, eventually};

/// A cluster of namespaces. Dropping it ends what still runs in it.
#[derive(Debug)]
pub struct Lab {
    nodes: Vec<Node>,
    /// The switch between the nodes; its own addresses stand for the world outside the cluster.
    outside: Namespace,
    manifests: Manifests,
    binary: Option<PathBuf>,
    families: Families,
    directory: Directory,
}

impl Lab {
    /// Makes the nodes, links them, and writes their Node manifests.
    pub fn new(options: LabOptions) -> Result<Self> {
        let guard = Directory(Path::new(HOME).join(COUNT.fetch_add(1, Ordering::Relaxed).to_string()));
        let directory = &guard.0;
        for part in ["ca", "logs"] {
            fs::create_dir_all(directory.join(part))
                .with_context(|| format!("cannot make {}: was enter() called first?", directory.display()))?;
        }
        let families = options.families.on_this_machine();
        let outside = make_switch(directory, families)?;
        let manifests = match options.manifests {
            Some(folder) => Manifests::existing(folder)?,
            None => Manifests::create(directory.join("manifests"))?,
        };
        let make = |spec| Node::create(directory, spec, families, &outside, &manifests, options.binary.as_deref());
        let nodes: Vec<Node> = options.nodes.iter().map(make).collect::<Result<_>>()?;
        for node in &nodes {
            let routes = nodes.iter().filter(|other| other.name() != node.name()).flat_map(|other| &other.spec.routes);
            node.ip_batch(routes.filter(|route| families.has(route.0)).map(Route::line))?;
        }
        outside.ip_batch(
            nodes.iter().flat_map(|node| &node.spec.routes).filter(|route| families.has(route.0)).map(Route::line),
        )?;
        let lab = Self { nodes, outside, manifests, binary: options.binary, families, directory: guard };
        if !lab.manifests.is_borrowed() {
            for node in &lab.nodes {
                lab.manifests.put(&node.spec.manifest())?;
            }
        }
        Ok(lab)
    }

    /// Makes nodes and pods as a folder of manifests describes them, and uses that folder in place.
    pub fn from_manifests(folder: &Path, binary: Option<PathBuf>) -> Result<(Self, Vec<Pod>)> {
        let objects = read_documents(folder)?;
        let of_kind = |kind: &'static str| objects.iter().filter(move |object| object["kind"] == kind);
        let nodes = of_kind("Node").map(NodeSpec::read).collect::<Result<_>>()?;
        let lab = Self::new(LabOptions { nodes, manifests: Some(folder.into()), binary, ..LabOptions::default() })?;
        let pods = of_kind("Pod").map(|manifest| lab.pod_from(manifest)).collect::<Result<_>>()?;
        Ok((lab, pods))
    }

    /// Makes a pod and writes its manifest, and its Namespace's where none is there: joined.
    pub fn pod(&self, spec: PodSpec) -> Result<Pod> {
        if !self.manifests.has("Namespace", "", &spec.namespace) {
            self.namespace(&spec.namespace, true)?;
        }
        let node = self.find_node(&spec.node)?;
        let ips = match spec.ips.is_empty() {
            true => node.allocate(),
            false => spec.ips.clone(),
        };
        let manifest = spec.into_manifest(&ips);
        let pod = self.pod_from(&manifest)?;
        self.manifests.put(&manifest)?;
        Ok(pod)
    }

    /// Makes the namespace of a pod that a manifest describes, writing nothing.
    pub fn pod_from(&self, manifest: &Value) -> Result<Pod> {
        let node = manifest["spec"]["nodeName"].as_str().context("a Pod without spec.nodeName")?;
        Pod::create(self.find_node(node)?, manifest, self.families)
    }

    /// Deletes a pod as the cluster sees it: its manifest goes, and its namespace unless a process is still in it.
    pub fn delete(&self, pod: Pod) -> Result<()> {
        self.manifests.delete("Pod", pod.namespace_name(), pod.name())
    }

    /// Writes a pod's manifest anew, in the mesh or not.
    pub fn join(&self, pod: &Pod, joined: bool) -> Result<()> {
        let mode = if joined { "enabled" } else { "disabled" };
        let mut manifest = pod.manifest().clone();
        manifest["metadata"]["annotations"]["selvedge.dev/mesh"] = mode.into();
        self.manifests.put(&manifest)
    }

    /// Writes a Namespace, in the mesh or not.
    pub fn namespace(&self, name: &str, joined: bool) -> Result<()> {
        let mode = if joined { "enabled" } else { "disabled" };
        self.manifests.put(&json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "annotations": {"selvedge.dev/mesh": mode}},
        }))
    }

    /// Writes a Service and its EndpointSlices.
    pub fn service(&self, spec: &ServiceSpec) -> Result<()> {
        spec.manifests().iter().try_for_each(|manifest| self.manifests.put(manifest))
    }

    /// Lets nobody talk to the pods of a namespace.
    pub fn deny_all(&self, namespace: &str) -> Result<()> {
        self.put(&authorization(&format!("{namespace}/deny-all"), json!({})))
    }

    /// Lets no plaintext into the pods of a namespace; of the mesh, where that is `selvedge-system`.
    pub fn strict(&self, namespace: &str) -> Result<()> {
        self.put(&policy("PeerAuthentication", &format!("{namespace}/strict"), json!({"mtls": {"mode": "STRICT"}})))
    }

    /// Writes any object into a file of its own, replacing what was there of that kind and name.
    pub fn put(&self, manifest: &Value) -> Result<()> {
        self.manifests.put(manifest)
    }

    /// Writes a file into the folder of manifests at one stroke (write beside, rename).
    pub fn write(&self, file: &str, yaml: &str) -> Result<()> {
        self.manifests.write(file, yaml)
    }

    /// Removes a file from the folder of manifests.
    pub fn remove(&self, file: &str) -> Result<()> {
        self.manifests.remove(file)
    }

    /// The folder of manifests that the agents read.
    pub fn manifests(&self) -> &Path {
        self.manifests.path()
    }

    /// The folder with the CA that the agents share.
    pub fn ca(&self) -> PathBuf {
        self.directory.0.join("ca")
    }

    /// The binary that the agents run.
    pub fn binary(&self) -> Result<PathBuf> {
        selvedge_binary(self.binary.as_deref())
    }

    /// A node by its name; panics where the lab has none, for tests name what they made.
    pub fn node(&self, name: &str) -> &Node {
        self.find_node(name).unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The world outside the cluster: [`Families`] tell its addresses.
    pub fn outside(&self) -> &Namespace {
        &self.outside
    }

    pub fn families(&self) -> Families {
        self.families
    }

    /// Captures the link of the first node: with two nodes, everything that crosses between them.
    pub fn link(&self) -> Result<Capture> {
        self.nodes.first().context("a lab without nodes")?.capture("eth0")
    }

    /// Starts an agent on every node, with the same options.
    pub fn start_agents(&self, options: &AgentOptions) -> Result<Vec<Agent>> {
        // Side by side: the first one to come makes the CA, and both wait for the same folder.
        let started: Vec<_> = self.nodes.iter().map(|node| node.spawn_agent(options)).collect::<Result<_>>()?;
        started.iter().try_for_each(Agent::wait_ready)?;
        Ok(started)
    }

    /// What a verb of the binary prints, run on a node; an error is what it complains of.
    pub fn selvedge(&self, node: &str, arguments: &[&str]) -> Result<String> {
        let output = self.find_node(node)?.output(Command::new(self.binary()?).args(arguments))?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Waits until the agents have taken what was written so far. What was removed is believed a little later.
    pub fn settle(&self, agents: &[Agent]) -> Result<()> {
        static MARKS: AtomicU32 = AtomicU32::new(1);
        let spec = ServiceSpec::new(&format!("lab/mark-{}", MARKS.fetch_add(1, Ordering::Relaxed)));
        let mark = spec.manifests().swap_remove(0);
        self.manifests.put(&mark)?;
        let name = format!("{}/{}", spec.namespace, spec.name);
        let has_mark = |agent: &Agent| {
            agent.dump().is_ok_and(|dump| {
                dump["services"].as_array().is_some_and(|all| all.iter().any(|service| service["name"] == *name))
            })
        };
        for agent in agents {
            eventually(&format!("{} has taken the manifests", agent.node()), BOUND, || has_mark(agent).then_some(()))?;
        }
        self.manifests.delete("Service", &spec.namespace, &spec.name)
    }

    /// The last lines of every agent's log, for a failure's message.
    pub fn log_tails(&self) -> String {
        log_tails(&self.directory.0.join("logs"))
    }

    fn find_node(&self, name: &str) -> Result<&Node> {
        match self.nodes.iter().find(|node| node.name() == name) {
            Some(node) => Ok(node),
            None => bail!("no node {name:?} in this lab"),
        }
    }
}

/// A lab's folder. The last field to drop: a folder with pins mounted in it cannot be removed.
#[derive(Debug)]
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        // What a pod or an agent that outlives the lab still holds goes with the world.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a lab is made of. By default two nodes, `node-a` and `node-b`, with both families.
#[derive(Clone, Debug)]
pub struct LabOptions {
    pub nodes: Vec<NodeSpec>,
    pub families: Families,
    /// A folder of manifests to use in place; by default an empty one is made.
    pub manifests: Option<PathBuf>,
    /// The selvedge binary; by default the environment's `SELVEDGE_BIN`, which also overrides this.
    pub binary: Option<PathBuf>,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            nodes: vec![NodeSpec::numbered("node-a", 1), NodeSpec::numbered("node-b", 2)],
            families: Families::Dual,
            manifests: None,
            binary: None,
        }
    }
}

/// The address families that pods have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Families {
    V4,
    V6,
    Dual,
}

impl Families {
    pub fn has(self, address: IpAddr) -> bool {
        match self {
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
            Self::Dual => true,
        }
    }

    /// Addresses outside the cluster that pods can reach, one a family.
    pub fn outside(self) -> Vec<IpAddr> {
        [IpAddr::V4(OUTSIDE_V4), IpAddr::V6(OUTSIDE_V6)].into_iter().filter(|ip| self.has(*ip)).collect()
    }

    /// Dual where the machine has IPv6, else IPv4.
    fn on_this_machine(self) -> Self {
        match self {
            Self::Dual if !Path::new("/proc/sys/net/ipv6").exists() => Self::V4,
            other => other,
        }
    }
}

/// One node to make.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    pub name: String,
    pub internal_ips: Vec<IpAddr>,
    /// First address (the gateway, `x.1`) and prefix length of each pod range.
    pub pod_ranges: Vec<(IpAddr, u8)>,
    pub labels: Value,
    routes: Vec<Route>,
}

impl NodeSpec {
    pub fn new(name: &str, internal_ips: Vec<IpAddr>, pod_ranges: Vec<(IpAddr, u8)>) -> Self {
        let via = |gateway: &IpAddr| internal_ips.iter().copied().find(|ip| ip.is_ipv4() == gateway.is_ipv4());
        let routes = pod_ranges.iter().filter_map(|(ip, bits)| Some(Route(*ip, *bits, via(ip)?))).collect();
        Self { name: name.into(), internal_ips, pod_ranges, labels: json!({}), routes }
    }

    /// `10.244.N.0/24` and `fd00:10:244:N::/64` at `172.18.0.1N` and `fd00:172:18::1N`.
    pub fn numbered(name: &str, number: u8) -> Self {
        let n = u16::from(number);
        Self::new(
            name,
            vec![
                Ipv4Addr::new(172, 18, 0, 10 + number).into(),
                Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 0x10 + n).into(),
            ],
            vec![
                (Ipv4Addr::new(10, 244, number, 1).into(), 24),
                (Ipv6Addr::new(0xfd00, 0x10, 0x244, n, 0, 0, 0, 1).into(), 64),
            ],
        )
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels[key] = value.into();
        self
    }

    /// Reads a Node manifest: `status.addresses` and `spec.podCIDRs`.
    fn read(manifest: &Value) -> Result<Self> {
        let name = manifest["metadata"]["name"].as_str().context("a Node without metadata.name")?;
        let addresses = manifest["status"]["addresses"].as_array().into_iter().flatten();
        let internal =
            addresses.filter(|address| address["type"] == "InternalIP").filter_map(|a| a["address"].as_str());
        let ips = internal.map(|ip| ip.parse().with_context(|| format!("Node {name}: bad address {ip:?}")));
        let ranges = manifest["spec"]["podCIDRs"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let ranges = ranges.map(|range| read_range(range).with_context(|| format!("Node {name}: bad range {range:?}")));
        Ok(Self::new(name, ips.collect::<Result<_>>()?, ranges.collect::<Result<_>>()?))
    }

    fn manifest(&self) -> Value {
        let ranges: Vec<_> = self.routes.iter().map(Route::range).collect();
        let addresses: Vec<_> =
            self.internal_ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip.to_string()})).collect();
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": self.labels},
            "spec": {"podCIDR": ranges.first(), "podCIDRs": ranges},
            "status": {"addresses": addresses},
        })
    }
}

/// One node: its namespace, and where a runtime would pin its pods'.
#[derive(Debug)]
pub struct Node {
    namespace: Namespace,
    spec: NodeSpec,
    netns_dir: PathBuf,
    lab_directory: PathBuf,
    manifests: PathBuf,
    binary: Option<PathBuf>,
    pods: AtomicU32,
    next_ip: Mutex<u16>,
}

impl Node {
    fn create(
        directory: &Path,
        spec: &NodeSpec,
        families: Families,
        switch: &Namespace,
        manifests: &Manifests,
        binary: Option<&Path>,
    ) -> Result<Self> {
        let own = directory.join(&spec.name);
        let netns_dir = own.join("netns");
        fs::create_dir_all(&netns_dir)?;
        fs::set_permissions(&netns_dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        let namespace = Namespace::create(&own.join("node.netns"))?;
        namespace.sysctl("ipv4.ip_forward", "1")?;
        if families.has(OUTSIDE_V6.into()) {
            without_address_detection(&namespace)?;
            namespace.sysctl("ipv6.conf.all.forwarding", "1")?;
        }
        let mut spec = spec.clone();
        spec.internal_ips.retain(|ip| families.has(*ip));
        spec.pod_ranges.retain(|range| families.has(range.0));
        spec.routes.retain(|route| families.has(route.0));
        switch.ip_batch([
            format!("link add {} type veth peer name eth0 netns {}", spec.name, namespace.path().display()),
            format!("link set {} master br0 up", spec.name),
        ])?;
        let mut lines = vec!["link set eth0 up".to_owned()];
        for ip in &spec.internal_ips {
            lines.push(format!("addr add {ip}/{} dev eth0{}", if ip.is_ipv4() { 16 } else { 64 }, nodad(*ip)));
        }
        for gateway in [IpAddr::V4(SWITCH_V4), IpAddr::V6(SWITCH_V6)] {
            if spec.internal_ips.iter().any(|ip| ip.is_ipv4() == gateway.is_ipv4()) {
                lines.push(format!("route add default via {gateway}"));
            }
        }
        namespace.ip_batch(lines)?;
        Ok(Self {
            namespace,
            spec,
            netns_dir,
            lab_directory: directory.to_owned(),
            manifests: manifests.path().to_owned(),
            binary: binary.map(Path::to_owned),
            pods: AtomicU32::new(1),
            next_ip: Mutex::new(FIRST_POD),
        })
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its InternalIP, of the first family it has.
    pub fn ip(&self) -> IpAddr {
        self.spec.internal_ips.first().copied().unwrap_or_else(|| panic!("{} has no address", self.name()))
    }

    /// The node's end of its pods' links, where kubelet's probes come from; one a family.
    pub fn gateways(&self) -> Vec<IpAddr> {
        self.spec.pod_ranges.iter().map(|range| range.0).collect()
    }

    /// The directory with its pods' namespaces, as a container runtime keeps one.
    pub fn netns_dir(&self) -> &Path {
        &self.netns_dir
    }

    /// The folder that agents of this node and their CNI plugin share.
    pub fn shared_dir(&self) -> PathBuf {
        self.lab_directory.join(self.name()).join("shared")
    }

    /// Starts the agent of this node and waits until it is ready.
    pub fn start_agent(&self, options: &AgentOptions) -> Result<Agent> {
        let agent = self.spawn_agent(options)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Starts the agent of this node, ready or not.
    pub fn spawn_agent(&self, options: &AgentOptions) -> Result<Agent> {
        let binary = selvedge_binary(self.binary.as_deref())?;
        Agent::spawn(self, &binary, &self.manifests, &self.lab_directory, options)
    }

    /// The next free address of each family.
    fn allocate(&self) -> Vec<IpAddr> {
        let mut next = lock(&self.next_ip);
        let host = *next;
        *next += 1;
        self.spec.pod_ranges.iter().map(|range| nth(range.0, range.1, host)).collect()
    }

    pub(crate) fn number_pod(&self) -> u32 {
        self.pods.fetch_add(1, Ordering::Relaxed)
    }
}

impl Deref for Node {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

/// A pod range (its first address, its length) by way of a node.
#[derive(Clone, Copy, Debug)]
struct Route(IpAddr, u8, IpAddr);

impl Route {
    fn range(&self) -> String {
        format!("{}/{}", nth(self.0, self.1, 0), self.1)
    }

    fn line(&self) -> String {
        format!("route add {} via {}", self.range(), self.2)
    }
}

/// `nodad`, so that an IPv6 address is of use at once.
pub(crate) fn nodad(address: IpAddr) -> &'static str {
    if address.is_ipv6() { " nodad" } else { "" }
}

/// Link-local addresses, too, are of use at once.
pub(crate) fn without_address_detection(namespace: &Namespace) -> Result<()> {
    namespace.sysctl("ipv6.conf.all.accept_dad", "0")?;
    namespace.sysctl("ipv6.conf.default.accept_dad", "0")
}

fn make_switch(directory: &Path, families: Families) -> Result<Namespace> {
    let switch = Namespace::create(&directory.join("outside.netns"))?;
    switch.sysctl("ipv4.ip_forward", "1")?;
    let mut lines = vec!["link add br0 type bridge".to_owned(), "link set br0 up".to_owned()];
    if families.has(OUTSIDE_V4.into()) {
        lines.extend([format!("addr add {SWITCH_V4}/16 dev br0"), format!("addr add {OUTSIDE_V4}/32 dev lo")]);
    }
    if families.has(OUTSIDE_V6.into()) {
        without_address_detection(&switch)?;
        switch.sysctl("ipv6.conf.all.forwarding", "1")?;
        lines.extend([
            format!("addr add {SWITCH_V6}/64 dev br0 nodad"),
            format!("addr add {OUTSIDE_V6}/128 dev lo nodad"),
        ]);
    }
    switch.ip_batch(lines)?;
    Ok(switch)
}

fn read_range(range: &str) -> Result<(IpAddr, u8)> {
    let (ip, bits) = range.split_once('/').context("no prefix length")?;
    let bits = bits.parse()?;
    Ok((nth(ip.parse()?, bits, 1), bits))
}

/// The same range's `host`-th address: pod ranges here leave at most the last 16 bits to hosts.
fn nth(ip: IpAddr, bits: u8, host: u16) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let hosts = u32::MAX.checked_shr(bits.into()).unwrap_or_default();
            Ipv4Addr::from(u32::from(ip) & !hosts | u32::from(host) & hosts).into()
        }
        IpAddr::V6(ip) => {
            let mut segments = ip.segments();
            segments[7] = host;
            Ipv6Addr::from(segments).into()
        }
    }
}

fn selvedge_binary(given: Option<&Path>) -> Result<PathBuf> {
    let path = std::env::var_os("SELVEDGE_BIN").map(PathBuf::from).or_else(|| given.map(Path::to_owned));
    let path = path.context("no selvedge binary was given: set SELVEDGE_BIN to its path")?;
    if !path.is_file() {
        bail!("{} is not there: build it first (cargo build)", path.display());
    }
    Ok(path)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

static COUNT: AtomicU32 = AtomicU32::new(1);

/// In the world's private /run, so that it goes with the world.
const HOME: &str = "/run/selvedge-lab";
const SWITCH_V4: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);
const SWITCH_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 1);
const OUTSIDE_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
/// Hosts below are for gateways and for addresses that tests choose.
const FIRST_POD: u16 = 20;
