//! Pods: a namespace on a node, and the manifest that says so.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::ops::Deref;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::lab::{Families, Node, nodad, without_address_detection};
use crate::namespace::Namespace;

/// One pod. Its namespace lives as long as this, and as any process or socket in it.
#[derive(Debug)]
pub struct Pod {
    namespace: Namespace,
    manifest: Value,
    ips: Vec<IpAddr>,
    host_interface: String,
}

impl Pod {
    pub(crate) fn create(node: &Node, manifest: &Value, families: Families) -> Result<Self> {
        let name = manifest["metadata"]["name"].as_str().unwrap_or_default();
        let uid = manifest["metadata"]["uid"].as_str().with_context(|| format!("Pod {name}: no metadata.uid"))?;
        let ips = manifest["status"]["podIPs"].as_array().into_iter().flatten().filter_map(|ip| ip["ip"].as_str());
        let ips = ips.map(|ip| ip.parse().with_context(|| format!("Pod {name}: bad status.podIPs {ip:?}")));
        let ips: Vec<IpAddr> =
            ips.filter(|ip| ip.as_ref().map_or(true, |ip| families.has(*ip))).collect::<Result<_>>()?;
        if ips.is_empty() {
            bail!("Pod {name}: no status.podIPs");
        }
        let namespace = Namespace::create(&node.netns_dir().join(format!("cni-{uid}")))?;
        if families != Families::V4 {
            without_address_detection(&namespace)?;
        }
        let host_interface = format!("veth{}", node.number_pod());
        let mut host = vec![
            format!("link add {host_interface} type veth peer name eth0 netns {}", namespace.path().display()),
            format!("link set {host_interface} up"),
        ];
        let mut inside = vec!["link set eth0 up".to_owned()];
        for ip in &ips {
            let gateway = node.gateways().into_iter().find(|gateway| gateway.is_ipv4() == ip.is_ipv4());
            let gateway = gateway.with_context(|| format!("{} has no pod range of {ip}'s family", node.name()))?;
            let bits = if ip.is_ipv4() { 32 } else { 128 };
            host.push(format!("addr add {gateway}/{bits} dev {host_interface}{}", nodad(*ip)));
            host.push(format!("route replace {ip}/{bits} dev {host_interface}"));
            inside.push(format!("addr add {ip}/{bits} dev eth0{}", nodad(*ip)));
            inside.push(format!("route add {gateway}/{bits} dev eth0"));
            inside.push(format!("route add default via {gateway} dev eth0"));
        }
        node.ip_batch(host)?;
        namespace.ip_batch(inside)?;
        Ok(Self { namespace, manifest: manifest.clone(), ips, host_interface })
    }

    pub fn name(&self) -> &str {
        self.manifest["metadata"]["name"].as_str().unwrap_or_default()
    }

    pub fn namespace_name(&self) -> &str {
        self.manifest["metadata"]["namespace"].as_str().unwrap_or("default")
    }

    /// `namespace/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace_name(), self.name())
    }

    pub fn uid(&self) -> &str {
        self.manifest["metadata"]["uid"].as_str().unwrap_or_default()
    }

    pub fn node_name(&self) -> &str {
        self.manifest["spec"]["nodeName"].as_str().unwrap_or_default()
    }

    pub fn service_account(&self) -> &str {
        self.manifest["spec"]["serviceAccountName"].as_str().unwrap_or_default()
    }

    pub fn manifest(&self) -> &Value {
        &self.manifest
    }

    /// The first of its addresses: IPv4 unless it has none.
    pub fn ip(&self) -> IpAddr {
        self.ips[0]
    }

    pub fn ips(&self) -> &[IpAddr] {
        &self.ips
    }

    pub fn ip_v6(&self) -> Option<IpAddr> {
        self.ips.iter().copied().find(IpAddr::is_ipv6)
    }

    /// The node's end of the pod's link.
    pub fn host_interface(&self) -> &str {
        &self.host_interface
    }

    pub fn network(&self) -> &Namespace {
        &self.namespace
    }
}

impl Deref for Pod {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // The link goes at once even where a process keeps the namespace: the address may be given to another.
        // A test may have taken it away already.
        let _ = self.namespace.ip_batch(["link del eth0"]);
    }
}

/// One pod to make: joined (by its namespace), with the default service account, unless said otherwise.
#[derive(Clone, Debug)]
pub struct PodSpec {
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub service_account: String,
    pub uid: String,
    /// By default the next free ones of the node's ranges.
    pub ips: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub container: Value,
    pub extra: Vec<(String, Value)>,
}

impl PodSpec {
    /// A pod by `namespace/name`, on a node. It has the label `app: <name>`.
    pub fn new(full_name: &str, node: &str) -> Self {
        let (namespace, name) = full_name.split_once('/').unwrap_or(("default", full_name));
        Self {
            namespace: namespace.into(),
            name: name.into(),
            node: node.into(),
            service_account: "default".into(),
            uid: random_uid(),
            ips: Vec::new(),
            labels: BTreeMap::from([("app".into(), name.into())]),
            annotations: BTreeMap::new(),
            container: json!({"name": "app", "image": "app", "ports": []}),
            extra: Vec::new(),
        }
    }

    pub fn service_account(mut self, name: &str) -> Self {
        self.service_account = name.into();
        self
    }

    pub fn uid(mut self, uid: &str) -> Self {
        self.uid = uid.into();
        self
    }

    pub fn ip(mut self, ip: IpAddr) -> Self {
        self.ips.push(ip);
        self
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.into(), value.into());
        self
    }

    /// Outside the mesh, whatever its namespace says.
    pub fn outside(self) -> Self {
        self.annotation("selvedge.dev/mesh", "disabled")
    }

    /// A named container port.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        if let Some(ports) = self.container["ports"].as_array_mut() {
            ports.push(json!({"name": name, "containerPort": port, "protocol": "TCP"}));
        }
        self
    }

    /// A readiness probe by GET.
    pub fn http_probe(mut self, port: u16, path: &str) -> Self {
        self.container["readinessProbe"] = json!({"httpGet": {"port": port, "path": path}});
        self
    }

    /// A liveness probe by connecting.
    pub fn tcp_probe(mut self, port: u16) -> Self {
        self.container["livenessProbe"] = json!({"tcpSocket": {"port": port}});
        self
    }

    /// Any other field by its JSON pointer, such as `/spec/hostUsers`; its parent must be there.
    pub fn field(mut self, pointer: &str, value: Value) -> Self {
        self.extra.push((pointer.into(), value));
        self
    }

    pub(crate) fn into_manifest(self, ips: &[IpAddr]) -> Value {
        let mut manifest = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": self.namespace,
                "name": self.name,
                "uid": self.uid,
                "labels": self.labels,
                "annotations": self.annotations,
            },
            "spec": {
                "nodeName": self.node,
                "serviceAccountName": self.service_account,
                "containers": [self.container],
            },
            "status": {
                "phase": "Running",
                "podIP": ips[0].to_string(),
                "podIPs": ips.iter().map(|ip| json!({"ip": ip.to_string()})).collect::<Vec<_>>(),
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        for (pointer, value) in self.extra {
            let Some((parent, field)) = pointer.rsplit_once('/') else { continue };
            if let Some(parent) = manifest.pointer_mut(parent) {
                parent[field] = value;
            }
        }
        manifest
    }
}

/// A version 4 UUID.
fn random_uid() -> String {
    let mut bytes = [0_u8; 16];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.unwrap_or_else(|error| panic!("/dev/urandom: {error}"));
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
