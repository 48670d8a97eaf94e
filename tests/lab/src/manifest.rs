//! The folder of manifests, and the Service manifests that tests write most.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::pod::Pod;

/// An AuthorizationPolicy, by `namespace/name`.
pub fn authorization(full_name: &str, spec: Value) -> Value {
    policy("AuthorizationPolicy", full_name, spec)
}

/// A policy of one of our kinds, by `namespace/name`.
pub fn policy(kind: &str, full_name: &str, spec: Value) -> Value {
    let (namespace, name) = full_name.split_once('/').unwrap_or(("default", full_name));
    json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": kind,
        "metadata": {"namespace": namespace, "name": name}, "spec": spec,
    })
}

/// Reads every object of a folder's YAML files, files in the order of their names.
pub fn read_documents(folder: &Path) -> Result<Vec<Value>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml" || extension == "yml"));
    files.sort();
    let mut objects = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for document in serde_yaml::Deserializer::from_str(&text) {
            let object = Value::deserialize(document).with_context(|| file.display().to_string())?;
            if !object.is_null() {
                objects.push(object);
            }
        }
    }
    Ok(objects)
}

#[derive(Debug)]
pub(crate) struct Manifests {
    folder: PathBuf,
    borrowed: bool,
}

impl Manifests {
    pub(crate) fn create(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self { folder, borrowed: false })
    }

    /// Somebody else's folder, used in place.
    pub(crate) fn existing(folder: PathBuf) -> Result<Self> {
        let folder = folder.canonicalize().with_context(|| format!("cannot find {}", folder.display()))?;
        Ok(Self { folder, borrowed: true })
    }

    pub(crate) fn is_borrowed(&self) -> bool {
        self.borrowed
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn has(&self, kind: &str, namespace: &str, name: &str) -> bool {
        self.folder.join(file_name(kind, namespace, name)).exists()
    }

    pub(crate) fn put(&self, manifest: &Value) -> Result<()> {
        let text = |field: &str| manifest["metadata"][field].as_str().unwrap_or_default();
        let kind = manifest["kind"].as_str().context("a manifest without kind")?;
        self.write(&file_name(kind, text("namespace"), text("name")), &serde_yaml::to_string(manifest)?)
    }

    pub(crate) fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        self.remove(&file_name(kind, namespace, name))
    }

    pub(crate) fn write(&self, file: &str, text: &str) -> Result<()> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let path = self.folder.join(file);
        let beside = self.folder.join(format!(".{file}.{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        fs::write(&beside, text).with_context(|| format!("cannot write {}", beside.display()))?;
        fs::rename(&beside, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    pub(crate) fn remove(&self, file: &str) -> Result<()> {
        let path = self.folder.join(file);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }
}

fn file_name(kind: &str, namespace: &str, name: &str) -> String {
    let kind = kind.to_lowercase();
    if namespace.is_empty() { format!("{kind}-{name}.yaml") } else { format!("{kind}-{namespace}-{name}.yaml") }
}

/// One Service and its endpoints to write.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    pub namespace: String,
    pub name: String,
    pub cluster_ips: Vec<IpAddr>,
    pub ports: Vec<(String, u16, u16)>,
    pub endpoints: Vec<(Vec<IpAddr>, Value)>,
    pub extra: Vec<(String, Value)>,
}

impl ServiceSpec {
    /// A Service by `namespace/name`; headless until it is given an address.
    pub fn new(full_name: &str) -> Self {
        let (namespace, name) = full_name.split_once('/').unwrap_or(("default", full_name));
        Self {
            namespace: namespace.into(),
            name: name.into(),
            cluster_ips: Vec::new(),
            ports: Vec::new(),
            endpoints: Vec::new(),
            extra: Vec::new(),
        }
    }

    pub fn cluster_ip(mut self, ip: IpAddr) -> Self {
        self.cluster_ips.push(ip);
        self
    }

    /// A named port and the number that its endpoints listen on.
    pub fn port(mut self, name: &str, port: u16, target: u16) -> Self {
        self.ports.push((name.into(), port, target));
        self
    }

    /// A ready endpoint.
    pub fn endpoint(self, pod: &Pod) -> Self {
        self.endpoint_with(pod, json!({"ready": true, "serving": true, "terminating": false}))
    }

    /// An endpoint with its conditions as given.
    pub fn endpoint_with(mut self, pod: &Pod, conditions: Value) -> Self {
        let endpoint = json!({
            "conditions": conditions,
            "nodeName": pod.node_name(),
            "targetRef": {"kind": "Pod", "namespace": pod.namespace_name(), "name": pod.name(), "uid": pod.uid()},
        });
        self.endpoints.push((pod.ips().to_vec(), endpoint));
        self
    }

    /// Any other field of the Service by its JSON pointer, such as `/spec/sessionAffinity`.
    pub fn field(mut self, pointer: &str, value: Value) -> Self {
        self.extra.push((pointer.into(), value));
        self
    }

    pub(crate) fn manifests(&self) -> Vec<Value> {
        let ips: Vec<String> = match self.cluster_ips.is_empty() {
            true => vec!["None".into()],
            false => self.cluster_ips.iter().map(IpAddr::to_string).collect(),
        };
        let ports = self.ports.iter();
        let ports =
            ports.map(|(name, port, to)| json!({"name": name, "port": port, "targetPort": to, "protocol": "TCP"}));
        let mut service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": self.namespace, "name": self.name},
            "spec": {"clusterIP": ips[0], "clusterIPs": ips, "ports": ports.collect::<Vec<_>>()},
        });
        for (pointer, value) in &self.extra {
            let Some((parent, field)) = pointer.rsplit_once('/') else { continue };
            if let Some(parent) = service.pointer_mut(parent) {
                parent[field] = value.clone();
            }
        }
        [service]
            .into_iter()
            .chain([("IPv4", false), ("IPv6", true)].map(|(family, v6)| self.slice(family, v6)))
            .collect()
    }

    fn slice(&self, family: &str, v6: bool) -> Value {
        let mut endpoints = Vec::new();
        for (ips, endpoint) in &self.endpoints {
            let addresses: Vec<_> = ips.iter().filter(|ip| ip.is_ipv6() == v6).map(IpAddr::to_string).collect();
            if !addresses.is_empty() {
                let mut endpoint = endpoint.clone();
                endpoint["addresses"] = addresses.into();
                endpoints.push(endpoint);
            }
        }
        let ports = self.ports.iter().map(|(name, _, target)| json!({"name": name, "port": target, "protocol": "TCP"}));
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": self.namespace,
                "name": format!("{}-{}", self.name, family.to_lowercase()),
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": family,
            "ports": ports.collect::<Vec<_>>(),
            "endpoints": endpoints,
        })
    }
}
